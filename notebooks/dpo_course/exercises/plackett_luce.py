"""Notebook 5: rankings of more than two."""

import functools
import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import Exercise, Strain, betas, table, vector

# ------------------------------------------------------------------------- 5.1 plackett_luce_logprob


@st.composite
def ranked(draw):
    """Rewards of K completions in the order of their places: one ranking, or several."""
    K = draw(st.integers(2, 4))
    rows = draw(st.integers(0, 2))
    return {"ranked_rewards": draw(vector(K, -3, 3) if rows == 0 else table(rows, K, -3, 3))}


def one_after_the_other(ranked_rewards) -> Tensor:
    """Each ranking by itself in Python's own numbers: take the first off the list, and again."""

    def log_chance(row: list[float]) -> float:
        strengths, chance = [math.exp(reward) for reward in row], 1.0
        while strengths:
            chance *= strengths[0] / math.fsum(strengths)
            strengths.pop(0)
        return math.log(chance)

    rows = ranked_rewards.reshape(-1, ranked_rewards.shape[-1]).tolist()
    chances = torch.tensor([log_chance(row) for row in rows], dtype=torch.float64)
    return chances.view(ranked_rewards.shape[:-1])


def _left(r: Tensor) -> Tensor:
    """log of the strengths still there, at each place."""
    return torch.stack([r[..., k:].logsumexp(-1) for k in range(r.shape[-1])], -1)


def _below(r: Tensor) -> Tensor:
    """log of the strengths behind each place but the last."""
    return torch.stack([r[..., k + 1 :].logsumexp(-1) for k in range(r.shape[-1] - 1)], -1)


def _pairwise(r: Tensor) -> Tensor:
    above, below = torch.triu_indices(r.shape[-1], r.shape[-1], offset=1)
    return torch.nn.functional.logsigmoid(r[..., above] - r[..., below]).sum(-1)


