"""Hinge, EXO, DiscoPOP, averaged DPO, RPO and DPO-Positive four ways each, and where they lead on tables.

Value, gradient, reduction and extremes as in test_relatives.py, whose rows and helpers these are; values and
pulls are written out once more with the scalar functions of `math`. What holds for every record (central
differences, margins of hundreds, starts, optima, ranges) is tested in test_zoo.py.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant
from strategies import betas
from test_losses import HALF, STEP, WIDE, assert_within, f64, minus_log_sigmoid, roundoff, sigmoid
from test_relatives import (
    CLOSE,
    FAR,
    FIXED,
    Relative,
    Row,
    all_pairs,
    averaged_gap,
    by_hand,
    call,
    equal,
    few,
    margin,
    tables,
)
from test_zoo import ROWS, on_rows, settings_of
from torch import Tensor

from dpo_minimal import (
    InputError,
    Rankings,
    all_sets,
    averaged_dpo_loss,
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_loss,
    expected_pairs,
    hinge_loss,
    ipo_loss,
    preference_matrix,
    simpo_loss,
    unweighted_dpo_loss,
    with_nll,
)
from dpo_minimal.bandit import loss_on_table, mean_on_table
from dpo_minimal.losses import DPO, PLACKETT_LUCE, PreferenceLoss
from dpo_minimal.zoo import LOSSES
from dpo_minimal.zoo.margins import hinge_optimum
from dpo_minimal.zoo.rpo import rpo_optimum

# ------------------------------------------------------------------------ the losses, written out again


def exo_value(row: Row, beta: float, label_smoothing: float) -> float:
    u, label = margin(row, beta), (math.log(1 - label_smoothing), math.log(label_smoothing))
    return sigmoid(u) * (-minus_log_sigmoid(u) - label[0]) + sigmoid(-u) * (-minus_log_sigmoid(-u) - label[1])


def exo_pulls(row: Row, beta: float, label_smoothing: float) -> tuple[float, float]:
    u = margin(row, beta)
    return equal(beta * sigmoid(u) * sigmoid(-u) * (math.log(1 / label_smoothing - 1) - u))


def discopop_value(row: Row, beta: float, tau: float) -> float:
    u = margin(row, beta)
    return sigmoid(-u / tau) * minus_log_sigmoid(u) + math.exp(-minus_log_sigmoid(u / tau) - u)


def discopop_pulls(row: Row, beta: float, tau: float) -> tuple[float, float]:
    u = margin(row, beta)
    m, rest = sigmoid(u / tau), sigmoid(-u / tau)
    exponential = math.exp(-minus_log_sigmoid(u / tau) - u)
    slope = -rest * (m * minus_log_sigmoid(u) / tau + sigmoid(-u)) + exponential * (rest / tau - 1)
    return equal(-beta * slope)


def averaged_dpo_pulls(row: Row, beta: float) -> tuple[float, float]:
    pull = beta * sigmoid(-beta * averaged_gap(row))
    return pull / row.tokens_w, pull / row.tokens_l


def rpo(*columns: Tensor, **options: float) -> PreferenceLoss:
    """Of (B, 6) columns. The record is made anew, for the planted mistakes."""
    record = with_nll(DPO)
    names = [name for name, read in record.parameters.items() if read]
    return record.function(**dict(zip(names, columns)), **options)


def counted(row: Row, beta: float, lam: float) -> float:
    return beta * (row.ratios[0] - row.ratios[1] - lam * max(0.0, -row.ratios[0]))


def dpop_pulls(row: Row, beta: float, lam: float) -> tuple[float, float]:
    pull = beta * sigmoid(-counted(row, beta, lam))
    return pull * (1 + lam if row.ratios[0] < 0 else 1), pull


MARGINS = {
    "hinge": Relative(
        hinge_loss, "r", ("beta",), lambda row, beta: max(0.0, 1 - margin(row, beta)),
        lambda row, beta: equal(beta if margin(row, beta) < 1 else 0.0),
    ),
    "exo": Relative(exo_loss, "r", ("beta", "label_smoothing"), exo_value, exo_pulls),
    "discopop": Relative(discopop_loss, "r", ("beta", "tau"), discopop_value, discopop_pulls),
    "averaged_dpo": Relative(
        averaged_dpo_loss, "rt", ("beta",),
        lambda row, beta: minus_log_sigmoid(beta * averaged_gap(row)), averaged_dpo_pulls,
    ),
    "rpo": Relative(
        rpo, "rt", ("beta", "nll_weight"),
        lambda row, beta, nll_weight: minus_log_sigmoid(margin(row, beta)) - nll_weight * row.averages[0],
        lambda row, beta, nll_weight: (
            beta * sigmoid(-margin(row, beta)) + nll_weight / row.tokens_w, beta * sigmoid(-margin(row, beta))
        ),
    ),
    "dpop": Relative(
        dpop_loss, "r", ("beta", "lam"),
        lambda row, beta, lam: minus_log_sigmoid(counted(row, beta, lam)), dpop_pulls,
    ),
}  # fmt: skip
SOME = dict(beta=0.5, label_smoothing=0.25, tau=0.25, nll_weight=0.75, lam=0.5)
all_options = st.fixed_dictionaries(
    {
        "beta": betas,
        "label_smoothing": st.floats(0.01, 0.45),
        "tau": st.floats(0.05, 1),
        "nll_weight": st.floats(0, 2),
        "lam": st.floats(0, 60),
    }
)

# --------------------------------------------------------------------------------------- four ways each


@pytest.mark.parametrize("name", MARGINS)
@few
@given(table=tables(), options=all_options)
def test_value_is_the_definition(name, table, options):
    """A sign, an epsilon, the wrong direction of a divergence, a tau on one side only, a length forgotten."""
    check_value(name, table, options)


def check_value(name: str, table: Tensor, options: dict) -> None:
    value, _ = by_hand(MARGINS[name], table, options)
    torch.testing.assert_close(call(MARGINS[name], table, options).losses, value, **CLOSE)


@pytest.mark.parametrize("name", MARGINS)
@few
@given(table=tables(), options=all_options)
def test_gradient_is_that_of_the_two_pulls(name, table, options):
    """Both pulls, by hand, by autograd and from the fields; the reference's gradient is their opposite, but
    for RPO's likelihood, which has no reference."""
    check_gradient(name, table, options)


