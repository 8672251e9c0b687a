"""Notebook 2: the KL-regularised objective and its optimum."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import Exercise, Strain, betas, log_distribution, table, vector

# Where exponentials leave the range of float64: a long completion.
LONG_COMPLETIONS = {
    "ref_logps": torch.tensor([[-800.0, 0.0]], dtype=torch.float64),
    "rewards": torch.zeros(1, 2, dtype=torch.float64),
    "beta": 1.0,
}

# ------------------------------------------------------------------------- 2.1 how far a filter moves


@st.composite
def reference_and_filter(draw):
    """A reference for X prompts with Y completions, and which of these a filter keeps: one at least."""
    X, Y = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    row = st.lists(st.booleans(), min_size=Y, max_size=Y).filter(any)
    kept = draw(st.lists(row, min_size=X, max_size=X))
    return {"ref_logps": draw(log_distribution(X, Y)), "kept": torch.tensor(kept)}


def average_log_ratio_of_the_kept(ref_logps, kept) -> Tensor:
    """Over the completions that are kept, one after the other, in Python's own numbers."""
    divergences = []
    for row, keep in zip(ref_logps.tolist(), kept.tolist()):
        chances = [math.exp(logp) for logp, stays in zip(row, keep) if stays]
        given = [chance / sum(chances) for chance in chances]
        divergences.append(sum(p * math.log(p / q) for p, q in zip(given, chances)))
    return torch.tensor(divergences, dtype=torch.float64)


def _filtered(ref_logps: Tensor, kept: Tensor) -> Tensor:
    return ref_logps.masked_fill(~kept, -math.inf).log_softmax(-1)


def _entropy(logps: Tensor) -> Tensor:
    return -torch.where(logps > -math.inf, logps.exp() * logps, 0).sum(-1)


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    """(..., Y) -> (...,), where the first may be -inf."""
    return (logps.exp() * torch.where(logps > -math.inf, logps - other_logps, 0)).sum(-1)


FILTER = Exercise(
    number="2.1",
    function="filtered_kl",
    inputs=reference_and_filter(),
    expected=average_log_ratio_of_the_kept,
    source="the average log-ratio over the completions that are kept",
    strain=Strain(
        {
            "ref_logps": torch.tensor([[-800.0, 0.0]], dtype=torch.float64),
            "kept": torch.tensor([[True, False]]),
        },
        torch.tensor([800.0], dtype=torch.float64),
    ),
    mistakes={
        "NaN where π(y) = 0: there 0 · log 0 counts as 0": (
            lambda ref, kept: (lambda p: (p.exp() * (p - ref)).sum(-1))(_filtered(ref, kept))
        ),
        "the two policies are exchanged: average under the filtered one, divide by the reference": (
            lambda ref, kept: (ref.exp() * (ref - _filtered(ref, kept))).sum(-1)
        ),
        "the sign is reversed: a divergence is never negative": (
            lambda ref, kept: -_kl(_filtered(ref, kept), ref)
        ),
        "what is kept no longer sums to one: normalise it, then every log-ratio moves": (
            lambda ref, kept: 0 * ref.sum(-1)
        ),
        "normalised with softmax over zeros: what is thrown away has log-probability -∞, not 0": (
            lambda ref, kept: (lambda p: (p.exp() * (p - ref)).sum(-1))((ref * kept).log_softmax(-1))
        ),
        "averaged over the completions alike: weight each log-ratio by its probability": (
            lambda ref, kept: -torch.where(kept, ref, -math.inf).logsumexp(-1) * kept.double().mean(-1)
        ),
        "this is the entropy of the filtered policy: the reference is missing": (
            lambda ref, kept: _entropy(_filtered(ref, kept))
        ),
        "the fall in entropy: the divergence averages log π - log π_ref under π": (
            lambda ref, kept: _entropy(ref) - _entropy(_filtered(ref, kept))
        ),
        "this is the cross-entropy: the term log π is missing": (
            lambda ref, kept: _entropy(_filtered(ref, kept)) + _kl(_filtered(ref, kept), ref)
        ),
        "the share of completions that are kept: count each by its probability": (
            lambda ref, kept: -kept.double().mean(-1).log()
        ),
        "the probability of what is thrown away: it is that of what is kept": (
            lambda ref, kept: -torch.where(kept, -math.inf, ref).logsumexp(-1)
        ),
        "this is a probability: minus its logarithm is in nats": (
            lambda ref, kept: torch.where(kept, ref.exp(), 0).sum(-1)
        ),
        "in bits: log2 where the natural logarithm is meant": (
            lambda ref, kept: _kl(_filtered(ref, kept), ref) / math.log(2)
        ),
        "summed over all prompts: return one divergence for each": (
            lambda ref, kept: _kl(_filtered(ref, kept), ref).sum()
        ),
    },
)


