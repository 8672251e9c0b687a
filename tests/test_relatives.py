"""DPO's relatives four ways each (value, gradient, reduction, extremes), and where they lead on small tables.

Values and pulls are written out once more here, with the scalar functions of `math`. The optima are those of
dpo_minimal/zoo/README.md; a policy is shown to be one by the gradient in its logits, which must vanish.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import World, betas, generators, normal, worlds
from test_losses import HALF, WIDE, U, assert_within, f64, minus_log_sigmoid, roundoff, sigmoid
from torch import Tensor

from dpo_minimal import (
    LabelLoss,
    averaged_ipo_loss,
    cdpo_loss,
    ipo_loss,
    kto_kl_estimate,
    kto_loss,
    losses,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    unlikelihood_loss,
    unweighted_dpo_loss,
)
from dpo_minimal.closed_form import kl_divergence, optimal_logps
from dpo_minimal.preferences import Rankings, preference_matrix
from dpo_minimal.zoo import inputs
from dpo_minimal.zoo.ipo import ipo_estimate

# Some twenty float64 operations on numbers up to 1e3, most of them far below. A wrong formula is off by more
# than 1e-3 in one of the drawn rows.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
few = settings(max_examples=15)  # of several rows each


# ------------------------------------------------------------------------ the losses, written out again


class Row(NamedTuple):
    """One pair: log-probabilities of chosen and rejected, under policy and reference, and token counts."""

    policy_w: float
    policy_l: float
    ref_w: float
    ref_l: float
    tokens_w: int
    tokens_l: int

    @property
    def ratios(self) -> tuple[float, float]:
        return self.policy_w - self.ref_w, self.policy_l - self.ref_l

    @property
    def averages(self) -> tuple[float, float]:
        return self.policy_w / self.tokens_w, self.policy_l / self.tokens_l


class Relative(NamedTuple):
    """A pair loss: what it reads, its options, and by hand its value and its two pulls.

    The pulls are the coefficients of -grad log pi(y_w) and of +grad log pi(y_l).
    """

    loss: Callable[..., losses.PreferenceLoss]
    reads: str  # "r" where it has a reference, "t" where it counts tokens
    options: tuple[str, ...]
    value: Callable[..., float]
    pulls: Callable[..., tuple[float, float]]


def margin(row: Row, beta: float) -> float:
    return beta * (row.ratios[0] - row.ratios[1])


def equal(pull: float) -> tuple[float, float]:
    return pull, pull


def averaged_gap(row: Row) -> float:
    return row.ratios[0] / row.tokens_w - row.ratios[1] / row.tokens_l


def averaged_ipo_pulls(row: Row, beta: float) -> tuple[float, float]:
    pull = 1 / beta - 2 * averaged_gap(row)
    return pull / row.tokens_w, pull / row.tokens_l


def simpo_pulls(row: Row, beta: float, gamma: float) -> tuple[float, float]:
    pull = beta * sigmoid(gamma - beta * (row.averages[0] - row.averages[1]))
    return pull / row.tokens_w, pull / row.tokens_l


def log_odds(average: float) -> float:
    return average - math.log(-math.expm1(average))


def orpo_value(row: Row, lam: float) -> float:
    w, l = row.averages
    return -w + lam * minus_log_sigmoid(log_odds(w) - log_odds(l))


def orpo_pulls(row: Row, lam: float) -> tuple[float, float]:
    w, l = row.averages
    delta = sigmoid(log_odds(l) - log_odds(w))
    return (1 + lam * delta / -math.expm1(w)) / row.tokens_w, lam * delta / -math.expm1(l) / row.tokens_l


RELATIVES = {
    "cdpo": Relative(
        cdpo_loss, "r", ("beta", "label_smoothing"),
        lambda row, beta, label_smoothing: (1 - label_smoothing) * minus_log_sigmoid(margin(row, beta))
        + label_smoothing * minus_log_sigmoid(-margin(row, beta)),
        lambda row, beta, label_smoothing: equal(beta * (sigmoid(-margin(row, beta)) - label_smoothing)),
    ),
    "robust": Relative(
        robust_dpo_loss, "r", ("beta", "flip_probability"),
        lambda row, beta, flip_probability: (
            (1 - flip_probability) * minus_log_sigmoid(margin(row, beta))
            - flip_probability * minus_log_sigmoid(-margin(row, beta))
        ) / (1 - 2 * flip_probability),
        lambda row, beta, flip_probability: equal(
            beta * (sigmoid(-margin(row, beta)) + flip_probability / (1 - 2 * flip_probability))
        ),
    ),
    "unweighted_dpo": Relative(
        unweighted_dpo_loss, "r", ("beta",),
        lambda row, beta: -margin(row, beta), lambda row, beta: equal(beta),
    ),
    "averaged_ipo": Relative(
        averaged_ipo_loss, "rt", ("beta",),
        lambda row, beta: (averaged_gap(row) - 1 / (2 * beta)) ** 2, averaged_ipo_pulls,
    ),
    "simpo": Relative(
        simpo_loss, "t", ("beta", "gamma"),
        lambda row, beta, gamma: minus_log_sigmoid(beta * (row.averages[0] - row.averages[1]) - gamma),
        simpo_pulls,
    ),
    "orpo": Relative(orpo_loss, "t", ("lam",), orpo_value, orpo_pulls),
    "unlikelihood": Relative(
        unlikelihood_loss, "", ("alpha",),
        lambda row, alpha: -row.policy_w + alpha * row.policy_l, lambda row, alpha: (1.0, alpha),
    ),
}  # fmt: skip
OPTIONS = {
    "beta": betas,
    "label_smoothing": st.floats(0, 0.45),
    "flip_probability": st.floats(0, 0.45),
    "gamma": st.floats(0, 3),
    "lam": st.floats(0, 2),
    "alpha": st.floats(0, 1),
}
SOME = dict(beta=0.5, label_smoothing=0.25, flip_probability=0.25, gamma=2.0, lam=0.5, alpha=0.75)


def of(relative: Relative, options: dict) -> dict:
    """The options that this loss takes."""
    return {name: options[name] for name in relative.options}


def call(relative: Relative, table: Tensor, options: dict) -> losses.PreferenceLoss:
    """The loss of (B, 6) rows, in the order of `Row`."""
    columns = table.unbind(-1)
    wanted = (0, 1) + (2, 3) * ("r" in relative.reads) + (4, 5) * ("t" in relative.reads)
    return relative.loss(*(columns[k] for k in wanted), **of(relative, options))


def by_hand(relative: Relative, table: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Values (B,) and derivatives (B, 6) in all columns; those in token counts are 0, as nobody asks."""
    rows, options = [Row(*row) for row in table.double().tolist()], of(relative, options)
    slopes = []
    for row in rows:
        w, l = relative.pulls(row, **options)
        slopes.append([-w, l, *((w, -l) if "r" in relative.reads else (0, 0)), 0, 0])
    return f64([relative.value(row, **options) for row in rows]), f64(slopes)


