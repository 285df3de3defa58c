"""An environment of one's own, named in a recipe as

rollout: {environment: {name: 'my_environment.py:Guess', max_turns: 3, turn_tokens: 4}}
"""

from __future__ import annotations

import random

from rltrain.rollout.environments import Step, Task


class Guess:
    """The policy guesses a digit; the environment says whether the secret one is higher or lower."""

    def __init__(self, *, digits: int = 10) -> None:
        self._digits = digits
        self._secret = 0

    def reset(self, task: Task, seed: int) -> str | None:
        """Chooses the secret digit; equal tasks and seeds give equal secrets."""
        self._secret = random.Random(f"{task.id} {seed}").randrange(self._digits)
        return "guess="

    def step(self, text: str) -> Step:
        guess = next((int(character) for character in text if character.isdecimal()), None)
        if guess is None:
            return Step("a digit=")
        if guess == self._secret:
            return Step(done=True, reward=1.0)
        return Step("more=" if guess < self._secret else "less=")

    def close(self) -> None:
        pass
