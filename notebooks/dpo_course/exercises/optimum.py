"""Notebook 2: the KL-regularised objective and its optimum."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import Exercise, Strain, betas, log_distribution, table

# Where exponentials leave the range of float64: a long completion, and rewards of hundreds of nats.
LONG_COMPLETIONS = {
    "ref_logps": torch.tensor([[-800.0, 0.0]], dtype=torch.float64),
    "rewards": torch.zeros(1, 2, dtype=torch.float64),
    "beta": 1.0,
}
LARGE_REWARDS = {
    "ref_logps": torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(),
    "rewards": torch.tensor([[800.0, 0.0]], dtype=torch.float64),
    "beta": 1.0,
}

# --------------------------------------------------------------------------------- 2.1 the KL divergence


@st.composite
def two_policies(draw):
    """Two policies for X prompts; the first never gives some completions, the second gives them all."""
    X, Y = draw(st.integers(1, 2)), draw(st.integers(2, 3))
    row = st.lists(st.integers(0, 5), min_size=Y, max_size=Y).filter(any)
    parts = torch.tensor(draw(st.lists(row, min_size=X, max_size=X)), dtype=torch.float64)
    logps = (parts / parts.sum(-1, keepdim=True)).log()
    return {"logps": logps, "other_logps": draw(log_distribution(X, Y))}


def average_log_ratio(logps, other_logps) -> Tensor:
    """Over the completions that the first policy gives, one after the other, in Python's own numbers."""
    divergences = []
    for row, other_row in zip(logps.tolist(), other_logps.tolist()):
        given = [(math.exp(a), math.exp(b)) for a, b in zip(row, other_row) if a > -math.inf]
        divergences.append(sum(p * math.log(p / q) for p, q in given))
    return torch.tensor(divergences, dtype=torch.float64)


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    """(..., Y) -> (...,), where the first may be -inf."""
    return (logps.exp() * torch.where(logps > -math.inf, logps - other_logps, 0)).sum(-1)


def _cross_entropy(logps: Tensor, other_logps: Tensor) -> Tensor:
    return -(logps.exp() * other_logps).sum(-1)


KL = Exercise(
    number="2.1",
    function="kl",
    inputs=two_policies(),
    expected=average_log_ratio,
    source="the average log-ratio over the completions that the first policy gives",
    mistakes={
        "NaN where π(y) = 0: there 0 · log 0 counts as 0": (
            lambda logps, other_logps: (logps.exp() * (logps - other_logps)).sum(-1)
        ),
        "the two policies are exchanged: average under the first, divide by the second": (
            lambda logps, other_logps: (other_logps.exp() * (other_logps - logps)).sum(-1)
        ),
        "the ratio is upside down: log π - log π'": lambda logps, other_logps: -_kl(logps, other_logps),
        "averaged under the wrong policy: the weights are those of the first": (
            lambda logps, other_logps: (
                other_logps.exp() * torch.where(logps > -math.inf, logps - other_logps, 0)
            ).sum(-1)
        ),
        "each log-ratio counts alike: weight it by π(y)": (
            lambda logps, other_logps: torch.where(logps > -math.inf, logps - other_logps, 0).sum(-1)
        ),
        "this is the cross-entropy: the term log π is missing": _cross_entropy,
        "the mean over completions: they are already weighted by π(y), so sum": (
            lambda logps, other_logps: _kl(logps, other_logps) / logps.shape[-1]
        ),
        "summed over all prompts: return one divergence for each": (
            lambda logps, other_logps: _kl(logps, other_logps).sum()
        ),
    },
)


# ------------------------------------------------------------------------------------ 2.2 the objective


@st.composite
def policy_in_a_world(draw):
    """A policy, a reference and rewards for X prompts with Y completions, and beta."""
    X, Y = draw(st.integers(1, 2)), draw(st.integers(2, 3))
    return {
        "logps": draw(log_distribution(X, Y)),
        "ref_logps": draw(log_distribution(X, Y)),
        "rewards": draw(table(X, Y, -3, 3)),
        "beta": draw(betas()),
    }


def average_of_penalised_reward(logps, ref_logps, rewards, beta) -> Tensor:
    """Every completion is paid its reward less a penalty of beta times its log-ratio [D3.2]."""
    values = []
    for row, ref_row, reward_row in zip(logps.tolist(), ref_logps.tolist(), rewards.tolist()):
        value = 0.0
        for logp, ref_logp, reward in zip(row, ref_row, reward_row):
            p, ref = math.exp(logp), math.exp(ref_logp)
            value += p * (reward - beta * math.log(p / ref))
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _expected(logps: Tensor, rewards: Tensor) -> Tensor:
    return (logps.exp() * rewards).sum(-1)


