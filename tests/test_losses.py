"""Every loss four ways: its value, its gradient, its reduction to a sibling, and its extremes.

Expected values come from exact rational margins (`Fraction`) and the scalar functions of `math`, written
out once more in this file; equation numbers are the paper's, property numbers those of the property list.
A bound below counts unit roundoffs (U in float64): half a unit in the last place for each operation.
"""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import betas, generators, normal, worlds
from torch import Tensor

from dpo_minimal import (
    ipo_loss,
    losses,
)

U = 2.0**-53
STEP = (
    2.0**-16
)  # of central differences: truncation STEP^2/6 = 4e-11, rounding 10 U / STEP = 7e-11 near a loss of 10
LOGISTIC_THIRD = 1 / (6 * math.sqrt(3))  # the largest |third derivative| of -log sigmoid, s(1-s)|1-2s|
WIDE = (torch.float64, torch.float32)
HALF = (torch.bfloat16, torch.float16)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


# ------------------------------------------------------------------------------------------- the inputs


class Pairs(NamedTuple):
    """(B, 4): policy chosen, policy rejected, reference chosen, reference rejected; and beta."""

    table: Tensor
    beta: float


class Ranked(NamedTuple):
    """(B, K) log-probabilities of ranked answers, best first; and beta."""

    policy: Tensor
    reference: Tensor
    beta: float


ROWS, PLACES = st.integers(1, 8), st.integers(2, 8)


@st.composite
def pairs(draw, rows=ROWS, scale=3.0) -> Pairs:
    return Pairs(normal(draw(rows), 4, generator=draw(generators), scale=scale), draw(betas))


@st.composite
def ranked(draw, places=PLACES) -> Ranked:
    generator, shape = draw(generators), (draw(ROWS), draw(places))
    return Ranked(normal(*shape, generator=generator), normal(*shape, generator=generator), draw(betas))


class Indexed(NamedTuple):
    """B completions and T pairs of positions among them, with repetitions; and beta."""

    policy: Tensor
    reference: Tensor
    chosen: Tensor
    rejected: Tensor
    beta: float


@st.composite
def indexed(draw) -> Indexed:
    generator, count = draw(generators), draw(PLACES)
    num_pairs = draw(st.integers(count + 1, 3 * count))  # more pairs than completions: some must repeat
    position = [torch.randint(count, (num_pairs,), generator=generator) for _ in range(2)]
    policy, reference = normal(2, count, generator=generator)
    return Indexed(policy, reference, *position, draw(betas))


def on_grid(table: Tensor) -> Tensor:
    """Rounded to multiples of 2^-20, so that sums and differences of entries are exact in float64."""
    return (table * 2**20).round() / 2**20


# ------------------------------------------------------------------------- the expected, written out again


def logratio_margins(table: Tensor) -> list[Fraction]:
    """log pi(w)/pi_ref(w) - log pi(l)/pi_ref(l) of each row, without any rounding."""
    rows = [[Fraction(entry) for entry in row] for row in table.tolist()]
    return [(policy_w - ref_w) - (policy_l - ref_l) for policy_w, policy_l, ref_w, ref_l in rows]


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u)) if u >= 0 else math.exp(u) / (1 + math.exp(u))


def minus_log_sigmoid(u: float) -> float:
    """log(1 + e^-u), with the larger of 1 and e^-u taken out of the logarithm."""
    return max(0.0, -u) + math.log1p(math.exp(-abs(u)))


def dpo_values(table: Tensor, beta: float) -> Tensor:
    return f64([minus_log_sigmoid(float(Fraction(beta) * h)) for h in logratio_margins(table)])


def dpo_weights(table: Tensor, beta: float) -> Tensor:
    return f64([beta * sigmoid(-float(Fraction(beta) * h)) for h in logratio_margins(table)])


def ipo_values(table: Tensor, beta: float) -> Tensor:
    return f64([float((h - 1 / (2 * Fraction(beta))) ** 2) for h in logratio_margins(table)])


def ipo_weights(table: Tensor, beta: float) -> Tensor:
    return f64([float(1 / Fraction(beta) - 2 * h) for h in logratio_margins(table)])


def exact_rewards(policy: Tensor, reference: Tensor, beta: float) -> list[list[float]]:
    return [
        [float(Fraction(beta) * (Fraction(p) - Fraction(q))) for p, q in zip(policy_row, reference_row)]
        for policy_row, reference_row in zip(policy.tolist(), reference.tolist())
    ]


def chance_of_place(rewards: list[float], place: int, answer: int) -> float:
    """P(answer takes the place | the places before are as ranked): a softmax over those still there."""
    return 1 / math.fsum(math.exp(other - rewards[answer]) for other in rewards[place:])


def plackett_luce_values(rewards: list[list[float]]) -> Tensor:
    return f64([-math.fsum(math.log(chance_of_place(row, k, k)) for k in range(len(row))) for row in rewards])


def plackett_luce_weights(rewards: list[list[float]], beta: float) -> Tensor:
    def weight(row, k):
        return beta * (1 - math.fsum(chance_of_place(row, i, k) for i in range(k + 1)))

    return f64([[weight(row, k) for k in range(len(row))] for row in rewards])


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------- how far rounding can reach


def dpo_rounding(table: Tensor, beta: float, dtype=torch.float64) -> Tensor:
    """Property 75. beta, the product and the last subtraction cost one roundoff of beta |h| each, the two
    differences one of their own size, -logsigmoid four of the loss; 1.01 is for products of roundoffs."""
    table = table.double()
    policy, reference = (table[:, 0] - table[:, 1]).abs(), (table[:, 2] - table[:, 3]).abs()
    margin = f64([abs(float(h)) for h in logratio_margins(table)])
    u, tiny = roundoff(dtype), torch.finfo(dtype).tiny  # tiny: where e^-margin underflows
    return 1.01 * beta * u * (policy + reference + 3 * margin) + 4 * u * dpo_values(table, beta) + tiny


def ipo_rounding(table: Tensor, beta: float, dtype=torch.float64) -> Tensor:
    """The distance d to the target is off by a roundoff for each operation on its way, d^2 by 2 d times
    that and by one more roundoff; 2 for the products of roundoffs and the expected value's own."""
    table, target = table.double(), 1 / (2 * beta)
    distance = ipo_values(table, beta).sqrt()
    return 4 * roundoff(dtype) * distance * (2 * table.abs().sum(-1) + 3 * target + distance)


def plackett_luce_rounding(rewards: Tensor, size: Tensor | float, dtype=torch.float64) -> float:
    """K places, each a chain of at most K sums of exponentials, each link off by at most four roundoffs of
    the largest entry `size` or of the log of K. Also bounds the error of a place's log-chance, and hence of
    the chances, which are at most one."""
    K = rewards.shape[-1]
    return 4 * K**2 * roundoff(dtype) * (float(size) + math.log(K))


def ranked_size(example: Ranked) -> float:
    """The largest number on the way to an implicit reward."""
    return example.beta * float(example.policy.abs().max() + example.reference.abs().max())


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """|actual - expected| <= bound everywhere; NaN and infinity fail."""
    error = (actual.detach().double() - expected.detach().double()).abs()
    assert (error <= bound).all(), f"{actual} is not {expected}: off by {error}, allowed {bound}"


# ------------------------------------------------------------------------------------------- derivatives