def check_gradient(name: str, table: Tensor, options: dict) -> None:
    loss, (_, slopes) = MARGINS[name], by_hand(MARGINS[name], table, options)
    logps = table[:, :4].clone().requires_grad_()
    out = call(loss, torch.cat([logps, table[:, 4:]], -1), options)
    (found,) = torch.autograd.grad(out.losses.sum(), logps)
    torch.testing.assert_close(found[:, :2], slopes[:, :2], **CLOSE)
    if name == "rpo":
        slopes[:, 2] -= options["nll_weight"] / table[:, 4]
    torch.testing.assert_close(found[:, 2:], slopes[:, 2:4], **CLOSE)
    torch.testing.assert_close(out.chosen_weights, -slopes[:, 0], **CLOSE)
    torch.testing.assert_close(out.rejected_weights, slopes[:, 1], **CLOSE)
    assert not any(readout.requires_grad for readout in out[1:])


@pytest.mark.parametrize("name", MARGINS)
def test_value_and_gradient_of_a_fixed_table(name):
    """The same where nothing is drawn, for the planted mistakes; and the weights are central differences."""
    check_value(name, FIXED, SOME)
    check_gradient(name, FIXED, SOME)
    out = call(MARGINS[name], FIXED, SOME)
    for column, weights in ((0, -out.chosen_weights), (1, out.rejected_weights)):
        step = torch.zeros_like(FIXED)
        step[:, column] = STEP
        up, down = (call(MARGINS[name], FIXED + side * step, SOME).losses for side in (1, -1))
        # STEP^2 / 6 = 4e-11 times a third derivative, of DiscoPOP up to 1 / tau^2 = 16; roundings as in STEP
        assert_within((up - down) / (2 * STEP), weights, 1e-9)


@few
@given(table=tables(), options=all_options)
def test_rewards_are_what_the_docstrings_say(table, options):
    """beta times the log-ratio, averaged for averaged DPO."""
    ratio = options["beta"] * (table[:, :2] - table[:, 2:4])
    for name, loss in MARGINS.items():
        expected = ratio / table[:, 4:] if name == "averaged_dpo" else ratio
        torch.testing.assert_close(torch.stack(call(loss, table, options)[1:3], -1), expected, **CLOSE)


@few
@given(table=tables(), options=all_options, tokens=st.integers(1, 9))
def test_each_reduces_to_a_sibling(table, options, tokens):
    """[D12.9] to [D12.14] Below its corner the hinge is DPO without weight; EXO's weight is IPO's times a
    bell; a step of no width leaves DPO or the exponential loss; equal lengths are another beta, and no
    reference is SimPO; nu = 0 and lambda = 0 are DPO, and so is any lambda where the chosen has risen."""
    check_reductions(table, options, tokens)


