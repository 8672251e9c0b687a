"""A policy judged by its own samples: their divergence from a reference, their reward, and win rates, each
with its uncertainty; over prompts, or over prompts and trainings with several seeds.

A loss on pairs says how well the policy orders given completions; only its own samples say what it writes.

But: sampling is generation.py's, scoring policy.py's; here they are put together.

Shapes: N prompts, one sample each; S seeds crossed with P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..generation import generate, rows_at_once
from ..model import GPT
from ..policy import shared_prompt_batch, shared_prompt_logps
from ..text.tokenizer import Tokenizer
from ..validation import InputError, check_finite, check_log_distribution, check_same_shape


class Mean(NamedTuple):
    """A mean over independent draws and its standard error [D7.6]."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:z.2f}" + (f" ± {self.error:.2f}" if math.isfinite(self.error) else "")


def mean_of(values: Tensor) -> Mean:
    """(N,) -> mean and standard error, which is NaN for a single draw [D7.6]."""
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(values.mean().item(), error)


class Interval(NamedTuple):
    """A mean, or a share of wins with ties being half, and its 95 % interval [D10.5]."""

    value: float
    low: float
    high: float


# Student's t, 97.5 %: degrees of freedom and quantile; between them linear in 1 / degrees, which is a little
# too wide.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 30: 2.042,
      60: 2.000, math.inf: 1.960}  # fmt: skip


def student_95(degrees: float) -> float:
    """How many standard errors make a 95 % interval [D10.5].

    >>> student_95(2), round(student_95(1e9), 2)
    (4.303, 1.96)
    """
    places = [1 / d for d in reversed(_T)]
    return float(np.interp(1 / degrees, places, list(reversed(_T.values()))))


