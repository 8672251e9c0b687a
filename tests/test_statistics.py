"""The laws of finite data: theory against enumeration, simulation against theory, and the run that shows it.

Formulas are recomputed here with numpy or autograd from their definitions. Statistical tolerances are stated
beside each assertion; false alarms are at 1e-6.
"""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import pytest
import torch
from planting import CAUGHT, plant
from strategies import normal

from dpo_minimal.__main__ import _parser, main
from dpo_minimal.bandit import dpo_objective
from dpo_minimal.bench import figures
from dpo_minimal.closed_form import optimal_logps
from dpo_minimal.experiments.statistics import command as statistics
from dpo_minimal.experiments.statistics import figure as plots
from dpo_minimal.experiments.statistics import replicates
from dpo_minimal.experiments.statistics.replicates import Settings, draw, make_truth, measure, simulate
from dpo_minimal.laws import sampling_laws
from dpo_minimal.laws.sampling_laws import (
    chi_square_quantile,
    cramer_rao,
    kl_law,
    no_estimate_bound,
    score_gradients,
    score_moments,
)
from dpo_minimal.preferences import all_sets, expected_pairs, sample_pairs, win_counts

Z = 4.8916  # two-sided normal quantile at a false-alarm rate of 1e-6; checked in test_finite_data.py
# Chi-square quantiles of three degrees of freedom, from printed tables
QUANTILES = {90: 6.251389, 95: 7.814728, 99: 11.344867}


# ------------------------------------------------------------------------------------------------ helpers


def population_of(rewards):
    """All pairs of a (1, K) table of rewards, equally likely, with the exact probability of each outcome."""
    return expected_pairs(rewards, all_sets(torch.ones_like(rewards, dtype=torch.bool)))


def centred_normal(K, seed, scale=1.0):
    rewards = normal(1, K, generator=torch.Generator().manual_seed(seed), scale=scale)
    return rewards - rewards.mean()


def numpy_information(rewards):
    """sum over pairs of m p (1 - p) (e_i - e_j)(e_i - e_j)', each pair shown equally often."""
    K = len(rewards)
    information = np.zeros((K, K))
    for i, j in itertools.combinations(range(K), 2):
        p = 1 / (1 + math.exp(rewards[j] - rewards[i]))
        e = np.eye(K)[i] - np.eye(K)[j]
        information += p * (1 - p) * np.outer(e, e) / math.comb(K, 2)
    return information


def numpy_gradient(rewards, winner, loser):
    """Gradient of -log sigmoid(r_winner - r_loser)."""
    chance = 1 / (1 + math.exp(rewards[winner] - rewards[loser]))
    return chance * (np.eye(len(rewards))[loser] - np.eye(len(rewards))[winner])


def groups(K):
    """All groups of completions but none and all."""
    return [group for size in range(1, K) for group in itertools.combinations(range(K), size)]


def never_lost(group, comparisons):
    return not any(winner not in group and loser in group for winner, loser in comparisons)


def data_sets(population, N):
    """Every sequence of N comparisons: (its probability, [(winner, loser), ...], counts of the outcomes)."""
    order, weight = population.order.tolist(), population.weight.tolist()
    for outcomes in itertools.product(range(len(order)), repeat=N):
        chance = math.prod(weight[e] for e in outcomes)
        yield chance, [order[e] for e in outcomes], np.bincount(outcomes, minlength=len(order))


# ------------------------------------------------------------------------- theory against enumeration


@pytest.mark.parametrize(("K", "N"), [(2, 1), (2, 6), (3, 1), (3, 2), (3, 3)])
def test_the_score_statistics_moments_over_all_data_sets(K, N):
    """Property 82: mean and variance of N g' I^+ g at the truth, added up over every possible data set."""
    rewards = centred_normal(K, seed=K)
    population = population_of(rewards)
    r = rewards[0].numpy()
    inverse = np.linalg.pinv(numpy_information(r))
    moments = np.zeros(3)
    for chance, comparisons, _ in data_sets(population, N):
        g = sum(numpy_gradient(r, *pair) for pair in comparisons) / N
        q = N * g @ inverse @ g
        moments += chance * np.array([1, q, q * q])
    total, mean, square = moments
    # sums of at most 216 terms of size one, and a pseudo-inverse of condition number below ten
    assert total == pytest.approx(1, abs=1e-12)
    assert score_moments(rewards, population, N) == pytest.approx((mean, square - mean**2), abs=1e-11)
    assert mean == pytest.approx(K - 1, abs=1e-12)


@pytest.mark.parametrize(("K", "beta"), [(2, 0.05), (3, 0.5), (4, 5.0), (6, 1.0)])
def test_the_kl_law_is_the_curvature_of_the_kl(K, beta):
    """[D11.5] The eigenvalues are those of I^{+/2} C I^{+/2}, C the second derivative of either KL in the
    rewards and I that of the population loss, both by automatic differentiation; the mean is half their
    sum."""
    rewards, ref = centred_normal(K, seed=10 + K), centred_normal(K, seed=20 + K).log_softmax(-1)
    population, optimal = population_of(rewards), optimal_logps(ref, rewards, beta=beta)

    def loss(change):
        return dpo_objective(optimal + change / beta, ref, population, beta=beta)[0]

    zero = torch.zeros(1, K, dtype=torch.float64)
    information = torch.autograd.functional.hessian(loss, zero).view(K, K)
    values, vectors = np.linalg.eigh(information.numpy())
    root = vectors[:, 1:] / np.sqrt(values[1:])  # I^+ = root root'
    mean, eigenvalues = kl_law(optimal, ref, population, beta=beta)
    for forward in (True, False):

        def divergence(change, forward=forward):
            moved = (ref + (rewards + change) / beta).log_softmax(-1)
            p, q = (moved, optimal) if forward else (optimal, moved)
            return (p.exp() * (p - q)).sum()

        second = torch.autograd.functional.hessian(divergence, zero).view(K, K).numpy()
        expected = np.linalg.eigvalsh(root.T @ second @ root)
        # relative to the largest: condition numbers below a thousand
        tolerance = 1e-10 * expected.max() + 1e-14 / beta**2
        np.testing.assert_allclose(eigenvalues[0, 1:].numpy(), expected, rtol=0, atol=tolerance)
        assert mean.item() == pytest.approx(expected.sum() / 2, abs=K * tolerance)