# ----------------------------------------------------------------------- 2.2 the β of no gain and no loss


@st.composite
def policy_that_earns_more(draw):
    """A policy, another reference, and rewards that the policy has more of, for X prompts."""
    X, Y = draw(st.integers(1, 2)), draw(st.integers(2, 3))
    both = st.tuples(log_distribution(X, Y), log_distribution(X, Y))
    logps, ref_logps = draw(both.filter(lambda pair: bool((pair[0] - pair[1]).abs().amax(-1).min() > 0.1)))
    rewards = draw(table(X, Y, -3, 3))
    gain = ((logps.exp() - ref_logps.exp()) * rewards).sum(-1, keepdim=True)
    return {"logps": logps, "ref_logps": ref_logps, "rewards": torch.where(gain < 0, -rewards, rewards)}


def price_at_which_both_are_worth_the_same(logps, ref_logps, rewards) -> Tensor:
    """By halving an interval: below that price the policy has the greater J, above it the reference."""
    prices = []
    for row, ref_row, reward_row in zip(logps.tolist(), ref_logps.tolist(), rewards.tolist()):
        policy, ref = [math.exp(p) for p in row], [math.exp(q) for q in ref_row]

        def advantage(beta, policy=policy, ref=ref, reward_row=reward_row):
            mine = sum(p * (r - beta * math.log(p / q)) for p, q, r in zip(policy, ref, reward_row))
            return mine - sum(q * r for q, r in zip(ref, reward_row))

        low, high = 0.0, 1e5
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if advantage(middle) > 0 else (low, middle)
        prices.append(low)
    return torch.tensor(prices, dtype=torch.float64)


def _expected(logps: Tensor, rewards: Tensor) -> Tensor:
    return (logps.exp() * rewards).sum(-1)