def autograd(relative: Relative, table: Tensor, options: dict) -> Tensor:
    """(B, 6): row b is the gradient of loss b; token counts are data."""
    logps, tokens = table[:, :4].clone().requires_grad_(), table[:, 4:]
    call(relative, torch.cat([logps, tokens], -1), options).losses.sum().backward()
    return torch.cat([logps.grad, torch.zeros_like(tokens)], -1)


@st.composite
def tables(draw) -> Tensor:
    """(B, 6) rows: log-probabilities below 0, some -0.05, some near -10, of 1 to 9 tokens."""
    generator = draw(generators)
    count = draw(st.integers(1, 6))
    logps = -0.05 - normal(count, 4, generator=generator).abs()
    return torch.cat([logps, torch.randint(1, 10, (count, 2), generator=generator).double()], -1)


all_options = st.fixed_dictionaries(OPTIONS)


# -------------------------------------------------------------------------------------- pairs: four ways


@pytest.mark.parametrize("name", RELATIVES)
@few
@given(table=tables(), options=all_options)
def test_value_is_the_definition(name, table, options):
    """A sign, an epsilon, a missing 1 - 2 epsilon, lengths on the wrong side, a sum for a mean."""
    check_value(name, table, options)


def check_value(name: str, table: Tensor, options: dict) -> None:
    value, _ = by_hand(RELATIVES[name], table, options)
    torch.testing.assert_close(call(RELATIVES[name], table, options).losses, value, **CLOSE)


@pytest.mark.parametrize("name", RELATIVES)
@few
@given(table=tables(), options=all_options)
def test_gradient_is_that_of_the_two_pulls(name, table, options):
    """Both pulls, of chosen and rejected, by hand, by autograd and from the fields; rewards and weights carry
    no gradient."""
    check_gradient(name, table, options)


def check_gradient(name: str, table: Tensor, options: dict) -> None:
    relative = RELATIVES[name]
    _, slopes = by_hand(relative, table, options)
    torch.testing.assert_close(autograd(relative, table, options), slopes, **CLOSE)
    out = call(relative, table.clone().requires_grad_(), options)
    torch.testing.assert_close(out.chosen_weights, -slopes[:, 0], **CLOSE)
    torch.testing.assert_close(out.rejected_weights, slopes[:, 1], **CLOSE)
    assert not any(readout.requires_grad for readout in out[1:])


FIXED = f64([[-3.0, -1.5, -2.5, -4.0, 2, 5], [-0.5, -6.0, -1.0, -0.25, 7, 3], [-2.0, -2.0, -1.0, -3.0, 4, 1]])


@pytest.mark.parametrize("name", RELATIVES)
def test_value_and_gradient_of_a_fixed_table(name):
    """The same where nothing is drawn: for the planted mistakes."""
    check_value(name, FIXED, SOME)
    check_gradient(name, FIXED, SOME)


def test_averages_of_a_fixed_table():
    """Averaged IPO, decorated anew: for the planted mistakes in its decorator."""
    anew = inputs.of_averages(inspect.unwrap(averaged_ipo_loss))
    value, slopes = by_hand(RELATIVES["averaged_ipo"], FIXED, SOME)
    out = call(RELATIVES["averaged_ipo"]._replace(loss=anew), FIXED, SOME)
    torch.testing.assert_close(out.losses, value, **CLOSE)
    torch.testing.assert_close(out.chosen_weights, -slopes[:, 0], **CLOSE)
    torch.testing.assert_close(out.rejected_weights, slopes[:, 1], **CLOSE)


@few
@given(table=tables(), options=all_options)
def test_rewards_are_what_the_docstrings_say(table, options):
    """beta log(pi / pi_ref), or its average, or the log-probability, its average times beta, the log-odds."""
    beta = options["beta"]
    policy, reference, tokens = table[:, :2], table[:, 2:4], table[:, 4:]
    ratio = beta * (policy - reference)
    expected = {name: ratio for name in ("cdpo", "robust", "unweighted_dpo")}
    expected |= {"averaged_ipo": ratio / tokens, "simpo": beta * policy / tokens, "unlikelihood": policy}
    expected["orpo"] = f64([[log_odds(average) for average in row] for row in (policy / tokens).tolist()])
    for name, rewards in expected.items():
        out = call(RELATIVES[name], table, options)
        torch.testing.assert_close(torch.stack(out[1:3], -1), rewards, **CLOSE)


