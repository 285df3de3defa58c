"""Many workers that may die: which of them samples what, and what becomes of it when one is lost."""
