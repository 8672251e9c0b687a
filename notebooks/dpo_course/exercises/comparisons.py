"""Notebook 8: what DPO is compared with."""

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import Exercise, log_distribution, vector

# ------------------------------------------------------------------------- 8.1 a point of the frontier


@st.composite
def small_world(draw):
    """One prompt's reference and rewards over Y completions, and beta."""
    Y = draw(st.integers(2, 4))
    rewards = draw(st.lists(st.integers(-3, 3), min_size=Y, max_size=Y))  # tenths make divergences tiny
    return {
        "ref_logps": draw(log_distribution(Y)),
        "rewards": torch.tensor(rewards, dtype=torch.float64),
        "beta": draw(st.sampled_from([1.0, 2.0, 0.5, 0.4, 3.0])),
    }


def slopes_of_log_partition(ref_logps, rewards, beta) -> tuple[Tensor, Tensor]:
    """KL = t A' - A and E[r] = A', with A(t) = log sum_y pi_ref(y) e^(t r) at t = 1 / beta, by autograd."""
    t = torch.tensor(1 / beta, dtype=torch.float64, requires_grad=True)
    A = (ref_logps + t * rewards).logsumexp(-1)
    (slope,) = torch.autograd.grad(A, t)
    return t.detach() * slope - A.detach(), slope


def _tilted(ref_logps, tilt):
    return (ref_logps + tilt).log_softmax(-1)


def _point(logps, ref_logps, rewards):
    return (logps.exp() * (logps - ref_logps)).sum(-1), logps.exp() @ rewards


def _backwards(ref_logps, rewards, beta):
    logps = _tilted(ref_logps, rewards / beta)
    return (ref_logps.exp() * (ref_logps - logps)).sum(-1), logps.exp() @ rewards


def _less_the_penalty(ref_logps, rewards, beta):
    kl, reward = _point(_tilted(ref_logps, rewards / beta), ref_logps, rewards)
    return kl, reward - beta * kl


def _times_beta(ref_logps, rewards, beta):
    kl, reward = _point(_tilted(ref_logps, rewards / beta), ref_logps, rewards)
    return beta * kl, reward


def _negative_entropy(ref_logps, rewards, beta):
    logps = _tilted(ref_logps, rewards / beta)
    return (logps.exp() * logps).sum(-1), logps.exp() @ rewards


def _reward_of_the_reference(ref_logps, rewards, beta):
    kl, _ = _point(_tilted(ref_logps, rewards / beta), ref_logps, rewards)
    return kl, ref_logps.exp() @ rewards


FRONTIER = Exercise(
    number="8.1",
    function="frontier_point",
    inputs=small_world(),
    expected=slopes_of_log_partition,
    source="derivatives of log Z in 1/β, by autograd",
    mistakes={
        "β multiplies where it should divide: π* is π_ref · exp(r/β) / Z": (
            lambda ref, r, beta: _point(_tilted(ref, r * beta), ref, r)
        ),
        "β is missing in π*": lambda ref, r, beta: _point(_tilted(ref, r), ref, r),
        "the reference is missing in π*: it is π_ref · exp(r/β) / Z": (
            lambda ref, r, beta: _point((r / beta).log_softmax(-1), ref, r)
        ),
        "the divergence is taken backwards: KL(π*‖π_ref) averages under π*": _backwards,
        "the reference is missing in the divergence: this is minus the entropy of π*": _negative_entropy,
        "the divergence is multiplied by β: the axis is KL itself": _times_beta,
        "the penalty β KL is taken off the reward: the axis is E[r] itself": _less_the_penalty,
        "this is the reward of the reference; the average is over π*": _reward_of_the_reference,
        "reward first, divergence second: the order is (kl, reward)": (
            lambda ref, r, beta: _point(_tilted(ref, r / beta), ref, r)[::-1]
        ),
    },
)


# ------------------------------------------------------------------------------------- 8.2 best of n


@st.composite
def draws_to_choose_from(draw):
    """One prompt's reference, rewards of which some may be equal, and a number of draws."""
    Y = draw(st.integers(2, 3))
    rewards = draw(st.lists(st.integers(0, 2), min_size=Y, max_size=Y))
    return {
        "ref_logps": draw(log_distribution(Y)),
        "rewards": torch.tensor(rewards, dtype=torch.float64),
        "n": draw(st.integers(1, 3)),
    }


def every_list_of_draws(ref_logps, rewards, n) -> Tensor:
    """All Y^n lists of draws, one after the other; the best of each shared among its tied draws."""
    chance, reward = [math.exp(number) for number in ref_logps.tolist()], rewards.tolist()
    total = [0.0] * len(chance)
    for drawn in itertools.product(range(len(chance)), repeat=n):
        best = max(reward[y] for y in drawn)
        winners = [y for y in drawn if reward[y] == best]
        for y in winners:
            total[y] += math.prod(chance[z] for z in drawn) / len(winners)
    return torch.tensor([math.log(share) for share in total], dtype=torch.float64)


