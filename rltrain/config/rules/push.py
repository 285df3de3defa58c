"""Rules about pushes to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rltrain.config.schema import Checkpoint, Push

# what the Hub takes: letters, digits, dash, underscore and dot, at most 96 characters
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def push_problems(push: Push | None, checkpoint: Checkpoint) -> Iterator[str]:
    """A name that is none on the Hub, and pushes of checkpoints that are not written as model folders."""
    if push is None:
        return
    if not _NAME.fullmatch(push.repo):
        yield f"push.repo is {push.repo!r}, expected OWNER/MODEL as on the Hub, e.g. ann/qwen-math-grpo"
    if push.every == 0:
        return
    if checkpoint.every == 0 or push.every % checkpoint.every:
        yield (
            f"push.every is {push.every}, but checkpoint.every is {checkpoint.every} (0: no checkpoints); "
            "set push.every to a multiple of checkpoint.every"
        )
    if checkpoint.format == "sharded":
        yield (
            f"push.every is {push.every}, but checkpoint.format sharded writes the ranks' parts, which are "
            "no model to push; set push.every 0 (the finished model is pushed), or checkpoint.format whole"
        )
