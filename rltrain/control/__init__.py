"""Functions ``TrainBatch -> TrainBatch`` that take their statistics over the whole step."""

from rltrain.registry import Registry

TOKEN_CONTROLS = Registry("control", modules=("rltrain.control.off_policy",))
