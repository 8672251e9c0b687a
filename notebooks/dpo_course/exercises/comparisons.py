"""Notebook 8: what DPO is compared with."""

import itertools
import math

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import best_of_n_logps
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


# ------------------------------------------------------------- 8.2 how many draws a beta is worth


ORDERS = [(0, 1, 2), (2, 1, 0), (0, 2, 1), (0, 1, 3), (3, 0, 1), (1, 0, 1), (0, 1, 2, 3), (3, 0, 2, 0)]


@st.composite
def world_with_a_choice(draw):
    """One prompt's reference, rewards that are not all equal, and beta."""
    rewards = torch.tensor(draw(st.sampled_from(ORDERS)), dtype=torch.float64)
    return {
        "ref_logps": draw(log_distribution(len(rewards))),
        "rewards": rewards,
        "beta": draw(st.sampled_from([1.0, 0.5, 2.0, 0.4])),
    }


def levels_of_reward(ref_logps, rewards, beta) -> tuple[Tensor, Tensor]:
    """In plain numbers: the best of n by the chances of each level of reward, and both divergences by sums
    over completions; n one after the other."""
    chance, r = [math.exp(number) for number in ref_logps.tolist()], rewards.tolist()
    weights = [p * math.exp(value / beta) for p, value in zip(chance, r)]
    optimal = [weight / sum(weights) for weight in weights]
    wanted = sum(p * value for p, value in zip(optimal, r))
    for n in itertools.count(1):
        best = []
        for p, value in zip(chance, r):
            at_most = sum(q for q, other in zip(chance, r) if other <= value)
            below = sum(q for q, other in zip(chance, r) if other < value)
            best.append(p / (at_most - below) * (at_most**n - below**n))
        if sum(p * value for p, value in zip(best, r)) >= wanted:
            kl = [sum(p * math.log(p / q) for p, q in zip(policy, chance)) for policy in (best, optimal)]
            return torch.tensor(n), torch.tensor(kl[0] - kl[1], dtype=torch.float64)


def _kl(logps, ref_logps):
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def _draws(target=None, draws=None, cost=lambda best, optimal, ref, n: _kl(best, ref) - _kl(optimal, ref)):
    """A student's answer: from policy and reward what is compared, how many draws are taken instead, and what
    is called the cost."""
    target = target or (lambda logps, ref, r, beta: logps.exp() @ r)

    def draws_worth(ref, r, beta):
        optimal = _tilted(ref, r / beta)
        wanted = target(optimal, ref, r, beta)
        n = 1
        while n < 200 and target(best_of_n_logps(ref, r, n=n), ref, r, 0.0) < wanted:
            n += 1
        n = draws(n, optimal, ref) if draws else n
        return torch.tensor(n), cost(best_of_n_logps(ref, r, n=n), optimal, ref, n)

    return draws_worth


DRAWS = Exercise(
    number="8.2",
    function="draws_worth",
    inputs=world_with_a_choice(),
    expected=levels_of_reward,
    source="all n in turn, by the chances of each level of reward, in plain numbers",
    mistakes={
        "compared at equal divergence; the question is equal reward": _draws(
            lambda logps, ref, r, beta: _kl(logps, ref)
        ),
        "one draw too few: the reward must be reached": _draws(draws=lambda n, *_: max(n - 1, 1)),
        "one draw too many: the smallest n that reaches the reward": _draws(draws=lambda n, *_: n + 1),
        "this is the whole divergence of best of n; the question is what it costs more than π*": _draws(
            cost=lambda best, optimal, ref, n: _kl(best, ref)
        ),
        "the sign is reversed: best of n is the dearer one": _draws(
            cost=lambda best, optimal, ref, n: _kl(optimal, ref) - _kl(best, ref)
        ),
        "log n - (n - 1)/n is a bound, which a table with few completions does not reach": _draws(
            cost=lambda best, optimal, ref, n: torch.tensor(math.log(n) - (n - 1) / n) - _kl(optimal, ref)
        ),
        "the divergence is taken backwards: KL(π‖π_ref) averages under π": _draws(
            cost=lambda best, optimal, ref, n: _kl(ref, best) - _kl(ref, optimal)
        ),
        "the penalised reward of π* is compared with the reward of best of n: leave out β KL": _draws(
            lambda logps, ref, r, beta: logps.exp() @ r - beta * _kl(logps, ref)
        ),
        "exp of the divergence is no number of draws": _draws(
            draws=lambda n, optimal, ref: math.ceil(_kl(optimal, ref).exp())
        ),
        "cost first, number second: the order is (n, nats)": (
            lambda ref, r, beta: _draws()(ref, r, beta)[::-1]
        ),
    },
)


