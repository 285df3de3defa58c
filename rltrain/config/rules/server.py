"""Rules about the vLLM server of ``rollout.engine: vllm_server``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.rules.registries import EXTRA_SAMPLES
from rltrain.config.schema import AnyRecipe, MethodRef, OnlineRecipe, Rollout, Server, Workers
from rltrain.control import TOKEN_CONTROLS
from rltrain.needs import ROLLOUT_LOGP

__all__ = ["add_importance_weights", "server_problems"]

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
        yield from _worker_problems(rollout.workers)
        yield from _role_problems(rollout, rollout.workers)


def add_importance_weights(recipe: AnyRecipe) -> tuple[AnyRecipe, tuple[str, ...]]:
    """The recipe, with importance weights where its server samples by other means than the policy alone, and
    what the user is told of it. A control of the recipe's own that reads the engine's log-probs stays alone.
    """
    if not isinstance(recipe, OnlineRecipe) or recipe.rollout.engine != "vllm_server":
        return recipe, ()
    if recipe.rollout.server.speculative is None or recipe.rollout.trust_logp:
        return recipe, ()
    if any(ROLLOUT_LOGP in TOKEN_CONTROLS.spec(control.name).needs for control in recipe.control):
        return recipe, ()
    weighted = recipe.model_copy(update={"control": (*recipe.control, MethodRef(name="tis"))})
    return weighted, (
        "rollout.server.speculative is set, so that importance weights correct for what its sampling "
        "differs by: control tis is added; name tis or another control that reads rollout_logp to choose",
    )


def _worker_problems(workers: Workers, key: str = "rollout.workers") -> Iterator[str]:
    sources = {
        "count": workers.count is not None,
        "urls": bool(workers.urls),
        "join": workers.join,
        "router": workers.router is not None,
    }
    named = [name for name, is_given in sources.items() if is_given]
    if len(named) != 1 and named != ["urls", "join"]:
        yield (
            f"{key} names {' and '.join(named) or 'no workers'}; give count (rltrain starts them "
            "on this machine), urls (of running ones), join (they come by themselves), urls with join, or "
            "router with admin"
        )
    yield from _address_problems(workers, key)


def _role_problems(rollout: Rollout, workers: Workers) -> Iterator[str]:
    if rollout.server.url is not None:
        yield (
            f"rollout.server.url is {rollout.server.url!r} beside rollout.workers; move it to "
            "rollout.workers.urls, or set rollout.workers to null"
        )
    samples_reference = [
        ref.name
        for ref in rollout.extra_samples
        if "reference_weights" in EXTRA_SAMPLES.spec(ref.name).needs_with(ref.hp)
    ]
    others = rollout.reference_workers
    if others is None:
        if samples_reference:
            yield (
                f"rollout.extra_samples has {samples_reference[0]}, which samples from the reference model: "
                "the policy's workers are never lent to another model; name others in "
                "rollout.reference_workers, use rollout.engine vllm or transformers, or set rollout.workers "
                "to null"
            )
        return
    yield from _worker_problems(others, "rollout.reference_workers")
    if not samples_reference:
        yield (
            "rollout.reference_workers would hold the reference model, and nothing samples from it: the "
            "log-probs of a reference or a teacher are the learner's; set it to null"
        )
    if shared := sorted(_addresses(workers) & _addresses(others)):
        yield (
            f"rollout.reference_workers names {shared[0]}, which rollout.workers names too; a worker holds "
            "the weights of one model: name another"
        )
    if workers.join and others.join and workers.port == others.port:
        yield (
            f"rollout.workers and rollout.reference_workers both wait for workers at port {workers.port}, "
            "which could not be told apart; give rollout.reference_workers another port"
        )


def _addresses(workers: Workers) -> set[str]:
    return {*workers.urls, *workers.admin, *filter(None, [workers.router])}


def _address_problems(workers: Workers, key: str) -> Iterator[str]:
    lists = {"urls": workers.urls, "admin": workers.admin, "router": (workers.router or _URLS[0],)}
    for name, urls in lists.items():
        for url in urls:
            if not url.startswith(_URLS):
                yield (f"{key}.{name} has {url!r}; expected http://HOST:PORT, https://HOST:PORT or unix:PATH")
        if twice := sorted({url for url in urls if urls.count(url) > 1}):
            yield f"{key}.{name} names {twice[0]} twice; a worker has one place in the pool"
    if workers.router is not None and not workers.admin:
        yield (
            f"{key}.router is {workers.router!r} and admin is empty: weights are sent to each "
            "worker behind the router, and proved there; name the address of every one in admin"
        )
    if workers.admin and workers.router is None:
        yield (
            f"{key}.admin names the workers behind {key}.router, which is null; name the router, "
            "or move the addresses to urls"
        )
    if workers.router is not None and workers.router in workers.admin:
        yield (
            f"{key}.admin has the router {workers.router}: it would send the weights to one of its "
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
