"""Log-probs of frozen models, computed once and cached on disk.

The cache key is a fingerprint of everything they depend on: the token ids of all rows (and so the data, the
tokenizer, the template and the limits on length), the frozen model's weights, the precision and the attention
kernel. Cached log-probs are used only after a few rows were computed again and agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rltrain.errors import UserError
from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.precision import ROUNDING
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of
from rltrain.seeds import stable_hash
from rltrain.types.policy import TokenRows

__all__ = ["FrozenLogProbs", "cache_key"]

_NAME = "logp"

# Kinds of cached numbers: one per row, or one per completion token.
_SUMS = "sums"
_TOKENS = "tokens"


@dataclass(frozen=True)
class FrozenLogProbs:
    """Computes the log-probs of one frozen model, or reads them from the cache."""

    learner: PreferenceLearner
    frozen: FrozenModel | None  # None: the learner's own model with its current weights
    weights: str  # digest of the frozen model's weights
    folder: Path | None  # of the cache; None: no cache
    verify: int  # rows of cached log-probs to compute again
    say: Callable[[str], None]  # prints a message
    # SHA-256 of the log-probs that this run has, by their key: those that it had before an interruption are
    # not computed again
    proofs: dict[str, str] = field(default_factory=dict)
    # loads ``frozen`` once a pass needs it; None: it is loaded
    load: Callable[[], FrozenModel] | None = None

    def log_probs(self, rows: TokenRows, *, sides: int, what: str = "the frozen model") -> Tensor:
        """(R,) nats, the log-prob of each completion, float32, equal on every rank.

        sides: rows per example. what: the name of model and rows in messages.
        """

        def compute() -> Tensor:
            return self.learner.log_probs(rows, sides=sides, frozen=self._model())

        return self._read_or_compute(rows, what, _SUMS, compute)

    def token_log_probs(self, rows: TokenRows, *, what: str = "the frozen model") -> Tensor:
        """(R, T) nats of each completion token, 0 after the last; otherwise as ``log_probs``."""
        lengths = [len(completion) for completion in rows.completions]
        inside = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]

        def compute() -> Tensor:
            return self.learner.token_log_probs(rows, self._model())[inside]

        flat = self._read_or_compute(rows, what, _TOKENS, compute)
        return torch.zeros(inside.shape).masked_scatter(inside, flat)

    def check_log_probs(self, rows: TokenRows, values: Tensor, *, what: str) -> Tensor:
        """Compare ``values`` (R,), the log-probs in the data, with the frozen model's on a sample of rows.

        Returns them. Raises UserError where they differ: they would be those of another reference.
        """
        key = cache_key(rows, self.weights, self._settings())
        if self._has_proof(key, values):
            self.say(f"log-probs of {what}: from the data, as before")
            return values
        difference = self._difference(rows, values, key)
        if difference > self._tolerance:
            raise UserError(
                f"the reference log-probs in the data are not those of {what}: they differ by "
                f"{difference:.2g} nats per token (at most {self._tolerance:g} is rounding). Another model, "
                "template, truncation or precision made them: name that model as model.reference, or have "
                "them computed with reference.given=ignore"
            )
        self.proofs[key] = _digest(values)
        count = min(self.verify, len(rows))
        self.say(f"log-probs of {what}: from the data, {count} computed again and equal")
        return values

    def _read_or_compute(
        self, rows: TokenRows, what: str, kind: str, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The result of ``compute``, from the cache where it has one: one number per row, or per completion
        token for the kind ``_TOKENS``.
        """
        if self.folder is None:
            return compute()
        settings = self._settings() | ({} if kind == _SUMS else {"kind": kind})
        key = cache_key(rows, self.weights, settings)
        path = self.folder / f"{key}.safetensors"
        lengths = [1 if kind == _SUMS else len(completion) for completion in rows.completions]
        cached, problem = self.learner.trained.broadcast(
            _read_cache(path, key, sum(lengths)) if self.learner.rank == 0 else None
        )
        if cached is not None and self._has_proof(key, cached):
            self.say(f"log-probs of {what}: from {path}, as before")
            return cached
        sums = None if cached is None else torch.stack([part.sum() for part in cached.split(lengths)])
        if sums is not None and (difference := self._difference(rows, sums, key)) > self._tolerance:
            cached = None
            problem = f"they differ by {difference:.2g} nats per token from the model's"
        if cached is not None:
            self.say(f"log-probs of {what}: from {path}")
            self.proofs[key] = _digest(cached)
            return cached

        if problem is not None:
            self.say(f"warning: the log-probs in {path} cannot be used ({problem}); they are computed again")
        self.say(f"log-probs of {what}: computing {len(rows)}")
        computed = compute()
        self.proofs[key] = _digest(computed)
        if self.learner.rank == 0:
            _write_cache(path, computed, {"fingerprint": key, "weights": self.weights, **settings})
        return computed

    def _model(self) -> FrozenModel | None:
        """None: the learner's own model."""
        return self.frozen if self.load is None else self.load()

    def _has_proof(self, key: str, values: Tensor) -> bool:
        """Whether this run had exactly these ``values`` before it was interrupted."""
        return self.proofs.get(key) == _digest(values)

    def _settings(self) -> dict[str, str]:
        """The settings on which the numbers depend."""
        precision = self.learner.trained.precision
        return {
            "precision": precision,
            "attention": str(self.learner.model.config._attn_implementation),
            "temperature": "1",
        }

    @property
    def _tolerance(self) -> float:
        return ROUNDING[self.learner.trained.precision]

    def _difference(self, rows: TokenRows, values: Tensor, key: str) -> float:
        """The largest difference per token between ``values`` (R,) and the model's log-probs.

        Computed for a sample of rows, the same on every rank.
        """
        generator = random.Random(stable_hash("verify", key))
        positions = generator.sample(range(len(rows)), min(self.verify, len(rows)))
        if not positions:
            return 0.0
        sample = rows.rows(torch.tensor(positions))
        computed = self.learner.log_probs(sample, sides=1, frozen=self._model())
        lengths = lengths_of(sample)
        differences = (computed - values[positions]).abs() / lengths.clamp(min=1)
        return float(differences.nan_to_num(torch.inf).max())


def cache_key(rows: TokenRows, weights: str, settings: Mapping[str, str]) -> str:
    """SHA-256 of the rows in order, the weights and the settings."""
    digest = hashlib.sha256(json.dumps([weights, dict(settings)], sort_keys=True).encode())
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        digest.update(repr((prompt, completion)).encode())
    if rows.scored is not None:
        digest.update(repr(rows.scored).encode())
    return digest.hexdigest()


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def _read_cache(path: Path, key: str, count: int) -> tuple[Tensor | None, str | None]:
    """(log-probs, None), or (None, the problem); (None, None) where the file does not exist."""
    if not path.exists():
        return None, None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            values = file.get_tensor(_NAME)
    except (OSError, SafetensorError) as error:
        return None, f"the file cannot be read: {error}"
    if facts.get("fingerprint") != key or values.shape != (count,):
        return None, "the file holds other data"
    if not bool(values.isfinite().all()):
        return None, "the file holds numbers that are not finite"
    return values, None


def _write_cache(path: Path, values: Tensor, facts: Mapping[str, str]) -> None:
    """Write the file completely or not at all: other runs may read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save({_NAME: values.contiguous()}, metadata=dict(facts)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
