"""The reward of the golden runs: an untrained model already gets some of it, so that the first step has a
gradient.
"""

from rltrain.reward.score import Score


def sevens(inputs):
    """The share of the digit 7; correct above 0.4."""
    shares = [text.count("7") / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.4)}) for share in shares]