@pytest.mark.parametrize(("K", "N"), [(2, 1), (2, 5), (3, 2), (3, 4)])
def test_the_union_bound_over_all_data_sets(K, N):
    """[D11.1] The bound is the sum over groups of the chance that the group never lost, which exceeds the
    chance that any did by the overlaps; none overlap for two completions."""
    population = population_of(centred_normal(K, seed=5))
    union, added = 0.0, 0.0
    for chance, comparisons, _ in data_sets(population, N):
        faults = sum(never_lost(group, comparisons) for group in groups(K))
        union += chance * (faults > 0)
        added += chance * faults
    bound = no_estimate_bound(win_counts(population, 1, K)[0], N)
    assert bound == pytest.approx(added, rel=1e-12)  # sums of at most 1296 terms
    if K == 2:
        assert bound == pytest.approx(union, rel=1e-12)
    else:
        assert bound > union * (1 + 1e-6)


def test_the_union_bound_of_a_sure_winner():
    """Who always wins never loses: no estimate, with certainty, also where the chances sum to a little more
    than one, as rounded ones do."""
    for chance in (1.0, 1 + 5e-7):
        assert no_estimate_bound(torch.tensor([[0.0, chance], [0.0, 0.0]]).double(), 7) == 1


def test_the_cramer_rao_bound_by_hand():
    """[D11.3] With two completions, N independent answers leave the gap, twice either reward, a variance of
    1 / (N p (1 - p)); with more, I is the covariance of the gradients of single comparisons."""
    gap, N = 0.8, 50
    p = 1 / (1 + math.exp(-gap))
    rewards = torch.tensor([[gap / 2, -gap / 2]], dtype=torch.float64)
    expected = 2 * (1 / (N * p * (1 - p))) / 4
    assert cramer_rao(rewards, population_of(rewards), N).item() == pytest.approx(expected, rel=1e-13)
    rewards = centred_normal(4, seed=3)
    population = population_of(rewards)
    gradients = np.array([numpy_gradient(rewards[0].numpy(), *pair) for pair in population.order.tolist()])
    # closed forms of a dozen operations, all three
    np.testing.assert_allclose(score_gradients(rewards, population).numpy(), gradients, rtol=0, atol=1e-14)
    covariance = gradients.T @ (population.weight.numpy()[:, None] * gradients)
    expected = np.trace(np.linalg.pinv(covariance)) / 7
    assert cramer_rao(rewards, population, 7).item() == pytest.approx(expected, rel=1e-11)


# ---------------------------------------------------------------------------- simulation against theory


def test_data_sets_are_drawn_as_sample_pairs_draws_them():
    """The multinomial counts of `draw` and those of comparisons drawn one by one by `sample_pairs` follow one
    law, that of the enumerated data sets: Pearson's chi-square over all 21 sets of two comparisons."""
    K, N = 3, 2
    population = population_of(centred_normal(K, 1, 0.3))
    truth = make_truth(Settings(K, 1.0, (N,), 1, seed=0))._replace(population=population)
    chances = {}
    for chance, _, counts in data_sets(truth.population, N):
        chances[tuple(counts)] = chances.get(tuple(counts), 0) + chance
    assert len(chances) == 21
    rewards = centred_normal(K, 1, 0.3)
    outcomes = [tuple(pair) for pair in truth.population.order.tolist()]
    slate, generator = all_sets(torch.ones(1, K, dtype=torch.bool)), torch.Generator().manual_seed(2)

    def one_by_one():
        data = sample_pairs(rewards, N, slate=slate, generator=generator)
        counts = dict(zip((tuple(pair) for pair in data.order.tolist()), data.weight.tolist()))
        return tuple(int(counts.get(outcome, 0)) for outcome in outcomes)

    at_once = draw(truth, N, 50_000, np.random.default_rng(3))
    assert (at_once.sum(-1) == N).all()
    for drawn in (list(map(tuple, at_once.tolist())), [one_by_one() for _ in range(3000)]):
        found = {counts: drawn.count(counts) for counts in chances}
        assert sum(found.values()) == len(drawn)
        expected = {counts: len(drawn) * chance for counts, chance in chances.items()}
        assert min(expected.values()) > 30  # so that the statistic is nearly chi-square
        pearson = sum((found[counts] - expected[counts]) ** 2 / expected[counts] for counts in chances)
        assert pearson <= chi_square_quantile(1 - 1e-6, 20)  # false alarm 1e-6


