"""A vLLM server beside the learner: its flags, its guard, its process and its client."""
