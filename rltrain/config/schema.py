"""The recipe: every key a user can write, with its unit and default. Imports neither torch nor vllm.

Sections are named after stages. Hyperparameters of methods are not listed here: the signature of a method
defines them, and a recipe writes them next to its name (``policy: {name: clip, eps_high: 0.28}``).
"""

from __future__ import annotations

import datetime as dt
import math
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from rltrain.chat_template import is_template_file

# Beyond these a value is a slip of the pen, and the operating system refuses it in the middle of a run.
_SECONDS = 1e8  # three years; a lock waits for at most 292 years
_GIB = 1e6  # one PiB
_PROCESSES = 4096  # on one machine

# Tokens of a chunk of the output head: on a CPU its logits stay near the cache; on a GPU larger chunks read
# and write the weight's float32 gradient less often.
HEAD_CHUNK_CPU = 256
HEAD_CHUNK_GPU = 2048

MOST_UTILIZATION = 0.9  # share of a GPU that vLLM gets where a recipe leaves it open, at most


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodRef(BaseModel):
    """A method's name and its hyperparameters. A plain string is a name without hyperparameters.

    The name is a registered one, or ``path/to/file.py:name``.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str
    # digest of the user's file and of the modules it imports from its folder; set when the recipe is loaded
    sha256: str | None = None

    @model_serializer(mode="wrap")
    def _without_empty_digest(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The plain data of the method; a registered name has no digest."""
        data: dict[str, Any] = serialize(self)
        return {key: value for key, value in data.items() if key != "sha256" or value is not None}

    @property
    def hp(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RewardRef(MethodRef):
    """A reward: a registered name, or ``path/to/file.py:function``."""

    weight: float = 1.0


def _expand_bare_name(value: Any) -> Any:
    """``{"name": value}`` for a plain string; anything else is returned unchanged."""
    return {"name": value} if isinstance(value, str) else value


Method = Annotated[MethodRef, BeforeValidator(_expand_bare_name)]


COEFFICIENT_TAGS = ("number", "controller")


def _number_or_controller(value: Any) -> str:
    return COEFFICIENT_TAGS[isinstance(value, str | dict | MethodRef)]


class TermRef(MethodRef):
    """An additive loss term.

    Its coefficient is a number, or a controller that changes the number during the run.
    """

    coefficient: Annotated[
        Annotated[float, Field(ge=0), Tag("number")] | Annotated[Method, Tag("controller")],
        Discriminator(_number_or_controller),
    ]


Reward = Annotated[RewardRef, BeforeValidator(_expand_bare_name)]


def _check_template(template: str) -> str:
    """Raises ValueError where every prompt would be the same text, or a placeholder is more than a name."""
    try:
        fields = [(name, spec) for _, name, spec, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{error}; write {{prompt}} for the prompt, {{{{ }}}} for braces") from error
    if not fields:
        raise ValueError("no placeholder, so all prompts would be the same; write {prompt} where it belongs")
    for name, spec in fields:
        if not name or name.isdecimal() or set(name) & set(".[") or spec:
            raise ValueError(
                f"the placeholder {{{name}{':' if spec else ''}{spec}}} is more than the name of a column; "
                "write {prompt} for the prompt, {{ }} for braces, and name columns in data.columns"
            )
    return template


# arguments of transformers' ``apply_chat_template`` that decide what it returns
_TEMPLATE_ARGUMENTS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "strftime_now"),
    *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


def check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs``. Raises ValueError where one is no variable of a template."""
    if reserved := sorted(kwargs.keys() & _TEMPLATE_ARGUMENTS):
        raise ValueError(
            f"{reserved[0]!r} is set by the trainer and is no variable of a chat template; tools stand in "
            "the column tools, a template in data.chat_template, a date in data.date"
        )
    return kwargs


def _check_chat_template(value: str) -> str:
    if is_template_file(value) and not value.endswith(".jinja"):
        raise ValueError(f"{value!r} is neither auto, none nor the path of a .jinja file")
    return value


class About(Section):
    """What a recipe reproduces. The trainer does not read it."""

    arxiv: str | None = None
    title: str = ""
    expected: str = ""  # the result that the paper or a run of ours reports, with its conditions


MAX_ADAPTER_RANK = 512  # the largest rank that vLLM serves
# What vLLM refuses to load, or a proof of the weights could not cover: the key, and why.
_REFUSED_ADAPTER_KEYS = {
    "dora": "vLLM does not serve DoRA, whose magnitudes are no product of two matrices",
    "bias": "vLLM serves no trained biases",
    "modules_to_save": "vLLM serves no modules that are trained in full beside an adapter",
    "init": "starts that change the base (PiSSA, OLoRA, CorDA, LoftQ) are refused by vLLM, and the adapter "
    "switched off would not be the reference; B starts at 0 and A at random",
}
_REFUSED_ADAPTER_KEYS |= dict.fromkeys(("use_dora",), _REFUSED_ADAPTER_KEYS["dora"])
_REFUSED_ADAPTER_KEYS |= dict.fromkeys(("lora_bias",), _REFUSED_ADAPTER_KEYS["bias"])
_REFUSED_ADAPTER_KEYS |= dict.fromkeys(("start", "init_lora_weights"), _REFUSED_ADAPTER_KEYS["init"])


def _refuse_adapter_keys(values: Any) -> Any:
    """Raises ValueError for a known form of adapter that cannot be trained here."""
    for key in values if isinstance(values, dict) else ():
        if key in _REFUSED_ADAPTER_KEYS and values[key] not in (None, False, "none", "None", []):
            raise ValueError(f"{key}: {_REFUSED_ADAPTER_KEYS[key]}; leave {key} out")
    if isinstance(values, dict):
        return {key: value for key, value in values.items() if key not in _REFUSED_ADAPTER_KEYS}
    return values


def _freeze_list(value: Any) -> Any:
    """A list as a tuple: after ``_refuse_adapter_keys`` pydantic no longer knows that it reads JSON."""
    return tuple(value) if isinstance(value, list) else value


def _require_no_dropout(dropout: float) -> float:
    if dropout != 0:
        raise ValueError(
            f"{dropout:g} would make the log-probs of an update differ at random from those that the ratio "
            "or the reference compares them with; leave it at 0"
        )
    return dropout


class Adapter(Section):
    """LoRA (arXiv:2106.09685): the model's weights stay as they are, and W + scale B A is trained in their
    place.
    """

    rank: int = Field(default=16, ge=1, le=MAX_ADAPTER_RANK)  # columns of B, rows of A
    alpha: int = Field(default=32, ge=1)  # scale of B A: alpha / rank, or alpha / sqrt(rank) with rslora
    # linear: every linear layer but the output head; attention: those of the attention; kappatune: the
    # kappa_share of all with the smallest condition numbers (arXiv:2506.16289); or last parts of layer names
    targets: Annotated[
        Literal["linear", "attention", "kappatune"] | tuple[str, ...], BeforeValidator(_freeze_list)
    ] = "linear"
    kappa_share: float = Field(default=0.2, gt=0, le=1)
    rslora: bool = False  # arXiv:2312.03732
    dropout: Annotated[float, AfterValidator(_require_no_dropout)] = 0.0
    # storage of the weights that are not trained (arXiv:2305.14314); nf4, int8: by bitsandbytes
    quantize: Literal["none", "nf4", "int8"] = "none"
    # form of the finished model: its adapter beside the base's name, or a whole model. Checkpoints hold the
    # adapter
    export: Literal["adapter", "merged"] = "adapter"

    _refuse_keys = model_validator(mode="before")(_refuse_adapter_keys)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Model(Section):
    path: str  # Hub name or folder
    revision: str | None = None
    # models whose own Python code may run: folders, or NAME@COMMIT on the Hub
    trust_remote_code: tuple[str, ...] = ()
    reference: str | None = None  # model for ref_logp and for the reference source; None: the initial model
    teacher: str | None = None  # model for teacher_logp, with the same tokenizer; None: the initial model
    # flex_attention and flash_attention_2 pack rows; flex_attention, for GPUs, also rows that share a prompt
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    adapter: Adapter | None = None  # trained in place of the weights; None: all weights are trained


class Source(Section):
    """Where rows come from, and how a prompt is turned into the model's input."""

    train: str  # Hub name, file (json, jsonl, parquet), folder, or a built-in task ("arithmetic")
    eval: str | None = None  # as train; None: no held-out rows
    train_split: str = "train"
    eval_split: str = "test"
    subset: str | None = None
    eval_subset: str | None = None  # None: same as subset
    columns: dict[str, str] = {}  # our name -> the name in the file, e.g. {prompt: question}
    eval_columns: dict[str, str] | None = None  # None: same as columns
    system: str | None = None  # system message put before the prompt
    # wraps text prompts; {name} is the column of that name
    prompt_template: Annotated[str, AfterValidator(_check_template)] = "{prompt}"
    # auto: the tokenizer's, if it has one; or the path of a .jinja file, from the recipe's folder, which is
    # saved with the model
    chat_template: Annotated[str, AfterValidator(_check_chat_template)] = "auto"
    # variables of the chat template, e.g. {enable_thinking: false}; a row's column of this name comes first
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(check_template_kwargs)] = {}
    date: dt.date | None = None  # date that a chat template prints; None: the day on which the run starts
    options: dict[str, Any] = {}  # options of a built-in task, e.g. {digits: 2}


