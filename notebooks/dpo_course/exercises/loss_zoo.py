"""Notebook 7: labels that may be wrong, and where the relatives of DPO end."""

import math

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import Rankings, maximum_likelihood, optimal_logps
from dpo_minimal.bench.exercises import Exercise, betas, vector

FLIPS = st.sampled_from([0.1, 0.2, 0.3, 0.05])


def noisy(p, flip):
    """The share of labels for the first, after a share `flip` of all was reversed."""
    return flip + (1 - 2 * flip) * p


# ------------------------------------------------------------------------- 7.1 flips_behind


@st.composite
def margins_of_noisy_labels(draw):
    """True differences of reward, away from zero, and DPO's margins with some of the labels reversed."""
    difference = draw(vector(draw(st.integers(1, 2)), 0.5, 4))
    return {
        "difference": difference,
        "margin": torch.logit(noisy(torch.sigmoid(difference), draw(FLIPS))),
    }


def raised_until_it_fits(difference, margin) -> Tensor:
    """Pair by pair: halve [0, 1/2] until labels reversed at that rate have the margin as their log-odds."""
    found = []
    for true, seen in zip(difference.tolist(), margin.tolist()):
        low, high = 0.0, 0.5
        for _ in range(60):
            flip = (low + high) / 2
            share = noisy(1 / (1 + math.exp(-true)), flip)
            low, high = (flip, high) if math.log(share / (1 - share)) > seen else (low, flip)
        found.append(low)
    return torch.tensor(found, dtype=torch.float64)


def _of_shares(formula):
    """A student's answer, from the clean and the noisy share of labels for the first."""
    return lambda difference, margin: formula(torch.sigmoid(difference), torch.sigmoid(margin))


FLIPS_BEHIND = Exercise(
    number="7.1",
    function="flips_behind",
    inputs=margins_of_noisy_labels(),
    expected=raised_until_it_fits,
    source="bisection: the rate of reversed labels at which DPO finds this margin",
    mistakes={
        "σ(-margin) is it if the worse completion never won by itself: for very large differences only": (
            _of_shares(lambda p, share: 1 - share)
        ),
        "margins are log-odds, and flips mix probabilities: apply σ to both first": (
            lambda difference, margin: (1 - margin / difference) / 2
        ),
        "p and the share of the labels are exchanged: divide by 2p - 1, with the clean p": _of_shares(
            lambda p, share: (p - share) / (2 * share - 1)
        ),
        "this is how far the share has moved; a flip moves it by 2p - 1": _of_shares(
            lambda p, share: p - share
        ),
        "twice too large: a reversed label goes from one side to the other, not to a tossed coin": _of_shares(
            lambda p, share: (p - share) / (p - 0.5)
        ),
        "the sign is reversed: flips make margins smaller": _of_shares(
            lambda p, share: (share - p) / (2 * p - 1)
        ),
        "this is the margin that is left, in parts of the true one": lambda difference, margin: (
            margin / difference
        ),
    },
)


# ------------------------------------------------------------------- 7.2 robust DPO at the wrong rate


@st.composite
def wrongly_told(draw):
    """Probabilities of single pairs, the rate of flips, and the rate that robust DPO is told."""
    p = draw(vector(draw(st.integers(1, 2)), 0.1, 0.9))
    flip, told = (draw(st.sampled_from([0.1, 0.2, 0.0, 0.3])) for _ in range(2))
    left = (noisy(p, flip) - told) / (1 - 2 * told)
    assume(bool(((left - 0.5).abs() - 0.5).abs().min() > 0.01))  # no share on the border of [0, 1]
    return {"p": p, "flip": flip, "told": told}


def along_the_loss(p, flip, told) -> Tensor:
    """The slope of the average loss, label by label; a minimum by bisection, if its sign changes at all."""

    def slope(u, p):
        for_first, for_second = 1 / (1 + math.exp(u)), 1 / (1 + math.exp(-u))  # minus the slopes of l(±u)
        pull = {  # of robust DPO, for each label
            True: ((1 - told) * for_first + told * for_second) / (1 - 2 * told),
            False: ((1 - told) * for_second + told * for_first) / (1 - 2 * told),
        }
        meant = {True: p, False: 1 - p}
        seen = {label: (1 - flip) * meant[label] + flip * meant[not label] for label in (True, False)}
        return seen[False] * pull[False] - seen[True] * pull[True]

    found = []
    for chance in p.tolist():
        low, high = -30.0, 30.0
        if slope(high, chance) < 0 or slope(low, chance) > 0:
            found.append(math.copysign(math.inf, -slope(0.0, chance)))
            continue
        for _ in range(60):
            u = (low + high) / 2
            low, high = (u, high) if slope(u, chance) < 0 else (low, u)
        found.append(low)
    return torch.tensor(found, dtype=torch.float64)


