"""Every push proved: which weights are compared when, and what stops a run."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltrain.protocols import EngineState
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.sync.colocated import Sync
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.tensor_ops import Fingerprint, weight_fingerprint

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
LAYERED = 24  # 2 layers of 12 weights each: q, k, v with biases, o, gate, up, down, two norms


def weights_of(learner: Any) -> Any:
    """What a sync calls for the weights of a plain model."""
    return lambda dtype: learner.state_dict().items()


def parameters_of(learner: Any) -> Any:
    """The same with tied weights once."""
    return lambda dtype: learner.named_parameters()


def engine_of(folder: str, dtype: torch.dtype = torch.float32) -> TransformersEngine:
    return TransformersEngine(
        folder, stop_token_ids=[1], pad_token_id=0, decode=lambda ids: "", max_rows=4, dtype=dtype
    )


def sync_of(engine: Any, ties: Mapping[str, str], sample: int = 4, full_every: int = 0) -> Sync:
    return Sync([engine], ties, sample, full_every, seed=3)


def move_weights(model: Any, lr: float, seed: int = 0) -> None:
    """Move every weight by about ``lr``, as one step of Adam does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += lr * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(params=["untied", "tied"])
def model(request: pytest.FixtureRequest, random_model: str, random_tied_model: str) -> tuple[str, Any]:
    folder = random_tied_model if request.param == "tied" else random_model
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_first_push_compares_every_weight_and_samples_take_turns(model: tuple[str, Any]) -> None:
    folder, learner = model
    sync = sync_of(engine_of(folder), learner.all_tied_weights_keys)
    requests: list[set[str]] = []
    (engine,) = sync.targets
    report = engine.fingerprint
    engine.fingerprint = lambda names=None: (requests.append(set(names or ())), report(names))[1]
    everything = set(learner.state_dict())
    outside = {HEAD, EMBEDDING, "model.norm.weight"}
    assert len(everything - outside) == LAYERED
    shown = sync.push(weights_of(learner), 0, expect_change=False)
    assert shown == {"sync/checked": len(everything), "sync/difference": 0.0}
    for version in range(1, LAYERED // 4 + 1):
        move_weights(learner, 1e-4, version)
        assert sync.push(weights_of(learner), version, expect_change=True)["sync/checked"] == 4 + 3
    assert all(
        outside <= names for names in requests[1:]
    )  # a stale head is caught at once, in whichever turn
    assert set().union(*requests[1:]) == everything  # 24 / 4 = 6 pushes reach every weight


def test_all_weights_are_compared_every_so_many_pushes(model: tuple[str, Any]) -> None:
    folder, learner = model
    sync = sync_of(engine_of(folder), learner.all_tied_weights_keys, sample=1, full_every=3)
    counts = [
        sync.push(weights_of(learner), version, expect_change=False)["sync/checked"] for version in range(7)
    ]
    assert counts == [27, 4, 4, 27, 4, 4, 27]  # 24 + head, embedding, norm; 1 + the same three


def test_a_tied_head_is_compared_where_the_learner_sends_it_once(random_tied_model: str) -> None:
    learner = AutoModelForCausalLM.from_pretrained(random_tied_model, dtype=torch.float32)
    engine = engine_of(random_tied_model)
    assert HEAD not in dict(learner.named_parameters())
    sync = sync_of(engine, learner.all_tied_weights_keys)
    assert sync.push(parameters_of(learner), 0, expect_change=False)["sync/checked"] == 27
    with pytest.raises(WeightMismatchError, match=f"'{HEAD}', which the learner does not report"):
        sync_of(engine, {}).push(parameters_of(learner), 0, expect_change=False)


def test_a_bfloat16_engine_is_compared_with_rounded_weights_to_the_last_digit(model: tuple[str, Any]) -> None:
    # float32 against bfloat16 differs by about 2^-9 / 8: only rounding first lets one entry's last bit be
    # seen
    folder, learner = model
    engine = engine_of(folder, torch.bfloat16)
    sync = sync_of(engine, learner.all_tied_weights_keys, full_every=1)
    assert sync.push(weights_of(learner), 0, expect_change=False)["sync/difference"] < 1e-12
    name = "model.layers.0.mlp.up_proj.weight"
    weight = engine._model.get_parameter(name).data
    weight[3, 5] *= 1 + 2**-7
    with pytest.raises(WeightMismatchError, match=name):
        sync._compare(sync._sent, True, "now")


def test_an_update_too_small_for_bfloat16_is_still_a_change_of_the_learner(model: tuple[str, Any]) -> None:
    folder, learner = model
    sync = sync_of(engine_of(folder, torch.bfloat16), learner.all_tied_weights_keys)
    sync.push(weights_of(learner), 0, expect_change=False)
    for version in (1, 2):
        with torch.no_grad():
            learner.get_parameter("model.norm.weight")[0] += 1e-6  # 1 + 1e-6 is 1 in bfloat16
        assert sync.push(weights_of(learner), version, expect_change=True)["sync/checked"] > 0


@pytest.mark.parametrize("stuck_version", [1, 2, 5])
def test_weights_that_stand_still_although_updates_were_taken_stop_the_run_at_that_step(
    model: tuple[str, Any], stuck_version: int
) -> None:
    # FSDP and LoRA wrappers have trained copies while the engine was sent the original; every sample must see
    # it, not only full ones
    folder, learner = model
    sync = sync_of(engine_of(folder), learner.all_tied_weights_keys, full_every=2)
    sync.push(weights_of(learner), 0, expect_change=False)
    for version in range(1, stuck_version):
        move_weights(learner, 1e-4, version)
        sync.push(weights_of(learner), version, expect_change=True)
    message = rf"version {stuck_version}: .* those of version {stuck_version - 1}: '.*' still has fingerprint"
    with pytest.raises(WeightMismatchError, match=message):
        sync.push(weights_of(learner), stuck_version, expect_change=True)


def test_weights_may_stand_still_at_learning_rate_0_and_when_no_update_was_taken(
    model: tuple[str, Any],
) -> None:
    folder, learner = model
    sync = sync_of(engine_of(folder), learner.all_tied_weights_keys)
    for version in range(3):
        assert sync.push(weights_of(learner), version, expect_change=False)["sync/checked"] > 0
    # every update was dropped: the version is the old one
    assert sync.push(weights_of(learner), 2, expect_change=True)["sync/checked"] > 0


def test_every_weight_can_be_compared_after_sampling_and_it_counts_as_no_push(model: tuple[str, Any]) -> None:
    folder, learner = model
    engine = engine_of(folder)
    weights = parameters_of(learner)
    sync = sync_of(engine, learner.all_tied_weights_keys, sample=1)
    for version in range(2):
        sync.push(weights, version, expect_change=False)
    turn = sync._sample_fingerprints(1)
    pushes = sync.pushes
    sync.verify_all(weights)
    assert (sync._sample_fingerprints(1), sync.pushes) == (turn, pushes)
    name = next(name for name, _ in weights(torch.float32) if name not in turn[torch.float32])
    engine._model.get_parameter(name).data[0] += 1e-6
    sync.verify()  # it is not this one's turn
    with pytest.raises(WeightMismatchError, match=f"after sampling with version 1: weight '{name}'"):
        sync.verify_all(weights)


def test_a_tied_head_is_among_every_weight(random_tied_model: str) -> None:
    learner = AutoModelForCausalLM.from_pretrained(random_tied_model, dtype=torch.float32)
    engine = engine_of(random_tied_model)
    sync = sync_of(engine, learner.all_tied_weights_keys)
    sync.push(parameters_of(learner), 0, expect_change=False)
    sync.verify_all(parameters_of(learner))
    report = engine.fingerprint
    engine.fingerprint = lambda names=None: {**report(names), HEAD: Fingerprint(1.0, 0.0)}
    with pytest.raises(WeightMismatchError, match=HEAD):
        sync.verify_all(parameters_of(learner))


def test_weights_are_taken_from_the_learner_once(model: tuple[str, Any]) -> None:
    folder, learner = model
    sync = sync_of(engine_of(folder), learner.all_tied_weights_keys)
    passed: list[str] = []

    def weights(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in learner.state_dict().items():
            passed.append(name)
            yield name, weight

    for version in range(3):
        sync.push(weights, version, expect_change=False)
    assert passed == list(learner.state_dict()) * 3


def test_the_message_names_weight_numbers_version_and_remedy(model: tuple[str, Any]) -> None:
    folder, learner = model
    engine = engine_of(folder)
    sync = sync_of(engine, learner.all_tied_weights_keys, full_every=1)
    sync.push(weights_of(learner), 0, expect_change=False)
    load = engine.load
    name = "model.layers.1.mlp.down_proj.weight"
    old = copy.deepcopy(learner.get_parameter(name))

    def all_but_one(weights: Any, version: int) -> None:
        load(((key, old.detach() if key == name else weight) for key, weight in weights), version)

    engine.load = all_but_one
    move_weights(learner, 1e-4)
    with pytest.raises(WeightMismatchError) as stop:
        sync.push(weights_of(learner), 1, expect_change=True)
    message = str(stop.value)
    assert message.startswith(f"after the push of version 1: weight {name!r}: the engine multiplies with ")
    numbers = [
        float(word.strip(",();"))
        for word in message.split()
        if word.strip(",();").replace(".", "").replace("-", "").isdigit()
    ]
    assert any(math.isclose(number, engine.fingerprint()[name].number, rel_tol=1e-6) for number in numbers)
    assert "a reload from disk" in message


def test_what_is_gathered_is_compared_with_what_the_ranks_hold(model: tuple[str, Any]) -> None:
    """A fault of the gathering would be in what is sent and in what is expected of the engine alike."""
    folder, learner = model
    held = {name: weight_fingerprint(name, weight) for name, weight in weights_of(learner)(torch.float32)}
    sync = sync_of(engine_of(folder), {})
    asked: list[torch.dtype] = []

    def shard_sums(dtype: torch.dtype) -> dict[str, Fingerprint]:
        asked.append(dtype)
        return held

    sync.shard_sums = shard_sums
    sync.push(weights_of(learner), 0, expect_change=False)
    assert asked == [torch.float32]

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights_of(learner)(torch.float32):
            if name == "model.layers.0.self_attn.v_proj.weight":
                weight = weight.clone()
                weight[-1] = 0  # the last rank's rows did not come
            yield name, weight

    broken = sync_of(engine_of(folder), {})
    broken.shard_sums = shard_sums
    with pytest.raises(WeightMismatchError, match=r"v_proj.weight' was gathered with .* the shards of the"):
        broken.push(lambda dtype: cut(), 0, expect_change=False)


def test_every_target_is_loaded_and_compared_in_its_own_precision(model: tuple[str, Any]) -> None:
    folder, learner = model
    engines = [engine_of(folder), engine_of(folder, torch.bfloat16), engine_of(folder)]
    sync = Sync(engines, learner.all_tied_weights_keys, sample=4, full_every=0, seed=3)
    streams: list[int] = []

    def weights(dtype: torch.dtype) -> Any:
        streams.append(len(streams))
        return learner.state_dict().items()

    assert sync.push(weights, 0, expect_change=False) == {"sync/checked": 27, "sync/difference": 0.0}
    move_weights(learner, 1e-3)
    assert sync.push(weights, 1, expect_change=True) == {"sync/checked": 7, "sync/difference": 0.0}
    assert len(streams) == 6 and [engine.version for engine in engines] == [1, 1, 1]
    sync.verify()
    sync.verify_all(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    for place in (2, 1):
        weight = engines[place]._model.get_parameter(name).data
        weight[0] *= 1.5
        with pytest.raises(
            WeightMismatchError, match=rf"after sampling with version 1, target {place} of 3: weight '{name}'"
        ):
            sync.verify_all(weights)


def test_a_push_wakes_what_sleeps_and_each_thing_asked_of_a_target_has_a_deadline(random_model: str) -> None:
    learner = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    engine = engine_of(random_model)
    requests: list[str] = []

    @contextlib.contextmanager
    def deadline(whom: str, what: str) -> Iterator[None]:
        assert whom == "the transformers engine"
        requests.append(what)
        yield

    sync = Sync([engine], {}, sample=4, full_every=0, seed=3, deadline=deadline)
    sync.push(weights_of(learner), 0, expect_change=False)
    sync.sleep()
    assert engine.state is EngineState.ASLEEP
    sync.push(weights_of(learner), 1, expect_change=False)
    assert (engine.state, engine.version) == (EngineState.LOADED, 1)
    proved = "to say which weights it holds"
    pushes = [["to wake up", f"to load version {version}", proved] for version in (0, 1)]
    assert requests == [*pushes[0], "to fall asleep", *pushes[1]]
