"""Who draws the pairs: designs against enumeration, numpy, long runs and simulation; the two commands."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant
from strategies import World, worlds

from dpo_minimal.bandit import random_bandit
from dpo_minimal.certificates import maximum_likelihood
from dpo_minimal.closed_form import kl_divergence, optimal_logps
from dpo_minimal.experiments.frontier import pairs
from dpo_minimal.experiments.frontier.worlds import World as FrontierWorld
from dpo_minimal.experiments.statistics import replicates, samplers
from dpo_minimal.experiments.statistics.command import measured
from dpo_minimal.laws import designs
from dpo_minimal.laws.designs import (
    SAMPLERS,
    as_rankings,
    average_design,
    best_design,
    design_law,
    label_in_rounds,
    sampler_pairs,
)
from dpo_minimal.laws.sampling_laws import kl_law
from dpo_minimal.preferences import all_sets, expected_pairs, reference_pairs, win_counts
from dpo_minimal.validation import InputError

Z = 4.8916  # two-sided normal quantile at a false-alarm rate of 1e-6
WITH_Q = [sampler for sampler in SAMPLERS if sampler != "best"]


# ------------------------------------------------------------------------------------------------ helpers


def small_world(X=2, Y=4, beta=0.5, seed=0) -> World:
    """A world whose every design is well conditioned; the policy is pi*."""
    generator = torch.Generator().manual_seed(seed)
    world = random_bandit(X, Y, generator=generator)
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=beta)
    return World(world.ref_logps, world.rewards, optimal, beta, generator)


def proposal(sampler, policy, ref):
    """q of one prompt, as probabilities, written out; numpy."""
    policy, ref = np.exp(policy.numpy()), np.exp(ref.numpy())
    q = {"uniform": ref**0, "reference": ref, "policy": policy, "mixed": (policy + ref) / 2}
    q["tempered"] = np.sqrt(policy)
    return q[sampler] / q[sampler].sum()


def law_by_numpy(mu, optimal, rewards, beta):
    """tr(Sigma I^+) / (2 beta^2) of one prompt by numpy's pinv, Sigma as the covariance of one-hot draws."""
    p, Y = np.exp(optimal.numpy()), len(rewards)
    sigma = sum(p[y] * np.outer(np.eye(Y)[y] - p, np.eye(Y)[y] - p) for y in range(Y))
    information = np.zeros((Y, Y))
    for (i, j), share in mu.items():
        win = 1 / (1 + math.exp(rewards[j] - rewards[i]))
        edge = np.eye(Y)[i] - np.eye(Y)[j]
        information += share * win * (1 - win) * np.outer(edge, edge)
    return np.trace(sigma @ np.linalg.pinv(information)) / (2 * beta**2)


def shares(slate, prompt):
    """Pair (i, j), i < j -> its share among those of the prompt."""
    mine = slate.prompt == prompt
    weight = slate.weight[mine] / slate.weight[mine].sum()
    return {tuple(pair): share for pair, share in zip(slate.items[mine].tolist(), weight.tolist())}


def law(weights, world):
    """The law of one prompt's design, weights in the order of `all_sets`."""
    pairs = all_sets(world.ref_logps > -math.inf)
    return design_law(pairs._replace(weight=weights), world.logps, world.ref_logps, beta=world.beta)[0]


def random_weights(world, concentration=1.0):
    count = math.comb(world.ref_logps.shape[-1], 2)
    noise = torch.rand(count, generator=world.generator, dtype=torch.float64)
    return (-noise.log()) ** (1 / concentration) / (-noise.log()).pow(1 / concentration).sum()


