"""A run's state between two steps, so that it can go on as if nothing had happened.

A state is a folder: the model in Hugging Face's layout (checkpoint.py), `optimizer.safetensors`, and
`state.json` with everything that is not a tensor. It appears by one rename, whole or not at all, and
nothing in it is unpickled.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .checkpoint import _read_object, load_model, read_safetensors, save_model
from .model import GPT
from .runs import write_json
from .validation import InputError

OPTIMIZER_FILE, STATE_FILE, FORMAT = "optimizer.safetensors", "state.json", 1


def save_training_state(
    folder: Path, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write a new folder with model, optimizer and `state`, put in place in one move.

    Args:
        folder: must not exist; its parent must.
        state: what else the run needs to go on, in JSON's words.
    Raises:
        InputError: the folder exists, or cannot be written; then nothing of it is left.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; a state is never overwritten.")
    temporary = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while writing
    tensors, plain = _flatten(optimizer)
    try:
        temporary.mkdir()
        save_model(model, temporary)
        safetensors.torch.save_file(tensors, temporary / OPTIMIZER_FILE)
        content = {"format": FORMAT, "optimizer": type(optimizer).__name__, "groups": plain, "state": state}
        write_json(temporary / STATE_FILE, content)
        os.replace(temporary, folder)
    except (OSError, InputError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder}: the checkpoint cannot be written ({error}); make room there.") from None
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
    content = _read_object(folder / STATE_FILE)
    if content.get("format") != FORMAT:
        raise InputError(f"{folder / STATE_FILE}, field 'format': must be {FORMAT}; start a new run.")
    if content.get("optimizer") != type(optimizer).__name__:
        raise InputError(
            f"{folder / STATE_FILE}, field 'optimizer': {content.get('optimizer')} was saved, but "
            f"{type(optimizer).__name__} is to go on; use the same optimizer."
        )
    saved = load_model(folder)
    if saved.config != model.config:
        raise InputError(
            f"{folder}: holds {saved.config}, but {model.config} is to go on; use the same model."
        )
    path = folder / OPTIMIZER_FILE
    tensors = read_safetensors(path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    per_parameter: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(parameters))}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise InputError(f"{path}: tensor {name!r} belongs to no parameter; use the run's own files.")
        if tensor.dim() and tensor.shape != parameters[int(index)].shape:
            raise InputError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, its parameter "
                f"{tuple(parameters[int(index)].shape)}; use the run's own files."
            )
        per_parameter[int(index)][key] = tensor
    kinds = {frozenset(entries) for entries in per_parameter.values()}
    if len(kinds) > 1:
        largest = max(kinds, key=len)
        index, missing = next(
            (i, sorted(largest - set(entries))[0])
            for i, entries in per_parameter.items()
            if largest - set(entries)
        )
        raise InputError(f"{path}: tensor '{index}.{missing}' is missing; copy the file again.")
    groups = [
        {**group, "params": list(range(sum(sizes), sum(sizes) + len(own["params"])))}
        for group, own, sizes in zip(
            content["groups"], optimizer.param_groups, _sizes_before(optimizer), strict=True
        )
    ]
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(
        {"state": {i: entries for i, entries in per_parameter.items() if entries}, "param_groups": groups}
    )
    return content["state"]


def _sizes_before(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return [sizes[:place] for place in range(len(sizes))]


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors ("3.exp_avg") and its groups' plain settings."""
    content = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, entries in content["state"].items()
        for key, value in entries.items()
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in content["param_groups"]]
    return tensors, groups