# --------------------------------------------------------------------------- 8.3 PPO's clip, in use


@st.composite
def steps_on_one_batch(draw):
    """Advantages of B samples, the clip, the size of a step in log pi, and how many steps are taken."""
    return {
        "advantages": draw(vector(draw(st.integers(1, 2)), -2, 2)),
        "clip": draw(st.sampled_from([0.2, 0.1, 0.3, 0.01])),
        "step_size": draw(st.sampled_from([0.1, 0.05, 0.02, 0.2])),
        "steps": draw(st.integers(1, 5)),
    }


def two_cases(advantages, clip, step_size, steps) -> Tensor:
    """Each sample by itself, in plain numbers: it stops pulling past 1 + c if A > 0, past 1 - c if A < 0."""
    ratios = []
    for A in advantages.tolist():
        x = 0.0
        for _ in range(steps):
            ratio = math.exp(x)
            idle = ratio > 1 + clip if A > 0 else ratio < 1 - clip
            x += 0.0 if idle else step_size * A * ratio
        ratios.append(math.exp(x))
    return torch.tensor(ratios, dtype=torch.float64)


def _stepped(pull, last=lambda x, clip: x.exp()):
    """A student's ratios, from the pull on log pi at a ratio, and what is returned of its logarithm x."""

    def ratios_after(advantages, clip, step_size, steps):
        x = torch.zeros_like(advantages)
        for _ in range(steps):
            x = x + step_size * pull(x.exp(), advantages, clip)
        return last(x, clip)

    return ratios_after


def _clipped(ratio, A, c):
    return ratio * A * ~torch.where(A > 0, ratio > 1 + c, ratio < 1 - c)


CLIP = Exercise(
    number="8.3",
    function="ratios_after",
    inputs=steps_on_one_batch(),
    expected=two_cases,
    source="two cases, A > 0 and A < 0, step by step in plain numbers",
    mistakes={
        "the clip limits the pull, not the ratio: the step before may have gone beyond": _stepped(
            _clipped, lambda x, c: x.exp().clamp(1 - c, 1 + c)
        ),
        "nothing is clipped": _stepped(lambda ratio, A, c: ratio * A),
        "the slope of ρ in log π is ρ, not 1": _stepped(lambda ratio, A, c: _clipped(ratio, A, c) / ratio),
        "the sign is reversed: a step lowers the loss, which is minus the surrogate": _stepped(
            lambda ratio, A, c: _clipped(ratio, -A, c)
        ),
        "clipped from above only: a negative advantage stops below 1 - c": _stepped(
            lambda ratio, A, c: ratio * A * (ratio <= 1 + c)
        ),
        "clipped from below only: a positive advantage stops above 1 + c": _stepped(
            lambda ratio, A, c: ratio * A * (ratio >= 1 - c)
        ),
        "these are logarithms of the ratios": _stepped(_clipped, lambda x, c: x),
        "this is how far the ratios have moved; return the ratios": _stepped(
            _clipped, lambda x, c: x.exp() - 1
        ),
        "only one step was taken": lambda A, c, step_size, steps: _stepped(_clipped)(A, c, step_size, 1),
        "the losses were averaged over the batch: here each sample has its own step": _stepped(
            lambda ratio, A, c: _clipped(ratio, A, c) / len(A)
        ),
    },
)


# --------------------------------------------------------------------- 8.4 a judge that likes length


