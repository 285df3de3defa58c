"""Whether a recipe fits a cluster and how long its step takes, in closed form. Imports no torch.

``shape.py`` reads a model's config, ``workload.py`` a recipe; ``memory.py`` lists the bytes of every phase,
``duration.py`` the seconds, ``remedy.py`` the nearest setting that fits. All constants that no config states
are in ``constants.py``.
"""
