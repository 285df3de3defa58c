"""The data types that stages exchange. All are frozen; these letters name their dimensions:

B  completions in a rollout step          T  completion tokens, right-padded at the loss border
G  completions of one prompt              N  preference examples            V  vocabulary

Log-probs and entropies are in nats, float32. Column ``t`` of a ``(B, T)`` tensor belongs to completion token
``t``; the shift by one between logits and tokens happens only in ``learner/forward.py``. Groups, versions,
prompts, sources and turns are identified by ids, never by positions.
"""