class Data(Source):
    adapter: Literal["none", "gsm8k_calculator"] = "none"
    max_prompt_tokens: int = Field(default=1024, ge=1)  # longer prompts are dropped and counted
    max_prompts: int | None = Field(default=None, ge=1)  # keep this many, the first ones after shuffling
    order: Method = MethodRef(name="shuffled")  # chooses the prompts of each step: shuffled, gain_rl


class DynamicSampling(Section):
    """DAPO: replaces groups whose completions are all correct or all wrong, in a bounded number of rounds."""

    max_rounds: int = Field(default=3, ge=1)  # generation rounds per step, the first included
    # PRIME: keep prompts whose share of correct completions lies between these bounds, both included;
    # None: keep prompts with at least one correct and one wrong completion
    accuracy: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None


class AdaptiveTemperature(Section):
    """HAPO (arXiv:2509.16591): samples each token at ``temperature`` (1 + tau h_hat), where h_hat comes from
    the entropies of the previous step.
    """

    tau: float = Field(default=0.05, gt=0, lt=1)
    # scaled: the intended sign; released: the sign of the released code; unscaled: the paper's unbounded h
    variant: Literal["scaled", "released", "unscaled"] = "scaled"
    # quantile of ln H at which the temperature stays unchanged, as in the control hapo
    rho: float = Field(default=0.8, ge=0, le=1)


