"""One loop: batches and an objective in, a stream of records out.

The loop knows neither model nor loss. It is a generator: the caller decides what to measure, print or save
between two steps, and may stop after any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .validation import InputError

Record = dict[str, float]
Objective = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


class Window(NamedTuple):
    """What one optimizer step sees, in pieces that fit into memory [D5.2].

    Fields:
        micro_batches: what the objective is called with, one after the other.
        shares: the part of the whole that each is, summing to 1: of the rows for a loss per row, of the
            tokens for a loss per token. Averaged with them, the pieces give what the whole would.
        name: which rows these are, for messages.
        mine: the pieces that are for this process; those of all processes make the whole.
    """

    micro_batches: list[Any]
    shares: list[float]
    name: str = ""
    mine: slice = slice(None)


def train(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
    first_step: int = 1,
    add_up: Callable[[dict[str, Tensor], list[Tensor]], dict[str, Tensor]] = lambda means, _: means,
) -> Iterator[Record]:
    """Minimise an objective, one optimizer step a batch [D5.2].

    Args:
        objective: batch -> (scalar mean loss, metrics to log, each a mean too); for full-batch training the
            batches are the same data again and again.
        optimizer: holds the parameters.
        batches: one a step; a batch that is a `Window` is accumulated.
        scheduler: stepped after each step.
        max_grad_norm: clip the gradient to this norm; None leaves it alone.
        first_step: the number of the first of these steps, where a run is resumed.
        add_up: called with a step's means and the parameters, before the gradient's norm is taken: where a
            window is shared by processes, it sums what each has of means and gradients.
    Yields:
        After each step one record: `step`, `loss` and the metrics of the policy *before* the step,
        `grad_norm` before clipping, `learning_rate` used. Its numbers leave the device together.
    Raises:
        InputError: all parameters are frozen; loss or gradient is not finite, or the objective refuses a
            batch: step and batch are named, and the parameters are as before that step.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm must be positive, got {max_grad_norm}; None clips nothing.")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in parameters):
        raise InputError("all weights are frozen, so nothing would be learnt; call requires_grad_(True).")
    for step, batch in enumerate(batches, start=first_step):
        window = batch if isinstance(batch, Window) else Window([batch], [1.0])
        place = f"step {step}" + (f" ({window.name})" if window.name else "")
        optimizer.zero_grad(set_to_none=True)
        try:
            means = _means(objective, window, Tensor.backward)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        means = add_up(means, parameters)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        numbers = _numbers({**means, "grad_norm": grad_norm})
        if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["grad_norm"]):
            found = f"loss {numbers['loss']:.4g} with gradient norm {numbers['grad_norm']:.4g}"
            raise InputError(f"{place}: {found}; lower the learning rate or look for bad data.")
        if max_grad_norm is not None and numbers["grad_norm"] > max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
        record = {"step": step, **numbers, "learning_rate": optimizer.param_groups[0]["lr"]}
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        yield record


def average(objective: Objective, window: Window) -> Record:
    """`loss` and metrics of a window, averaged over its micro-batches by their shares; no gradient."""
    with torch.no_grad():
        return _numbers(_means(objective, window))


def _means(objective: Objective, window: Window, each: Callable = Tensor.detach) -> dict[str, Tensor]:
    """Loss and metrics averaged by shares; `each` is called with every micro-batch's share of the loss."""
    if not math.isclose(sum(window.shares), 1):
        raise InputError(f"the shares of a window must sum to 1, but they sum to {sum(window.shares):.6g}.")
    means: dict[str, Tensor] = {}
    for micro_batch, share in [*zip(window.micro_batches, window.shares, strict=True)][window.mine]:
        loss, metrics = objective(micro_batch)
        each(share * loss)
        for name, value in {"loss": loss, **metrics}.items():
            means[name] = means.get(name, 0) + share * value.detach()
    return means


def _numbers(scalars: dict[str, Tensor]) -> Record:
    """Scalar tensors as floats, all in one transfer: each transfer waits for the accelerator."""
    device = scalars["loss"].device
    together = torch.stack([value.to(device, torch.float64) for value in scalars.values()])
    return dict(zip(scalars, together.tolist()))


def warm_up(
    optimizer: torch.optim.Optimizer, learning_rate: float, warmup_steps: int, *, first_step: int = 1
) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that grows linearly to its value, reached at step `warmup_steps`, and stays there.

    It is a function of the step alone, so that a run resumed at first_step has the same one.

    Args: warmup_steps, the paper's 150; 0 starts at the full rate. Returns: a scheduler for `train`.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        >>> warm_up(optimizer, 0.5, warmup_steps=4, first_step=3).get_last_lr()
        [0.375]
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = learning_rate
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min(1.0, (done + 1) / max(1, warmup_steps)),
        last_epoch=first_step - 2,  # the scheduler's own first step brings it to first_step - 1 done
    )


OPTIMIZERS = ("rmsprop", "adamw")


def make_optimizer(parameters: Iterable[Tensor], name: str, learning_rate: float) -> torch.optim.Optimizer:
    """RMSprop, the paper's (torch's defaults: decay 0.99, eps 1e-8), or AdamW without weight decay.

    Decay would pull towards zero weights instead of the reference and move the optimum. Raises InputError.
    """
    if name == "rmsprop":  # on a CPU the plain loop over tensors; torch's foreach form takes longer
        return torch.optim.RMSprop(parameters, lr=learning_rate)
    if name == "adamw":  # fused: one pass over the weights, a fifth of the loop's time
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    raise InputError(f"no optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}.")