def slow_statistics(truth, counts):
    """All that `measure` returns, for one data set, with numpy and Zermelo's iteration."""
    r, ref = truth.world.rewards[0].numpy(), truth.world.ref_logps[0].numpy()
    order, weight = truth.population.order.tolist(), truth.population.weight.numpy()
    K, N = len(r), counts.sum()
    wins = np.zeros((K, K))
    for (winner, loser), count in zip(order, counts):
        wins[winner, loser] += count
    games = wins + wins.T
    strength = np.ones(K)
    change = 1.0
    while change > 1e-14:  # linear convergence at a rate of some 0.99 leaves a hundred times that
        before, strength = strength, wins.sum(1) / (games / (strength[:, None] + strength[None])).sum(1)
        strength /= np.exp(np.log(strength).mean())
        change = np.abs(np.log(strength / before)).max()
    s = np.log(strength)

    def policy(rewards):
        tilted = np.exp(ref + rewards / truth.beta)
        return tilted / tilted.sum()

    def losses(rewards):
        return np.array([math.log1p(math.exp(rewards[j] - rewards[i])) for i, j in order])

    observed = np.zeros((K, K))  # N times the information at the estimate, of the pairs that were shown
    for i, j in itertools.combinations(range(K), 2):
        e, p = np.eye(K)[i] - np.eye(K)[j], strength[i] / (strength[i] + strength[j])
        observed += games[i, j] * p * (1 - p) * np.outer(e, e)
    p, q = policy(s), policy(r)
    g = sum(count * numpy_gradient(r, *pair) for pair, count in zip(order, counts)) / N
    return {
        "score": N * g @ np.linalg.pinv(numpy_information(r)) @ g,
        "kl": N * (p * np.log(p / q)).sum(),
        "reverse_kl": N * (q * np.log(q / p)).sum(),
        "excess_risk": N * weight @ (losses(s) - losses(r)),
        "squared_error": N * ((s - r) ** 2).sum(),
        "wald": (s - r) @ observed @ (s - r),
        "likelihood_ratio": 2 * counts @ (losses(r) - losses(s)),
    }


def test_each_statistic_by_a_slow_second_implementation():
    """What is measured of single data sets is what it is called: fails if an N, a factor two, a beta or a
    direction of a KL is wrong, or if the Wald region uses another information than that at the estimate.
    Where Ford's condition fails all but the score is NaN."""
    truth = make_truth(Settings(4, 0.7, (20,), 1, seed=3))
    counts = draw(truth, 20, 40, np.random.default_rng(4))
    found = measure(truth, counts)
    lacking = 0
    for row, count in enumerate(counts.numpy()):
        shown = [pair for pair, times in zip(truth.population.order.tolist(), count) if times]
        if any(never_lost(group, shown) for group in groups(4)):
            lacking += 1
            assert all(math.isnan(found[key][row]) for key in replicates.KEYS)
            assert math.isfinite(found["score"][row])
            continue
        for key, value in slow_statistics(truth, count).items():
            # the error of Zermelo's iteration, above, times N and slopes of size ten
            assert found[key][row].item() == pytest.approx(value, rel=1e-9, abs=1e-9), key
    assert 3 <= lacking <= 30  # both cases were met
    assert set(found) == {"score", *replicates.KEYS}


def simulated(few=True, many=True):
    """20000 data sets of 20 comparisons, and as many of 250 rho^2, among four completions."""
    settings = Settings(4, 0.7, (), 20_000, seed=2)
    truth = make_truth(settings)
    return (
        truth,
        simulate(truth, 20, settings) if few else None,
        simulate(truth, int(250 * truth.resistance), settings) if many else None,
    )


@pytest.fixture(scope="module")
def simulation():
    """Once for several tests."""
    return simulated()


def test_the_limits_hold_for_many_pairs(simulation):
    """[D11.3, D11.5] Mean and variance of N KL, the squared error, both regions' coverage and both risks at
    N = 250 rho^2: within the sampling error at a false-alarm rate of 1e-6 plus the second-order slack."""
    truth, _, size = simulation
    d, R, slack = 3, len(size.sample["kl"]), 1 / 250
    assert size.missing == 0
    r, optimal = truth.world.rewards[0].numpy(), truth.optimal[0].exp().numpy()
    inverse = np.linalg.pinv(numpy_information(r))
    sigma = np.diag(optimal) - np.outer(optimal, optimal)
    kl_matrix = sigma @ inverse / truth.beta**2
    for key, matrix, relative in (
        ("kl", kl_matrix / 2, 1 + 1 / 0.7**2),
        ("reverse_kl", kl_matrix / 2, 1 + 1 / 0.7**2),
        ("squared_error", inverse, 2),
        ("excess_risk", (np.eye(4) - 1 / 4) / 2, 2),
        ("likelihood_ratio", np.eye(4) - 1 / 4, 0.2),
        ("wald", np.eye(4) - 1 / 4, 2),
    ):
        # each is a quadratic form x' A x of normal x with covariance B: mean tr(AB), variance 2 tr(AB AB)
        mean, variance = np.trace(matrix), 2 * np.trace(matrix @ matrix)
        values = size.sample[key].numpy()
        tolerance = Z * math.sqrt(variance / R) + relative * slack * mean
        assert tolerance < 0.06 * mean, key  # a forgotten factor of two is far outside
        assert abs(values.mean() - mean) <= tolerance, key
        squares = (values - mean) ** 2  # the variance's sampling error is taken from the sample
        assert abs(squares.mean() - variance) <= Z * squares.std() / math.sqrt(R) + 4 * slack * variance, key
    for key, level in itertools.product(("wald", "likelihood_ratio"), QUANTILES):
        share = (size.sample[key].numpy() <= QUANTILES[level]).mean()
        error = math.sqrt(level / 100 * (1 - level / 100) / R)
        assert abs(share - level / 100) <= Z * error + 0.2 * slack, (key, level)
    # what the run reports is this: same numbers, same predictions, nothing outside
    assert all(law.judged and not law.outside for law in size.laws)
    reported = {law.key: law for law in size.laws}
    assert reported["kl"].theory == pytest.approx(np.trace(kl_matrix) / 2, rel=1e-10)  # a short trace
    assert reported["excess_risk"].theory == d / 2 and reported["excess_fit"].theory == -d / 2
    mean = size.sample["squared_error"].mean().item() / np.trace(inverse)
    assert reported["efficiency"].measured == pytest.approx(mean, rel=1e-10)


