"""The embedded engine: sampling on transformers' own modules, on a CPU or a GPU."""
