"""Policy losses: ``(policy: PolicyTokens, batch: TrainBatch, *, hp) -> TokenLoss``, unreduced."""

from rltrain.registry import Registry

POLICY_LOSSES = Registry(
    "policy loss",
    modules=(
        "rltrain.loss.policy.clip",
        "rltrain.loss.policy.sequence",
        "rltrain.loss.policy.cispo",
        "rltrain.loss.policy.soft_gates",
        "rltrain.loss.policy.divergence",
        "rltrain.loss.policy.optimal_advantage",
        "rltrain.loss.policy.kl_cov",
        "rltrain.loss.policy.ce_gppo",
        "rltrain.loss.policy.grpo_s",
        "rltrain.loss.policy.hapo",
        "rltrain.loss.policy.copo",
        "rltrain.loss.policy.unsupervised",
    ),
)