def test_few_pairs_the_exact_laws_and_who_has_no_estimate(simulation):
    """Property 82 and [D11.1] at N = 20, where a quarter of the data sets have no estimate: the score
    statistic's moments over all of them, the share without an estimate below its bound and above Bonferroni's
    lower one."""
    truth, size, _ = simulation
    R = len(size.sample["score"])
    score = size.sample["score"].numpy()
    assert np.isfinite(score).all()
    mean, variance = score_moments(truth.world.rewards, truth.population, 20)
    assert mean == 3
    # false alarm 1e-6 each; the variance's own sampling error is taken from the sample
    assert abs(score.mean() - 3) <= Z * math.sqrt(variance / R)
    squares = (score - 3) ** 2
    assert abs(squares.mean() - variance) <= Z * squares.std() / math.sqrt(R)
    # those with an estimate alone would be off: leaving the others out of the score is noticed
    kept = score[~np.isnan(size.sample["kl"].numpy())]
    assert abs(kept.mean() - 3) > Z * math.sqrt(variance / R)

    order, weight = truth.population.order.tolist(), truth.population.weight.tolist()

    def chance(*never):  # that none of these groups ever lost
        allowed = (all(never_lost(group, [pair]) for group in never) for pair in order)
        return sum(w for w, fine in zip(weight, allowed) if fine) ** 20

    upper = sum(chance(group) for group in groups(4))
    lower = upper - sum(chance(*two) for two in itertools.combinations(groups(4), 2))
    assert size.bound == pytest.approx(upper, rel=1e-10)  # a short sum
    assert size.missing == np.isnan(size.sample["kl"].numpy()).sum() and not size.too_many_missing
    error = Z * math.sqrt(upper * (1 - upper) / R)  # binomial, false alarm 1e-6
    assert lower - error <= size.missing / R <= upper + error
    assert 0.05 < lower < upper < 0.5
    # nothing that is only a limit, or has heavy tails, is judged here
    assert {law.key for law in size.laws if law.judged} == {"score/mean"}


def test_in_two_completions_coverage_may_jump():
    """With two completions the wins are a single count, so coverage misses its level by up to the chance of
    one count at each end; the slack must cover that, exactly summed, where it is judged, beyond 100 rho^2."""
    for seed in range(4):
        settings = Settings(2, 1.0, (), 1000, seed)
        truth = make_truth(settings)
        gap = (truth.world.rewards[0, 0] - truth.world.rewards[0, 1]).item()
        p, (winner, _) = 1 / (1 + math.exp(-gap)), truth.population.order[0].tolist()
        assert winner == 0
        for multiple in (8, 101, 130, 400):
            N = math.ceil(multiple * truth.resistance)
            wins = np.arange(1, N)
            counts = torch.from_numpy(np.stack([wins, N - wins], 1))
            table = [math.lgamma(N + 1) - math.lgamma(k + 1) - math.lgamma(N - k + 1) for k in wins.tolist()]
            pmf = np.exp(np.array(table) + wins * math.log(p) + (N - wins) * math.log1p(-p))
            sample, size = measure(truth, counts), simulate(truth, N, settings)
            for law in size.laws:
                key, _, level = law.key.partition("/")
                if key in ("wald", "likelihood_ratio"):
                    limit = chi_square_quantile(int(level) / 100, 1)
                    covered = pmf[sample[key].numpy() <= limit].sum() / pmf.sum()
                    assert law.judged == (multiple > 100)
                    assert multiple == 8 or abs(covered - int(level) / 100) <= law.slack, (seed, N, law.key)
                    assert law.slack <= 0.2 * math.sqrt(1 / multiple)


# ------------------------------------------------------------------------------------------------ the run


