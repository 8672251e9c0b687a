"""Checks of arguments, each with one sentence that names the argument, and `widen`.

The checks read values, so on an accelerator each costs one synchronisation. Without them the mistakes would
be silent: `(B,)` against `(B, 1)` broadcasts to `(B, B)`, a NaN spreads, and an unnormalised table converges
to the wrong policy.
"""

from __future__ import annotations

import math
import re
from numbers import Real

import torch
from torch import Tensor


class InputError(ValueError):
    """Bad input from the user: place and remedy in one sentence, one line of 400 characters at most."""

    def __init__(self, message: str):
        ends = message if len(message) <= 400 else f"{message[:240]} … {message[-155:]}"
        super().__init__("".join(letter if letter.isprintable() else "\ufffd" for letter in ends))


def check_positive(name: str, value: float | Tensor) -> None:
    """Require a positive finite number (or zero-dimensional tensor): beta, a temperature, ..."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.detach().item()
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise InputError(f"{name} must be a positive finite number, got {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    """Require a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise InputError(f"{name} must be a finite number of at least 0, got {value!r}.")


def check_count(name: str, value: int, *, minimum: int = 1) -> None:
    """Require an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{name} must be an integer of at least {minimum}, got {value!r}.")


def check_seed(name: str, value: int) -> None:
    """Require an integer in [0, 2^60): torch takes less than 2^64, and a command multiplies its seed."""
    check_count(name, value, minimum=0)
    if value >= 2**60:
        raise InputError(f"{name} must lie in [0, 2^60), got {value}.")


def check_range(name: str, value: float, low: float, high: float, reason: str) -> None:
    """Require low <= value <= high; the message gives the reason."""
    if not low <= value <= high:  # NaN fails as well
        raise InputError(f"{name} must lie between {low} and {high} ({reason}), got {value}.")


def check_flip_probability(value: float, name: str = "flip_probability") -> None:
    """Require a label-noise rate in [0, 1/2): from 1/2 on, labels carry no or the opposite information."""
    if not isinstance(value, Real) or not 0 <= value < 0.5:
        raise InputError(f"{name} must lie in [0, 0.5), got {value!r}.")


def check_share(name: str, value: float) -> None:
    """Require a number in [0, 1]."""
    check_not_negative(name, value)
    if value > 1:
        raise InputError(f"{name} must lie in [0, 1], got {value!r}.")


def check_device(device: str) -> None:
    """Require --device to name a device that is there and has float64."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {device}: choose cpu or cuda (or cuda:N).")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise InputError(f"--device {device}: torch finds no such device on this machine; use cpu.")


def check_same_shape(**tensors: Tensor) -> None:
    """Require non-empty float tensors of one shape and device, so that nothing broadcasts by accident."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise InputError(f"{name} must have a float dtype, got {tensor.dtype}.")
        shape, wanted = tuple(tensor.shape), tuple(first.shape)
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise InputError(f"{name} must be a non-empty table, got shape {shape}.")
        if tensor.device != first.device:
            raise InputError(f"{name} is on {tensor.device} but {first_name} on {first.device}; move one.")
        if shape != wanted:
            raise InputError(f"{name} has shape {shape} but {first_name} has {wanted}; give both the same.")


def check_finite(**tensors: Tensor) -> None:
    """Require what `check_same_shape` requires, and every entry to be finite."""
    check_same_shape(**tensors)
    for name, tensor in tensors.items():
        if bad := (~torch.isfinite(tensor)).nonzero()[:1].tolist():
            raise InputError(f"{name} must be finite, but entry {bad[0]} is {tensor[tuple(bad[0])].item()}.")


def check_log_distribution(**tables: Tensor) -> None:
    """Require log-probabilities that sum to one over the last dimension; log 0 = -inf is allowed.

    Tolerance 1e-4 (in half precision 16 unit roundoffs): far above the rounding of any table that was
    normalised in its own dtype or in float32, far below what forgetting to normalise does.
    """
    for name, logps in tables.items():
        values = logps.detach()
        if torch.isnan(values).any() or (values == math.inf).any():
            raise InputError(f"{name} must be log-probabilities, but it holds NaN or +inf.")
        excess = values.double().logsumexp(-1).abs().max().item()
        if not excess <= max(1e-4, 16 * torch.finfo(logps.dtype).eps):
            raise InputError(
                f"{name} must be log-probabilities that sum to one over the last dimension, but a log-sum "
                f"is off by {excess:.3g} nats; apply log_softmax(-1) to unnormalised scores."
            )


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Require token ids of a vocabulary; beyond it a CPU raises something else and a GPU ends the process."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        span = f"{int(ids.min())} to {int(ids.max())}"
        raise InputError(f"{name} must lie in [0, {vocab_size}), padding included, got {span}.")


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32, wider dtypes as they are: the spacing of bfloat16 near 500 is 2."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
