"""Train a policy on a bandit and measure, as it goes, how far it is from where it must end."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...bandit import Bandit, TabularPolicy, dpo_objective, safe_learning_rate
from ...certificates import certify
from ...closed_form import kl_divergence
from ...preferences import Rankings
from ...train import Record, train


@dataclass(frozen=True)
class Outcome:
    """One trained policy beside its closed-form target; tables (X, Y) in float64 on the CPU."""

    name: str  # key of its arrays in result.npz
    target: str  # what `target_logps` is, for people: "pi*" or "MLE"
    beta: float
    ref_logps: Tensor
    rewards: Tensor
    logps: Tensor
    target_logps: Tensor
    logp_bound: Tensor  # (X,) certified bound on max |log pi - log target|; inf where none holds
    rankings: Rankings
    seconds: float  # training and measuring
    records: list[Record] = field(repr=False)  # one for each measured step, step 0 included


def fit(
    name: str,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    rankings: Rankings,
    *,
    objective: Callable,
    ref_logps: Tensor,
    rewards: Tensor,
    target_logps: Tensor,
    target: str,
    beta: float,
    steps: int,
    measure_every: int,
    stop_at_bound: float = 0.0,
    certified: bool = True,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Outcome:
    """Train `policy` on `rankings` for at most `steps` full-batch steps.

    Args:
        policy: called, it gives its (X, Y) table of log-probabilities.
        optimizer, scheduler: over the policy's parameters.
        objective: one of bandit.py's, (logps, ref_logps, rankings, beta=) -> (loss, mean gradient weight).
        ref_logps, rewards, target_logps: (X, Y) float64, on the rankings' device.
        measure_every: steps between two measurements; the first few steps are measured more densely.
        stop_at_bound: end early once the certificate promises this many nats everywhere.
        certified: False for objectives that are no Plackett-Luce likelihood, such as IPO; no bound then.
    Returns:
        Outcome, its last record that of the final policy.
    Raises:
        RuntimeError: the policy does not start at the reference.
    """
    reference = ref_logps.to(next(policy.parameters()).dtype)
    training = rankings._replace(weight=rankings.weight.to(reference.dtype))

    def step_objective(batch: Rankings) -> tuple[Tensor, dict[str, Tensor]]:
        loss, weight = objective(policy(), reference, batch, beta=beta)
        return loss, {"dpo/gradient_weight": weight}

    measure = partial(
        _measured, policy, rankings, objective, ref_logps, rewards, target_logps, beta, certified
    )
    started = time.perf_counter()
    logps, bound, measured = measure()
    if max_distance(logps, ref_logps) > 1e-6:  # else the first loss is not log 2: the wrong reference
        raise RuntimeError(f"{name}: training must start at the reference policy.")
    records = [{"step": 0, **measured}]
    stream = train(step_objective, optimizer, itertools.repeat(training, steps), scheduler=scheduler)
    # disable=None: no bar where the output is a file, so that logs stay readable
    for record in tqdm(stream, total=steps, desc=name, unit="step", leave=False, disable=None):
        if record["step"] % measure_every == 0 or record["step"] in (1, 2, 3, 5, 10, 20, steps):
            logps, bound, measured = measure()
            records.append({**record, **measured})
            if bound.max() <= stop_at_bound:
                break
    seconds = time.perf_counter() - started
    tables = (table.cpu() for table in (ref_logps, rewards, logps, target_logps, bound))
    return Outcome(name, target, beta, *tables, rankings.to("cpu"), seconds, records)


def fit_table(
    name: str, world: Bandit, rankings: Rankings, target_logps: Tensor, target: str,
    *, beta: float, device: str, objective: Callable = dpo_objective, certified: bool = True, **options: Any,
) -> Outcome:  # fmt: skip
    """`fit` of a table of logits, from the world's reference, by gradient descent with momentum.

    Args: as `fit`, whose `options` are its other arguments; the rankings in any weights; tables on the CPU.
    """
    tables = world.ref_logps, world.rewards, target_logps
    ref_logps, rewards, target_logps = (table.to(device) for table in tables)
    rankings = rankings.normalised_by_prompt().to(device)
    policy = TabularPolicy(ref_logps)
    learning_rate = safe_learning_rate(rankings, beta=beta if certified else None)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    return fit(
        name, policy, optimizer, rankings, objective=objective, ref_logps=ref_logps, rewards=rewards,
        target_logps=target_logps, target=target, beta=beta, certified=certified, **options,
    )  # fmt: skip


def _measured(
    policy: nn.Module, rankings: Rankings, objective: Callable, ref_logps: Tensor, rewards: Tensor,
    target_logps: Tensor, beta: float, certified: bool,
) -> tuple[Tensor, Tensor, Record]:  # fmt: skip
    """Its table (X, Y), the bound of each prompt (X,), inf where none holds, and what is recorded: the worst
    prompt's distance to the target, means over prompts for the frontier."""
    logps = float64_table(policy)
    with torch.no_grad():
        loss, weight = objective(logps, ref_logps, rankings, beta=beta)
    bound = torch.full_like(logps[:, 0], math.inf)
    if certified:
        bound = certify(logps, ref_logps, rankings, beta=beta).logp_bound
    return (
        logps,
        bound,
        {
            "loss": loss.item(),
            "dpo/gradient_weight": weight.item(),
            "distance/bound": bound.max().item(),
            "distance/max_logp": max_distance(logps, target_logps),
            "kl/policy_target": kl_divergence(logps, target_logps).max().item(),
            "kl/policy_reference": kl_divergence(logps, ref_logps).mean().item(),
            "reward": expected_reward(logps, rewards).item(),
        },
    )


def float64_table(policy: nn.Module) -> Tensor:
    """The policy's (X, Y) log-probabilities evaluated in float64, whatever it is trained in."""
    with torch.no_grad():
        if next(policy.parameters()).dtype == torch.float64:
            return policy()
        return copy.deepcopy(policy).double()()


def max_distance(logps: Tensor, target_logps: Tensor) -> float:
    """max over completions of |log pi - log target|, those that do not exist (-inf in both) left out."""
    return torch.where(logps == target_logps, 0, logps - target_logps).abs().max().item()


def expected_reward(logps: Tensor, rewards: Tensor) -> Tensor:
    """Mean over prompts of E_pi[r]."""
    return (logps.exp() * rewards).sum(-1).mean()
