"""Losses of single completions and of batches, four ways each (value, gradient, reduction, extremes), and
where they end on small tables.

Values and pulls are written out once more here, with the scalar functions of `math`, and batches are sorted
by Python. Sections are those of dpo_minimal/zoo/README.md.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import CAUGHT, plant
from strategies import betas, generators, normal
from test_losses import HALF, WIDE, assert_within, f64, minus_log_sigmoid, roundoff, sigmoid
from test_relatives import CLOSE, FAR, FIXED, Relative, autograd, by_hand, call, few, tables
from torch import Tensor

from dpo_minimal import InputError, Rankings, dpo_loss, ipo_loss, preference_matrix
from dpo_minimal.__main__ import main
from dpo_minimal.bandit import loss_on_table
from dpo_minimal.zoo import LOSSES, batchwise, pointwise
from dpo_minimal.zoo.kto import kto_pair_loss
from dpo_minimal.zoo.pointwise import nca_optimum, sppo_optimum

# ------------------------------------------------------------------------ the losses, written out again


def rewards(row, beta: float) -> tuple[float, float]:
    return beta * row.ratios[0], beta * row.ratios[1]


def slope(x: float) -> float:
    """Of the sigmoid."""
    return sigmoid(x) * sigmoid(-x)


def nca(row, beta: float) -> float:
    w, l = rewards(row, beta)
    return minus_log_sigmoid(w) + (minus_log_sigmoid(-w) + minus_log_sigmoid(-l)) / 2


def nca_pulls(row, beta: float) -> tuple[float, float]:
    w, l = rewards(row, beta)
    return beta * (sigmoid(-w) - sigmoid(w) / 2), beta * sigmoid(l) / 2


def apo_down_pulls(row, beta: float) -> tuple[float, float]:
    w, l = rewards(row, beta)
    return beta * (slope(w - l) - slope(w)), beta * slope(w - l)


POINTWISE = {
    "nca": Relative(pointwise.nca_loss, "r", ("beta",), nca, nca_pulls),
    "sppo": Relative(
        pointwise.sppo_loss, "r", ("beta",),
        lambda row, beta: (row.ratios[0] - 0.5 / beta) ** 2 + (row.ratios[1] + 0.5 / beta) ** 2,
        lambda row, beta: (1 / beta - 2 * row.ratios[0], 1 / beta + 2 * row.ratios[1]),
    ),
    "apo_zero": Relative(
        pointwise.apo_zero_loss, "r", ("beta",),
        lambda row, beta: 1 - sigmoid(beta * row.ratios[0]) + sigmoid(beta * row.ratios[1]),
        lambda row, beta: (beta * slope(beta * row.ratios[0]), beta * slope(beta * row.ratios[1])),
    ),
    "apo_down": Relative(
        pointwise.apo_down_loss, "r", ("beta",),
        lambda row, beta: sigmoid(beta * row.ratios[0]) + sigmoid(beta * (row.ratios[1] - row.ratios[0])),
        apo_down_pulls,
    ),
}  # fmt: skip


def of_batch(name: str, rows: list[list[float]], beta: float, delta: float | None = None):
    """Of rows (policy w, policy l, reference w, reference l): losses, chosen pulls, rejected pulls, in order.

    delta: BCO's, where it is held; None for the mean of the batch.
    """
    ratios = [(pw - rw, pl - rl) for pw, pl, rw, rl in rows]
    if name == "bco":
        if delta is None:
            delta = beta * sum(w + l for w, l in ratios) / (2 * len(rows))
        at = [(beta * w - delta, beta * l - delta) for w, l in ratios]
        values = [minus_log_sigmoid(w) + minus_log_sigmoid(-l) for w, l in at]
        return values, [beta * sigmoid(-w) for w, _ in at], [beta * sigmoid(l) for _, l in at]
    mine, others = ([row[0] - row[1] for row in rows], [row[2] - row[3] for row in rows])
    numbers = range(len(rows))
    by_mine, by_others = (sorted(numbers, key=column.__getitem__) for column in (mine, others))
    values, pulls = ([0.0] * len(rows) for _ in range(2))
    for one, other in zip(by_mine, by_others):
        u = beta * (mine[one] - others[other])
        values[one], pulls[one] = minus_log_sigmoid(u), beta * sigmoid(-u)
    return values, pulls, pulls


BATCHWISE = {name: loss.function for name, loss in LOSSES.items() if loss.reads_batch}


# ------------------------------------------------------------------------ single completions: four ways


@pytest.mark.parametrize("name", POINTWISE)
@few
@given(table=tables(), beta=betas)
def test_value_and_pulls_are_the_definition(name, table, beta):
    """A sign, a half, a beta too many; a pull of the other completion. Rewards are beta log pi/pi_ref."""
    check_pointwise(name, table, beta)


def check_pointwise(name: str, table: Tensor, beta: float) -> None:
    relative, options = POINTWISE[name], {"beta": beta}
    value, slopes = by_hand(relative, table, options)
    out = call(relative, table.clone().requires_grad_(), options)
    torch.testing.assert_close(out.losses.detach(), value, **CLOSE)
    torch.testing.assert_close(autograd(relative, table, options), slopes, **CLOSE)
    torch.testing.assert_close(out.chosen_weights, -slopes[:, 0], **CLOSE)
    torch.testing.assert_close(out.rejected_weights, slopes[:, 1], **CLOSE)
    torch.testing.assert_close(torch.stack(out[1:3], -1), beta * (table[:, :2] - table[:, 2:4]), **CLOSE)
    assert not any(readout.requires_grad for readout in out[1:])


@pytest.mark.parametrize("name", POINTWISE)
def test_pulls_are_differences_of_the_loss(name):
    """Central differences with a step of 2^-16: off by its square times a third derivative of at most 1, and
    by roundings of a loss near 30 over the step."""
    check_pointwise(name, FIXED, 0.5)
    out = call(POINTWISE[name], FIXED, {"beta": 0.5})
    for column, pull in ((0, -out.chosen_weights), (1, out.rejected_weights)):
        step = torch.zeros_like(FIXED)
        step[:, column] = 2.0**-16
        up, down = (call(POINTWISE[name], FIXED + side * step, {"beta": 0.5}).losses for side in (1, -1))
        torch.testing.assert_close((up - down) * 2.0**15, pull, rtol=1e-9, atol=1e-9)


@few
@given(table=tables(), beta=betas)
def test_each_reduces_to_a_sibling(table, beta):
    """[D12.15] NCA is DPO against nothing, three times; [D12.16] SPPO is half of IPO's square and of that of
    the sum of log-ratios; [D12.17] APO-zero is twice KTO at z0 = 0, APO-down has DPO's odds."""
    check_siblings(table, beta)


