"""What the conformance checks know of each function: inputs, brute force, and the mistakes people make.

Brute force divides probabilities and strengths such as (pi / pi_ref)^beta, where what is checked subtracts
logarithms. Inputs have the names of the library's own parameters; log-probabilities are in nats. Each mistake
is one line: what people write | its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ..closed_form import implicit_reward, optimal_logps
from ..losses import Loss, bradley_terry_loss, dpo_loss
from ..preferences import plackett_luce_logprob
from ..zoo import LOSSES
from ..zoo.ipo import ipo_loss
from ..zoo.kto import kto_loss
from ..zoo.noise import cdpo_loss
from .exercises import Exercise, Given, completion_logps, log_distribution, table, tenths, vector

Function = Callable[..., Tensor]
PAIR = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
BETAS = st.sampled_from([1.0, 2.0, 0.5, 0.1, 3.0])


class Known(NamedTuple):
    """A function that can be checked."""

    exercise: Exercise
    ours: Function  # the library's, of which autograd gives the gradient
    slopes: tuple[str, ...] = ()  # the inputs that the gradient must reach; () where values are all
    derived: dict[str, Function] = {}  # noqa: RUF012  # other names for inputs, from all of them


def _lines(text: str) -> list[list[str]]:
    """Of a table of mistakes: the expression and the name."""
    return [[part.strip() for part in line.rsplit(" | ", 1)] for line in text.strip().splitlines()]


def _known(
    name, inputs, brute, source, ours, parameters, mistakes: str, slopes=(), derived=None, strain=None
):
    """The record, with the expressions of the mistakes as functions of the parameters."""
    names = {"ell": F.logsigmoid, "S": torch.sigmoid, "torch": torch, "summed": _summed, **MASKS}
    known = {said: eval(f"lambda {parameters}: {code}", names) for code, said in _lines(mistakes)}
    return Known(Exercise("", name, inputs, brute, source, known, strain=strain), ours, slopes, derived or {})


@st.composite
def _rows(draw, columns: str, column=lambda B: completion_logps(B, -2.7), **more) -> Given:
    """B rows. Margins stay below 12 in size, where log(1 - sigmoid) still has its digits."""
    B = draw(st.integers(1, 3))
    given = {name: draw(column(B)) for name in columns.split()}
    return given | {name: draw(other(B) if callable(other) else other) for name, other in more.items()}


# ---------------------------------------------------------------------- log-probabilities of sequences

MASKS: dict[str, Function] = {  # what people take for the mask k (B, T) of completions
    "late": lambda k: F.pad(k[:, :-1], (1, 0)),
    "early": lambda k: F.pad(k[:, 1:], (0, 1)),
    "begun": lambda k: k.cumsum(-1) > 0,  # from the first token that counts to the end of the row
    "to_end": lambda k: k.flip(-1).cumsum(-1).flip(-1) > 0,  # from the start to the last token that counts
    "half": lambda k, which: k.split(len(k) // 2)[which].repeat(2, 1),
}


@st.composite
def _padded_rows(draw) -> Given:
    """Chosen rows, then as many rejected ones; each a prompt, a completion and padding of any token."""
    T, V, B = draw(st.integers(3, 4)), draw(st.integers(2, 3)), 2 * draw(st.integers(1, 2))
    ends = [(first, end) for end in range(2, T + 1) for first in range(1, end)]
    first, end = torch.tensor(draw(st.lists(st.sampled_from(ends), min_size=B, max_size=B))).T[:, :, None]
    ids = draw(st.lists(st.integers(0, V - 1), min_size=B * T, max_size=B * T))
    logits, place = draw(table(B * T, V, -2, 2)).view(B, T, V), torch.arange(T)
    return {"logits": logits, "ids": torch.tensor(ids).view(B, T), "mask": (place >= first) & (place < end)}


def _brute_sequence(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """A product over the tokens of each row, in Python's numbers."""
    chances = [1.0] * len(ids)
    for row, place in mask.nonzero().tolist():
        strengths = [math.exp(number) for number in logits[row, place - 1].tolist()]
        chances[row] *= strengths[ids[row, place]] / sum(strengths)
    return torch.tensor([math.log(chance) for chance in chances], dtype=torch.float64)


