"""What DPO is compared with, on tables: the same optimum by reinforcement learning, and other aims.

A reward model followed by the closed form needs no code of its own: it is `optimal_logps` of the rewards that
`maximum_likelihood` estimates. A reward model made of a GPT is in reward_model.py, PPO for a GPT in ppo.py.

Shapes: X prompts, Y completions, n samples of each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..closed_form import _check_world, _kl, kl_divergence
from ..preferences import Rankings
from ..train import Record
from ..validation import InputError, check_count, check_finite, check_log_distribution, check_positive
from ..zoo.unlikelihood import unlikelihood_logps

# ------------------------------------------------------------------------- the gradient of the objective


def penalised_rewards(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """r - beta log(pi / pi_ref): what reinforcement learning maximises the mean of (Eq. 3) [D7.2].

    It is the same for all completions, namely beta log Z, exactly where pi = pi*.

    Args: logps, ref_logps, rewards of one shape, finite; beta > 0. Returns that shape, in units of reward.
    """
    check_finite(logps=logps, ref_logps=ref_logps, rewards=rewards)
    check_positive("beta", beta)
    return rewards - beta * (logps - ref_logps)


def policy_gradient(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """The gradient of J (Eq. 3) in the logits of a table: pi (R - E_pi R), R penalised [D7.3].

    Args: (..., Y) tables, finite; logps a distribution; beta > 0. Returns (..., Y); it sums to zero.
    """
    penalised = penalised_rewards(logps, ref_logps, rewards, beta=beta)  # refuses what is no tensor
    check_log_distribution(logps=logps)
    return logps.exp() * (penalised - (logps.exp() * penalised).sum(-1, keepdim=True))


def natural_gradient_step(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, learning_rate: float
) -> Tensor:
    """One step of natural gradient ascent on J: log pi + eta R, normalised [D7.5].

    Implicit rewards approach the rewards as (1 - eta beta)^t: eta = 1 / beta reaches pi* in one step.

    Args: as `policy_gradient`; learning_rate > 0. Returns (..., Y) log-probabilities.
    """
    check_positive("learning_rate", learning_rate)
    penalised = penalised_rewards(logps, ref_logps, rewards, beta=beta)
    check_log_distribution(logps=logps)
    return (logps + learning_rate * penalised).log_softmax(-1)


def reinforce_variance(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, baseline: Tensor, *, beta: float
) -> Tensor:
    """Trace of the covariance of REINFORCE's estimate (R(y) - b)(e_y - pi) from one sample y [D7.4].

    The baseline b does not change the mean; the variance is a parabola in b, least at `best_baseline`. At pi*
    the soft value, beta log Z, makes it zero; elsewhere that may be worse than no baseline.

    Args: as `policy_gradient`; baseline (...,). Returns (...,) in squared units of reward.
    """
    if baseline.shape != logps.shape[:-1]:
        raise InputError(f"baseline must have shape {tuple(logps.shape[:-1])}, got {tuple(baseline.shape)}.")
    length = _squared_step(logps)
    advantages = penalised_rewards(logps, ref_logps, rewards, beta=beta) - baseline.unsqueeze(-1)
    gradient = policy_gradient(logps, ref_logps, rewards, beta=beta)
    return (logps.exp() * advantages**2 * length).sum(-1) - gradient.square().sum(-1)


def best_baseline(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """The baseline of least variance: the mean of R weighted by pi |e_y - pi|^2 [D7.4].

    Args: as `policy_gradient`. Returns (...,).
    """
    weight = logps.exp() * _squared_step(logps)
    penalised = penalised_rewards(logps, ref_logps, rewards, beta=beta)
    return (weight * penalised).sum(-1) / weight.sum(-1)


def _squared_step(logps: Tensor) -> Tensor:
    """|e_y - pi|^2 for each y: (..., Y)."""
    p = logps.exp()
    return 1 - 2 * p + p.square().sum(-1, keepdim=True)


def kl_estimates(logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2, k3 of samples y ~ pi: log ratio, half its square, and pi_ref/pi - 1 + log ratio [D7.6].

    k1 and k3 have mean KL(pi || pi_ref), k3 is never negative. Their derivatives are another matter: that of
    k1 has mean zero, only k2's has that of the divergence.

    Args: log-probabilities of the samples under both, of one shape. Returns three tensors of that shape.
    """
    check_finite(logps=logps, ref_logps=ref_logps)
    ratio = logps - ref_logps
    return ratio, ratio.square() / 2, torch.expm1(-ratio) + ratio


# ----------------------------------------------------------------------------------------------------- PPO