class EnvironmentRef(MethodRef):
    """The environment in which completions are episodes: a registered name, or ``path/to/file.py:Class``.

    The environment's own options are written next to these keys.
    """

    max_turns: int = Field(ge=1)  # turns of the policy per episode
    # tokens per turn of the policy; rollout.max_tokens limits the whole episode, observations included
    turn_tokens: int = Field(ge=1)
    observation_tokens: int = Field(default=256, ge=1)  # per observation; longer ones are cut at their end
    role: Literal["user", "tool"] = "user"  # chat role of an observation
    workers: int = Field(default=2, ge=1, le=_PROCESSES)  # processes
    # wall-clock limit of one step, waits for a CPU not counted
    seconds: float = Field(default=10.0, gt=0, le=_SECONDS)
    # the same limit for the start of an episode
    reset_seconds: float = Field(default=60.0, gt=0, le=_SECONDS)
    memory_gib: float = Field(default=4.0, gt=0, le=_GIB)  # address-space limit of one process


class Vllm(Section):
    # vLLM's share of a GPU; auto: what learner and frozen models leave of it, by the plan's arithmetic, and
    # 0.9 where vLLM has the GPU to itself
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    kv_cache_gib: float = Field(default=1.0, gt=0)  # on CPU
    max_num_seqs: int = Field(default=256, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)  # neighbouring ranks that hold one engine together
    enforce_eager: bool = False

    @property
    def utilization_alone(self) -> float:
        """The share of a GPU that nothing else uses."""
        share = self.gpu_memory_utilization
        return MOST_UTILIZATION if share == "auto" else share


