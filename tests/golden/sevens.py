"""The reward of the golden runs: one that an untrained model gets some of, so that there is a
gradient from the first step on.
"""

from reward.score import Score


def sevens(inputs):
    """The share of the digit 7; correct above 0.4."""
    shares = [text.count("7") / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.4)}) for share in shares]
