"""Notebook 6: a completion is a sequence of tokens."""

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import optimal_logps, rlhf_objective
from dpo_minimal.bench.exercises import Exercise, betas, log_distribution, table

# ------------------------------------------------------------------------------- 6.1 completion_mask


def _two_lengths(T: int) -> st.SearchStrategy[tuple[int, int]]:
    """Of a prompt, and of prompt and completion together: neither is empty, at most T tokens in all."""
    return st.sampled_from([(before, length) for length in range(2, T + 1) for before in range(1, length)])


@st.composite
def rows_of_tokens(draw):
    """Lengths of B rows, and the width of the batch, which may exceed them all."""
    T = draw(st.integers(3, 7))
    before, lengths = zip(*draw(st.lists(_two_lengths(T), min_size=1, max_size=3)))
    return {"prompt_lengths": torch.tensor(before), "lengths": torch.tensor(lengths), "T": T}


def completion_or_not(prompt_lengths, lengths, T) -> Tensor:
    """Each row laid out as words; a token counts where the word is "completion"."""
    rows = []
    for before, length in zip(prompt_lengths.tolist(), lengths.tolist()):
        kinds = ["prompt"] * before + ["completion"] * (length - before) + ["padding"] * (T - length)
        rows.append([kind == "completion" for kind in kinds])
    return torch.tensor(rows)


def _between(low, high, T: int) -> Tensor:
    """True at the positions from low up to but not including high."""
    position = torch.arange(T)
    return (position >= low[:, None]) & (position < high[:, None])


MASK = Exercise(
    number="6.1",
    function="completion_mask",
    inputs=rows_of_tokens(),
    expected=completion_or_not,
    source="rows laid out token by token, each called prompt, completion or padding",
    mistakes={
        "the prompt is included: it is a condition, the policy did not choose it": (
            lambda before, length, T: _between(0 * before, length, T)
        ),
        "the padding is included: the completion ends at lengths": (
            lambda before, length, T: _between(before, 0 * length + T, T)
        ),
        "the first completion token is left out: it stands at position prompt_lengths, counting from 0": (
            lambda before, length, T: _between(before + 1, length, T)
        ),
        "the last token is left out: end-of-text is a decision like any other": (
            lambda before, length, T: _between(before, length - 1, T)
        ),
        "one position too far to the right: positions count from 0": (
            lambda before, length, T: _between(before + 1, length + 1, T)
        ),
        "one position too far to the left: this is where the predictions stand, not the tokens": (
            lambda before, length, T: _between(before - 1, length - 1, T)
        ),
        "one token too many at the end: a row's last token stands at position lengths - 1": (
            lambda before, length, T: _between(before, length + 1, T)
        ),
        "lengths holds prompt and completion together; it was read as the completion's alone": (
            lambda before, length, T: _between(before, before + length, T)
        ),
        "the opposite: this is True where a token does not count": (
            lambda before, length, T: ~_between(before, length, T)
        ),
        "rows and columns are exchanged: the shape is (B, T)": (
            lambda before, length, T: _between(before, length, T).T
        ),
        "as wide as the longest row; the batch may be wider, T says how wide": (
            lambda before, length, T: _between(before, length, int(length.max()))
        ),
    },
)


# ------------------------------------------------------------------------------ 6.2 sequence_logps


@st.composite
def scored_rows(draw):
    """Logits of B rows of T tokens, right-padded and of unequal lengths; padding is any token."""
    T, V = draw(st.integers(3, 4)), draw(st.integers(2, 3))
    numbers = st.sampled_from(list(itertools.product([0.0, 1.0, -1.0, 0.5, 2.0], repeat=V)))
    positions = st.lists(st.tuples(numbers, st.integers(0, V - 1)), min_size=T, max_size=T)
    rows, two_lengths = zip(*draw(st.lists(st.tuples(positions, _two_lengths(T)), min_size=1, max_size=3)))
    before, lengths = torch.tensor(two_lengths).T
    logits, ids = zip(*(zip(*row) for row in rows))
    return {
        "logits": torch.tensor(logits, dtype=torch.float64),
        "ids": torch.tensor(ids),
        "prompt_lengths": before,
        "lengths": lengths,
    }


def token_after_token(logits, ids, prompt_lengths, lengths) -> Tensor:
    """Each row by itself: multiply the chances of its completion tokens, one softmax at a time."""
    totals = []
    for row, tokens in enumerate(ids.tolist()):
        chance = 1.0
        for place in range(int(prompt_lengths[row]), int(lengths[row])):
            strengths = [math.exp(number) for number in logits[row, place - 1].tolist()]
            chance *= strengths[tokens[place]] / sum(strengths)
        totals.append(math.log(chance))
    return torch.tensor(totals, dtype=torch.float64)