def _levels(ref_logps, rewards):
    """F(r_y), the reference's probability of at most that reward, and p(r_y), of just that reward."""
    p = ref_logps.exp()
    at_most = (p * (rewards <= rewards[:, None])).sum(-1)
    return at_most, (p * (rewards == rewards[:, None])).sum(-1)


def _best_of(ref_logps, rewards, n):
    F, p = _levels(ref_logps, rewards)
    return ref_logps - p.log() + (F**n - (F - p).clamp(min=0) ** n).log()


def _unshared(ref_logps, rewards, n):
    F, p = _levels(ref_logps, rewards)
    return (F**n - (F - p).clamp(min=0) ** n).log()


def _shared_evenly(ref_logps, rewards, n):
    return _unshared(ref_logps, rewards, n) - (rewards == rewards[:, None]).sum(-1).log()


def _first_takes_all(ref_logps, rewards, n):
    """Ties broken by place in the table: cumulative sums of a sorted list, and no thought for ties."""
    order = rewards.argsort(stable=True)
    F = ref_logps.exp()[order].cumsum(-1)
    below = torch.cat([F.new_zeros(1), F[:-1]])
    return torch.empty_like(F).scatter(0, order, (F**n - below**n).log())


BEST_OF_N = Exercise(
    number="8.2",
    function="best_of_n_logps",
    inputs=draws_to_choose_from(),
    expected=every_list_of_draws,
    source="all lists of n draws, one after the other",
    mistakes={
        "among tied completions one takes all: they share in proportion to π_ref": _first_takes_all,
        "each tied completion gets the probability of the whole tie: multiply by π_ref(y) / p": _unshared,
        "ties are overlooked: p is the probability of all completions with that reward": (
            lambda ref, r, n: (_levels(ref, r)[0] ** n - (_levels(ref, r)[0] - ref.exp()) ** n).log()
        ),
        "a tie is shared evenly: completions share it in proportion to π_ref": _shared_evenly,
        "this is the probability that the best is at most as good: take off that it is worse": (
            lambda ref, r, n: n * _levels(ref, r)[0].log()
        ),
        "that the best is at most as good, shared among ties: take off that it is worse": (
            lambda ref, r, n: ref - _levels(ref, r)[1].log() + n * _levels(ref, r)[0].log()
        ),
        "π_ref to the power n: that is n draws of the same completion": (
            lambda ref, r, n: (n * ref).log_softmax(-1)
        ),
        "π_ref · exp(n r) is no best of n, which looks at the order of rewards only": (
            lambda ref, r, n: (ref + n * r).log_softmax(-1)
        ),
        "this is the worst of n": lambda ref, r, n: _best_of(ref, -r, n),
        "the chance to be among the n draws is not the chance to be the best of them": (
            lambda ref, r, n: torch.log1p(-((1 - ref.exp()) ** n))
        ),
        "these are probabilities; their logarithms are asked for": (
            lambda ref, r, n: _best_of(ref, r, n).exp()
        ),
    },
)


# ---------------------------------------------------------------------------------- 8.3 PPO's surrogate


@st.composite
def samples_of_old_policy(draw):
    """Log-probabilities of B actions now and when they were drawn, advantages, and the clip."""
    B = draw(st.integers(1, 4))
    old = draw(vector(B, -3, -1))
    return {
        "logps": old + draw(vector(B, -1, 1)),
        "old_logps": old,
        "advantages": draw(vector(B, -2, 2)),
        "clip": draw(st.sampled_from([0.2, 0.1, 0.3, 0.5])),
    }


def two_cases(logps, old_logps, advantages, clip) -> Tensor:
    """Each sample by itself: a positive advantage pays up to a ratio of 1 + c, a negative one from 1 - c."""
    losses = []
    for new, old, A in zip(logps.tolist(), old_logps.tolist(), advantages.tolist()):
        ratio = math.exp(new) / math.exp(old)
        losses.append(-A * (min(ratio, 1 + clip) if A > 0 else max(ratio, 1 - clip)))
    return torch.tensor(losses, dtype=torch.float64)


def _ratio(logps, old_logps):
    return (logps - old_logps).exp()


def _surrogate(ratio, clipped, advantages):
    return -torch.minimum(ratio * advantages, clipped * advantages)


