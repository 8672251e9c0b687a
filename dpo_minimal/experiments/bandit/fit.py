"""Train a policy on a bandit and measure, as it goes, how far it is from where it must end."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...bandit import TabularPolicy, safe_learning_rate
from ...certificates import certify
from ...closed_form import kl_divergence
from ...preferences import Rankings
from ...train import Record, train


@dataclass(frozen=True)
class Task:
    """What to train on, and its closed-form target; tables (X, Y) in float64, on one device."""

    name: str  # key of its arrays in result.npz
    target: str  # what `target_logps` is, for people: "pi*" or "MLE"
    beta: float
    ref_logps: Tensor
    rewards: Tensor
    target_logps: Tensor
    rankings: Rankings
    objective: Callable  # of bandit.py: (logps, ref_logps, rankings, beta=) -> (loss, mean gradient weight)

    def to(self, device: str) -> Task:
        """The same task with its tables and rankings on a device."""
        moved = {key: value.to(device) for key, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Outcome(Task):
    """A task and the policy that it trained, on the CPU."""

    logps: Tensor
    logp_bound: Tensor  # (X,) certified bound on max |log pi - log target|; inf where none holds
    seconds: float  # training and measuring
    records: list[Record] = field(repr=False)  # one for each measured step, step 0 included


def fit(
    task: Task, policy: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, measure_every: int,
    stop_at_bound: float = 0.0, certified: bool = True,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Outcome:  # fmt: skip
    """Train `policy` on the task's rankings for at most `steps` full-batch steps.

    Args:
        policy: called, it gives its (X, Y) table of log-probabilities.
        optimizer, scheduler: over the policy's parameters.
        measure_every: steps between two measurements; the first few steps are measured more densely.
        stop_at_bound: end early once the certificate promises this many nats everywhere.
        certified: False for objectives that are no Plackett-Luce likelihood, such as IPO; no bound then.
    Returns: Outcome, its last record that of the final policy.
    Raises: RuntimeError: the policy does not start at the reference.
    """
    reference = task.ref_logps.to(next(policy.parameters()).dtype)
    training = task.rankings._replace(weight=task.rankings.weight.to(reference.dtype))

    def step_objective(batch: Rankings) -> tuple[Tensor, dict[str, Tensor]]:
        loss, weight = task.objective(policy(), reference, batch, beta=task.beta)
        return loss, {"dpo/gradient_weight": weight}

    started = time.perf_counter()
    logps, bound, measured = _measured(policy, task, certified)
    if max_distance(logps, task.ref_logps) > 1e-6:  # else the first loss is not log 2: the wrong reference
        raise RuntimeError(f"{task.name}: training must start at the reference policy.")
    records = [{"step": 0, **measured}]
    stream = train(step_objective, optimizer, itertools.repeat(training, steps), scheduler=scheduler)
    # disable=None: no bar where the output is a file, so that logs stay readable
    for record in tqdm(stream, total=steps, desc=task.name, unit="step", leave=False, disable=None):
        if record["step"] % measure_every == 0 or record["step"] in (1, 2, 3, 5, 10, 20, steps):
            logps, bound, measured = _measured(policy, task, certified)
            records.append({**record, **measured})
            if bound.max() <= stop_at_bound:
                break
    seconds = time.perf_counter() - started
    return Outcome(
        **vars(task.to("cpu")), logps=logps.cpu(), logp_bound=bound.cpu(), seconds=seconds, records=records
    )


def fit_table(task: Task, device: str, *, certified: bool = True, **options: Any) -> Outcome:
    """`fit` a table of logits, from the reference, by gradient descent with momentum.

    Args: a task on the CPU, its rankings with any weights; options of `fit`.
    """
    task = replace(task, rankings=task.rankings.normalised_by_prompt()).to(device)
    policy = TabularPolicy(task.ref_logps)
    learning_rate = safe_learning_rate(task.rankings, beta=task.beta if certified else None)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    return fit(task, policy, optimizer, certified=certified, **options)


def _measured(policy: nn.Module, task: Task, certified: bool) -> tuple[Tensor, Tensor, Record]:
    """Its table (X, Y), the bound of each prompt (X,), inf where none holds, and what is recorded: the worst
    prompt's distance to the target, means over prompts for the frontier."""
    logps = float64_table(policy)
    with torch.no_grad():
        loss, weight = task.objective(logps, task.ref_logps, task.rankings, beta=task.beta)
    bound = torch.full_like(logps[:, 0], math.inf)
    if certified:
        bound = certify(logps, task.ref_logps, task.rankings, beta=task.beta).logp_bound
    record = {
        "loss": loss.item(),
        "dpo/gradient_weight": weight.item(),
        "distance/bound": bound.max().item(),
        "distance/max_logp": max_distance(logps, task.target_logps),
        "kl/policy_target": kl_divergence(logps, task.target_logps).max().item(),
        "kl/policy_reference": kl_divergence(logps, task.ref_logps).mean().item(),
        "reward": expected_reward(logps, task.rewards).item(),
    }
    return logps, bound, record


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
