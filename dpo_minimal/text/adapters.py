"""LoRA: a small trained change beside frozen linear maps, W = W0 + (alpha / r) B A.

A (r, in) is random and B (out, r) 0 at the start, so that the adapted model then is its base, whatever A is.
The base stays a model of its own, with which the adapted one shares every weight: the reference of DPO is
the base, without a copy of it and without a switch that might be left on. Folders are in PEFT's layout.
But: no dropout, which would make policy and reference differ by noise; no rsLoRA, no DoRA, no ranks that
differ between maps, nothing trained beside A and B: folders that ask for these are refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import GPT
from ..validation import InputError, check_count, check_positive, check_range
from .runs import read_json_object, read_safetensors, write_atomically, write_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the linear maps of a block
_NO_NAMES = ("base_model", "model", "transformer", "_orig_mod", "module", "weight")  # what others add to them
# What fields of a config may hold; one that is neither here nor below must be empty or false, PEFT's default.
_REQUIRED = {
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", None),  # others alter the base
}  # fmt: skip
_READ_OR_HARMLESS = (
    "r", "lora_alpha", "target_modules", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
    "lora_dropout", "auto_mapping", "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
)  # fmt: skip


class LoRALinear(nn.Module):
    """x -> W0 x + b + (alpha / r) B A x, whose W0 and b are those of a linear map, shared with it."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias, self.r, self.alpha = linear.weight, linear.bias, r, alpha
        drawn = torch.empty(r, linear.in_features)  # on the CPU, so that every device has the same
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # as PEFT does
        self.lora_A = nn.Parameter(drawn.to(linear.weight))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(self.alpha / self.r * F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + change


def adapters_of(model: GPT) -> dict[str, LoRALinear]:
    """The adapted maps of a model by name; none of a plain one."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def learnt(model: GPT) -> list[nn.Parameter]:
    """The weights that are not frozen; all, where all are."""
    return [w for w in model.parameters() if w.requires_grad] or [*model.parameters()]


def add_adapter(model: GPT, r: int, alpha: float, *, targets: Sequence[str] = TARGETS, seed: int = 0) -> GPT:
    """A second GPT that shares all weights of `model`, with A and B beside some of its linear maps.

    Args:
        model: the base, which is frozen, and still computes what it did.
        r, alpha, seed: the rank; what the change is scaled by, times the rank; of A.
        targets: ends of names, as for PEFT: "attn.c_proj" is one map of each block, "c_proj" two.
    Raises InputError: r or alpha is not positive, a target fits no linear map.
    """
    check_count("r", r)
    check_range("r", r, 1, 10**4, "more is no small change")
    check_positive("alpha", alpha)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    fitting = [(t, [n for n in linear if f".transformer.{n}".endswith(f".{t}")]) for t in targets or [""]]
    if unknown := [target for target, names in fitting if not names]:
        raise InputError(f"no linear map is named {short(unknown[0])}; choose from {', '.join(TARGETS)}.")
    shared = {id(weight): weight for weight in model.requires_grad_(False).parameters()}
    adapted, generator = copy.deepcopy(model, shared), torch.Generator().manual_seed(seed)
    for name in sorted({name for _, names in fitting for name in names}):
        adapted.set_submodule(name, LoRALinear(linear[name], r, alpha, generator))
    return adapted


def merge(model: GPT) -> GPT:
    """A plain GPT with the weights W0 + (alpha / r) B A, which shares no memory with `model`."""
    weights = {name: x.clone() for name, x in model.state_dict().items() if ".lora_" not in name}
    for name, layer in adapters_of(model).items():
        weights[f"{name}.weight"] += (layer.alpha / layer.r * layer.lora_B @ layer.lora_A).detach()
    with torch.device("meta"):
        plain = GPT(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain


def save_adapter(model: GPT, folder: Path, base: str | None = None) -> None:
    """Write A and B in float32, and the folder or name of their base. Raises OSError, SafetensorError."""
    layers, state = adapters_of(model), model.state_dict().items()
    tensors = {f"base_model.model.transformer.{n}.weight": x.float().cpu() for n, x in state if ".lora_" in n}
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": one.r,
        "lora_alpha": one.alpha, "target_modules": sorted(layers),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": True, "inference_mode": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ADAPTER_WEIGHTS, lambda path: safetensors.torch.save_file(tensors, path))
    write_json(folder / ADAPTER_CONFIG, config)


def load_adapter(folder: Path, base: GPT) -> GPT:
    """`base` with the adapter of a folder. Raises InputError naming the field or tensor that does not fit."""
    path = folder / ADAPTER_CONFIG
    fields = dict.fromkeys(_REQUIRED) | read_json_object(path)
    for field, value in fields.items():
        allowed = _REQUIRED.get(field, (None, False, "", [], {}))
        if field not in _READ_OR_HARMLESS and value not in allowed:
            raise InputError(
                f"{path}, field {field!r}: must be {allowed[0]!r} here, not {short(value)}; name the model "
                "that peft's merge_and_unload() makes of it."
            )
    r, alpha, targets = map(fields.get, ("r", "lora_alpha", "target_modules"))
    try:
        model = add_adapter(base, r, alpha, targets=targets if isinstance(targets, list) else [targets])
    except (InputError, OverflowError) as error:  # the latter of an alpha with hundreds of digits
        raise InputError(f"{path}: {error}") from None
    model.load_state_dict(read_adapter_weights(folder, model), strict=False)
    return model


def read_adapter_weights(folder: Path, model: GPT) -> dict[str, Tensor]:
    """A and B by their names in an adapted model. Raises InputError where they are not what it has."""
    path = folder / ADAPTER_WEIGHTS
    tensors = read_safetensors(path).items()
    found = {".".join(part for part in n.split(".") if part not in _NO_NAMES): x for n, x in tensors}
    expected = {name: weight.shape for name, weight in model.state_dict().items() if ".lora_" in name}
    for name in expected | found:
        shape = tuple(expected.get(name, ()))
        right = name in expected and name in found and found[name].shape == shape
        if not right or not found[name].is_floating_point() or not found[name].float().isfinite().all():
            needed = f"finite numbers of shape {shape}" if shape else "absent"
            raise InputError(
                f"{path}: tensor {name[:60]!r} must be {needed}, as {ADAPTER_CONFIG} says; copy both again."
            )
    return {name: x.to(torch.float32, copy=True) for name, x in found.items()}  # the file may go
