"""What samples completions: an embedded engine on transformers, and vLLM in the learner's process."""