SURROGATE = Exercise(
    number="8.3",
    function="clipped_surrogate",
    inputs=samples_of_old_policy(),
    expected=two_cases,
    source="two cases, A > 0 and A < 0, sample by sample",
    mistakes={
        "the larger of the two is taken: the smaller one never promises too much": (
            lambda new, old, A, c: (
                -torch.maximum(_ratio(new, old) * A, _ratio(new, old).clamp(1 - c, 1 + c) * A)
            )
        ),
        "clipped from above only: a negative advantage stops at 1 - c": (
            lambda new, old, A, c: _surrogate(_ratio(new, old), _ratio(new, old).clamp(max=1 + c), A)
        ),
        "clipped from below only: a positive advantage stops at 1 + c": (
            lambda new, old, A, c: _surrogate(_ratio(new, old), _ratio(new, old).clamp(min=1 - c), A)
        ),
        "nothing is clipped": lambda new, old, A, c: -_ratio(new, old) * A,
        "the minimum is missing: a ratio that went the wrong way must still be pulled back": (
            lambda new, old, A, c: -_ratio(new, old).clamp(1 - c, 1 + c) * A
        ),
        "A is missing in the clipped term: it multiplies both": (
            lambda new, old, A, c: -torch.minimum(_ratio(new, old) * A, _ratio(new, old).clamp(1 - c, 1 + c))
        ),
        "the minimum is taken of the ratios: multiply both by A first, whose sign turns the order round": (
            lambda new, old, A, c: -torch.minimum(_ratio(new, old), _ratio(new, old).clamp(1 - c, 1 + c)) * A
        ),
        "the minus sign is missing: this is to be maximised, and a loss is minimised": (
            lambda new, old, A, c: -_surrogate(_ratio(new, old), _ratio(new, old).clamp(1 - c, 1 + c), A)
        ),
        "the ratio is upside down: the policy now, divided by the one that drew": (
            lambda new, old, A, c: _surrogate(_ratio(old, new), _ratio(old, new).clamp(1 - c, 1 + c), A)
        ),
        "this is a ratio of logarithms; the ratio of probabilities is exp of their difference": (
            lambda new, old, A, c: _surrogate(new / old, (new / old).clamp(1 - c, 1 + c), A)
        ),
        "exp is missing: a difference of log-probabilities is the logarithm of the ratio": (
            lambda new, old, A, c: _surrogate(new - old, (new - old).clamp(1 - c, 1 + c), A)
        ),
        "clipped to [-c, c]: the ratio stays around 1, not 0": (
            lambda new, old, A, c: _surrogate(_ratio(new, old), _ratio(new, old).clamp(-c, c), A)
        ),
        "mean over the batch: return one loss for each sample, the caller averages": (
            lambda new, old, A, c: _surrogate(
                _ratio(new, old), _ratio(new, old).clamp(1 - c, 1 + c), A
            ).mean()
        ),
    },
)


# --------------------------------------------------------------------------------------- 8.4 win rates


@st.composite
def two_policies(draw):
    """Two policies over Y completions of one prompt, and rewards of which some may be equal."""
    Y = draw(st.integers(2, 4))
    rewards = draw(st.lists(st.integers(0, 3), min_size=Y, max_size=Y))
    return {
        "logps": draw(log_distribution(Y)),
        "other_logps": draw(log_distribution(Y)),
        "rewards": torch.tensor(rewards, dtype=torch.float64),
    }


def pair_by_pair(logps, other_logps, rewards) -> Tensor:
    """Every completion of one policy against every completion of the other."""
    total = 0.0
    for mine, r in zip(logps.tolist(), rewards.tolist()):
        for theirs, s in zip(other_logps.tolist(), rewards.tolist()):
            points = 1.0 if r > s else 0.5 if r == s else 0.0
            total += math.exp(mine) * math.exp(theirs) * points
    return torch.tensor(total, dtype=torch.float64)


def _met(points):
    """A student's win rate: what a completion of reward r gets against one of reward s."""

    def win_rate(logps, other_logps, rewards):
        return logps.exp() @ points(rewards[:, None] - rewards[None, :]) @ other_logps.exp()

    return win_rate


def _half_for_ties(lead):
    return (lead > 0).double() + (lead == 0).double() / 2


WIN_RATE = Exercise(
    number="8.4",
    function="win_rate",
    inputs=two_policies(),
    expected=pair_by_pair,
    source="every completion of one policy against every one of the other",
    mistakes={
        "ties count nothing; they count one half": _met(lambda lead: (lead > 0).double()),
        "ties count as won; they count one half": _met(lambda lead: (lead >= 0).double()),
        "this is how often the other policy wins": (
            lambda logps, other, r: _met(_half_for_ties)(other, logps, r)
        ),
        "σ of the difference is how a noisy judge decides; here the higher reward always wins": (
            _met(torch.sigmoid)
        ),
        "this is the difference of the average rewards: a win rate counts how often, not by how much": (
            lambda logps, other, r: (logps.exp() - other.exp()) @ r
        ),
        "this is always ½: both policies must be used, each completion weighed by its probability": (
            lambda logps, other, r: _half_for_ties(r[:, None] - r[None, :]).mean()
        ),
        "log-probabilities are used as weights; take exp": (
            lambda logps, other, r: logps @ _half_for_ties(r[:, None] - r[None, :]) @ other
        ),
    },
)

EXERCISES = [FRONTIER, BEST_OF_N, SURROGATE, WIN_RATE]
