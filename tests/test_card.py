"""The loss card: each number found another way, each verdict on a loss made to deserve it, each refusal."""

import functools
import inspect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F

from dpo_minimal import loss_card
from dpo_minimal.__main__ import main
from dpo_minimal.bench import card as card_module
from dpo_minimal.bench import ends as ends_module
from dpo_minimal.bench import measures
from dpo_minimal.bench.card import Card, verdict
from dpo_minimal.bench.subject import Subject, examine
from dpo_minimal.certificates import maximum_likelihood
from dpo_minimal.experiments import card as command
from dpo_minimal.losses import dpo_loss
from dpo_minimal.policy import enumerate_completions
from dpo_minimal.preferences import Rankings, all_sets, expected_pairs, random_cycles
from dpo_minimal.validation import InputError
from dpo_minimal.zoo import LOSSES
from dpo_minimal.zoo.ipo import ipo_estimate, ipo_optimum

BETA = 0.5


def of_margin(formula):
    """A loss of a formula in the margin, whose parameters have names of their own."""

    def planted(winner, loser, winner_before, loser_before, *, beta):
        return formula(beta * ((winner - loser) - (winner_before - loser_before)))

    return planted


def logistic(u):
    return -F.logsigmoid(u)


@functools.cache
def judged(loss, sizes=(3,), reads=("policy", "reference")):
    """(findings without data and networks, verdict) on few small worlds."""
    subject = Subject(loss, reads, {})
    examine(subject)
    found = measures.shape(subject) | measures.invariances(subject)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ends_module, "SIZES", sizes)
        patch.setattr(ends_module, "equal_rows", functools.partial(ends_module.equal_rows, count=200))
        found |= measures.endings(subject, found["batch_dependent"], quick=True)
    return found, verdict(found, subject.options)


def shape_of(formula):
    return measures.shape(Subject(of_margin(formula), ("policy", "reference"), {}))


@functools.cache
def whole(name):
    """All findings of a loss of the package, as they stand beside those of others."""
    return card_module._beside(name, BETA, True)[0]


# ------------------------------------------------------------------------- where training ends, by hand


def answers(kind, ref, rewards, flipped=0.1):
    """What people are asked and answer, written out: {(winner, loser): probability} of one world."""
    Y, chance = len(ref), {}
    for i in range(Y):
        for j in range(Y):
            if i == j or (kind == "chain" and abs(i - j) != 1):
                continue
            shown = math.exp(ref[i] + ref[j]) if kind == "pairs of the reference" else 1.0
            wins = 1 / (1 + math.exp(rewards[j] - rewards[i]))
            if kind == "reversed":
                wins = (1 - flipped) * wins + flipped * (1 - wins)
            if kind in ("unanimous", "never loses"):
                agreed = kind == "unanimous" or max(rewards[i], rewards[j]) == max(rewards)
                wins = wins if rewards[i] > rewards[j] or not agreed else 0.0
            chance[i, j] = shown * wins
    return {pair: weight / sum(chance.values()) for pair, weight in chance.items() if weight > 0}


def minimum(name, scenes, rows, options):
    """Policies (X, Y) of least expected loss, by LBFGS on logits, from the loss's function alone."""
    ref, lengths = scenes.ref_logps[rows], scenes.lengths[rows]
    there = ref > -math.inf
    parts = []
    for x, row in enumerate(rows):
        size = int(there[x].sum())
        table = scenes.ref_logps[row, :size].tolist(), scenes.rewards[row, :size].tolist()
        parts += [(x, *pair, weight) for pair, weight in answers(scenes.kind[row], *table).items()]
    x, w, l, weight = (torch.tensor(column) for column in zip(*parts))
    logits = torch.where(there, ref, 0).requires_grad_()
    reads = inspect.signature(LOSSES[name].function).parameters

    def loss():
        logps = logits.masked_fill(~there, -math.inf).log_softmax(-1)
        columns = {
            "policy_chosen_logps": logps[x, w],
            "policy_rejected_logps": logps[x, l],
            "reference_chosen_logps": ref[x, w],
            "reference_rejected_logps": ref[x, l],
            "chosen_lengths": lengths[x, w],
            "rejected_lengths": lengths[x, l],
        }
        given = {key: column for key, column in columns.items() if key in reads}
        return weight.double() @ LOSSES[name].function(**given, **options).losses

    optimizer = torch.optim.LBFGS(
        [logits], max_iter=600, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().masked_fill(~there, -math.inf).log_softmax(-1)


def divergence(p, q):
    """KL(p || q) of tables of log-probabilities, padded with -inf."""
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)


def tilted(ref, rewards, beta):
    return (ref + rewards / beta).log_softmax(-1)


def best_beta(ends, ref, rewards):
    """(beta, KL) whose optimum is nearest in the worst world: a grid, and within its best cell another."""
    logs = torch.linspace(math.log(0.03), math.log(40), 400).double()
    for _ in range(2):
        worst = torch.stack([divergence(ends, tilted(ref, rewards, at.exp())).max() for at in logs])
        least = int(worst.argmin())
        found, logs = logs[least].exp().item(), torch.linspace(*logs[[least - 1, least + 1]].tolist(), 400)
        logs = logs.double()
    return found, worst.min().item()


