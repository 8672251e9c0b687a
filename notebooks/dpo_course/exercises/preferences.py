"""Notebook 1: how people choose, and the rewards that explain it."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import SINGLE, Exercise, Strain, vector

# ------------------------------------------------------------------- 1.1 the probability of a preference


@st.composite
def two_rewards(draw):
    """Rewards of the two completions of B comparisons."""
    B = draw(st.integers(1, 3))
    return {"first": draw(vector(B, -3, 3)), "second": draw(vector(B, -3, 3))}


def share_of_strength(first, second) -> Tensor:
    """Each comparison by itself in Python's own numbers: e^first in units of both strengths."""
    shares = []
    for one, other in zip(first.tolist(), second.tolist()):
        strength, rival = math.exp(one), math.exp(other)
        shares.append(strength / (strength + rival))
    return torch.tensor(shares, dtype=torch.float64)


PREFERENCE = Exercise(
    number="1.1",
    function="bradley_terry",
    inputs=two_rewards(),
    expected=share_of_strength,
    source="the first completion's share of the two strengths e^r",
    mistakes={
        "first and second are exchanged": lambda first, second: torch.sigmoid(second - first),
        "rewards are no strengths, they may be negative: strengths are e^r": (
            lambda first, second: first / (first + second)
        ),
        "these are the odds e^(r₁ - r₂); a probability is odds / (1 + odds)": (
            lambda first, second: (first - second).exp()
        ),
        "this is the difference of rewards; σ turns it into a probability": (
            lambda first, second: first - second
        ),
        "the rewards are added: it is their difference that matters": (
            lambda first, second: torch.sigmoid(first + second)
        ),
        "this is the logarithm of the probability": lambda first, second: F.logsigmoid(first - second),
        "the better one does not always win: people contradict themselves": (
            lambda first, second: (first > second).double()
        ),
        "the denominator sums over the whole batch: each comparison has one of its own": (
            lambda first, second: first.exp() / (first.exp() + second.exp()).sum()
        ),
    },
)


# ------------------------------------------------------------- 1.2 the loss of rewards, 1.3 its gradient


@st.composite
def rewards_and_wins(draw):
    """Rewards of Y completions, and how often each was chosen over each other; at least one comparison."""
    Y = draw(st.integers(2, 4))
    pairs = Y * (Y - 1)
    counts = draw(st.lists(st.integers(0, 4), min_size=pairs, max_size=pairs).filter(any))
    wins = torch.zeros(Y, Y, dtype=torch.float64)
    wins[~torch.eye(Y, dtype=torch.bool)] = torch.tensor(counts, dtype=torch.float64)
    return {"rewards": draw(vector(Y, -3, 3)), "wins": wins}


def _choices(wins: Tensor) -> list[tuple[int, int]]:
    """(winner, loser) of every single comparison."""
    return [
        (i, j)
        for i, row in enumerate(wins.tolist())
        for j, count in enumerate(row)
        for _ in range(int(count))
    ]


def minus_log_of_product(rewards, wins) -> Tensor:
    """Multiply the probabilities of all choices; then minus the logarithm, divided by their number."""
    strength, likelihood = [math.exp(r) for r in rewards.tolist()], 1.0
    for winner, loser in _choices(wins):
        likelihood *= strength[winner] / (strength[winner] + strength[loser])
    return torch.tensor(-math.log(likelihood) / len(_choices(wins)), dtype=torch.float64)


def _log_chances(rewards: Tensor) -> Tensor:
    return F.logsigmoid(rewards[:, None] - rewards[None, :])


LOSS = Exercise(
    number="1.2",
    function="reward_loss",
    inputs=rewards_and_wins(),
    expected=minus_log_of_product,
    source="-log of the product of the probabilities of all choices, divided by their number",
    strain=Strain(
        {
            "rewards": torch.tensor([0.0, 800.0], dtype=torch.float64),
            "wins": torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
        },
        torch.tensor(800.0, dtype=torch.float64),
    ),
    mistakes={
        "winners and losers are exchanged: wins[i, j] counts how often i was chosen over j": (
            lambda rewards, wins: -(wins.T * _log_chances(rewards)).sum() / wins.sum()
        ),
        "the minus sign is missing: this is a log-likelihood, and a loss is minimised": (
            lambda rewards, wins: (wins * _log_chances(rewards)).sum() / wins.sum()
        ),
        "the logarithm is missing: probabilities of independent choices multiply, their logarithms add": (
            lambda rewards, wins: -(wins * _log_chances(rewards).exp()).sum() / wins.sum()
        ),
        "the logarithm of the average: average the logarithms": (
            lambda rewards, wins: -((wins * _log_chances(rewards).exp()).sum() / wins.sum()).log()
        ),
        "the sum over all comparisons: divide by their number": (
            lambda rewards, wins: -(wins * _log_chances(rewards)).sum()
        ),
        "divided by the number of cells of the table: divide by the number of comparisons": (
            lambda rewards, wins: -(wins * _log_chances(rewards)).mean()
        ),
        "every cell counts once: weight it by how often it happened": (
            lambda rewards, wins: -((wins > 0) * _log_chances(rewards)).sum() / (wins > 0).sum()
        ),
        "half of the table is missing: j chosen over i counts as well as i over j": (
            lambda rewards, wins: -(wins.triu() * _log_chances(rewards)).sum() / wins.sum()
        ),
        "softmax over all completions: a comparison is between two": (
            lambda rewards, wins: -(wins.sum(-1) * rewards.log_softmax(-1)).sum() / wins.sum()
        ),
    },
)