def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """PPO's loss of each sample: -min(rho A, clip(rho, 1 - c, 1 + c) A), rho = pi / pi_old [D7.7].

    Where pi = pi_old its gradient is the policy gradient's, -A grad log pi; it vanishes once the ratio has
    gone further than c in the direction that the advantage asks for.

    Args:
        logps, old_logps: log-probabilities of actions under the policy and under the one that drew them.
        advantages: of the same shape; no gradient flows through them nor through old_logps.
        clip: c, > 0.
    Returns: losses of that shape.
    Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms".
    """
    check_finite(logps=logps, old_logps=old_logps, advantages=advantages)
    check_positive("clip", clip)
    ratio, advantages = (logps - old_logps.detach()).exp(), advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@dataclass
class AdaptiveKL:
    """The coefficient of the KL penalty: fixed, or adapted until the divergence meets a target [D7.7].

    coefficient *= exp(rate * clip(KL / target - 1, -1, 1)) after each iteration, as in Ziegler et al.
    (2019), who write 1 + rate * error, with a smaller clip. Where it converges, the policy maximises Eq. 3
    for beta = coefficient, and so is a point of the frontier.

    Fields: coefficient > 0, the start; target in nats, None to keep the coefficient; rate of adaptation.
    """

    coefficient: float
    target: float | None = None
    rate: float = 0.1

    def __post_init__(self) -> None:
        check_positive("coefficient", self.coefficient)
        check_positive("rate", self.rate)
        if self.target is not None:
            check_positive("target", self.target)

    def update(self, kl: float) -> None:
        """Take in the divergence of the last iteration, nats."""
        if not math.isfinite(kl):
            raise InputError(f"the divergence is {kl}; lower the learning rate.")
        if self.target is not None:
            error = min(max(kl / self.target - 1, -1.0), 1.0)
            self.coefficient *= math.exp(self.rate * error)


def ppo(
    policy: nn.Module,
    ref_logps: Tensor,
    rewards: Tensor,
    optimizer: torch.optim.Optimizer,
    controller: AdaptiveKL,
    *,
    iterations: int,
    samples: int,
    epochs: int = 4,
    clip: float = 0.2,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Record]:
    """PPO on a policy whose call returns its table; a completion is a single action [D7.7].

    Advantages are penalised rewards minus each prompt's running mean of them, i.e. a value function of the
    prompt. They are not divided by their deviation: that is zero at the optimum. With one epoch nothing is
    clipped: that is REINFORCE with a baseline.

    Args:
        policy: () -> (X, Y) log-probabilities; the optimizer has its parameters.
        ref_logps, rewards: (X, Y); rewards learned or true.
        controller: of the KL coefficient, updated with the exact divergence, a mean over prompts.
        iterations: rounds of sampling; samples: completions of each prompt and round; epochs: gradient steps
            on each round's samples; scheduler: stepped once an iteration.
    Yields: after each iteration's gradient steps a record of the policy before them: step, reward (of
        `rewards`, exact), kl/policy_reference (exact), kl/coefficient.
    Raises: InputError: an option out of range.
    """
    for name, count in (("iterations", iterations), ("samples", samples), ("epochs", epochs)):
        check_count(name, count)
    for step in range(1, iterations + 1):
        beta = controller.coefficient
        with torch.no_grad():
            old = policy()
            drawn = torch.multinomial(old.double().exp(), samples, replacement=True, generator=generator)
            old_logps, *others = (table.gather(-1, drawn) for table in (old, ref_logps, rewards))
            penalised = penalised_rewards(old_logps, *others, beta=beta)
            if step == 1:
                value = penalised.mean(-1)
            advantages = penalised - value.unsqueeze(-1)
            # After its use, because a value that has seen its own sample is biased.
            value = value + VALUE_RATE * (penalised.mean(-1) - value)
            kl = kl_divergence(old.double(), ref_logps.double()).mean().item()
            reward = (old.double().exp() * rewards).sum(-1).mean().item()
        for _ in range(epochs):
            optimizer.zero_grad(set_to_none=True)
            clipped_surrogate(policy().gather(-1, drawn), old_logps, advantages, clip=clip).mean().backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        controller.update(kl)
        yield {"step": step, "reward": reward, "kl/policy_reference": kl, "kl/coefficient": beta}


VALUE_RATE = 0.3  # of the running mean: forgets the policy of ten rounds ago


# --------------------------------------------------------------------------- fine-tuning on chosen ones


def preferred_ft_logps(rankings: Rankings, exists: Tensor) -> Tensor:
    """Where SFT on chosen completions ends: pi(y) = share of comparisons in which y was chosen [D10.4].

    Where both completions of a pair are drawn from the reference, maybe the same one twice, none more than
    doubles its probability. Where pairs must differ, as those of `reference_pairs`, rare ones may gain more.

    Args: rankings with K = 2; exists (X, Y). Returns (X, Y) log-probabilities, -inf where never chosen.
    Raises: InputError: a prompt without comparisons; K > 2.
    """
    return unlikelihood_logps(rankings, exists, alpha=0.0)


# ------------------------------------------------------------------------------------------- best of n


