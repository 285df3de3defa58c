"""Controls: functions ``TrainBatch -> TrainBatch`` whose statistics run over the whole step."""

from rltrain.registry import Registry

TOKEN_CONTROLS = Registry(
    "control",
    modules=(
        "rltrain.control.off_policy",
        "rltrain.control.covariance",
        "rltrain.control.entropy",
        "rltrain.control.agent",
        "rltrain.control.hapo",
        "rltrain.control.consistency",
        "rltrain.control.distill",
        "rltrain.control.paced",
        "rltrain.control.selection",
    ),
)
COEFFICIENTS = Registry(
    "coefficient",
    modules=("rltrain.control.coefficient",),
    interface=("__call__", "inputs", "observe", "state_dict", "load_state_dict"),
)