def below_frontier(end, ref, rewards):
    """Reward of the tilted reference with the same KL, found by bisection, less the end's."""
    there = ref > -math.inf
    end, ref, rewards = end[there], ref[there], rewards[there]
    low, high = math.log(1e-3), math.log(1e4)
    for _ in range(100):
        middle = (low + high) / 2
        further = divergence(tilted(ref, rewards, math.exp(middle)), ref) > divergence(end, ref)
        low, high = (middle, high) if further else (low, middle)
    return ((tilted(ref, rewards, math.exp(high)).exp() - end.exp()) * rewards).sum().item()


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("robust", "averaged_dpo", "exo", "rpo")]


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo", "averaged_ipo", "simpo", *SLOWLY])
def test_where_training_ends_and_what_follows_from_it(name):
    """LBFGS on answers that are written out, and each number of that part of the card from its policies."""
    subject = Subject(LOSSES[name], (), {})
    scenes = ends_module.population(3)
    main, flipped = scenes.where(*measures.MAIN), scenes.where("reversed")
    found = measures.endings(subject, False, quick=True)
    ends = minimum(name, scenes, main, subject.options)
    ref, rewards = scenes.ref_logps[main], scenes.rewards[main]
    beta = subject.options["beta"]

    close = functools.partial(
        pytest.approx, rel=1e-4, abs=1e-7
    )  # LBFGS ends within 1e-5 of log-probabilities
    assert found["worlds"] == len(main) == 12 and found["worlds_without_end"] == 0
    assert found["kl_to_optimal"] == close(divergence(ends, tilted(ref, rewards, beta)).max().item())
    at, least = best_beta(ends, ref, rewards)
    assert found["best_beta"] == pytest.approx(at, rel=1e-3)  # a cell of the second grid is 2e-4 wide
    assert found["kl_at_best_beta"] == close(least, abs=1e-4 * at)  # where two worlds tie it has a kink
    base = [k for k, row in enumerate(main) if scenes.kind[row] == "all pairs"]
    gaps = [below_frontier(ends[k], ref[k], rewards[k]) for k in base]
    assert found["reward_below_frontier"] == close(max(gaps), abs=1e-6)  # of a root near KL's minimum

    others = {kind: [k for k, row in enumerate(main) if scenes.kind[row] == kind] for kind in measures.MAIN}
    apart = {kind: divergence(ends[rows], ends[base]).max().item() for kind, rows in others.items()}
    moved = max(apart["chain"], apart["pairs of the reference"])
    assert found["depends_on_pairs"] == (moved > 1e-8)
    assert found["end_reads_reference"] == (apart["another reference"] > 1e-8)
    noisy = minimum(name, scenes, flipped, subject.options)
    optimal = tilted(scenes.ref_logps[flipped], scenes.rewards[flipped], beta)
    assert found["kl_after_flips"] == close(divergence(noisy, optimal).max().item())
    if callable(LOSSES[name].optimum):
        assert found["kl_to_own_optimum"] < 1e-12


@pytest.mark.slow
def test_what_is_known_of_the_ends_without_any_minimiser():
    """Identities of the theory, of which no number was computed by training."""
    dpo, ipo = whole("dpo"), whole("ipo")
    assert dpo["kl_to_optimal"] < 1e-12 and dpo["best_beta"] == pytest.approx(BETA, rel=1e-6)
    # A mislabelled tenth does to DPO what cDPO does to itself on clean labels, and robust DPO undoes it.
    cdpo, robust = (
        measures.endings(Subject(LOSSES[name], (), {}), False, quick=True) for name in ("cdpo", "robust")
    )
    assert dpo["kl_after_flips"] == pytest.approx(cdpo["kl_to_optimal"], rel=1e-6)
    assert robust["kl_after_flips"] < 1e-12 < robust["kl_to_optimal"]
    # Only IPO and cDPO bear people who all agree.
    assert ipo["end_on_unanimous_pairs"] and cdpo["end_on_unanimous_pairs"]
    assert dpo["end_on_unanimous_pairs"] is robust["end_on_unanimous_pairs"] is False
    assert dpo["end_where_one_never_loses"] is False and ipo["end_where_one_never_loses"]


# ------------------------------------------------------------------------------------- a pair, by hand


def s(x):
    return 1 / (1 + math.exp(-x))


# Of a loss at beta = 1/2: its value and both pulls at margin u, where policy and reference have ten tokens.
BY_HAND = {
    "dpo": lambda u: (math.log1p(math.exp(-u)), BETA * s(-u), BETA * s(-u)),
    "ipo": lambda u: ((2 * u - 1) ** 2, 2 - 4 * u, 2 - 4 * u),
    "cdpo": lambda u: (math.log1p(math.exp(-u)) + 0.1 * u, BETA * (s(-u) - 0.1), BETA * (s(-u) - 0.1)),
    "hinge": lambda u: (max(0, 1 - u), BETA * (u < 1), BETA * (u < 1)),
    "simpo": lambda u: (math.log1p(math.exp(1 - u / 10)), 0.05 * s(1 - u / 10), 0.05 * s(1 - u / 10)),
    "kto": lambda u: (s(-u / 2), BETA * s(u / 2) * s(-u / 2) / 2, BETA * s(u / 2) * s(-u / 2) / 2),
    "unweighted_dpo": lambda u: (-u, BETA, BETA),
}
# growth, rises_from, negative_pull_from: of IPO the target is at 1/2, of cDPO at log 9 = 2.197.
GRADES = {
    "dpo": ("log t", None, None),
    "ipo": ("stops", 0.6, 0.6),
    "cdpo": ("stops", 2.3, 2.2),
    "hinge": ("stops", None, None),
    "simpo": ("log t", None, None),
    "kto": ("log t", None, None),
    "unweighted_dpo": ("t", None, None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_pair(name):
    """Losses and pulls along margins, and what is read from them."""
    subject = Subject(LOSSES[name], (), {})
    along, found = measures.curves(subject), measures.shape(subject)
    assert len(along.margins) == 161 and along.margins[80] == 0 and along.margins[-1] == 8
    exact = torch.tensor([BY_HAND[name](u) for u in along.margins.tolist()], dtype=torch.float64)
    drawn = torch.stack(along[1:], -1)
    corner = (along.margins - 1).abs() < 1e-9 if name == "hinge" else torch.zeros(161, dtype=torch.bool)
    assert torch.allclose(drawn[~corner], exact[~corner], rtol=1e-9, atol=1e-12)
    pull = exact[:, 1] + exact[:, 2]
    assert found["pull_left_at_sure_pairs"] == pytest.approx((pull[-1] / pull[80]).item(), rel=1e-9)
    growth, rises, negative = GRADES[name]
    assert found["growth_on_unanimous_pairs"] == growth
    assert found["rises_from"] == (rises and pytest.approx(rises))
    assert found["negative_pull_from"] == (negative and pytest.approx(negative))
    assert found["equal_pulls"] == (name not in ("simpo", "kto"))
    assert found["concave_from"] == (-7.9 if name == "kto" else None)


def test_how_fast_a_margin_grows_by_the_pull_that_is_left():
    """du/dt = u^-k grows as t^(1/(1+k)); the pull of exp(-u) as log t, however slowly it fades."""

    def root(u):  # k = 1/2
        return torch.where(u > 1, 2 - 2 * u.clamp(min=1).sqrt(), 1 - u)

    def hyperbola(u):  # k = 1
        return torch.where(u > 1, -u.clamp(min=1).log(), 1 - u)

    assert shape_of(root)["growth_on_unanimous_pairs"] == "t^0.67"
    assert shape_of(hyperbola)["growth_on_unanimous_pairs"] == "t^0.5"
    assert shape_of(lambda u: (-u).exp())["growth_on_unanimous_pairs"] == "log t"
    assert shape_of(lambda u: (-u / 10).exp())["growth_on_unanimous_pairs"] == "log t"


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name].reads_batch])
def test_every_loss_of_the_package_pulls_as_its_weights_say_and_starts_as_its_record_says(name):
    """The records' own words, against what the card measures."""
    subject = Subject(LOSSES[name], (), {})
    found = measures.shape(subject)
    assert found["own_weights_are_its_gradient"] is True
    assert all(found["finite_at_large_margins"].values())
    start = subject.record.start
    expected = start and pytest.approx(start(2, **subject.options), abs=1e-12)
    assert found["value_at_reference"] == expected


