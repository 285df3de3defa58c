"""The worker's extension, for ``bench_push.py``: its pushes can be told to end without a proof."""

from __future__ import annotations

from typing import Any

from rltrain.rollout.worker.extension import Extension


class UnprovedExtension(Extension):
    """rltrain's, and a method that takes the sums out of the end of a push."""

    def rltrain_prove(self, is_proved: str) -> str:
        """is_proved: "yes", or "no" from now on."""
        engine: Any = self.weight_transfer_engine
        if is_proved == "yes":
            engine.__dict__.pop("write_sums", None)
        else:
            engine.write_sums = lambda key, names=None: None
        return is_proved
