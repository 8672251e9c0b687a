"""Notebook 6: a completion is a sequence of tokens."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import all_sets, expected_pairs
from dpo_minimal.bench.exercises import Exercise, log_distribution
from dpo_minimal.zoo.ipo import averaged_dpo_optimum, with_lengths

from ..training import logps_of_rows, small_gpt

# ------------------------------------------------------------------------------ 6.1 sequence_logps


def _two_lengths(T: int) -> st.SearchStrategy[tuple[int, int]]:
    """Of a prompt, and of prompt and completion together: neither is empty, at most T tokens in all."""
    return st.sampled_from([(before, length) for length in range(2, T + 1) for before in range(1, length)])


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


def _between(low, high, T: int) -> Tensor:
    """True at the positions from low up to but not including high."""
    position = torch.arange(T)
    return (position >= low[:, None]) & (position < high[:, None])


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
    number="6.1",
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


# ---------------------------------------------------------------------------- 6.2 sum_without_end


@functools.cache
def _completions(letters: int, longest: int) -> list[str]:
    """Every text of at most `longest` tokens that ends with "." or is cut."""
    texts, open_ones = [], [""]
    for _ in range(longest):
        texts += [text + "." for text in open_ones]
        open_ones = [text + letter for text in open_ones for letter in "ab"[:letters]]
    return texts + open_ones


@st.composite
def all_completions(draw):
    """Every completion over one or two letters, and its log-probability, end-of-text included."""
    texts = _completions(draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    return {"texts": texts, "logps": draw(log_distribution(len(texts)))}


def token_by_token(texts, logps) -> Tensor:
    """Next-token probabilities, shares of the completions that begin alike, multiplied up to the end."""
    chances = dict(zip(texts, logps.exp().tolist()))

    def begins(prefix: str) -> float:
        return math.fsum(chance for text, chance in chances.items() if text.startswith(prefix))

    def score(text: str) -> float:
        letters = text.rstrip(".")
        return math.prod(begins(letters[: k + 1]) / begins(letters[:k]) for k in range(len(letters)))

    return torch.tensor(math.fsum(map(score, texts)), dtype=torch.float64)


def _average(texts, logps, count) -> Tensor:
    return logps.exp() @ torch.tensor([float(count(text)) for text in texts], dtype=torch.float64)


def _letters(text: str) -> int:
    return len(text.rstrip("."))


WITHOUT_END = Exercise(
    number="6.2",
    function="sum_without_end",
    inputs=all_completions(),
    expected=token_by_token,
    source="next-token probabilities, multiplied token by token, end-of-text left out",
    mistakes={
        "1 is the sum with end-of-text: without it texts count for more than their probability": (
            lambda texts, logps: torch.tensor(1.0)
        ),
        "each text is counted once for every beginning it has, the empty one included": (
            lambda texts, logps: _average(texts, logps, _letters)
        ),
        "end-of-text is counted among the tokens": lambda texts, logps: 1 + _average(texts, logps, len),
        "the average number of tokens with end-of-text: it differs where texts are cut": (
            lambda texts, logps: _average(texts, logps, len)
        ),
        "all texts count alike: they differ in probability": (
            lambda texts, logps: torch.tensor(1 + sum(map(_letters, texts)) / len(texts))
        ),
        "the number of texts: a score is below one, wherever it leaves a token": (
            lambda texts, logps: torch.tensor(float(len(texts)))
        ),
        "1 + the longest: most texts end before": (
            lambda texts, logps: torch.tensor(1.0 + max(map(_letters, texts)))
        ),
    },
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


# ---------------------------------------------------------------------- 6.4 length_trained_on_means


def _world(seed: int) -> dict:
    """Three completions: a reference, rewards in tenths, one to three tokens each, and beta."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(1, 6, (3,), generator=generator).double()
    return {
        "ref_logps": (parts / parts.sum()).log(),
        "rewards": torch.randint(-10, 11, (3,), generator=generator).double() / 10,
        "lengths": torch.randperm(3, generator=generator) + 1,
        "beta": (1.0, 0.5)[seed % 2],
    }