# ------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("sampler", WITH_Q)
def test_pairs_by_enumerating_the_draws(sampler):
    """All ordered pairs of two draws from q, equal ones thrown away; either order is the same pair."""
    w = small_world(X=2, Y=4)
    slate = sampler_pairs(sampler, w.logps, w.ref_logps, beta=w.beta)
    for x in range(2):
        q, chance = proposal(sampler, w.logps[x], w.ref_logps[x]), {}
        for i, j in itertools.product(range(4), repeat=2):
            if i != j:
                pair = min(i, j), max(i, j)
                chance[pair] = chance.get(pair, 0) + q[i] * q[j] / (1 - sum(q**2))
        mine = slate.prompt == x
        found = dict(zip(map(tuple, slate.items[mine].tolist()), slate.weight[mine].tolist()))
        assert found.keys() == chance.keys()
        for pair in chance:
            assert found[pair] == pytest.approx(chance[pair] / 2, rel=1e-12), pair  # two prompts alike


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_law_of_each_sampler(sampler):
    """By numpy's pinv, and the mean of `kl_law`; a prompt with fewer completions as if it were alone."""
    w = small_world(X=2, Y=4)
    w.ref_logps[1] = torch.cat([w.ref_logps[1, :3].log_softmax(-1), torch.tensor([-math.inf])])
    optimal = optimal_logps(w.ref_logps, w.rewards, beta=w.beta)
    slate = sampler_pairs(sampler, optimal, w.ref_logps, beta=w.beta)
    found = design_law(slate, optimal, w.ref_logps, beta=w.beta)
    by_kl_law = kl_law(
        optimal,
        w.ref_logps.masked_fill(w.ref_logps == -math.inf, -99),
        expected_pairs(w.rewards, slate),
        beta=w.beta,
    )[0]
    for x, Y in ((0, 4), (1, 3)):
        expected = law_by_numpy(shares(slate, x), optimal[x, :Y], w.rewards[x, :Y].tolist(), w.beta)
        assert found[x].item() == pytest.approx(expected, rel=1e-9)  # of short sums, and an inverse
        assert by_kl_law[x].item() == pytest.approx(expected, rel=1e-9)
        alone = sampler_pairs(sampler, optimal[x : x + 1, :Y], w.ref_logps[x : x + 1, :Y], beta=w.beta)
        if sampler != "best":  # whose steps end when all prompts' gaps are small
            one = design_law(alone, optimal[x : x + 1, :Y], w.ref_logps[x : x + 1, :Y], beta=w.beta)
            assert one.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_endless_data_have_one_optimum(sampler):
    """Property 27: the population's estimate is the true reward whoever draws the pairs."""
    w = small_world(X=3, Y=5)
    population = expected_pairs(w.rewards, sampler_pairs(sampler, w.logps, w.ref_logps, beta=w.beta))
    estimate = maximum_likelihood(population, w.ref_logps > -math.inf)
    best = optimal_logps(w.ref_logps, estimate, beta=w.beta)
    assert (best - w.logps).abs().max() <= 1e-7  # where Newton's method ends, over beta


def test_what_float64_cannot_tell_is_said():
    """A policy so sure that its pairs hardly ever show some completions: NaN, not a number from noise."""
    w = small_world(X=2, Y=5, beta=0.5)
    sharp = optimal_logps(w.ref_logps, w.rewards, beta=0.02)
    sure = torch.cat([sharp[:1], w.logps[1:]])
    laws = design_law(sampler_pairs("policy", sure, w.ref_logps, beta=0.5), w.logps, w.ref_logps, beta=0.5)
    assert laws.isnan().tolist() == [True, False]
    design, gap = best_design(optimal_logps(w.ref_logps, w.rewards, beta=1e-3), w.ref_logps, beta=1e-3)
    assert gap.isinf().any() and design.weight.isfinite().all()