# MiB of a bucket of weights on its way to a server, where the recipe does not say
BUCKET_MIB_CPU = 16
BUCKET_MIB_GPU = 512


class Server(Section):
    """The vLLM server of engine ``vllm_server``; its sizes are those of ``rollout.vllm``."""

    # a running rltrain worker: http://HOST:PORT, https://HOST:PORT or unix:PATH; None: rltrain starts one on
    # this machine. The token of a running one is read from the environment, RLTRAIN_WORKER_TOKEN
    url: str | None = None
    authority: str | None = None  # file of certificates that an https server is checked against
    tensor_parallel: int = Field(default=1, ge=1, le=_PROCESSES)  # GPUs over which every layer is divided
    data_parallel: int = Field(default=1, ge=1, le=_PROCESSES)  # copies of the model in the server
    quantization: str | None = None  # of the server's weights; refused, with the reason
    speculative: dict[str, Any] | None = None  # vLLM's speculative_config, without a draft model
    batch_invariant: bool = False  # on GPU: sums that do not depend on the other rows of a batch
    # longest that the log of a starting server may stay silent
    silence_seconds: float = Field(default=300.0, gt=0, le=_SECONDS)
    call_seconds: float = Field(default=30.0, gt=0, le=_SECONDS)  # deadline of a call that moves no weights
    # of one of the two buffers in which rank 0 sends weights; None: 16 on CPU, 512 on GPU
    bucket_mib: int | None = Field(default=None, ge=1, le=65536)
    # deadline of the round trip that tells a busy server from a stopped one; two missed in a row end the run
    liveness_seconds: float = Field(default=5.0, gt=0, le=_SECONDS)


class Workers(Section):
    """Several vLLM servers for engine ``vllm_server``, each as ``rollout.server`` says.

    Name one of ``count``, ``urls``, ``join`` and ``router``.
    """

    count: int | None = Field(default=None, ge=1, le=_PROCESSES)  # that rltrain starts here, and starts again
    # running rltrain workers, as rollout.server.url names one
    urls: tuple[str, ...] = ()
    # a router of yours (vllm-router, llm-d) that takes the requests; admin: every worker behind it
    router: str | None = None
    admin: tuple[str, ...] = ()
    # workers come by themselves, before or during the run: rltrain worker --join http://HOST:PORT
    join: bool = False
    host: str = "127.0.0.1"  # where rank 0 waits for workers that join
    port: int = Field(default=8900, ge=1, le=65535)
    # longest that a run goes on without any worker; then it saves and ends with exit code 75
    patience_seconds: float = Field(default=300.0, gt=0, le=_SECONDS)


class Lag(Section):
    """Sampling ahead: step t trains on samples of the weights after step t - 1 - lag. The result does not
    depend on how many workers sample, how fast, or which of them are lost.
    """

    lag: int = Field(ge=0, le=64)  # steps; 0: as sync


class Bounded(Section):
    """Workers sample without a break, and every step trains on what has arrived. No token is older than
    ``versions`` pushes when the step begins that trains on it. Such a run can be replayed, not repeated.
    """

    versions: int = Field(ge=0, le=64)  # pushes; 0: as sync, on what the policy of the step has sampled
    # requests under way when new weights are pushed: they go on with them, begin anew, or end before
    update: Literal["in_flight", "abort", "drain"] = "in_flight"
    # groups that would be too old at the next step: this one waits for them, or they are dropped then
    when_stale: Literal["wait", "drop"] = "wait"


class BoundedSchedule(Section):
    """``rollout.schedule: {bounded: {versions: 1}}``."""

    bounded: Bounded


_StopText = Annotated[str, Field(min_length=1)]