def best_of_n_reward(rewards: Tensor, *, n: int) -> Tensor:
    """The expected best of n, from m >= n independent draws: the mean over all their subsets of n [D10.3].

    Of m sorted draws the i-th is the best of C(i - 1, n - 1) of the C(m, n) subsets. So one set of draws
    gives an unbiased estimate for every n.

    Args: rewards (..., m) of draws from the reference; n in [1, m]. Returns (...,).
    """
    check_finite(rewards=rewards)
    check_count("n", n)
    m = rewards.shape[-1]
    if n > m:
        raise InputError(f"n must be at most the number of draws, {m}, got {n}.")
    i = torch.arange(1, m + 1, dtype=torch.float64, device=rewards.device)
    log_choose = torch.lgamma(i) - torch.lgamma((i - n + 1).clamp(min=1))  # C(i-1, n-1), times (n-1)!
    weight = torch.where(i >= n, log_choose, -math.inf).softmax(-1)
    return (rewards.double().sort(-1).values * weight).sum(-1).to(rewards.dtype)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1)/n nats: the most that KL(best of n || pi_ref) can be, reached as atoms vanish [D10.3].

    Source: Beirami et al. (2024), "Theoretical guarantees on the best-of-n alignment policy".
    """
    check_count("n", n)
    return math.log(n) - (n - 1) / n


# ------------------------------------------------------------------------------ how far below the best


class FrontierGap(NamedTuple):
    """Where a policy stands, and how far below the best possible [D10.1].

    Fields, each (...,), means over prompts:
        kl: KL(pi || pi_ref), nats.  reward: E_pi[r].
        reward_gap: reward that the frontier has at this KL, less the policy's.
        kl_gap: this KL, less the least at which the frontier has the policy's reward, nats.
    No gap is below 0 by more than rounding; very near the reference reward_gap may be by the root of it,
    because there the frontier rises like the root of the KL.
    """

    kl: Tensor
    reward: Tensor
    reward_gap: Tensor
    kl_gap: Tensor


def frontier_gap(logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> FrontierGap:
    """How far policies lie below the reward-KL frontier of a world of X prompts [D10.1].

    Prompts count alike, so the best mean reward at a given mean KL has one beta for all of them. That beta
    is found by bisection, once for the policy's KL and once for its reward; both are monotone in it. Beyond
    the KL of the best completions the frontier is flat.

    Args:
        logps: (..., X, Y) tables of any number of policies; -inf allowed.
        ref_logps, rewards: (X, Y).
    Returns:
        FrontierGap of (...,) tensors in float64.
    Raises:
        InputError: shapes do not fit, or a table is no distribution.
    """
    _check_world(ref_logps, rewards)
    found = getattr(logps, "shape", ())  # a list has none
    if found[-2:] != rewards.shape or rewards.dim() != 2:
        raise InputError(f"logps must be a tensor (..., X, Y), {tuple(rewards.shape)}; got {tuple(found)}.")
    logps, ref_logps, rewards = logps.double(), ref_logps.double(), rewards.double()
    absent = ref_logps == -math.inf  # as in `best_of_n_logps`: tied with the best, and without probability
    rewards = torch.where(absent, rewards.masked_fill(absent, -math.inf).amax(-1, keepdim=True), rewards)
    kl = kl_divergence(logps, ref_logps.expand_as(logps)).mean(-1)
    reward = (logps.exp() * rewards).sum(-1).mean(-1)
    at_kl = _frontier_where(ref_logps, rewards, lambda found_kl, _: found_kl <= kl, kl)
    at_reward = _frontier_where(ref_logps, rewards, lambda _, found: found <= reward, kl)
    below_start = reward <= (ref_logps.exp() * rewards).sum(-1).mean(-1)  # the reference has it at KL 0
    needed = torch.where(below_start, 0, at_reward[0])
    return FrontierGap(kl, reward, at_kl[1] - reward, kl - needed)


def _frontier_where(ref_logps: Tensor, rewards: Tensor, feasible, like: Tensor) -> tuple[Tensor, Tensor]:
    """(kl, reward) of the furthest point of the frontier with `feasible(kl, reward)`, each like `like`."""
    spread = (rewards.amax(-1) - rewards.amin(-1)).max().clamp(min=1e-300)
    tilt = rewards - rewards.amax(-1, keepdim=True)  # no overflow for small beta

    def point(log_beta: Tensor) -> tuple[Tensor, Tensor]:
        policy = (ref_logps + tilt / log_beta.exp()[..., None, None]).log_softmax(-1)
        kl = _kl(policy, ref_logps).mean(-1)
        return kl, (policy.exp() * rewards).sum(-1).mean(-1)

    low = torch.full_like(like, math.log(1e-14) + spread.log().item())  # beta so small: all on the best
    high = torch.full_like(like, math.log(1e9) + spread.log().item())  # so large: the reference
    for _ in range(60):  # 53 units of log beta, halved: to the last digit
        middle = (low + high) / 2
        fits = feasible(*point(middle))
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return point(high)
