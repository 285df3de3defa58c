"""The nouns that stages exchange. All frozen; letters are defined here once.

B  completions in a rollout step          T  completion tokens, right-padded at the loss border
G  completions of one prompt              N  preference examples            V  vocabulary

Log-probs and entropies are in nats, float32. Column ``t`` of a ``(B, T)`` tensor belongs to completion token
``t``; the off-by-one shift between logits and tokens happens in ``learner/forward.py`` and nowhere else.
Groups, versions, prompts, sources and turns are carried as ids, never as positions.
"""