OPTIONS = [
    "--completions",
    "4",
    "--beta",
    "0.7",
    "--pairs",
    "25",
    "2500",
    "--replicates",
    "2000",
    "--seed",
    "6",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run that several tests read: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("statistics") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        assert main(["statistics", *OPTIONS, "--output-dir", str(folder)]) == 0
    return folder, "\n".join(lines)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays_of(folder):
    with np.load(Path(folder) / "result.npz", allow_pickle=False) as file:
        return dict(file)


def records_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def recomputed(arrays, column):
    """{key: (measured, standard error, theory)} of one N, from the stored arrays by numpy alone."""
    r, ref, beta, N = arrays["rewards"], arrays["ref_logps"], arrays["beta"], int(arrays["pairs"][column])
    d = len(r) - 1
    optimal = np.exp(ref + r / beta) / np.exp(ref + r / beta).sum()
    information = numpy_information(r)
    inverse = np.linalg.pinv(information)
    kl = np.trace((np.diag(optimal) - np.outer(optimal, optimal)) @ inverse) / (2 * beta**2)
    single = np.array([numpy_gradient(r, *pair) for pair in arrays["order"].tolist()])
    square = arrays["probability"] @ np.einsum("ei,ij,ej->e", single, inverse, single) ** 2
    variance = 2 * d * (1 - 1 / N) + (square - d**2) / N
    sample = {key: arrays[key][column] for key in ("score", *replicates.KEYS)}
    sample = {key: values[~np.isnan(values)] for key, values in sample.items()}

    def mean(values, theory):
        return values.mean(), values.std(ddof=1) / math.sqrt(len(values)), theory

    spread = mean((sample["score"] - d) ** 2 / variance, 1)
    found = {
        "kl": mean(sample["kl"], kl),
        "reverse_kl": mean(sample["reverse_kl"], kl),
        "efficiency": mean(sample["squared_error"] / np.trace(inverse), 1),
        "score/mean": (sample["score"].mean(), math.sqrt(variance / len(sample["score"])), d),
        "score/variance": (spread[0], max(spread[1], math.sqrt((2 + 12 / d) / len(sample["score"]))), 1),
        "excess_risk": mean(sample["excess_risk"], d / 2),
        "excess_fit": mean(-sample["likelihood_ratio"] / 2, -d / 2),
    }
    for key, level in itertools.product(("wald", "likelihood_ratio"), QUANTILES):
        inside, share = sample[key] <= QUANTILES[level], level / 100
        found[f"{key}/{level}"] = inside.mean(), math.sqrt(share * (1 - share) / len(inside)), share
    return found


LABELS = {
    "kl": "N KL(pi_hat || pi*), nats",
    "reverse_kl": "N KL(pi* || pi_hat), nats",
    "efficiency": "squared error / Cramer-Rao bound",
    "wald/95": "95 % Wald region covers",
    "likelihood_ratio/95": "95 % likelihood-ratio region covers",
    "score/mean": "score statistic, mean",
    "score/variance": "score statistic, variance / exact",
    "excess_risk": "N excess loss, nats",
    "excess_fit": "N excess loss on its own data, nats",
}


def test_the_table_can_be_recomputed_with_numpy_alone(run):
    """Every number of the printed table and of metrics.jsonl, measured, standard error and theory, follows
    from result.npz by formulas that share no code with the package."""
    folder, text = run
    arrays, records = arrays_of(folder), records_of(folder)
    assert arrays["pairs"].tolist() == [25, 2500] == [record["pairs"] for record in records]
    lines = {line[:37].strip(): line[37:] for line in text.splitlines() if "  " in line}
    for column, record in enumerate(records):
        found = recomputed(arrays, column)
        for key, numbers in found.items():
            stored = record[key], record[f"{key}/error"], record[f"{key}/theory"]
            # means of 2000 numbers of size ten; six decimals of a quantile are enough to count by
            assert stored == pytest.approx(numbers, rel=1e-9, abs=1e-12), key
        for key, label in LABELS.items():
            theory, *cells = re.split(r"\s{2,}", lines[label].replace("!", " ").strip())
            bracketed = record["without_estimate"] > 0.1 * record["data_sets"] and not key.startswith("score")
            assert cells[column].startswith("(") == bracketed  # a mean over too few of the data sets
            value, error = map(float, cells[column].strip("()").split(" ± "))
            measured, deviation, predicted = found[key]
            assert float(theory) == pytest.approx(predicted, rel=5.1e-4), key  # four digits are printed
            # two digits of the error, and as many decimals of the value
            assert error == pytest.approx(deviation, rel=0.051), key
            assert value == pytest.approx(measured, abs=0.051 * deviation), key
        lacking = np.isnan(arrays["kl"][column])
        assert record["without_estimate"] == lacking.sum() and record["data_sets"] == 2000
        assert all(np.array_equal(np.isnan(arrays[key][column]), lacking) for key in replicates.KEYS)
        assert np.isfinite(arrays["score"][column]).all()
    weight = (
        1
        / (1 + np.exp(arrays["rewards"][arrays["order"][:, 1]] - arrays["rewards"][arrays["order"][:, 0]]))
        / 6
    )
    np.testing.assert_allclose(arrays["probability"], weight, rtol=1e-12)  # a sigmoid and a quotient
    assert 2 * found["kl"][2] == pytest.approx(arrays["kl_eigenvalues"].sum(), rel=1e-10)  # a short trace


def test_data_sets_without_an_estimate_are_reported(run):
    """Nothing silent: their number while running, their share and its bound in the table."""
    folder, text = run
    missing = [record["without_estimate"] for record in records_of(folder)]
    assert missing[0] > 100 and missing[1] == 0
    assert f"N = 25: drawn and estimated, {missing[0]} have no estimate" in text
    assert "N = 2500: drawn and estimated, 0 have no estimate" in text
    (share,) = (line for line in text.splitlines() if line.startswith("share without"))
    (bound,) = (line for line in text.splitlines() if line.startswith("  at most, by the union bound"))
    share, error, below = map(float, re.findall(r"\d[\d.e-]*", share))
    assert share == pytest.approx(missing[0] / 2000, abs=0.051 * error)
    assert below == 0.0015  # none of 2000: below 3 / 2000 with 95 % confidence
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 2000), rel=0.06)  # two digits
    arrays = arrays_of(folder)
    chance = {tuple(pair): w for pair, w in zip(arrays["order"].tolist(), arrays["probability"])}
    expected = [
        sum(sum(w for pair, w in chance.items() if never_lost(group, [pair])) ** N for group in groups(4))
        for N in (25, 2500)
    ]
    printed = list(map(float, bound.split("bound")[1].split()))
    assert printed == pytest.approx([min(b, 1) for b in expected], rel=6e-3)  # three digits are printed
    assert [record["without_estimate/bound"] for record in records_of(folder)] == pytest.approx(expected)


def test_the_run_folder_is_whole(run):
    """Config, records, arrays, and a figure with data in all four panels."""
    folder, text = run
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "result.npz", "samplers.jsonl", "statistics.png",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    asked = {
        "command": "statistics",
        "completions": 4,
        "beta": 0.7,
        "pairs": [25, 2500],
        "replicates": 2000,
        "seed": 6,
    }
    assert config.items() >= asked.items() and config["numpy"] == np.__version__
    pixels = matplotlib.image.imread(folder / "statistics.png")
    assert pixels.shape[0] >= 1200 and pixels.shape[1] >= 1600
    # axes and text are black and grey; each panel must show data in blue, orange or green
    colourful = np.ptp(pixels[..., :3], axis=-1) > 0.4
    for half in (slice(None, 660), slice(660, None)):
        for side in (slice(None, 880), slice(880, None)):
            assert colourful[half, side].sum() > 1000
    assert str(folder) in text


