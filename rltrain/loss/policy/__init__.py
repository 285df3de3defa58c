"""Policy losses: ``(policy: PolicyTokens, batch: TrainBatch, *, hp) -> TokenLoss``, unreduced."""

from rltrain.registry import Registry

POLICY_LOSSES = Registry(
    "policy loss",
    modules=("rltrain.loss.policy.clip", "rltrain.loss.policy.sequence", "rltrain.loss.policy.cispo"),
)
