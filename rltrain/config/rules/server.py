"""Rules about the vLLM server of ``rollout.engine: vllm_server``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.schema import Rollout, Server

__all__ = ["server_problems"]

# Methods of vLLM that guess tokens without a model of their own.
_WITHOUT_DRAFT_MODEL = ("ngram",)
_URLS = ("http://", "https://", "unix:")


def server_problems(rollout: Rollout) -> Iterator[str]:
    server = rollout.server
    if server.url is not None and not server.url.startswith(_URLS):
        yield (
            f"rollout.server.url is {server.url!r}; expected http://HOST:PORT, https://HOST:PORT or unix:PATH"
        )
    if server.authority is not None and not (server.url or "").startswith("https://"):
        yield (
            "rollout.server.authority checks the certificate of an https server, but rollout.server.url is "
            f"{server.url!r}; drop it or name an https:// url"
        )
    if rollout.adaptive_temperature is not None:
        yield (
            "rollout.adaptive_temperature changes the logits inside the engine, token by token, and reads "
            "the entropies back; a server answers with tokens and log-probs only: use rollout.engine vllm or "
            "transformers"
        )
    if server.quantization is not None:
        yield (
            f"rollout.server.quantization is {server.quantization!r}: the server would round the weights it "
            "is sent, so that no fingerprint could prove that a push arrived, and a stale layer would look "
            "like rounding; set it to null"
        )
    yield from _speculative_problems(server)


def _speculative_problems(server: Server) -> Iterator[str]:
    if server.speculative is None:
        return
    method = server.speculative.get("method")
    if method not in _WITHOUT_DRAFT_MODEL or "model" in server.speculative:
        yield (
            f"rollout.server.speculative has method {method!r}: a draft model's weights are not the "
            "policy's, and no push renews them; use method "
            f"{' or '.join(_WITHOUT_DRAFT_MODEL)} without a model, or set it to null"
        )
