"""Real text games: made by TextWorld on this machine, played in its interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.rollout.environments import Step, Task

pytest.importorskip("textworld", reason="textworld is not installed (pip install rltrain[textworld])")
from rltrain.rollout.environments.text_game import TextGame

pytestmark = pytest.mark.filterwarnings(
    "ignore::jericho.jericho.UnsupportedGameWarning"
)  # true of every generated game
ROOT = Path(__file__).parents[3]
SMALL: dict[str, Any] = {
    "rooms": 1,
    "objects": 2,
    "quest_length": 1,
    "cache": str(ROOT / ".cache" / "textworld"),
}


def task(number: Any) -> Task:
    return Task(f"game {number}", "", {"game": number})


def started(number: int = 1, **options: Any) -> tuple[TextGame, str]:
    game = TextGame(**SMALL | options)
    opening = game.reset(task(number), 0)
    assert opening is not None
    return game, opening


def solved(game: TextGame) -> list[Step]:
    """Walks the game's own solution, which TextWorld keeps beside it."""
    made = json.loads(game._game_file(1).with_suffix(".json").read_text())
    commands = made["metadata"]["walkthrough"] or [
        command for quest in made["quests"] for command in quest["commands"]
    ]
    return [game.step(command) for command in commands]


def test_winning_is_worth_one_and_ends_the_episode() -> None:
    game, _ = started()
    steps = solved(game)
    assert sum(step.reward for step in steps) == pytest.approx(1.0)
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].parts == {"correct": 1.0, "moves": float(len(steps)), "inadmissible": 0.0}
    game.close()


def test_what_leads_nowhere_is_worth_nothing() -> None:
    game, _ = started()
    steps = [game.step(command) for command in ("look", "xyzzy", "", "I think.\n> look")]
    assert [(step.reward, step.done) for step in steps] == [(0.0, False)] * 4
    assert steps[-1].parts == {"correct": 0.0, "moves": 4.0, "inadmissible": 2.0}  # "> look" is look
    assert "-= " in steps[-1].observation and not steps[-1].observation.rstrip().endswith(">")


@pytest.mark.timeout(60, method="thread")  # a hang in C hears no signal
def test_a_policy_cannot_speak_to_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    game, _ = started()
    monkeypatch.chdir(tmp_path)  # where an interpreter would write files
    solution = solved(game)
    game.close()
    game, _ = started()
    commands = ("\\boxed{look}", "\\w", "save", "look. save", "Script", "transcript", "restore")
    steps = [game.step(command) for command in commands]
    assert [(step.reward, step.done) for step in steps] == [(0.0, False)] * len(commands)
    assert list(tmp_path.iterdir()) == []
    assert sum(step.reward for step in solved(game)) == sum(step.reward for step in solution)
    game.close()


def test_a_game_is_the_same_every_time_and_games_do_not_disturb_one_another() -> None:
    game, opening = started()
    other, _ = started(0)
    first, second = started()
    assert second == opening
    for command in ("look", "inventory", "examine me"):
        expected = first.step(command)
        other.step(command)
        assert game.step(command) == expected


def test_commands_are_shown_as_configured() -> None:
    listed, opening = started(commands="listed")
    choices = opening.rpartition("Commands: ")[2].split("; ")
    assert "look" in choices and "inventory" in choices
    numbered, opening = started(commands="numbered")
    by_number = dict(line.split(" ", 1) for line in opening.splitlines() if line[:1].isdigit())
    assert list(by_number.values()) == choices
    number = next(key for key, command in by_number.items() if command == "inventory")
    first, second = numbered.step(number), listed.step("inventory")
    assert first.observation.startswith(second.observation.split("\n")[0])
    assert (first.reward, first.parts) == (second.reward, second.parts)
    _, opening = started(commands="none")
    assert "inventory" not in opening


def test_the_opening_tells_what_it_is_asked_to_tell() -> None:
    _, everything = started(commands="none")
    _, objective = started(commands="none", description=False)
    _, description = started(commands="none", objective=False)
    assert everything == f"{objective}\n\n{description}"
    assert description.startswith("-= ") and objective and "-= " not in objective


def test_a_task_without_a_game_is_refused_with_the_remedy() -> None:
    for columns in ({}, {"game": "1"}, {"game": True}):
        with pytest.raises(ValueError, match=r"data\.train to textworld"):
            TextGame(**SMALL).reset(Task("t", "what", columns), 0)
    with pytest.raises(ValueError, match="at least 1"):
        TextGame(**SMALL | {"rooms": 0})


def test_a_game_can_be_named_by_hand() -> None:
    _, opening = started()
    assert TextGame(**SMALL).reset(Task("t", "<user>game 1<assistant>"), 0) == opening