def check_siblings(table: Tensor, beta: float) -> None:
    columns = table.unbind(-1)[:4]
    w, l = columns[0] - columns[2], columns[1] - columns[3]
    found = {name: POINTWISE[name].loss(*columns, beta=beta) for name in POINTWISE}
    none = torch.zeros_like(w)

    def against(a: Tensor) -> Tensor:
        """-log sigmoid of a reward."""
        return dpo_loss(a, none, none, none, beta=beta).losses

    torch.testing.assert_close(found["nca"].losses, against(w) + (against(-w) + against(-l)) / 2, **CLOSE)
    ipo = ipo_loss(*columns, beta=beta / 2).losses
    torch.testing.assert_close(found["sppo"].losses, (ipo + (w + l) ** 2) / 2, **CLOSE)
    kto = kto_pair_loss(*columns, 0.0, beta=beta, desirable_weight=1.0, undesirable_weight=1.0)
    torch.testing.assert_close(found["apo_zero"].losses, 2 * kto.losses, **CLOSE)
    torch.testing.assert_close(found["apo_zero"].chosen_weights, 2 * kto.chosen_weights, **CLOSE)
    torch.testing.assert_close(found["apo_zero"].rejected_weights, 2 * kto.rejected_weights, **CLOSE)
    odds = (-dpo_loss(*columns, beta=beta).losses).exp()
    torch.testing.assert_close(found["apo_down"].losses, (-against(w)).exp() + 1 - odds, **CLOSE)


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
@pytest.mark.parametrize("name", POINTWISE)
def test_extreme_log_probabilities(name, dtype):
    """Log-ratios of +-1e4 give finite losses and pulls with their digits, in their dtype."""
    relative, table, options = POINTWISE[name], FAR.to(dtype), {"beta": 0.5}
    value, slopes = by_hand(relative, table, options)
    out, gradient = call(relative, table, options), autograd(relative, table, options)
    assert all(field.dtype == dtype for field in out) and gradient.dtype == dtype
    # sixteen roundoffs of the dtype that it is computed in, and the final one
    error = 16 * roundoff(torch.float32 if dtype == torch.bfloat16 else dtype) + roundoff(dtype)
    tiny = torch.finfo(dtype).tiny
    assert_within(out.losses, value, error * value.abs() + tiny)
    assert_within(out.chosen_weights, -slopes[:, 0], error * slopes[:, 0].abs() + tiny)
    assert_within(out.rejected_weights, slopes[:, 1], error * slopes[:, 1].abs() + tiny)
    assert_within(gradient, slopes, 4 * error * slopes.abs() + tiny)  # parts, each rounded to bfloat16


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", POINTWISE)
def test_half_precision_is_rounded_once(name, dtype):
    """Near 500 the spacing of bfloat16 is 2, and a log-ratio of 1/2 would be lost."""
    table = f64([[-500, -3.5, -500, -3, 7, 3], [-40, -57, -40.5, -58, 3, 7]]).to(dtype)
    value, slopes = by_hand(POINTWISE[name], table, {"beta": 0.5})
    out = call(POINTWISE[name], table, {"beta": 0.5})
    float32 = 500 * 16 * roundoff(torch.float32)  # a dozen operations on numbers up to 500
    assert_within(out.losses, value, 1.01 * roundoff(dtype) * value.abs() + float32)
    for weights, pulls in ((out.chosen_weights, -slopes[:, 0]), (out.rejected_weights, slopes[:, 1])):
        assert_within(weights, pulls, 1.01 * roundoff(dtype) * pulls.abs() + float32)