class TokenChoice(Section):
    """Which tokens may be drawn, and what ends a completion besides EOS.

    Every rule keeps the likeliest tokens among those that the rules before it kept; the likeliest one stays.
    """

    # min-p (arXiv:2407.01082): tokens of at least this share of the largest probability
    min_p: float = Field(default=0.0, ge=0, le=1)
    # Top-H (arXiv:2509.02510; 0.4 there): while the entropy of the kept tokens is at most this share of all's
    top_h: float | None = Field(default=None, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # this many tokens; 0: all
    top_p: float = Field(default=1.0, gt=0, le=1)  # until their probabilities sum up to this share
    # of tokens that prompt or completion hold already: divides their positive logits, multiplies the others
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: tuple[_StopText, ...] = ()  # texts that end a completion, which keeps them

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.min_p > 0 or self.top_h is not None or self.top_k > 0 or self.top_p < 1


class Rollout(TokenChoice):
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    prompts: int = Field(ge=1)  # per step, all ranks
    n: int = Field(ge=1)  # completions per prompt
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(ge=1)  # per completion; in an environment, all turns and observations together
    max_rows: int = Field(default=256, ge=1)  # rows that the transformers engine decodes at once
    trust_logp: bool = False  # use the engine's log-probs as old_logp
    # warn above this mean |learner - engine log-prob| of a step, in nats; None: depends on the precision
    mismatch_warn: float | None = Field(default=None, gt=0)
    # like mismatch_warn; mismatch_patience steps above it end the run
    mismatch_stop: float | None = Field(default=None, gt=0)
    mismatch_patience: int = Field(default=3, ge=1)  # steps in a row above mismatch_stop that end the run
    dynamic_sampling: DynamicSampling | None = None
    # sources of further rows in a prompt's group: aepo, reference, answer (rollout/extra_samples.py)
    extra_samples: tuple[Method, ...] = ()
    adaptive_temperature: AdaptiveTemperature | None = None
    environment: EnvironmentRef | None = None  # None: a completion is one answer
    # sync: a step's samples are the current policy's; {lag: k}: those of k steps before, sampled meanwhile;
    # {bounded: {versions: k}}: sampled without a break, no token older than k pushes
    schedule: Literal["sync"] | Lag | BoundedSchedule = "sync"
    vllm: Vllm = Vllm()
    server: Server = Server()
    workers: Workers | None = None  # None: one server
    # workers that hold the reference model, for extra_samples reference; the policy's are never lent to it
    reference_workers: Workers | None = None

    @property
    def lag(self) -> int:
        """Steps between the weights that sample and those that the samples train."""
        return self.schedule.lag if isinstance(self.schedule, Lag) else 0

    @property
    def bound(self) -> Bounded | None:
        """How workers sample without a break; None: they sample step by step."""
        return self.schedule.bounded if isinstance(self.schedule, BoundedSchedule) else None

    @property
    def oldest(self) -> int:
        """Steps between the weights that sample and those that the samples train, at most."""
        return self.lag if self.bound is None else self.bound.versions


class Sync(Section):
    """How the engine's weights are verified after every push.

    Weights outside the repeated layers are always compared.
    """

    sample: int = Field(default=4, ge=0)  # weights of the repeated layers compared per push, in rotation
    full_every: int = Field(default=10, ge=0)  # pushes between comparisons of all weights; 0: first push only


class RewardStage(Section):
    functions: tuple[Reward, ...] = Field(min_length=1)  # the score is the weighted sum
    workers: int = Field(default=2, ge=1, le=_PROCESSES)  # processes
    # wall-clock limit for grading one completion, waits for a CPU not counted
    seconds: float = Field(default=10.0, gt=0, le=_SECONDS)
    memory_gib: float = Field(default=4.0, gt=0, le=_GIB)  # address-space limit of one worker


class Loss(Section):
    policy: Method
    terms: tuple[TermRef, ...] = ()
    aggregate: Method = MethodRef(name="token_mean")


_Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    # adamw_8bit keeps both moments in 8 bits (bitsandbytes); muon: PyTorch's for hidden matrices, scaled to
    # the size of AdamW's updates, and AdamW for the rest; both for one process and DDP
    name: Literal["adamw", "adamw_8bit", "rmsprop", "muon"] = "adamw"
    lr: float = Field(ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    alpha: _Beta = 0.99  # of rmsprop: the decay of its squares
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)  # of matrices; rmsprop adds it to the gradient
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # linear and cosine end at this share of lr in place of 0
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)  # optimizer updates
    max_grad_norm: float = Field(default=1.0, gt=0)