@few
@given(table=tables(), options=all_options, tokens=st.integers(1, 9))
def test_each_relative_reduces_to_a_sibling(table, options, tokens):
    """[D12.1] to [D12.7] epsilon = 0 is DPO; equal lengths are another beta; lambda = 0 and alpha = 0 are
    fine-tuning; SimPO's gamma is a reference that prefers the rejected completion by gamma / beta."""
    check_reductions(table, options, tokens)


def check_reductions(table: Tensor, options: dict, tokens: int) -> None:
    beta, gamma = options["beta"], options["gamma"]
    w, l, ref_w, ref_l, _, _ = pair = table.unbind(-1)
    dpo = losses.dpo_loss(*pair[:4], beta=beta)
    clean = dict(label_smoothing=0.0, flip_probability=0.0, lam=0.0, alpha=0.0)
    for name in ("cdpo", "robust"):  # to the bit: 1 and 0 are exact
        out = call(RELATIVES[name], table, options | clean)
        assert all(torch.equal(one, other) for one, other in zip(out, dpo))

    averaged, plain = torch.cat([table[:, :4], torch.full_like(table[:, 4:], tokens)], -1), pair[:4]
    ipo = ipo_loss(*plain, beta=beta / tokens)
    out = call(RELATIVES["averaged_ipo"], averaged, options)
    torch.testing.assert_close(out.losses * tokens**2, ipo.losses, **CLOSE)
    torch.testing.assert_close(out.gradient_weights * tokens**2, ipo.gradient_weights, **CLOSE)
    # (the rewards of `ipo_loss` at beta / L are the averages times beta as well)
    torch.testing.assert_close(out.chosen_rewards, ipo.chosen_rewards, **CLOSE)

    out = call(RELATIVES["simpo"], averaged, options)
    flat = losses.dpo_loss(w, l, torch.full_like(w, gamma * tokens / beta), 0 * l, beta=beta / tokens)
    torch.testing.assert_close(out.losses, flat.losses, **CLOSE)
    torch.testing.assert_close(out.gradient_weights, flat.gradient_weights, **CLOSE)

    out = call(RELATIVES["orpo"], table, options | clean)
    assert torch.equal(out.losses, -w / table[:, 4]) and torch.equal(out.gradient_weights, 1 / table[:, 4])
    out = call(RELATIVES["unlikelihood"], table, options | clean)
    assert torch.equal(out.losses, -w)
    out = call(RELATIVES["unlikelihood"], table, options | {"alpha": 1.0})
    unweighted = call(RELATIVES["unweighted_dpo"], table, options).losses / beta
    torch.testing.assert_close(out.losses, unweighted - (ref_w - ref_l), **CLOSE)


FAR = f64([[-1e4, -1, -1, -1, 1, 1], [-1, -1e4, -1, -1, 1, 1], [-1e4, -1e4, -1, -1e4, 1, 100]])


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
@pytest.mark.parametrize("name", RELATIVES)
def test_extreme_log_probabilities(name, dtype):
    """Property 74: log-ratios of +-1e4 give finite losses and gradients with their digits, in their dtype."""
    relative, table = RELATIVES[name], FAR.to(dtype)
    value, slopes = by_hand(relative, table, SOME)
    assert value.isfinite().all()
    out, gradient = call(relative, table, SOME), autograd(relative, table, SOME)
    assert all(field.dtype == dtype for field in out) and gradient.dtype == dtype
    # sixteen roundoffs of the dtype that it is computed in, and the final one
    relative_error = 16 * roundoff(torch.float32 if dtype == torch.bfloat16 else dtype) + roundoff(dtype)
    tiny = torch.finfo(dtype).tiny
    assert_within(out.losses, value, relative_error * value.abs() + tiny)
    assert_within(out.chosen_weights, -slopes[:, 0], relative_error * slopes[:, 0].abs() + tiny)
    assert_within(out.rejected_weights, slopes[:, 1], relative_error * slopes[:, 1].abs() + tiny)
    # A bfloat16 gradient adds up parts that were each rounded to it.
    assert_within(gradient, slopes, 4 * relative_error * slopes.abs() + tiny)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", RELATIVES)
def test_half_precision_is_rounded_once(name, dtype):
    """Property 76: near 500 the spacing of bfloat16 is 2, and a margin of 1/2 would be lost; what is computed
    in between has float32's precision."""
    check_half_precision(name, dtype)