# --------------------------------------------------------------------------------- batches: four ways


@st.composite
def batches(draw) -> Tensor:
    """(B, 4) rows in no order."""
    return normal(draw(st.integers(1, 7)), 4, generator=draw(generators), scale=2.0) - 3


BATCH = f64([[-3.0, -1.5, -2.5, -4.0], [-0.5, -6.0, -1.0, -0.25], [-2.0, -2.5, -1.0, -3.0], [-9, -1, -2, -3]])


@pytest.mark.parametrize("name", BATCHWISE)
@few
@given(table=batches(), beta=betas)
def test_a_batch_is_its_definition(name, table, beta):
    """Sorted by Python: a row's loss and pulls must stay its own, and reach its own completions."""
    check_batch(name, table, beta)


def check_batch(name: str, table: Tensor, beta: float) -> None:
    leaf = table.clone().requires_grad_()
    out = BATCHWISE[name](*leaf.unbind(-1), beta=beta)
    expected = map(f64, of_batch(name, table.tolist(), beta))
    for found, right in zip((out.losses, out.chosen_weights, out.rejected_weights), expected):
        torch.testing.assert_close(found.detach(), right, **CLOSE)
    (gradient,) = torch.autograd.grad(out.losses.sum(), leaf)
    torch.testing.assert_close(out.chosen_weights, -gradient[:, 0], **CLOSE)
    torch.testing.assert_close(out.rejected_weights, gradient[:, 1], **CLOSE)
    torch.testing.assert_close(torch.stack(out[1:3], -1), beta * (table[:, :2] - table[:, 2:]), **CLOSE)
    assert not any(readout.requires_grad for readout in out[1:])