def autograd_slope(rewards, wins) -> Tensor:
    """Autograd's gradient of the average of log(1 + e^-(lead of the winner)), choice after choice."""
    rewards = rewards.clone().requires_grad_()
    losses = [torch.log1p(torch.exp(rewards[loser] - rewards[winner])) for winner, loser in _choices(wins)]
    return torch.autograd.grad(sum(losses) / len(losses), rewards)[0]


def _excess(rewards: Tensor, wins: Tensor) -> Tensor:
    """Wins expected under the rewards, less those observed."""
    return ((wins + wins.T) * _log_chances(rewards).exp() - wins).sum(-1)


def _rate_excess(rewards: Tensor, wins: Tensor) -> Tensor:
    games = wins + wins.T
    met = (games > 0).double()
    return (met * _log_chances(rewards).exp() - wins / games.clamp(min=1)).sum(-1)


GRADIENT = Exercise(
    number="1.3",
    function="reward_gradient",
    inputs=rewards_and_wins(),
    expected=autograd_slope,
    source="autograd's gradient of the loss, written choice by choice",
    mistakes={
        "the sign is reversed: with more wins observed than expected, the slope is negative": (
            lambda rewards, wins: -_excess(rewards, wins) / wins.sum()
        ),
        "not divided by the number of comparisons": _excess,
        "the games that were lost are missing: expected wins need all games, wins + wins.T": (
            lambda rewards, wins: (wins * _log_chances(rewards).exp() - wins).sum(-1) / wins.sum()
        ),
        "losses are subtracted from the expected wins: rows of wins are wins, columns are losses": (
            lambda rewards, wins: (
                ((wins + wins.T) * _log_chances(rewards).exp() - wins.T).sum(-1) / wins.sum()
            )
        ),
        "these are the expected wins: subtract the observed ones": (
            lambda rewards, wins: ((wins + wins.T) * _log_chances(rewards).exp()).sum(-1) / wins.sum()
        ),
        "the rewards are not looked at: who beats whom how often depends on them": (
            lambda rewards, wins: _excess(torch.zeros_like(rewards), wins) / wins.sum()
        ),
        "every comparison is counted twice: wins + wins.T sums to two for each": (
            lambda rewards, wins: _excess(rewards, wins) / (wins + wins.T).sum()
        ),
        "rates instead of counts: a pair counts as often as it was compared": (
            lambda rewards, wins: _rate_excess(rewards, wins) / wins.sum()
        ),
        "each divided by its own number of games: divide all by the number of comparisons": (
            lambda rewards, wins: _excess(rewards, wins) / (wins + wins.T).sum(-1).clamp(min=1)
        ),
    },
)


# ------------------------------------------------------------------------- 1.4 rewards from preferences


@st.composite
def preference_table(draw):
    """Preferences of Y completions of strengths 1 to 9, so that every probability is a small fraction."""
    Y = draw(st.integers(2, 4))
    strengths = draw(st.lists(st.integers(1, 9), min_size=Y, max_size=Y))
    chances = [[i / (i + j) for j in strengths] for i in strengths]
    return {"preferences": torch.tensor(chances, dtype=torch.float64)}


def log_odds_against_the_first(preferences) -> Tensor:
    """One of the many: the log-odds of each completion against the first."""
    rows = preferences.tolist()
    return torch.tensor([math.log(row[0] / rows[0][y]) for y, row in enumerate(rows)], dtype=torch.float64)


def unexplained(answer, preferences) -> str | None:
    """The first preference that σ of the difference of rewards does not give back."""
    Y = len(preferences)
    try:
        rewards = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return f"it should be a tensor of {Y} rewards"
    if rewards.shape != (Y,):
        return f"the shape should be {(Y,)}, yours is {tuple(rewards.shape)}"
    if not rewards.isfinite().all():
        return "every reward should be a finite number"
    for i, row in enumerate(preferences.tolist()):
        for j, wanted in enumerate(row):
            lead = (rewards[i] - rewards[j]).item()
            chance = 1 / (1 + math.exp(-lead)) if abs(lead) < 700 else float(lead > 0)
            if not abs(chance - wanted) <= SINGLE:
                return f"under these rewards preferences[{i}, {j}] is {chance:.5g}, it should be {wanted:.5g}"
    return None


def _log_odds(preferences: Tensor) -> Tensor:
    return preferences.log() - preferences.T.log()


RECOVERY = Exercise(
    number="1.4",
    function="recover_rewards",
    inputs=preference_table(),
    expected=log_odds_against_the_first,
    source="the preferences: σ of the differences of your rewards gives them back",
    complaint=unexplained,
    mistakes={
        "the sign is reversed: row i has the chances that i wins, column i that it loses": (
            lambda preferences: _log_odds(preferences)[0]
        ),
        "the logarithm of a probability: rewards are logarithms of odds, log p - log(1 - p)": (
            lambda preferences: preferences[:, 0].log()
        ),
        "these are odds: rewards are their logarithms": (
            lambda preferences: preferences[:, 0] / preferences[0, :]
        ),
        "these are probabilities: rewards are logarithms of odds": lambda preferences: preferences[:, 0],
        "average chances of winning: rewards are log-odds, and those may be averaged": (
            lambda preferences: preferences.mean(-1)
        ),
        "the log-odds of an average: take the average of the log-odds": (
            lambda preferences: torch.logit(preferences.mean(-1))
        ),
        "the sum of a row's log-odds: take their mean": lambda preferences: _log_odds(preferences).sum(-1),
        "the mean over the others is too large: divide by Y, for the diagonal's log-odds of 0 count too": (
            lambda preferences: _log_odds(preferences).sum(-1) / (len(preferences) - 1)
        ),
    },
)

EXERCISES = [PREFERENCE, LOSS, GRADIENT, RECOVERY]