def check_half_precision(name: str, dtype: torch.dtype) -> None:
    table = f64([[-500, -3.5, -500, -3, 7, 3], [-40, -57, -40.5, -58, 3, 7]]).to(dtype)
    options = SOME | {"alpha": 0.7}  # 40 - 0.7 * 57 is 0.1, and 0 where the product is rounded first
    value, slopes = by_hand(RELATIVES[name], table, options)
    out = call(RELATIVES[name], table, options)
    float32 = 500 * 16 * roundoff(torch.float32)  # a dozen operations on numbers up to 500
    assert_within(out.losses, value, 1.01 * roundoff(dtype) * value.abs() + float32)
    for weights, pulls in ((out.chosen_weights, -slopes[:, 0]), (out.rejected_weights, slopes[:, 1])):
        assert_within(weights, pulls, 1.01 * roundoff(dtype) * pulls.abs() + float32)


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
def test_orpo_of_certain_completions_is_finite(dtype):
    """[D12.5] The odds of certainty are infinite; a completion of probability one, or one by rounding, gives
    finite numbers all the same."""
    logps = f64([[0, -1], [-1, 0], [0, 0], [-1e-300, -1], [1e-4, -1]]).to(dtype)
    table = torch.cat([logps, logps, torch.ones_like(logps)], -1)
    out, gradient = call(RELATIVES["orpo"], table, SOME), autograd(RELATIVES["orpo"], table, SOME)
    assert all(field.isfinite().all() for field in out) and gradient.isfinite().all()
    assert abs(out.losses[0]) < 1e-6  # e^-16 in float32 at most
    with pytest.raises(losses.InputError, match="policy_rejected_logps must be log-probabilities"):
        orpo_loss(logps[0], logps[1] + 1, *table[:2, 4:], lam=0.1)


def test_orpo_keeps_its_digits_near_certainty():
    """[D12.5] log(1 - e^a) as it is written has four digits at a = -1e-12 and none at -1e-17."""
    w = f64([-1e-6, -1e-9, -1e-12, -1e-15])
    l, one = torch.full_like(w, -1.0), torch.ones_like(w)
    out = orpo_loss(w, l, one, one, lam=0.5)
    odds = w - (-w).log() - w / 2  # log(1 - e^a) = log(-a) + a/2 up to a^2
    assert_within(out.chosen_rewards, odds, 1e-12)  # a^2/24 at a = -1e-6, and roundings of 35


# ------------------------------------------------------------------------------------------------- KTO


class Labels(NamedTuple):
    """(B,) log-probabilities of policy and reference, labels; z0 and the options."""

    policy: Tensor
    reference: Tensor
    desirable: Tensor
    z0: float
    options: dict


@st.composite
def labels(draw, scale=3.0) -> Labels:
    generator, count = draw(generators), draw(st.integers(1, 8))
    policy, reference = normal(2, count, generator=generator, scale=scale)
    desirable = torch.rand(count, generator=generator) < 0.5
    weights = dict(desirable_weight=draw(st.floats(0.1, 2)), undesirable_weight=draw(st.floats(0.1, 2)))
    return Labels(policy, reference, desirable, draw(st.floats(0, 3)), {"beta": draw(betas)} | weights)


def kto_by_hand(example: Labels) -> tuple[Tensor, Tensor]:
    """Losses, and pulls: minus their derivatives in log pi."""
    value, pull, options = [], [], example.options
    for policy, reference, desirable in zip(*(column.tolist() for column in example[:3])):
        x = options["beta"] * (policy - reference - example.z0)
        weight = options["desirable_weight" if desirable else "undesirable_weight"]
        value.append(weight * (1 - sigmoid(x) if desirable else 1 - sigmoid(-x)))
        bell = weight * options["beta"] / (2 + 2 * math.cosh(x))
        pull.append(bell if desirable else -bell)
    return f64(value), f64(pull)


def kto(example: Labels, policy: Tensor | None = None) -> LabelLoss:
    policy = example.policy if policy is None else policy
    return kto_loss(policy, *example[1:4], **example.options)


@given(labels())
def test_kto_value_and_gradient(example):
    """[D12.4] K1, property 61: lambda (1 - sigmoid(+-x)), and a bell lambda beta / (2 + 2 cosh x) by hand,
    from the field and by autograd, nowhere above lambda beta / 4; losses lie in [0, lambda]."""
    check_kto(example)


def check_kto(example: Labels) -> None:
    value, pull = kto_by_hand(example)
    out = kto(example)
    torch.testing.assert_close(out.losses, value, **CLOSE)
    torch.testing.assert_close(out.gradient_weights, pull, **CLOSE)
    torch.testing.assert_close(out.rewards, example.options["beta"] * (example.policy - example.reference))
    policy = example.policy.clone().requires_grad_()
    kto(example, policy).losses.sum().backward()
    torch.testing.assert_close(policy.grad, -pull, **CLOSE)
    weight = f64([example.options[("un" if not d else "") + "desirable_weight"] for d in example.desirable])
    assert (out.losses >= 0).all() and (out.losses <= weight).all()
    assert (out.gradient_weights.abs() <= weight * example.options["beta"] / 4 * (1 + 4 * U)).all()
    assert ((out.gradient_weights > 0) == example.desirable).all()


ONE_KTO = Labels(
    f64([-1.0, -2.5, -0.3]), f64([-1.5, -1.0, -2.0]), torch.tensor([True, False, True]), 0.7,
    dict(beta=0.6, desirable_weight=1.3, undesirable_weight=0.7),
)  # fmt: skip


def test_kto_of_a_fixed_batch():
    """For the planted mistakes. The weights and z0 are no float32 numbers, and must not become some."""
    check_kto(ONE_KTO)


@few
@given(labels())
def test_kto_reductions(example):
    """[D12.4] The top of the bell is at the z0 given; both labels of one completion share out lambda; one z0
    for all rows is that z0 on each; policy = reference and z0 = 0 cost lambda / 2."""
    lam = example.options["desirable_weight"]
    even = example._replace(options=example.options | {"undesirable_weight": lam})
    both = kto(even).losses + kto(even._replace(desirable=~even.desirable)).losses
    torch.testing.assert_close(both, torch.full_like(both, lam), **CLOSE)
    top = kto(even._replace(policy=even.reference + even.z0))
    torch.testing.assert_close(
        top.gradient_weights.abs(), torch.full_like(both, lam * even.options["beta"] / 4)
    )
    rows = torch.full_like(example.policy, example.z0)
    assert torch.equal(kto(example._replace(z0=rows)).losses, kto(example).losses)
    start = kto(even._replace(policy=even.reference, z0=0)).losses
    assert torch.equal(start, torch.full_like(start, lam / 2))


