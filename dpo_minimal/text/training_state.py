"""A run's state between two steps, so that it can go on as if nothing had happened.

A state is a folder: the model in Hugging Face's layout (checkpoint.py), or its adapter alone if it has one,
`optimizer.safetensors` with tensors named after their parameters (`h.0.ln_1.weight.exp_avg`), `state.json`
with the rest, which are no tensors. It appears by one rename, whole or not at all; nothing is unpickled.

But: no random state and no place in the data; what a run needs of these it puts into `state` itself.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..model import GPT
from ..validation import InputError
from .adapters import adapters_of, read_adapter_weights, save_adapter
from .checkpoint import load_model, save_model
from .runs import read_json_object, read_safetensors, write_atomically, write_json

OPTIMIZER_FILE, STATE_FILE, FORMAT = "optimizer.safetensors", "state.json", 1


def save_training_state(
    folder: Path, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write a new folder with model, optimizer and `state`, by one rename.

    Args:
        folder: must not exist; its parent must.
        model: in float32.
        optimizer: of this model's parameters; its state must consist of tensors (RMSprop, AdamW).
        state: what else the run needs to go on, as JSON.
    Raises:
        InputError: the folder exists or cannot be written, a number is not finite, a weight is not float32;
            then nothing of it is left.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; a state is never overwritten.")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise InputError(
                f"{folder}: not written, because {name!r} is {parameter.dtype}; a state is kept in float32."
            )
    names = _parameter_names(model, optimizer)
    tensors = {
        f"{names[index]}.{key}": value.detach().cpu().contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: not written, because the optimizer's {name!r} is not finite.")
    content = {
        "format": FORMAT,
        "optimizer": type(optimizer).__name__,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "state": state,
        "tensors": list(tensors),
    }
    for field, value in content.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{folder}: not written, because {field!r} is not JSON ({error}).") from None
    temporary = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while writing
    try:
        temporary.mkdir()
        (save_adapter if adapters_of(model) else save_model)(model, temporary)
        write_atomically(temporary / OPTIMIZER_FILE, lambda p: safetensors.torch.save_file(tensors, p))
        write_json(temporary / STATE_FILE, content)
        os.replace(temporary, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{folder}: the checkpoint cannot be written ({error}); free some space or name another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_training_state(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state into a model and an optimizer of the same kind, bit for bit.

    Args: model and optimizer are altered in place, and only if everything fits.
    Returns: the `state` that was saved.
    Raises:
        InputError: a file is missing or damaged, a tensor is missing or of another shape, the model or the
            optimizer is of another kind.
    """
    path = folder / STATE_FILE
    content = _read_content(path, optimizer)
    groups = _fitting_groups(path, content["groups"], optimizer)
    saved = model if adapters_of(model) else load_model(folder)
    if saved.config != model.config:
        raise InputError(
            f"{folder}: holds {saved.config}, but {model.config} is to go on; use the same model."
        )
    weights = read_adapter_weights(folder, model) if saved is model else saved.state_dict()
    tensors = _fitting_tensors(folder / OPTIMIZER_FILE, content["tensors"], model, optimizer)
    model.load_state_dict(weights, strict=saved is not model)  # what an adapter changes is frozen, not saved
    optimizer.load_state_dict({"state": tensors, "param_groups": groups})
    return content["state"]


def _parameter_names(model: GPT, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


# ---------------------------------------------------------------------------------------- checks on loading


def _read_content(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """state.json, with its fields where they should be and for this kind of optimizer."""
    content = read_json_object(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}, field 'format': must be {FORMAT}; start a new run.")
    for field, kind in (("optimizer", str), ("groups", list), ("state", dict), ("tensors", list)):
        if not isinstance(content.get(field), kind):
            raise InputError(f"{path}, field {field!r}: missing or no {kind.__name__}; copy the file again.")
    if content["optimizer"] != type(optimizer).__name__:
        raise InputError(
            f"{path}, field 'optimizer': {content['optimizer']} was saved, but {type(optimizer).__name__} is "
            "to go on; use the same optimizer."
        )
    return content


def _fitting_groups(path: Path, saved: list[Any], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The saved settings of each parameter group, in the form that `load_state_dict` takes."""
    own_groups = optimizer.state_dict()["param_groups"]  # here `params` are numbers
    if len(saved) != len(own_groups) or not all(isinstance(group, dict) for group in saved):
        raise InputError(
            f"{path}, field 'groups': must hold the settings of {len(own_groups)} group(s) of parameters; "
            "use the same optimizer."
        )
    fitting = []
    for number, (group, own) in enumerate(zip(saved, own_groups)):
        for key, value in own.items():
            if key != "params" and not (key in group and _same_kind(group[key], value)):
                raise InputError(
                    f"{path}, field 'groups': group {number} has {key!r} {group.get(key, 'missing')!r} where "
                    f"something like {value!r} is needed; copy the file again."
                )
        tuples = {key: tuple(group[key]) for key, value in own.items() if isinstance(value, tuple)}
        fitting.append({**group, **tuples, "params": own["params"]})
    return fitting


def _same_kind(saved: Any, own: Any) -> bool:
    """Is a setting read from JSON of the kind of the optimizer's own: numbers, flag (or None), or number?"""
    if isinstance(own, tuple):
        return isinstance(saved, list) and len(saved) == len(own) and all(map(_same_kind, saved, own))
    if own is None or isinstance(own, bool):
        return saved is None or isinstance(saved, bool)
    return isinstance(saved, int | float) and not isinstance(saved, bool) and math.isfinite(saved)


def _fitting_tensors(
    path: Path, listed: list[Any], model: GPT, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors by parameter number and key, each checked against its parameter."""
    tensors = read_safetensors(path)
    for name in map(str, listed):
        if name not in tensors:
            raise InputError(f"{path}: tensor {name!r} is missing; copy the file again.")
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    fitting: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner not in numbers or name not in listed:
            raise InputError(f"{path}: tensor {name!r} belongs to no parameter; use the run's own files.")
        parameter = parameters[owner]
        shape = () if key == "step" else tuple(parameter.shape)  # `step` counts, all else is per weight
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise InputError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype} and shape {tuple(tensor.shape)} where "
                f"torch.float32 and {shape} are needed; use the run's own files."
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name!r} holds NaN or infinity; use an earlier checkpoint.")
        fitting.setdefault(numbers[owner], {})[key] = tensor.clone()  # the file may go while the run goes on
    return fitting