def autograd(loss_of_rows, table: Tensor) -> Tensor:
    """Gradient of the summed per-row losses: row b of it is the gradient of loss b."""
    table = table.clone().requires_grad_()
    loss_of_rows(table).sum().backward()
    return table.grad


def central_differences(loss_of_rows, table: Tensor) -> Tensor:
    """The same by moving one column at a time; divided by the step really taken, as x + STEP rounds."""
    columns = []
    for k in range(table.shape[-1]):
        up, down = table.clone(), table.clone()
        up[:, k] += STEP
        down[:, k] -= STEP
        columns.append((loss_of_rows(up) - loss_of_rows(down)) / (up[:, k] - down[:, k]))
    return torch.stack(columns, -1)


def difference_error(third_derivative: float, evaluation_error: Tensor | float) -> Tensor | float:
    """STEP^2/6 times the third derivative, and both evaluations' error over 2 STEP; the 2 in front since
    the latter is known at the midpoint only."""
    return STEP**2 / 6 * third_derivative + 2 * evaluation_error / STEP


SIGNS = f64([-1, 1, 1, -1])  # of the gradient weight, in the order of the columns of `Pairs`


def dpo_rows(beta: float):
    return lambda table: losses.dpo_loss(*table.unbind(-1), beta=beta).losses


def ipo_rows(beta: float):
    return lambda table: ipo_loss(*table.unbind(-1), beta=beta).losses


def from_margin(loss, margin: Tensor, *, beta: float) -> losses.PreferenceLoss:
    """A loss at the given log-ratio margins, reached by the chosen answer's policy alone."""
    zero = torch.zeros_like(margin)
    return loss(margin, zero, zero, zero, beta=beta)


# ============================================================================================ DPO: value


@given(pairs(scale=3.0) | pairs(scale=30.0))
def test_dpo_value_in_exact_arithmetic(example):
    """Eq. 7, property 75 in float64: -log sigmoid of the margin computed without rounding."""
    actual = losses.dpo_loss(*example.table.unbind(-1), beta=example.beta).losses
    # twice: the expected value is itself rounded when it leaves `Fraction`
    assert_within(actual, dpo_values(*example), 2 * dpo_rounding(*example))


@given(pairs())
def test_dpo_value_at_reference_is_log_2(example):
    """Eq. 7, property 1: the policy at the reference has loss log 2 and weight beta / 2, whatever beta."""
    policy_w, policy_l = example.table[:, 0], example.table[:, 1]
    out = losses.dpo_loss(policy_w, policy_l, policy_w, policy_l, beta=example.beta)
    assert_within(out.losses, torch.full_like(policy_w, math.log(2)), 1e-15)  # four roundoffs of log 2
    assert (out.gradient_weights == example.beta / 2).all()
    assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()


@given(pairs(scale=30.0))
def test_dpo_limit_of_vanishing_beta(example):
    """Eq. 7, property 2 in the limit: beta = 1e-300 gives exactly log 2 and a gradient of at most beta."""
    beta = 1e-300
    loss = losses.dpo_loss(*example.table.unbind(-1), beta=beta).losses
    assert (loss == -torch.nn.functional.logsigmoid(f64(0.0))).all()
    assert_within(loss, torch.full_like(loss, math.log(2)), 2 * U)  # the next float64 on either side
    gradient = autograd(dpo_rows(beta), example.table)
    assert (gradient.abs() <= beta).all() and (gradient != 0).all()


@given(pairs(), st.integers(-8, 8))
def test_dpo_depends_on_beta_times_margin_only(example, power):
    """Eq. 7, property 3: l(beta, h) = l(1, beta h)."""
    actual = losses.dpo_loss(*example.table.unbind(-1), beta=example.beta).losses
    margin = example.beta * f64([float(h) for h in logratio_margins(example.table)])
    # both sides are off by the rounding of a margin
    assert_within(actual, from_margin(losses.dpo_loss, margin, beta=1.0).losses, 2 * dpo_rounding(*example))
    # a power of two moves from the log-probabilities to beta without any rounding: not one bit changes
    scaled = losses.dpo_loss(*(example.table / 2.0**power).unbind(-1), beta=example.beta * 2.0**power)
    assert torch.equal(scaled.losses, actual)


@given(pairs(scale=3.0) | pairs(scale=10.0))
def test_dpo_swap_changes_the_loss_by_the_margin(example):
    """Eq. 7, property 4: l(w, l) - l(l, w) = -u, as l(-u) = l(u) + u."""
    policy_w, policy_l, ref_w, ref_l = example.table.unbind(-1)
    right = losses.dpo_loss(policy_w, policy_l, ref_w, ref_l, beta=example.beta)
    wrong = losses.dpo_loss(policy_l, policy_w, ref_l, ref_w, beta=example.beta)
    margin = f64([float(Fraction(example.beta) * h) for h in logratio_margins(example.table)])
    bound = dpo_rounding(*example) + dpo_rounding(example.table[:, [1, 0, 3, 2]], example.beta)
    # U |u| more for the margin leaving `Fraction` and one for the difference of the losses
    assert_within(right.losses - wrong.losses, -margin, bound + 2 * U * margin.abs())
    assert torch.equal(right.chosen_rewards, wrong.rejected_rewards)


@given(pairs(), st.floats(-100, 100), st.sampled_from([(0, 1), (2, 3), (0, 2), (1, 3)]))
def test_dpo_is_invariant_to_shifts(example, shift, columns):
    """Eq. 5 and 7, properties 5, 6, 7: a constant added to both policy terms, to both reference terms, or
    to policy and reference of one answer changes neither loss nor weight."""
    table = on_grid(example.table)
    shifted = table.clone()
    shifted[:, columns] += on_grid(f64(shift))
    before = losses.dpo_loss(*table.unbind(-1), beta=example.beta)
    after = losses.dpo_loss(*shifted.unbind(-1), beta=example.beta)
    # on the grid the shift itself is exact; what remains is the rounding of the two evaluations
    bound = dpo_rounding(table, example.beta) + dpo_rounding(shifted, example.beta)
    assert_within(after.losses, before.losses, bound)
    # the weight has slope beta / 4 in the margin at most, and four roundoffs of its own
    assert_within(after.gradient_weights, before.gradient_weights, example.beta * (bound / 4 + 4 * U))


@given(st.floats(-1e4, 1e4), betas)
def test_dpo_value_lies_between_hinge_and_hinge_plus_log_2(margin, beta):
    """Eq. 7, property 8: max(0, -u) <= l <= max(0, -u) + log 2."""
    loss = from_margin(losses.dpo_loss, f64([margin]), beta=beta).losses.item()
    hinge = max(0.0, -beta * margin)  # the same product, so the same rounding
    slack = 1e-15 * (1 + hinge)  # the last addition and the logarithm, two roundoffs each
    assert hinge - slack <= loss <= hinge + math.log(2) + slack


def test_dpo_value_is_decreasing_and_convex():
    """Eq. 7, property 9: l' < 0, |l'| <= 1 and 0 <= l'' <= 1/4 in the margin; l'' = sigma (1 - sigma)."""
    margin = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    loss = from_margin(losses.dpo_loss, margin, beta=1.0).losses
    (slope,) = torch.autograd.grad(loss.sum(), margin, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), margin)
    assert (slope < 0).all() and (slope >= -1).all()
    assert (curvature >= 0).all() and (curvature <= 0.25 + U).all()  # U: one roundoff of 1/4 and to spare
    expected = f64([sigmoid(u) * sigmoid(-u) for u in margin.tolist()])
    assert_within(curvature, expected, 1e-15)  # products of numbers below one, a few roundoffs of 1/4
    values = loss.detach()
    assert (values[1:] < values[:-1]).all()
    # second differences of values up to 30, each with four roundoffs: 4 * 4 * 30 U
    assert (values[2:] - 2 * values[1:-1] + values[:-2] >= -480 * U).all()


