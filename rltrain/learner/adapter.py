"""LoRA adapters inside the trained model (arXiv:2106.09685): which layers get one, switching them off, their
weights alone, and the weights of the model that base and adapter are together.

peft's layers are put into the transformers model in place, so that everything else sees the same model.
Adapter weights are in float32 and have peft's names (``base_model.model.PATH.lora_A.weight``), the model's
weights the names that they have without an adapter.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rltrain.config.schema import Adapter, Model
from rltrain.errors import UserError
from rltrain.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

__all__ = [
    "AdapterLayer",
    "AdapterLayers",
    "dequantized_weights",
    "inject_adapter",
    "merge_adapter_folder",
    "quantization_config",
    "target_paths",
]

_NAME = "default"  # peft's name of the only adapter
_PEFT_PREFIX = "base_model.model."
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")

Gather = Callable[[Tensor, torch.dtype | None], Tensor]  # a weight, and the type its shards are rounded to


@dataclass(frozen=True)
class AdapterLayer:
    """A layer with an adapter. path: of the layer inside the transformers model."""

    path: str
    module: Any  # peft's layer around the base layer
    scale: float
    transposed: bool  # the base weight is (in, out)

    @property
    def names(self) -> tuple[str, str]:
        """peft's names of A (rank, in) and B (out, rank) in an adapter's file."""
        return f"{_PEFT_PREFIX}{self.path}.lora_A.weight", f"{_PEFT_PREFIX}{self.path}.lora_B.weight"

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """A and B as the backend holds them."""
        return self.module.lora_A[_NAME].weight, self.module.lora_B[_NAME].weight

    def delta(self, gather: Gather) -> Tensor:
        """scale B A in float32, in the shape of the base weight."""
        down, up = (gather(weight, None).float() for weight in self.weights)
        product = (up @ down) * self.scale
        return product.t() if self.transposed else product


@dataclass(frozen=True)
class AdapterLayers:
    """The adapter of ``model``, a transformers model with peft's layers inside."""

    model: PreTrainedModel
    settings: Adapter
    layers: Mapping[str, AdapterLayer]  # by path

    def weights(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """A and B of every layer, unsharded, by peft's names. A collective."""
        for layer in self.layers.values():
            for name, weight in zip(layer.names, layer.weights, strict=True):
                yield name, gather(weight, None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of ``weights``."""
        return {
            name: tuple(getattr(weight, "ds_shape", weight.shape))
            for layer in self.layers.values()
            for name, weight in zip(layer.names, layer.weights, strict=True)
        }

    def model_weights(
        self, gather: Gather, dtype: torch.dtype | None, *, merged: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Weights by their names in the model without an adapter, one at a time. A collective.

        merged: W + scale B A where a layer has an adapter, the model that is trained; False: W, the model as
        it started. Quantised weights are returned dequantised, in float32.
        """
        for name, weight in self.model.state_dict(keep_vars=True).items():
            path, parameter = self._owner(name)
            if parameter is None:
                continue
            plain_name = f"{path}.{parameter}"
            layer = self.layers.get(path)
            quantized = parameter == "weight" and path in self._quantized_layers
            if layer is None and not quantized:
                full = gather(weight, dtype)
                yield plain_name, full.float() if dtype is None and full.is_floating_point() else full
                continue
            full = gather(weight, None)
            if quantized:
                full = _dequantize(full, self._quantized_layers[path])
            full = full.float()
            if layer is not None and merged and parameter == "weight":
                full = full + layer.delta(gather)
            yield plain_name, full
            del full

    def _owner(self, name: str) -> tuple[str, str | None]:
        """(path, parameter) of a tensor in the state dict, without peft's level; the parameter is None for
        tensors that only the adapter or the quantised storage has.
        """
        path, _, parameter = name.rpartition(".")
        for quantized in self._quantized_names:
            if name.startswith(f"{quantized}.") and parameter not in ("weight", "bias"):
                return path, None
        if ".lora_" in name:
            return path, None
        return path.removesuffix(".base_layer"), parameter

    @cached_property
    def _quantized_layers(self) -> dict[str, Any]:
        """The layers with quantised weights, by path."""
        return {
            name.removesuffix(".base_layer"): module
            for name, module in self.model.named_modules()
            if _is_quantized(module)
        }

    @cached_property
    def _quantized_names(self) -> tuple[str, ...]:
        return tuple(name for name, module in self.model.named_modules() if _is_quantized(module))

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model computes with its base weights alone.

        peft's own switch also stops gradients and starts them again, which wrappers that share parameters
        among ranks must not see.
        """
        for layer in self.layers.values():
            layer.module._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.module._disable_adapters = False

    def config(self, base: Model) -> dict[str, Any]:
        """The content of adapter_config.json. base: names the model that the adapter belongs to."""
        local = Path(base.path).expanduser()
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(local.resolve()) if local.is_dir() else base.path,
            "revision": base.revision,
            "inference_mode": True,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "use_rslora": self.settings.rslora,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(layer.transposed for layer in self.layers.values()),
            "target_modules": short_names(self.model, self.layers),
        }

    def load(self, folder: Path) -> None:
        """Takes the adapter's weights from ``folder``, before a backend has wrapped the model.

        Raises UserError where they are not those of this adapter.
        """
        tensors = read_adapter(folder)
        expected = self.shapes()
        actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if differing := sorted(expected.items() ^ actual.items()):
            name = differing[0][0]
            raise UserError(
                f"{folder}: its adapter is not the recipe's: {name} is {actual.get(name, 'absent')} there "
                f"and {expected.get(name, 'absent')} here; set model.adapter to the rank and targets of its "
                "adapter_config.json"
            )
        for layer in self.layers.values():
            for name, weight in zip(layer.names, layer.weights, strict=True):
                if weight.device.type != "meta":  # FSDP2 loads on rank 0 alone and sends the rest
                    weight.data.copy_(tensors[name])


def inject_adapter(model: PreTrainedModel, settings: Adapter, paths: Sequence[str]) -> AdapterLayers:
    """Puts an adapter into the layers ``paths`` of ``model`` in place and freezes every other weight.

    A starts at random, from torch's generator, and B at 0, so that the model is at first the base.
    """
    peft = _import_peft()
    transposed = {path for path in paths if isinstance(model.get_submodule(path), Conv1D)}
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=bool(transposed),
        target_modules=list(paths),
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    _keep_quantized_forward(model)
    layers = {}
    for path in paths:
        module = model.get_submodule(path)
        layers[path] = AdapterLayer(path, module, settings.scale, path in transposed)
        for weight in layers[path].weights:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return AdapterLayers(model, settings, layers)


# which layers -----------------------------------------------------------------------------------------------


def target_paths(model: PreTrainedModel, settings: Adapter) -> list[str]:
    """The paths of the layers that get an adapter, in the model's order."""
    layers = linear_layers(model)
    match settings.targets:
        case "linear":
            chosen = list(layers)
        case "attention":
            chosen = [path for path in layers if _is_in_attention(model, path)]
        case "kappatune":
            chosen = _best_conditioned(model, list(layers), settings.kappa_share)
        case names:
            chosen = [path for path in layers if any(_ends_with(path, name) for name in names)]
            _require_every_name(names, chosen, layers)
    if not chosen:
        raise UserError(
            f"model.adapter.targets is {settings.targets!r}, but {type(model).__name__} has no such layer; "
            f"its linear layers are {', '.join(_leaves(layers)) or 'none'}"
        )
    return chosen


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of ``model`` by path, without its output head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def short_names(model: PreTrainedModel, paths: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The last parts of ``paths`` where these name no further layer, else the whole paths: peft matches
    either.
    """
    leaves = _leaves(paths)
    plain = {name.replace(".base_layer", "") for name in linear_layers(model)}
    matched = {path for path in plain if path.rpartition(".")[2] in leaves}
    return leaves if matched == set(paths) else sorted(paths)


def _leaves(paths: Iterable[str]) -> list[str]:
    """The distinct last parts of ``paths``."""
    return sorted({path.rpartition(".")[2] for path in paths})


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _require_every_name(names: Sequence[str], chosen: Sequence[str], layers: Mapping[str, Any]) -> None:
    for name in names:
        if not any(_ends_with(path, name) for path in chosen):
            raise UserError(
                f"model.adapter.targets names {name!r}, which is no linear layer of the model; its linear "
                f"layers are {', '.join(_leaves(layers))}"
            )


def _is_in_attention(model: PreTrainedModel, path: str) -> bool:
    """Whether the layer belongs to an attention module, by the module's class or its name."""
    parts = path.split(".")
    return any(
        parts[end - 1] in _ATTENTION_NAMES
        or type(model.get_submodule(".".join(parts[:end]))).__name__.endswith("Attention")
        for end in range(1, len(parts))
    )


def _best_conditioned(model: PreTrainedModel, paths: Sequence[str], share: float) -> list[str]:
    """KappaTune (arXiv:2506.16289): the ``share`` of ``paths``, at least one, whose matrices have the
    smallest condition numbers.
    """
    from peft.helpers import KappaTuneSelector

    if any(hasattr(module.weight, "ds_id") for module in linear_layers(model).values()):
        raise UserError(
            "model.adapter.targets kappatune reads every matrix, but ZeRO-3 loads them in shards; choose "
            "another backend, or list the layers in model.adapter.targets"
        )
    selector = KappaTuneSelector(model, show_progress=False)
    ranked = [path for path in selector.get_best_targets() if path in set(paths)]
    chosen = set(ranked[: max(1, math.floor(len(ranked) * share))])
    return [path for path in paths if path in chosen]


# adapter folders --------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, by peft's names. Raises UserError where they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: {ADAPTER_WEIGHTS} cannot be read ({error}); export the adapter again"
        ) from error


def merge_adapter_folder(model: PreTrainedModel, folder: Path) -> None:
    """Adds scale B A of the adapter in ``folder`` to the weights of ``model``, in place, whatever rank it is
    on. Under ZeRO-3 a collective.

    Raises UserError where the adapter is no plain LoRA, or belongs to another architecture.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    refused = ("use_dora", "modules_to_save", "lora_bias", "rank_pattern", "alpha_pattern")
    if config.get("peft_type") != "LORA" or any(config.get(key) for key in refused):
        present = [key for key in refused if config.get(key)] or [f"peft_type {config.get('peft_type')}"]
        raise UserError(
            f"{folder} is an adapter with {', '.join(present)}, which is no plain LoRA; merge it with peft's "
            "merge_and_unload and give the merged model"
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = read_adapter(folder)
    paths = {name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0] for name in tensors}
    for path in sorted(paths):
        try:
            layer: Any = model.get_submodule(path)
            down = tensors[f"{_PEFT_PREFIX}{path}.lora_A.weight"].float()
            up = tensors[f"{_PEFT_PREFIX}{path}.lora_B.weight"].float()
        except (AttributeError, KeyError) as error:
            raise UserError(
                f"{folder}: its adapter of {path} does not belong to {type(model).__name__} ({error}); give "
                "the base model that it was trained on"
            ) from error
        delta = (up @ down) * scale
        with torch.no_grad(), _whole_weight(layer.weight) as weight:
            if weight is not None:
                weight.add_((delta.t() if isinstance(layer, Conv1D) else delta).to(weight))


@contextlib.contextmanager
def _whole_weight(weight: Any) -> Iterator[Tensor | None]:
    """The unsharded weight, to be changed in place; None on a rank that has no copy to change."""
    if hasattr(weight, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([weight], modifier_rank=0):
            yield weight.data if torch.distributed.get_rank() == 0 else None
    else:
        yield None if weight.device.type == "meta" else weight


# quantised weights ------------------------------------------------------------------------------------------


def _is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes stores the module's weight."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def _keep_quantized_forward(model: nn.Module) -> None:
    """Makes bitsandbytes compute the same in train and eval mode on a CPU: in eval mode it would repack nf4
    for bfloat16 kernels and round the inputs of int8 layers.
    """
    for module in model.modules():
        layer: Any = module
        if type(module).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False
            layer.quant_state = layer.weight.quant_state
        elif type(module).__name__ == "Linear8bitLt" and layer.weight.device.type == "cpu":
            layer.train(True)
            layer.train = lambda mode=True, layer=layer: layer


def dequantized_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The quantised weights of ``model`` by name, (out, in) float32."""
    for path, module in model.named_modules():
        if _is_quantized(module):
            layer: Any = module
            yield f"{path}.weight", _dequantize(layer.weight.data, layer)


def _dequantize(weight: Tensor, module: Any) -> Tensor:
    """(out, in) float32, from the unsharded storage of a quantised ``module``."""
    from bitsandbytes import functional

    if type(module).__name__ == "Linear4bit":
        packed = weight.view(torch.uint8).reshape(-1, 1)
        state = getattr(module.weight, "quant_state", None)  # FSDP2's shards have none: the module keeps it
        return functional.dequantize_4bit(packed, module.quant_state if state is None else state).float()
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight, scales).float()


def quantization_config(quantize: str, dtype: torch.dtype) -> Any | None:
    """transformers' config for weights in that storage; None for none. dtype: of matrix products, in which
    the stored bytes are kept too: FSDP2 would round those of another. Raises UserError without bitsandbytes.
    """
    if quantize == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.adapter.quantize is {quantize}, but bitsandbytes cannot be imported ({error}); pip "
            "install 'rltrain[qlora]', or set it to none"
        ) from error
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"model.adapter is set, but peft cannot be imported ({error}); pip install 'rltrain[lora]'"
        ) from error
    return peft
