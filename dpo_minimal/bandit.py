"""The toy world: prompts x completions with a known reward, and the objectives of a policy on it.

A policy here is anything whose call returns the (X, Y) table of log pi(y|x): a table of logits, or a GPT
whose completions are all enumerated (policy.py). Data are `Rankings`: with exact probabilities as weights
an objective below is the *population* loss, with counts it is the loss of finite data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .closed_form import kl_divergence
from .losses import Loss, PreferenceLoss, dpo_loss, plackett_luce_preference_loss
from .preferences import Rankings
from .validation import (
    InputError,
    check_count,
    check_finite,
    check_log_distribution,
    check_positive,
    check_same_shape,
)


@dataclass(frozen=True)
class Bandit:
    """Prompts, completions, a reference policy and a reward [D1.1].

    Fields:
        ref_logps: (X, Y) log pi_ref(y|x); -inf where a prompt has fewer than Y completions.
        rewards: (X, Y) r(x, y), finite (0 where there is no completion).
        prompts, completions: names for people, X of them and up to Y for each prompt.
    """

    ref_logps: Tensor
    rewards: Tensor
    prompts: tuple[str, ...]
    completions: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        check_same_shape(ref_logps=self.ref_logps, rewards=self.rewards)
        if self.ref_logps.dim() != 2:
            raise InputError(f"a bandit's tables must have shape (X, Y), got {tuple(self.ref_logps.shape)}.")
        check_finite(rewards=self.rewards)
        check_log_distribution(ref_logps=self.ref_logps)

    @property
    def exists(self) -> Tensor:
        """(X, Y) True where the prompt has that completion."""
        return self.ref_logps > -math.inf


def random_bandit(
    num_prompts: int,
    num_completions: int,
    *,
    reward_scale: float = 1.0,
    reference_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Bandit:
    """A random world in float64: rewards N(0, reward_scale^2), reference softmax of N(0, reference_scale^2)
    [D1.2].

    Args: sizes >= 1 and >= 2; scales > 0; generator for reproducible draws. Raises InputError.
    """
    check_count("num_prompts", num_prompts)
    check_count("num_completions", num_completions, minimum=2)
    check_positive("reward_scale", reward_scale)
    check_positive("reference_scale", reference_scale)
    shape = (num_prompts, num_completions)
    rewards = reward_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = reference_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    names = tuple(f"y{y}" for y in range(num_completions))
    return Bandit(
        ref_logps=scores.log_softmax(-1),
        rewards=rewards,
        prompts=tuple(f"x{x}" for x in range(num_prompts)),
        completions=(names,) * num_prompts,
    )


class TabularPolicy(nn.Module):
    """One number for each prompt and completion, started at the reference: pi = softmax(theta) [D1.3]."""

    def __init__(self, ref_logps: Tensor):
        super().__init__()
        self.theta = nn.Parameter(ref_logps.clone())

    def forward(self) -> Tensor:
        """(X, Y) log pi(y|x); completions that do not exist stay at -inf."""
        return self.theta.log_softmax(-1)


def loss_on_table(
    loss: Loss | Callable[..., PreferenceLoss],
    logps: Tensor,
    ref_logps: Tensor,
    rankings: Rankings,
    *,
    lengths: Tensor | None = None,
    **options: float,
) -> PreferenceLoss:
    """Any loss on every comparison (ranking) at once, (E,) each [D12.1].

    Args:
        loss: `dpo_loss`, `simpo_loss`, ..., a record, or a function of your own: what it reads is told by the
            names of its parameters, which are those of `losses.READS`. Options are its options.
        logps, ref_logps: (X, Y) tables; the reference is not read by losses without one.
        lengths: (Y,) or (X, Y) tokens of each completion, for losses that average; None for one each.
    Raises:
        InputError: as the loss does; an unknown parameter; unequal weights for a loss that reads its batch.
    """

    def token_counts() -> Tensor:
        return rankings.gather(torch.ones_like(logps) if lengths is None else lengths.expand(logps.shape))

    record = loss if isinstance(loss, Loss) else Loss.of(loss)
    if record.reads_batch and rankings.weight.unique().numel() > 1:
        raise InputError(f"{record.name} takes all rows of a batch alike; give rankings of one weight.")
    tables = {
        "policy": lambda: rankings.gather(logps),
        "reference": lambda: rankings.gather(ref_logps),
        "lengths": token_counts,
        "kl_estimate": lambda: kl_divergence(logps.detach(), ref_logps)[rankings.prompt],  # exact here
    }
    return record.on(tables, options)


def mean_on_table(loss, logps: Tensor, ref_logps: Tensor, rankings: Rankings, **options):
    """The expected loss over all comparisons, population or data alike: sum of weight * loss [D4.4].

    Args: as `loss_on_table`. Returns (scalar loss, scalar mean gradient weight, detached).
    """
    out = loss_on_table(loss, logps, ref_logps, rankings, **options)
    weight = rankings.weight.to(out.losses.dtype)
    return weight @ out.losses, weight @ out.gradient_weights


def dpo_objective(logps: Tensor, ref_logps: Tensor, rankings: Rankings, *, beta: float):
    """`mean_on_table` of `dpo_loss` (Eq. 7) [D4.4]."""
    return mean_on_table(dpo_loss, logps, ref_logps, rankings, beta=beta)


def plackett_luce_objective(logps: Tensor, ref_logps: Tensor, rankings: Rankings, *, beta: float):
    """`mean_on_table` of the Plackett-Luce DPO loss (Eq. 20) [D8.3]; the weight is the best answer's."""
    return mean_on_table(plackett_luce_preference_loss, logps, ref_logps, rankings, beta=beta)


def safe_learning_rate(rankings: Rankings, *, beta: float | None) -> float:
    """A step of gradient descent on a `TabularPolicy` that never raises the loss [D5.2, D12.1].

    Per unit of weight a completion takes part in, the Hessian's largest eigenvalue is at most beta^2 / 2
    for the (Plackett-Luce) DPO loss, by Gershgorin's circles, and 4 for IPO's; the step is its inverse.
    The natural step thus grows as 1 / beta^2: with a fixed one, a small beta looks broken.

    Args:
        rankings: the data, with the weights of the objective.
        beta: that of the DPO objective; None for IPO, whose curvature does not depend on it.
    """
    K = rankings.order.shape[-1]
    stages = torch.arange(1, K + 1, device=rankings.order.device).clamp(max=K - 1)  # choices each rank is in
    index = (rankings.prompt.unsqueeze(-1), rankings.order)
    shape = [int(i.max()) + 1 for i in index]
    share = rankings.weight.new_zeros(shape).index_put(
        index, rankings.weight.unsqueeze(-1) * stages, accumulate=True
    )
    curvature = 4.0 if beta is None else beta**2 / 2
    return 1 / (curvature * share.max().item())
