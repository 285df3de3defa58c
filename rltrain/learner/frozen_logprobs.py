"""Log-probs of frozen models, computed once and kept on disk.

They are kept under a fingerprint of everything they depend on: the token ids of all rows (and with them the
data, the tokenizer, the template and the limits on length), the frozen model's weights, the precision and the
attention kernel. What comes back from disk is computed again for a few rows before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rltrain.errors import UserError
from rltrain.learner.forward import PolicyForward
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.learner.trained_model import ROUNDING
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types.policy import TokenRows

__all__ = ["FrozenLogProbs", "cache_key", "weights_digest"]

_NAME = "logp"
_SUMS, _TOKENS = "sums", "tokens"


@dataclass(frozen=True)
class FrozenLogProbs:
    """Computes or finds the log-probs of one frozen model.

    ``frozen`` is the model, ``None`` the learner's own as it is now.
    """

    learner: PreferenceLearner
    frozen: PolicyForward | None
    weights: str  # digest of the frozen model's weights
    folder: Path | None  # None: nothing is kept
    verify: int  # rows computed again when they come from disk
    say: Callable[[str], None]

    def of(self, rows: TokenRows, *, sides: int, what: str = "the frozen model") -> Tensor:
        """(R,) nats, float32, equal on every rank. sides: rows per example. what: names model and
        rows in what is said.
        """
        return self._kept(
            rows, what, _SUMS, lambda: self.learner.log_probs(rows, sides=sides, frozen=self.frozen)
        )

    def tokens(self, rows: TokenRows, *, what: str = "the frozen model") -> Tensor:
        """(R, T) nats of each completion token, 0 behind the last; otherwise as ``of``."""
        lengths = [len(completion) for completion in rows.completions]
        inside = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        flat = self._kept(
            rows, what, _TOKENS, lambda: self.learner.token_log_probs(rows, self.frozen)[inside]
        )
        return torch.zeros(inside.shape).masked_scatter(inside, flat)

    def given(self, rows: TokenRows, values: Tensor, *, what: str) -> Tensor:
        """``values`` (R,), which the data bring for these rows, once some of them are what the frozen model
        says.

        Raises UserError where they are not: they would be another reference's.
        """
        difference = self._difference(rows, values, cache_key(rows, self.weights, self._settings()))
        if difference > self._tolerance:
            raise UserError(
                f"the reference log-probs in the data are not those of {what}: they differ by "
                f"{difference:.2g} nats per token (at most "
                f"{self._tolerance:g} is rounding). Another model, template, truncation or precision made "
                "them: name that model as "
                "model.reference, or have them computed with reference.given=ignore"
            )
        self.say(
            f"log-probs of {what}: from the data, {min(self.verify, len(rows))} computed again and equal"
        )
        return values

    def _kept(self, rows: TokenRows, what: str, kind: str, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, from disk if it is there: one number per row, or of the kind
        ``_TOKENS`` one per completion token.
        """
        if self.folder is None:
            return compute()
        settings = self._settings() | ({} if kind == _SUMS else {"kind": kind})
        key = cache_key(rows, self.weights, settings)
        path = self.folder / f"{key}.safetensors"
        lengths = [1 if kind == _SUMS else len(completion) for completion in rows.completions]
        found, problem = self.learner.trained.broadcast(
            _read(path, key, sum(lengths)) if self.learner.rank == 0 else None
        )
        sums = None if found is None else torch.stack([part.sum() for part in found.split(lengths)])
        if sums is not None and (difference := self._difference(rows, sums, key)) > self._tolerance:
            found, problem = None, f"differs by {difference:.2g} nats per token from what the model says now"
        if found is not None:
            self.say(f"log-probs of {what}: from {path}")
        else:
            if problem is not None:
                self.say(
                    f"warning: the log-probs in {path} cannot be used ({problem}); they are computed anew"
                )
            self.say(f"log-probs of {what}: computing {len(rows)}")
            found = compute()
            if self.learner.rank == 0:
                _write(path, found, {"fingerprint": key, "weights": self.weights, **settings})
        return found

    def _settings(self) -> dict[str, str]:
        precision = self.learner.trained.precision
        return {
            "precision": precision,
            "attention": str(self.learner.model.config._attn_implementation),
            "temperature": "1",
        }

    @property
    def _tolerance(self) -> float:
        return ROUNDING[self.learner.trained.precision]

    def _difference(self, rows: TokenRows, found: Tensor, key: str) -> float:
        """Largest difference per token over a sample of rows, the same on every rank."""
        picked = random.Random(stable_hash("verify", key)).sample(
            range(len(rows)), min(self.verify, len(rows))
        )
        if not picked:
            return 0.0
        some = TokenRows(
            tuple(rows.prompts[at] for at in picked), tuple(rows.completions[at] for at in picked)
        )
        again = self.learner.log_probs(some, sides=1, frozen=self.frozen)
        lengths = torch.tensor([len(completion) for completion in some.completions])
        return float(((again - found[picked]).abs() / lengths.clamp(min=1)).nan_to_num(torch.inf).max())


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over one projection per weight, to nine digits. A collective where ``weights`` is."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(
            f"{name} {tuple(weight.shape)} {weight_fingerprint(name, weight).number:.9e}\n".encode()
        )
    return digest.hexdigest()


def cache_key(rows: TokenRows, weights: str, settings: Mapping[str, str]) -> str:
    """SHA-256 of the rows in order, the weights and the settings."""
    digest = hashlib.sha256(json.dumps([weights, dict(settings)], sort_keys=True).encode())
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        digest.update(repr((prompt, completion)).encode())
    return digest.hexdigest()


def _read(path: Path, key: str, count: int) -> tuple[Tensor | None, str | None]:
    """(log-probs, None), or (None, why not); (None, None) where nothing is there."""
    if not path.exists():
        return None, None
    try:
        with safe_open(path, framework="pt") as file:
            facts, found = file.metadata() or {}, file.get_tensor(_NAME)
    except (OSError, SafetensorError) as error:
        return None, f"it cannot be read: {error}"
    if facts.get("fingerprint") != key or found.shape != (count,):
        return None, "it holds something else"
    return (found, None) if bool(found.isfinite().all()) else (None, "it holds numbers that are not finite")


def _write(path: Path, found: Tensor, facts: Mapping[str, str]) -> None:
    """Whole or not at all: other runs may read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save({_NAME: found.contiguous()}, metadata=dict(facts)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