def check_reductions(table: Tensor, options: dict, tokens: int) -> None:
    beta, pair = options["beta"], table[:, :4].unbind(-1)
    dpo = dpo_loss(*pair, beta=beta)
    u = dpo.chosen_rewards - dpo.rejected_rewards

    out, flat = hinge_loss(*pair, beta=beta), unweighted_dpo_loss(*pair, beta=beta)
    torch.testing.assert_close(out.losses, (1 + flat.losses).clamp(min=0), **CLOSE)
    assert torch.equal(out.chosen_weights, torch.where(u < 1, flat.chosen_weights, 0))

    epsilon = options["label_smoothing"]
    ipo = ipo_loss(*pair, beta=beta / (2 * math.log(1 / epsilon - 1)))
    bell = beta**2 / 2 * torch.sigmoid(u) * torch.sigmoid(-u)
    out = exo_loss(*pair, beta=beta, label_smoothing=epsilon)
    torch.testing.assert_close(out.chosen_weights, bell * ipo.chosen_weights, **CLOSE)

    out, far = discopop_loss(*pair, beta=beta, tau=1e-9), u.abs() > 1e-6  # where m is 0 or 1
    torch.testing.assert_close(out.losses[far], torch.where(u < 0, dpo.losses, torch.exp(-u))[far], **CLOSE)

    averaged = torch.cat([table[:, :4], torch.full_like(table[:, 4:], tokens)], -1).unbind(-1)
    out, shorter = averaged_dpo_loss(*averaged, beta=beta), dpo_loss(*pair, beta=beta / tokens)
    torch.testing.assert_close(out.losses, shorter.losses, **CLOSE)
    torch.testing.assert_close(out.chosen_weights, shorter.chosen_weights, **CLOSE)
    w, l, ref_w, ref_l, *lengths = table.unbind(-1)
    out = averaged_dpo_loss(w, l, 0 * ref_w, 0 * ref_l, *lengths, beta=beta)
    alike = simpo_loss(w, l, *lengths, beta=beta, gamma=0.0)
    for one, other in zip(out, alike):
        torch.testing.assert_close(one, other, **CLOSE)

    out = call(MARGINS["rpo"], table, options | {"nll_weight": 0.0})  # to the bit: 0 is exact
    assert all(torch.equal(one, other) for one, other in zip(out, dpo))
    risen = w >= ref_w
    for lam, rows in ((0.0, torch.ones_like(risen)), (options["lam"], risen)):
        for one, other in zip(dpop_loss(*pair, beta=beta, lam=lam), dpo):
            torch.testing.assert_close(one[rows], other[rows], **CLOSE)


def test_the_reductions_of_a_fixed_table():
    """The same where nothing is drawn: for the planted mistakes."""
    check_reductions(FIXED, SOME, 3)


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
@pytest.mark.parametrize("name", MARGINS)
def test_extreme_log_probabilities(name, dtype):
    """Property 74: log-ratios of +-1e4 give finite losses and weights with their digits, in their dtype."""
    loss, table = MARGINS[name], FAR.to(dtype)
    value, slopes = by_hand(loss, table, SOME)
    assert value.isfinite().all()
    out = call(loss, table, SOME)
    assert all(field.dtype == dtype for field in out)
    # sixteen roundoffs of the dtype that it is computed in, and the final one
    relative_error = 16 * roundoff(torch.float32 if dtype == torch.bfloat16 else dtype) + roundoff(dtype)
    tiny = torch.finfo(dtype).tiny
    assert_within(out.losses, value, relative_error * value.abs() + tiny)
    assert_within(out.chosen_weights, -slopes[:, 0], relative_error * slopes[:, 0].abs() + tiny)
    assert_within(out.rejected_weights, slopes[:, 1], relative_error * slopes[:, 1].abs() + tiny)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MARGINS)
def test_half_precision_is_rounded_once(name, dtype):
    """Property 76: near 500 the spacing of bfloat16 is 2, and a margin of 1/2 would be lost; what is computed
    in between has float32's precision."""
    check_half_precision(name, dtype)


def check_half_precision(name: str, dtype: torch.dtype) -> None:
    rows = [[-500, -3.5, -500, -3, 7, 3], [-40, -57, -40.5, -58, 3, 7]]
    rows += [[-0.6, -10, -0.36, -90, 4, 3]]  # RPO 40.12 + 0.11: 40.25 in bfloat16, and 40 rounded apart
    table = f64(rows).to(dtype)
    value, slopes = by_hand(MARGINS[name], table, SOME)
    out = call(MARGINS[name], table, SOME)
    float32 = 500 * 16 * roundoff(torch.float32)  # a dozen operations on numbers up to 500
    assert_within(out.losses, value, 1.01 * roundoff(dtype) * value.abs() + float32)
    for weights, pulls in ((out.chosen_weights, -slopes[:, 0]), (out.rejected_weights, slopes[:, 1])):
        assert_within(weights, pulls, 1.01 * roundoff(dtype) * pulls.abs() + float32)