# ========================================================================================= DPO: gradient


@given(pairs())
def test_dpo_gradient_by_hand_autograd_and_differences(example):
    """Sec. 4 (Eq. 21, 22), properties 10, 14: (-w, +w, +w, -w) with w = beta sigmoid(-u), three ways."""
    by_hand = dpo_weights(*example).unsqueeze(-1) * SIGNS
    # the slope of w in the margin is at most beta / 4; four roundoffs for the sigmoid on either side
    weight_error = (example.beta * (dpo_rounding(*example) / 2 + 8 * U)).unsqueeze(-1)

    weights = losses.dpo_loss(*example.table.unbind(-1), beta=example.beta).gradient_weights
    assert_within(weights.unsqueeze(-1) * SIGNS, by_hand, weight_error)

    gradient = autograd(dpo_rows(example.beta), example.table)
    assert_within(gradient, by_hand, weight_error)
    assert torch.equal(gradient, gradient[:, :1] * -SIGNS)  # one number up to sign: the sum is exactly 0

    error = difference_error(LOGISTIC_THIRD * example.beta**3, dpo_rounding(*example)).unsqueeze(-1)
    assert_within(central_differences(dpo_rows(example.beta), example.table), by_hand, error + weight_error)


@given(worlds(prompts=st.just(1)))
def test_dpo_gradient_in_logits_by_hand_autograd_and_differences(world):
    """Eq. 21, 22, property 14: in the logits of a table, -sum of m w (e_w - e_l), off the reference."""
    K = world.rewards.shape[-1]
    chosen, rejected = torch.tensor(list(itertools.permutations(range(K), 2))).T
    share = torch.rand(len(chosen), generator=world.generator, dtype=torch.float64)
    share /= share.sum()
    ref = world.ref_logps[0]

    def loss(logits):  # (1, K) -> (1,)
        logps = logits.log_softmax(-1)[0]
        rows = losses.dpo_loss(logps[chosen], logps[rejected], ref[chosen], ref[rejected], beta=world.beta)
        return (share @ rows.losses).unsqueeze(0)

    logps = world.logps[0]
    table = torch.stack([logps[chosen], logps[rejected], ref[chosen], ref[rejected]], -1)
    by_hand = torch.zeros_like(ref)
    pull = share * dpo_weights(table, world.beta)
    by_hand = (by_hand.index_add(0, rejected, pull) - by_hand.index_add(0, chosen, pull)).unsqueeze(0)
    # log-probabilities carry eight roundoffs of their size through the softmax; the weighted mean of
    # gradients of size beta one for each of its terms
    softmax_error = world.beta * 8 * U * float(table.abs().max())
    evaluation = float(dpo_rounding(table, world.beta).max()) + softmax_error + len(chosen) * U * 100
    gradient_error = world.beta * (evaluation + len(chosen) * 8 * U)
    assert_within(autograd(loss, world.logps), by_hand, gradient_error)
    error = difference_error(LOGISTIC_THIRD * world.beta**3, evaluation)
    assert_within(central_differences(loss, world.logps), by_hand, error + gradient_error)


@given(pairs())
def test_dpo_weight_exceeds_half_beta_where_the_order_is_wrong(example):
    """Sec. 4, property 11: w > beta / 2 exactly where the implicit rewards put the rejected answer first."""
    table = on_grid(example.table)  # no margin other than 0 is below 2^-20, far above a roundoff
    table[0, 0] = table[0, 1] + table[0, 2] - table[0, 3]  # one exact tie
    out = losses.dpo_loss(*table.unbind(-1), beta=example.beta)
    margins = logratio_margins(table)
    assert margins[0] == 0 and out.gradient_weights[0] == example.beta / 2
    assert (out.gradient_weights > example.beta / 2).tolist() == [h < 0 for h in margins]
    assert (out.gradient_weights < example.beta / 2).tolist() == [h > 0 for h in margins]
    assert (out.gradient_weights > 0).all() and (out.gradient_weights <= example.beta).all()


@given(st.floats(-25, 25) | st.floats(1.2, 1.35), betas)
def test_dpo_weight_grows_with_beta_up_to_a_known_margin(margin, beta):
    """Sec. 4, property 12: w = beta sigmoid(-beta h) grows in beta iff beta h < 1.278..., the root x of
    x = 1 + e^-x, where w h = x - 1 is largest."""
    root = 1.0
    for _ in range(100):  # a contraction by e^-x < 0.3 a step
        root = 1 + math.exp(-root)

    def weight(beta, h):
        return from_margin(losses.dpo_loss, f64([h]), beta=beta).gradient_weights.item()

    assert_within(f64(weight(root, 1.0)), f64(root - 1), 4 * U)  # product, sigmoid, root
    # w changes by the relative 1e-6 (1 - x sigmoid(x)): 1e-9 at least where x is 1e-3 off the root, against
    # 1e-12 for the second order and 1e-15 for rounding
    assume(abs(margin - root) > 1e-3)
    h = margin / beta
    assert (weight(beta * (1 + 1e-6), h) > weight(beta, h)) == (margin < root)


@given(pairs(rows=st.integers(2, 512)), generators)
def test_dpo_losses_follow_a_permutation_of_the_batch(example, generator):
    """Eq. 7, property 19: examples do not interact."""
    order = torch.randperm(len(example.table), generator=generator)
    loss = dpo_rows(example.beta)
    before, after = loss(example.table), loss(example.table[order])
    # a vectorised loop may end in a scalar one whose exponential differs by a unit in the last place
    assert_within(after, before[order], 4 * U * before[order])
    gradient = autograd(loss, example.table)
    assert_within(autograd(loss, example.table[order]), gradient[order], 4 * U * gradient[order].abs())
    # B additions, each off by at most a roundoff of the sum, on either side
    assert abs(before.mean() - after.mean()) <= 2 * len(order) * U * before.mean()


@given(indexed())
def test_dpo_mean_loss_and_gradient_survive_duplication_of_the_data(example):
    """Eq. 7, property 20: each pair twice leaves the mean loss and its gradient where they were."""

    def mean_loss(copies):
        def loss(logps):  # (1, B) -> (1,)
            w, v = example.chosen.repeat(copies), example.rejected.repeat(copies)
            rows = losses.dpo_loss(
                logps[0, w], logps[0, v], example.reference[w], example.reference[v], beta=example.beta
            )
            return rows.losses.mean(0, keepdim=True)

        return loss

    policy = example.policy.unsqueeze(0)
    once, twice = mean_loss(1)(policy), mean_loss(2)(policy)
    terms = 2 * len(example.chosen)  # one roundoff of the sum for each addition, on either side
    assert_within(twice, once, 2 * terms * U * once)
    assert_within(
        autograd(mean_loss(2), policy), autograd(mean_loss(1), policy), 4 * terms * U * example.beta
    )


# ======================================================================================== DPO: reductions