def test_same_seed_same_numbers(elsewhere, capsys, monkeypatch):
    """#80: the same seed gives the same bits, whatever other sizes are asked for and however many data sets
    are held in memory at once; another seed gives another world."""
    first = ["--completions", "3", "--replicates", "1000", "--pairs", "40", "300", "--seed", "1"]
    monkeypatch.setattr(plots, "statistics_figure", lambda *_: None)  # which takes most of the time
    for folder, options, at_once in (
        ("first", first, 10**6),
        ("again", first, 10**6),
        ("pieces", first, 1000),
        ("alone", [*first[:5], "300", *first[7:]], 10**6),
        ("other", [*first[:-1], "2"], 10**6),
    ):
        monkeypatch.setattr(replicates, "CELLS_AT_ONCE", at_once)
        assert main(["statistics", *options, "--output-dir", folder]) == 0
    first, again, pieces, alone, other = map(arrays_of, ("first", "again", "pieces", "alone", "other"))
    for key, array in first.items():
        np.testing.assert_array_equal(array, again[key])
        # the same data sets; products of matrices with fewer rows may round differently
        np.testing.assert_allclose(pieces[key], array, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(alone["kl"][0], first["kl"][1])
    for key in ("rewards", "ref_logps"):
        assert not np.array_equal(first[key], other[key]), key
    settings = Settings(3, 0.5, (), 1000, seed=1)
    truth = make_truth(settings)  # of one and the same world, another seed draws other data
    scores = [simulate(truth, 40, replace(settings, seed=seed)).sample["score"] for seed in (1, 2)]
    np.testing.assert_array_equal(scores[0], first["score"][0])
    assert not torch.equal(*scores)
    for name in ("metrics.jsonl", "samplers.jsonl", "config.json"):  # no time of day, no duration
        texts = [(elsewhere / folder / name).read_text() for folder in ("first", "again")]
        assert texts[0] == texts[1].replace('"again"', '"first"')
    blocks = capsys.readouterr().out.split(" data sets for each number N")
    assert blocks[1].split("Wrote")[0] == blocks[2].split("Wrote")[0]


def test_the_verdict_says_what_lies_outside(simulation):
    """The closing lines are computed: all within, a value beyond 4 standard errors plus slack, more data sets
    without an estimate than the bound allows, a largest N too small to judge, and none with an estimate."""
    truth, few, many = simulation
    lines = statistics.verdict([few, many])
    assert len(lines) == 3 and lines[0].startswith(f"At N = {many.pairs}: ")
    law = {law.key: law for law in many.laws}
    for key in ("efficiency", "kl"):
        assert statistics.measured(law[key].measured, law[key].error) in lines[0]
    assert f"{100 * law['wald/95'].measured:.1f} % (Wald)" in lines[0]
    assert f"{100 * law['likelihood_ratio/95'].measured:.1f} % (likelihood ratio" in lines[0]
    judged = 1 + len(many.laws) + 2  # the score's mean; everything; the share without an estimate, twice
    assert lines[1].startswith(f"All {judged} measurements judged lie within")
    # the slack is said: the largest, relative to the prediction, of what is judged at the largest N
    relative = max(item.slack / abs(item.theory) for item in many.laws)
    assert f"(at most {100 * relative:.2g} % at N = {many.pairs})" in lines[1]
    for left_out in ("the KL", "the other limits", "the score's variance"):
        assert f"{left_out} at N = 20" in lines[2]
    assert len(statistics.verdict([many])) == 2

    def moved(by):  # the efficiency, by so many standard errors beyond its slack
        changed = law["efficiency"]
        changed = changed._replace(measured=1 + changed.slack + by * changed.error)
        return many._replace(laws=[changed if item.key == "efficiency" else item for item in many.laws])

    assert "All" in statistics.verdict([moved(3.9)])[1]
    assert statistics.verdict([few, moved(4.1)])[1] == (
        f"OUTSIDE 4 standard errors plus second-order slack (at most {100 * relative:.2g} % at "
        f"N = {many.pairs}): squared error / Cramer-Rao bound at N = {many.pairs}."
    )
    assert " !" in statistics.results_table(truth, [moved(4.1)])
    assert " !" not in statistics.results_table(truth, [few, many])
    broken = many._replace(missing=3)  # of 20000, where the bound allows next to none
    assert f"share without an estimate at N = {many.pairs}" in statistics.verdict([few, broken])[1]
    nothing = simulate(truth, 2, Settings(4, 0.7, (), 1000, seed=2))
    assert statistics.verdict([nothing])[0] == "At N = 2 fewer than 90 % of the data sets have an estimate."
    assert nothing.missing == 1000 and not nothing.too_many_missing  # the bound exceeds one


def test_numbers_are_printed_to_two_digits_of_their_error():
    """A reader sees at once how much of a number is noise."""
    assert statistics.measured(1.00512, 0.00543) == "1.0051 ± 0.0054"
    assert statistics.measured(-187.123, 12.6) == "-187 ± 13"
    assert statistics.measured(0.0, 0.0) == "0" and statistics.measured(1.0, math.nan) == "-"
    assert statistics.measured(1.646e-37, 5.41e-39) == "1.65e-37 ± 5e-39"


def test_the_default_world_shows_both_ends():
    """At the smallest default N some data sets have no estimate; at the largest N is hundreds of rho^2."""
    settings = statistics._settings(_parser().parse_args(["statistics"]))
    truth = make_truth(settings)
    chances = win_counts(truth.population, 1, settings.completions)[0]
    assert no_estimate_bound(chances, settings.pairs[0]) * settings.replicates > 100
    assert settings.pairs[-1] > 400 * truth.resistance
    # the squared error's standard error, sqrt(2 tr(I^+ I^+) / R) / tr(I^+), stays below 0.7 %
    trace, square = truth.inverse[0].trace(), (truth.inverse[0] ** 2).sum()
    assert (2 * square / settings.replicates).sqrt() / trace < 0.007
    quick = statistics._settings(_parser().parse_args(["statistics", "--quick"]))
    assert quick.replicates == 2000 and quick.pairs == settings.pairs


def test_the_config_tells_how_many_data_sets_quick_means(elsewhere, capsys, monkeypatch):
    """An option left to its default, or set by --quick, must be repeatable from config.json alone."""
    monkeypatch.setattr(plots, "statistics_figure", lambda *_: None)
    assert main(["statistics", "--quick", "--completions", "2", "--pairs", "300"]) == 0
    config = json.loads((elsewhere / "runs/statistics-001/config.json").read_text())
    assert config.items() >= {"replicates": 2000, "quick": True, "beta": 0.5, "seed": 0}.items()
    assert "Who draws" not in capsys.readouterr().out  # of two completions there is one pair


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--replicates", "1"], ["--replicates", "1000", "got 1."]),
        (["--replicates", "1000001"], ["--replicates", "memory"]),
        (["--replicates", "5000", "--quick"], ["--replicates", "--quick"]),
        (["--pairs", "0"], ["--pairs", "got 0."]),
        (["--pairs", "100", "-5"], ["--pairs", "-5"]),
        (["--pairs", "100", "100"], ["--pairs", "100 100"]),
        (["--pairs", "400", "100"], ["--pairs", "400 100"]),
        (["--pairs", *map(str, range(1, 10))], ["--pairs", "one to eight"]),
        (["--pairs", str(10**12)], ["--pairs", str(10**12)]),
        (["--completions", "1"], ["--completions", "got 1."]),
        (["--completions", "17"], ["--completions", "16", "got 17."]),
        (["--beta", "0"], ["--beta", "0.0"]),
        (["--beta", "nan"], ["--beta", "nan"]),
        (["--beta", "1e-3"], ["--beta", "0.001"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", str(2**60)], ["--seed", str(2**60)]),
        (["--output-dir", "used"], ["--output-dir", "used"]),
        (["--output-dir", "used/file"], ["--output-dir", "file"]),
    ],
)
def test_bad_options_are_refused_before_any_work(elsewhere, capsys, monkeypatch, options, named):
    """One sentence that names the option, nothing computed, nothing written."""
    (elsewhere / "used").mkdir()
    (elsewhere / "used/file").write_text("precious")
    monkeypatch.setattr(statistics, "simulate", lambda *_: pytest.fail("computed before checking"))
    before = sorted(elsewhere.rglob("*"))
    assert main(["statistics", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dpo-minimal: error: ") and err.count("\n") == 1, err
    assert err.endswith(".\n") and ". " not in err, err
    assert all(part in err for part in named), err
    assert sorted(elsewhere.rglob("*")) == before


def test_help_explains_every_row(capsys):
    """Who asks for help learns what each quantity is."""
    with pytest.raises(SystemExit):
        main(["statistics", "--help"])
    text = capsys.readouterr().out
    for word in (
        "N KL",
        "squared error",
        "regions",
        "score",
        "excess loss",
        "no estimate",
        "rho^2",
        "--pairs",
    ):
        assert word in text


# ------------------------------------------------------------------------------------------- planted bugs


class Mutant(NamedTuple):
    """A bug: in `function`, `wrong` instead of `right`; `guard` must fail, called with `arguments`."""

    name: str
    function: object
    right: str
    wrong: str
    guard: object
    arguments: tuple = ()


def limits():
    """The guard of the limits, on a simulation with the bug in place."""
    test_the_limits_hold_for_many_pairs(simulated(few=False))


def limits_of(simulation):
    """The same, where the bug is in the laws alone: the data sets may be those of correct code."""
    truth, _, many = simulation
    laws = replicates.laws(truth, many.pairs, many.sample)
    test_the_limits_hold_for_many_pairs((truth, None, many._replace(laws=laws)))


def few_pairs():
    """Likewise."""
    test_few_pairs_the_exact_laws_and_who_has_no_estimate(simulated(many=False))


def test_correct_code_is_not_called_outside():
    """Two worlds whose few pairs once gave a score variance 13 and 23 of its own sample's errors away; and a
    sample without spread, whose error is rounding."""
    for completions, seed, pairs, replicates_ in ((2, 596, 2, 2000), (16, 836, 1, 1000), (2, 0, 2, 1000)):
        settings = Settings(completions, 0.5, (pairs,), replicates_, seed)
        size = simulate(make_truth(settings), pairs, settings)
        assert not any(law.outside for law in size.laws)
        assert not any(law.judged for law in size.laws if law.error == 0)


@pytest.mark.parametrize("pairs, limits_judged", [(15.9, False), (16.1, True)])
def test_limits_are_judged_from_sixteen_resistances_on(pairs, limits_judged):
    """And with the slack that the docstring states, a region's never more than half of what it leaves out."""
    settings = Settings(4, 5.0, (1,), 1000, 3)
    truth = make_truth(settings)
    size = simulate(truth, math.ceil(pairs * truth.resistance), settings)
    relative, law = truth.resistance / size.pairs, {law.key: law for law in size.laws}
    assert all(law[key].judged == limits_judged for key in ("efficiency", "kl", "wald/95", "excess_risk"))
    assert law["score/variance"].judged and law["score/mean"].judged  # from 8 rho^2 on; always
    # each an exact formula, evaluated twice
    assert law["efficiency"].slack == pytest.approx(2 * relative)
    assert law["kl"].slack == pytest.approx((1 + 1 / 25) * relative * law["kl"].theory)
    assert law["excess_risk"].slack == pytest.approx(2 * relative * 1.5)
    assert law["excess_fit"].slack == pytest.approx(0.2 * relative * 1.5)
    assert law["wald/90"].slack == pytest.approx(0.2 * relative)
    assert law["wald/99"].slack == pytest.approx(0.005)


def test_each_number_of_pairs_has_its_own_stream(monkeypatch):
    """The generators of two sizes draw different numbers; the same size always the same ones."""
    drawn = []
    draw = replicates.draw

    def noting(truth, num_pairs, count, generator):
        drawn.append(generator.random(4).tolist())
        return draw(truth, num_pairs, count, generator)

    monkeypatch.setattr(replicates, "draw", noting)
    settings = Settings(3, 1.0, (50, 60), 1000, 0)
    for pairs in (50, 60, 50):
        simulate(make_truth(settings), pairs, settings)
    assert drawn[0] == drawn[2] != drawn[1]


def test_an_interrupted_run_leaves_nothing_behind(elsewhere, monkeypatch):
    """Ctrl-C in the simulation: exit code 130, no folder, so that the same command runs again."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics, "simulate", interrupt)
    assert main(["statistics", "--quick", "--output-dir", "run"]) == 130
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "/proc/run", "x" * 300])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(elsewhere, capsys, folder):
    """One sentence that names the option; nothing was computed or made."""
    assert main(["statistics", "--quick", "--output-dir", folder]) == 2
    message = capsys.readouterr()
    assert message.out == "" and message.err.count("\n") == 1
    assert message.err.startswith("dpo-minimal: error: --output-dir")
    assert list(elsewhere.iterdir()) == []


def test_the_figure_shows_the_laws(simulation, monkeypatch, tmp_path):
    """Heights, error bars of two standard errors, the theory's lines and the chi-square density."""
    truth, _, many = simulation
    kept = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: kept.update(figure=figure))
    plots.statistics_figure([many], truth.degrees, tmp_path / "x.png")
    kl, coverage, score, efficiency = kept["figure"].axes
    law = {law.key: law for law in many.laws}
    for axis, keys in ((kl, ("kl", "reverse_kl")), (efficiency, ("efficiency",))):
        bars = [container for container in axis.containers if hasattr(container, "has_yerr")]
        assert [bar.lines[0].get_ydata()[0] for bar in bars] == [law[key].measured for key in keys]
        for bar, key in zip(bars, keys):
            low, high = bar.lines[2][0].get_segments()[0][:, 1]
            assert (high - low) / 4 == pytest.approx(law[key].error)  # half of it on either side
        theory = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "-"]
        assert law[keys[0]].theory in theory
    heights = sorted(bar.lines[0].get_ydata()[0] for bar in coverage.containers)
    expected = [
        law[f"{key}/{level}"].measured for key in ("wald", "likelihood_ratio") for level in (90, 95, 99)
    ]
    assert heights == sorted(expected)
    assert {text.get_text() for text in coverage.get_legend().get_texts()} == {
        "theory, and chance", "Wald region", "likelihood-ratio region",
    }  # fmt: skip
    density = next(line for line in score.lines if line.get_color() == "black")
    q, height = density.get_xdata(), density.get_ydata()
    # chi-square with 3 degrees of freedom: sqrt(q) e^(-q/2) / sqrt(2 pi)
    np.testing.assert_allclose(height, np.sqrt(q / (2 * math.pi)) * np.exp(-q / 2), rtol=1e-6, atol=1e-12)


SLOW = test_each_statistic_by_a_slow_second_implementation
SCORE = test_the_score_statistics_moments_over_all_data_sets
HAND = test_the_cramer_rao_bound_by_hand
KL = test_the_kl_law_is_the_curvature_of_the_kl
law, run_ = sampling_laws, replicates
MUTANTS = [
    Mutant("2 forgotten", law.kl_law, ".sum(-1) / 2", ".sum(-1)", KL, (3, 0.5)),
    Mutant("beta not squared", law.kl_law, "/ beta**2", "/ beta", KL, (3, 0.5)),
    Mutant("no cross terms", law.kl_law, "- probability.unsqueeze(-1)", "- 0 * probability", KL, (3, 0.5)),
    Mutant("limit for the exact variance", law.score_moments, "* (1 - 1 / num_rankings)", "", SCORE, (3, 3)),
    Mutant("information for its inverse", law.score_moments, "state.inverse", "state.hessian", SCORE, (3, 3)),
    Mutant("bound of one comparison", law.cramer_rao, " / num_rankings", "", HAND),
    Mutant(
        "small groups only", law.no_estimate_bound, "[1:-1]", "[[1, 2, 4]]",
        test_the_union_bound_over_all_data_sets, (3, 4),
    ),
    Mutant("N forgotten", run_.measure, "number * (gradient", "(gradient", SLOW),
    Mutant(
        "plug-in at the truth", run_._measure_estimates, "curvature(estimate, data)",
        "curvature(truth.world.rewards.expand(shape), data)", SLOW,
    ),
    Mutant("half the likelihood ratio", run_._measure_estimates, "-2 * (counts", "(counts", SLOW),
    Mutant("KL the other way", run_._measure_estimates, "(fitted, optimal)", "(optimal, fitted)", SLOW),
    Mutant("opposite labels", run_.draw, "population.weight", "population.weight.flip(0)", limits),
    Mutant("wrong degrees", run_.laws, "quantile(share, d)", "quantile(share, d + 1)", limits_of),
    Mutant("N forgotten in the efficiency", run_.laws, ".item() * num_pairs", ".item()", limits_of),
    Mutant(
        "score only where there is an estimate", run_.measure, "for key in KEYS}",
        "for key in (*KEYS, 'score')}", few_pairs,
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(monkeypatch, request, mutant):
    """The guard passes as things stand (it is part of the suite) and fails with the bug."""
    arguments = mutant.arguments
    if mutant.guard is limits_of:
        arguments = [request.getfixturevalue("simulation")]  # made before the bug is planted
    plant(monkeypatch, mutant.function, mutant.right, mutant.wrong)
    with pytest.raises(CAUGHT):
        mutant.guard(*arguments)