def _summed(
    logits: Tensor, ids: Tensor, mask: Tensor, shift: int = 1, squash="log_softmax", dim=-1
) -> Tensor:
    """(B,): the sum of what stands `shift` places before each token that counts; 0 where nothing does."""
    numbers = (getattr(logits, squash)(dim) if squash else logits)[:, : ids.shape[1] - shift]
    return (F.pad(numbers.gather(-1, ids[:, shift:, None]).squeeze(-1), (shift, 0)) * mask).sum(-1)


SEQUENCE = _known(
    "sequence_logps", _padded_rows(), _brute_sequence, "a product of chances, token by token", _summed,
    "x, ids, k",
    """
    summed(x, ids, to_end(k))          | prompt tokens are counted
    summed(x, ids, begun(k))           | padding is counted
    summed(x, ids, torch.ones_like(k)) | the whole row is counted, prompt and padding
    summed(x, ids, begun(k) & ~k)      | a mask that keeps only padding
    summed(x, ids, ~k)                 | the mask is inverted: it keeps prompt and padding
    summed(x, ids, k & early(k))       | the last token is not counted, though end-of-text is a choice as well
    summed(x, ids, k & late(k))        | the first completion token is not counted
    summed(x, ids, late(k))            | an extra shift of the mask
    summed(x, ids, early(k))           | the mask is not shifted with the tokens
    summed(x, ids, half(k, 0))         | the rejected rows are masked by the chosen's mask
    summed(x, ids, half(k, 1))         | the chosen rows are masked by the rejected's mask
    summed(x, ids, k) / k.sum(-1)      | the mean of tokens: log π(y|x) is their sum
    summed(x, ids, k) / k.shape[1]     | divided by the length of the row: log π(y|x) is a sum
    summed(x, ids, k, 0)               | no shift: logits at a place predict the token after it
    summed(x, ids, k, 2)               | an extra shift of the tokens: logits of two places before
    summed(x, ids, late(k), 2)         | an extra shift of tokens and mask
    summed(x, ids, k, 1, None)         | raw logits: log_softmax is missing
    summed(x, ids, k, 1, "softmax")    | probabilities are summed: their logarithms are meant
    summed(x, ids, k, dim=1)           | log_softmax over the places: the vocabulary is the last axis
    summed(x, ids, k).exp()            | the probability; its logarithm is asked for
    """,
    ("logits",),
    {
        "labels": lambda logits, ids, mask: ids.masked_fill(~mask, -100),
        "prompt_lengths": lambda logits, ids, mask: mask.long().argmax(-1),
        "lengths": lambda logits, ids, mask: mask.long().argmax(-1) + mask.sum(-1),
    },
)  # fmt: skip

# --------------------------------------------------------------------------------------- losses of pairs

# w, l: the policy's log-probabilities of chosen and rejected; v, m: the reference's; b: beta
MARGINS = """
    b * (w - v - l + m)     | right
    b * (w - l)             | no reference: the margin compares log-ratios, not log-probabilities
    b * (w - l + v - m)     | the reference is added, or its two sides are swapped
    b * (w - l - 2*(v - m)) | the reference is subtracted twice
    -b * (w - v - l + m)    | the sign of the margin: chosen and rejected are swapped
    b * (l - w - v + m)     | the policy's two sides are swapped
    b * (w - v + l - m)     | the sum of the two log-ratios, where their difference is the margin
    b * (w - l) - (v - m)   | beta is missing on the reference
    (w - l) - b * (v - m)   | beta is missing on the policy
    w - v - l + m           | beta is missing
    (w - v - l + m) / b     | the margin is divided by beta
    b * b * (w - v - l + m) | beta is applied twice
    b * (w - v) - (l - m)   | one side is transformed: beta multiplies the chosen log-ratio only
    (w - v) - b * (l - m)   | one side is transformed: beta multiplies the rejected log-ratio only
    b * (w - v - l)         | one side is transformed: the reference is missing on the rejected
    b * (w - l + m)         | one side is transformed: the reference is missing on the chosen
    b * (w - v)             | the rejected completion is missing
    b * ((w - v).exp() - (l - m).exp()) | ratios of probabilities, where log-ratios are meant
    b * (w / v - l / m)     | log-probabilities are divided, where their difference is the log-ratio
"""


