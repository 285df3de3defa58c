"""Run by test_layer_kernels.py where Liger is installed: log-probs and gradients of a model with Liger's
kernels and with PyTorch's, as JSON. With TRITON_INTERPRET=1 Triton's interpreter runs them, without a GPU.

The interpreter of Triton 3.9 takes no Python number of a kernel for a scalar, and has no ``rsqrt`` of CUDA's
library: both are given to it here.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import liger_kernel.ops.rms_norm  # type: ignore[import-not-found]
import numpy as np
import torch
import triton  # type: ignore[import-not-found]
from triton import language  # type: ignore[import-not-found]
from triton.runtime import interpreter  # type: ignore[import-not-found]

from tests.learner.test_layer_kernels import log_probs_and_gradients

IS_INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"


def main() -> None:
    if IS_INTERPRETED:
        liger_kernel.ops.rms_norm.rsqrt = lambda value: language.rsqrt(value)
        convert = interpreter._implicit_cvt

        def convert_number(argument: Any) -> Any:
            if not isinstance(argument, float):
                return convert(argument)
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), language.float32)
            return language.tensor(handle, language.float32)

        interpreter._implicit_cvt = convert_number
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    launched = count_launches()
    eager, liger = (log_probs_and_gradients(kernels, device) for kernels in ("eager", "liger"))
    difference = max(
        float((value - expected).abs().max()) for value, expected in zip(liger, eager, strict=True)
    )
    sys.stdout.write(json.dumps({"difference": difference, "launched": sorted(set(launched))}) + "\n")


def count_launches() -> list[str]:
    """The names of Triton's kernels, one for each time that one runs."""
    names: list[str] = []
    kind: Any = interpreter.InterpretedFunction if IS_INTERPRETED else triton.runtime.JITFunction
    run = kind.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    kind.run = counted
    return names


main()
