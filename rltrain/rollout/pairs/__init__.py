"""Preference pairs from sampled completions: judges and the choice of pairs."""