def crossed_interval(values: Tensor, *, within: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean of (S, P) measurements, seeds crossed with prompts, and its 95 % interval [D10.5].

    Seeds share the prompts, so the mean is uncertain in two ways: other prompts, and other trainings. With
    mean squares MS_s of seeds, MS_p of prompts and MS_e of the rest, the variance of the mean is
    (MS_s + MS_p - MS_e) / (S P), taken as no less than either of the first two alone would make it; its
    degrees of freedom are Satterthwaite's. With one seed only the prompts count; with two or three the part
    of the seeds is a rough estimate, which Student's t answers for with width.

    Args: within: the interval is cut there; (0, 1) for shares.
    """
    values = values.double()
    S, P = values.shape
    mean = values.mean().item()
    if P < 2:
        return Interval(mean, *within)
    by_prompt = S * values.mean(0).var().item()
    if S == 1:
        variance, degrees = by_prompt / P, P - 1.0
    else:
        by_seed = P * values.mean(1).var().item()
        rest = values - values.mean(0) - values.mean(1, keepdim=True) + mean
        by_rest = (rest**2).sum().item() / ((S - 1) * (P - 1))
        total = max(by_seed + by_prompt - by_rest, by_seed, by_prompt)
        variance = total / (S * P)
        squares = by_seed**2 / (S - 1) + by_prompt**2 / (P - 1) + by_rest**2 / ((S - 1) * (P - 1))
        degrees = max(1.0, total**2 / squares) if squares > 0 else math.inf
    half = student_95(degrees) * math.sqrt(variance)
    return Interval(mean, max(within[0], mean - half), min(within[1], mean + half))


class Samples(NamedTuple):
    """One sample of each of N prompts [D7.6]."""

    prompts: list[str]
    texts: list[str]
    ended: Tensor  # (N,) whether it ended by itself, with end-of-text
    lengths: Tensor  # (N,) tokens, end-of-text included
    log_ratios: Tensor  # (N,) log pi(y|x) - log pi_ref(y|x), nats; their mean estimates KL(pi || pi_ref)
    rewards: Tensor | None  # (N,) true ones, or None where they are unknown


def sample(
    model: GPT,
    reference: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    seed: int,
    reward: Callable[[str], float] | None = None,
) -> Samples:
    """Sample each prompt once at temperature 1, and compare with the reference [D7.6].

    Args:
        model, reference: on one device; the reference may be the model itself.
        prompts: N texts, or their token ids; an empty one starts from end-of-text. A prompt too long for the
            context loses its left end, as in training.
        max_new_tokens: where a sample is cut.
        reward: completion text -> true reward.
    Raises InputError: no prompts, or a context without place for one.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    context = model.config.block_size
    if (longest := context - max_new_tokens) < 1:
        raise InputError(f"max_new_tokens must be below the context of {context}, got {max_new_tokens}.")
    rows = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = [(row or [tokenizer.eot])[-longest:] for row in rows]
    options = {"max_new_tokens": max_new_tokens, "eos": tokenizer.eot, "generator": generator}
    completions, logps, ref_logps = draw(model, reference, ids, **options)
    texts = [tokenizer.decode(y) for y in completions]
    return Samples(
        [x if isinstance(x, str) else tokenizer.decode(x) for x in prompts],
        texts,
        torch.tensor([y[-1] == tokenizer.eot for y in completions]),
        torch.tensor([len(y) for y in completions]),
        (logps - ref_logps).cpu(),
        None if reward is None else torch.tensor([reward(text) for text in texts]),
    )


def draw(
    model: GPT, reference: GPT, prompts: Sequence[list[int]], *, max_new_tokens: int, **options: Any
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Completions of N prompts, all as token ids, with (N,) log pi and log pi_ref, nats [D7.6].

    Args: options of `generate`; the log-probabilities are those at temperature 1, whatever it draws at.
    """
    completions = generate(model, prompts, max_new_tokens=max_new_tokens, **options)
    together, logps = rows_at_once(model, max(map(len, prompts)) + max_new_tokens), []
    for start in range(0, len(prompts), together):
        some = slice(start, start + together)
        batch = shared_prompt_batch(prompts[some], [[y] for y in completions[some]])
        batch = batch.to(model.wte.weight.device)
        with torch.no_grad():
            logps.append([shared_prompt_logps(gpt, batch)[:, 0] for gpt in (model, reference)])
    own, theirs = (torch.cat(parts) for parts in zip(*logps))
    return completions, own, theirs


# ---------------------------------------------------------------------------------------------- win rates


NORMAL_95 = 1.959964  # 95 % of a normal distribution lie within so many deviations


def win_rate(first_rewards: Tensor, second_rewards: Tensor) -> Interval:
    """How often the first of two completions has the higher reward, a tie being half a win [D10.5].

    With win, loss and tie of unknown probabilities w, l and t, the win rate is (1 + w - l) / 2. The interval
    holds every value of it that a score test at 5 % does not reject, the share of ties being the likeliest
    one under that value. It stays within [0, 1], has a width where all comparisons end alike, and is
    Wilson's where there are no ties.

    Args: (N,) rewards of N independent comparisons, finite.
    Source: Tango (1998), "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design"; its two proportions differ by w - l.

    Example:
        >>> rate = win_rate(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.0]))
        >>> [round(share, 3) for share in rate]  # it, and its interval
        [0.875, 0.446, 0.977]
    """
    check_finite(first_rewards=first_rewards, second_rewards=second_rewards)
    if first_rewards.dim() != 1:
        raise InputError(f"rewards must have shape (N,), got {tuple(first_rewards.shape)}.")
    wins = (first_rewards > second_rewards).sum().item()
    losses = (first_rewards < second_rewards).sum().item()
    count = len(first_rewards)
    lead = (wins - losses) / count
    low = -_furthest_lead(losses, wins, count)  # the same question with the roles exchanged
    high = _furthest_lead(wins, losses, count)
    return Interval((1 + lead) / 2, (1 + low) / 2, (1 + high) / 2)


def _furthest_lead(wins: int, losses: int, count: int) -> float:
    """The highest w - l that the score test does not reject, by bisection: the statistic falls in w - l."""
    accepted, rejected = (wins - losses) / count, 1.0
    for _ in range(50):
        lead = (accepted + rejected) / 2
        # The likeliest l under w = l + lead: the positive root of 2 N l^2 + b l - losses lead (1 - lead).
        b = (2 * count - wins + losses) * lead - wins - losses
        l = (math.sqrt(b * b + 8 * count * losses * lead * (1 - lead)) - b) / (4 * count)
        deviation = math.sqrt(max(0.0, count * (2 * l + lead - lead * lead)))
        if count * lead - (wins - losses) <= NORMAL_95 * deviation:
            accepted = lead
        else:
            rejected = lead
    return accepted


def win_interval(rewards: Tensor, opponents: Tensor) -> Interval:
    """How often rewards (S, P) are above the opponents' (P,), a tie being half a win [D10.5]."""
    if len(rewards) == 1:
        return win_rate(rewards[0], opponents)
    return crossed_interval((1 + (rewards - opponents).sign()) / 2, within=(0.0, 1.0))


def exact_win_rate(logps: Tensor, other_logps: Tensor, rewards: Tensor) -> Tensor:
    """P(r(y) > r(y')) + P(r(y) = r(y')) / 2 for y from one policy and y' from another [D10.5].

    Args: three (..., Y) tables; both policies normalised, log 0 = -inf allowed; rewards finite.
    Returns: (...,); the two ways round sum to 1.

    Example:
        >>> logps = torch.tensor([0.5, 0.25, 0.25]).log()
        >>> exact_win_rate(logps, logps, torch.tensor([1.0, 2.0, 2.0]))
        tensor(0.5000)
    """
    check_same_shape(logps=logps, other_logps=other_logps, rewards=rewards)
    check_log_distribution(logps=logps, other_logps=other_logps)
    check_finite(rewards=rewards)
    ordered, order = rewards.sort(-1)
    mass = other_logps.exp().gather(-1, order).cumsum(-1)
    mass = torch.cat([torch.zeros_like(mass[..., :1]), mass], -1)  # (..., Y + 1): of the k lowest rewards
    beaten = [
        mass.gather(-1, torch.searchsorted(ordered, rewards.contiguous(), right=r)) for r in (False, True)
    ]
    return (logps.exp() * (beaten[0] + beaten[1]) / 2).sum(-1)
