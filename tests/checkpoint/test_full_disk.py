"""Wherever in a file the disk becomes full, the parts of a checkpoint end with the disk's own error."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
import torch

from rltrain.checkpoint.shards import write_parts
from rltrain.types.tensor_parts import TensorPart

PAGE_KIB = 4


def test_parts_on_a_full_disk_end_with_the_disks_error(tmp_path: Path) -> None:
    parts = [TensorPart(f"weight {number}", (5000,), 0, torch.zeros(5000)) for number in range(3)]
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(reason=f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        ends = []
        for pages in range(1, 20):
            subprocess.run(["mount", "-o", f"remount,size={pages * PAGE_KIB}k", str(disk)], check=True)
            try:
                write_parts(disk, parts, None)
                ends.append(0)
            except OSError as error:
                ends.append(error.errno or -1)
            for file in disk.iterdir():
                file.unlink()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert set(ends) == {errno.ENOSPC, 0} and ends == sorted(ends, reverse=True)
