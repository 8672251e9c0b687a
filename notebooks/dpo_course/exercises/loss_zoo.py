"""Notebook 7: labels that may be wrong, and the relatives of DPO."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import dpo_loss
from dpo_minimal.bench.exercises import Exercise, completion_logps, vector

# ------------------------------------------------------------------------- 7.1 flipped_probability


@st.composite
def clean_probabilities(draw):
    """B probabilities that the first of a pair is preferred, and the chance that a label is reversed."""
    p = draw(vector(draw(st.integers(1, 3)), 0, 1))
    return {"p": p, "flip": draw(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.05]))}


def counted_labels(p, flip) -> Tensor:
    """Four stories, what was meant and whether the label was reversed; add up those labelled "first"."""
    chances = []
    for first in p.tolist():
        stories = [
            (meant, reversed_, chance * happens)
            for meant, chance in ((True, first), (False, 1 - first))
            for reversed_, happens in ((True, flip), (False, 1 - flip))
        ]
        chances.append(sum(chance for meant, reversed_, chance in stories if meant != reversed_))
    return torch.tensor(chances, dtype=torch.float64)


FLIPPED = Exercise(
    number="7.1",
    function="flipped_probability",
    inputs=clean_probabilities(),
    expected=counted_labels,
    source="all four stories: what was meant, and whether the label was reversed",
    mistakes={
        "labels reversed in favour of the first are missing: the second was meant in 1 - p of all pairs": (
            lambda p, flip: (1 - flip) * p
        ),
        "every reversed label counts for the first: it does so only where the second was meant": (
            lambda p, flip: (1 - flip) * p + flip
        ),
        "reversed, not redrawn: this replaces a share of the labels by tosses of a fair coin": (
            lambda p, flip: (1 - flip) * p + flip / 2
        ),
        "kept and reversed labels are exchanged: flip is the chance of a reversal": (
            lambda p, flip: flip * p + (1 - flip) * (1 - p)
        ),
        "the constant is missing: at p = 0 the first still wins a share flip of the labels": (
            lambda p, flip: (1 - 2 * flip) * p
        ),
        "the flip is added: p + flip may exceed one": lambda p, flip: p + flip,
        "this undoes a flip: it is the clean probability if p is the noisy one": (
            lambda p, flip: (p - flip) / (1 - 2 * flip)
        ),
        "nothing has changed": lambda p, flip: p.clone(),
    },
)


# ------------------------------------------------------------------- 7.2 and 7.3 cDPO and robust DPO


@st.composite
def pairs_and(draw, **more):
    """Log-probabilities of B pairs, beta, and whatever else is drawn. Margins stay below 12 in size, where
    log(1 - sigmoid) still has its digits."""
    B = draw(st.integers(1, 3))
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    beta = draw(st.sampled_from([1.0, 2.0, 0.5, 0.1, 3.0]))
    rest = {name: draw(strategy) for name, strategy in more.items()}
    return {name: draw(completion_logps(B, -2.7)) for name in names} | {"beta": beta} | rest


def _both_labels(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> tuple[Tensor, Tensor]:
    """The library's DPO losses of the label as it is, and of its opposite."""
    kept = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
    opposite = dpo_loss(policy_rejected, policy_chosen, ref_rejected, ref_chosen, beta=beta)
    return kept.losses, opposite.losses


def average_over_flips(label_smoothing, **pairs) -> Tensor:
    """The mean of DPO's loss over the label kept and the label reversed."""
    kept, opposite = _both_labels(**pairs)
    return (1 - label_smoothing) * kept + label_smoothing * opposite


def solved_for_the_clean(flip_probability, **pairs) -> Tensor:
    """The losses of both labels whose mean over a flip is DPO's loss of the clean one: two equations."""
    stays, flips = 1 - flip_probability, flip_probability
    equations = torch.tensor([[stays, flips], [flips, stays]], dtype=torch.float64)
    return torch.linalg.solve(equations, torch.stack(_both_labels(**pairs)))[0]


def _with_margin(formula):
    """A student's loss, from its formula in the margin u = beta h, in h itself, and in epsilon."""

    def loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, eps):
        h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
        return formula(beta * h, h, eps)

    return loss


def _without_reference(formula):
    """The same of a student who leaves the reference out."""

    def loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, eps):
        h = policy_chosen - policy_rejected
        return formula(beta * h, h, eps)

    return loss


def _plus_reference(formula):
    """The same of a student who adds the reference where it is subtracted."""

    def loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, eps):
        h = (policy_chosen - policy_rejected) + (ref_chosen - ref_rejected)
        return formula(beta * h, h, eps)

    return loss


def _ell(margin: Tensor) -> Tensor:
    return -F.logsigmoid(margin)


def _cdpo(u, h, eps):
    return (1 - eps) * _ell(u) + eps * _ell(-u)


