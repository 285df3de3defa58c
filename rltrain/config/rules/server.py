"""Rules about the vLLM server of ``rollout.engine: vllm_server``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.rules.registries import EXTRA_SAMPLES
from rltrain.config.schema import Rollout, Server, Workers

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
    workers = rollout.workers
    urls = [server.url or ""]
    if workers is not None:
        urls = [*workers.urls, *workers.admin, workers.router or ""]
    joins = rollout.workers is not None and rollout.workers.join
    if server.authority is not None and not joins and not any(url.startswith("https://") for url in urls):
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
    if rollout.workers is not None:
        yield from _worker_problems(rollout, rollout.workers)


def _worker_problems(rollout: Rollout, workers: Workers) -> Iterator[str]:
    sources = {
        "count": workers.count is not None,
        "urls": bool(workers.urls),
        "join": workers.join,
        "router": workers.router is not None,
    }
    named = [name for name, is_given in sources.items() if is_given]
    if len(named) != 1 and named != ["urls", "join"]:
        yield (
            f"rollout.workers names {' and '.join(named) or 'no workers'}; give count (rltrain starts them "
            "on this machine), urls (of running ones), join (they come by themselves), urls with join, or "
            "router with admin"
        )
    yield from _address_problems(workers)
    if rollout.server.url is not None:
        yield (
            f"rollout.server.url is {rollout.server.url!r} beside rollout.workers; move it to "
            "rollout.workers.urls, or set rollout.workers to null"
        )
    for ref in rollout.extra_samples:
        if "reference_weights" in EXTRA_SAMPLES.spec(ref.name).needs_with(ref.hp):
            yield (
                f"rollout.extra_samples has {ref.name}, which samples from the reference model: the policy's "
                "workers are never lent to another model; use rollout.engine vllm or transformers, or set "
                "rollout.workers to null"
            )


def _address_problems(workers: Workers) -> Iterator[str]:
    lists = {"urls": workers.urls, "admin": workers.admin, "router": (workers.router or _URLS[0],)}
    for key, urls in lists.items():
        for url in urls:
            if not url.startswith(_URLS):
                yield (
                    f"rollout.workers.{key} has {url!r}; expected http://HOST:PORT, https://HOST:PORT or "
                    "unix:PATH"
                )
        if twice := sorted({url for url in urls if urls.count(url) > 1}):
            yield f"rollout.workers.{key} names {twice[0]} twice; a worker has one place in the pool"
    if workers.router is not None and not workers.admin:
        yield (
            f"rollout.workers.router is {workers.router!r} and admin is empty: weights are sent to each "
            "worker behind the router, and proved there; name the address of every one in admin"
        )
    if workers.admin and workers.router is None:
        yield (
            "rollout.workers.admin names the workers behind rollout.workers.router, which is null; name the "
            "router, or move the addresses to urls"
        )
    if workers.router is not None and workers.router in workers.admin:
        yield (
            f"rollout.workers.admin has the router {workers.router}: it would send the weights to one of its "
            "workers only; name the workers' own addresses"
        )


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