@pytest.mark.parametrize("name", BATCHWISE)
def test_pulls_are_differences_of_the_loss_of_a_batch(name):
    """One row moved at a time, delta held: a step of 2^-16, as above. No two rows change their order."""
    check_batch(name, BATCH, 0.5)
    out = BATCHWISE[name](*BATCH.unbind(-1), beta=0.5)
    delta = 0.5 * (BATCH[:, :2] - BATCH[:, 2:]).mean().item()
    for row, column in itertools.product(range(len(BATCH)), (0, 1)):
        step = torch.zeros_like(BATCH)
        step[row, column] = 2.0**-16
        up, down = (sum(of_batch(name, (BATCH + s * step).tolist(), 0.5, delta)[0]) for s in (1, -1))
        pull = -out.chosen_weights[row] if column == 0 else out.rejected_weights[row]
        assert (up - down) * 2.0**15 == pytest.approx(pull.item(), rel=1e-9, abs=1e-9)


@few
@given(table=batches(), beta=betas, generator=generators)
def test_batches_reduce_to_siblings(table, beta, generator):
    """[D12.18] BCO's delta takes up what is common; [D12.19] AOT of a batch of one, or of one order, is DPO,
    and otherwise the least that DPO can cost when references are exchanged; the order of rows is nothing."""
    check_batch_siblings(table, beta, generator)


def check_batch_siblings(table: Tensor, beta: float, generator: torch.Generator) -> None:
    columns = table.unbind(-1)
    pw, pl, rw, rl = columns
    shuffled = torch.randperm(len(table), generator=generator)
    for name, loss in BATCHWISE.items():
        out = loss(*columns, beta=beta)
        again = loss(*(column[shuffled] for column in columns), beta=beta)
        for one, other in zip(out, again):
            torch.testing.assert_close(one[shuffled], other, **CLOSE)
        if name != "bco":
            single = [loss(*row.split(1, -1), beta=beta).losses for row in table]
            torch.testing.assert_close(torch.cat(single), dpo_loss(*columns, beta=beta).losses, **CLOSE)
    moved = BATCHWISE["bco"](pw + 2, pl + 2, rw, rl, beta=beta)
    torch.testing.assert_close(moved.losses, BATCHWISE["bco"](*columns, beta=beta).losses, **CLOSE)

    few_rows = table[:4]
    pw, pl, rw, rl = few_rows.unbind(-1)
    exchanged = [list(order) for order in itertools.permutations(range(len(few_rows)))]
    pairs = [dpo_loss(pw, pl, rw[order], rl[order], beta=beta).losses.sum() for order in exchanged]
    least = BATCHWISE["aot"](pw, pl, rw, rl, beta=beta).losses.sum()
    torch.testing.assert_close(least, torch.stack(pairs).min(), **CLOSE)
    one_order = (rw - rl).argsort()
    matched = pw[one_order], pl[one_order]
    by_margin = (matched[0] - matched[1]).argsort()
    aligned = matched[0][by_margin], matched[1][by_margin], rw[one_order], rl[one_order]
    assert torch.equal(BATCHWISE["aot"](*aligned, beta=beta).losses, dpo_loss(*aligned, beta=beta).losses)


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
@pytest.mark.parametrize("name", BATCHWISE)
def test_extreme_batches(name, dtype):
    """Log-ratios of +-1e4: what is finite by hand is finite and right here."""
    table = FAR[:, :4].to(dtype)
    value, chosen, rejected = (f64(column) for column in of_batch(name, table.double().tolist(), 0.5))
    leaf = table.clone().requires_grad_()
    out = BATCHWISE[name](*leaf.unbind(-1), beta=0.5)
    (gradient,) = torch.autograd.grad(out.losses.sum(), leaf)
    assert all(field.dtype == dtype for field in out) and gradient.isfinite().all()
    # sixteen roundoffs of numbers up to 1e4 in the dtype that it is computed in, and the final one
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for found, right in ((out.losses, value), (out.chosen_weights, chosen), (out.rejected_weights, rejected)):
        assert_within(found, right, roundoff(dtype) * right.abs() + 16e4 * roundoff(wide))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", BATCHWISE)