def test_bad_input_is_refused():
    w = small_world()
    with pytest.raises(InputError, match=r"sampler must be one of uniform, .*, best, got 'greedy'"):
        sampler_pairs("greedy", w.logps, w.ref_logps, beta=w.beta)
    for arguments in ((w.logps[:1], w.ref_logps), (w.logps + 1, w.ref_logps)):
        with pytest.raises(InputError):
            best_design(*arguments, beta=w.beta)
    for options in ({"beta": 0.0}, {"beta": 1.0, "tolerance": 0.0}):
        with pytest.raises(InputError):
            best_design(w.logps, w.ref_logps, **options)
    for count, rounds in ((0, 1), (5, 0)):
        with pytest.raises(InputError):
            label_in_rounds(
                "policy", w.logps, w.rewards, w.ref_logps, count, beta=w.beta, rounds=rounds,
                generator=np.random.default_rng(0),
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the best


def test_the_slope_by_finite_differences():
    """-df/dmu_ij by central differences of the law as a function of weights that need not sum to one, and the
    mean of the slope under mu is the law: f is of degree -1."""
    w = small_world(X=1, Y=5)
    weights = random_weights(w)
    pairs = all_sets(w.ref_logps > -math.inf)
    mu = torch.zeros(1, 5, 5, dtype=torch.float64)
    mu[0, pairs.items[:, 0], pairs.items[:, 1]] = weights
    mu = mu + mu.mT
    value, slope = designs._law_and_slope(mu, w.logps, w.ref_logps, w.beta)
    for i, j in pairs.items.tolist():
        step = torch.zeros_like(mu)
        step[0, i, j] = step[0, j, i] = 1e-6
        up, down = (designs._law_and_slope(mu + s * step, w.logps, w.ref_logps, w.beta)[0] for s in (1, -1))
        # truncation is some 1e-12 of it, rounding 1e-16 * law / 1e-6
        assert slope[0, i, j].item() == pytest.approx((down - up).item() / 2e-6, rel=1e-6)
    assert (mu * slope).sum() / 2 == pytest.approx(value.item(), rel=1e-12)


@given(worlds(prompts=st.just(1), scale=1.0))
def test_the_law_is_convex(world):
    """f(mu t + nu (1 - t)) <= t f(mu) + (1 - t) f(nu) for two random designs."""
    one, other = random_weights(world), random_weights(world, 0.5)
    t = torch.rand((), generator=world.generator, dtype=torch.float64)
    ends = t * law(one, world) + (1 - t) * law(other, world)
    if not ends.isnan():
        assert law(t * one + (1 - t) * other, world) <= ends * (1 + 1e-9)  # slack: rounding


@pytest.mark.parametrize(("Y", "beta"), [(3, 0.2), (5, 0.5), (8, 0.3), (8, 2.0)])
def test_nothing_beats_the_best_by_more_than_its_certificate(Y, beta):
    """Not random designs, the samplers, small changes, a hundredth moved to one pair; and the certified gap
    at each tolerance is at least the true one, measured by a run to 1e-5."""
    w = small_world(X=1, Y=Y, beta=beta, seed=Y)
    design, gap = best_design(w.logps, w.ref_logps, beta=beta)
    best = law(design.weight, w)
    least = best * (1 - gap.item())
    assert 0 <= gap.item() <= 0.01
    tried = [random_weights(w, c) for c in (0.3, 1.0, 3.0) for _ in range(20)]
    tried += [sampler_pairs(s, w.logps, w.ref_logps, beta=beta).weight for s in WITH_Q]
    tried += [design.weight * (1 + 0.1 * random_weights(w)) for _ in range(20)]
    tried += [
        0.99 * design.weight + 0.01 * torch.eye(len(design.weight)).double()[k]
        for k in range(len(design.weight))
    ]
    for weights in tried:
        assert law(weights / weights.sum(), w) >= least * (1 - 1e-12)
    close, rest = best_design(w.logps, w.ref_logps, beta=beta, tolerance=1e-5)
    truth = law(close.weight, w)
    assert rest.item() <= 1e-5
    for tolerance in (0.3, 0.1, 0.01):
        rough, certified = best_design(w.logps, w.ref_logps, beta=beta, tolerance=tolerance)
        found = law(rough.weight, w)
        excess = (1 - truth / found).item()
        assert -1e-5 <= excess <= certified.item() + 1e-12 and certified.item() <= tolerance


def test_the_best_by_hand():
    """Three completions, two of which are equal in everything; as r/beta is tiny, sigma (1 - sigma) = 1/4. By
    symmetry mu = (a, b, b), and the law of that one number is minimised on a grid."""
    ref = torch.tensor([[0.2, 0.2, 0.6]]).double().log()
    design, _ = best_design(ref, ref, beta=1.0, tolerance=1e-5)
    grid = [{(0, 1): a, (0, 2): (1 - a) / 2, (1, 2): (1 - a) / 2} for a in np.linspace(0, 0.9, 901)]
    laws = [law_by_numpy(mu, ref[0], [0.0] * 3, 1.0) for mu in grid]
    found = shares(design, 0)
    assert found[0, 2] == pytest.approx(found[1, 2], rel=1e-9)
    assert found[0, 1] == pytest.approx(
        grid[int(np.argmin(laws))][0, 1], abs=5e-3
    )  # a flat minimum: 1e-5 of it
    assert law_by_numpy(found, ref[0], [0.0] * 3, 1.0) == pytest.approx(min(laws), rel=2e-5)


# ------------------------------------------------------------------------------------------------ rounds


@pytest.mark.parametrize(
    ("sampler", "rounds"), [("reference", 1), ("mixed", 1), ("best", 1), ("policy", 4), ("tempered", 2)]
)
def test_simulated_gaps_follow_the_law(sampler, rounds):
    """N KL of 4000 data sets of 3000 pairs: the law of the average design, within Monte-Carlo error at 1e-6
    and the second-order bias that `kl_law` names."""
    w, count, num_pairs = small_world(X=1, Y=3, beta=0.7, seed=1), 4000, 3000
    start = w.logps if rounds == 1 else w.ref_logps
    slate = average_design(sampler, start, w.logps, w.ref_logps, beta=w.beta, rounds=rounds)
    expected = design_law(slate, w.logps, w.ref_logps, beta=w.beta).item()
    tables = (each.expand(count, -1) for each in (start, w.rewards, w.ref_logps))
    wins = label_in_rounds(
        sampler, *tables, num_pairs, beta=w.beta, rounds=rounds, generator=np.random.default_rng(0)
    )
    assert (wins.sum((1, 2)) == num_pairs).all() and (wins == wins.round()).all()
    estimate = maximum_likelihood(as_rankings(wins), torch.ones(count, 3, dtype=torch.bool))
    fitted = optimal_logps(w.ref_logps.expand(count, -1), estimate, beta=w.beta)
    gaps = num_pairs * kl_divergence(fitted, w.logps.expand(count, -1))
    resistance = replicates.largest_resistance(
        replicates.curvature(w.rewards, expected_pairs(w.rewards, slate))
    ).item()
    slack = (1 + 1 / w.beta**2) * resistance / num_pairs
    assert slack <= 0.05  # so that the laws of the samplers are told apart
    assert abs(gaps.mean().item() - expected) <= Z * gaps.std().item() / math.sqrt(count) + slack * expected


def test_rounds_draw_for_the_policy_that_the_labels_train():
    """With very many labels, the second round's pairs are those of pi*, the first's those of `start`, and all
    are labelled by Bradley-Terry. Counts within Z deviations."""
    w, num_pairs = small_world(X=2, Y=3, beta=0.5), 10**9
    starts = (w.ref_logps, 1), (w.logps, 1), (w.ref_logps, 2)
    one, known, two = (
        label_in_rounds(
            "policy", start, w.rewards, w.ref_logps, num_pairs, beta=w.beta, rounds=rounds,
            generator=np.random.default_rng(3),
        )
        for start, rounds in starts
    )  # fmt: skip
    first, later = (sampler_pairs("policy", p, w.ref_logps, beta=w.beta) for p in (w.ref_logps, w.logps))
    average = later._replace(weight=(first.weight + later.weight) / 2)
    assert torch.equal(
        average.weight,
        average_design("policy", w.ref_logps, w.logps, w.ref_logps, beta=w.beta, rounds=2).weight,
    )
    for wins, slate in ((one, first), (known, later), (two, average)):
        chance = 2 * win_counts(expected_pairs(w.rewards, slate), 2, 3)  # 2 prompts
        deviation = (num_pairs * chance).sqrt()
        # and what the first round's estimate is off by: some 1e-4 of the policy
        assert (
            (wins - num_pairs * chance).abs() <= Z * deviation + (2e-4 if wins is two else 0) * num_pairs
        ).all()
    assert (one - two).abs().max() > 0.01 * num_pairs


def test_rounds_remember_every_label(monkeypatch):
    """Each round adds its share, 7 labels in 3 rounds as 2, 2, 3; each estimate sees all so far, and half a
    win of each of three completions."""
    w, seen = small_world(X=2, Y=3), []

    def noting(rankings, exists):
        seen.append(win_counts(rankings, *exists.shape).sum((1, 2)))
        return maximum_likelihood(rankings, exists)

    monkeypatch.setattr(designs, "maximum_likelihood", noting)
    generator = np.random.default_rng(0)
    wins = label_in_rounds(
        "policy", w.ref_logps, w.rewards, w.ref_logps, 7, beta=1.0, rounds=3, generator=generator
    )
    assert (wins.sum((1, 2)) == 7).all()
    assert [total.tolist() for total in seen] == [
        [3.5, 3.5],
        [5.5, 5.5],
    ]


def test_a_new_reference_each_round_uses_labels_no_better():
    """Two rounds that take the last policy for the reference end at one at beta / 2 for the mean of the two
    estimates, exactly; with half the labels each, its error is never below that of all labels together."""
    w = small_world(X=1, Y=4, beta=0.8)
    exists, generator = torch.ones(1, 4, dtype=torch.bool), np.random.default_rng(0)
    options = {"beta": w.beta, "rounds": 1, "generator": generator}
    wins = label_in_rounds("mixed", w.ref_logps, w.rewards, w.ref_logps, 2000, **options)
    first = maximum_likelihood(as_rankings(wins), exists)
    policy = optimal_logps(w.ref_logps, first, beta=w.beta)
    wins = label_in_rounds("mixed", policy, w.rewards, w.ref_logps, 2000, **options)
    second = maximum_likelihood(as_rankings(wins), exists)
    twice = optimal_logps(policy, second, beta=w.beta)
    at_once = optimal_logps(w.ref_logps, (first + second) / 2, beta=w.beta / 2)
    torch.testing.assert_close(twice, at_once, rtol=0, atol=1e-12)
    slates = [sampler_pairs("mixed", start, w.ref_logps, beta=w.beta) for start in (w.ref_logps, policy)]
    inverses = [
        replicates.curvature(w.rewards, expected_pairs(w.rewards, slate)).inverse[0] for slate in slates
    ]
    together = slates[0]._replace(weight=(slates[0].weight + slates[1].weight) / 2)
    pooled = replicates.curvature(w.rewards, expected_pairs(w.rewards, together)).inverse[0]
    assert torch.linalg.eigvalsh((inverses[0] + inverses[1]) / 2 - pooled).min() >= -1e-10  # slack: rounding


# ------------------------------------------------------------------------------------------------ commands


def test_the_command_compares_samplers():
    """Law and simulation of each row within its error; the printed cells are those of the records."""
    settings = replicates.Settings(3, 0.7, (100, 3000), 3000, seed=1)
    truth = replicates.make_truth(settings)
    rows = samplers.compare(truth, settings)
    assert [row["sampler"] for row in rows] == [*SAMPLERS, "policy, 4 rounds", "tempered, 4 rounds"]
    for row in rows:
        assert not row["outside"] and row["missing"] == 0
        slate = sampler_pairs(row["sampler"].split(",")[0], truth.optimal, truth.world.ref_logps, beta=0.7)
        if "rounds" not in row["sampler"]:
            assert row["law"] == pytest.approx(
                design_law(slate, truth.optimal, truth.world.ref_logps, beta=0.7).item()
            )
            r = truth.world.rewards[0].tolist()
            p = {pair: 1 / (1 + math.exp(r[pair[1]] - r[pair[0]])) for pair in shares(slate, 0)}
            mean = sum(share * 4 * p[pair] * (1 - p[pair]) for pair, share in shares(slate, 0).items())
            assert row["undecided"] == pytest.approx(mean, rel=1e-9)
    lines = samplers.samplers_table(rows, 3000, measured)
    assert "N = 3000" in lines[0]
    reference = rows[1]["law"]
    for row, line in zip(rows, lines[2:]):
        assert line.startswith(f"  {row['sampler']:<18} ")
        assert float(line[20:].split()[0]) == pytest.approx(row["law"], rel=5.1e-4)
        assert float(line[20:].split()[1]) == pytest.approx(row["law"] / reference, abs=0.0051)
        assert line.endswith(f"({measured(row['kl'], row['kl/error'])})") != row["judged"]
        assert measured(row["kl"], row["kl/error"]) in line
    outside = rows[0] | {"outside": True}
    assert " !" in samplers.samplers_table([outside, rows[1]], 3000, measured)[2]


def test_frontier_asks_who_draws_the_pairs(monkeypatch):
    """Every sampler at every size, with as many data sets; with a million labels and little training left to
    do, each gap is near its law; the table shows the medians, means and laws."""
    generator = torch.Generator().manual_seed(1)
    bandit = random_bandit(2, 3, generator=generator)
    world = FrontierWorld("table", bandit.ref_logps, bandit.rewards, torch.ones(2, 3), 1.0, lambda: None)
    args = argparse.Namespace(beta=0.7, quick=False, seed=0)
    monkeypatch.setattr(pairs, "SAMPLER_SIZES", (100_000,))
    monkeypatch.setattr(pairs, "REPLICATES", 24)
    monkeypatch.setattr(pairs, "STEPS", 100)
    monkeypatch.setattr(pairs, "HELD_OUT", 0.0)  # so that all labels are learnt from, to the end
    points = [point for job in pairs.sampler_plan(world, args) for point in job()]
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=0.7)
    assert len(points) == 8 * 24 == 8 * len({p.gap for p in points if p.method == "DPO, mixed"})
    lines = pairs.sampler_summary(points, world, 0.7)
    for (name, (sampler, start, rounds)), line in zip(
        samplers.starts(optimal, world.ref_logps).items(), lines[2:]
    ):
        slate = average_design(sampler, start, optimal, world.ref_logps, beta=0.7, rounds=rounds)
        expected = design_law(slate, optimal, world.ref_logps, beta=0.7).sum().item() / 100_000
        gaps = [p.gap for p in points if p.method == f"DPO, {name}" and p.pairs == 100_000]
        assert abs(np.mean(gaps) - expected) <= Z * np.std(gaps) / math.sqrt(24) + 0.02 * expected
        assert line.startswith(f"  {name:<18} ") and line.endswith(f" {expected:.2g}")
        assert f"{np.median(gaps):.2g} ({np.mean(gaps):.2g})" in line