def _end(share):
    """The log-odds of a share, infinite outside of [0, 1]."""
    return torch.logit(share.clamp(0, 1))


ROBUST_MARGIN = Exercise(
    number="7.2",
    function="robust_margin",
    inputs=wrongly_told(),
    expected=along_the_loss,
    source="the slope of the average loss, label by label, and bisection",
    within=1e-3,  # whoever trains or searches instead of solving stops at some digit
    mistakes={
        "this is the true margin: robust DPO finds it only where the told rate is the rate of the flips": (
            lambda p, flip, told: torch.logit(p)
        ),
        "this is DPO's margin: what robust DPO was told is missing": (
            lambda p, flip, told: torch.logit(noisy(p, flip))
        ),
        "this is cDPO's margin: it adds flips, robust DPO takes some out": (
            lambda p, flip, told: torch.logit(noisy(noisy(p, flip), told))
        ),
        "the labels are not clean: a share flip of them was reversed": (
            lambda p, flip, told: _end((p - told) / (1 - 2 * told))
        ),
        "the two rates are exchanged: flip was done to the labels, told is what the loss undoes": (
            lambda p, flip, told: _end((noisy(p, told) - flip) / (1 - 2 * flip))
        ),
        "the share that is left is to be divided by 1 - 2 told": (
            lambda p, flip, told: _end(noisy(p, flip) - told)
        ),
        "beyond 0 and 1 nothing is a probability, and there is no minimum: the margin is infinite": (
            lambda p, flip, told: torch.logit((noisy(p, flip) - told) / (1 - 2 * told))
        ),
        "where the second completion is the better one, the margin runs to minus infinity": (
            lambda p, flip, told: _end((noisy(p, flip) - told) / (1 - 2 * told)).nan_to_num(
                posinf=math.inf, neginf=math.inf
            )
        ),
        "these are probabilities: the margin is their log-odds": (
            lambda p, flip, told: (noisy(p, flip) - told) / (1 - 2 * told)
        ),
    },
)


# ------------------------------------------------------------------------------ 7.3 IPO's beta


@st.composite
def decided_pairs(draw):
    """Probabilities of single pairs, none of them a fair coin, and DPO's beta."""
    p = draw(vector(draw(st.integers(1, 2)), 0.6, 0.9))
    return {"p": 1 - p if draw(st.booleans()) else p, "beta": draw(betas())}


def target_by_bisection(p, beta) -> Tensor:
    """Pair by pair: halve an interval of IPO's targets until its mean slope is zero where DPO ends."""
    found = []
    for chance in p.tolist():
        h = math.log(chance / (1 - chance)) / beta  # where DPO ends
        low, high = 0.0, 1e4
        for _ in range(100):
            target = (low + high) / 2
            slope = chance * 2 * (h - target) + (1 - chance) * 2 * (h + target)
            low, high = (target, high) if slope * h > 0 else (low, target)
        found.append(1 / (2 * low))
    return torch.tensor(found, dtype=torch.float64)


IPO_BETA = Exercise(
    number="7.3",
    function="ipo_beta",
    inputs=decided_pairs(),
    expected=target_by_bisection,
    source="bisection: the target 1/(2β) with which IPO's mean slope is zero where DPO ends",
    mistakes={
        "the opposite labels are missing: they pull towards -1/(2β), so IPO ends at (2p - 1)/(2β)": (
            lambda p, beta: beta / (2 * torch.logit(p).abs())
        ),
        "DPO's β is missing: it ends at h = logit(p) / β": lambda p, beta: (2 * p - 1) / (2 * torch.logit(p)),
        "upside down: a large target belongs to a small β": (
            lambda p, beta: 2 * torch.logit(p) / ((2 * p - 1) * beta)
        ),
        "off by 2: IPO's target is 1/(2β)": lambda p, beta: (2 * p - 1) * beta / torch.logit(p),
        "the opposite labels pull the other way: the mean target has 2p - 1, not p": (
            lambda p, beta: p * beta / (2 * torch.logit(p))
        ),
        "β in the wrong place: DPO's h is the margin divided by β": (
            lambda p, beta: (2 * p - 1) / (2 * beta * torch.logit(p))
        ),
        "equal βs are two different policies: IPO's is no unit of reward": (
            lambda p, beta: torch.full_like(p, beta)
        ),
        "this is where IPO ends with DPO's β; the question is which β ends where DPO does": (
            lambda p, beta: (2 * p - 1) / (2 * beta)
        ),
    },
)


