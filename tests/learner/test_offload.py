"""``learner.offload`` is refused where the launcher's backend cannot keep that on the host."""

from __future__ import annotations

from typing import Any

import pytest

from rltrain.errors import UserError
from rltrain.learner.ranks import request_offload


@pytest.mark.parametrize(
    ("ranks", "variables", "offload", "said"),
    [
        ("1", {}, "all", "all, which one process cannot; launch fsdp2, zero2 or zero3, or set it to nothing"),
        ("2", {}, "optimizer", "optimizer, which ddp cannot"),
        ("2", {"ACCELERATE_USE_FSDP": "true"}, "optimizer", "which fsdp2 cannot; set it to all, or"),
        (
            "2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            "all",
            "which ZeRO-2 cannot; set it to optimizer",
        ),
    ],
)
def test_a_backend_that_cannot_offload_is_refused_before_anything_is_loaded(
    ranks: str, variables: dict[str, str], offload: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": ranks, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        request_offload(offload)
