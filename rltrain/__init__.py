"""rltrain post-trains language models with reinforcement learning. See README.md."""

__version__ = "0.1.0"