@pytest.mark.parametrize("name", MARGINS)
def test_certain_completions_are_nothing_special(name):
    """Log-probabilities of 0 and of -1e-300, under either, and all of them 0."""
    logps = f64([[0, -1, -1e-300, -1], [-1, 0, -1, -1e-300], [0, 0, 0, 0], [-1e-300, -1, 0, 0]])
    table = torch.cat([logps, torch.ones(4, 2)], -1)
    check_value(name, table, SOME)
    check_gradient(name, table, SOME)


def test_at_the_corners_the_weight_is_what_is_applied():
    """The hinge at a margin of exactly 1 pulls no more; DPO-Positive at the reference counts no fall."""
    one, nothing = f64([1]).requires_grad_(), f64([0])
    for out, weight in (
        (hinge_loss(one, nothing, nothing, nothing, beta=1.0), 0.0),
        (dpop_loss(one, nothing, one.detach(), nothing, beta=1.0, lam=9.0), 0.5),
    ):
        (gradient,) = torch.autograd.grad(out.losses.sum(), one)
        assert gradient.item() == -weight and out.chosen_weights.item() == weight


# -------------------------------------------------------------------------------- where they lead, on tables


def uneven(seed: int, completions: int) -> tuple[Tensor, Rankings]:
    """A reference and comparisons with random weights, a quarter of the outcomes never seen, in a chain at
    least."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(1, completions, generator=generator, dtype=torch.float64).log_softmax(-1)
    order = torch.tensor(list(itertools.permutations(range(completions), 2)))
    weight = torch.rand(len(order), generator=generator, dtype=torch.float64)
    weight = weight * (torch.rand(len(order), generator=generator) > 0.25)
    weight[order[:, 1] - order[:, 0] == 1] += 0.01
    return ref, Rankings(torch.zeros(len(order), dtype=torch.long), order, weight / weight.sum())


@pytest.mark.parametrize("seed", range(12))
def test_the_hinge_ends_at_a_solution_of_its_linear_programme(seed):
    """[D12.9] No whole rewards from 0 to 3 K / 2, all of them tried, and none of many others are better."""
    completions = 2 + seed % 3
    ref, data = uneven(seed, completions)
    best = hinge_optimum(data, ref, beta=0.7)
    rewards = 0.7 * (best - ref)
    torch.testing.assert_close((rewards - rewards[:, :1]).round(), rewards - rewards[:, :1])
    whole = torch.cartesian_prod(*[torch.arange(3 * completions // 2 + 1)] * completions).double()
    other = 3 * torch.randn(500, completions, generator=torch.Generator().manual_seed(0)).double()
    scores = torch.cat([whole, other, rewards])
    gaps = scores[:, data.order[:, 0]] - scores[:, data.order[:, 1]]
    losses = (1 - gaps).clamp(min=0) @ data.weight
    assert losses[-1] <= losses.min() + 1e-12  # rounding
    found = loss_on_table(hinge_loss, best, ref, data, beta=0.7).losses
    assert_within(data.weight @ found, losses[-1], 1e-12)


def test_what_has_no_optimum_or_no_pairs_is_refused_in_a_sentence():
    """One for each."""
    ref = torch.full((1, 17), -math.log(17)).double()
    with pytest.raises(InputError, match="17 are more than 16"):
        hinge_optimum(expected_pairs(0 * ref, all_sets(ref < 0)), ref, beta=1.0)
    with pytest.raises(InputError, match="plackett_luce takes no pairs"):
        with_nll(PLACKETT_LUCE)
    once = Rankings(torch.zeros(1).long(), torch.tensor([[0, 1]]), torch.ones(1))
    with pytest.raises(InputError, match="some completion never won"):
        rpo_optimum(once, ref[:, :2], beta=1.0, nll_weight=1.0, lengths=torch.ones(1, 2))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.rows == "preferences"])
def test_with_nll_adds_the_same_to_every_loss_of_pairs(name):
    """[D12.13] Also to one that reads no reference, or lengths of its own, or a divergence."""
    loss, policy, lengths = LOSSES[name], ROWS["near"], torch.randint(1, 6, (6, 3), generator=seeded(2))
    added, share = with_nll(loss), 0.7 / lengths[:, 0].double()
    assert added.optimum == "not known" and not added.charted and added.rows == "preferences"
    if "nll_weight" in loss.parameters:
        return  # RPO; twice is one with the last weight
    for options in settings_of(loss):
        plain, out = (
            on_rows(each, policy, options | extra)
            for each, extra in ((loss, {}), (added, {"nll_weight": 0.7}))
        )
        torch.testing.assert_close(out.losses, plain.losses - share * policy[:, 0], **CLOSE)
        torch.testing.assert_close(out.chosen_weights, plain.chosen_weights + share, **CLOSE)
        assert torch.equal(out.rejected_weights, plain.rejected_weights)
        assert torch.equal(out.chosen_rewards, plain.chosen_rewards)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dpo_positive_stays_at_the_reference():
    """[D12.14] From a certain lambda on, which does not depend on beta, no policy is better than the
    reference; below it one is. A little probability is moved from each completion to each other."""
    check_threshold()


def check_threshold() -> None:
    ref = f64([[0.4, 0.3, 0.2, 0.1]]).log()
    data = expected_pairs(f64([[0.5, -0.5, 1.0, 0.0]]), all_sets(ref < 0))
    weights, pi = all_pairs(preference_matrix(f64([0.5, -0.5, 1.0, 0.0]))), ref[0].exp()
    wins, ahead = weights.sum(1), (weights.sum(1) - weights.sum(0)) / pi
    threshold = ((ahead[:, None] - ahead) * pi / wins).max().item()
    moves = [
        (pi + size * (1e-4 * torch.eye(4)[i] - 1e-4 * torch.eye(4)[j])).log()
        for size in (1, 100)
        for i, j in itertools.permutations(range(4), 2)
    ]
    for beta, lam in itertools.product((0.1, 1.0), (0.99 * threshold, 1.01 * threshold)):
        mean = [
            mean_on_table(dpop_loss, table[None], ref, data, beta=beta, lam=lam)[0]
            for table in (*moves, ref[0])
        ]
        assert (min(mean[:-1]) >= mean[-1]) == (lam > threshold)


# ------------------------------------------------------------------------------------------ planted mistakes

MUTANTS = {
    "the hinge's margin without beta": (hinge_loss, "1 - beta * h", "1 - h", "hinge"),
    "the hinge's corner at 0": (hinge_loss, "1 - beta * h", "-beta * h", "hinge"),
    "EXO's labels exchanged": (
        exo_loss, "math.log1p(-label_smoothing), math.log(label_smoothing)",
        "math.log(label_smoothing), math.log1p(-label_smoothing)", "exo",
    ),
    "EXO the other way round": (exo_loss, "q, rest = torch.sigmoid(u), torch.sigmoid(-u)",
        "q, rest = 0 * u + 1 - label_smoothing, 0 * u + label_smoothing", "exo",
    ),
    "DiscoPOP's blend the other way round": (
        discopop_loss, "rest = torch.sigmoid(u / tau), ", "rest = torch.sigmoid(-u / tau), ", "discopop",
    ),
    "DiscoPOP's tau as a factor": (discopop_loss, "u / tau", "u * tau", "discopop"),
    "averaged DPO's margin without beta": (averaged_dpo_loss, "beta * h", "h", "averaged_dpo"),
    "averaged DPO's pull of the other side": (
        averaged_dpo_loss, "torch.sigmoid(-u)", "torch.sigmoid(u)", "averaged_dpo",
    ),
    "the likelihood not averaged": (with_nll, "nll_weight / token", "nll_weight + 0 * token", "rpo"),
    "the likelihood without its pull": (with_nll, "out.chosen_weights + share", "out.chosen_weights", "rpo"),
    "the likelihood's sign": (with_nll, "out.losses - share", "out.losses + share", "rpo"),
    "DPO-Positive's rise for a fall": (dpop_loss, "F.relu(-chosen)", "F.relu(chosen)", "dpop"),
    "DPO-Positive's fall of the rejected": (dpop_loss, "F.relu(-chosen)", "F.relu(-rejected)", "dpop"),
    "DPO-Positive's penalty outside of the margin's beta": (
        dpop_loss, "beta * (chosen - rejected - lam * F", "(beta * (chosen - rejected) - lam * F", "dpop",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_caught(name, monkeypatch):
    """By the value or the gradient of the fixed table."""
    function, right, wrong, loss = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        test_value_and_gradient_of_a_fixed_table(loss)


def test_rounding_twice_is_caught(monkeypatch):
    """Of RPO's two parts."""
    plant(monkeypatch, with_nll, "widen(value) if isinstance(value, Tensor) else value", "value")
    with pytest.raises(CAUGHT):
        check_half_precision("rpo", torch.bfloat16)