@given(worlds())
def test_dpo_loss_of_a_tilted_policy_is_the_reward_models_loss(world):
    """Eq. 2 = Eq. 7, property 22: L_DPO(pi_s) = L_R(s) for any rewards s, with pi_s of Eq. 4."""
    logits = world.ref_logps + world.rewards / world.beta
    policy = logits.log_softmax(-1)
    chosen, rejected = torch.tensor(list(itertools.permutations(range(policy.shape[-1]), 2))).T
    gathered = (
        tensor[:, index].flatten()
        for tensor, index in itertools.product((policy, world.ref_logps), (chosen, rejected))
    )
    table = torch.stack(list(gathered), -1)
    actual = losses.dpo_loss(*table.unbind(-1), beta=world.beta).losses
    reward_model = losses.bradley_terry_loss(
        world.rewards[:, chosen].flatten(), world.rewards[:, rejected].flatten()
    )
    # the tilted policy carries eight roundoffs of its logits through the softmax, on either answer
    tilt_error = 16 * U * world.beta * float(logits.abs().max() + policy.abs().max())
    assert_within(actual, reward_model, dpo_rounding(table, world.beta) * 2 + tilt_error)


@given(pairs())
def test_dpo_against_itself_is_log_2_without_gradient(example):
    """Eq. 7, property 28: a pair of twice the same completion adds log 2 and pulls nothing."""
    reference = example.table[:, 2]

    def loss(policy):  # (B, 1) -> (B,)
        return losses.dpo_loss(policy[:, 0], policy[:, 0], reference, reference, beta=example.beta).losses

    policy = example.table[:, :1]
    assert_within(loss(policy), torch.full_like(reference, math.log(2)), 4 * U)  # one logsigmoid
    assert (autograd(loss, policy) == 0).all()  # +w and -w meet in one entry


@given(pairs())
def test_dpo_with_a_flat_reference_is_bradley_terry_of_scaled_logps(example):
    """Eq. 2 and 7: without a preference of the reference, DPO is Bradley-Terry with rewards beta log pi."""
    table = example.table.clone()
    table[:, 2:] = -1.5
    actual = losses.dpo_loss(*table.unbind(-1), beta=example.beta).losses
    rewards = example.beta * table[:, :2]
    # scaling before subtracting moves the roundoffs to the size of the rewards, one each
    bound = dpo_rounding(table, example.beta) + 4 * U * (rewards.abs().sum(-1) + actual)
    assert_within(actual, losses.bradley_terry_loss(*rewards.unbind(-1)), bound)


# ========================================================================================== DPO: extremes


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_and_bradley_terry_at_extreme_margins(dtype, beta):
    """Eq. 2 and 7, property 74: at margins of +-1e4 the loss is 0 or 1e4, the gradient 0 or -beta."""
    policy = (f64([1e4, -1e4]) / beta).to(dtype).requires_grad_()
    size = beta * policy.detach()[0].double()  # 9984 in bfloat16, where 1e4 does not exist
    assert abs(size - 1e4) <= 1e4 * roundoff(dtype)
    zero = torch.zeros_like(policy)
    out = losses.dpo_loss(policy, zero, zero, zero, beta=beta)
    assert all(field.isfinite().all() and field.dtype == dtype for field in out)
    # exact: e^-1e4 is zero in every dtype, and beta is a power of two
    assert out.losses.tolist() == [0, size]
    assert out.gradient_weights.tolist() == [0, beta]
    assert out.chosen_rewards.tolist() == [size, -size] and (out.rejected_rewards == 0).all()
    out.losses.sum().backward()
    assert policy.grad.tolist() == [0, -beta]

    rewards = f64([size, -size]).to(dtype).requires_grad_()
    loss = losses.bradley_terry_loss(rewards, zero)
    assert loss.dtype == dtype and loss.tolist() == [0, size]
    loss.sum().backward()
    assert rewards.grad.tolist() == [0, -1]


def test_logistic_losses_have_no_jump_at_a_margin_of_20():
    """Eq. 2, 7, 18, 20: a softplus that turns linear beyond 20 is off by e^-20 = 2e-9; compare with forty
    decimal digits on either side of +20 and -20, for value and gradient."""
    margins = [sign * (19.5 + k / 16) for sign in (1, -1) for k in range(17)]
    with localcontext() as context:
        context.prec = 40
        exact = [(1 + (-Decimal(u)).exp()).ln() for u in margins]
        slope = [-1 / (1 + Decimal(u).exp()) for u in margins]
    value, slope = f64([float(x) for x in exact]), f64([float(x) for x in slope])
    margin, zero = f64(margins), torch.zeros(len(margins), dtype=torch.float64)
    both = torch.stack([margin, zero], -1)
    bound = 8 * U * value  # four roundoffs of the loss, relative even where it is 2e-9; margins are exact
    assert_within(from_margin(losses.dpo_loss, margin, beta=1.0).losses, value, bound)
    assert_within(losses.bradley_terry_loss(margin, zero), value, bound)
    column = margin.unsqueeze(-1)
    gradient = autograd(lambda t: from_margin(losses.dpo_loss, t[:, 0], beta=1.0).losses, column)
    assert_within(gradient[:, 0], slope, 8 * U * slope.abs())
    # Plackett-Luce subtracts two numbers near 20: four roundoffs of that size
    assert_within(losses.plackett_luce_loss(both), value, 4 * 21 * U)
    assert_within(losses.plackett_luce_dpo_loss(both, torch.zeros_like(both), beta=1.0), value, 4 * 21 * U)


@st.composite
def float32_pairs(draw) -> Pairs:
    """|log p| up to 1e4 in float32, the policy near the reference or far from it."""
    generator, size, spread = draw(generators), 10 ** draw(st.floats(0, 4)), 10 ** draw(st.floats(-2, 4))
    reference = -size * torch.rand(64, 2, generator=generator, dtype=torch.float64)
    policy = reference + spread * torch.randn(64, 2, generator=generator, dtype=torch.float64)
    return Pairs(torch.cat([policy, reference], -1).clamp(-1e4, 0).float(), draw(betas))


@given(float32_pairs())
def test_dpo_float32_error_is_within_the_derived_bound(example):
    """Eq. 7, property 75: beta u (|dlog pi| + |dlog ref| + 3 |h|) 1.01 + 4 u l, with u = 2^-24, against the
    same float32 inputs evaluated exactly."""
    actual = losses.dpo_loss(*example.table.unbind(-1), beta=example.beta).losses
    assert actual.dtype == torch.float32
    bound = dpo_rounding(*example, dtype=torch.float32)
    # the expected value's own error: two float64 roundoffs of the loss, 1e-8 of the bound's last term
    assert_within(actual, dpo_values(*example), bound * (1 + 1e-7))


