"""What is true: the optimum of the KL-regularised objective and its relatives, exactly, on finite tables.

Tables have the completions last: `(..., Y)` holds one distribution over Y completions for each prompt.
Everything is differentiable, in any float dtype, in nats. A reference may give a completion probability
zero (log-probability -inf): the optimum then gives it zero too, which is how tables whose prompts have
different numbers of completions are padded.

Tags such as [D3.4] point into derivations.md; equation numbers are those of Rafailov et al. (2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .validation import (
    InputError,
    check_count,
    check_finite,
    check_log_distribution,
    check_positive,
    check_same_shape,
    widen,
)


def _check_world(ref_logps: Tensor, rewards: Tensor) -> None:
    check_same_shape(ref_logps=ref_logps, rewards=rewards)
    check_finite(rewards=rewards)
    check_log_distribution(ref_logps=ref_logps)


def _tilt(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log (pi_ref exp(r / beta)), checked."""
    _check_world(ref_logps, rewards)
    check_positive("beta", beta)
    tilt = rewards / beta
    if not torch.isfinite(tilt.detach()).all():
        raise InputError(f"beta = {float(beta):g} is too small for these rewards: r / beta overflows.")
    return ref_logps + tilt


def log_partition(ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta), the normaliser of the optimum (Eq. 4) [D3.3].

    Args:
        ref_logps: (..., Y) log pi_ref, nats.
        rewards: (..., Y) r(x, y).
        beta: strength of the KL penalty, > 0, in units of reward per nat.
    Returns:
        (...,) log Z, nats.
    Raises:
        InputError: shapes differ, a reward is not finite, ref_logps is no distribution, beta <= 0.

    Example:
        >>> ref = torch.tensor([0.25, 0.75]).log()
        >>> log_partition(ref, torch.zeros(2), beta=0.5).abs().item() < 1e-6   # no reward: Z = 1
        True
    """
    return _tilt(ref_logps, rewards, beta).logsumexp(-1)


def soft_value(ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """beta log Z(x) = max over policies of `rlhf_objective` (Eq. 10, 15) [D7.1, D7.2].

    Args, Raises: as `log_partition`. Returns (...,) in units of reward.
    """
    return beta * log_partition(ref_logps, rewards, beta=beta)


def optimal_logps(ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """log pi*(y|x) with pi* = pi_ref exp(r / beta) / Z, the unique maximiser of Eq. 3 (Eq. 4) [D3.4].

    Args, Raises: as `log_partition`. Returns (..., Y) log-probabilities, nats.

    Example:
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> rewards = torch.tensor([0.0, math.log(3)])
        >>> optimal_logps(ref, rewards, beta=1.0).exp()
        tensor([0.2500, 0.7500])
    """
    return _tilt(ref_logps, rewards, beta).log_softmax(-1)


def implicit_reward(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """beta log(pi / pi_ref): the reward whose optimum pi is, up to a constant for each prompt (Eq. 5) [D4.1].

    Args:
        logps, ref_logps: (..., Y) log-probabilities of the same completions, finite.
    Returns:
        (..., Y) in units of reward.
    Raises:
        InputError: shapes differ, an entry is not finite (the ratio is undefined off the support), beta <= 0.
    """
    check_finite(logps=logps, ref_logps=ref_logps)
    check_positive("beta", beta)
    return beta * (logps - ref_logps)


def canonical_reward(rewards: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """f(r) = r - beta log Z: the one member of r's equivalence class whose Z is 1 (Eq. 8, 9) [D6.4].

    Args, Raises: as `log_partition` (note the order: what is projected comes first). Returns (..., Y).
    """
    return rewards - soft_value(ref_logps, rewards, beta=beta).unsqueeze(-1)


def kl_divergence(logps: Tensor, other_logps: Tensor) -> Tensor:
    """KL(pi || pi') = sum_y pi log(pi / pi'), with 0 log 0 = 0; +inf where pi' misses support [D3.1].

    Evaluated as sum_y pi (d + e^-d - 1) with d = log(pi / pi'), which is the same number because both
    sum to one, but has no negative terms: close policies keep full relative accuracy where the plain sum
    would return rounding noise of either sign.

    Args:
        logps, other_logps: (..., Y) log-probabilities; -inf allowed.
    Returns:
        (...,) nats, never negative.
    Raises:
        InputError: shapes differ or an argument is no distribution.

    Example:
        >>> point = torch.tensor([0.0, -torch.inf])
        >>> kl_divergence(point, torch.tensor([0.5, 0.5]).log())               # log 2
        tensor(0.6931)
    """
    check_same_shape(logps=logps, other_logps=other_logps)
    check_log_distribution(logps=logps, other_logps=other_logps)
    return _kl(logps, other_logps)


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    p, q = logps.exp(), other_logps.exp()
    ratio = torch.where(p > 0, logps - other_logps, 0)
    near = (p > 0) & (ratio.abs() < 1)  # far from it, the three-term sum neither cancels nor overflows
    small = torch.where(near, ratio, 0)
    return torch.where(near, p * (small + torch.expm1(-small)), p * ratio - p + q).sum(-1).clamp(min=0)


def rlhf_objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), exactly, by summation (Eq. 3, 11) [D3.2].

    Args:
        logps: (..., Y) log pi; -inf allowed.
        ref_logps, rewards, beta: as `log_partition`.
    Returns:
        (...,) in units of reward; at most `soft_value`, with equality only at `optimal_logps`.
    Raises:
        InputError: as `log_partition`, and where logps is no distribution.
    """
    check_same_shape(logps=logps, ref_logps=ref_logps, rewards=rewards)
    _check_world(ref_logps, rewards)
    check_positive("beta", beta)
    return (logps.exp() * rewards).sum(-1) - beta * kl_divergence(logps, ref_logps)


def best_of_n_logps(ref_logps: Tensor, rewards: Tensor, *, n: int) -> Tensor:
    """The distribution of the best of n draws from pi_ref, ties broken uniformly among tied draws [D10.3].

    With F(v) = P(r <= v) and p(v) = P(r = v) under the reference,
    pi_n(y) = pi_ref(y) / p(r_y) * (F(r_y)^n - (F(r_y) - p(r_y))^n).

    Args:
        ref_logps, rewards: (..., Y).
        n: number of draws, >= 1; n = 1 gives the reference back.
    Returns:
        (..., Y) log-probabilities. Time and memory grow as Y^2.
    Raises:
        InputError: as `log_partition`; n not a positive integer.
    """
    _check_world(ref_logps, rewards)
    check_count("n", n)
    dtype, ref_logps = ref_logps.dtype, widen(ref_logps).log_softmax(-1)  # n-th powers magnify rounding
    absent = ref_logps == -math.inf  # tied with the best: without probability that changes nothing
    rewards = torch.where(absent, rewards.masked_fill(absent, -math.inf).amax(-1, keepdim=True), rewards)
    mine, other = rewards.unsqueeze(-1), rewards.unsqueeze(-2)
    everyone = ref_logps.unsqueeze(-2).expand(*ref_logps.shape, ref_logps.shape[-1])
    log_cdf = everyone.masked_fill(other > mine, -math.inf).logsumexp(-1)
    log_tied = everyone.masked_fill(other != mine, -math.inf).logsumexp(-1)
    worst = mine.squeeze(-1) == rewards.masked_fill(absent, math.inf).amin(-1, keepdim=True)  # F - p = 0
    log_below = torch.log1p(-torch.where(worst, -1, log_tied - log_cdf).exp())  # log (F - p) / F
    rise = torch.where(worst, 0, log1mexp(n * log_below))
    logps = (ref_logps - log_tied + n * log_cdf + rise).masked_fill(absent, -math.inf)
    return logps.log_softmax(-1).to(dtype)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends [D12.5].

    Each branch sees only its own half, so that the gradient is finite too.
    """
    near = x > -math.log(2)
    close, far = torch.where(near, x, -1), torch.where(near, -1, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def reward_kl_frontier(
    ref_logps: Tensor, rewards: Tensor, betas: Iterable[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """The best reachable trade-off: KL(pi*_beta || pi_ref) and E[r] under pi*_beta for each beta
    [D10.1, D10.2].

    No policy has more reward at the same KL; along the curve d reward / d KL = beta.

    Args:
        ref_logps, rewards: (..., Y).
        betas: positive numbers: a list, an array or a one-dimensional tensor.
    Returns:
        (kl, reward), each (len(betas), ...), in nats and units of reward.
    Raises:
        InputError: as `log_partition`, for any of the betas.
    """
    _check_world(ref_logps, rewards)
    if (isinstance(betas, Tensor) and betas.dim() != 1) or not isinstance(betas, Iterable):
        raise InputError(f"betas must be a list or a one-dimensional tensor of numbers, got {betas!r}.")
    betas = betas if isinstance(betas, Tensor) else list(betas)
    if len(betas) == 0:
        raise InputError("betas must hold at least one number.")
    for beta in betas:
        check_positive("betas", beta)
    betas = torch.as_tensor(betas, dtype=rewards.dtype, device=rewards.device)
    tilts = rewards / betas.view(-1, *[1] * rewards.dim())
    logps = (ref_logps + tilts).log_softmax(-1)
    return kl_divergence(logps, ref_logps.expand_as(logps)), (logps.exp() * rewards).sum(-1)


def next_token_logps(completion_logps: Tensor, completions: Tensor, lengths: Tensor) -> Tensor:
    """The per-token conditionals of a distribution over whole completions, for pi* above all [D9.2].

    log pi(y_t | y_<t) = log P(first t + 1 tokens) - log P(first t tokens), where the probability of a
    prefix is the sum over the completions that begin with it. For pi* this is the soft-Q policy: the
    reference's conditional tilted by the rise in soft value.

    Args:
        completion_logps: (..., Y) log-probabilities of a prefix-free set of completions, summing to one.
        completions: (Y, T) token ids; what lies beyond a completion's length is ignored.
        lengths: (Y,) number of tokens of each completion, 1 to T.
    Returns:
        (..., Y, T): entry [..., y, t] is the log-probability of completion y's token t given its prefix,
        zero beyond its length. Summed over t it is completion_logps again.
    Raises:
        InputError: completion_logps is no distribution with full support, the shapes do not fit together,
            or the completions are not prefix-free.
    """
    check_finite(completion_logps=completion_logps)
    check_log_distribution(completion_logps=completion_logps)
    Y = completion_logps.shape[-1]
    if completions.dim() != 2 or len(completions) != Y or lengths.shape != (Y,):
        raise InputError(
            f"completions must have shape ({Y}, T) and lengths ({Y},), "
            f"got {tuple(completions.shape)} and {tuple(lengths.shape)}."
        )
    T = completions.shape[1]
    if (lengths < 1).any() or (lengths > T).any():
        raise InputError(f"lengths must lie between 1 and {T}.")
    columns = []
    # Each completion's group: those that share its first t tokens.
    prefix = torch.zeros(Y, dtype=torch.long, device=completions.device)
    before = _logsumexp_within_groups(completion_logps, prefix)
    for t in range(T):
        token = torch.where(lengths > t, completions[:, t], -1)
        _, prefix = torch.unique(torch.stack([prefix, token], 1), dim=0, return_inverse=True)
        after = _logsumexp_within_groups(completion_logps, prefix)
        columns.append(torch.where(lengths > t, after - before, 0))
        before = after
        ended = lengths == t + 1  # no other completion may begin with all of its tokens
        if not torch.equal(after.detach()[..., ended], completion_logps.detach()[..., ended]):
            raise InputError("completions must be prefix-free, but one of them begins or repeats another.")
    return torch.stack(columns, -1)


def _logsumexp_within_groups(values: Tensor, group: Tensor) -> Tensor:
    """(..., Y) values and (Y,) group numbers -> (..., Y): the log-sum-exp of each entry's own group."""
    index = group.expand_as(values)
    shape = (*values.shape[:-1], int(group.max()) + 1)
    top = values.new_full(shape, -math.inf).scatter_reduce(-1, index, values.detach(), "amax")
    total = values.new_zeros(shape).scatter_add(-1, index, (values - top.gather(-1, index)).exp())
    return (total.log() + top).gather(-1, index)