def _gain(logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Tensor:
    return _expected(logps, rewards) - _expected(ref_logps, rewards)


PRICE = Exercise(
    number="2.2",
    function="break_even",
    inputs=policy_that_earns_more(),
    expected=price_at_which_both_are_worth_the_same,
    source="the β at which J of both is the same, by halving an interval",
    # Near its end a halved interval compares two values of J, which round at 1e-15; the divergence that the
    # difference is divided by may be 1e-3.
    within=1e-8,
    mistakes={
        "the reference earns something too: its J is its own reward, not 0": (
            lambda p, q, r: _expected(p, r) / _kl(p, q)
        ),
        "the divergence is taken from the reference: it is KL(π‖π_ref)": (
            lambda p, q, r: _gain(p, q, r) / _kl(q, p)
        ),
        "upside down: β is units of reward per nat": lambda p, q, r: _kl(p, q) / _gain(p, q, r),
        "this is the gain in reward: divide by what it costs in nats": _gain,
        "this is the gain at β = 1: solve for the β at which it is zero": (
            lambda p, q, r: _gain(p, q, r) - _kl(p, q)
        ),
        "the sign is reversed": lambda p, q, r: -_gain(p, q, r) / _kl(p, q),
        "the fall in entropy is no divergence: average log π - log π_ref under π": (
            lambda p, q, r: _gain(p, q, r) / (_entropy(q) - _entropy(p))
        ),
        "this is divided by the cross-entropy: the term log π is missing": (
            lambda p, q, r: _gain(p, q, r) / (_entropy(p) + _kl(p, q))
        ),
        "each log-ratio counts alike: weight it by π(y)": (lambda p, q, r: _gain(p, q, r) / (p - q).sum(-1)),
        "the rewards are added up: average them": (lambda p, q, r: r.sum(-1) / _kl(p, q)),
        "one β for all prompts: return one for each": (
            lambda p, q, r: _gain(p, q, r).sum() / _kl(p, q).sum()
        ),
    },
)


# ----------------------------------------------------------------------------- 2.3 the optimum


@st.composite
def world_and_beta(draw):
    """A reference and rewards for X prompts with Y completions, and beta."""
    X, Y = draw(st.integers(1, 2)), draw(st.integers(2, 3))
    return {
        "ref_logps": draw(log_distribution(X, Y)),
        "rewards": draw(table(X, Y, -2, 2)),
        "beta": draw(betas()),
    }


def _tilted(ref_logps, rewards, beta) -> list[list[float]]:
    """pi_ref e^(r / beta), number by number."""
    return [
        [math.exp(ref_logp) * math.exp(reward / beta) for ref_logp, reward in zip(ref_row, reward_row)]
        for ref_row, reward_row in zip(ref_logps.tolist(), rewards.tolist())
    ]


def shares_of_tilted(ref_logps, rewards, beta) -> Tensor:
    """The logarithm of each completion's share of its prompt's pi_ref e^(r / beta)."""
    rows = [[math.log(part / sum(row)) for part in row] for row in _tilted(ref_logps, rewards, beta)]
    return torch.tensor(rows, dtype=torch.float64)


OPTIMUM = Exercise(
    number="2.3",
    function="optimal_logps",
    inputs=world_and_beta(),
    expected=shares_of_tilted,
    source="the logarithms of the shares of π_ref · e^(r/β), number by number",
    strain=Strain(LONG_COMPLETIONS, LONG_COMPLETIONS["ref_logps"]),
    mistakes={
        "β multiplies the reward: π* has e^(r/β), so that a high price keeps π* at the reference": (
            lambda ref_logps, rewards, beta: (ref_logps + beta * rewards).log_softmax(-1)
        ),
        "β is missing": lambda ref_logps, rewards, beta: (ref_logps + rewards).log_softmax(-1),
        "the reference is missing: π* is π_ref, tilted": (
            lambda ref_logps, rewards, beta: (rewards / beta).log_softmax(-1)
        ),
        "β divides log π_ref as well: only the reward is divided": (
            lambda ref_logps, rewards, beta: ((ref_logps + rewards) / beta).log_softmax(-1)
        ),
        "tilted away from the reward: the exponent is +r/β": (
            lambda ref_logps, rewards, beta: (ref_logps - rewards / beta).log_softmax(-1)
        ),
        "not normalised: subtract log Z": lambda ref_logps, rewards, beta: ref_logps + rewards / beta,
        "β log Z is subtracted: log Z is what makes the probabilities sum to one": (
            lambda ref_logps, rewards, beta: (lambda t: t - beta * t.logsumexp(-1, keepdim=True))(
                ref_logps + rewards / beta
            )
        ),
        "these are probabilities: return their logarithms": (
            lambda ref_logps, rewards, beta: (ref_logps + rewards / beta).softmax(-1)
        ),
        "π_ref is added where log π_ref belongs: factors multiply, their logarithms add": (
            lambda ref_logps, rewards, beta: (ref_logps.exp() + rewards / beta).log_softmax(-1)
        ),
        "each prompt's log Z has lost its axis: keepdim=True": (
            lambda ref_logps, rewards, beta: (lambda t: t - t.logsumexp(-1))(ref_logps + rewards / beta)
        ),
        "normalised over the prompts: the completions of each prompt sum to one, dim -1": (
            lambda ref_logps, rewards, beta: (ref_logps + rewards / beta).log_softmax(0)
        ),
        "normalised over the whole table: each prompt has a Z of its own": (
            lambda ref_logps, rewards, beta: (lambda t: t - t.flatten().logsumexp(0))(
                ref_logps + rewards / beta
            )
        ),
        "this is the completion of greatest reward alone: π* is that only as β goes to 0": (
            lambda ref_logps, rewards, beta: (
                (rewards == rewards.amax(-1, keepdim=True)).double().log() + 0 * rewards
            )
        ),
    },
    central=True,
)


# ------------------------------------------------------------------- 2.4 the optimum of a wrong reward


@st.composite
def two_rewards(draw):
    """A reference, what is good, what a reward model believes, and values of beta that fall."""
    Y = draw(st.integers(2, 4))
    chosen = draw(
        st.sampled_from([(2.0, 1.0), (1.0, 0.5, 0.2), (3.0, 1.0, 0.3), (1.0, 0.3, 0.1), (2.0, 0.1)])
    )
    return {
        "ref_logps": draw(log_distribution(Y)),
        "rewards": draw(vector(Y, -2, 2)),
        "believed": draw(vector(Y, -2, 2)),
        "betas": torch.tensor(chosen, dtype=torch.float64),
    }


def earned_on_the_way(ref_logps, rewards, believed, betas) -> tuple[Tensor, Tensor]:
    """True reward of the believed reward's optimum for every beta, completion by completion."""
    earned = []
    for beta in betas.tolist():
        (parts,) = _tilted(ref_logps[None], believed[None], beta)
        earned.append(sum(part / sum(parts) * reward for part, reward in zip(parts, rewards.tolist())))
    best, last = max(earned), earned[-1]
    return torch.tensor(best, dtype=torch.float64), torch.tensor(last, dtype=torch.float64)


def _path(ref_logps, paid, believed, betas) -> Tensor:
    """What is paid to the believed reward's optimum, for each beta."""
    optima = (ref_logps + believed / betas[:, None]).log_softmax(-1)
    return optima.exp() @ paid


def _best_and_last(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.max(), values[-1]


def _values_of_J(ref_logps, rewards, believed, betas) -> Tensor:
    optima = (ref_logps + believed / betas[:, None]).log_softmax(-1)
    return optima.exp() @ rewards - betas * _kl(optima, ref_logps.expand_as(optima))


PROXY = Exercise(
    number="2.4",
    function="overoptimise",
    inputs=two_rewards(),
    expected=earned_on_the_way,
    source="the true reward of the believed reward's optimum, completion by completion",
    mistakes={
        "the policy optimises the true reward: it only sees what the reward model believes": (
            lambda ref, r, b, betas: _best_and_last(_path(ref, r, r, betas))
        ),
        "the believed reward is counted: what counts is the true one": (
            lambda ref, r, b, betas: _best_and_last(_path(ref, b, b, betas))
        ),
        "true and believed reward are exchanged": (
            lambda ref, r, b, betas: _best_and_last(_path(ref, b, r, betas))
        ),
        "β multiplies the reward: π* has e^(r/β)": (
            lambda ref, r, b, betas: _best_and_last(_path(ref, r, b, 1 / betas))
        ),
        "the reference is missing: π* is π_ref, tilted": (
            lambda ref, r, b, betas: _best_and_last(_path(0 * ref, r, b, betas))
        ),
        "this is J: the penalty shapes the policy, but only the reward is asked for": (
            lambda ref, r, b, betas: _best_and_last(_values_of_J(ref, r, b, betas))
        ),
        "last and best are exchanged": lambda ref, r, b, betas: _best_and_last(_path(ref, r, b, betas))[::-1],
        "the lowest on the way: the greatest is asked for first": (
            lambda ref, r, b, betas: (lambda v: (v.min(), v[-1]))(_path(ref, r, b, betas))
        ),
        "the first β, not the best one: the greatest may lie between": (
            lambda ref, r, b, betas: (lambda v: (v[0], v[-1]))(_path(ref, r, b, betas))
        ),
        "the rewards of the most probable completion: average under the policy": (
            lambda ref, r, b, betas: _best_and_last(r[(ref + b / betas[:, None]).argmax(-1)])
        ),
        "not normalised: subtract log Z for each β": (
            lambda ref, r, b, betas: _best_and_last((ref + b / betas[:, None]).exp() @ r)
        ),
    },
)

EXERCISES = [FILTER, PRICE, OPTIMUM, PROXY]