# ------------------------------------------------------------------------------------------------ mutants


def slope_guard():
    test_the_slope_by_finite_differences()


def best_guard():
    test_nothing_beats_the_best_by_more_than_its_certificate(5, 0.5)


def pairs_guard():
    for sampler in WITH_Q:
        test_pairs_by_enumerating_the_draws(sampler)


def law_guard():
    test_the_law_of_each_sampler("mixed")


def rounds_guard():
    test_rounds_draw_for_the_policy_that_the_labels_train()


MUTANTS = [
    (
        reference_pairs,
        "len(ref_logps) * total[pairs.prompt]",
        "len(ref_logps)",
        pairs_guard,
    ),  # no second draw
    (designs.sampler_pairs, "policy / 2", "policy * 2", pairs_guard),
    (designs.sampler_pairs, "torch.logaddexp(policy, ref_logps)", "(policy + ref_logps) / 2", pairs_guard),
    (designs.sampler_pairs, '"policy": policy', '"policy": ref_logps', pairs_guard),
    (designs._table, "2 * (mu + mu.mT)", "(mu + mu.mT)", law_guard),  # of unordered pairs
    (designs._law_and_slope, "p = optimal.exp()", "p = ref_logps.exp()", law_guard),  # the reference's Sigma
    (designs._law_and_slope, "(2 * beta**2)", "(2 * beta)", law_guard),
    (designs._law_and_slope, "- 2 * moved", "+ 2 * moved", slope_guard),
    (designs._law_and_slope, "doubt * (own", "(own", slope_guard),
    (
        designs.best_design,
        "mu * slope.sqrt()",
        "mu / slope.sqrt().clamp(min=1e-9)",
        test_the_best_by_hand,
    ),  # the sign
    (designs.best_design, "slope.amax((-2, -1))", "slope.mean((-2, -1))", best_guard),
    (designs.average_design, "first.weight / rounds", "first.weight", rounds_guard),
    (designs.label_in_rounds, "if k > 0:", "if k > 1:", rounds_guard),
    (designs.label_in_rounds, "policy, wins = start,", "policy, wins = ref_logps + 0 * start,", rounds_guard),
    (designs.label_in_rounds, "wins += torch", "wins = torch", rounds_guard),
    (designs.label_in_rounds, "expected_pairs(rewards", "expected_pairs(-rewards", rounds_guard),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0].__name__}: {mutant[2]}")
def test_planted_bug_is_caught(monkeypatch, mutant):
    """Each mistake, one at a time, makes its guard fail; without it the guard passes (above)."""
    function, right, wrong, guard = mutant
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