def test_half_precision_of_batches_is_rounded_once(name, dtype):
    """The order of margins too: 1/2 apart near 500, equal in bfloat16."""
    table = f64([[-500, -3.5, -500, -3], [-500, -4, -496, -3], [-40, -57, -40.5, -58]]).to(dtype)
    value, chosen, rejected = (f64(column) for column in of_batch(name, table.double().tolist(), 0.5))
    out = BATCHWISE[name](*table.unbind(-1), beta=0.5)
    float32 = 500 * 16 * roundoff(torch.float32)  # a dozen operations on numbers up to 500
    for found, right in ((out.losses, value), (out.chosen_weights, chosen), (out.rejected_weights, rejected)):
        assert_within(found, right, 1.01 * roundoff(dtype) * right.abs() + float32)


def test_a_batch_is_the_last_dimension():
    """Two batches at once are the two."""
    two = torch.stack([BATCH, BATCH.flip(0) - 1.0])
    for loss in BATCHWISE.values():
        together = loss(*two.unbind(-1), beta=0.5)
        for k in (0, 1):
            alone = loss(*two[k].unbind(-1), beta=0.5)
            assert all(torch.equal(one[k], other) for one, other in zip(together, alone))


# ------------------------------------------------------------------------------ where they end, on tables


def drawn(P: Tensor, mu: Tensor) -> Rankings:
    """Both completions of a pair drawn independently from mu, y preferred to y' with chance P[y, y']."""
    order = torch.cartesian_prod(torch.arange(len(mu)), torch.arange(len(mu)))
    return Rankings(torch.zeros(len(order)).long(), order, (2 * mu[:, None] * mu * P).flatten())


@st.composite
def games(draw) -> tuple[Tensor, Tensor]:
    """(1, Y) log pi_ref and (Y, Y) any preferences."""
    Y, generator = draw(st.integers(2, 5)), draw(generators)
    P = torch.rand(Y, Y, generator=generator, dtype=torch.float64)
    return normal(1, Y, generator=generator, scale=1.5).log_softmax(-1), (P + 1 - P.T) / 2


def mean_of(name: str, logps: Tensor, ref: Tensor, data: Rankings, beta: float) -> Tensor:
    return data.weight @ loss_on_table(LOSSES[name], logps, ref, data, beta=beta).losses


def slopes_of(name: str, logps: Tensor, ref: Tensor, data: Rankings, beta: float) -> Tensor:
    """In the logits."""
    theta = logps.clone().requires_grad_()
    return torch.autograd.grad(mean_of(name, theta.log_softmax(-1), ref, data, beta), theta)[0]


@settings(max_examples=5)  # of two optima each, found by two bisections, one in the other
@given(games(), st.floats(0.05, 1))
def test_nca_and_sppo_end_where_their_records_say(game, beta):
    """[D12.15, D12.16] Pairs drawn from the reference: the gradient vanishes there, and no policy nearby or
    far has a lower loss. NCA at beta = 1 ends at the distribution of the chosen."""
    ref, P = game
    data = drawn(P, ref[0].exp())
    for name, optimum in (("nca", nca_optimum), ("sppo", sppo_optimum)):
        best = optimum(data, ref, beta=beta)
        # bisected to some ulps of log-ratios up to 30; pulls grow like 1 / beta
        assert slopes_of(name, best, ref, data, beta).abs().max() < 1e-11
        least = mean_of(name, best, ref, data, beta)
        for other in (
            ref,
            *(best + s * normal(1, ref.shape[1], generator=torch.Generator()) for s in (0.1, 3)),
        ):
            assert mean_of(name, other.log_softmax(-1), ref, data, beta) >= least * (1 - 1e-12)
    chosen = 2 * ref.exp() * (P @ ref[0].exp())
    torch.testing.assert_close(nca_optimum(data, ref, beta=1.0).exp(), chosen, **CLOSE)