def test_kto_looks_at_one_completion_at_a_time():
    """K4: a shift of both log-probabilities of a pair leaves DPO alone and changes KTO."""
    pair, reference = f64([-1.0, -2.0]), f64([-1.5, -1.5])
    dpo = [losses.dpo_loss(*p[:, None], *reference[:, None], beta=1.0).losses for p in (pair, pair - 1)]
    assert torch.equal(*dpo)
    example = Labels(pair, reference, torch.tensor([True, False]), 0.0, ONE_KTO.options)
    assert (kto(example).losses.sum() - kto(example, pair - 1).losses.sum()).abs() > 0.01


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
def test_kto_at_extreme_log_ratios(dtype):
    """Losses 0 and lambda, gradients exactly 0: both the easy and the hopeless are ignored."""
    policy = f64([1e4, 1e4, -1e4, -1e4]).to(dtype).requires_grad_()
    desirable = torch.tensor([True, False, True, False])
    options = dict(beta=0.5, desirable_weight=1.0, undesirable_weight=2.0)
    out = kto_loss(policy, torch.zeros_like(policy), desirable, 3.0, **options)
    assert all(field.dtype == dtype for field in out)
    assert out.losses.tolist() == [0, 2, 1, 0] and (out.gradient_weights == 0).all()
    out.losses.sum().backward()
    assert (policy.grad == 0).all()


def test_kto_reads_z0_and_does_not_train_it():
    """z0 is a number: no gradient flows to where it came from; `kto_kl_estimate` gives it at least 0."""
    z0 = f64(0.7).requires_grad_()
    policy = ONE_KTO.policy.clone().requires_grad_()
    kto_loss(policy, *ONE_KTO[1:3], z0, **ONE_KTO.options).losses.sum().backward()
    assert z0.grad is None
    estimate = kto_kl_estimate(policy, ONE_KTO.reference)
    assert not estimate.requires_grad and estimate.dim() == 0
    assert_within(estimate, f64((0.5 - 1.5 + 1.7) / 3), 4 * U)
    assert kto_kl_estimate(ONE_KTO.reference, policy).item() == 0  # the mean is negative there
    assert kto_kl_estimate(policy[:1].detach(), policy[:1].detach()).item() == 0
    with pytest.raises(losses.InputError, match="policy_logps must be a non-empty table"):
        kto_kl_estimate(policy[:0].detach(), policy[:0].detach())
    half = ONE_KTO.policy.bfloat16()
    assert kto_kl_estimate(half, half).dtype == torch.float32  # not rounded once more


# --------------------------------------------------------------------------- where they lead, on tables


def pair_losses(loss, logps: Tensor, ref_logps: Tensor, tokens: Tensor | None = None, **options) -> Tensor:
    """(K, K) of one prompt's table: entry i, j is the loss of "i was preferred to j"."""
    K = len(logps)
    i, j = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
    relative = next(r for r in RELATIVES.values() if r.loss is loss)
    columns = [logps[i], logps[j]]
    columns += [ref_logps[i], ref_logps[j]] if "r" in relative.reads else []
    if "t" in relative.reads:
        tokens = torch.ones_like(logps) if tokens is None else tokens
        columns += [tokens[i], tokens[j]]
    return loss(*columns, **options).losses.view(K, K)


def slope(weights: Tensor, loss, logps: Tensor, ref_logps: Tensor, tokens=None, **options) -> Tensor:
    """(K,) gradient in the logits of the mean loss, W[i, j] being the weight of "i was preferred to j"."""
    theta = logps.clone().requires_grad_()
    total = (weights * pair_losses(loss, theta.log_softmax(-1), ref_logps, tokens, **options)).sum()
    return torch.autograd.grad(total, theta)[0]


def chain_of(chances: Tensor) -> Tensor:
    """(K, K) weights of comparisons of neighbours; the first of each two wins with the chance given."""
    return (torch.diag(chances, 1) + torch.diag(1 - chances, -1)) / len(chances)


def with_gaps(ref_logps: Tensor, gaps: Tensor, beta: float) -> Tensor:
    """The policy whose implicit rewards fall by these gaps from each completion to the next."""
    scores = torch.cat([gaps.new_zeros(1), -gaps.cumsum(-1)])
    return optimal_logps(ref_logps, scores, beta=beta)


def all_pairs(P: Tensor) -> Tensor:
    """(K, K) weights of evenly frequent comparisons with win rates P, summing to 1."""
    K = len(P)
    return P * (1 - torch.eye(K)) * 2 / (K * (K - 1))


STILL = 1e-12  # a gradient of K^2 terms of size beta <= 5, each with a dozen roundoffs
one_prompt = worlds(prompts=st.just(1), completions=st.integers(2, 6))
noise = st.floats(0.01, 0.45)


def assert_still(gradient: Tensor, scale: float = 1.0) -> None:
    assert (gradient.abs() <= STILL * max(1.0, scale)).all(), gradient


@few
@given(one_prompt, noise, st.booleans())
def test_cdpo_margins_on_a_tree(world, epsilon, unanimous):
    """D3, D5: each gap is logit(p + epsilon - 2 epsilon p), finite for unanimous labels too; told the true
    epsilon it does not return pi*."""
    check_cdpo_tree(world, epsilon, unanimous)