class LearnerCore(Section):
    """How gradients are computed, for every loss."""

    optimizer: Optimizer
    tokens_per_micro_batch: int = Field(default=16384, ge=1)  # prompt + completion tokens, padding included
    # auto: packed if the attention kernel supports variable lengths
    layout: Literal["auto", "padded", "packed"] = "auto"
    # auto: process a prompt once for all its completions where the model allows it and it saves time
    share_prompt: Literal["auto", "never"] = "auto"
    # auto: float32 on CPU, bfloat16 autocast on GPU
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # recompute layers in the backward pass; auto: on a GPU as few as the plan has no room for, on a CPU all
    gradient_checkpointing: bool | Literal["auto"] = False
    # what stays in the host's memory: ZeRO-2 and 3 can offload the optimizer's masters and moments, and
    # update them there; all: FSDP2 and ZeRO-3 keep the weights there too
    offload: Literal["nothing", "optimizer", "all"] = "nothing"
    # of the layers: compiled by PyTorch, or Liger's norm, rotary embedding and SwiGLU where it is installed
    kernels: Literal["eager", "compiled", "liger"] = "eager"
    # tokens whose logits exist at the same time; auto: 256 on a CPU, 2048 on a GPU
    head_chunk: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_nonfinite: int = Field(default=3, ge=1)  # non-finite updates in a row that stop the run

    def head_chunk_on(self, device: str) -> int:
        """Tokens of a chunk on a device type, "cpu" or "cuda".

        On a GPU every chunk reads and writes the weight's whole gradient once (docs/performance.md).
        """
        if self.head_chunk == "auto":
            return HEAD_CHUNK_CPU if device == "cpu" else HEAD_CHUNK_GPU
        return self.head_chunk


class RolloutLearner(LearnerCore):
    """How often the learner trains on a step's completions, or on the pairs made from them."""

    updates: int = Field(default=1, ge=1)  # optimizer updates per pass over a step's completions
    epochs: int = Field(default=1, ge=1)  # passes over a step's completions

    @property
    def updates_per_step(self) -> int:
        return self.updates * self.epochs


class Learner(RolloutLearner):
    skip_idle_rows: bool = True  # leave rows without a gradient out of the gradient pass (same result)


class ProcessReward(Section):
    """A process reward model trained together with the policy: it learns the reward of each token from
    outcomes (PRIME, arXiv:2502.01456).
    """

    path: str | None = None  # Hub name or folder, with the policy's tokenizer; None: model.path
    # model that its log-probs are compared with; None: its initial weights; "policy": the sampling policy
    reference: str | None = None
    loss: Method = MethodRef(name="implicit_prm_ce")  # a loss on single completions labelled right or wrong
    optimizer: Optimizer
    # whether the update comes before or after its rewards are used; after: the rewards are those of the
    # weights before the update
    update: Literal["before", "after"] = "after"
    updates: int = Field(default=1, ge=1)  # optimizer updates per step, each on whole groups


class Profile(Section):
    """A torch profile of some steps, written to the run's folder as Chrome traces, a file for each rank."""

    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)  # their numbers, from 1


class Train(Section):
    steps: int = Field(ge=1)
    profile: Profile | None = None  # None: no step is profiled
    deadline_seconds: float = Field(default=1800.0, gt=0, le=_SECONDS)  # longest that any wait may last
    # the run saves and ends before it has lasted so long; the same command goes on
    max_hours: float | None = Field(default=None, gt=0, le=_SECONDS)

    @property
    def length(self) -> str:
        """The length of the run as used in folder names: step-200."""
        return f"step-{self.steps}"


class Eval(TokenChoice):
    every: int = Field(default=0, ge=0)  # steps; 0: at the end only
    prompts: int = Field(default=256, ge=1)
    n: int = Field(default=8, ge=1)  # completions per prompt
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 8), min_length=1)  # pass@k
    temperature: float = Field(default=1.0, ge=0)
    at_start: bool = True
    # measure the spectrum of the policy's hidden states at each evaluation: RankMe and alpha-ReQ
    spectrum: bool = False