@pytest.mark.parametrize(("dtype", "gap"), [(torch.bfloat16, 0.5), (torch.float16, 2.0**-4)])
def test_half_precision_is_widened_before_subtracting(dtype, gap):
    """Eq. 7 and 20, property 76: near 500 the spacing of bfloat16 is 2 (of float16 1/4). Policy -500 against
    -3 - gap, reference -500 against -3: a margin of gap, that a subtraction in the dtype loses entirely."""
    beta = 2.0
    table = f64([[-500, -3 - gap, -500, -3]]).to(dtype)
    assert table.double().tolist() == [[-500, -3 - gap, -500, -3]]  # all of it exists in the dtype
    policy_w, policy_l, ref_w, ref_l = table.unbind(-1)
    lost = (policy_w - policy_l) - (ref_w - ref_l)
    assert lost.item() == 0  # what this test is about

    out = losses.dpo_loss(*table.unbind(-1), beta=beta)
    indexed_loss, _ = losses.dpo_loss_from_indices(
        table[0, :2], table[0, 2:], torch.tensor([0]), torch.tensor([1]), beta=beta
    )
    expected = f64([minus_log_sigmoid(beta * gap)])
    # the answer is rounded once, to the dtype that came in; 1.01 for the float32 roundoffs before that
    bound = 1.01 * roundoff(dtype) * expected
    assert abs(math.log(2) - expected) > 8 * bound  # the wrong answer would be seen
    # Plackett-Luce takes policy minus reference, which loses nothing here but is held to the same
    for loss in (
        out.losses,
        indexed_loss,
        losses.plackett_luce_dpo_loss(table[:, :2], table[:, 2:], beta=beta),
    ):
        assert loss.dtype == dtype
        assert_within(loss, expected, bound)
    weight = f64([beta * sigmoid(-beta * gap)])
    assert_within(out.gradient_weights, weight, 1.01 * roundoff(dtype) * weight)

    ipo = ipo_loss(*table.unbind(-1), beta=beta)
    assert ipo.losses.dtype == dtype
    expected = f64([(gap - 1 / (2 * beta)) ** 2])
    assert_within(ipo.losses, expected, 1.01 * roundoff(dtype) * expected)


@given(ranked(), st.sampled_from(HALF))
def test_half_precision_results_are_rounded_once(example, dtype):
    """Eq. 2, 7, 18, 20, property 76: what is computed between input and output has float32's precision, so
    that the answer is the exact one for these inputs, rounded to their dtype."""
    beta = example.beta
    policy, reference = example.policy.to(dtype), example.reference.to(dtype)
    wide_policy, wide_reference = policy.double(), reference.double()
    table = torch.cat([policy[:, :2], reference[:, :2]], -1)
    smallest = torch.finfo(dtype).tiny  # below it, float16 is spaced evenly

    def assert_rounded_once(actual, expected, float32_error):
        assert actual.dtype == dtype
        assert_within(actual, expected, 1.01 * roundoff(dtype) * expected.abs() + float32_error + smallest)

    u = roundoff(torch.float32)
    dpo, ipo = (loss(*table.unbind(-1), beta=beta) for loss in (losses.dpo_loss, ipo_loss))
    dpo_error = dpo_rounding(table, beta, torch.float32)
    assert_rounded_once(dpo.losses, dpo_values(table, beta), dpo_error)
    assert_rounded_once(dpo.gradient_weights, dpo_weights(table, beta), beta * (dpo_error + 8 * u))
    assert_rounded_once(ipo.losses, ipo_values(table, beta), ipo_rounding(table, beta, torch.float32))
    size = table.double().abs().sum(-1)
    assert_rounded_once(ipo.gradient_weights, ipo_weights(table, beta), 8 * u * (size + 1 / beta))
    margin = wide_policy[:, 0] - wide_policy[:, 1]
    bradley_terry = f64([minus_log_sigmoid(u) for u in margin.tolist()])
    assert_rounded_once(losses.bradley_terry_loss(*policy[:, :2].unbind(-1)), bradley_terry, u * margin.abs())

    rewards = exact_rewards(wide_policy, wide_reference, beta)
    widened = Ranked(wide_policy, wide_reference, beta)
    error = plackett_luce_rounding(policy, ranked_size(widened), torch.float32)
    loss = losses.plackett_luce_dpo_loss(policy, reference, beta=beta)
    assert_rounded_once(loss, plackett_luce_values(rewards), error)
    weights = losses.plackett_luce_gradient_weights(policy, reference, beta=beta)
    assert_rounded_once(weights, plackett_luce_weights(rewards, beta), beta * error)
    loss = losses.plackett_luce_loss(policy)
    error = plackett_luce_rounding(policy, float(wide_policy.abs().max()), torch.float32)
    assert_rounded_once(loss, plackett_luce_values(wide_policy.tolist()), error)


@given(pairs())
def test_readouts_are_detached_implicit_rewards(example):
    """Eq. 5 and App. B, property 78: the rewards are beta (log pi - log pi_ref) and carry no gradient, nor
    do the weights; the losses do."""
    table = example.table.clone().requires_grad_()
    policy, reference = example.table[:, :2], example.table[:, 2:]
    expected = f64(exact_rewards(policy, reference, example.beta))
    for loss in (losses.dpo_loss, ipo_loss):
        out = loss(*table.unbind(-1), beta=example.beta)
        assert out.losses.requires_grad
        assert not any(readout.requires_grad for readout in out[1:])
        rewards = torch.stack([out.chosen_rewards, out.rejected_rewards], -1)
        assert_within(rewards, expected, 4 * U * expected.abs())  # difference, product, and their product
    weights = losses.plackett_luce_gradient_weights(table[:, :2], table[:, 2:], beta=example.beta)
    assert not weights.requires_grad


# ============================================================================================ index form


@given(indexed())
def test_index_form_is_the_paired_form_with_repeated_indices(example):
    """App. B (Eq. 7), property 79: losses of pairs given as positions, and one detached reward for each
    completion, against exact arithmetic and the paired call."""
    policy, reference, chosen, rejected, beta = example
    actual, rewards = losses.dpo_loss_from_indices(policy, reference, chosen, rejected, beta=beta)
    table = torch.stack([policy[chosen], policy[rejected], reference[chosen], reference[rejected]], -1)
    assert_within(actual, dpo_values(table, beta), 2 * dpo_rounding(table, beta))  # as for the paired form
    paired = losses.dpo_loss(*table.unbind(-1), beta=beta)
    assert_within(actual, paired.losses, 1e-15 * (1 + paired.losses))  # the same operations on the same rows
    [expected] = exact_rewards(policy.unsqueeze(0), reference.unsqueeze(0), beta)
    assert rewards.shape == policy.shape
    assert_within(rewards, f64(expected), 4 * U * f64(expected).abs())  # a difference and a product
    in_int32, _ = losses.dpo_loss_from_indices(policy, reference, chosen.int(), rejected.int(), beta=beta)
    assert torch.equal(in_int32, actual)


@given(indexed())
def test_index_form_gradient_adds_up_over_repeated_indices(example):
    """App. B (Eq. 21), properties 10, 79: a completion's gradient is the sum of +-w over all pairs it is in,
    by hand, by autograd and by central differences."""
    policy, reference, chosen, rejected, beta = example

    def loss(logps):  # (1, B) -> (1,)
        rows, _ = losses.dpo_loss_from_indices(logps[0], reference, chosen, rejected, beta=beta)
        return rows.sum().unsqueeze(0)

    table = torch.stack([policy[chosen], policy[rejected], reference[chosen], reference[rejected]], -1)
    by_hand = [0.0] * len(policy)
    for w, v, weight in zip(chosen.tolist(), rejected.tolist(), dpo_weights(table, beta).tolist()):
        by_hand[w] -= weight
        by_hand[v] += weight
    by_hand = f64([by_hand])
    # the error of each weight, as in the paired form, and a roundoff of the partial sum for each addition
    terms = len(chosen)
    evaluation = float(dpo_rounding(table, beta).sum() + terms * U * dpo_values(table, beta).sum())
    sum_error = beta * (evaluation + terms * (8 + terms) * U)
    gradient = autograd(loss, policy.unsqueeze(0))
    assert_within(gradient, by_hand, sum_error)
    third = terms * LOGISTIC_THIRD * beta**3
    differences = central_differences(loss, policy.unsqueeze(0))
    assert_within(differences, by_hand, difference_error(third, evaluation) + sum_error)