def test_where_a_best_is_too_little_the_optimum_is_refused():
    """[D12.15] A completion that the reference nearly always gives, and that always loses, leaves a gap of
    probability that convexity cannot fill; and one never chosen, or never compared, has no place."""
    ref, always = (
        f64([[0.98, 0.02]]).log(),
        Rankings(torch.zeros(1).long(), torch.tensor([[1, 0]]), f64([1.0])),
    )
    with pytest.raises(InputError, match=r"^the optimum is not known where targets .*\.$"):
        sppo_optimum(always, ref, beta=0.5)
    with pytest.raises(InputError, match=r"^NCA has no optimum where a completion was never chosen; .*\.$"):
        nca_optimum(always, ref, beta=0.5)
    three = f64([[0.5, 0.3, 0.2]]).log()
    for optimum in (nca_optimum, sppo_optimum):
        with pytest.raises(InputError, match=r"^there is no optimum where a completion was never compared; "):
            optimum(always, three, beta=0.5)
    half = drawn(f64([[0.5, 0.3], [0.7, 0.5]]), ref[0].exp())
    with pytest.raises(InputError, match=r"^the optimum is not known"):  # beta > 1: Jensen turns round
        nca_optimum(half, ref, beta=3.0)


@few
@given(games(), st.floats(0.05, 1), generators)
def test_apo_zero_never_rests(game, beta, generator):
    """[D12.17] Lowering the logits of all that is rejected more often than chosen lowers the loss, wherever
    the policy stands."""
    ref, P = game
    data = drawn(P, ref[0].exp())
    unwanted = (P @ ref[0].exp() < 0.5).double()
    logps = (ref + normal(1, ref.shape[1], generator=generator)).log_softmax(-1)
    rate = -(slopes_of("apo_zero", logps, ref, data, beta) * unwanted).sum()
    assert rate < 1e-15 and (rate < 0 or unwanted.sum() in (0, len(P)))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_apo_down_has_an_end_at_every_completion(beta):
    """[D12.17] From near any one completion, going nearer lowers the loss."""
    ref, P = f64([[0.5, 0.3, 0.2]]).log(), preference_matrix(f64([0.0, 1.0, 2.0]))
    data = drawn(P, ref[0].exp())
    for y in range(3):
        nearly = [torch.full((1, 3), -t / beta, dtype=torch.float64) for t in (20.0, 21.0)]
        for logps in nearly:
            logps[0, y] = 0
        far, near = (mean_of("apo_down", (ref + logps).log_softmax(-1), ref, data, beta) for logps in nearly)
        assert near < far


def test_bco_of_two_completions_is_twice_dpos_margin():
    """[D12.18] p = 3/4: rewards log 3 above and below the mean, a margin of 2 log 3."""
    ref, beta = f64([[0.7, 0.3]]).log(), 0.5
    order = torch.tensor([[0, 1]] * 3 + [[1, 0]])
    data = Rankings(torch.zeros(4).long(), order, torch.ones(4, dtype=torch.float64) / 4)
    best = (ref + f64([[2 * math.log(3) / beta, 0]])).log_softmax(-1)
    assert slopes_of("bco", best, ref, data, beta).abs().max() < 1e-14
    dpos = (ref + f64([[math.log(3) / beta, 0]])).log_softmax(-1)
    assert slopes_of("bco", dpos, ref, data, beta).abs().max() > 0.01


# --------------------------------------------------------------------------------- batches in training


