"""Rules across sections: each error and warning, with its remedy, and that similar recipes pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.checking import refused, warnings


def test_the_minimal_recipe_passes_without_a_word(recipe: Path) -> None:
    assert warnings(recipe) == ()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "advantage=group_nrom",
            "advantage: no advantage is called 'group_nrom'; did you mean 'group_norm'?",
        ),
        ("loss.policy=clib", "loss.policy: no policy loss is called 'clib'; did you mean 'clip'?"),
        (
            "loss.aggregate=token_meen",
            "loss.aggregate: no aggregate is called 'token_meen'; did you mean 'token_mean'?",
        ),
        ("control=[tss]", "control.0: no control is called 'tss'; did you mean 'tis'?"),
        (
            "loss.terms=[{name: kll, coefficient: 1.0}]",
            "loss.terms.0: no loss term is called 'kll'; did you mean 'kl'?",
        ),
        (
            "reward.functions=[exact, math_anser]",
            "reward.functions.1: no reward is called 'math_anser'; did you mean 'math_answer'?",
        ),
        (
            "loss.policy.eps_hi=0.3",
            "loss.policy: policy loss 'clip' has no hyperparameter 'eps_hi'; did you mean 'eps_high'?",
        ),
        ("loss.policy.eps_high=wide", "eps_high must be float, got 'wide' (str)"),
        ("loss.policy.weight=2.0", "policy loss 'clip' has no hyperparameter 'weight'"),
        ("loss.terms=[{name: kl, coefficient: 0.1, estimator: k1}]", "use k2 or k3 here"),
    ],
)
def test_methods_and_hyperparameters_are_those_of_the_registries(
    recipe: Path, override: str, expected: str
) -> None:
    (problem,) = refused(recipe, override)
    assert expected in problem


@pytest.mark.parametrize(
    ("overrides", "expected", "remedy"),
    [
        (
            ["learner.optimizer.min_lr_ratio=0.1"],
            "learner.optimizer.min_lr_ratio is 0.1, but learner.optimizer.schedule is constant",
            "set the schedule to linear or cosine",
        ),
        (
            ["learner.updates=25"],
            "learner.updates is 25 but rollout.prompts is 24",
            "set learner.updates to at most 24",
        ),
        # 16 prompt tokens + 8 completion tokens = 24 > 23
        (
            ["learner.tokens_per_micro_batch=23"],
            "16 + 8 = 24 tokens",
            "set learner.tokens_per_micro_batch to at least 24",
        ),
        (
            ["rollout.n=1"],
            "advantage group_norm compares completions of one prompt",
            "set rollout.n to at least 2",
        ),
        (["rollout.n=1", "advantage=rloo"], "advantage rloo compares", "or advantage to reinforce_pp"),
        (
            ["rollout.n=1", "advantage=reinforce_pp", "rollout.dynamic_sampling={}"],
            "neither all right nor all wrong",
            "at least 2",
        ),
        (["rollout.dynamic_sampling.max_rounds=1"], "no group is ever replaced", "set it to 2 or more"),
        (
            ["rollout.dynamic_sampling={}", "reward.functions=[{name: format, tags: [a]}]"],
            "raw correctness",
            "add one of choice",
        ),
        (["eval.n=4"], "eval.k asks for pass@8 but eval.n is 4", "set eval.n to 8 or drop 8 from eval.k"),
        (["loss.policy={name: clip, eps_low: -5}"], "eps_low is -5", "at least 0"),
        (["reward.functions.0={name: exact, weight: 0.0}"], "every weight is 0", "give one of them a weight"),
        (
            ["loss.policy=gspo"],
            "loss.policy gspo has one ratio per sequence",
            "set loss.aggregate to seq_mean_token_mean",
        ),
        (
            ["loss.policy=gmpo", "loss.aggregate=dr_grpo"],
            "weigh them by length",
            "set loss.aggregate to seq_mean_token_mean",
        ),
        (
            ["advantage={name: reinforce_pp, kl_coef: 0.01}", "loss.terms=[{name: kl, coefficient: 0.1}]"],
            "the penalty kl counts twice: in the reward (advantage.kl_coef 0.01) and as a loss term "
            "(loss.terms.0)",
            "keep one of them",
        ),
        (
            ["rollout.trust_logp=true", "control=[tis]"],
            "which rollout.trust_logp makes equal",
            "set rollout.trust_logp to false",
        ),
        (
            ["rollout.trust_logp=true", "control=[off_policy_mask, geometric_rejection]"],
            "control.1 geometric_rejection",
            "drop the control",
        ),
        (
            ["reward.functions=[exact, length]"],
            "max_tokens is None and buffer_tokens None",
            "write max_tokens: 8, buffer_tokens: 1",
        ),
        (
            ["reward.functions=[exact, {name: length, max_tokens: 8, buffer_tokens: 9}]"],
            "0 < buffer_tokens <= max_tokens",
            "write",
        ),
        (
            ["reward.functions=[exact, {name: length, max_tokens: 9, buffer_tokens: 2}]"],
            "never reach it",
            "at most 8",
        ),
        (["reward.functions=[format]"], "nothing is required", "set regex, tags"),
        (["reward.functions=[{name: format, regex: '('}]"], "not a regular expression", "single quotes"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_its_remedy(
    recipe: Path, overrides: list[str], expected: str, remedy: str
) -> None:
    (problem,) = refused(recipe, *overrides)
    assert expected in problem
    assert remedy in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.updates=24"],
        ["learner.tokens_per_micro_batch=24"],
        ["rollout.n=1", "advantage=reinforce_pp"],
        ["rollout.dynamic_sampling={}"],
        [
            "rollout.dynamic_sampling={}",
            "reward.functions=[{name: format, tags: [a]}, {name: exact, weight: 0.0}]",
        ],
        ["eval.n=4", "data.eval=null"],
        ["loss.policy=gspo", "loss.aggregate=seq_mean_token_mean", "learner.updates=2"],
        ["control=[tis, mis]"],
        ["rollout.trust_logp=true", "control=[off_policy_mask]"],
        ["advantage={name: reinforce_pp, kl_coef: 0.01}", "loss.terms=[{name: entropy, coefficient: 0.1}]"],
        ["reward.functions=[exact, {name: length, max_tokens: 8, buffer_tokens: 8}]"],
    ],
)
def test_what_lies_next_to_a_refusal_passes_without_a_word(recipe: Path, overrides: list[str]) -> None:
    assert warnings(recipe, *overrides) == ()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["loss.policy.eps_high=0.28"],
            "the ratio is exactly 1 and nothing clips; set learner.updates to 2 or more",
        ),
        (
            ["loss.policy=reinforce", "learner.epochs=2"],
            "the step takes 2 updates: all but the first are off-policy",
        ),
        (["learner.optimizer.lr=0.0"], "learner.optimizer.lr is 0: the weights never change"),
        (["learner.optimizer.warmup_steps=201"], "the run takes 200 optimizer updates"),
        # 24 groups in 16 updates: 8 x 2 + 8 x 1
        (["learner.updates=16"], "8 updates of a step hold 2 groups and 8 hold 1"),
        (["eval.temperature=0.0"], "greedy completions are all equal; set eval.n and eval.k to 1"),
    ],
)
def test_what_works_but_surprises_is_a_warning(recipe: Path, overrides: list[str], expected: str) -> None:
    (warning,) = warnings(recipe, *overrides)
    assert expected in warning


def test_a_method_that_acts_only_off_policy_is_refused_with_one_update(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_control.py").write_text(
        "@method('off_only', traits={'off_policy_only'})\ndef off_only(batch, *, share: float = 0.1):\n    "
        "return batch\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from rltrain.config.rules import online as module
    from rltrain.registry import Registry

    monkeypatch.setattr(module, "TOKEN_CONTROLS", Registry("control", modules=("made_up_control",)))
    (problem,) = refused(recipe, "control=[off_only]")
    assert "control.0 off_only acts on the ratio to the old policy, which is exactly 1" in problem
    assert "set learner.updates to 2 or more" in problem
    assert warnings(recipe, "control=[off_only]", "learner.updates=2") == ()
    assert warnings(recipe, "control=[off_only]", "learner.epochs=2") == ()


def test_every_problem_of_a_recipe_is_reported_at_once(recipe: Path) -> None:
    assert len(refused(recipe, "rollout.n=1", "loss.policy=gspo", "eval.n=2")) == 3
    assert len(refused(recipe, "loss.policy=gspoo", "advantage=x", "eval.n=2")) == 3


# the user's own rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mine.py:scoer", "mine.py defines no function 'scoer'; did you mean 'score'?"),
        ("yours.py:score", "there is no file "),
        ("mine.py", "must name a file and a function in it, as in path/to/file.py:function"),
        (":score", "must name a file and a function in it"),
        ("broken.py:score", "broken.py is not valid Python"),
        (
            "{name: 'mine.py:score', scael: 2.0}",
            "has no keyword-only argument 'scael'; did you mean 'scale'?",
        ),
        ("{name: 'mine.py:plain', scale: 2.0}", "has no keyword-only argument 'scale'; it has none"),
    ],
)
def test_a_reward_file_is_read_before_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(inputs, *, scale=1.0): ...\ndef plain(inputs): ...\nraise SystemExit('imported')\n"
    )
    (tmp_path / "broken.py").write_text("def score(:\n")
    monkeypatch.chdir(tmp_path)
    (problem,) = refused(recipe, f"reward.functions.0={name if name.startswith('{') else repr(name)}")
    assert problem.startswith("reward.functions.0: ")
    assert expected in problem


def test_a_reward_file_that_fits_passes_and_dynamic_sampling_asks_it_for_correctness(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def score(inputs, *, scale=1.0): ...\ndef any(inputs, **more): ...\n")
    monkeypatch.chdir(tmp_path)
    assert (
        warnings(
            recipe, "reward.functions=[{name: 'mine.py:score', scale: 2.0}, {name: 'mine.py:any', x: 1}]"
        )
        == ()
    )
    (warning,) = warnings(recipe, "reward.functions=['mine.py:score']", "rollout.dynamic_sampling={}")
    assert "must put a part named 'correct' into its scores" in warning


@pytest.mark.parametrize("name", ["waits", "made", "loads", "judge"])
def test_functions_that_are_async_made_or_imported_are_taken_for_rewards(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "from json import loads\nimport functools\nasync def waits(completions, **columns): ...\nmade = "
        "functools.partial(waits)\njudge: object = print\n"
    )
    monkeypatch.chdir(tmp_path)
    assert warnings(recipe, f"reward.functions.0=mine.py:{name}") == ()