OBJECTIVE = Exercise(
    number="2.2",
    function="objective",
    inputs=policy_in_a_world(),
    expected=average_of_penalised_reward,
    source="the average over completions of reward less β log(π/π_ref), one after the other",
    mistakes={
        "the divergence is added: moving away from the reference costs": (
            lambda logps, ref_logps, rewards, beta: _expected(logps, rewards) + beta * _kl(logps, ref_logps)
        ),
        "β is missing": (
            lambda logps, ref_logps, rewards, beta: _expected(logps, rewards) - _kl(logps, ref_logps)
        ),
        "β multiplies the reward as well: it is the price of the divergence only": (
            lambda logps, ref_logps, rewards, beta: beta * (_expected(logps, rewards) - _kl(logps, ref_logps))
        ),
        "β divides: each nat of divergence costs β": (
            lambda logps, ref_logps, rewards, beta: _expected(logps, rewards) - _kl(logps, ref_logps) / beta
        ),
        "the divergence is taken from the reference: it is KL(π‖π_ref)": (
            lambda logps, ref_logps, rewards, beta: _expected(logps, rewards) - beta * _kl(ref_logps, logps)
        ),
        "the reward is averaged under the reference: average it under π": (
            lambda logps, ref_logps, rewards, beta: (
                _expected(ref_logps, rewards) - beta * _kl(logps, ref_logps)
            )
        ),
        "the rewards are added up: average them under π": (
            lambda logps, ref_logps, rewards, beta: rewards.sum(-1) - beta * _kl(logps, ref_logps)
        ),
        "π weights the divergence twice: it is an average already": (
            lambda logps, ref_logps, rewards, beta: (
                _expected(logps, rewards) - beta * ((2 * logps).exp() * (logps - ref_logps)).sum(-1)
            )
        ),
        "one number for all prompts: return one for each": (
            lambda logps, ref_logps, rewards, beta: (
                _expected(logps, rewards) - beta * _kl(logps, ref_logps)
            ).mean()
        ),
    },
)


# ----------------------------------------------------------------------------- 2.3 its optimum, 2.4 its value


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


def value_at_the_optimum(ref_logps, rewards, beta) -> Tensor:
    """J of pi*: its reward less its penalty, completion by completion [D7.1]."""
    return average_of_penalised_reward(shares_of_tilted(ref_logps, rewards, beta), ref_logps, rewards, beta)


def _soft(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return beta * (ref_logps + rewards / beta).logsumexp(-1)


VALUE = Exercise(
    number="2.4",
    function="soft_value",
    inputs=world_and_beta(),
    expected=value_at_the_optimum,
    source="the objective of π*: its reward less β times its divergence, completion by completion",
    strain=Strain(LARGE_REWARDS, torch.tensor([800 - math.log(2)], dtype=torch.float64)),
    mistakes={
        "this is log Z: multiply by β": (
            lambda ref_logps, rewards, beta: (ref_logps + rewards / beta).logsumexp(-1)
        ),
        "this is βZ: the logarithm is missing": (
            lambda ref_logps, rewards, beta: beta * (ref_logps + rewards / beta).exp().sum(-1)
        ),
        "the reference is missing: Z averages e^(r/β) under π_ref": (
            lambda ref_logps, rewards, beta: beta * (rewards / beta).logsumexp(-1)
        ),
        "β multiplies in the exponent: Z has e^(r/β)": (
            lambda ref_logps, rewards, beta: beta * (ref_logps + beta * rewards).logsumexp(-1)
        ),
        "the sign is reversed": lambda ref_logps, rewards, beta: -_soft(ref_logps, rewards, beta),
        "the average reward of the reference: that is what doing nothing is worth": (
            lambda ref_logps, rewards, beta: _expected(ref_logps, rewards)
        ),
        "the average reward of π*: subtract what its divergence costs": (
            lambda ref_logps, rewards, beta: _expected((ref_logps + rewards / beta).log_softmax(-1), rewards)
        ),
        "the largest reward: the soft value is that only as β goes to 0": (
            lambda ref_logps, rewards, beta: rewards.amax(-1)
        ),
        "one number for all prompts: return one for each": (
            lambda ref_logps, rewards, beta: _soft(ref_logps, rewards, beta).sum()
        ),
    },
)

EXERCISES = [KL, OBJECTIVE, OPTIMUM, VALUE]