@pytest.mark.parametrize("name", BATCHWISE)
def test_accumulation_is_refused_before_anything_is_read(name, tmp_path, capsys, monkeypatch):
    """The losses of micro-batches are not the loss of the step; eight of them are the default."""
    monkeypatch.chdir(tmp_path)
    flags = ["dpo", "--data", "none.jsonl", "--model", "none", "--loss-type", name]
    for more in ([], ["--gradient-accumulation-steps", "2"]):
        assert main([*flags, *more]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--loss-type {name} compares the rows of a step" in said and said.endswith(".")
        assert "--gradient-accumulation-steps 1" in said and not list(tmp_path.iterdir())
    assert main([*flags, "--gradient-accumulation-steps", "1"]) == 2  # what is wrong then is the data
    assert "none" in capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------ planted mistakes

MUTANTS = {
    "NCA's noise counts in full": (pointwise.nca_loss, "(-r_l)) / 2", "(-r_l))", "nca"),
    "NCA's chosen pull without noise": (pointwise.nca_loss, " - torch.sigmoid(r_w) / 2", "", "nca"),
    "SPPO's target of IPO's log-ratio": (pointwise.sppo_loss, "1 / (2 * beta)", "1 / beta", "sppo"),
    "SPPO's pull of half the square": (pointwise.sppo_loss, "-2 * above", "-above", "sppo"),
    "APO-zero's pull without beta": (pointwise.apo_zero_loss, "beta * _bell(r_l)", "_bell(r_l)", "apo_zero"),
    "APO-down's chosen pull upwards only": (pointwise.apo_down_loss, " - _bell(r_w)", "", "apo_down"),
    "APO-down's anchor on the rejected": (
        pointwise.apo_down_loss, "torch.sigmoid(r_w)", "torch.sigmoid(beta * rejected)", "apo_down",
    ),
    "BCO's delta of the chosen alone": (batchwise.bco_loss, "(chosen + rejected) / 2", "chosen", "bco"),
    "BCO's delta trained": (batchwise.bco_loss, ".detach()", "", "bco"),
    "AOT not sorted": (batchwise.aot_loss, "e.argsort(-1).gather(-1, ranks)", "ranks", "aot"),
    "AOT's ranks for positions": (batchwise.aot_loss, "d.argsort(-1).argsort(-1)", "d.argsort(-1)", "aot"),
    "AOT's rewards of another row": (
        batchwise.aot_loss, "chosen_rewards=own.chosen_rewards", "chosen_rewards=met.chosen_rewards", "aot",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_caught(mistake, monkeypatch):
    function, right, wrong, name = MUTANTS[mistake]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        if name in POINTWISE:
            check_pointwise(name, FIXED, 0.5)
        else:
            check_batch(name, BATCH, 0.5)


OPTIMUM_MUTANTS = {
    "NCA's shown twice": (nca_optimum, "chosen + shown", "chosen + 2 * shown"),
    "SPPO's without a half": (sppo_optimum, "(2 * beta)", "beta"),
    "not normalised but scaled": (pointwise._least, "logratios(low)", "best"),
    "an upper k that is too low": (pointwise._least, "range(14)", "range(1)"),
}


@pytest.mark.parametrize("mistake", OPTIMUM_MUTANTS)
def test_a_mistake_in_an_optimum_is_caught(mistake, monkeypatch):
    function, right, wrong = OPTIMUM_MUTANTS[mistake]
    plant(monkeypatch, function, right, wrong)
    ref, data = (
        f64([[0.5, 0.3, 0.2]]).log(),
        drawn(preference_matrix(f64([0.0, 1.0, 2.0])), f64([0.5, 0.3, 0.2])),
    )
    with pytest.raises(CAUGHT):
        for name, optimum in (("nca", nca_optimum), ("sppo", sppo_optimum)):
            assert slopes_of(name, optimum(data, ref, beta=0.3), ref, data, 0.3).abs().max() < 1e-11