def test_weights_that_are_not_the_gradient():
    """Of a record that forgets beta in its weights, of the right ones, and of a function without any."""

    def told(side):
        def wrong(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        ):
            policy, before = (policy_chosen_logps, policy_rejected_logps), reference_chosen_logps
            out = dpo_loss(*policy, before, reference_rejected_logps, beta=BETA)
            return out._replace(**{side: getattr(out, side) / BETA})

        return measures.shape(Subject(wrong, (), {}))["own_weights_are_its_gradient"]

    sides = "chosen_weights", "rejected_weights", "losses"  # of which the last changes the gradient
    assert [told(side) for side in sides] == [False, False, False]
    assert measures.shape(Subject(dpo_loss, (), {}))["own_weights_are_its_gradient"] is True
    assert shape_of(logistic)["own_weights_are_its_gradient"] is None


def test_numbers_that_overflow_in_one_precision_only():
    """float64, float32 and bfloat16, each by a loss that fails there, and one that refuses bfloat16."""

    def finite(formula):
        return tuple(shape_of(formula)["finite_at_large_margins"].values())

    def refusing(u):
        if u.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for BFloat16")
        return logistic(u)

    almost_one = 1 - 2.0**-10  # 1 in bfloat16, whose numbers below 1 are 2^-8 apart
    assert finite(logistic) == (True, True, True)
    assert finite(lambda u: (-u).exp() + 0 * u) == (False, False, False)
    assert finite(lambda u: (u / 8 - 1) ** 16) == (True, False, False)  # 600^16 = 1e44
    assert finite(lambda u: logistic(u) * (1 - u.new_tensor(almost_one)).log()) == (True, True, False)
    assert finite(refusing) == (True, True, None)


# --------------------------------------------------------------------- what a pair's loss depends on


def averaged(winner, loser, winner_before, loser_before, winner_tokens, loser_tokens, *, beta):
    return logistic(beta * ((winner - winner_before) / winner_tokens - (loser - loser_before) / loser_tokens))


def forgetful(winner, loser, winner_before, loser_before, *, beta):
    return logistic(beta * (winner - loser))


def centred(winner, loser, winner_before, loser_before, *, beta):
    u = beta * ((winner - loser) - (winner_before - loser_before))
    return logistic(u - u.mean())


def fine_tuning(winner, loser, winner_before, loser_before):
    return -winner


def test_what_a_pair_depends_on():
    """Each planted loss differs from DPO in the lines that it was made for, and in no other."""
    base = measures.invariances(Subject(of_margin(logistic), ("policy", "reference"), {}))
    assert base == {
        "reads_reference": True, "reads_lengths": False, "batch_dependent": False,
        "ignores_shift_of_logits": True, "ignores_shift_of_reference": True,
        "ignores_swap_of_the_pair": False,
    }  # fmt: skip
    with_lengths = ("policy", "reference", "lengths")
    for loss, reads, differ in [
        (forgetful, with_lengths[:2], {"reads_reference"}),
        (averaged, with_lengths,
         {"reads_lengths", "ignores_shift_of_logits", "ignores_shift_of_reference"}),
        (centred, with_lengths[:2], {"batch_dependent"}),
        (fine_tuning, with_lengths[:2], {"reads_reference", "ignores_shift_of_logits"}),
        (of_margin(lambda u: logistic(u.abs())), with_lengths[:2], {"ignores_swap_of_the_pair"}),
    ]:  # fmt: skip
        found = measures.invariances(Subject(loss, reads, {}))
        assert {key for key in base if found[key] != base[key]} == differ, loss


# ------------------------------------------------------------------------------------------ verdicts


def half_detached(winner, loser, winner_before, loser_before, *, beta):
    return logistic(beta * ((winner.detach() - loser) - (winner_before - loser_before)))


def unequal(winner, loser, winner_before, loser_before, *, beta):
    loser = 1.1 * loser - 0.1 * loser.detach()  # its value, and a tenth more gradient
    return logistic(beta * ((winner - loser) - (winner_before - loser_before)))


def outside(winner, loser, winner_before, loser_before, *, beta):
    return beta * logistic((winner - loser) - (winner_before - loser_before))


def without_beta(winner, loser, winner_before, loser_before):
    return logistic((winner - loser) - (winner_before - loser_before))


def reweighted(winner, loser, winner_before, loser_before, *, beta):
    """DPO, in which pairs that the policy writes count more: that moves no pair's optimum."""
    margin = beta * ((winner - loser) - (winner_before - loser_before))
    return logistic(margin) * (winner + loser).exp().detach()