def _of_pairs(name, brute, source, ours, right: str, mistakes: str, slopes=PAIR[:2], strain=None, **more):
    """A function of pairs: brute force from both strengths, beta and epsilon. Mistakes are `right` of a wrong
    margin, and wrong formulas of the right one, in u, the margin, h = u / b, b, and e, epsilon."""
    (margin, _), *wrong = _lines(MARGINS)
    all_of_them = [(right, *line) for line in wrong] + [
        (code, margin, said) for code, said in _lines(mistakes)
    ]
    lines = "\n".join("(lambda u: (lambda h: {})(u / b))({}) | {}".format(*parts) for parts in all_of_them)

    def expected(beta: float, label_smoothing: float = 0.0, **logps: Tensor) -> Tensor:
        w, l, v, m = (logps[name].exp() for name in PAIR)
        return brute((w / v) ** beta, (l / m) ** beta, beta, label_smoothing)

    inputs, parameters = _rows(" ".join(PAIR), beta=BETAS, **more), "w, l, v, m, b, e=0"
    known = _known(name, inputs, expected, source, ours, parameters, lines, slopes, strain=strain)
    if slopes:
        known.exercise.mistakes.update(_relatives(name.removesuffix("_loss")))
    return known


def _relatives(name: str) -> dict[str, Function]:
    """The package's other losses of pairs, their options as by default, except beta and epsilon."""

    def called(record: Loss, values: tuple) -> Tensor:
        *logps, beta, epsilon = values if len(values) == 6 else (*values, None)
        options = {option.name: option.default for option in record.options} | {"beta": beta}
        noise = {n: epsilon for n in ("label_smoothing", "flip_probability") if n in options and epsilon}
        return record.function(**dict(zip(PAIR, logps)), **options | noise).losses

    others = [record for record in LOSSES.values() if record.name != name]
    alike = [record for record in others if {n for n, read in record.parameters.items() if read} == {*PAIR}]
    return {f"this is another loss, {r.title}": lambda *values, r=r: called(r, values) for r in alike}


FAR = {name: torch.tensor([-900.0 if name == PAIR[0] else -100.0], dtype=torch.float64) for name in PAIR}
DPO = _of_pairs(
    "dpo_loss", lambda c, r, b, _: ((c + r) / c).log(),
    "-log of the chosen's share of the strengths (π/π_ref)^β",
    lambda **given: dpo_loss(**given).losses, "-ell(u)",
    """
    -b * ell(h)     | beta is outside: it scales the loss and not the margin
    -S(u)           | the logarithm is missing: -sigmoid(margin)
    S(-u)           | the logarithm is missing: 1 - sigmoid(margin)
    u               | this is the margin; the loss is -log sigmoid of it
    -ell(u) * S(-u) | each loss is multiplied by its own weight sigmoid(-margin)
    """,
    strain=FAR | {"beta": 1.0},
)  # fmt: skip
WEIGHT = _of_pairs(
    "dpo_gradient_weight", lambda c, r, b, _: b * r / (c + r), "β times the rejected's share of strength",
    lambda **given: dpo_loss(**given).gradient_weights, "b * S(-u)",
    """
    S(-u)            | the beta in front is missing
    S(-h)            | beta is missing in both places
    b * S(u) * S(-u) | the slope of the sigmoid: the loss has its logarithm
    0 * u + b        | beta for every pair: the gradient without its weight
    """, (),
)  # fmt: skip
IPO = _of_pairs(
    "ipo_loss", lambda c, r, b, _: (((c / r).log() - 0.5) / b) ** 2, "DPO's (margin - 1/2) / β, squared",
    lambda **given: ipo_loss(**given).losses, "(h - 0.5/b)**2",
    """
    (h - 1/b)**2      | the target is 1/(2 beta), not 1/beta
    (h - 0.5)**2      | the target is 1/(2 beta), not 1/2
    (u - 0.5)**2      | off by beta squared: (margin - 1/2)^2
    (h - 0.5/b).abs() | the square is missing
    """,
)  # fmt: skip
CDPO = _of_pairs(
    "cdpo_loss", lambda c, r, b, e: (1 - e) * ((c + r) / c).log() + e * ((c + r) / r).log(),
    "the mean of DPO's loss over the label kept and reversed", lambda **given: cdpo_loss(**given).losses,
    "-(1-e) * ell(u) - e * ell(-u)",
    """
    -(1-e) * ell(u)                           | the reversed label is missing
    -(1-e) * ell(u) + e * ell(-u)             | the reversed label is subtracted
    -((1-e) * S(u) + e * S(-u)).log()         | the probabilities are mixed; mix the losses
    """,
    label_smoothing=st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.05]),
)  # fmt: skip