def check_cdpo_tree(world: World, epsilon: float, unanimous: bool) -> None:
    ref, r = world.ref_logps[0], world.rewards[0].clamp(-5, 5)
    p = torch.sigmoid(r[:-1] - r[1:])
    p = torch.ones_like(p) if unanimous else p
    gaps = torch.logit(p + epsilon - 2 * epsilon * p)
    options = dict(beta=world.beta, label_smoothing=epsilon)
    assert_still(slope(chain_of(p), cdpo_loss, with_gaps(ref, gaps, world.beta), ref, **options))
    if unanimous:
        assert_within(gaps, torch.full_like(gaps, math.log((1 - epsilon) / epsilon)), 1e-12 / epsilon)


@few
@given(one_prompt, noise)
def test_robust_dpo_is_unbiased(world, epsilon):
    """D2, D6: averaged over the flip it is DPO's loss of the clean label, so that flipped labels lead to the
    clean pi*, whatever the pairs."""
    check_robust(world, epsilon)


def check_robust(world: World, epsilon: float) -> None:
    ref, r, beta = world.ref_logps[0], world.rewards[0].clamp(-5, 5), world.beta
    options = dict(beta=beta, flip_probability=epsilon)
    table = pair_losses(robust_dpo_loss, world.logps[0], ref, **options)
    margins = beta * ((world.logps[0] - ref)[:, None] - (world.logps[0] - ref))
    dpo = f64([[minus_log_sigmoid(u) for u in row] for row in margins.tolist()])
    # 1 / (1 - 2 epsilon) up to 10 magnifies the roundoffs of a margin near 100
    torch.testing.assert_close((1 - epsilon) * table + epsilon * table.T, dpo, rtol=1e-11, atol=1e-11)
    P = preference_matrix(r)
    noisy = P + epsilon - 2 * epsilon * P
    optimum = optimal_logps(ref, r, beta=beta)
    assert_still(slope(all_pairs(noisy), robust_dpo_loss, optimum, ref, **options), 10.0)


@few
@given(st.floats(0.05, 0.95), st.floats(0.0, 0.4), betas)
def test_robust_dpo_of_two_completions(share, epsilon, beta):
    """D7, D8: from a share of wins the gap is logit of (share - epsilon) / (1 - 2 epsilon), if that is a
    probability; otherwise the loss falls for ever, at a constant rate in the end."""
    ref = f64([0.3, 0.7]).log()
    q = (share - epsilon) / (1 - 2 * epsilon)
    options = dict(beta=beta, flip_probability=epsilon)
    weights = f64([[0, share], [1 - share, 0]])
    if 0.001 < q < 0.999:
        best = with_gaps(ref, f64([math.log(q / (1 - q))]), beta)
        assert_still(slope(weights, robust_dpo_loss, best, ref, **options), 10.0)
    elif not 0 <= q <= 1:
        far = [with_gaps(ref, f64([math.copysign(u, q)]), beta) for u in (100.0, 200.0)]
        totals = [(weights * pair_losses(robust_dpo_loss, p, ref, **options)).sum() for p in far]
        assert_within(totals[1] - totals[0], f64(-100 * (q - 1 if q > 1 else -q)), 1e-9)


def test_robust_dpo_on_a_unanimous_pair_may_have_an_optimum_after_all():
    """[D12.3] 0 beat 1 in all of 20 comparisons, where two of them should have been flipped; but both are
    even with 2, in 100 comparisons each, and that holds them. By symmetry the rewards are (a, -a, 0)."""
    ref, options = f64([0.2, 0.3, 0.5]).log(), dict(beta=1.0, flip_probability=0.1)
    weights = f64([[0, 20, 50], [0, 0, 50], [50, 50, 0]]) / 220
    linear = 0.1 / 0.8  # eps / (1 - 2 eps)
    low, high = 0.0, 5.0
    for _ in range(60):  # the slope in the first reward; in even comparisons the linear terms cancel
        a = (low + high) / 2
        pull, hold = 20 * (sigmoid(-2 * a) + linear), 100 * (sigmoid(a) - 0.5)
        low, high = (a, high) if pull > hold else (low, a)
    best = optimal_logps(ref, f64([a, -a, 0]), beta=1.0)
    assert_still(slope(weights, robust_dpo_loss, best, ref, **options))
    assert 0.3 < a < 0.4


def test_kto_sorts_where_dpo_weighs():
    """K2, K3: a hundred steps of gradient descent with the exact divergence send all that is unwanted,
    below the threshold lambda_U / (lambda_D + lambda_U), to probability 0, wherever they start."""
    ref = f64([0.4, 0.3, 0.2, 0.1]).log()
    good = f64([0.2, 0.7, 0.45, 0.9])  # share of labels that are desirable
    for weights, wanted in (((1.0, 1.0), [0, 1, 0, 1]), ((1.5, 1.0), [0, 1, 1, 1])):
        assert [share > weights[1] / sum(weights) for share in good.tolist()] == [bool(x) for x in wanted]
        options = dict(zip(("desirable_weight", "undesirable_weight"), weights))
        theta = ref.clone().requires_grad_()
        for _ in range(100):
            logps = theta.log_softmax(-1)
            z0 = kl_divergence(logps.detach(), ref)
            both = torch.tensor([True, False]).repeat_interleave(4)
            out = kto_loss(logps.repeat(2), ref.repeat(2), both, z0, beta=0.5, **options).losses
            (gradient,) = torch.autograd.grad((torch.cat([good, 1 - good]) * out).sum(), theta)
            theta = (theta - 20 * gradient).detach().requires_grad_()
        unwanted = theta.softmax(-1).detach() * (1 - f64(wanted))
        assert unwanted.sum() < 1e-3, theta.softmax(-1)  # of 0.6 and 0.4: it falls like 1 / steps^2
        assert (theta.softmax(-1) > 0.03).tolist() == [bool(x) for x in wanted]