def _robust(u, h, eps):
    return ((1 - eps) * _ell(u) - eps * _ell(-u)) / (1 - 2 * eps)


EPSILONS = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.05])

CDPO = Exercise(
    number="7.2",
    function="cdpo_loss",
    inputs=pairs_and(label_smoothing=EPSILONS),
    expected=average_over_flips,
    source="the mean of dpo_loss over labels kept and reversed",
    mistakes={
        "the two shares are exchanged, or chosen and rejected: the label as it is has 1 - ε": _with_margin(
            lambda u, h, eps: eps * _ell(u) + (1 - eps) * _ell(-u)
        ),
        "the opposite label is missing: it has a share ε": _with_margin(
            lambda u, h, eps: (1 - eps) * _ell(u)
        ),
        "the label keeps its whole weight: the shares are 1 - ε and ε": _with_margin(
            lambda u, h, eps: _ell(u) + eps * _ell(-u)
        ),
        "the opposite label is subtracted: that goes towards robust DPO, cDPO adds it": _with_margin(
            lambda u, h, eps: (1 - eps) * _ell(u) - eps * _ell(-u)
        ),
        "this is robust DPO: it undoes flips, cDPO adds some": _with_margin(_robust),
        "the mixture stands inside the logarithm: mix the two losses, not the two probabilities": (
            _with_margin(lambda u, h, eps: -torch.log((1 - eps) * torch.sigmoid(u) + eps * torch.sigmoid(-u)))
        ),
        "the margins are mixed: mix the two losses": _with_margin(
            lambda u, h, eps: _ell((1 - eps) * u - eps * u)
        ),
        "the sign of the extra term is reversed: it is ℓ(u) + εu": _with_margin(
            lambda u, h, eps: _ell(u) - eps * u
        ),
        "β is missing in the linear term: in ℓ(u) + εu the margin u contains β": _with_margin(
            lambda u, h, eps: _ell(u) + eps * h
        ),
        "β is missing": _with_margin(lambda u, h, eps: _cdpo(h, h, eps)),
        "the reference is missing: the margin compares log-ratios": _without_reference(_cdpo),
        "the sign of the reference is reversed: the margin subtracts its log-ratio": _plus_reference(_cdpo),
        "this is DPO: the smoothing is missing": _with_margin(lambda u, h, eps: _ell(u)),
        "mean over the batch: return one loss for each pair": _with_margin(
            lambda u, h, eps: _cdpo(u, h, eps).mean()
        ),
        "sum over the batch: return one loss for each pair": _with_margin(
            lambda u, h, eps: _cdpo(u, h, eps).sum()
        ),
    },
)

ROBUST = Exercise(
    number="7.3",
    function="robust_dpo_loss",
    inputs=pairs_and(flip_probability=EPSILONS),
    expected=solved_for_the_clean,
    source="two equations, solved: for either label, the mean over a flip is DPO's loss of the clean one",
    mistakes={
        "the denominator 1 - 2ε is missing": _with_margin(
            lambda u, h, eps: (1 - eps) * _ell(u) - eps * _ell(-u)
        ),
        "the denominator is 1 - 2ε, not 1 - ε": _with_margin(
            lambda u, h, eps: ((1 - eps) * _ell(u) - eps * _ell(-u)) / (1 - eps)
        ),
        "the linear term εu has the denominator 1 - 2ε": _with_margin(lambda u, h, eps: _ell(u) - eps * u),
        "the denominator of the linear term is 1 - 2ε, not 1 - ε": _with_margin(
            lambda u, h, eps: _ell(u) - eps * u / (1 - eps)
        ),
        "brackets are missing: x / 1 - 2ε is x - 2ε; write x / (1 - 2ε)": _with_margin(
            lambda u, h, eps: (1 - eps) * _ell(u) - eps * _ell(-u) - 2 * eps
        ),
        "brackets are missing: ε / 1 - 2ε u is ε - 2εu; write ε / (1 - 2ε) · u": _with_margin(
            lambda u, h, eps: _ell(u) - eps - 2 * eps * u
        ),
        "brackets are missing: εu / 1 - 2ε is εu - 2ε; write εu / (1 - 2ε)": _with_margin(
            lambda u, h, eps: _ell(u) - eps * u - 2 * eps
        ),
        "multiplied by 1 - 2ε: divide by it": _with_margin(
            lambda u, h, eps: ((1 - eps) * _ell(u) - eps * _ell(-u)) * (1 - 2 * eps)
        ),
        "the opposite label is added: this is cDPO's loss, divided by 1 - 2ε": _with_margin(
            lambda u, h, eps: _cdpo(u, h, eps) / (1 - 2 * eps)
        ),
        "this is cDPO: it adds flips (or brackets are missing, for ε/1 - 2ε is -ε)": _with_margin(_cdpo),
        "the two shares are exchanged: the label as it is has 1 - ε": _with_margin(
            lambda u, h, eps: (eps * _ell(u) - (1 - eps) * _ell(-u)) / (1 - 2 * eps)
        ),
        "chosen and rejected are exchanged": _with_margin(lambda u, h, eps: _robust(-u, -h, eps)),
        "the label has its whole weight: before the division its share is 1 - ε": _with_margin(
            lambda u, h, eps: (_ell(u) - eps * _ell(-u)) / (1 - 2 * eps)
        ),
        "the sign of the linear term is reversed: it is ℓ(u) - εu / (1 - 2ε)": _with_margin(
            lambda u, h, eps: _ell(u) + eps * u / (1 - 2 * eps)
        ),
        "β is missing in the linear term: the margin u contains it": _with_margin(
            lambda u, h, eps: _ell(u) - eps * h / (1 - 2 * eps)
        ),
        "β is missing": _with_margin(lambda u, h, eps: _robust(h, h, eps)),
        "the reference is missing: the margin compares log-ratios": _without_reference(_robust),
        "the sign of the reference is reversed: the margin subtracts its log-ratio": _plus_reference(_robust),
        "this is DPO: the flips are not undone": _with_margin(lambda u, h, eps: _ell(u)),
        "mean over the batch: return one loss for each pair": _with_margin(
            lambda u, h, eps: _robust(u, h, eps).mean()
        ),
        "sum over the batch: return one loss for each pair": _with_margin(
            lambda u, h, eps: _robust(u, h, eps).sum()
        ),
    },
)