_EQUAL = {
    "ref_logps": torch.full((3,), 1 / 3).double().log(),
    "lengths": torch.tensor([1, 2, 3]),
    "beta": 1.0,
}
_EXAMPLES = [{"rewards": torch.tensor(r).double()} | _EQUAL for r in ([1.0, 1.0, 0.0], [0.0, 1.0, 1.0])]
WORLDS = [{name: world[name] for name in _world(0)} for world in (*_EXAMPLES, *map(_world, range(3)))]


def length_at_the_minimum(ref_logps, rewards, lengths, beta) -> Tensor:
    """The library's optimum of averaged DPO, for the exact probabilities of all pairs."""
    pairs = expected_pairs(rewards[None], all_sets(torch.ones(1, len(rewards), dtype=torch.bool)))
    logps = averaged_dpo_optimum(pairs, ref_logps[None], beta=beta, lengths=lengths[None])[0]
    return _length(logps, lengths)


def _length(logps, lengths) -> Tensor:
    return logps.softmax(-1) @ lengths.double()


def _constant(g, lengths) -> Tensor:
    """The c for which exp(lengths * (g + c)) sums to one."""
    low, high = torch.tensor(-20.0).double(), torch.tensor(20.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (lengths * (g + middle)).logsumexp(-1) > 0 else (middle, high)
    return low


def _with_sum_one(ref_logps, rewards, lengths, beta) -> Tensor:
    return _length(ref_logps + lengths * rewards / beta, lengths)


MEANS = Exercise(
    number="6.4",
    function="length_trained_on_means",
    inputs=st.sampled_from(WORLDS).map(dict),  # few: an answer may train
    expected=length_at_the_minimum,
    source="the library's optimum of DPO on means",
    within=0.01,  # of one plus the length: training need not go on until nothing moves
    mistakes={
        "this is π*, where DPO on sums ends: the log-ratios were not divided by the lengths": (
            lambda ref, r, lengths, beta: _length(ref + r / beta, lengths)
        ),
        "this is the reference's length: nothing was trained": (
            lambda ref, r, lengths, beta: _length(ref, lengths)
        ),
        "the policy's log-probabilities are divided by the lengths, the reference's are not": (
            lambda ref, r, lengths, beta: _length(
                lengths * (ref + r / beta + _constant(ref + r / beta, lengths)), lengths
            )
        ),
        "multiplied by the lengths, not divided": (
            lambda ref, r, lengths, beta: _length(
                with_lengths(ref[None], r[None] / beta, 1 / lengths[None])[0], lengths
            )
        ),
        "normalised afterwards: the constant that makes the sum one stands beside r, and is multiplied too": (
            _with_sum_one
        ),
        "all completions count alike: weigh each length with its probability": (
            lambda ref, r, lengths, beta: lengths.double().mean()
        ),
        "β multiplies the rewards; it divides them": (
            lambda ref, r, lengths, beta: length_at_the_minimum(ref, r, lengths, 1 / beta)
        ),
    },
)


# ------------------------------------------------------------------- 6.5 moved_with_the_adapter_left_on


@st.composite
def pairs_of_rows(draw):
    """The seed of a GPT, B pairs of rows that begin with the prompt, beta, and steps of a length."""
    given = {"seed": draw(st.integers(0, 1)), **draw(st.sampled_from(_ROWS))}
    given["beta"] = 0.5 if given["seed"] else 1.0
    steps, rate = draw(st.sampled_from([(1, 0.5), (3, 0.25)]))
    return given | {"steps": steps, "rate": rate}


_ROWS = [
    {"chosen": torch.tensor([[0, 1]]), "rejected": torch.tensor([[0, 2]])},
    {"chosen": torch.tensor([[0, 1, 4], [3, 2, 4]]), "rejected": torch.tensor([[0, 2, 1], [3, 1, 1]])},
]


def _differences(model, chosen, rejected) -> Tensor:
    return logps_of_rows(model, chosen) - logps_of_rows(model, rejected)


def _moved(seed, chosen, rejected, steps, rate, loss) -> Tensor:
    """How far the differences have come after steps of SGD on the mean of loss(differences of the policy)."""
    policy, start = small_gpt(seed), _differences(small_gpt(seed), chosen, rejected).detach()
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(_differences(policy, chosen, rejected) - start).backward()
        optimizer.step()
    return (_differences(policy, chosen, rejected) - start).detach()


def half_of_the_unweighted_loss(seed, chosen, rejected, beta, steps, rate) -> Tensor:
    """Gradient descent on -h with the weight beta / 2: no reference is left in its gradient."""
    return _moved(seed, chosen, rejected, steps, rate, lambda h: -beta / 2 * h.mean())


LEFT_ON = Exercise(
    number="6.5",
    function="moved_with_the_adapter_left_on",
    inputs=pairs_of_rows(),
    expected=half_of_the_unweighted_loss,
    source="gradient descent with a constant weight of β/2 for every pair",
    mistakes={
        "this is the right run: the reference stayed where training began": (
            lambda seed, c, r, beta, steps, rate: _moved(
                seed, c, r, steps, rate, lambda h: -F.logsigmoid(beta * h).mean()
            )
        ),
        "the reference has a gradient here: it cancels the policy's, and nothing moves": (
            lambda seed, c, r, beta, steps, rate: torch.zeros(len(c), dtype=torch.float64)
        ),
        "the weight is β/2, not β: at a margin of zero σ is one half": (
            lambda seed, c, r, beta, steps, rate: _moved(seed, c, r, steps, rate, lambda h: -beta * h.mean())
        ),
        "the sum over the pairs: the loss is their mean": (
            lambda seed, c, r, beta, steps, rate: _moved(
                seed, c, r, steps, rate, lambda h: -beta / 2 * h.sum()
            )
        ),
        "one step too few": (
            lambda seed, c, r, beta, steps, rate: half_of_the_unweighted_loss(
                seed, c, r, beta, steps - 1, rate
            )
        ),
        "gradients add up over the steps: set them to zero before each": (
            lambda seed, c, r, beta, steps, rate: _with_old_gradients(seed, c, r, beta, steps, rate)
        ),
        "multiplied by β: asked for are differences of log-ratios, not margins": (
            lambda seed, c, r, beta, steps, rate: (
                beta * half_of_the_unweighted_loss(seed, c, r, beta, steps, rate)
            )
        ),
        "against the policy itself: compare the end with the true reference, small_gpt(seed)": (
            lambda seed, c, r, beta, steps, rate: (
                half_of_the_unweighted_loss(seed, c, r, beta, steps, rate)
                - half_of_the_unweighted_loss(seed, c, r, beta, steps - 1, rate)
            )
        ),
        "the reference at the end is missing: take its difference off the policy's": (
            lambda seed, c, r, beta, steps, rate: (
                half_of_the_unweighted_loss(seed, c, r, beta, steps, rate)
                + _differences(small_gpt(seed), c, r).detach()
            )
        ),
        "uphill: chosen and rejected are exchanged, or the gradient was added": (
            lambda seed, c, r, beta, steps, rate: half_of_the_unweighted_loss(seed, c, r, -beta, steps, rate)
        ),
    },
)


def _with_old_gradients(seed, chosen, rejected, beta, steps, rate) -> Tensor:
    policy, start = small_gpt(seed), _differences(small_gpt(seed), chosen, rejected).detach()
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    for _ in range(steps):
        (-beta / 2 * _differences(policy, chosen, rejected).mean()).backward()
        optimizer.step()
    return (_differences(policy, chosen, rejected) - start).detach()


EXERCISES = [SEQUENCE, WITHOUT_END, NEXT, MEANS, LEFT_ON]