@few
@given(one_prompt, st.floats(0, 2))
def test_orpo_of_two_completions(world, lam):
    """F1, F2: the weight delta is p_l (1 - p_w) / (p_w + p_l - 2 p_w p_l); the optimum of two one-token
    completions is the root of sigma(t) - p + 2 lambda (sigma(2t) - p), and forgets the reference."""
    check_orpo(world, lam)


def check_orpo(world: World, lam: float) -> None:
    p_w, p_l = world.logps[0, :2].clamp(-8, -0.01).exp()
    w, l, one = p_w.log()[None], p_l.log()[None], torch.ones(1)
    out = orpo_loss(w.requires_grad_(), l.requires_grad_(), one, one, lam=1.0)
    on_w, on_l = torch.autograd.grad(out.losses.sum(), (w, l))
    delta = p_l * (1 - p_w) / (p_w + p_l - 2 * p_w * p_l)
    torch.testing.assert_close(-on_w[0], 1 + delta / (1 - p_w), rtol=1e-10, atol=0)
    torch.testing.assert_close(on_l[0], delta / (1 - p_l), rtol=1e-10, atol=0)

    p = float(torch.sigmoid((world.rewards[0, 0] - world.rewards[0, 1]).clamp(-4, 4)))
    low, high = sorted((math.log(p / (1 - p)) / 2, math.log(p / (1 - p))))
    for _ in range(60):
        t = (low + high) / 2
        above = sigmoid(t) - p + 2 * lam * (sigmoid(2 * t) - p) > 0
        low, high = (low, t) if above else (t, high)
    best = f64([t, 0]).log_softmax(-1)
    weights = f64([[0, p], [1 - p, 0]])
    for ref in (f64([0.5, 0.5]).log(), f64([0.01, 0.99]).log()):
        # in t the root is known to 1e-15; the odds of a probability e^-4 magnify a roundoff by e^4
        assert_still(slope(weights, orpo_loss, best, ref, lam=lam), 100.0)


def simpo_edge(p: Tensor, gamma: float) -> Tensor:
    G = math.exp(gamma)
    root = ((G * (2 * p - 1)) ** 2 + 4 * p * (1 - p)).sqrt()
    return torch.log((G * (2 * p - 1) + root) / (2 - 2 * p))


@few
@given(one_prompt, st.floats(0, 2))
def test_simpo_margins_and_optimum(world, gamma):
    """F3, F4: the margin of an edge solves a quadratic equation, 0 for p = 1/2; with gamma = 0 the optimum is
    exp(|y| (r + c) / beta), which has forgotten the reference."""
    check_simpo(world, gamma)


def check_simpo(world: World, gamma: float) -> None:
    ref, r, beta = world.ref_logps[0], world.rewards[0].clamp(-2, 2), world.beta
    K = len(r)
    tokens = torch.randint(1, 6, (K,), generator=world.generator).double()
    p = torch.sigmoid(r[:-1] - r[1:])
    u = simpo_edge(p, gamma)
    for scores, weights, margin in (
        (torch.cat([u.new_zeros(1), -u.cumsum(-1)]), chain_of(p), gamma),
        (r, all_pairs(preference_matrix(r)), 0.0),
    ):
        c = -scores.amax()  # Newton's method for sum exp(|y| (score + c) / beta) = 1, from above
        for _ in range(30):
            logps = tokens * (scores + c) / beta
            c = c - logps.logsumexp(-1) * beta / (logps.softmax(-1) * tokens).sum()
        logps = tokens * (scores + c) / beta
        assert_within(logps.exp().sum(), f64(1.0), 1e-12)
        gradient = slope(weights, simpo_loss, logps, ref, tokens, beta=beta, gamma=margin)
        assert_still(gradient, 10.0)
    assert_within(simpo_edge(f64([0.5]), gamma), f64([0.0]), 1e-14)


@few
@given(one_prompt)
def test_averaged_ipo_optimum(world):
    """[D12.1] Each log-ratio is its length times (the solution of IPO's normal equations + c), with the one c
    for which the policy sums to one."""
    check_averaged_ipo(world)


def check_averaged_ipo(world: World) -> None:
    ref, r, beta = world.ref_logps[0], world.rewards[0], world.beta
    K = len(r)
    tokens = torch.randint(1, 6, (K,), generator=world.generator).double()
    order = torch.tensor(list(itertools.permutations(range(K), 2)))
    weights = all_pairs(preference_matrix(r))
    data = Rankings(torch.zeros(len(order), dtype=torch.long), order, weights[order[:, 0], order[:, 1]])
    g = ipo_estimate(data, torch.ones(1, K, dtype=torch.bool), beta=beta)[0]
    c = -g.amin()  # from where the sum is at least one: each completion is at least as likely as before
    for _ in range(60):
        logps = ref + tokens * (g + c)
        c = c - logps.logsumexp(-1) / (logps.softmax(-1) * tokens).sum()
    logps = ref + tokens * (g + c)
    assert_within(logps.exp().sum(), f64(1.0), 1e-12)
    assert_still(slope(weights, averaged_ipo_loss, logps, ref, tokens, beta=beta), 10 / beta)


