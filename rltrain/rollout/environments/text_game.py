"""Text games made by Microsoft's TextWorld, arXiv:1806.11532: generated on this machine, played
through their own interpreter.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import textworld
import textworld.generator
from textworld import EnvInfos, GameOptions

from rltrain.registry import method
from rltrain.rollout.environments import Step, Task

__all__ = ["TextGame"]

_STATUS_LINE = re.compile(
    r"\n>[^\n]*\Z"
)  # the prompt sign, and the room and moves that an interpreter shows at the window's top
_WANTED = EnvInfos(
    feedback=True,
    description=True,
    objective=True,
    admissible_commands=True,
    score=True,
    max_score=True,
    won=True,
)
_LONGEST_COMMAND = 200  # characters


@method("textworld", traits={"rewards"})
class TextGame:
    """A game of TextWorld, arXiv:1806.11532, by the ``game`` number of the task; every turn is one command.

    The reward is the game's score over its highest; ``correct`` is 1 once the game is won. rooms, objects,
    quest_length: how large and how many commands from the win. commands: whether the admissible ones are
    shown, "listed" or "numbered", where a number also gives its command. objective, description: whether the
    policy is told what to do, and what it sees at the start. The command is the last line of the turn that is
    not empty. Also reported: ``moves``, and ``inadmissible`` ones among them. cache: folder for the games,
    each made in about three seconds when it is first played.
    """

    def __init__(
        self,
        *,
        rooms: int = 2,
        objects: int = 4,
        quest_length: int = 2,
        commands: Literal["none", "listed", "numbered"] = "listed",
        objective: bool = True,
        description: bool = True,
        cache: str = ".cache/textworld",
    ) -> None:
        if min(rooms, objects, quest_length) < 1:
            raise ValueError(
                f"textworld: rooms {rooms}, objects {objects} and quest_length {quest_length} must be at "
                "least 1"
            )
        self._size = {"nb_rooms": rooms, "nb_objects": objects, "quest_length": quest_length}
        self._commands, self._objective, self._description, self._cache = (
            commands,
            objective,
            description,
            Path(cache),
        )
        self._game: Any = None
        self._state: Any = None
        self._moves, self._inadmissible = 0, 0

    def reset(self, task: Task, seed: int) -> str | None:
        spelt = re.search(r"\bgame (\d+)\b", task.text)  # the built-in task's prompt, typed by hand
        number = task.columns.get("game", int(spelt[1]) if spelt else None)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(
                f"textworld: task {task.id} has no column 'game' with the number of a game (its columns: "
                f"{sorted(task.columns)}); "
                "set data.train to textworld"
            )
        self._game = textworld.start(str(self._file(number)), request_infos=_WANTED)
        self._state, self._moves, self._inadmissible = self._game.reset(), 0, 0
        told = [
            self._state.objective if self._objective else "",
            self._state.description if self._description else "",
            self._choices(),
        ]
        return "\n\n".join(part.strip() for part in told if part.strip())

    def step(self, text: str) -> Step:
        command = self._command(text)
        before = self._state.score
        self._moves += 1
        self._inadmissible += command not in self._state.admissible_commands
        self._state, _, done = self._game.step(command)
        highest = max(self._state.max_score, 1)
        parts = {
            "correct": float(self._state.won),
            "moves": float(self._moves),
            "inadmissible": float(self._inadmissible),
        }
        feedback = _STATUS_LINE.sub("", self._state.feedback).strip()
        observation = "\n\n".join(part for part in (feedback, self._choices()) if part)
        return Step(observation, bool(done), (self._state.score - before) / highest, parts)

    def close(self) -> None:
        if self._game is not None:
            self._game.close()

    def _command(self, text: str) -> str:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        command = lines[-1][:_LONGEST_COMMAND].lstrip("> ") if lines else ""
        admissible = self._state.admissible_commands
        if self._commands == "numbered" and command.isdecimal() and 0 < int(command) <= len(admissible):
            return admissible[int(command) - 1]
        return command

    def _choices(self) -> str:
        admissible = self._state.admissible_commands
        if self._commands == "none":
            return ""
        if self._commands == "numbered":
            return "\n".join(f"{number} {command}" for number, command in enumerate(admissible, start=1))
        return "Commands: " + "; ".join(admissible)

    def _file(self, number: int) -> Path:
        """The compiled game, made where it is not there yet.

        Two makers at once: one of their games stays, and they are the same.
        """
        name = "-".join(str(value) for value in (number, *self._size.values()))
        made = self._cache / name / "game.z8"
        if made.exists():
            return made
        self._cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self._cache))
        options = GameOptions()
        options.seeds = number
        options.path = str(scratch / "game.z8")
        for key, value in self._size.items():
            setattr(options, key, value)
        textworld.generator.compile_game(textworld.generator.make_game(options), options)
        try:
            os.rename(scratch, made.parent)
        except OSError:
            if not made.exists():
                raise
            shutil.rmtree(scratch)
        return made
