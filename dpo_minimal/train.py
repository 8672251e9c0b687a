"""One loop: batches and an objective in, a stream of records out.

The loop knows neither model nor loss. It is a generator: whoever runs it decides what to measure, print
or save between two steps, and stops it by stopping to ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .validation import InputError

Record = dict[str, float]


def train(
    objective: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
) -> Iterator[Record]:
    """Minimise an objective, one optimizer step a batch [D5.2].

    Args:
        objective: batch -> (scalar loss, metrics to log); for full-batch training the batches are the
            same data again and again.
        optimizer: holds the parameters.
        batches: as many as there are steps.
        scheduler: stepped after each step.
        max_grad_norm: clip the gradient to this norm; None leaves it alone.
    Yields:
        After each step one record: `step` (from 1), `loss` and the metrics of the policy *before* the
        step, `grad_norm` before clipping, `learning_rate` used.
    Raises:
        InputError: loss or gradient is not finite; the parameters are as before that step.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm must be positive, got {max_grad_norm}; None clips nothing.")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = objective(batch)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            parameters, math.inf if max_grad_norm is None else max_grad_norm
        )
        if not math.isfinite(loss.item()) or not math.isfinite(grad_norm.item()):
            raise InputError(
                f"step {step}: loss {loss.item():.4g} with gradient norm {grad_norm.item():.4g}; "
                "lower the learning rate or look for bad data."
            )
        record = {
            "step": step,
            "loss": loss.item(),
            **{name: value.item() for name, value in metrics.items()},
            "grad_norm": grad_norm.item(),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        yield record
