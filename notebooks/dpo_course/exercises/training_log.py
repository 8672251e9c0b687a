"""Notebook 11: how the numbers of a training log hang together, and how good they can become."""

import itertools
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import Exercise, betas, tenths, vector

# --------------------------------------------------------------------- 11.1 can this record be right?


@st.composite
def logged_margins(draw):
    """(loss, mean margin) of T records: each of two margins, and each loss moved up or down."""
    T = draw(st.integers(1, 4))
    first, second = draw(vector(T, -4, 4)), draw(vector(T, -4, 4))
    moved = draw(st.lists(st.sampled_from([0.1, -0.1, 0.3, -0.3, -1.0]), min_size=T, max_size=T))
    margins = (first + second) / 2
    losses = torch.tensor([math.log1p(math.exp(-m)) + step for m, step in zip(margins.tolist(), moved)])
    return {"losses": losses.double(), "margins": margins}


def some_margins_have_it(losses, margins) -> Tensor:
    """Two margins m - d and m + d of the logged mean m have any loss from that of d = 0 upwards."""
    possible = []
    for loss, margin in zip(losses.tolist(), margins.tolist()):
        spread = [(F.softplus(torch.tensor([-margin - d, -margin + d])).mean().item()) for d in (0.0, 60.0)]
        possible.append(spread[0] - 1e-5 <= loss <= max(spread))
    return torch.tensor(possible)


POSSIBLE = Exercise(
    number="11.1",
    function="is_possible",
    inputs=logged_margins(),
    expected=some_margins_have_it,
    source="two margins with the logged mean, as close together or as far apart as need be",
    mistakes={
        "the loss need not be that of the mean margin: it is larger wherever margins differ": (
            lambda losses, margins: (losses - F.softplus(-margins)).abs() < 0.05
        ),
        "this is the other way round: a mean of a convex function is at least the function of the mean": (
            lambda losses, margins: losses <= F.softplus(-margins)
        ),
        "the sign of the margin: a large margin has a small loss": (
            lambda losses, margins: losses >= F.softplus(margins)
        ),
        "log 2 is no bound: the loss falls below it as soon as margins are positive": (
            lambda losses, margins: losses >= math.log(2)
        ),
        "0 is a bound of the loss, but the logged margin tells more": lambda losses, margins: losses >= 0,
    },
)

# ------------------------------------------------------------------------------- 11.2 which β was used


@st.composite
def evaluations(draw):
    """Rewards and log-probabilities of the same pairs, averaged, at three points of a training."""
    beta, reference = draw(betas()), draw(tenths(-60, -10))
    changes = [0.0, draw(tenths(0.5, 3)), draw(tenths(-6, -0.5))]
    ratios = torch.tensor(changes, dtype=torch.float64) + draw(st.sampled_from([0.0, 1.0, -2.0]))
    return {"rewards": beta * ratios, "logps": reference + ratios}


def by_least_squares(rewards, logps) -> Tensor:
    """The slope of the line through the points."""
    columns = torch.stack([logps, torch.ones_like(logps)], -1)
    return torch.linalg.lstsq(columns, rewards[:, None]).solution[0, 0]


BETA = Exercise(
    number="11.2",
    function="beta_used",
    inputs=evaluations(),
    expected=by_least_squares,
    source="the line through the points: its slope",
    mistakes={
        "a reward is no multiple of log π: the reference is subtracted first; look at changes": (
            lambda rewards, logps: (rewards / logps)[-1]
        ),
        "upside down: the reward changes by β times what the log-probability does": (
            lambda rewards, logps: (logps[-1] - logps[0]) / (rewards[-1] - rewards[0])
        ),
        "the reward of the first record is 0 only where training began at the reference": (
            lambda rewards, logps: rewards[-1] / (logps[-1] - logps[0])
        ),
        "this is how far the reward moved, not per nat of the log-probability": (
            lambda rewards, logps: rewards[-1] - rewards[0]
        ),
    },
)

# --------------------------------------------------------------- 11.3 the least loss, the best accuracy


@st.composite
def chances(draw):
    """(N,) probabilities that people prefer the first of a pair."""
    N = draw(st.integers(1, 4))
    return {"chances": draw(vector(N, 0.1, 0.9)).clamp(0.1, 0.9)}