def test_index_form_reads_out_detached_rewards_and_twins_cost_log_2():
    """App. B, properties 28, 78: rewards carry no gradient; a pair of a completion with itself costs log 2
    and its gradient is exactly 0."""
    policy = f64([-3.0, -1.0, -2.0]).requires_grad_()
    reference, twins = f64([-1.0, -2.5, -4.0]), torch.tensor([0, 2, 2])
    loss, rewards = losses.dpo_loss_from_indices(policy, reference, twins, twins, beta=0.7)
    assert loss.requires_grad and not rewards.requires_grad
    assert_within(loss, torch.full_like(loss, math.log(2)), 4 * U)  # one logsigmoid
    loss.sum().backward()
    assert (policy.grad == 0).all()


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
def test_index_form_at_extreme_margins(dtype):
    """App. B, property 74: a margin of +-1e4 through a repeated index gives finite losses 0 and 1e4, and
    the completions' gradients are those of the one pair that is wrong."""
    policy = f64([0, -1e4]).to(dtype).requires_grad_()
    size = -policy[1].item()  # 9984 in bfloat16
    reference = torch.zeros(2, dtype=dtype)
    first, second = torch.tensor([0, 1]), torch.tensor([1, 0])
    loss, rewards = losses.dpo_loss_from_indices(policy, reference, first, second, beta=1.0)
    assert loss.dtype == rewards.dtype == dtype
    assert loss.tolist() == [0, size] and rewards.tolist() == [0, -size]  # exact: e^-1e4 is zero
    loss.sum().backward()
    assert policy.grad.tolist() == [1, -1]


# =================================================================================================== IPO


@given(pairs())
def test_ipo_value_in_exact_arithmetic(example):
    """IPO (Azar et al. 2023): (h - 1/(2 beta))^2 with h computed without rounding."""
    actual = ipo_loss(*example.table.unbind(-1), beta=example.beta).losses
    assert_within(actual, ipo_values(*example), ipo_rounding(*example))


@given(pairs(), st.integers(-4, 4))
def test_ipo_is_zero_at_its_target_and_only_there(example, power):
    """[D12.1] loss, weight and gradient vanish at h = 1/(2 beta); at the reference the loss is the target
    squared. beta a power of two and logs on a grid, so that the target is met exactly."""
    beta = 2.0**power
    table = on_grid(example.table)
    table[:, 0] = table[:, 1] + table[:, 2] - table[:, 3] + 1 / (2 * beta)
    assert all(h == 1 / (2 * Fraction(beta)) for h in logratio_margins(table))
    out = ipo_loss(*table.unbind(-1), beta=beta)
    assert (out.losses == 0).all() and (out.gradient_weights == 0).all()
    assert (autograd(ipo_rows(beta), table) == 0).all()
    table[:, 0] += 2.0**-10
    assert (ipo_loss(*table.unbind(-1), beta=beta).losses == 2.0**-20).all()
    table[:, :2] = table[:, 2:]
    assert (ipo_loss(*table.unbind(-1), beta=beta).losses == 1 / (4 * beta**2)).all()


@given(pairs())
def test_ipo_gradient_by_hand_autograd_and_differences(example):
    """IPO: (-w, +w, +w, -w) with w = 1/beta - 2h, three ways."""
    by_hand = ipo_weights(*example).unsqueeze(-1) * SIGNS
    # four roundoffs of each number that enters, doubled for the factor 2 in front of h
    weight_error = (8 * U * (example.table.abs().sum(-1) + 1 / example.beta)).unsqueeze(-1)
    weights = ipo_loss(*example.table.unbind(-1), beta=example.beta).gradient_weights
    assert_within(weights.unsqueeze(-1) * SIGNS, by_hand, weight_error)

    gradient = autograd(ipo_rows(example.beta), example.table)
    assert_within(gradient, by_hand, weight_error)
    assert torch.equal(gradient, gradient[:, :1] * -SIGNS)  # one number up to sign

    # a parabola has no third derivative; a step of STEP moves the distance d, whose rounding then reaches
    # d^2 by 2 STEP more than at the midpoint: covered by the roundoffs of STEP-sized numbers
    evaluation = ipo_rounding(*example) + 16 * U * STEP * (example.table.abs().sum(-1) + 1 / example.beta)
    error = difference_error(0.0, evaluation).unsqueeze(-1)
    assert_within(central_differences(ipo_rows(example.beta), example.table), by_hand, error + weight_error)


@given(pairs(), st.integers(-4, 2), st.integers(-(2**10), 2**10))
def test_ipo_weight_changes_sign_past_the_target(example, power, steps):
    """IPO: the pull is towards h = 1/(2 beta) from either side, w = 2 (t - h)."""
    beta = 2.0**power
    table = on_grid(example.table)
    table[:, 0] = table[:, 1] + table[:, 2] - table[:, 3] + 1 / (2 * beta) + steps * 2.0**-10
    weights = ipo_loss(*table.unbind(-1), beta=beta).gradient_weights
    assert (weights == -2 * steps * 2.0**-10).all()  # everything is on a grid: exact
    assert (autograd(ipo_rows(beta), table)[:, 0] == 2 * steps * 2.0**-10).all()


@given(worlds(prompts=st.just(1)))
def test_ipo_expectation_is_least_squares_on_preferences(world):
    """[D12.1] E = sum over pairs of m [(h - d/(2 beta))^2 + (1 - d^2)/(4 beta^2)], with d = 2 p - 1."""
    K, beta, target = world.rewards.shape[-1], world.beta, 1 / (2 * world.beta)
    policy, reference, rewards = world.logps[0], world.ref_logps[0], world.rewards[0].tolist()
    i, j = torch.combinations(torch.arange(K), 2).T
    mass = torch.rand(len(i), generator=world.generator, dtype=torch.float64)
    mass /= mass.sum()
    p = f64([sigmoid(rewards[a] - rewards[b]) for a, b in zip(i.tolist(), j.tolist())])

    def ipo(w, v):
        return ipo_loss(policy[w], policy[v], reference[w], reference[v], beta=beta).losses

    expectation = mass @ (p * ipo(i, j) + (1 - p) * ipo(j, i))
    h, d = (policy - reference)[i] - (policy - reference)[j], 2 * p - 1
    expected = mass @ ((h - d * target) ** 2 + target**2 * (1 - d**2))
    # about sixteen operations on squares no larger than this, and a sum over the pairs
    size = float(4 * policy.abs().max() + 4 * reference.abs().max() + target) ** 2
    assert_within(expectation, expected, (16 + len(i)) * U * size)