def _per_token(logits, ids) -> Tensor:
    """(B, T) log-probability of each token given those before it; 0 for the first, which nothing predicts."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(logps, (1, 0))


def _summed(logits, ids, low, high) -> Tensor:
    return (_per_token(logits, ids) * _between(low, high, ids.shape[1])).sum(-1)


def _right(logits, ids, before, length) -> Tensor:
    return _summed(logits, ids, before, length)


def _not_shifted(logits, ids, before, length) -> Tensor:
    logps = logits.log_softmax(-1).gather(-1, ids[:, :, None]).squeeze(-1)
    return (logps * _between(before, length, ids.shape[1])).sum(-1)


def _mask_not_shifted(logits, ids, before, length) -> Tensor:
    return (_per_token(logits, ids)[:, 1:] * _between(before, length, ids.shape[1])[:, :-1]).sum(-1)


def _of_numbers(numbers, ids, before, length) -> Tensor:
    """A sum over completion tokens of something else than log-probabilities."""
    picked = numbers[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (picked * _between(before, length, ids.shape[1])[:, 1:]).sum(-1)


SEQUENCE = Exercise(
    number="6.2",
    function="sequence_logps",
    inputs=scored_rows(),
    expected=token_after_token,
    source="a product of chances, row by row and token by token, in plain numbers",
    mistakes={
        "mean over the completion's tokens: log π(y|x) is their sum": (
            lambda logits, ids, before, length: _right(logits, ids, before, length) / (length - before)
        ),
        "divided by T: log π(y|x) is a sum, not a mean": (
            lambda logits, ids, before, length: _right(logits, ids, before, length) / ids.shape[1]
        ),
        "log-probs of the prompt are included: the sum starts at position prompt_lengths": (
            lambda logits, ids, before, length: _summed(logits, ids, 0 * before, length)
        ),
        "padding is included: the sum ends before position lengths": (
            lambda logits, ids, before, length: _summed(logits, ids, before, 0 * length + ids.shape[1])
        ),
        "the whole row is summed: neither prompt nor padding belongs to the completion": (
            lambda logits, ids, before, length: _per_token(logits, ids).sum(-1)
        ),
        "off by one: logits at position t predict token t + 1, not token t": _not_shifted,
        "the mask is not shifted with the tokens: row t of logits[:, :-1] belongs to token t + 1": (
            _mask_not_shifted
        ),
        "the last token is left out: end-of-text is a decision like any other": (
            lambda logits, ids, before, length: _summed(logits, ids, before, length - 1)
        ),
        "the first completion token is left out: the prompt's last position predicts it": (
            lambda logits, ids, before, length: _summed(logits, ids, before + 1, length)
        ),
        "one token too many at the end: a row's last token stands at position lengths - 1": (
            lambda logits, ids, before, length: _summed(logits, ids, before, length + 1)
        ),
        "raw logits: log_softmax makes log-probabilities of them": _of_numbers,
        "probabilities are summed: take their logarithms first": (
            lambda logits, ids, before, length: _of_numbers(logits.softmax(-1), ids, before, length)
        ),
        "softmax over positions: it goes over the vocabulary, the last axis": (
            lambda logits, ids, before, length: _of_numbers(logits.log_softmax(1), ids, before, length)
        ),
        "this is π(y|x); return its logarithm": (
            lambda logits, ids, before, length: _right(logits, ids, before, length).exp()
        ),
        "the sign is reversed: this is the cross-entropy, a log-probability is not positive": (
            lambda logits, ids, before, length: -_right(logits, ids, before, length)
        ),
        "one number for the whole batch: return one for each row": (
            lambda logits, ids, before, length: _right(logits, ids, before, length).sum()
        ),
    },
    central=True,
)


# --------------------------------------------------------------------------- 6.3 next_token_logps


@st.composite
def two_token_policy(draw):
    """Log-probabilities of all completions of two tokens: row the first token, column the second."""
    V = draw(st.integers(2, 4))
    return {"logps": draw(log_distribution(V * V)).view(V, V)}


def counted_prefixes(logps) -> tuple[Tensor, Tensor]:
    """Add up the completions that begin with each first token, then take shares, in plain numbers."""
    rows = [[math.exp(number) for number in row] for row in logps.tolist()]
    first = torch.tensor([math.log(sum(row)) for row in rows], dtype=torch.float64)
    second = [[math.log(entry / sum(row)) for entry in row] for row in rows]
    return first, torch.tensor(second, dtype=torch.float64)


NEXT = Exercise(
    number="6.3",
    function="next_token_logps",
    inputs=two_token_policy(),
    expected=counted_prefixes,
    source="shares of the completions that begin alike",
    mistakes={
        "logarithms are summed: a first token's probability is a sum of probabilities": (
            lambda logps: (logps.sum(-1), logps.log_softmax(-1))
        ),
        "sum where logsumexp is needed: add up probabilities, then take the logarithm": (
            lambda logps: (logps.sum(-1), logps - logps.sum(-1, keepdim=True))
        ),
        "an axis is lost: logps - first takes first[b] off [a, b]; first[:, None] stays in its row": (
            lambda logps: (logps.logsumexp(-1), logps - logps.logsumexp(-1))
        ),
        "the axes are exchanged: the row is the first token": (
            lambda logps: (logps.logsumexp(0), logps.log_softmax(0))
        ),
        "the second is still joint: divide by the probability of the first token": (
            lambda logps: (logps.logsumexp(-1), logps)
        ),
        "the second is normalised over the first token: each row must sum to one": (
            lambda logps: (logps.logsumexp(-1), logps.log_softmax(0))
        ),
        "the second forgets the first: this is the law of the second token, whatever came before": (
            lambda logps: (logps.logsumexp(-1), logps.logsumexp(0).expand(logps.shape))
        ),
        "the likeliest completion stands for all that begin alike: add them up": (
            lambda logps: (logps.amax(-1), logps - logps.amax(-1, keepdim=True))
        ),
        "probabilities: return their logarithms": (
            lambda logps: (logps.logsumexp(-1).exp(), logps.softmax(-1))
        ),
    },
)


# --------------------------------------------------------------------------------- 6.4 soft_values


@st.composite
def one_token_to_go(draw):
    """P prefixes: the reference's next tokens, the rewards of what they end, and beta."""
    P, V = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    return {
        "ref_logps": draw(log_distribution(P, V)),
        "rewards": draw(table(P, V, -3, 3)),
        "beta": draw(betas()),
    }