def by_a_grid_of_margins(chances) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of the margin that is best for each pair, found by trying many."""
    losses, accuracies = [], []
    margins = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for p in chances.tolist():
        losses.append((p * F.softplus(-margins) + (1 - p) * F.softplus(margins)).min())
        accuracies.append(max(p if sign > 0 else 1 - p for sign in (-1, 1)))
    return torch.stack(losses).mean(), torch.tensor(accuracies, dtype=torch.float64).mean()


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.log() + (1 - p) * (1 - p).log())


FLOOR = Exercise(
    number="11.3",
    function="best_possible",
    inputs=chances(),
    expected=by_a_grid_of_margins,
    source="60,001 margins for each pair, of which the best one",
    within=1e-7,  # the grid's step is 1e-4, and around its minimum the loss has a curvature of at most 1/4
    mistakes={
        "people contradict themselves, so nobody can agree with all of them": (
            lambda chances: (torch.zeros(()), torch.ones(()))
        ),
        "a share 1 - p of the labels says the opposite, and costs as well": (
            lambda chances: (-chances.log().mean(), chances.mean())
        ),
        "where p is below one half, the second is the better guess": (
            lambda chances: (_entropy(chances).mean(), chances.mean())
        ),
        "in bits: the loss is in nats": (
            lambda chances: (
                _entropy(chances).mean() / math.log(2),
                torch.maximum(chances, 1 - chances).mean(),
            )
        ),
        "the entropy of the average pair is larger than the average of the entropies": (
            lambda chances: (_entropy(chances.mean()), torch.maximum(chances, 1 - chances).mean())
        ),
    },
)

# ---------------------------------------------------------------- 11.4 does a smaller step prevent it?


@st.composite
def three_features(draw):
    """Features of the chosen, the rejected and an unseen completion, beta, learning rate and steps."""
    rejected = draw(tenths(-1, 1))
    features = [rejected + draw(tenths(0.5, 1.5)), rejected, draw(tenths(-3, 3))]
    rate, steps = draw(st.sampled_from([0.5, 0.2, 1.0])), draw(st.integers(2, 6))
    features = torch.tensor(features, dtype=torch.float64)
    return {
        "features": features,
        "beta": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "rate": rate,
        "steps": steps,
    }


def _change(features, beta, rate, steps, which=0, normalised=True) -> Tensor:
    """By the recursion of the one weight, in Python's own numbers."""
    phi, v = features.tolist(), 0.0
    for _ in range(steps):
        v += rate * beta * (phi[0] - phi[1]) / (1 + math.exp(beta * v * (phi[0] - phi[1])))
    mean = sum(math.exp(v * f) for f in phi) / len(phi)
    return torch.tensor(phi[which] * v - normalised * math.log(mean), dtype=torch.float64)


def both_changes(features, beta, rate, steps) -> tuple[Tensor, Tensor]:
    """The change of the chosen completion's log-probability, by large and by small steps."""
    return _change(features, beta, rate, steps), _change(features, beta, rate / 10, 10 * steps)


def _pair(change):
    """A mistake of one training, made in both."""
    return lambda f, b, rate, steps: (change(f, b, rate, steps), change(f, b, rate / 10, 10 * steps))


SMALLER = Exercise(
    number="11.4",
    function="large_and_small_steps",
    inputs=three_features(),
    expected=both_changes,
    source="the recursion of the one weight, written out",
    mistakes={
        "this is the log-probability itself: subtract what it was before training, log 1/3": _pair(
            lambda *given: _change(*given) - math.log(3)
        ),
        "this is the rejected completion's": _pair(lambda *given: _change(*given, which=1)),
        "the small steps are ten times as many": (
            lambda f, b, rate, steps: (_change(f, b, rate, steps), _change(f, b, rate / 10, steps))
        ),
        "β is missing": _pair(lambda f, b, rate, steps: _change(f, 1.0, rate, steps)),
        "the logit moved so far; its log-probability also loses what the normaliser gains": _pair(
            lambda *given: _change(*given, normalised=False)
        ),
        "the weight goes downhill in the margin: a step subtracts the slope of the loss": _pair(
            lambda f, b, rate, steps: _change(f, b, -rate, steps)
        ),
    },
)


# ------------------------------------------------------ 11.5 what training accuracy promises with few labels


@st.composite
def chance_and_people(draw):
    """The probability that one label says "the first", and how many label a pair."""
    return {
        "chance": draw(st.sampled_from([0.5, 0.7, 0.8, 0.6, 0.9, 0.3])),
        "people": draw(st.integers(1, 5)),
    }


def over_all_labellings(chance, people) -> float:
    """Over every sequence of labels, by its probability: the share that says what most of them say."""
    total = 0.0
    for labels in itertools.product((0, 1), repeat=people):
        said = sum(labels)
        total += chance**said * (1 - chance) ** (people - said) * max(said, people - said) / people
    return total


PROMISE = Exercise(
    number="11.5",
    function="accuracy_seen",
    inputs=chance_and_people(),
    expected=over_all_labellings,
    source="all sequences of labels, each with its probability",
    mistakes={
        "this is what new labels would give: with few labels the policy also learns their noise": (
            lambda chance, people: max(chance, 1 - chance)
        ),
        "people contradict themselves within a pair as soon as there are two": lambda chance, people: 1.0,
        "the majority may be wrong; then it agrees with the wrong labels": (
            lambda chance, people: sum(
                math.comb(people, k) * chance**k * (1 - chance) ** (people - k) * k / people
                for k in range(people + 1)
            )
        ),
        "the share is of the labels, not their number": (
            lambda chance, people: people * over_all_labellings(chance, people)
        ),
    },
)

EXERCISES = [POSSIBLE, BETA, FLOOR, SMALLER, PROMISE]