def sides(weights: Tensor) -> tuple[Tensor, Tensor]:
    """w(y) and l(y), the chances to be the chosen and the rejected completion."""
    return weights.sum(1), weights.sum(0)


@few
@given(one_prompt)
def test_unlikelihood_optimum_and_the_fall_beyond_it(world):
    """G1, G2, G3: (w - alpha l) / (1 - alpha) up to alpha_c = min w / l; a loss that falls for ever beyond;
    at alpha = 1 a straight line, theta_ref + n eta (w - l), as for DPO without its weight."""
    check_unlikelihood(world)


def check_unlikelihood(world: World) -> None:
    ref, r = world.ref_logps[0], world.rewards[0].clamp(-2, 2)
    weights = all_pairs(preference_matrix(r))
    w, l = sides(weights)
    critical = float((w / l).min())
    alpha = 0.9 * critical
    best = ((w - alpha * l) / (1 - alpha)).log()
    assert_within(best.exp().sum(), f64(1.0), 1e-12)
    assert_still(slope(weights, unlikelihood_loss, best, ref, alpha=alpha))

    alpha, worst = (1 + critical) / 2, torch.eye(len(r), dtype=torch.float64)[(w / l).argmin()]
    fallen = [
        (weights * pair_losses(unlikelihood_loss, (ref - t * worst).log_softmax(-1), ref, alpha=alpha))
        for t in (400, 800)
    ]
    fall = fallen[1].sum() - fallen[0].sum()
    assert_within(fall, 400 * ((w - alpha * l) * worst).sum(), 1e-9)

    eta, beta = 0.3, world.beta
    for loss, options, step in (
        (unlikelihood_loss, dict(alpha=1.0), eta),
        (unweighted_dpo_loss, dict(beta=beta), eta * beta),
    ):
        theta = ref
        for _ in range(5):
            theta = theta - eta * slope(weights, loss, theta, ref, **options)
        assert_within(theta, ref + 5 * step * (w - l), 1e-12)


@few
@given(one_prompt, noise)
def test_first_steps_are_multiples_of_one_direction(world, epsilon):
    """M9, property 65: with pairs drawn from the reference, each method that has one, and Unlikelihood, first
    goes along w - l; only the factor tells them apart."""
    check_first_steps(world, epsilon)


def check_first_steps(world: World, epsilon: float) -> None:
    ref, beta, mu = world.ref_logps[0], world.beta, world.ref_logps[0].exp()
    K = len(mu)
    weights = 2 * mu[:, None] * mu * preference_matrix(world.rewards[0])
    w, l = sides(weights)
    clear = 1 - 2 * epsilon
    factors = [
        (cdpo_loss, dict(beta=beta, label_smoothing=epsilon), beta * clear / 2),
        (robust_dpo_loss, dict(beta=beta, flip_probability=epsilon), beta / (2 * clear)),
        (unweighted_dpo_loss, dict(beta=beta), beta),
        (averaged_ipo_loss, dict(beta=beta), 1 / beta),  # each of one token
        (unlikelihood_loss, dict(alpha=0.0), 1 / 2),
        (unlikelihood_loss, dict(alpha=epsilon), (1 + epsilon) / 2),
        (unlikelihood_loss, dict(alpha=1.0), 1.0),
    ]
    for loss, options, factor in factors:
        assert_within(-slope(weights, loss, ref, ref, **options), factor * (w - l), STILL * max(1, factor))
    theta = ref.clone().requires_grad_()
    logps, desirable = theta.log_softmax(-1).repeat(2), torch.arange(2 * K) < K
    options = dict(beta=beta, desirable_weight=1.5, undesirable_weight=0.8)
    out = kto_loss(logps, ref.repeat(2), desirable, 0.0, **options).losses
    (gradient,) = torch.autograd.grad((torch.cat([w, l]) * out).sum(), theta)
    assert_within(-gradient, beta / 8 * 2.3 * (w - l), STILL)


def test_without_a_reference_the_first_step_is_another():
    """[D12.8] Nothing but ties, a reference of (0.8, 0.1, 0.1): w - l is 0, but ORPO and SimPO move."""
    mu = f64([0.8, 0.1, 0.1])
    weights = mu[:, None] * mu  # all ties
    assert_still(sides(weights)[0] - sides(weights)[1])
    gradient = slope(weights, simpo_loss, mu.log(), mu.log(), beta=1.0, gamma=1.0)
    assert gradient[0] == pytest.approx(0.112, abs=5e-4)
    orpo, sft = (slope(weights, orpo_loss, mu.log(), mu.log(), lam=lam) for lam in (1.0, 0.0))
    assert (orpo - sft)[0] == pytest.approx(0.286, abs=5e-4)


ONE_WORLD = World(
    f64([[0.5, 0.3, 0.2]]).log(), f64([[1.0, -0.5, 0.25]]), f64([[0.2, 0.2, 0.6]]).log(), 0.6,
    torch.Generator().manual_seed(1),
)  # fmt: skip


def test_optima_of_a_fixed_world():
    """The same where nothing is drawn: for the planted mistakes."""
    check_cdpo_tree(ONE_WORLD, 0.2, False)
    check_robust(ONE_WORLD, 0.2)
    check_orpo(ONE_WORLD, 0.7)
    check_simpo(ONE_WORLD, 0.5)
    check_averaged_ipo(ONE_WORLD)
    check_unlikelihood(ONE_WORLD)
    check_first_steps(ONE_WORLD, 0.2)