AT, ELSEWHERE, NONE = "ends at π*", "ends elsewhere", "has no end"
# A loss made to deserve it: the words, and findings. KL in nats.
PLANTED = {
    "DPO": (of_margin(logistic), AT, dict(end_on_unanimous_pairs=False, depends_on_pairs=False)),
    "a millionth of it": (of_margin(lambda u: 1e-6 * logistic(u)), AT, dict(end_on_unanimous_pairs=False)),
    "a million of it": (of_margin(lambda u: 1e6 * logistic(u)), AT, dict(end_on_unanimous_pairs=False)),
    "a naive logarithm": (of_margin(lambda u: -u.sigmoid().log()), AT, dict(end_on_unanimous_pairs=False)),
    "weights of its own": (reweighted, AT, dict(equal_pulls=True, depends_on_pairs=False)),
    "beta outside": (outside, "π* of β = 1 and not", dict(ends_at_optimum=False)),
    "no beta": (without_beta, "ends at π* of β = 1", dict(best_beta=pytest.approx(1, rel=1e-4))),
    "a little off": (of_margin(lambda u: logistic(u - 1e-4)), ELSEWHERE, dict(depends_on_pairs=True)),
    "forgetful": (forgetful, "without regard to the reference", dict(reads_reference=False)),
    "the same anywhere": (fine_tuning, ELSEWHERE, dict(reads_reference=False, end_reads_reference=False)),
    "a square": (of_margin(lambda u: (u - 1) ** 2), ELSEWHERE, dict(
        end_on_unanimous_pairs=True, end_where_one_never_loses=True, depends_on_pairs=True)),
    "for wrong labels": (of_margin(lambda u: logistic(u) - u / 8), ELSEWHERE, dict(
        kl_after_flips=pytest.approx(0, abs=1e-12))),  # 1/8 = eps / (1 - 2 eps) of a tenth
    "a corner, small": (of_margin(lambda u: 1e-6 * F.relu(2 - u)), ELSEWHERE, dict(
        worlds_undecided=0, end_on_unanimous_pairs=True, concave_from=None)),
    "unequal": (unequal, ELSEWHERE, dict(equal_pulls=False, depends_on_pairs=True)),
    "labels swapped": (of_margin(lambda u: logistic(-u)), ELSEWHERE, dict(best_beta=None)),
    "never starts": (of_margin(lambda u: (u**2 - 1) ** 2), ELSEWHERE, dict(
        best_beta=None, depends_on_pairs=False)),
    "linear": (of_margin(lambda u: -u), NONE, dict(worlds_without_end=4, concave_from=None)),
    "concave": (of_margin(lambda u: -F.softplus(u)), NONE, dict(concave_from=pytest.approx(-7.9))),
    "bounded": (of_margin(lambda u: torch.sigmoid(-u)), NONE, dict(ends_at_optimum=False)),
    "half detached": (half_detached, NONE, dict(equal_pulls=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_verdict_is_what_the_loss_was_made_for(name):
    """DPO with one thing altered, each time."""
    loss, words, findings = PLANTED[name]
    found, sentence = judged(loss)
    assert words in sentence
    assert {key: found[key] for key in findings} == findings
    assert sentence.startswith(AT) == (found["ends_at_optimum"] is True)
    if sentence.startswith(AT):  # the optimum is a point, so that nothing else about the pairs can matter
        assert found["kl_at_best_beta"] < 1e-9 and not found["depends_on_pairs"]
    json.dumps(found, allow_nan=False)


def test_a_loss_that_is_computed_in_float32_ends_where_it_does_in_float64():
    """Its slopes are known to three digits, and its end to six."""
    for formula in (lambda u: logistic(u.float()), lambda u: logistic(u.float()).double()):
        found, sentence = judged(of_margin(formula), (3, 4))
        assert AT in sentence and not found["end_on_unanimous_pairs"] and not found["depends_on_pairs"]
        assert found["concave_from"] is None and found["rises_from"] is None and not found["batch_dependent"]


@pytest.mark.slow
def test_a_loss_of_lengths_and_one_of_its_batch_end_elsewhere():
    found, sentence = judged(averaged, reads=("policy", "reference", "lengths"))
    assert found["reads_lengths"] and "depends on lengths" in sentence
    found, sentence = judged(centred)
    assert found["batch_dependent"] and ELSEWHERE in sentence
    harmless = of_margin(lambda u: logistic(u) + u.mean().detach())  # reads its batch, and DPO nevertheless
    found, sentence = judged(harmless)
    assert found["batch_dependent"] and AT in sentence and found["kl_to_optimal"] < 1e-2  # of 200 rows


def test_a_half_detached_loss_shows_a_pull_of_zero():
    """Its value is DPO's everywhere; only the pulls tell."""
    detached, right = (
        measures.curves(Subject(loss, ("policy", "reference"), {}))
        for loss in (half_detached, of_margin(logistic))
    )
    assert torch.equal(detached.losses, right.losses) and torch.equal(detached.rejected, right.rejected)
    assert not detached.chosen.any() and right.chosen.min() > 0


def test_training_that_leads_to_nan_is_no_end():
    """-log sigmoid where a margin is below 3/4, and NaN beyond, where pairs of rewards 0 and 2 lead."""
    found, sentence = judged(of_margin(lambda u: logistic(u) + 0 * (0.75 - u).log()))
    assert found["ends_at_optimum"] is None and found["worlds_undecided"] > 0 and "not be decided" in sentence


@pytest.mark.slow
def test_fields_that_descend_no_function_end_where_small_steps_do():
    """One that is half detached, and one with hollows and ridges, by plain gradient descent."""
    scenes = ends_module.population(2)
    for loss in (half_detached, of_margin(lambda u: -(-((u - 1) ** 2)).exp())):
        subject = Subject(loss, ("policy", "reference"), {})
        found = ends_module.ends(subject, scenes, reads_batch=False)
        rows = scenes.rankings.normalised_by_prompt()
        logits = scenes.ref_logps.clone().requires_grad_()
        tables = scenes.ref_logps, rows, scenes.lengths
        gone = torch.zeros(len(logits), dtype=torch.bool)
        for _ in range(1500):
            logps = logits.log_softmax(-1)
            (gradient,) = torch.autograd.grad(rows.weight @ subject.on_table(logps, *tables), logits)
            logits = (logits - 8 * gradient).detach().requires_grad_()
            gone = gone | ((logps < -20) & (logps > -math.inf)).any(-1)
        rests = gradient.norm(dim=-1) < 1e-6
        assert torch.equal(found.settled, rests & ~gone) and torch.equal(found.runs_away, gone | ~rests)
        assert divergence(found.logps, logps)[rests & ~gone].abs().sum() < 1e-6


# ------------------------------------------------------------------------------- data and networks


def drawn_again(data_sets=200, pairs=1000):
    """The card's data sets, counted pair by pair."""
    rewards, exists = (
        torch.tensor([[0.0, 0.5, 1.0, 1.2]], dtype=torch.float64),
        torch.ones(1, 4, dtype=torch.bool),
    )
    truth = expected_pairs(rewards, all_sets(exists))
    draws = torch.multinomial(
        truth.weight.expand(data_sets, -1), pairs, replacement=True,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    counts = torch.stack([torch.bincount(row, minlength=len(truth.weight)) for row in draws]).double()
    number = torch.arange(data_sets).repeat_interleave(len(truth.weight))
    return rewards, Rankings(number, truth.order.repeat(data_sets, 1), counts.flatten())


def check_data(found, rewards, scores, beta, pairs=1000):
    """Mean squared error and N KL of estimated rewards (D, Y), beside the card's."""
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    error = (scores - scores.mean(-1, keepdim=True)) - (rewards - rewards.mean())
    p = torch.sigmoid(rewards[0, :, None] - rewards[0])
    weight = p * (1 - p) / 6  # of six pairs alike, one answer
    information = torch.diag(weight.sum(-1)) - weight  # the diagonals cancel
    bound = torch.linalg.pinv(information).trace() / pairs
    assert found["efficiency"] == pytest.approx(((error**2).sum(-1).mean() / bound).item(), rel=1e-5)
    ends, optimal = (ref + scores / beta).log_softmax(-1), (ref + rewards / beta).log_softmax(-1)
    n_kl = pairs * divergence(ends, optimal.expand(ends.shape)).mean().item()
    assert found["n_kl"] == pytest.approx(n_kl, rel=1e-4)  # sums that cancel, of 1e-8
    spread = torch.diag(optimal[0].exp()) - optimal[0].exp().outer(optimal[0].exp())
    law = (spread @ torch.linalg.pinv(information)).trace() / (2 * beta**2)
    assert found["n_kl_law"] == pytest.approx(law.item(), rel=1e-9)


@pytest.mark.slow
def test_finite_data():
    """The same draws estimated by maximum likelihood, and for IPO by its linear equations."""
    rewards, data = drawn_again()
    exists = torch.ones(200, 4, dtype=torch.bool)
    check_data(whole("dpo"), rewards, maximum_likelihood(data, exists), BETA)
    # Twice the Monte Carlo error: 200 errors squared of three degrees of freedom, sqrt(2 / 600) each.
    assert whole("dpo")["efficiency"] == pytest.approx(1, abs=0.12)
    found = measures.finite_data(Subject(LOSSES["ipo"], (), {}), False, BETA, quick=True)
    check_data(found, rewards, BETA * ipo_estimate(data, exists, beta=BETA), BETA)
    assert whole("ipo")["efficiency"] is None  # it does not end at pi*, so that nothing is estimated


def test_a_network_ends_where_the_table_does():
    """DPO's GPT is near pi*, IPO's near IPO's optimum for the same pairs, by the closed form."""
    found = {name: whole(name) for name in ("dpo", "ipo")}
    assert found["dpo"]["gpt_kl_to_optimal"] < 1e-4 < 1 < found["ipo"]["gpt_kl_to_optimal"]
    longer, right = found["dpo"]["gpt_length_change"], found["dpo"]["gpt_length_change_of_optimum"]
    assert longer == pytest.approx(right, abs=1e-2) and abs(right) > 0.1

    with torch.random.fork_rng():
        torch.manual_seed(3)
        gpt = measures.GPT(
            measures.GPTConfig(vocab_size=3, block_size=6, n_layer=1, n_head=2, n_embd=16)
        ).double()
    _, lengths = completions = enumerate_completions(3, 4, eos=2)
    assert len(lengths) == 31
    ref = torch.stack([_logps(gpt, prompt, *completions) for prompt in ([0, 1], [1, 1])])
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(ref.shape, generator=generator, dtype=torch.float64)
    pairs = expected_pairs(rewards, random_cycles(ref > -math.inf, cycles=4, generator=generator))
    optimal, ipo = tilted(ref, rewards, BETA), ipo_optimum(pairs, ref, beta=BETA)
    change = [((end.exp() - ref.exp()) * lengths).sum(-1).mean().item() for end in (optimal, ipo)]
    assert found["dpo"]["gpt_length_change_of_optimum"] == pytest.approx(change[0], abs=1e-6)
    assert found["ipo"]["gpt_length_change"] == pytest.approx(change[1], abs=1e-2)
    expected = divergence(ipo, optimal).max().item()
    assert found["ipo"]["gpt_kl_to_optimal"] == pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def _logps(gpt, prompt, ids, lengths):
    """log pi of each completion, one after the other, token by token."""
    found = []
    for row, length in zip(ids.tolist(), lengths.tolist()):
        tokens = torch.tensor([prompt + row])
        logps = gpt(tokens)[0].log_softmax(-1)
        places = range(len(prompt), len(prompt) + length)
        found.append(sum(logps[place - 1, tokens[0, place]] for place in places))
    return torch.stack(found)


def test_displacement():
    """Of a loss of the margin the weights move along the difference of features, by exactly one; fine-tuning
    follows its own gradient, here by small steps."""
    features = measures.FEATURES
    ahead = (features @ (features[0] - features[1])).log_softmax(-1)[0] + math.log(4)
    assert (features[0] - features[1]).norm() == 1  # so that the margin is the length of the way
    for loss in (of_margin(logistic), of_margin(lambda u: (u - 1) ** 2)):
        found = measures.displacement(Subject(loss, ("policy", "reference"), {}))
        assert found["displacement"] == pytest.approx(ahead.item(), abs=0.01)  # a step's length
    v = torch.zeros(2).double()
    while v @ (features[0] - features[1]) < 1:
        v = v + 1e-3 * (features[0] - (features @ v).softmax(-1) @ features)
    tuned = measures.displacement(Subject(fine_tuning, ("policy", "reference"), {}))["displacement"]
    assert tuned == pytest.approx(((features @ v).log_softmax(-1)[0] + math.log(4)).item(), abs=0.01)
    assert tuned > 0 > ahead  # which is what RPO's likelihood is for
    backwards = measures.displacement(Subject(of_margin(lambda u: logistic(-u)), ("policy", "reference"), {}))
    assert backwards == {"displacement": None}


# --------------------------------------------------------------------------------- what is refused


def scalar(winner, loser, winner_before, loser_before):
    return without_beta(winner, loser, winner_before, loser_before).mean()


def in_place(winner, loser, winner_before, loser_before):
    winner_before -= 1
    return without_beta(winner, loser, winner_before, loser_before)


def in_place_of_the_policy(winner, loser, winner_before, loser_before):
    loser -= winner  # of which torch says that it cannot
    return loser


def tempered(winner, loser, winner_before, loser_before, temperature):
    return without_beta(winner, loser, winner_before, loser_before) / temperature


def needs_two(winner, loser, winner_before, loser_before):
    if len(winner) < 2:
        raise RuntimeError("two rows, please")
    return without_beta(winner, loser, winner_before, loser_before)


def of_losses(change):
    """A loss whose rows are changed before they are returned."""
    return lambda *columns: change(without_beta(*columns))


# A loss and how the card is asked, with the words of the refusal.
REFUSED = {
    "raises": (lambda a, b, c, d: a.nothing, {}, r"raises AttributeError .* on 8 ordinary pairs"),
    "raises on one row": (needs_two, {}, "raises RuntimeError while it is measured: two rows, please"),
    "one number": (scalar, {}, "returns one number for 8 pairs"),
    "one number of one row": (of_losses(torch.squeeze), {}, "returns one number for 1 pairs"),
    "an array": (of_losses(lambda x: x.detach().numpy()), {}, "returns ndarray"),
    "a float": (of_losses(lambda x: x.mean().item()), {}, "returns float"),
    "nothing": (of_losses(lambda x: None), {}, "returns NoneType"),
    "an empty tuple": (of_losses(lambda x: ()), {}, "returns tuple"),
    "a dict": (of_losses(lambda x: {"loss": x}), {}, "returns dict"),
    "a column": (of_losses(lambda x: x.unsqueeze(-1)), {}, r"returns shape \(8, 1\) for 8 pairs"),
    "a row": (of_losses(lambda x: x.unsqueeze(0)), {}, r"returns shape \(1, 8\) for 8 pairs"),
    "a square": (of_losses(lambda x: x + x.unsqueeze(-1)), {}, r"returns shape \(8, 8\) for 8 pairs"),
    "twice as many": (of_losses(lambda x: torch.cat([x, x])), {}, r"returns shape \(16,\) for 8 pairs"),
    "some": (of_losses(lambda x: x[:5]), {}, r"returns shape \(5,\) for 8 pairs"),
    "integers": (of_losses(lambda x: x.long()), {}, "returns torch.int64"),
    "complex numbers": (of_losses(lambda x: x.cfloat()), {}, "returns torch.complex64"),
    "NaN": (of_losses(lambda x: x * math.nan), {}, "gives nan on ordinary pairs"),
    "infinity": (of_losses(lambda x: x + math.inf), {}, "gives inf on ordinary pairs"),
    "detached": (of_losses(torch.detach), {}, "carries no gradient"),
    "constant": (of_losses(lambda x: 0 * x), {}, "has gradient zero"),
    "in place": (in_place, {}, "changes its own inputs"),
    "in place, of the policy": (in_place_of_the_policy, {}, "changes its own inputs"),
    "dropout": (of_losses(F.dropout), {}, "a random loss has no card"),
    "another parameter": (tempered, {}, "has a parameter temperature, which is no option that was given"),
    "an unknown option": (without_beta, dict(options={"bta": 1.0}), "has no option bta; its options are"),
    "a beta of 0": (forgetful, dict(options={"beta": 0.0}), "beta must be a positive finite number"),
    "an option of the package's loss": (
        LOSSES["ipo"], dict(options={"tau": 1.0}), "has no option tau; its options are: beta"),
    "an option out of its range": (
        LOSSES["cdpo"], dict(options={"label_smoothing": 0.6}), r"label_smoothing must lie in \[0, 0.5\)"),
    "reads what there is not": (without_beta, dict(reads=("policy", "prompts")), "reads must name policy"),
    "reads, beside our names": (LOSSES["ipo"].function, dict(reads=("policy", "lengths")), "leave out reads"),
    "reads, of the package's loss": (LOSSES["dpo"], dict(reads=("policy",)), "leave out reads"),
    "reads no policy": (without_beta, dict(reads=("reference",)), "reads must name policy"),
    "few parameters": (lambda a, b: b - a, {}, "has 2 parameters by position, but .* make 4"),
    "few for what it reads": (without_beta, dict(reads=("policy", "reference", "lengths")), "make 6"),
    "few, of a partial function": (
        functools.partial(lambda a, b: b - a), {}, "<lambda> has 2 parameters by position"),
    "only keywords": (lambda **columns: 0, {}, "has 0 parameters by position"),
    "a number": (3, {}, "must be a function or a record, got 3"),
    "nothing at all": (None, {}, "must be a function or a record, got None"),
    "a builtin": (torch.sub, {}, "sub does not tell its parameters"),
    "a type": (dict, {}, "dict does not tell its parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_loss_of_pairs_gets_one_sentence(name):
    loss, asked, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as caught:
        loss_card(loss, quick=True, **asked)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip(")").endswith((".", "please"))


# ------------------------------------------------------------------------------- what is taken


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, winner, loser, winner_before, loser_before, beta=BETA):
        return self.scale * of_margin(logistic)(winner, loser, winner_before, loser_before, beta=beta)


class NamedModule(torch.nn.Module):
    def forward(
        self, policy_rejected_logps, policy_chosen_logps, reference_rejected_logps, reference_chosen_logps
    ):
        ahead = policy_chosen_logps - policy_rejected_logps
        return logistic(BETA * (ahead - reference_chosen_logps + reference_rejected_logps))


@dataclass
class Unhashable:
    beta: float

    def __call__(self, *columns):
        return of_margin(logistic)(*columns, beta=self.beta)


def named(policy_rejected_logps, policy_chosen_logps, reference_rejected_logps, reference_chosen_logps):
    """The columns by name, in another order than by position."""
    ahead = policy_chosen_logps - policy_rejected_logps
    return logistic(BETA * (ahead - reference_chosen_logps + reference_rejected_logps))


def starred(*columns, beta=BETA):
    return of_margin(logistic)(*columns, beta=beta)


def with_extras(winner, loser, winner_before, loser_before, *, beta=BETA, average=False, **unused):
    return logistic(beta * (winner - loser - winner_before + loser_before)), winner.detach()


@pytest.mark.parametrize(
    "loss",
    [
        LOSSES["dpo"], dpo_loss, of_margin(logistic), named, starred, with_extras, Module(), Unhashable(BETA),
        functools.partial(of_margin(logistic), beta=BETA), NamedModule(),
        lambda a, b, c, d: logistic(BETA * (a - b - c + d)),
        Unhashable(BETA).__call__,
    ],
    ids=lambda loss: getattr(loss, "__name__", type(loss).__name__),
)  # fmt: skip
def test_any_callable_is_a_loss(loss):
    """Each of these is DPO at beta = 1/2."""
    subject = Subject(loss, ("policy", "reference"), {})
    examine(subject)
    (table, reference, lengths), beta = measures.example(), subject.options.get("beta", BETA)
    margin = BETA * ((table - reference)[:, 0] - (table - reference)[:, 1])
    assert torch.allclose(subject(table, reference, lengths), logistic(margin), rtol=1e-12)
    assert beta == BETA and isinstance(subject.name, str)


def test_options():
    """A default of the signature is kept, a record's beta is 1/2, and what is given goes before both."""

    def loss(winner, loser, winner_before, loser_before, *, beta=0.2, scale=3.0, name="x"):
        return scale * logistic(beta * (winner - loser - winner_before + loser_before))

    by_position = "policy", "reference"
    assert Subject(loss, by_position, {}).options == {"beta": 0.2, "scale": 3.0}
    assert Subject(loss, by_position, {"beta": 0.7}).options == {"beta": 0.7, "scale": 3.0}
    assert Subject(LOSSES["cdpo"], (), {}).options == {"beta": 0.5, "label_smoothing": 0.1}
    assert Subject(LOSSES["simpo"], (), {"gamma": 0.0}).options["gamma"] == 0
    tables = measures.example()
    given = [Subject(loss, by_position, {"beta": beta})(*tables) for beta in (0.2, 0.7)]
    assert not torch.allclose(*given)


def test_columns_by_position_come_as_reads_says():
    """Policy, reference, lengths; chosen before rejected; each column once."""
    seen = []

    def loss(*columns):
        seen.append(torch.stack(columns, -1).detach())
        return columns[0]

    policy, reference, lengths = measures.example()
    for reads in (
        ("policy",),
        ("policy", "reference"),
        ("policy", "lengths"),
        ("policy", "reference", "lengths"),
    ):
        Subject(loss, reads, {})(policy, reference, lengths)
        tables = {"policy": policy, "reference": reference, "lengths": lengths}
        assert torch.equal(seen.pop(), torch.cat([tables[name] for name in reads], -1))


# --------------------------------------------------------------------------------------- the command

MINE = """
import torch

def mine(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta
):
    h = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
    return (beta * h - 1) ** 2 / 2
"""
KEYS = {
    "name", "verdict", "options", "ends_at_optimum", "kl_to_optimal", "reads_reference", "reads_lengths",
    "batch_dependent", "depends_on_pairs", "end_on_unanimous_pairs", "equal_pulls", "value_at_reference",
    "efficiency", "kl_after_flips",
}  # fmt: skip


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_the_command(tmp_path, capsys):
    """A file with one function: page, JSON and figure; a second run into the same folder is refused."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    asked = ["card", f"{tmp_path / 'mine.py'}:mine", "--quick", "--option", "beta=0.5"]
    folder = tmp_path / "run"
    assert main([*asked, "--output-dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "card.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert set(found) >= KEYS and found["name"] == "mine" and found["options"] == {"beta": 0.5}
    assert ELSEWHERE in found["verdict"] and not found["ends_at_optimum"] and found["equal_pulls"]
    assert " ".join(found["verdict"].split()) in " ".join(printed.split())
    # IPO's (h - 1)^2 has its target at u = 1/2, this one at 1: its end is IPO's at half the beta.
    assert found["value_at_reference"] == 0.5 and found["end_on_unanimous_pairs"]
    assert found["kl_to_optimal"] == pytest.approx(
        judged(PLANTED["a square"][0], (3, 4, 5))[0]["kl_to_optimal"]
    )

    page = (folder / "card.txt").read_text(encoding="utf-8")
    assert page.strip() in printed and all(f"[{tag}]" in page for tag in ("D4.3", "D4.4", "D11.3", "D13.1"))
    header = next(line for line in page.splitlines() if line.startswith("A pair"))
    assert header.split()[-3:] == ["mine", "DPO", "IPO"]
    image = matplotlib.image.imread(folder / "card.png")
    assert image.shape[0] > 300 and image.shape[1] > 900 and image[..., :3].std() > 0.05  # something is drawn

    assert main([*asked, "--output-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "holds another run" in error and error.count("\n") == 1


def recorded(loss, **asked):
    """A card from findings that other tests need as well."""
    found, drawn = card_module._beside(loss.name, BETA, True)
    options = {"beta": BETA}
    return Card(loss.name, options, verdict(found, options), found, {"DPO": found}, {loss.name: drawn})


def test_the_command_for_all_losses(tmp_path, capsys, monkeypatch):
    """One row, one JSON and one figure a loss."""
    monkeypatch.setattr(command, "LOSSES", {name: LOSSES[name] for name in ("dpo", "ipo")})
    monkeypatch.setattr(command, "loss_card", recorded)
    folder = tmp_path / "run"
    assert main(["card", "--all", "--quick", "--output-dir", str(folder)]) == 0
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out
    dpo, ipo = table.strip().splitlines()[-2:]
    assert dpo.startswith("| `dpo` | **yes** | 0 |") and ipo.startswith("| `ipo` | no |")
    assert {path.name for path in folder.iterdir()} == {
        "dpo.json", "dpo.png", "ipo.json", "ipo.png", "table.md", "config.json"
    }  # fmt: skip
    for name in ("dpo", "ipo"):
        text = (folder / f"{name}.json").read_text(encoding="utf-8")
        assert set(json.loads(text, parse_constant=refuse_constant)) >= KEYS


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "takes the name of one loss, or --all"),
        (["dpo", "--all"], "takes the name of one loss, or --all"),
        (["--all", "--option", "beta=1"], "leave out --option"),
        (["dop"], "dop: no such loss"),
        (["nowhere.py:loss"], "no such file"),
        (["dpo", "--option", "beta"], "write NAME=NUMBER"),
        (["dpo", "--option", "beta=small"], "write NAME=NUMBER"),
        (["dpo", "--option", "beta=nan"], "beta must be a positive finite number"),
        (["dpo", "--option", "tau=1"], "has no option tau"),
        (["MINE:nothing"], "has no nothing"),
        (["MINE:torch"], "is of type module, no function"),
        (["MINE:mine", "--option", "gamma=1"], "has no option gamma"),
        (["MINE:mine", "--reads", "policy,prompts"], "leave out reads"),
    ],
)
def test_the_command_refuses_in_one_sentence(asked, words, tmp_path, capsys):
    """Exit code 2, and no folder."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    asked = [part.replace("MINE", str(tmp_path / "mine.py")) for part in asked]
    assert main(["card", *asked, "--quick", "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_number_of_a_card_is_infinite_and_its_figure_is_drawn(tmp_path, monkeypatch):
    """Of a half-detached loss, and of one that is infinite at margin 0 and NaN below -5."""
    monkeypatch.setattr(ends_module, "SIZES", (3,))
    monkeypatch.setattr(card_module, "on_gpt", lambda *_, **__: dict.fromkeys(KEYS_OF_GPT))
    for loss in (
        half_detached,
        of_margin(lambda u: 0.1 * (u - 1) ** 2 - u.abs().log() - (u + 5).log()),
    ):
        subject = Subject(loss, ("policy", "reference"), {})
        found = card_module._findings(subject, True)
        drawn = measures.curves(subject)
        card = Card("planted", {"beta": BETA}, verdict(found, subject.options), found, {}, {"planted": drawn})
        json.dumps(card.json(), allow_nan=False)
        card.figure(tmp_path / "card.png")
        assert matplotlib.image.imread(tmp_path / "card.png").std() > 0.05
        assert not re.search(r"\b(nan|inf)\b", card.text())


KEYS_OF_GPT = "gpt_kl_to_optimal", "gpt_length_change", "gpt_length_change_of_optimum"


# ------------------------------------------------------------------------------------- the table


def rows_of(table):
    """{loss: cells} of a Markdown table."""
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.slow
def test_the_table_of_cards_is_what_is_measured(monkeypatch):
    """zoo/README.md: words equal, numbers within 5 % (they are rounded to two digits), about a minute."""
    text = (Path(card_module.__file__).parents[1] / "zoo" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- table of cards -->(.*?)<!-- end of the table of cards -->", text, re.DOTALL)[1]
    for name in ("on_gpt", "finite_data", "displacement"):  # which are not in the table
        monkeypatch.setattr(card_module, name, lambda *_, **__: {})
    cards = {}
    for name, loss in LOSSES.items():
        subject = Subject(loss, (), {})
        cards[name] = Card(name, subject.options, "", card_module._findings(subject, True), {}, {})
    measured, quoted = rows_of(command.table_of_cards(cards)), rows_of(shown)
    assert list(measured) == list(quoted)
    number = re.compile(r"\d+\.?\d*(?:e-?\d+)?")
    for name in measured:
        for found, told in zip(measured[name], quoted[name], strict=True):
            assert number.sub("#", found) == number.sub("#", told), (name, found, told)
            pairs = zip(number.findall(found), number.findall(told), strict=True)
            assert all(float(a) == pytest.approx(float(b), rel=0.05) for a, b in pairs), (name, found, told)


def test_a_function_with_the_name_of_a_neighbour_keeps_its_column(monkeypatch):
    """Called DPO, it is not replaced by DPO's numbers."""

    class Only(dict):  # what is not measured here is not decided
        def __missing__(self, key):
            return {"worlds_without_end": 1, "growth_on_unanimous_pairs": "-"}.get(key)

    monkeypatch.setattr(card_module, "_findings", lambda subject, quick: Only(measures.shape(subject)))
    monkeypatch.setattr(card_module, "_beside", card_module._beside.__wrapped__)

    def DPO(winner, loser, winner_before, loser_before, beta):
        return 3 + logistic(beta * (winner - loser - winner_before + loser_before))

    card = loss_card(DPO)
    (line,) = [line for line in card.text().splitlines() if "loss where policy = reference" in line]
    assert card.name == "your DPO" and line.split()[-4:-1] == ["3.693", "0.6931", "1"]
    assert [*card.curves] == ["your DPO", "DPO", "IPO"]