def best_objective(ref_logps, rewards, beta) -> Tensor:
    """What the best way to go on is worth: reward less beta times the divergence."""
    best = optimal_logps(ref_logps, rewards, beta=beta)
    return rlhf_objective(best, ref_logps, rewards, beta=beta)


VALUES = Exercise(
    number="6.4",
    function="soft_values",
    inputs=one_token_to_go(),
    expected=best_objective,
    source="E[r] - β KL of the best way to go on",
    mistakes={
        "the expected reward under the reference: it forgets that the next token will be chosen well, too": (
            lambda ref, r, beta: (ref.exp() * r).sum(-1)
        ),
        "the expected reward under π*: what it costs to leave the reference is missing": (
            lambda ref, r, beta: ((ref + r / beta).softmax(-1) * r).sum(-1)
        ),
        "the factor β before the logarithm is missing": (lambda ref, r, beta: (ref + r / beta).logsumexp(-1)),
        "β is missing inside: the exponent is r/β": (lambda ref, r, beta: beta * (ref + r).logsumexp(-1)),
        "β multiplies the rewards: the exponent is r/β": (
            lambda ref, r, beta: beta * (ref + r * beta).logsumexp(-1)
        ),
        "divided by β at the end: β multiplies the logarithm": (
            lambda ref, r, beta: (ref + r / beta).logsumexp(-1) / beta
        ),
        "β is upside down: it divides the rewards and multiplies the logarithm": (
            lambda ref, r, beta: (ref + r * beta).logsumexp(-1) / beta
        ),
        "β is missing": lambda ref, r, beta: (ref + r).logsumexp(-1),
        "the reference is missing: it weighs the terms of the sum": (
            lambda ref, r, beta: beta * (r / beta).logsumexp(-1)
        ),
        "the largest reward: that is the limit for β to 0": lambda ref, r, beta: r.amax(-1),
        "one number for all prefixes: return one for each row": (
            lambda ref, r, beta: beta * (ref + r / beta).logsumexp((0, 1))
        ),
        "the logarithm is missing": lambda ref, r, beta: beta * (ref + r / beta).exp().sum(-1),
    },
)

EXERCISES = [MASK, SEQUENCE, NEXT, VALUES]