@given(pairs(scale=0.3))
def test_dpo_is_ipo_to_third_order(example):
    """Eq. 7 and IPO: log 2 - u/2 + u^2/8 is log 2 - 1/2 + (beta^2/8) (h - 2/beta)^2, IPO with a target of
    2/beta, hence with beta/4; what is left is at most u^4/192, as l'''' <= 1/8."""
    dpo = losses.dpo_loss(*example.table.unbind(-1), beta=example.beta)
    ipo = ipo_loss(*example.table.unbind(-1), beta=example.beta / 4)
    margin = example.beta * f64([float(h) for h in logratio_margins(example.table)])
    parabola = math.log(2) - 0.5 + example.beta**2 / 8 * ipo.losses
    # ipo's rounding, scaled, and a few roundoffs of numbers of the size of the parabola
    rounding = example.beta**2 / 8 * ipo_rounding(example.table, example.beta / 4)
    rounding = rounding + dpo_rounding(*example) + 8 * U * (1 + parabola)
    assert_within(dpo.losses, parabola, margin**4 / 192 + rounding)
    assert (dpo.losses <= parabola + rounding).all()  # the u^4 term is negative: a one-sided remainder
    # at the reference both pull the same way (property 65), with beta/2 and 1/beta
    at_reference = [
        loss(*[example.table[:, 0]] * 4, beta=example.beta).gradient_weights
        for loss in (losses.dpo_loss, ipo_loss)
    ]
    assert_within(at_reference[0] * 2 / example.beta, at_reference[1] * example.beta, 4 * U)  # both are one


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
def test_ipo_at_extreme_margins(dtype):
    """IPO, property 74: at h = +-1e4 loss and gradient are large and finite, and keep their precision."""
    beta = 0.5
    margin = f64([1e4, -1e4]).to(dtype).requires_grad_()
    out = from_margin(ipo_loss, margin, beta=beta)
    assert all(field.dtype == dtype for field in out)
    wide = margin.detach().double()
    value, weight = (wide - 1 / (2 * beta)) ** 2, 1 / beta - 2 * wide
    # three float32 operations and the final rounding, each at most a roundoff of the dtype
    assert_within(out.losses, value, 4 * roundoff(dtype) * value)
    assert_within(out.gradient_weights, weight, 4 * roundoff(dtype) * weight.abs())
    out.losses.sum().backward()
    assert_within(margin.grad, -weight, 4 * roundoff(dtype) * weight.abs())


# ========================================================================================= Bradley-Terry


def bradley_terry_rounding(rewards: Tensor) -> Tensor:
    """One subtraction and the expected margin's rounding, and the four roundoffs of either loss."""
    margin = (rewards[:, 0] - rewards[:, 1]).abs()
    return 2 * U * margin + 8 * U * (margin + 1)


@given(pairs(scale=3.0) | pairs(scale=30.0))
def test_bradley_terry_value_in_exact_arithmetic(example):
    """Eq. 1 and 2, property 33: minus the log of sigmoid(r_w - r_l), and the two orders' chances add up to
    one."""
    rewards = example.table[:, :2]
    actual = losses.bradley_terry_loss(*rewards.unbind(-1))
    expected = f64([minus_log_sigmoid(float(Fraction(w) - Fraction(v))) for w, v in rewards.tolist()])
    assert_within(actual, expected, bradley_terry_rounding(rewards))
    swapped = losses.bradley_terry_loss(*rewards.flip(-1).unbind(-1))
    # e^-loss is at most one, and relative to itself off by its exponent's error
    total = (-actual).exp() + (-swapped).exp()
    assert_within(total, torch.ones_like(total), 2 * bradley_terry_rounding(rewards))


@given(pairs())
def test_bradley_terry_gradient_by_hand_autograd_and_differences(example):
    """Eq. 2: (-sigmoid(-u), +sigmoid(-u)), three ways."""
    rewards = example.table[:, :2]

    def loss(table):
        return losses.bradley_terry_loss(*table.unbind(-1))

    pull = f64([sigmoid(-float(Fraction(w) - Fraction(v))) for w, v in rewards.tolist()])
    by_hand = torch.stack([-pull, pull], -1)
    evaluation = bradley_terry_rounding(rewards).unsqueeze(-1)
    gradient_error = evaluation / 4 + 8 * U  # the sigmoid's slope is at most 1/4
    gradient = autograd(loss, rewards)
    assert_within(gradient, by_hand, gradient_error)
    assert torch.equal(gradient[:, 0], -gradient[:, 1])
    differences = central_differences(loss, rewards)
    assert_within(differences, by_hand, difference_error(LOGISTIC_THIRD, evaluation) + gradient_error)


# ========================================================================================= Plackett-Luce


@given(ranked())
def test_plackett_luce_value_by_a_loop_over_places(example):
    """Eq. 18: minus the log of the product of the chances with which each place is filled."""
    rewards = example.policy
    error = plackett_luce_rounding(rewards, rewards.abs().max())
    assert_within(losses.plackett_luce_loss(rewards), plackett_luce_values(rewards.tolist()), error)


@given(ranked(places=st.integers(2, 6)))
def test_plackett_luce_sums_to_one_over_all_orders(example):
    """Eq. 18, property 33: the chances of all K! orders add up to one."""
    K = example.policy.shape[-1]
    orders = torch.tensor(list(itertools.permutations(range(K))))
    chances = (-losses.plackett_luce_loss(example.policy[0, orders])).exp()
    # each chance is off, relative to itself, by its exponent's error; K! additions
    error = plackett_luce_rounding(example.policy, example.policy.abs().max()) + len(orders) * U
    assert_within(chances.sum(), f64(1.0), error)


@given(ranked(places=st.integers(2, 5)))
def test_plackett_luce_marginals_are_bradley_terry(example):
    """Eq. 18 and 1, property 35: i comes before j with chance sigmoid(r_i - r_j), whatever else is there."""
    rewards = example.policy[0]
    K = len(rewards)
    orders = torch.tensor(list(itertools.permutations(range(K))))
    chances = (-losses.plackett_luce_loss(rewards[orders])).exp()
    place = orders.argsort(-1)
    error = plackett_luce_rounding(rewards, rewards.abs().max()) + len(orders) * U  # as for their total
    for i, j in itertools.combinations(range(K), 2):
        before = chances[place[:, i] < place[:, j]].sum()
        expected = (-losses.bradley_terry_loss(rewards[i : i + 1], rewards[j : j + 1])).exp()
        assert_within(before, expected, error + 8 * U)


@given(ranked())
def test_plackett_luce_gradient_by_hand_autograd_and_differences(example):
    """Eq. 18: -(1 - sum over places i <= k of the chance that k takes place i), three ways; with a flat
    reference and beta = 1 the gradient weights are the same."""
    rewards = example.policy
    by_hand = -plackett_luce_weights(rewards.tolist(), 1.0)
    evaluation = plackett_luce_rounding(rewards, rewards.abs().max())
    assert_within(autograd(losses.plackett_luce_loss, rewards), by_hand, evaluation)
    weights = losses.plackett_luce_gradient_weights(rewards, torch.zeros_like(rewards), beta=1.0)
    assert_within(-weights, by_hand, evaluation)
    # each place's logsumexp has a third derivative as bounded as the logistic's
    error = difference_error(rewards.shape[-1] * LOGISTIC_THIRD, evaluation)
    assert_within(central_differences(losses.plackett_luce_loss, rewards), by_hand, error + evaluation)


@given(ranked(places=st.just(2)))
def test_plackett_luce_with_two_answers_is_bradley_terry(example):
    """Eq. 18 and 2, property 34: K = 2."""
    rewards = example.policy
    expected = losses.bradley_terry_loss(*rewards.unbind(-1))
    error = plackett_luce_rounding(rewards, rewards.abs().max()) + bradley_terry_rounding(rewards)
    assert_within(losses.plackett_luce_loss(rewards), expected, error)


