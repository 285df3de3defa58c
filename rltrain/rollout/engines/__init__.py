"""Engines that sample completions: an embedded engine on transformers, and vLLM in the learner's process."""
