"""Log-probs of frozen models: computed once, cached for equal rows and settings only, and verified before
use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.learner.frozen_logprobs import FrozenLogProbs, cache_key
from rltrain.learner.frozen_models import frozen_model, weights_digest, weights_of
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.types.policy import TokenRows

ROWS = TokenRows(((5, 6), (7,), (5, 6), (7,)), ((8, 9, 1), (10, 1), (11, 1), (12, 13, 14, 1)))


class Counting(PreferenceLearner):
    """Records how many rows each pass computes."""

    row_counts: list[int]

    def log_probs(self, rows: TokenRows, **keywords: Any) -> torch.Tensor:
        self.row_counts.append(len(rows))
        return super().log_probs(rows, **keywords)


@pytest.fixture
def learner(random_model: str) -> Counting:
    settings = LearnerCore(optimizer=Optimizer(lr=0.1))
    learner = Counting(Model(path=random_model), settings, total_updates=1, seed=0)
    learner.row_counts = []
    return learner


def frozen(
    learner: Counting, folder: Path | None, messages: list[str], verify: int = 2, weights: str = "w"
) -> FrozenLogProbs:
    return FrozenLogProbs(learner, None, weights, folder, verify, messages.append)


def test_cached_log_probs_are_read_and_verified(learner: Counting, tmp_path: Path) -> None:
    messages: list[str] = []
    first = frozen(learner, tmp_path, messages).log_probs(ROWS, sides=2)
    again = frozen(learner, tmp_path, messages).log_probs(ROWS, sides=2)
    assert torch.equal(first, again)
    assert learner.row_counts == [4, 2]  # all rows, then a sample
    assert "computing 4" in messages[0] and ": from " in messages[1] and len(list(tmp_path.iterdir())) == 1
    frozen(learner, tmp_path, messages, verify=0).log_probs(ROWS, sides=2)
    assert learner.row_counts == [4, 2]


def test_other_rows_weights_and_settings_have_other_keys(learner: Counting, tmp_path: Path) -> None:
    other_rows = TokenRows(ROWS.prompts, (*ROWS.completions[:3], (12, 13, 15, 1)))
    frozen(learner, tmp_path, []).log_probs(ROWS, sides=2)
    frozen(learner, tmp_path, []).log_probs(other_rows, sides=2)
    frozen(learner, tmp_path, [], weights="v").log_probs(ROWS, sides=2)
    assert learner.row_counts == [4, 4, 4] and len(list(tmp_path.iterdir())) == 3
    settings = {"precision": "no", "attention": "sdpa"}
    keys = {
        cache_key(ROWS, "w", settings),
        cache_key(ROWS, "w", settings | {"precision": "bf16"}),
        cache_key(ROWS, "w", settings | {"attention": "eager"}),
        # the same tokens with another border between prompt and completion
        cache_key(TokenRows(((5,), *ROWS.prompts[1:]), ((6, 8, 9, 1), *ROWS.completions[1:])), "w", settings),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("harm", ["other numbers", "not a number", "cut off", "another file"])
def test_a_file_that_is_not_what_it_should_be_is_replaced_with_a_warning(
    learner: Counting, tmp_path: Path, harm: str
) -> None:
    right = frozen(learner, tmp_path, []).log_probs(ROWS, sides=2)
    (path,) = tmp_path.iterdir()
    if harm == "cut off":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        wrong = {"other numbers": right - 0.1, "not a number": right * torch.nan, "another file": right}[harm]
        key = "no key" if harm == "another file" else path.stem
        save_file({"logp": wrong}, path, metadata={"fingerprint": key})
    messages: list[str] = []
    assert torch.equal(frozen(learner, tmp_path, messages, verify=4).log_probs(ROWS, sides=2), right)
    assert messages[0].startswith("warning: the log-probs in") and "computed again" in messages[0]
    assert torch.equal(load_file(path)["logp"], right)


def test_without_a_folder_nothing_is_cached(learner: Counting, tmp_path: Path) -> None:
    frozen(learner, None, []).log_probs(ROWS, sides=2)
    frozen(learner, None, []).log_probs(ROWS, sides=2)
    assert learner.row_counts == [4, 4] and not list(tmp_path.iterdir())


def test_a_frozen_copy_has_the_digest_of_the_model_it_is_of_and_an_update_changes_it(
    learner: Counting, random_model: str
) -> None:
    digest = weights_digest(learner.weights())
    with frozen_model(None, Model(path=random_model), learner.trained) as (copy, digest_of_copy):
        assert digest_of_copy == weights_digest(weights_of(copy)) == digest
        torch.testing.assert_close(
            learner.log_probs(ROWS, sides=2, frozen=copy), learner.log_probs(ROWS, sides=2)
        )
    with torch.no_grad():
        next(learner.trained.unwrapped_model.parameters()).add_(1e-4)
    assert weights_digest(learner.weights()) != digest