# --------------------------------------------------- rewards, labels, rankings, and policies on a table

REWARD = _known(
    "implicit_reward", _rows("logps ref_logps", beta=BETAS),
    lambda logps, ref_logps, beta: (logps.exp() / ref_logps.exp()).log() * beta,
    "β times the logarithm of π/π_ref", implicit_reward, "p, q, b",
    """
    b * p             | no reference
    (p - q) / b       | the log-ratio is divided by beta
    b * p - q         | beta is missing on the reference
    b * (p - q).exp() | the ratio of probabilities: its logarithm is missing
    """,
)  # fmt: skip
BRADLEY_TERRY = _known(
    "reward_model_loss", _rows("chosen_rewards rejected_rewards", vector),
    lambda chosen_rewards, rejected_rewards: (1 + rejected_rewards.exp() / chosen_rewards.exp()).log(),
    "-log of the chosen's share of e^r", bradley_terry_loss, "w, l",
    """
    -ell(l - w)        | the sign of the margin: chosen and rejected are swapped
    S(l - w)           | the logarithm is missing: 1 - sigmoid(margin)
    -ell(w + l)        | the sum of the rewards, where their difference is the margin
    (1 - w + l).relu() | this is the hinge loss max(0, 1 - margin)
    """,
    ("chosen_rewards", "rejected_rewards"),
)  # fmt: skip


def _brute_kto(policy_logps, reference_logps, is_desirable, kl_estimate, beta, **weights) -> Tensor:
    strength, other = (policy_logps.exp() / reference_logps.exp()) ** beta, math.exp(kl_estimate) ** beta
    lost = weights["desirable_weight"] * other, weights["undesirable_weight"] * strength
    return torch.where(is_desirable, *lost) / (strength + other)


KTO = _known(
    "kto_loss",
    _rows(
        "policy_logps reference_logps",
        is_desirable=lambda B: st.lists(st.booleans(), min_size=B, max_size=B).map(torch.tensor),
        kl_estimate=tenths(0, 2), beta=BETAS,
        desirable_weight=st.sampled_from([1.0, 0.5, 2.0]), undesirable_weight=st.sampled_from([1.0, 1.5]),
    ),
    _brute_kto, "the share of the strength (π/π_ref)^β against that of e^z₀, label by label",
    lambda **given: kto_loss(**given).losses,
    "p, q, good, z, b, d, u, f=lambda good, t, d, u: (d*good + u*~good) * (t - 2*t*good).sigmoid()",
    """
    f(good, b * (p - z), d, u)            | no reference
    f(good, b * (p - q), d, u)            | z0 is missing
    f(good, b * (p - q) - z, d, u)        | beta is missing on z0
    f(~good, b * (p - q - z), u, d)       | the labels are swapped
    f(good, b * (p - q - z), u, d)        | the weights are swapped
    f(good | True, b * (p - q - z), d, u) | undesirable rows are treated as desirable
    -(d*good + u*~good) * ell(b * (p - q - z) * (2*good - 1)) | -log sigmoid, where KTO has 1 - sigmoid
    """,
    ("policy_logps",),
)  # fmt: skip