@given(ranked(places=st.just(1)))
def test_plackett_luce_with_one_answer_is_certain(example):
    """Eq. 18 and 20: with nothing to choose from, loss and pull are exactly 0."""
    assert (losses.plackett_luce_loss(example.policy) == 0).all()
    policy, reference, beta = example
    assert (losses.plackett_luce_dpo_loss(policy, reference, beta=beta) == 0).all()
    assert (losses.plackett_luce_gradient_weights(policy, reference, beta=beta) == 0).all()


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
@pytest.mark.parametrize("order", list(itertools.permutations([1, 0, -1])))
def test_plackett_luce_at_extreme_margins(dtype, order):
    """Eq. 18 and 20, property 74: 1e4 apart, each place goes to the best left for certain. The loss is the
    sum of what is given away, the pull on k is 1 minus the number of places k would have taken."""
    beta = 0.5
    rewards = (1e4 * f64([order])).to(dtype)
    wide = rewards.double()[0].tolist()  # +-9984 in bfloat16
    best = [max(range(k, 3), key=wide.__getitem__) for k in range(3)]
    value = sum(wide[b] - wide[k] for k, b in enumerate(best))
    pull = f64([[1 - best.count(k) for k in range(3)]])
    # the loss has relative error only: differences of numbers of its own size, in float32 at least, and
    # the final rounding. Autograd takes exponentials of sums of three numbers of this size, absolutely off
    # by a few of their roundoffs
    u = roundoff(torch.float32 if dtype in HALF else dtype)
    value_error = 1.01 * roundoff(dtype) * value + 8 * u * value
    pull_error = 4 * roundoff(dtype) + 12 * u * max(wide)

    ranked_rewards = rewards.clone().requires_grad_()
    loss = losses.plackett_luce_loss(ranked_rewards)
    assert loss.dtype == dtype
    assert_within(loss, f64([value]), value_error)
    loss.sum().backward()
    assert_within(ranked_rewards.grad, -pull, pull_error)

    policy, reference = (rewards / beta).requires_grad_(), torch.zeros_like(rewards)
    loss = losses.plackett_luce_dpo_loss(policy, reference, beta=beta)
    assert loss.dtype == dtype
    assert_within(loss, f64([value]), value_error)
    loss.sum().backward()
    assert_within(policy.grad, -beta * pull, beta * pull_error)
    weights = losses.plackett_luce_gradient_weights(policy, reference, beta=beta)
    assert weights.dtype == dtype
    assert_within(weights, beta * pull, beta * pull_error)


# ===================================================================================== Plackett-Luce DPO


@given(ranked())
def test_plackett_luce_dpo_value_by_a_loop_over_places(example):
    """Eq. 20: Plackett-Luce of the implicit rewards beta log(pi / pi_ref), and log K! at the reference."""
    policy, reference, beta = example
    actual = losses.plackett_luce_dpo_loss(policy, reference, beta=beta)
    error = plackett_luce_rounding(policy, ranked_size(example))
    assert_within(actual, plackett_luce_values(exact_rewards(*example)), error)
    at_reference = losses.plackett_luce_dpo_loss(reference, reference, beta=beta)
    expected = torch.full_like(at_reference, math.log(math.factorial(policy.shape[-1])))
    assert_within(at_reference, expected, plackett_luce_rounding(policy, 0.0))  # rewards are exactly 0


@given(ranked(), generators)
def test_plackett_luce_dpo_is_invariant_to_a_shift_of_each_row(example, generator):
    """Eq. 20: a constant for each prompt, of either policy, cancels as beta log Z does."""
    policy, reference, beta = example
    shift = normal(2, len(policy), 1, generator=generator, scale=30.0)
    shifted = Ranked(policy + shift[0], reference + shift[1], beta)
    # rounding at the size of the shifted numbers, on both sides
    error = 2 * plackett_luce_rounding(policy, ranked_size(shifted) + ranked_size(example))
    before = losses.plackett_luce_dpo_loss(policy, reference, beta=beta)
    after = losses.plackett_luce_dpo_loss(shifted.policy, shifted.reference, beta=beta)
    assert_within(after, before, error)
    before = losses.plackett_luce_gradient_weights(policy, reference, beta=beta)
    after = losses.plackett_luce_gradient_weights(shifted.policy, shifted.reference, beta=beta)
    assert_within(after, before, beta * error)


@given(ranked())
def test_plackett_luce_dpo_gradient_by_hand_autograd_and_differences(example):
    """Eq. 20, properties 10, 14: w_k = beta (1 - sum over places i <= k of the chance that k takes place i)
    is minus the gradient in log pi(y_k), three ways, and the w_k sum to zero."""
    policy, reference, beta = example

    def loss(table):
        return losses.plackett_luce_dpo_loss(table, reference, beta=beta)

    by_hand = plackett_luce_weights(exact_rewards(*example), beta)
    evaluation = plackett_luce_rounding(policy, ranked_size(example))
    weights = losses.plackett_luce_gradient_weights(policy, reference, beta=beta)
    assert_within(weights, by_hand, beta * evaluation)
    K = policy.shape[-1]
    assert_within(weights.sum(-1), torch.zeros(len(policy)), K * beta * evaluation)  # K errors add up
    assert_within(-autograd(loss, policy), by_hand, beta * evaluation)
    gradient = autograd(lambda table: losses.plackett_luce_dpo_loss(policy, table, beta=beta), reference)
    assert_within(gradient, by_hand, beta * evaluation)  # the reference enters with the other sign
    # each place's logsumexp has a third derivative as bounded as the logistic's, here in beta log pi
    error = difference_error(K * LOGISTIC_THIRD * beta**3, evaluation)
    assert_within(-central_differences(loss, policy), by_hand, error + beta * evaluation)


@given(ranked(places=st.just(2)))
def test_plackett_luce_dpo_with_two_answers_is_dpo(example):
    """Eq. 20 and 7, property 34: with K = 2 the losses agree and the weights are (w, -w)."""
    policy, reference, beta = example
    pair = losses.dpo_loss(*torch.cat([policy, reference], -1).unbind(-1), beta=beta)
    error = plackett_luce_rounding(policy, ranked_size(example))  # exceeds that of the pair
    loss = losses.plackett_luce_dpo_loss(policy, reference, beta=beta)
    assert_within(loss, pair.losses, 2 * error)
    weights = losses.plackett_luce_gradient_weights(policy, reference, beta=beta)
    expected = torch.stack([pair.gradient_weights, -pair.gradient_weights], -1)
    assert_within(weights, expected, 2 * beta * error)


@given(ranked())
def test_plackett_luce_dpo_is_plackett_luce_of_implicit_rewards(example):
    """Eq. 20 and 18, property 22 for rankings: the loss of the policy tilted by any rewards s is the
    Plackett-Luce loss of s."""
    rewards, reference, beta = example
    logits = reference + rewards / beta
    policy = logits.log_softmax(-1)
    actual = losses.plackett_luce_dpo_loss(policy, reference, beta=beta)
    # the tilted policy carries eight roundoffs of its logits through the softmax, K of them enter
    size = ranked_size(Ranked(policy, reference, beta)) + beta * float(logits.abs().max())
    error = 4 * plackett_luce_rounding(rewards, size)
    assert_within(actual, losses.plackett_luce_loss(rewards), error)