class Report(Section):
    # in addition to metrics.jsonl, which is always written
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "rltrain"
    transcripts: int = Field(default=2, ge=0)  # prompts per step whose completions are kept


class Checkpoint(Section):
    # steps between models written to checkpoints/; 0: only the model at the end
    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)  # number of latest checkpoints to keep
    # whole: a model folder with the optimizer's state, written by rank 0 while the others wait; sharded:
    # every rank writes its own parts, while training goes on. The model at the end is whole.
    format: Literal["whole", "sharded"] = "whole"


class Journal(Section):
    """Every step's rollouts as a Parquet file in rollouts/, on the disk before the step trains on them."""

    # all: for rltrain replay from the first step, evaluations included; resume: those after the oldest
    # checkpoint that is kept; nothing: no file is written, and a resumed run samples again
    keep: Literal["all", "resume", "nothing"] = "all"


class Push(Section):
    """Pushes the finished model, with its results, to the Hugging Face Hub; the token is the environment's
    (HF_TOKEN) or the login's.
    """

    repo: str  # its name there: OWNER/MODEL; made unless it exists
    # steps between pushes of checkpoints in the background, a multiple of checkpoint.every; 0: only the end
    every: int = Field(default=0, ge=0)
    private: bool = True


class SampledRecipe(Section):
    """The sections of every recipe that trains on completions sampled by the policy."""

    about: About = About()
    seed: int = Field(default=0, ge=0)
    model: Model
    data: Data
    rollout: Rollout
    reward: RewardStage
    learner: RolloutLearner
    sync: Sync = Sync()
    train: Train
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    journal: Journal = Journal()
    report: Report = Report()
    push: Push | None = None  # None: nothing leaves this machine


class OnlineRecipe(SampledRecipe):
    """Policy-gradient learning from rewards."""

    kind: Literal["online"] = "online"
    process_reward: ProcessReward | None = None  # None: no process reward model
    advantage: Method
    control: tuple[Method, ...] = ()
    loss: Loss
    learner: Learner


# learning from a data set of judged completions -------------------------------------------------------------


class OfflineModel(Model):
    # model for previous_logp, the frozen iterate that INPO compares with; None: the initial model
    previous: str | None = None


class JudgedData(Source):
    where: dict[str, str | int | bool] = {}  # keep rows whose columns hold these values, e.g. {split: train}
    eval_where: dict[str, str | int | bool] | None = None  # None: same as where
    max_prompt_tokens: int = Field(default=512, ge=1)  # a longer prompt loses its beginning
    max_completion_tokens: int = Field(default=512, ge=1)  # EOS included
    # drop: leave out rows that are too long; a pair with only one side too long is always left out
    too_long: Literal["cut", "drop"] = "cut"
    # statistic of the training pairs' margins that all margins are divided by
    divide_margins_by: Literal["nothing", "std", "max_abs"] = "nothing"
    # pairs or completions to train on: this many, the first ones after shuffling
    max_examples: int | None = Field(default=None, ge=1)


class Degree(Section):
    """SPO (arXiv:2409.17791): a linear head on the policy learns how many of a chosen completion's key
    phrases were taken out; its cross-entropy is added to the loss. The finished model has no such head.
    """

    weight: float = Field(default=0.1, gt=0)
    levels: int = Field(default=4, ge=2)  # degrees, 0 being the intact completion
    share: float = Field(default=0.75, gt=0, le=1)  # of the key phrases that the last degree lacks
    lr: float = Field(default=1e-3, ge=0)  # of the head, on the optimizer's schedule


class PreferenceLoss(Section):
    preference: Method
    degree: Degree | None = None  # None: no degree head; for pairs from a data set


class Reference(Section):
    """Log-probs of frozen models, computed once per data set and stored on disk under the fingerprint of
    everything they depend on.
    """

    cache: str | None = ".cache/reference"  # folder; null: compute them in every run
    # number of completions whose log-probs are recomputed for comparison when they come from disk or the data
    verify: int = Field(default=16, ge=0)
    # log-probs contained in the data set (TRL's columns ref_chosen_logps, reference_logps, ...)
    given: Literal["use", "ignore"] = "use"