# ------------------------------------------------------------------------------------ 7.4 ipo_loss


def distance_of_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> Tensor:
    """Pair by pair, in plain numbers: how far DPO's margin is from one half, in units of beta, squared."""
    losses = []
    for numbers in zip(*(t.tolist() for t in (policy_chosen, policy_rejected, ref_chosen, ref_rejected))):
        won, lost, ref_won, ref_lost = (math.exp(number) for number in numbers)
        margin = beta * math.log(won * ref_lost / (lost * ref_won))
        losses.append(((margin - 0.5) / beta) ** 2)
    return torch.tensor(losses, dtype=torch.float64)


def _log_ratios(formula):
    """A student's IPO loss, from its formula in h and beta."""
    return lambda pc, pr, rc, rr, beta: formula((pc - pr) - (rc - rr), beta)


IPO = Exercise(
    number="7.4",
    function="ipo_loss",
    inputs=pairs_and(),
    expected=distance_of_margins,
    source="the distance of DPO's margin from one half, pair by pair in plain numbers",
    mistakes={
        "the target is 1/(2β), not 1/β": _log_ratios(lambda h, beta: (h - 1 / beta) ** 2),
        "the target is 1/(2β), not β/2": _log_ratios(lambda h, beta: (h - beta / 2) ** 2),
        "the target is 1/(2β), not 1/2: a small β asks for a large difference": _log_ratios(
            lambda h, beta: (h - 1 / 2) ** 2
        ),
        "β multiplies h here: IPO's h is the difference of log-ratios, without β": _log_ratios(
            lambda h, beta: (beta * h - 1 / (2 * beta)) ** 2
        ),
        "off by β²: DPO's margin and the target 1/2 are both β times too large": _log_ratios(
            lambda h, beta: (beta * h - 1 / 2) ** 2
        ),
        "the reference is missing: h compares log-ratios, not log-probabilities": (
            lambda pc, pr, rc, rr, beta: (pc - pr - 1 / (2 * beta)) ** 2
        ),
        "the sign of the reference is reversed": (
            lambda pc, pr, rc, rr, beta: (pc - pr + rc - rr - 1 / (2 * beta)) ** 2
        ),
        "the sign of the target is reversed, or chosen and rejected are exchanged": _log_ratios(
            lambda h, beta: (h + 1 / (2 * beta)) ** 2
        ),
        "the square is missing: the distance itself": _log_ratios(lambda h, beta: (h - 1 / (2 * beta)).abs()),
        "the square is missing: without it the loss falls for ever": _log_ratios(
            lambda h, beta: h - 1 / (2 * beta)
        ),
        "nothing is paid beyond the target: IPO's square is on both sides": _log_ratios(
            lambda h, beta: (1 / (2 * beta) - h).clamp(min=0) ** 2
        ),
        "this is DPO's loss": _log_ratios(lambda h, beta: _ell(beta * h)),
        "mean over the batch: return one loss for each pair": _log_ratios(
            lambda h, beta: ((h - 1 / (2 * beta)) ** 2).mean()
        ),
        "sum over the batch: return one loss for each pair": _log_ratios(
            lambda h, beta: ((h - 1 / (2 * beta)) ** 2).sum()
        ),
    },
)

EXERCISES = [FLIPPED, CDPO, ROBUST, IPO]