def _neighbours(r: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(r[..., :-1] - r[..., 1:]).sum(-1)


LOGPROB = Exercise(
    number="5.1",
    function="plackett_luce_logprob",
    inputs=ranked(),
    expected=one_after_the_other,
    source="one place after the other: the share of the strengths still there, then strike it off",
    strain=Strain(
        {"ranked_rewards": torch.tensor([0.0, 800.0], dtype=torch.float64)}, torch.tensor(-800.0).double()
    ),
    mistakes={
        "all K stand in every denominator: those already placed no longer take part": (
            lambda r: (r - r.logsumexp(-1, keepdim=True)).sum(-1)
        ),
        "the denominators sum over the places up to k, which reads the ranking from its end: "
        "those left are k and all after it": lambda r: (r - r.logcumsumexp(-1)).sum(-1),
        "the denominators leave out place k itself: it is among those left when it is chosen": (
            lambda r: (r[..., :-1] - _below(r)).sum(-1)
        ),
        "rewards change sign: a high reward makes an early place likely": (
            lambda r: (-r - _left(-r)).sum(-1)
        ),
        "the rewards were sorted first: they come in as the completions were ranked": (
            lambda r: (lambda s: (s - _left(s)).sum(-1))(r.sort(-1, descending=True).values)
        ),
        "this multiplies Bradley–Terry over all pairs, which are not independent": _pairwise,
        "this multiplies Bradley–Terry over neighbours: place k is chosen from all still left": _neighbours,
        "only the first place is counted": lambda r: r[..., 0] - r.logsumexp(-1),
        "this is the probability, not its logarithm": lambda r: (r - _left(r)).sum(-1).exp(),
        "this is minus the log-probability, which is a loss": lambda r: -(r - _left(r)).sum(-1),
        "mean over the places: the probabilities of the places multiply, so their logarithms add": (
            lambda r: (r - _left(r)).mean(-1)
        ),
        "the sum over the places is missing: return one number for each ranking": lambda r: r - _left(r),
    },
    central=True,
)


# ------------------------------------------------------------------------------ 5.2 first_places_loss


@st.composite
def first_places(draw):
    """Log-probabilities of B rankings of K completions under policy and reference, m places, and beta."""
    B, K = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    return {
        "policy_logps": draw(table(B, K, -3, 0)),
        "ref_logps": draw(table(B, K, -3, 0)),
        "m": draw(st.integers(1, K)),
        "beta": draw(betas()),
    }


def summed_over_the_others(policy_logps, ref_logps, m, beta) -> Tensor:
    """Each ranking by itself, in Python's own numbers: chances added up over all orders of the others."""

    def chance(strengths: list[float]) -> float:
        return math.prod(strength / math.fsum(strengths[k:]) for k, strength in enumerate(strengths))

    losses = []
    for policy, reference in zip(policy_logps.tolist(), ref_logps.tolist()):
        strengths = [(math.exp(p) / math.exp(q)) ** beta for p, q in zip(policy, reference)]
        orders = itertools.permutations(strengths[m:])
        losses.append(-math.log(math.fsum(chance([*strengths[:m], *others]) for others in orders)))
    return torch.tensor(losses, dtype=torch.float64)


def _loss(scores: Tensor, m: int) -> Tensor:
    return (_left(scores) - scores)[:, :m].sum(-1)


def _named_over_unnamed(scores: Tensor, m: int) -> Tensor:
    """Bradley-Terry over the pairs that are known: each named one with all behind it."""
    above, below = torch.triu_indices(scores.shape[-1], scores.shape[-1], offset=1)
    known = above < m
    leads = scores[:, above[known]] - scores[:, below[known]]
    return -torch.nn.functional.logsigmoid(leads).sum(-1)


FIRST_PLACES = Exercise(
    number="5.2",
    function="first_places_loss",
    inputs=first_places(),
    expected=summed_over_the_others,
    source="-log of the chances of all orders of the other places, added up",
    mistakes={
        "all K places are counted: the others are in no order": (
            lambda policy, ref, m, beta: _loss(beta * (policy - ref), policy.shape[1])
        ),
        "the others are left out of the denominators: they were there, and were not chosen": (
            lambda policy, ref, m, beta: _loss(beta * (policy - ref)[:, :m], m)
        ),
        "only the first place is counted": (lambda policy, ref, m, beta: _loss(beta * (policy - ref), 1)),
        "the chances of the orders are averaged: of this order or that one, the probabilities add up": (
            lambda policy, ref, m, beta: (
                _loss(beta * (policy - ref), m) + math.log(math.factorial(policy.shape[1] - m))
            )
        ),
        "one place too few: the first m are in order": (
            lambda policy, ref, m, beta: _loss(beta * (policy - ref), m - 1)
        ),
        "the reference is missing: implicit rewards are β times log-ratios": (
            lambda policy, ref, m, beta: _loss(beta * policy, m)
        ),
        "β is missing": lambda policy, ref, m, beta: _loss(policy - ref, m),
        "β is missing on the reference": lambda policy, ref, m, beta: _loss(beta * policy - ref, m),
        "off by β: did you scale the loss instead of the rewards?": (
            lambda policy, ref, m, beta: beta * _loss(policy - ref, m)
        ),
        "the minus sign is missing: this is a log-likelihood, and a loss is minimised": (
            lambda policy, ref, m, beta: -_loss(beta * (policy - ref), m)
        ),
        "mean over the batch: return one loss for each ranking": (
            lambda policy, ref, m, beta: _loss(beta * (policy - ref), m).mean()
        ),
        "the sum of the DPO losses of the known pairs is another loss, for pairs that are independent": (
            lambda policy, ref, m, beta: _named_over_unnamed(beta * (policy - ref), m)
        ),
    },
)


# ------------------------------------------------------------------- 5.3 preference_with_normal_noise


@st.composite
def two_rewards(draw):
    """Rewards of the two completions of B comparisons."""
    B = draw(st.integers(1, 3))
    return {"first": draw(vector(B, -3, 3)), "second": draw(vector(B, -3, 3))}


def integrated(first, second) -> Tensor:
    """Over the first one's noise: its density times the chance that the second's impression is smaller."""
    variance, step = math.pi**2 / 6, 0.05
    noise = torch.arange(-10, 10, step, dtype=torch.float64)  # eight deviations; the rest is below 1e-14
    density = (-noise.square() / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)
    lead = (first - second)[:, None] + noise
    smaller = (1 + torch.erf(lead / math.sqrt(2 * variance))) / 2
    return (step * density * smaller).sum(-1)  # for smooth bells such a sum is exact to rounding


def _normal(lead: Tensor, deviation: float) -> Tensor:
    return torch.special.ndtr(lead / deviation)


_DEVIATION = math.pi / math.sqrt(6)  # of one noise

NORMAL = Exercise(
    number="5.3",
    function="preference_with_normal_noise",
    inputs=two_rewards(),
    expected=integrated,
    source="an integral over the first one's noise",
    within=1e-6,  # torch's Normal holds a deviation that is given as a plain number in float32
    mistakes={
        "σ belongs to Gumbel's noise": lambda first, second: torch.sigmoid(first - second),
        "the variance of the noise is missing: this is Φ of the difference of rewards": (
            lambda first, second: _normal(first - second, 1.0)
        ),
        "the noise of one completion only: both impressions have noise, and the variances add": (
            lambda first, second: _normal(first - second, _DEVIATION)
        ),
        "deviations do not add; variances do": lambda first, second: _normal(first - second, 2 * _DEVIATION),
        "divided by the variance of the difference: Φ needs its square root, the deviation": (
            lambda first, second: _normal(first - second, 2 * _DEVIATION**2)
        ),
        "divided by the variance of one noise: take the deviation, and that of the difference": (
            lambda first, second: _normal(first - second, _DEVIATION**2)
        ),
        "the two are exchanged: the first one's impression is to be the larger": (
            lambda first, second: _normal(second - first, math.sqrt(2) * _DEVIATION)
        ),
        "this is the density, not the probability": (
            lambda first, second: torch.exp(
                torch.distributions.Normal(0.0, math.sqrt(2) * _DEVIATION).log_prob(first - second)
            )
        ),
    },
)


# ----------------------------------------------------------------------- 5.4 preference_from_rankings


@st.composite
def two_of_some(draw):
    """Rewards of K completions, and the numbers of two of them."""
    K = draw(st.integers(2, 4))
    i, j = draw(st.permutations(range(K)))[:2]
    return {"rewards": draw(vector(K, -3, 3)), "i": i, "j": j}


def bradley_terry_of_two(rewards, i, j) -> Tensor:
    """The share of i in the strengths of i and j, whoever else was ranked."""
    first, second = math.exp(rewards[i]), math.exp(rewards[j])
    return torch.tensor(first / (first + second), dtype=torch.float64)


def _over_orders(counts, *, chance=lambda ranked: (ranked - _left(ranked)).sum(-1).exp()):
    """A student's sum of `chance` over the orders, lists of completions, that `counts` lets in."""

    def total(rewards, i, j):
        orders = [list(order) for order in itertools.permutations(range(len(rewards)))]
        return sum((chance(rewards[order]) for order in orders if counts(order, i, j)), torch.zeros(()))

    return total


def _above(order: list[int], i: int, j: int) -> bool:
    return order.index(i) < order.index(j)


PREFERENCE = Exercise(
    number="5.4",
    function="preference_from_rankings",
    inputs=two_of_some(),
    expected=bradley_terry_of_two,
    source="Bradley–Terry, which knows nothing of the others: what you have summed is σ(r_i - r_j)",
    mistakes={
        "the other way round: this is the chance that j stands above i": (
            _over_orders(lambda order, i, j: _above(order, j, i))
        ),
        "only orders with i right above j are counted: others may stand between them": (
            _over_orders(lambda order, i, j: order.index(i) + 1 == order.index(j))
        ),
        "only orders with i in first place are counted: both may stand further down": (
            _over_orders(lambda order, i, j: order[0] == i)
        ),
        "places and completions are exchanged: order[0] is the completion in place 1, not the place of y₁": (
            _over_orders(lambda order, i, j: order[i] < order[j])
        ),
        "every order counts alike: weigh each with its probability": (
            lambda rewards, i, j: torch.tensor(0.5, dtype=torch.float64)
        ),
        "log-probabilities are added: of this order or that one, the probabilities add up": (
            _over_orders(_above, chance=lambda ranked: (ranked - _left(ranked)).sum(-1))
        ),
        "mean over the orders: their probabilities add up": (
            lambda rewards, i, j: bradley_terry_of_two(rewards, i, j) / (math.factorial(len(rewards)) // 2)
        ),
    },
)

# -------------------------------------------------------------------------------- 5.5 times_too_small


@st.composite
def ranked_completions(draw):
    """How many completions a ranking has."""
    return {"K": draw(st.integers(2, 7))}


@functools.cache
def counted_orders(K) -> Tensor:
    """All orders: the deviation of the first one's place, over that of K - 1 tosses of fair coins."""
    places = torch.tensor([order.index(0) for order in itertools.permutations(range(K))]).double()
    heads = torch.tensor([sum(coins) for coins in itertools.product((0, 1), repeat=K - 1)]).double()
    return places.std(correction=0) / heads.std(correction=0)


TOO_SMALL = Exercise(
    number="5.5",
    function="times_too_small",
    inputs=ranked_completions(),
    expected=counted_orders,
    source="all orders of K, and all results of K - 1 coins, counted",
    within=0.02,  # of one plus the factor: a simulation of 20,000 orders is off by half a per cent
    mistakes={
        "this is the ratio of the variances; an error is the square root of a variance": (
            lambda K: counted_orders(K) ** 2
        ),
        "claimed over true: the true error stands above the line": lambda K: 1 / counted_orders(K),
        "K(K - 1)/2 pairs do not come from one toss: a ranking is worth more than one pair": (
            lambda K: (K * (K - 1) / 2) ** 0.5
        ),
        "K - 1 is how many pairs a completion is in; they are not all one and the same answer": (
            lambda K: (K - 1) ** 0.5
        ),
        "K/2 is the number of pairs for each place, not a ratio of variances": lambda K: (K / 2) ** 0.5,
        "1: the pairs of one ranking are not independent": lambda K: 1.0,
        "the deviation of the place alone: divide by that of the coins": (lambda K: ((K**2 - 1) / 12) ** 0.5),
    },
)

EXERCISES = [LOGPROB, FIRST_PLACES, NORMAL, PREFERENCE, TOO_SMALL]
