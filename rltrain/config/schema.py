"""The recipe: every key a user can write, with its unit and default. Imports neither torch nor vllm.

Section names are stage names. Hyperparameters of methods are not here: they stand in the method's signature,
and a recipe writes them beside its name (``policy: {name: clip, eps_high: 0.28}``).
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodRef(BaseModel):
    """A method by name, its hyperparameters beside it. A bare string is a name without hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str

    @property
    def hp(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RewardRef(MethodRef):
    """A reward: a registered name, or ``path/to/file.py:function``."""

    weight: float = 1.0
    sha256: str | None = (
        # of the user's file and the modules beside it that it imports; filled in when the recipe is loaded
        None
    )


def _expand_bare_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Method = Annotated[MethodRef, BeforeValidator(_expand_bare_name)]


COEFFICIENT_TAGS = ("number", "controller")


def _number_or_controller(value: Any) -> str:
    return COEFFICIENT_TAGS[isinstance(value, str | dict | MethodRef)]


class TermRef(MethodRef):
    """An additive loss term.

    Its coefficient is a number, or a controller that changes it in the course of the run.
    """

    coefficient: Annotated[
        Annotated[float, Field(ge=0), Tag("number")] | Annotated[Method, Tag("controller")],
        Discriminator(_number_or_controller),
    ]


Reward = Annotated[RewardRef, BeforeValidator(_expand_bare_name)]


class About(Section):
    """What a recipe reproduces. Not read by the trainer."""

    arxiv: str | None = None
    title: str = ""
    expected: str = ""  # the result the paper or our own run reports, with its conditions


class Model(Section):
    path: str  # Hub name or folder
    revision: str | None = None
    trust_remote_code: tuple[
        str, ...
    ] = ()  # whose own Python code may run: folders, or NAME@COMMIT on the Hub
    reference: str | None = None  # model of ref_logp and of the reference source; None: the starting point
    teacher: str | None = None  # model of teacher_logp, with the same tokenizer; None: the starting point
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"


class Source(Section):
    """Where rows come from, and how a prompt becomes what the model reads."""

    train: str  # Hub name, file (json, jsonl, parquet), folder, or a built-in task ("arithmetic")
    eval: str | None = None  # the same; None: no held-out rows
    train_split: str = "train"
    eval_split: str = "test"
    subset: str | None = None
    eval_subset: str | None = None  # None: as subset
    columns: dict[str, str] = {}  # our name -> the file's, e.g. {prompt: question}
    eval_columns: dict[str, str] | None = None  # None: as columns
    system: str | None = None  # system message put before the prompt
    prompt_template: str = "{prompt}"  # wraps text prompts
    chat_template: Literal["auto", "none"] = "auto"  # auto: the tokenizer's, where it has one
    date: dt.date | None = None  # that a chat template prints; None: the day on which the run starts
    options: dict[str, Any] = {}  # of a built-in task, e.g. {digits: 2}


class Data(Source):
    adapter: Literal["none", "gsm8k_calculator"] = "none"
    max_prompt_tokens: int = Field(default=1024, ge=1)  # longer prompts are dropped and counted
    max_prompts: int | None = Field(default=None, ge=1)  # the first so many after shuffling
    order: Method = MethodRef(name="shuffled")  # which prompts a step trains on: shuffled, gain_rl


class DynamicSampling(Section):
    """DAPO: groups whose raw correctness is all equal are replaced, with bounded effort."""

    max_rounds: int = Field(default=3, ge=1)  # generation rounds per step, the first included
    # PRIME: keep prompts whose share of right completions lies between these, both included; None: some right
    # and some wrong
    accuracy: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None


class AdaptiveTemperature(Section):
    """HAPO (arXiv:2509.16591): each token at ``temperature`` (1 + tau h_hat), by the entropies of the
    step before.
    """

    tau: float = Field(default=0.05, gt=0, lt=1)
    variant: Literal["scaled", "released", "unscaled"] = (
        "scaled"  # the intended sign, the release's, the paper's unbounded h
    )
    rho: float = Field(
        default=0.8, ge=0, le=1
    )  # quantile of ln H that keeps the temperature; as the control hapo has it


class EnvironmentRef(MethodRef):
    """What completions are episodes in: a registered name, or ``path/to/file.py:Class``; its own
    options stand beside these keys.
    """

    max_turns: int = Field(ge=1)  # of the policy
    turn_tokens: int = Field(
        ge=1
    )  # the policy writes at once; a whole episode, observations included, has rollout.max_tokens
    observation_tokens: int = Field(default=256, ge=1)  # of one observation; what is longer is cut at its end
    role: Literal["user", "tool"] = "user"  # whose message an observation is
    workers: int = Field(default=2, ge=1)  # processes
    seconds: float = Field(default=10.0, gt=0)  # wall-clock limit of one step, waits for a CPU not counted
    reset_seconds: float = Field(default=60.0, gt=0)  # of the start of an episode
    memory_gib: float = Field(default=4.0, gt=0)  # address-space limit of one process
    sha256: str | None = None  # as of a reward function


class Vllm(Section):
    gpu_memory_utilization: float = Field(default=0.45, gt=0, le=1)
    kv_cache_gib: float = Field(default=1.0, gt=0)  # on CPU
    max_num_seqs: int = Field(default=256, ge=1)
    enforce_eager: bool = False


class Rollout(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    prompts: int = Field(ge=1)  # per step, all ranks
    n: int = Field(ge=1)  # completions per prompt
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(ge=1)  # per completion; in an environment all turns and observations together
    max_rows: int = Field(default=256, ge=1)  # rows the transformers engine decodes at once
    trust_logp: bool = False  # take the engine's log-probs as old_logp
    mismatch_warn: float | None = Field(
        default=None, gt=0
    )  # nats, mean |learner - engine log-prob| of a step; None: by precision
    mismatch_stop: float | None = Field(default=None, gt=0)  # the same
    mismatch_patience: int = Field(default=3, ge=1)  # steps in a row above mismatch_stop that end the run
    dynamic_sampling: DynamicSampling | None = None
    extra_samples: tuple[
        Method, ...
    ] = ()  # further rows of a prompt's group: aepo, reference, answer (rollout/extra_samples.py)
    adaptive_temperature: AdaptiveTemperature | None = None
    environment: EnvironmentRef | None = None  # None: a completion is one answer
    vllm: Vllm = Vllm()


class Sync(Section):
    """Proof, after every push of weights, that the engine holds them.

    Weights outside the repeated layers are always compared.
    """

    sample: int = Field(default=4, ge=0)  # weights of the repeated layers compared per push, in rotation
    full_every: int = Field(default=10, ge=0)  # pushes between comparisons of all weights; 0: only the first


class RewardStage(Section):
    functions: tuple[Reward, ...] = Field(min_length=1)  # the score is the weighted sum
    workers: int = Field(default=2, ge=1)  # processes
    seconds: float = Field(
        default=10.0, gt=0
    )  # wall-clock limit of one completion's grading, waits for a CPU not counted
    memory_gib: float = Field(default=4.0, gt=0)  # address-space limit of one worker


class Loss(Section):
    policy: Method
    terms: tuple[TermRef, ...] = ()
    aggregate: Method = MethodRef(name="token_mean")


class Optimizer(Section):
    lr: float = Field(ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)  # optimizer updates
    max_grad_norm: float = Field(default=1.0, gt=0)


class LearnerCore(Section):
    """How gradients are computed, whatever the loss."""

    optimizer: Optimizer
    tokens_per_micro_batch: int = Field(default=16384, ge=1)  # prompt + completion tokens, padding included
    layout: Literal["auto", "padded", "packed"] = (
        "auto"  # auto: packed where the attention kernel knows variable lengths
    )
    share_prompt: Literal["auto", "never"] = (
        "auto"  # auto: read a prompt once for its completions where the model allows it and it pays
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # auto: float32 on CPU, bfloat16 autocast on GPU
    )
    gradient_checkpointing: bool = False
    head_chunk: int = Field(default=256, ge=1)  # tokens whose logits exist at once
    max_nonfinite: int = Field(default=3, ge=1)  # non-finite updates in a row that stop the run


class RolloutLearner(LearnerCore):
    """How often a step's completions, or the pairs made of them, are learned from."""

    updates: int = Field(default=1, ge=1)  # optimizer updates per pass over a step's completions
    epochs: int = Field(default=1, ge=1)  # passes over a step's completions

    @property
    def updates_per_step(self) -> int:
        return self.updates * self.epochs


class Learner(RolloutLearner):
    skip_idle_rows: bool = True  # rows that cannot contribute skip the gradient pass (same gradient)


class ProcessReward(Section):
    """A model that learns beside the policy, from outcomes, what each token earned (PRIME,
    arXiv:2502.01456).
    """

    path: str | None = None  # Hub name or folder, with the policy's tokenizer; None: model.path
    reference: str | None = (
        None  # model its log-probs are compared with; None: its own start; "policy": the policy that sampled
    )
    loss: Method = MethodRef(name="implicit_prm_ce")  # of single completions called right or wrong
    optimizer: Optimizer
    update: Literal["before", "after"] = (
        "after"  # its rewards are used: after, they are those of the weights before the update
    )
    updates: int = Field(default=1, ge=1)  # optimizer updates per step, of whole groups each


class Train(Section):
    steps: int = Field(ge=1)
    deadline_seconds: float = Field(default=1800.0, gt=0)  # of every wait

    @property
    def length(self) -> str:
        """How long the run is, for the names of folders: step-200."""
        return f"step-{self.steps}"


class Eval(Section):
    every: int = Field(default=0, ge=0)  # steps; 0: at the end only
    prompts: int = Field(default=256, ge=1)
    n: int = Field(default=8, ge=1)  # completions per prompt
    k: tuple[int, ...] = (1, 8)  # pass@k
    temperature: float = Field(default=1.0, ge=0)
    at_start: bool = True


class Report(Section):
    sinks: tuple[
        Literal["tensorboard", "wandb", "trackio"], ...
    ] = ()  # beside metrics.jsonl, which is always written
    project: str = "rltrain"
    transcripts: int = Field(default=2, ge=0)  # prompts per step whose completions are kept


class Checkpoint(Section):
    every: int = Field(
        default=0, ge=0
    )  # steps between models written to checkpoints/; 0: only the model at the end
    keep: int = Field(default=2, ge=1)  # of them, the latest


class SampledRecipe(Section):
    """The sections of every recipe whose completions the policy itself samples."""

    about: About = About()
    seed: int = 0
    model: Model
    data: Data
    rollout: Rollout
    reward: RewardStage
    learner: RolloutLearner
    sync: Sync = Sync()
    train: Train
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    report: Report = Report()


class OnlineRecipe(SampledRecipe):
    """Policy-gradient learning from rewards."""

    kind: Literal["online"] = "online"
    process_reward: ProcessReward | None = None  # None: none learns
    advantage: Method
    control: tuple[Method, ...] = ()
    loss: Loss
    learner: Learner


# learning from a data set of judged completions -------------------------------------------------------------


class OfflineModel(Model):
    previous: str | None = (
        None  # model of previous_logp, the frozen iterate that INPO compares with; None: the starting point
    )


class JudgedData(Source):
    where: dict[str, str | int | bool] = {}  # keep rows whose columns hold these values, e.g. {split: train}
    eval_where: dict[str, str | int | bool] | None = None  # None: as where
    max_prompt_tokens: int = Field(default=512, ge=1)  # a longer prompt loses its beginning
    max_completion_tokens: int = Field(default=512, ge=1)  # EOS included
    too_long: Literal["cut", "drop"] = (
        "cut"  # drop: leave such rows out whole; a pair of which only one side is cut always is
    )
    divide_margins_by: Literal["nothing", "std", "max_abs"] = "nothing"  # of the training pairs' margins
    max_examples: int | None = Field(
        default=None, ge=1
    )  # pairs or completions to train on, the first so many after shuffling


class PreferenceLoss(Section):
    preference: Method


class Reference(Section):
    """Log-probs of frozen models, computed once per data set and kept on disk under the fingerprint
    of what they depend on.
    """

    cache: str | None = ".cache/reference"  # folder; null: computed anew in every run
    verify: int = Field(
        default=16, ge=0
    )  # completions computed again when they come from disk or from the data
    given: Literal["use", "ignore"] = (
        "use"  # log-probs that the data bring (TRL's columns ref_chosen_logps, reference_logps, ...)
    )


class OfflineTrain(Section):
    examples: int = Field(ge=2)  # pairs or completions per step (one optimizer update), all ranks
    epochs: float = Field(
        default=1.0, gt=0
    )  # passes over the data; the last step is filled up from the next one
    steps: int | None = Field(default=None, ge=1)  # in place of epochs
    deadline_seconds: float = Field(default=1800.0, gt=0)  # of every wait

    @property
    def length(self) -> str:
        """How long the run is, for the names of folders: step-200, or epoch-3."""
        return f"epoch-{self.epochs:g}" if self.steps is None else f"step-{self.steps}"


class OfflineEval(Section):
    every: int = Field(default=0, ge=0)  # steps; 0: at the end only
    examples: int = Field(default=512, ge=2)  # held-out pairs or completions
    at_start: bool = True
    gamma: float | None = Field(
        default=None, gt=0
    )  # calibration is held against sigmoid(gamma margin); None: p_chosen, or certainty
    samples: int = Field(
        default=0, ge=0
    )  # held-out prompts to which the policy writes an answer each time, for its entropy and length


class OfflineReport(Section):
    sinks: tuple[
        Literal["tensorboard", "wandb", "trackio"], ...
    ] = ()  # beside metrics.jsonl, which is always written
    project: str = "rltrain"


class OfflineRecipe(Section):
    """Preferences and labels that were given beforehand: no engine, no rewards."""

    kind: Literal["offline"] = "offline"
    about: About = About()
    seed: int = 0
    model: OfflineModel
    data: JudgedData
    loss: PreferenceLoss
    reference: Reference = Reference()
    learner: LearnerCore
    train: OfflineTrain
    eval: OfflineEval = OfflineEval()
    checkpoint: Checkpoint = Checkpoint()
    report: OfflineReport = OfflineReport()


# learning from pairs of the policy's own completions --------------------------------------------------------


class Pairs(Section):
    """How a prompt's completions become pairs (rollout/pairs/pairing.py)."""

    judge: Method = MethodRef(
        name="reward"
    )  # who prefers: reward, reward_model, self (rollout/pairs/judges.py)
    choose: Literal["disjoint", "best_worst", "ranked"] = (
        "best_worst"  # of rollout.n: neighbours, a tournament's ends, all against one
    )
    verdict: Literal["likelier", "drawn"] = (
        "likelier"  # who is chosen: the likelier winner, or one drawn with the judge's probability
    )
    tolerance: float = Field(
        default=0.0, ge=0, lt=0.5
    )  # pairs whose probability is nearer to 1/2 are left out


class PairTrain(Train):
    previous_every: int = Field(
        default=1, ge=1
    )  # steps for which the frozen previous iterate stays; 1: the policy as the step began


class OnlinePairsRecipe(SampledRecipe):
    """Preference learning from pairs that the policy samples and a judge decides during the run."""

    kind: Literal["online_pairs"]
    pairs: Pairs = Pairs()
    loss: PreferenceLoss
    train: PairTrain


AnyRecipe = OnlineRecipe | OnlinePairsRecipe | OfflineRecipe
RECIPES: dict[str, type[AnyRecipe]] = {
    "online": OnlineRecipe,
    "online_pairs": OnlinePairsRecipe,
    "offline": OfflineRecipe,
}
