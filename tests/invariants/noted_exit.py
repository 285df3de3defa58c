"""``rltrain ARGUMENT...`` in a process whose launcher keeps its exit code to itself.

    accelerate launch noted_exit.py FOLDER train RECIPE ...

The code is written to FOLDER/RANK.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

folder = Path(sys.argv.pop(1))
rank = os.environ.get("RANK", "0")
try:
    runpy.run_module("rltrain", run_name="__main__", alter_sys=True)
except SystemExit as end:
    (folder / rank).write_text(str(end.code))
    raise