def _brute_ranking(ranked_rewards: Tensor) -> Tensor:
    strengths = ranked_rewards.exp()
    return sum((strengths[:, k] / strengths[:, k:].sum(-1)).log() for k in range(strengths.shape[1]))


RANKING = _known(
    "plackett_luce",
    _rows("ranked_rewards", lambda B: st.integers(2, 4).flatmap(lambda K: table(B, K, -3, 3))),
    _brute_ranking, "place after place, its share of the strengths still there", plackett_luce_logprob,
    "r, left=lambda r: r.flip(-1).logcumsumexp(-1).flip(-1)",
    """
    (r - r.logsumexp(-1, keepdim=True)).sum(-1) | all answers stand in every denominator
    (r - r.logcumsumexp(-1)).sum(-1)            | the ranking is read from its end: best first is meant
    (r[:, :-1] - left(r)[:, 1:]).sum(-1)        | the denominators leave out the answer that is placed
    (-r - left(-r)).sum(-1)                     | the sign of the rewards
    r[:, 0] - r.logsumexp(-1)                   | only the first place is counted
    ell(r[:, :-1] - r[:, 1:]).sum(-1)           | Bradley-Terry over neighbours
    ell(r[:, :, None] - r[:, None, :]).triu(1).sum((-2, -1)) | Bradley-Terry over all pairs
    (r - left(r)).sum(-1).exp()                 | the probability; its logarithm is asked for
    """,
)  # fmt: skip


def _brute_optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    tilted = ref_logps.exp() * (rewards / beta).exp()
    return (tilted / tilted.sum(-1, keepdim=True)).log()


OPTIMUM = _known(
    "optimal_policy",
    _rows("ref_logps", lambda B: log_distribution(B, 3), rewards=lambda B: table(B, 3, -2, 2), beta=BETAS),
    _brute_optimum, "the logarithms of the shares of π_ref · e^(r/β)", optimal_logps, "q, r, b",
    """
    (q + b * r).log_softmax(-1)                 | beta multiplies the reward
    (r / b).log_softmax(-1)                     | no reference
    ((q + r) / b).log_softmax(-1)               | beta divides the reference as well
    (q - r / b).log_softmax(-1)                 | the sign of the reward
    q + r / b                                   | log Z is missing: the probabilities do not sum to one
    (q + r / b).softmax(-1)                     | probabilities; their logarithms are asked for
    (q + r / b) - (q + r / b).logsumexp((0, 1)) | one Z for the whole table
    """,
)  # fmt: skip


@st.composite
def _exact_samples(draw) -> Given:
    """Samples in which each completion is as frequent as it is probable: their mean is the expectation."""
    counts = torch.tensor(draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
    logps, ref_logps = (counts / counts.sum().double()).log(), draw(log_distribution(len(counts)))
    return {"logps": logps.repeat_interleave(counts), "ref_logps": ref_logps.repeat_interleave(counts)}


KL = _known(
    "kl_estimate", _exact_samples(), lambda logps, ref_logps: (logps.exp() / ref_logps.exp()).log().mean(),
    "KL(π‖π_ref), from samples as frequent as they are probable",
    lambda logps, ref_logps: (logps - ref_logps).mean(), "p, q",
    """
    (q - p).mean()              | the ratio is upside down: log π_ref - log π
    ((p - q)**2 / 2).mean()     | k2, half the squared log-ratio, is biased
    (p - q).abs().mean()        | the absolute log-ratio is biased
    ((p - q).exp() - 1 - (p - q)).mean() | k3 with the ratio upside down estimates another quantity
    (p - q).clamp(min=0).mean() | each sample is clamped at zero, which is biased
    (p - q).sum()               | the sum over the samples
    (p.exp() * (p - q)).sum()   | weighted with π again: samples come with that frequency already
    """,
)  # fmt: skip

KNOWN = {known.exercise.function: known for known in (
    DPO, WEIGHT, SEQUENCE, OPTIMUM, RANKING, REWARD, BRADLEY_TERRY, KL, IPO, CDPO, KTO
)}  # fmt: skip
