"""What notebook 6 trains with, and answers that train may call: one loop, and a GPT that takes no time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import dpo_minimal as dpo
from dpo_minimal.train import Objective, Record


def descend(
    objective: Objective, parameters: Iterable[Tensor], batches: Sequence[Any], learning_rate: float
) -> list[Record]:
    """Minimise an objective by Adam, one step a batch; the rate grows over 20 steps and then falls to zero.

    Args:
        objective: batch -> (mean loss, a dict of means to record).
        parameters: what is trained.
        batches: one a step; for training on all data at once, the same again and again.
        learning_rate: the largest.
    Returns:
        for each step `loss` and the objective's means, before the step.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / len(batches))
    )
    return list(dpo.train(objective, optimizer, batches, scheduler=schedule))


def small_gpt(seed: int) -> dpo.GPT:
    """A GPT with one layer and five tokens, in float64: the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gpt = dpo.GPT(dpo.GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4)).double()
    gpt.wte.weight.data *= 20  # next tokens that differ from one another
    return gpt


def logps_of_rows(model: dpo.GPT, ids: Tensor) -> Tensor:
    """(B, T) tokens, of which the first is the prompt -> (B,) log π of the others, in nats."""
    counts = torch.ones(len(ids), dtype=torch.long)
    return dpo.sequence_logps(model, dpo.SequenceBatch(ids, counts, ids.shape[1] * counts))
