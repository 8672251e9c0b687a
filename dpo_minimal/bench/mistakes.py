"""What the conformance checks know: by their names, inputs, right answers and the mistakes people make.

Inputs have the names of the library's own parameters; log-probabilities are in nats. Most mistakes are the
right function of wrong inputs, so that one table of wrong inputs serves all functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ..closed_form import implicit_reward
from ..losses import Loss, bradley_terry_loss, dpo_loss
from ..preferences import plackett_luce_logprob
from ..zoo import LOSSES, cdpo_loss, ipo_loss, kto_loss
from .checks import _outcome, agrees
from .exercises import (
    SINGLE,
    Exercise,
    Given,
    completion_logps,
    log_distribution,
    samples,
    table,
    tenths,
    vector,
)

Function = Callable[..., Tensor]
PAIR = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")

# ------------------------------------------------------------------------------------------------- inputs


@st.composite
def _rows(draw, columns: str, column=lambda B: completion_logps(B, -2.7), **more) -> Given:
    """B rows. Margins stay below 12 in size, where log(1 - sigmoid) still has its digits."""
    B = draw(st.integers(1, 3))
    given = {name: draw(column(B)) for name in columns.split()}
    return given | {name: draw(other(B) if callable(other) else other) for name, other in more.items()}


@st.composite
def _padded_rows(draw) -> Given:
    """Chosen rows, then as many rejected ones; each a prompt, a completion and padding of any token."""
    T, V, B = draw(st.integers(3, 4)), draw(st.integers(2, 3)), 2 * draw(st.integers(1, 2))
    ends = [(first, end) for end in range(2, T + 1) for first in range(1, end)]
    first, end = torch.tensor(draw(st.lists(st.sampled_from(ends), min_size=B, max_size=B))).T[:, :, None]
    ids = draw(st.lists(st.integers(0, V - 1), min_size=B * T, max_size=B * T))
    logits, place = draw(table(B * T, V, -2, 2)).view(B, T, V), torch.arange(T)
    return {"logits": logits, "ids": torch.tensor(ids).view(B, T), "mask": (place >= first) & (place < end)}


@st.composite
def _exact_samples(draw) -> Given:
    """Samples in which each completion is as frequent as it is probable: their mean is the expectation."""
    counts = torch.tensor(draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
    logps, ref_logps = (counts / counts.sum().double()).log(), draw(log_distribution(len(counts)))
    return {"logps": logps.repeat_interleave(counts), "ref_logps": ref_logps.repeat_interleave(counts)}


BETAS, EPSILONS = st.sampled_from([1.0, 2.0, 0.5, 0.1, 3.0]), st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.05])
INPUTS: dict[str, st.SearchStrategy[Given]] = {
    **dict.fromkeys(("dpo_loss", "dpo_gradient_weight", "ipo_loss"), _rows(" ".join(PAIR), beta=BETAS)),
    "cdpo_loss": _rows(" ".join(PAIR), beta=BETAS, label_smoothing=EPSILONS),
    "kto_loss": _rows(
        "policy_logps reference_logps",
        is_desirable=lambda B: st.lists(st.booleans(), min_size=B, max_size=B).map(torch.tensor),
        kl_estimate=tenths(0, 2),
        beta=BETAS,
        desirable_weight=st.sampled_from([1.0, 0.5, 2.0]),
        undesirable_weight=st.sampled_from([1.0, 1.5]),
    ),
    "reward_model_loss": _rows("chosen_rewards rejected_rewards", vector),
    "sequence_logps": _padded_rows(),
    "optimal_policy": _rows(
        "ref_logps", lambda B: log_distribution(B, 3), rewards=lambda B: table(B, 3, -2, 2), beta=BETAS
    ),
    "plackett_luce": _rows(
        "ranked_rewards", lambda B: st.integers(2, 4).flatmap(lambda K: table(B, K, -3, 3))
    ),
    "implicit_reward": _rows("logps ref_logps", beta=BETAS),
    "kl_estimate": _exact_samples(),
}
# A margin of -800 beta, whose exponential overflows: a right formula stays with logarithms.
FAR = dict.fromkeys(PAIR, torch.tensor([-100.0]).double()) | {PAIR[0]: torch.tensor([-900.0]).double()}
SLOPES: dict[str, tuple[str, ...]] = {  # the inputs that a gradient must reach
    **dict.fromkeys(("dpo_loss", "ipo_loss", "cdpo_loss"), PAIR[:2]),
    "kto_loss": ("policy_logps",),
    "reward_model_loss": ("chosen_rewards", "rejected_rewards"),
    "sequence_logps": ("logits",),
}


def all_names(given: Given) -> Given:
    """The inputs, and what is derived from a mask."""
    if "mask" not in given:
        return given
    mask, start = given["mask"], given["mask"].long().argmax(-1)
    labels = given["ids"].masked_fill(~mask, -100)
    return given | {"labels": labels, "prompt_lengths": start, "lengths": start + mask.sum(-1)}


# ---------------------------------------------------------------------------------------- right and wrong


def _picked(numbers: Tensor, ids: Tensor, mask: Tensor, shift: int = 1) -> Tensor:
    """(B,): the sum of the numbers `shift` places before each token that counts, at that token."""
    each = numbers[:, : ids.shape[1] - shift].gather(-1, ids[:, shift:, None]).squeeze(-1)
    return (F.pad(each, (shift, 0)) * mask).sum(-1)


def _summed(logits: Tensor, ids: Tensor, mask: Tensor, shift: int = 1) -> Tensor:
    return _picked(logits.log_softmax(-1), ids, mask, shift)


def _begun(mask: Tensor) -> Tensor:
    """From the first token that counts to the end of the row."""
    return mask.cumsum(-1) > 0


def _moved(mask: Tensor, by: int) -> Tensor:
    """By one place, to the right or to the left; what is beyond the end is lost."""
    return F.pad(mask, (by, -by))


def _kto(p, q, good, z, b, d, u) -> Tensor:
    return kto_loss(p, q, good, z, beta=b, desirable_weight=d, undesirable_weight=u).losses


RIGHT: dict[str, Function] = {  # of the inputs by name
    "dpo_loss": lambda **given: dpo_loss(**given).losses,
    "dpo_gradient_weight": lambda **given: dpo_loss(**given).gradient_weights,
    "ipo_loss": lambda **given: ipo_loss(**given).losses,
    "cdpo_loss": lambda **given: cdpo_loss(**given).losses,
    "kto_loss": lambda **given: kto_loss(**given).losses,
    "reward_model_loss": bradley_terry_loss,
    "sequence_logps": _summed,
    "optimal_policy": lambda ref_logps, rewards, beta: (ref_logps + rewards / beta).log_softmax(-1),
    "plackett_luce": plackett_luce_logprob,
    "implicit_reward": implicit_reward,
    "kl_estimate": lambda logps, ref_logps: logps - ref_logps,
}
WRONG_MASKS: dict[str, Function] = {  # what is taken for the mask (B, T) of the completions
    "prompt tokens are counted": lambda k: _begun(k.flip(-1)).flip(-1),
    "padding is counted": _begun,
    "the whole row is counted, prompt and padding": torch.ones_like,
    "a mask that keeps only padding": lambda k: _begun(k) & ~k,
    "the mask is inverted: it keeps prompt and padding": lambda k: ~k,
    "the last token is not counted, though end-of-text is a choice as well": lambda k: k & _moved(k, -1),
    "the first completion token is not counted": lambda k: k & _moved(k, 1),
    "an extra shift of the mask": lambda k: _moved(k, 1),
    "the mask is not shifted with the tokens": lambda k: _moved(k, -1),
    "the rejected rows are masked by the chosen's mask": lambda k: k[: len(k) // 2].repeat(2, 1),
}
WRONG_OF_MARGIN: dict[str, dict[str, Function]] = {  # formulas of the margin u, beta, and epsilon
    "dpo_loss": {
        "beta is outside: it scales the loss and not the margin": lambda u, b: -b * F.logsigmoid(u / b),
        "the logarithm is missing: -sigmoid(margin)": lambda u, b: -u.sigmoid(),
        "the logarithm is missing: 1 - sigmoid(margin)": lambda u, b: (-u).sigmoid(),
        "this is the margin; the loss is -log sigmoid of it": lambda u, b: u,
    },
    "dpo_gradient_weight": {
        "the beta in front is missing": lambda u, b: (-u).sigmoid(),
        "the beta inside is missing": lambda u, b: b * (-u / b).sigmoid(),
        "the slope of the sigmoid: take that of its logarithm": lambda u, b: b * u.sigmoid() * (-u).sigmoid(),
        "beta for every pair: the gradient without its weight": lambda u, b: torch.full_like(u, b),
    },
    "ipo_loss": {
        "the target is 1/(2 beta), not 1/beta": lambda u, b: ((u - 1) / b) ** 2,
        "off by beta squared: (margin - 1/2)^2": lambda u, b: (u - 0.5) ** 2,
    },
    "cdpo_loss": {
        "the reversed label is subtracted": lambda u, b, e: (1 - e) * F.softplus(-u) - e * F.softplus(u),
        "probabilities are mixed, not losses": lambda u, b, e: -(e + (1 - 2 * e) * u.sigmoid()).log(),
    },
}
WRONG: dict[str, dict[str, Function]] = {  # what people write, of the inputs in their order
    "kto_loss": {
        "the labels are swapped": lambda p, q, good, *more: _kto(p, q, ~good, *more),
        "the weights are swapped": lambda p, q, good, z, b, d, u: _kto(p, q, good, z, b, u, d),
    },
    "reward_model_loss": {"the logarithm is missing: 1 - sigmoid(margin)": lambda w, l: (l - w).sigmoid()},
    "sequence_logps": {
        **{s: lambda x, ids, k, wrong=wrong: _summed(x, ids, wrong(k)) for s, wrong in WRONG_MASKS.items()},
        "the mean of tokens: log π(y|x) is their sum": lambda x, ids, k: _summed(x, ids, k) / k.sum(-1),
        "the mean of the row: log π(y|x) is a sum": lambda x, ids, k: _summed(x, ids, k) / k.shape[1],
        "no shift: logits at a place predict the token after it": lambda x, ids, k: _summed(x, ids, k, 0),
        "an extra shift of the tokens: logits of two places before": lambda x, ids, k: _summed(x, ids, k, 2),
        "the mask is inverted: token 0 is scored wherever the label is -100": lambda x, ids, k: _summed(
            x, ids * k, ~k
        ),
        "raw logits: log_softmax is missing": _picked,
        "log_softmax over the places, not the tokens": lambda x, ids, k: _picked(x.log_softmax(1), ids, k),
    },
    "optimal_policy": {
        "log Z is missing: the probabilities do not sum to one": lambda q, r, b: q + r / b,
        "the probabilities; their logarithms are asked for": lambda q, r, b: (q + r / b).softmax(-1),
        "one Z for the whole table": lambda q, r, b: (q + r / b) - (q + r / b).logsumexp((0, 1)),
    },
    "plackett_luce": {
        "all answers stand in every denominator": lambda r: r.log_softmax(-1).sum(-1),
        "the ranking is read from its end: best first is meant": lambda r: plackett_luce_logprob(r.flip(-1)),
        "only the first place is counted": lambda r: r.log_softmax(-1)[:, 0],
        "Bradley-Terry over neighbours": lambda r: F.logsigmoid(r[:, :-1] - r[:, 1:]).sum(-1),
        "the probability; its logarithm is asked for": lambda r: plackett_luce_logprob(r).exp(),
    },
    "implicit_reward": {"the logarithm of the ratio is missing": lambda p, q, b: b * (p - q).exp()},
    "kl_estimate": {
        "k2, half the squared log-ratio, is biased": lambda p, q: (p - q) ** 2 / 2,
        "k3 with the ratio upside down is another quantity": lambda p, q: (p - q).expm1() - (p - q),
        "weighted with π again: samples come with that frequency": lambda p, q: (p.exp() * (p - q)).sum(),
    },
}
# A mistake: how the names of some inputs begin, and the multiple of these inputs that is taken, by beta.
WRONG_INPUTS: dict[str, tuple[str, Callable[[float], float]]] = {
    "no reference: log-ratios are meant, not log-probabilities": ("ref", lambda b: 0),
    "the reference is added, or its two sides are swapped": ("ref", lambda b: -1),
    "the reference is subtracted twice": ("ref", lambda b: 2),
    "beta is missing on the reference": ("ref", lambda b: 1 / b),
    "beta is missing on the policy": ("policy|logps", lambda b: 1 / b),
    "the policy's two sides are swapped": ("policy", lambda b: -1),
    "chosen and rejected are swapped: the sign of the margin": (".*(chosen|rejected)", lambda b: -1),
    "the sum of the two sides: their difference is the margin": (".*rejected", lambda b: -1),
    "one side is transformed: beta multiplies the chosen's only": (".*rejected", lambda b: 1 / b),
    "one side is transformed: beta multiplies the rejected's only": (".*chosen", lambda b: 1 / b),
    "beta is missing": ("beta", lambda b: 1 / b),
    "beta is applied twice": ("beta", lambda b: b),
    "beta is upside down: 1/beta stands in its place": ("beta", lambda b: 1 / b**2),
    "the sign of the rewards": ("(ranked_)?rewards", lambda b: -1),
    "z0 is missing": ("kl_estimate", lambda b: 0),
    "beta is missing on z0": ("kl_estimate", lambda b: 1 / b),
}


def mistakes_of(check: str) -> dict[str, Function]:
    """All mistakes, of the inputs in their order: its own, right answers to wrong inputs, other losses."""
    names = list(samples(INPUTS[check])[0])

    def right(*values, **changed) -> Tensor:
        return RIGHT[check](**dict(zip(names, values)) | changed)

    def of_wrong(start: str, multiple: Callable[[float], float], *values) -> Tensor:
        given = dict(zip(names, values))
        factor = multiple(given.get("beta", 1.0))
        return right(*values, **{n: factor * given[n] for n in names if re.match(start, n)})

    def other(loss: Loss, *values) -> Tensor:
        given = dict(zip(names, values))
        given["flip_probability"] = given.get("label_smoothing", 0.1)
        options = {option.name: given.get(option.name, option.default) for option in loss.options}
        return loss.function(*values[:4], **options | {"beta": given["beta"]}).losses

    def of_margin(formula: Function, w, l, v, m, b, *epsilon) -> Tensor:
        return formula(b * (w - v - l + m), b, *epsilon)

    found = {said: partial(of_margin, formula) for said, formula in WRONG_OF_MARGIN.get(check, {}).items()}
    found |= WRONG.get(check, {}) | {"the sum over the batch": lambda *values: right(*values).sum()}
    for said, (start, multiple) in WRONG_INPUTS.items():
        if any(re.match(start, n) for n in names) and ("beta" in names or multiple(1.0) != 1):
            found[said] = partial(of_wrong, start, multiple)
    for loss in LOSSES.values() if {*PAIR} <= {*names} else ():
        if [n for n, read in loss.parameters.items() if read] == [*PAIR] and check != f"{loss.name}_loss":
            found[f"this is another loss, {loss.title}"] = partial(other, loss)
    return found


def symptom(exercise: Exercise, function: Callable) -> str | None:
    """What can be said of answers that no known mistake gives."""
    drawn = samples(exercise.inputs)
    answers = [_outcome(function, given) for given in drawn]
    expected = [exercise.expected(**given) for given in drawn]
    if not all(isinstance(a, Tensor) and a.shape == b.shape for a, b in zip(answers, expected)):
        return None
    if answers[0].dtype in (torch.float16, torch.bfloat16):
        return f"its answers are {answers[0].dtype}, which has too few digits: compute in float32"
    got, right = (torch.cat([a.detach().double().flatten() for a in x]) for x in (answers, expected))
    factor = ((got @ right) / (right @ right)).item()
    if abs(factor) > 1e-6 and abs(factor - 1) > 1e-6 and torch.allclose(got, factor * right, 1e-6, 1e-9):
        named = {1.442695: " = 1/ln 2: bits, where nats are meant", -1.0: ": the sign is reversed"}
        return f"equal up to the constant factor {factor:.5g}{named.get(round(factor, 6), '')}"
    if not {*PAIR} <= {*drawn[0]}:
        return None

    def moves(*both: str) -> bool:
        """Whether adding a constant to both inputs, which leaves the margin as it is, changes any answer."""
        moved = ({n: v + 0.3 if n in both else v for n, v in given.items()} for given in drawn)
        return not all(agrees(_outcome(function, given), a, SINGLE) for given, a in zip(moved, answers))

    w, l, v, m = PAIR
    sides = {"the chosen's": (w, v), "the rejected's": (l, m), "one log-ratio, or both": (w, l)}
    found = [side for side, both in sides.items() if moves(*both)]
    if not found or len(found) == 3:
        return None
    return f"no function of the log-ratios' difference; one side is transformed: {found[0]}"
