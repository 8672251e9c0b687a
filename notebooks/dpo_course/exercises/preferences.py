"""Notebook 1: how people choose, and the rewards that explain it."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import SINGLE, Exercise, Strain, vector

# ------------------------------------------------------------------------- 1.1 the odds of a chain

CHANCES = st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3, 0.2, 0.1])


@st.composite
def two_links(draw):
    """Chances of B first completions against a second one, and of that against a third."""
    rows = draw(st.lists(st.tuples(CHANCES, CHANCES), min_size=1, max_size=3))
    first, second = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    return {"first_over_second": first, "second_over_third": second}


def share_of_strength(first_over_second, second_over_third) -> Tensor:
    """Each chain by itself, in strengths: 1 for the third, and for the others what gives their chances."""
    shares = []
    for p, q in zip(first_over_second.tolist(), second_over_third.tolist()):
        second = q / (1 - q)
        first = second * p / (1 - p)
        shares.append(first / (first + 1))
    return torch.tensor(shares, dtype=torch.float64)


CHAIN = Exercise(
    number="1.1",
    function="chained",
    inputs=two_links(),
    expected=share_of_strength,
    source="the first completion's share of strengths that give both chances",
    mistakes={
        "the chances are multiplied: it is odds that multiply, p / (1 - p)": lambda p, q: p * q,
        "the average of the chances: the first is further ahead of the third than of the second": (
            lambda p, q: (p + q) / 2
        ),
        "these are odds; a probability is odds / (1 + odds)": lambda p, q: p / (1 - p) * q / (1 - q),
        "these are log-odds; σ turns them into a probability": lambda p, q: torch.logit(p) + torch.logit(q),
        "log-probabilities are added: it is log-odds that add": lambda p, q: torch.sigmoid(p.log() + q.log()),
        "σ of the sum of the chances: σ takes log-odds, log p - log(1 - p)": (
            lambda p, q: torch.sigmoid(p + q)
        ),
        "this is the third's chance against the first": (
            lambda p, q: torch.sigmoid(-torch.logit(p) - torch.logit(q))
        ),
        "the log-odds are subtracted: both links lead downwards, so they add": (
            lambda p, q: torch.sigmoid(torch.logit(p) - torch.logit(q))
        ),
        "normal quantiles are added, which is Thurstone's model; Bradley–Terry's curve is σ": (
            lambda p, q: torch.special.ndtr(torch.special.ndtri(p) + torch.special.ndtri(q))
        ),
        "the log-odds are averaged: they add": (
            lambda p, q: torch.sigmoid((torch.logit(p) + torch.logit(q)) / 2)
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
        "in bits: log2 where the natural logarithm is meant": (
            lambda rewards, wins: -(wins * _log_chances(rewards)).sum() / wins.sum() / math.log(2)
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

# ----------------------------------------------------------------------- 1.5 one reward for two groups


@st.composite
def groups_of_people(draw):
    """Shares of G groups of people, and how much further the first completion is ahead in each."""
    G = draw(st.integers(2, 3))
    parts = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=G, max_size=G)), dtype=torch.float64)
    return {"shares": parts / parts.sum(), "gaps": draw(vector(G, -3, 3))}


def least_loss_of_the_pool(shares, gaps) -> Tensor:
    """The difference of rewards at which the slope of the pool's loss is zero, by halving an interval."""
    people = list(zip(shares.tolist(), gaps.tolist()))

    def slope(
        gap: float,
    ) -> float:  # in each group: wins expected under the pool's reward, less observed ones
        return sum(share / (1 + math.exp(-gap)) - share / (1 + math.exp(-own)) for share, own in people)

    low, high = -4.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return torch.tensor(low, dtype=torch.float64)


def _wins(shares: Tensor, gaps: Tensor) -> Tensor:
    return shares @ torch.sigmoid(gaps)


POOL = Exercise(
    number="1.5",
    function="pooled_gap",
    inputs=groups_of_people(),
    expected=least_loss_of_the_pool,
    source="the difference of rewards at which the slope of the pool's loss is zero",
    mistakes={
        "the average of the groups' rewards: it is their choices that are pooled": lambda s, g: s @ g,
        "the reward of the largest group: the others choose as well": lambda s, g: g[s.argmax()],
        "this is the share that chooses the first; the reward is its log-odds": _wins,
        "σ of the average reward: average the probabilities": lambda s, g: torch.sigmoid(s @ g),
        "the logarithm of the share; rewards are logarithms of odds, log p - log(1 - p)": (
            lambda s, g: _wins(s, g).log()
        ),
        "the average of the groups' strengths e^r: average the probabilities": (
            lambda s, g: (s @ g.exp()).log()
        ),
        "every group counts alike: weight each by its share": (
            lambda s, g: torch.logit(torch.sigmoid(g).mean())
        ),
        "the difference the other way round": lambda s, g: -torch.logit(_wins(s, g)),
        "everyone always chooses what they prefer: people contradict themselves within a group too": (
            lambda s, g: torch.logit((s @ ((g.sign() + 1) / 2)).clamp(1e-9, 1 - 1e-9))
        ),
    },
)

EXERCISES = [CHAIN, LOSS, GRADIENT, RECOVERY, POOL]
