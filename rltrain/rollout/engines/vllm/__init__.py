"""vLLM in the learner's process."""