class OfflineTrain(Section):
    examples: int = Field(ge=2)  # pairs or completions per step (one optimizer update), all ranks
    epochs: float = Field(default=1.0, gt=0)  # passes over the data; the next pass fills up the last step
    steps: int | None = Field(default=None, ge=1)  # replaces epochs
    profile: Profile | None = None  # None: no step is profiled
    deadline_seconds: float = Field(default=1800.0, gt=0, le=_SECONDS)  # longest that any wait may last
    # the run saves and ends before it has lasted so long; the same command goes on
    max_hours: float | None = Field(default=None, gt=0, le=_SECONDS)

    @property
    def length(self) -> str:
        """The length of the run as used in folder names: step-200, or epoch-3."""
        return f"epoch-{self.epochs:g}" if self.steps is None else f"step-{self.steps}"


class OfflineEval(Section):
    every: int = Field(default=0, ge=0)  # steps; 0: at the end only
    examples: int = Field(default=512, ge=2)  # held-out pairs or completions
    at_start: bool = True
    # measure the spectrum of the policy's hidden states at each evaluation: RankMe and alpha-ReQ
    spectrum: bool = False
    # calibration is measured against sigmoid(gamma margin); None: against p_chosen, or certainty
    gamma: float | None = Field(default=None, gt=0)
    # held-out prompts that the policy answers at each evaluation, to measure entropy and length
    samples: int = Field(default=0, ge=0)


class OfflineReport(Section):
    # in addition to metrics.jsonl, which is always written
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "rltrain"


SUPERVISED_LOSS = "nll"


class OfflineRecipe(Section):
    """Learning from a data set: no engine, no rewards.

    offline: from preferences and labels. sft: supervised fine-tuning, the likelihood of given completions.
    """

    kind: Literal["offline", "sft"] = "offline"
    about: About = About()
    seed: int = Field(default=0, ge=0)
    model: OfflineModel
    data: JudgedData
    loss: PreferenceLoss  # of kind sft: {preference: nll}, which may be left out
    reference: Reference = Reference()
    learner: LearnerCore
    train: OfflineTrain
    eval: OfflineEval = OfflineEval()
    checkpoint: Checkpoint = Checkpoint()
    report: OfflineReport = OfflineReport()
    push: Push | None = None  # None: nothing leaves this machine


# learning from pairs of the policy's own completions --------------------------------------------------------


class Pairs(Section):
    """How a prompt's completions are made into pairs (rollout/pairs/pairing.py)."""

    # decides which completion is preferred: reward, reward_model, self (rollout/pairs/judges.py)
    judge: Method = MethodRef(name="reward")
    # which of the rollout.n completions form pairs; disjoint: neighbours, best_worst: the most and the least
    # preferred, ranked: every pair, with strengths from comparisons of all completions with the first
    choose: Literal["disjoint", "best_worst", "ranked"] = "best_worst"
    # the chosen completion is the likelier winner, or is drawn with the judge's probability
    verdict: Literal["likelier", "drawn"] = "likelier"
    # pairs whose probability is closer than this to 1/2 are left out
    tolerance: float = Field(default=0.0, ge=0, lt=0.5)


class PairTrain(Train):
    # steps for which the frozen previous iterate is kept; 1: the policy at the start of the step
    previous_every: int = Field(default=1, ge=1)


class OnlinePairsRecipe(SampledRecipe):
    """Preference learning from pairs of the policy's completions, which a judge compares during the run."""

    kind: Literal["online_pairs"]
    pairs: Pairs = Pairs()
    loss: PreferenceLoss
    train: PairTrain


AnyRecipe = OnlineRecipe | OnlinePairsRecipe | OfflineRecipe
RECIPES: dict[str, type[AnyRecipe]] = {
    "online": OnlineRecipe,
    "online_pairs": OnlinePairsRecipe,
    "offline": OfflineRecipe,
    "sft": OfflineRecipe,
}