# ------------------------------------------------------------------ 7.4 training with a wrong rate

# Few and small, because every try trains. In all of them robust DPO is told too little.
TRAININGS = [
    {"ref": ref, "rewards": rewards, "beta": beta, "flip": flip, "told": told}
    for ref, rewards, beta, flip, told in [
        ((0.5, 0.3, 0.2), (0.0, 1.0, 2.0), 1.0, 0.1, 0.05),
        ((0.2, 0.2, 0.6), (1.0, 2.0, 0.0), 0.5, 0.2, 0.1),
        ((0.2, 0.3, 0.5), (0.0, 2.0, 1.0), 1.0, 0.2, 0.05),
        ((0.4, 0.3, 0.3), (2.0, 0.0, 0.5), 2.0, 0.3, 0.1),
    ]
]


def a_training(numbers):
    """The arguments of one training, in tensors."""
    return {
        "ref_logps": torch.tensor(numbers["ref"], dtype=torch.float64).log(),
        "rewards": torch.tensor(numbers["rewards"], dtype=torch.float64),
    } | {name: numbers[name] for name in ("beta", "flip", "told")}


def flips_that_are_left(ref_logps, rewards, beta, flip, told) -> Tensor:
    """DPO's end on labels with the flips that robust DPO leaves in, (flip - told) / (1 - 2 told) of them, by
    Newton's method on the rewards and Eq. 4, without training a policy."""
    return _dpo_end(ref_logps, rewards, beta, (flip - told) / (1 - 2 * told))


def _dpo_end(ref_logps, rewards, beta, flip) -> Tensor:
    """Where DPO ends if a share of the labels is reversed; the share may be negative, for flips undone that
    were never done."""
    exists = torch.ones(1, len(rewards), dtype=torch.bool)
    first, second = pairs = torch.combinations(torch.arange(len(rewards))).T
    share = noisy(torch.sigmoid(rewards[first] - rewards[second]), flip)
    order = torch.cat([pairs.T, pairs.T.flip(-1)])
    data = Rankings(torch.zeros(len(order)).long(), order, torch.cat([share, 1 - share]))
    return optimal_logps(ref_logps[None], maximum_likelihood(data, exists), beta=beta)[0]


TRAINED = Exercise(
    number="7.4",
    function="trained_on_flips",
    inputs=st.sampled_from(TRAININGS).map(a_training),
    expected=flips_that_are_left,
    source="the most likely rewards of labels with the flips that are left, by Newton's method",
    within=1e-3,  # a training that was stopped; the mistakes differ by more than 0.01
    mistakes={
        "this is π*: told too little, robust DPO leaves some flips in the labels": (
            lambda ref, r, beta, flip, told: optimal_logps(ref, r, beta=beta)
        ),
        "this is DPO's end on the reversed labels: the told rate is missing in the loss": (
            lambda ref, r, beta, flip, told: _dpo_end(ref, r, beta, flip)
        ),
        "the labels were not reversed: expected_pairs has a flip_probability": (
            lambda ref, r, beta, flip, told: _dpo_end(ref, r, beta, -told / (1 - 2 * told))
        ),
        "cDPO instead of robust DPO: it adds flips": (
            lambda ref, r, beta, flip, told: _dpo_end(ref, r, beta, flip + told - 2 * flip * told)
        ),
        "the flips that are left are not the difference of the rates: they are (flip - told)/(1 - 2 told)": (
            lambda ref, r, beta, flip, told: _dpo_end(ref, r, beta, flip - told)
        ),
        "nothing was trained: this is the reference": lambda ref, *_: ref.clone(),
        "the reference is missing in the loss": (
            lambda ref, r, beta, flip, told: flips_that_are_left(torch.zeros_like(ref), r, beta, flip, told)
        ),
        "β is missing in the loss": (
            lambda ref, r, beta, flip, told: flips_that_are_left(ref, r, 1.0, flip, told)
        ),
        "these are probabilities: return their logarithms": (
            lambda *given: flips_that_are_left(*given).exp()
        ),
    },
)

EXERCISES = [FLIPS_BEHIND, ROBUST_MARGIN, IPO_BETA, TRAINED]
