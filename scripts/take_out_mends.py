"""Takes one mend at a time out of a copy of the code, and expects the test that guards it to fail.

    python scripts/take_out_mends.py [WORD ...] [--json FILE]

A test that passes without the mend it is about proves nothing. Each entry of ``MENDS`` names a line, what the
line would be without the mend, and the test; the test passes first with the mend in place. WORD selects the
entries whose name contains it. FILE keeps what it says about the others; ``scripts/results/mends.json`` has
for every entry what was seen last, and at which commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rltrain", "recipes", "reward", "scripts", "tests", "examples", "pyproject.toml")
TEST_SECONDS = 900


@dataclass(frozen=True)
class Mend:
    """name: what the mend does. file: where. line: as it stands, once in the file. without: instead of it.
    test: pytest's words for the test that has to fail.
    """

    name: str
    file: str
    line: str
    without: str
    test: str


FROZEN = "tests/learner/test_frozen_ranks.py -k fsdp2-True"
BACKENDS = "tests/invariants/test_backends.py -k fsdp2"
VLLM = "rltrain/rollout/engines/vllm"
RANKS = "tests/rollout/engines/test_vllm_colocated.py::test_two_ranks_have_their_own_engine_or_one_together"
MENDS = (
    Mend(
        "each rank's engine takes its own GPU",
        f"{VLLM}/colocated.py",
        '"distributed_executor_backend": "external_launcher",',
        '"distributed_executor_backend": "uni",',
        "tests/rollout/engines/test_vllm_device.py -k launched_rank",
    ),
    Mend(
        "vLLM finds its compile cache again",
        f"{VLLM}/config_folder.py",
        "folder = root / _digest_folder(written)",
        "folder = root / Path(name).name[1:]",
        "tests/rollout/engines/test_vllm_device.py -k one_config",
    ),
    Mend(
        "weights stream into the engine",
        f"{VLLM}/colocated.py",
        "in self._shapes.check(stream) if name not in ties)",
        "in list(self._shapes.check(stream)) if name not in ties)",
        f"{RANKS}[apart]",
    ),
    Mend(
        "ranks of one engine prove their shards together",
        f"{VLLM}/colocated.py",
        '"tensor_parallel_size": tensor_parallel,',
        '"tensor_parallel_size": 1,',
        f"{RANKS}[together]",
    ),
    Mend(
        "weights are saved as a stream",
        "rltrain/learner/trained_model.py",
        "for name, tensor in self._model_state().items():\n"
        "            full = self._gather(tensor, dtype, name)",
        "held = self._model_state()\n"
        "        for name, full in [(name, self._gather(held[name], dtype, name)) for name in held]:",
        BACKENDS,
    ),
    Mend(
        "a part of a tensor is written where it begins",
        "rltrain/checkpoint/shards.py",
        "start = torch.Size([part.start])",
        "start = torch.Size([0])",
        BACKENDS,
    ),
    Mend(
        "a frozen model computes in the learner's precision",
        "rltrain/learner/frozen_models.py",
        "        parameter.data = parameter.data.to(dtypes[name])\n    if is_whole:",
        "        parameter.data = parameter.data.to(torch.float32)\n    if is_whole:",
        FROZEN,
    ),
    Mend(
        "a frozen model is divided among the ranks",
        "rltrain/learner/frozen_models.py",
        "    if is_whole:\n        _shard(frozen)",
        "    if False:\n        _shard(frozen)",
        FROZEN,
    ),
    Mend(
        "rank 0 alone reads a frozen model",
        "rltrain/learner/frozen_models.py",
        "with loading_on_rank_0(trained.rank):",
        "with loading_on_rank_0(0):",
        FROZEN,
    ),
    Mend(
        "rank 0 alone reads ZeRO's masters",
        "rltrain/learner/trained_model.py",
        "source = self._load(model, self.compute_dtype) if self.rank == 0 else None",
        "source = self._load(model, self.compute_dtype)",
        "tests/learner/test_frozen_ranks.py -k zero3",
    ),
    Mend(
        "embedding and head are groups of their own under FSDP2",
        "rltrain/learner/forward.py",
        "    def get_output_embeddings(self)",
        "    def output_embeddings(self)",
        FROZEN,
    ),
    Mend(
        "the head's products are added in place",
        "rltrain/learner/head.py",
        "torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)",
        "total += torch.mm(gradient.t(), hidden)",
        "tests/learner/test_head_traffic.py -k within_bounds",
    ),
    Mend(
        "a GPU's head takes larger chunks",
        "rltrain/config/schema.py",
        'return HEAD_CHUNK_CPU if device == "cpu" else HEAD_CHUNK_GPU',
        "return HEAD_CHUNK_CPU",
        "tests/learner/test_head_traffic.py -k default_on_a_gpu",
    ),
    Mend(
        "a prompt is shared only where that takes less time",
        "rltrain/learner/attention_cost.py",
        "return shared < layer_cost",
        "return True or shared < layer_cost",
        "tests/learner/test_attention_cost.py",
    ),
    Mend(
        "a block mask reads no block in vain",
        "rltrain/learner/block_masks.py",
        "return np.tril(attending)",
        "return np.tril(np.ones_like(attending))",
        "tests/learner/test_block_masks.py -k in_vain",
    ),
    Mend(
        "a share of the layers is computed twice",
        "rltrain/learner/trained_model.py",
        "    def recompute(self, share: float) -> None:",
        "    def recompute(self, share: float) -> None:\n        share = 1.0",
        "tests/learner/test_recomputation.py",
    ),
    Mend(
        "controls run on their batch's device",
        "rltrain/control/paced.py",
        "dtype=torch.float64, device=ids.device)",
        "dtype=torch.float64)",
        "tests/invariants/test_controls.py -k device",
    ),
    Mend(
        "DDP's gradients are its buckets",
        "rltrain/learner/ranks.py",
        "gradient_as_bucket_view=True",
        "gradient_as_bucket_view=False",
        "tests/learner/test_gpu_settings.py",
    ),
    Mend(
        "a GPU's segments grow",
        "rltrain/learner/ranks.py",
        '"expandable_segments:True"',
        '"expandable_segments:False"',
        "tests/learner/test_gpu_settings.py",
    ),
    Mend(
        "a GPU's peak is what was not free",
        "rltrain/train/memory.py",
        "torch.cuda.mem_get_info(self._device)[0])",
        "torch.cuda.max_memory_reserved())",
        "tests/train/test_memory.py",
    ),
    Mend(
        "vLLM's own words for memory that ran out are known",
        "rltrain/train/memory.py",
        "isinstance(error, RuntimeError) and words in str(error).lower()",
        "isinstance(error, RuntimeError) and words == str(error)",
        "tests/train/test_memory.py",
    ),
    Mend(
        "a wait that advances has its whole deadline again",
        "rltrain/watchdog.py",
        "            self._progress = _Progress.count\n            self._restart_waits()",
        "            self._progress = _Progress.count",
        "tests/test_watchdog.py",
    ),
    Mend(
        "a rank that advances is waited for",
        "rltrain/watchdog.py",
        "peer.progress != self._peers[rank].progress",
        "peer.progress == 'never'",
        "tests/test_watchdog.py",
    ),
    Mend(
        "vLLM gets what the learner leaves",
        "rltrain/build/engine_share.py",
        "return min(share, 100 * free // cluster.gpu_bytes / 100)",
        "return share",
        "tests/build/test_engine_share.py",
    ),
    Mend(
        "every rank takes the least of all",
        "rltrain/build/engine_share.py",
        "_with_share(rollout, min(shares))",
        "_with_share(rollout, max(shares))",
        "tests/build/test_engine_share.py",
    ),
    Mend(
        "a resumed run needs no reference while its log-probs are on disk",
        "rltrain/build/frozen_examples.py",
        "        if name not in proofs:\n            load()",
        "        load()",
        "tests/train/test_offline.py -k needs_no_reference",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [mend for mend in MENDS if all(word in mend.name for word in options.words)]
    passed: set[str] = set()
    results = []
    with tempfile.TemporaryDirectory(prefix="rltrain-mends-") as name:
        folder = Path(name)
        copy_code(folder)
        for mend in chosen:
            results.append(take_out(mend, folder, passed))
            print(json.dumps(results[-1]), flush=True)
            if options.json:
                keep_results(options.json, results)
    return int(any(result["seen"] != "fails without it" for result in results))


def keep_results(file: Path, results: list[dict[str, Any]]) -> None:
    """Replaces what ``file`` says of these mends; mends that are no longer in ``MENDS`` go."""
    entries = {entry["mend"]: entry for entry in json.loads(file.read_text())} if file.exists() else {}
    entries |= {result["mend"]: result for result in results}
    kept = [entries[mend.name] for mend in MENDS if mend.name in entries]
    file.write_text(json.dumps(kept, indent=1) + "\n")


def copy_code(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True)
        else:
            shutil.copy2(source, folder / name)


def take_out(mend: Mend, folder: Path, passed: set[str]) -> dict[str, Any]:
    """passed: tests that pass with every mend in place; grows."""
    file = folder / mend.file
    text = file.read_text()
    result = {"mend": mend.name, "file": mend.file, "test": mend.test, "commit": commit()}
    if text.count(mend.line) != 1:
        return result | {"seen": f"the line stands {text.count(mend.line)} times in the file"}
    if mend.test not in passed and (failure := run_test(mend.test, folder)):
        return result | {"seen": f"fails with it: {failure}"}
    passed.add(mend.test)
    file.write_text(text.replace(mend.line, mend.without))
    try:
        failure = run_test(mend.test, folder)
    finally:
        file.write_text(text)
    return result | ({"seen": "fails without it", "failure": failure} if failure else {"seen": "PASSES"})


def run_test(words: str, folder: Path) -> str:
    """Why the test failed; empty if it passed."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words.split()]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS
    )
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "ERROR"))]
    return errors[0].removeprefix("E").strip()[:160] if errors else f"pytest ended with {done.returncode}"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