@st.composite
def better_but_shorter(draw):
    """Two policies, rewards and lengths: by reward one of them wins more than half, by length the other.

    Always three numbers of each are drawn, so that a search can leave the third out.
    """
    Y = draw(st.sampled_from([2, 3]))
    counts = [torch.tensor(draw(st.tuples(*3 * [st.integers(1, 9)]))[:Y]).double() for _ in range(2)]
    scores = [torch.tensor(draw(st.tuples(*3 * [st.integers(1, 3)]))[:Y]).double() for _ in range(2)]
    logps, other = ((count / count.sum()).log() for count in counts)
    leads = [pair_by_pair(logps, other, score) - 0.5 for score in scores]
    assume(leads[0] * leads[1] < -1e-4)
    return {"logps": logps, "other_logps": other, "rewards": scores[0], "lengths": scores[1]}


def pair_by_pair(logps, other_logps, scores) -> float:
    """Every completion of one policy against every completion of the other."""
    total = 0.0
    for mine, r in zip(logps.tolist(), scores.tolist()):
        for theirs, s in zip(other_logps.tolist(), scores.tolist()):
            points = 1.0 if r > s else 0.5 if r == s else 0.0
            total += math.exp(mine) * math.exp(theirs) * points
    return total


def halved_until_even(logps, other_logps, rewards, lengths) -> Tensor:
    """Halve [0, 1] until the judge calls the policies even."""
    by_reward, by_length = (pair_by_pair(logps, other_logps, scores) for scores in (rewards, lengths))
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        lead = (1 - share) * by_reward + share * by_length - 0.5
        low, high = (share, high) if lead * (by_reward - 0.5) > 0 else (low, share)
    return torch.tensor(low, dtype=torch.float64)


def _half_for_ties(lead):
    return (lead > 0).double() + (lead == 0).double() / 2


def _rate(logps, other_logps, scores, points=_half_for_ties):
    return logps.exp() @ points(scores[:, None] - scores[None, :]) @ other_logps.exp()


def _evened(by_reward, by_length):
    return (by_reward - 0.5) / (by_reward - by_length)


def _judged(points):
    """A student's answer, from what a completion gets against another."""
    return lambda logps, other, r, lengths: _evened(
        _rate(logps, other, r, points), _rate(logps, other, lengths, points)
    )


def _win_rates(formula):
    """A student's answer, from the two win rates."""
    return lambda logps, other, r, lengths: formula(_rate(logps, other, r), _rate(logps, other, lengths))


BIAS = Exercise(
    number="8.4",
    function="bias_that_hides",
    inputs=better_but_shorter(),
    expected=halved_until_even,
    source="bisection: the share at which the judge calls the policies even, from all pairs of completions",
    within=1e-6,  # the share of a search that was stopped; the mistakes differ by far more
    mistakes={
        "ties count nothing; they count one half": _judged(lambda lead: (lead > 0).double()),
        "ties count as won; they count one half": _judged(lambda lead: (lead >= 0).double()),
        "average lengths are compared: the judge counts how often the longer one wins, not by how much": (
            lambda logps, other, r, lengths: _evened(
                _rate(logps, other, r), 0.5 + (logps.exp() - other.exp()) @ lengths
            )
        ),
        "average rewards are compared: a win rate counts how often, not by how much": (
            lambda logps, other, r, lengths: _evened(
                0.5 + (logps.exp() - other.exp()) @ r, _rate(logps, other, lengths)
            )
        ),
        "the two shares are exchanged: by length in the share asked for, by reward in the rest": _win_rates(
            lambda by_reward, by_length: 1 - _evened(by_reward, by_length)
        ),
        "the reward still counts in the rest only, 1 minus the share": _win_rates(
            lambda by_reward, by_length: (0.5 - by_reward) / (by_length - 0.5)
        ),
        "this is by how much the two win rates differ": _win_rates(
            lambda by_reward, by_length: (by_reward - by_length).abs()
        ),
        "this is the win rate by reward": _win_rates(lambda by_reward, by_length: by_reward),
    },
)

EXERCISES = [FRONTIER, DRAWS, CLIP, BIAS]
