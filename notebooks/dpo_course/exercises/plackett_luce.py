"""Notebook 5: rankings of more than two."""

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


# ------------------------------------------------------------------------ 5.2 plackett_luce_dpo_loss


@st.composite
def ranked_logps(draw):
    """Log-probabilities of B rankings of K completions under policy and reference, and beta."""
    B, K = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    return {
        "policy_logps": draw(table(B, K, -3, 0)),
        "ref_logps": draw(table(B, K, -3, 0)),
        "beta": draw(betas()),
    }


def shares_of_what_is_left(policy_logps, ref_logps, beta) -> Tensor:
    """Each ranking by itself in Python's own numbers: strengths (pi / pi_ref)^beta, the last place first."""
    losses = []
    for policy, reference in zip(policy_logps.tolist(), ref_logps.tolist()):
        strengths = [(math.exp(p) / math.exp(q)) ** beta for p, q in zip(policy, reference)]
        left, loss = 0.0, 0.0
        for strength in reversed(strengths):
            left += strength
            loss += math.log(left) - math.log(strength)
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def _loss(scores: Tensor) -> Tensor:
    return (_left(scores) - scores).sum(-1)


RANKING_LOSS = Exercise(
    number="5.2",
    function="plackett_luce_dpo_loss",
    inputs=ranked_logps(),
    expected=shares_of_what_is_left,
    source="strengths (π/π_ref)^β, and -log of each one's share of those still there",
    mistakes={
        "the reference is missing: implicit rewards are β times log-ratios": (
            lambda policy, ref, beta: _loss(beta * policy)
        ),
        "β is missing": lambda policy, ref, beta: _loss(policy - ref),
        "β is missing on the reference": lambda policy, ref, beta: _loss(beta * policy - ref),
        "off by β: did you scale the loss instead of the rewards?": (
            lambda policy, ref, beta: beta * _loss(policy - ref)
        ),
        "the rewards are divided by β: r = β log(π/π_ref)": (
            lambda policy, ref, beta: _loss((policy - ref) / beta)
        ),
        "the ratio is upside down: r = β log(π/π_ref)": lambda policy, ref, beta: _loss(
            beta * (ref - policy)
        ),
        "the minus sign is missing: this is a log-likelihood, and a loss is minimised": (
            lambda policy, ref, beta: -_loss(beta * (policy - ref))
        ),
        "mean over the batch: return one loss for each ranking": (
            lambda policy, ref, beta: _loss(beta * (policy - ref)).mean()
        ),
        "the sum of the DPO losses of all pairs is another loss, for pairs that are independent": (
            lambda policy, ref, beta: -_pairwise(beta * (policy - ref))
        ),
    },
)


# ------------------------------------------------------------------------------------------- 5.3 rank


@st.composite
def impressions(draw):
    """Rewards of K completions in tenths, and N rows of noise whose hundredths keep impressions apart."""
    K, N = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    noise = draw(table(N, K, -2, 5)) + torch.arange(K) / 100
    return {"rewards": draw(vector(K, -3, 3)), "gumbel_noise": noise}


def best_of_those_left(rewards, gumbel_noise) -> Tensor:
    """Row by row in Python's own numbers: the best impression of those left, again and again."""
    orders = []
    for noise in gumbel_noise.tolist():
        impression = {y: r + g for y, (r, g) in enumerate(zip(rewards.tolist(), noise))}
        orders.append([])
        while impression:
            orders[-1].append(max(impression, key=impression.get))
            del impression[orders[-1][-1]]
    return torch.tensor(orders)


RANK = Exercise(
    number="5.3",
    function="rank",
    inputs=impressions(),
    expected=best_of_those_left,
    source="the best impression of those left, again and again",
    mistakes={
        "worst first: place 1 belongs to the largest impression": (
            lambda rewards, noise: (rewards + noise).argsort(-1)
        ),
        "these are the places of the completions; asked for are the completions, by place": (
            lambda rewards, noise: (rewards + noise).argsort(-1, descending=True).argsort(-1)
        ),
        "these are the impressions, sorted; asked for are the numbers of the completions": (
            lambda rewards, noise: (rewards + noise).sort(-1, descending=True).values
        ),
        "the noise is missing: every row comes out in the same order": (
            lambda rewards, noise: rewards.argsort(-1, descending=True).expand(noise.shape)
        ),
        "the rewards are missing: every order is as likely as any other": (
            lambda rewards, noise: noise.argsort(-1, descending=True)
        ),
        "the noise is subtracted: Gumbel noise is lopsided, and its sign matters": (
            lambda rewards, noise: (rewards - noise).argsort(-1, descending=True)
        ),
        "noise is added to rewards, which are logarithms of strengths; not to the strengths": (
            lambda rewards, noise: (rewards.exp() + noise).argsort(-1, descending=True)
        ),
        "sorted along the wrong axis: each row is a ranking of its own": (
            lambda rewards, noise: (rewards + noise).argsort(0, descending=True)
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

EXERCISES = [LOGPROB, RANKING_LOSS, RANK, PREFERENCE]
