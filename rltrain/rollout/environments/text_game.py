"""Text games of Microsoft's TextWorld, arXiv:1806.11532, generated on this machine and played with
TextWorld's interpreter.
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

from rltrain.needs import OWN_REWARDS
from rltrain.registry import method
from rltrain.rollout.environments import Step, Task

__all__ = ["TextGame"]

# the prompt sign, with the room and the moves that an interpreter shows at the top of its window
_STATUS_LINE = re.compile(r"\n>[^\n]*\Z")
_REQUESTED_INFOS = EnvInfos(
    feedback=True,
    description=True,
    objective=True,
    admissible_commands=True,
    score=True,
    max_score=True,
    won=True,
)
_LONGEST_COMMAND = 200  # characters
# Commands to the interpreter, not to the game: they write files, or go back to the state of another episode.
_TO_THE_INTERPRETER = re.compile(r"\b(save|restore|script|transcript)\b", re.IGNORECASE)


@method("textworld", traits={OWN_REWARDS})
class TextGame:
    """A game of TextWorld, arXiv:1806.11532, with the number in the task's ``game`` column; every turn is a
    command.

    The reward is the game's score divided by its maximum; ``correct`` is 1 once the game is won. rooms,
    objects: size of the game; quest_length: commands needed to win. commands: whether the admissible commands
    are shown, "listed" or "numbered"; with "numbered" the policy may answer with a number. Commands to the
    interpreter (save, restore, script) count as empty ones. objective,
    description: whether the policy reads its goal and what it sees at the start. The command is the last
    non-empty line of the turn. Also reports ``moves`` and the number of ``inadmissible`` ones. cache: folder
    of the games, each made in about three seconds when it is first played.
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
        self._commands = commands
        self._objective = objective
        self._description = description
        self._cache = Path(cache)
        self._game: Any = None
        self._state: Any = None
        self._moves = 0
        self._inadmissible = 0

    def reset(self, task: Task, seed: int) -> str | None:
        match = re.search(r"\bgame (\d+)\b", task.text)  # in a prompt typed by hand as in the built-in task
        number = task.columns.get("game", int(match[1]) if match else None)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(
                f"textworld: task {task.id} has no column 'game' with the number of a game (its columns: "
                f"{sorted(task.columns)}); set data.train to textworld"
            )
        self._game = textworld.start(str(self._game_file(number)), request_infos=_REQUESTED_INFOS)
        self._state = self._game.reset()
        self._moves = 0
        self._inadmissible = 0
        parts = [
            self._state.objective if self._objective else "",
            self._state.description if self._description else "",
            self._choices(),
        ]
        return "\n\n".join(part.strip() for part in parts if part.strip())

    def step(self, text: str) -> Step:
        command = self._command(text)
        score_before = self._state.score
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
        return Step(observation, bool(done), (self._state.score - score_before) / highest, parts)

    def close(self) -> None:
        if self._game is not None:
            self._game.close()

    def _command(self, text: str) -> str:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        command = lines[-1][:_LONGEST_COMMAND].lstrip("> ") if lines else ""
        admissible = self._state.admissible_commands
        if self._commands == "numbered" and command.isdecimal() and 0 < int(command) <= len(admissible):
            return admissible[int(command) - 1]
        if command not in admissible and _TO_THE_INTERPRETER.search(command):
            return ""
        return command.replace("\\", "")  # a line that begins with one is the interpreter's, which hangs

    def _choices(self) -> str:
        admissible = self._state.admissible_commands
        if self._commands == "none":
            return ""
        if self._commands == "numbered":
            return "\n".join(f"{number} {command}" for number, command in enumerate(admissible, start=1))
        return "Commands: " + "; ".join(admissible)

    def _game_file(self, number: int) -> Path:
        """The compiled game, generated if it is not in the cache yet.

        If two processes generate it at once, the first stays; both games are the same.
        """
        name = "-".join(str(value) for value in (number, *self._size.values()))
        game_file = self._cache / name / "game.z8"
        if game_file.exists():
            return game_file
        self._cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self._cache))
        options = GameOptions()
        options.seeds = number
        options.path = str(scratch / "game.z8")
        for key, value in self._size.items():
            setattr(options, key, value)
        textworld.generator.compile_game(textworld.generator.make_game(options), options)
        try:
            os.rename(scratch, game_file.parent)
        except OSError:
            if not game_file.exists():
                raise
            shutil.rmtree(scratch)
        return game_file
