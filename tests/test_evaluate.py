"""Samples and what is measured on them: against every completion of a small GPT."""

import math

import pytest
import torch
from planting import CAUGHT, plant
from test_policy import loud

from dpo_minimal.closed_form import kl_divergence, optimal_logps, rlhf_objective
from dpo_minimal.experiments.text.judged import _ranks, as_pairs, judged_samples
from dpo_minimal.experiments.text.report import best_objective
from dpo_minimal.experiments.text.setup import Policy
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import SequenceBatch, completion_logps, enumerate_completions, sequence_logps
from dpo_minimal.preferences import bradley_terry
from dpo_minimal.rivals import evaluate
from dpo_minimal.rivals.evaluate import (
    Samples,
    crossed_interval,
    exact_win_rate,
    mean_of,
    sample,
    student_95,
    win_interval,
    win_rate,
)
from dpo_minimal.validation import InputError


class Letters:
    """A vocabulary of two letters and end-of-text, so that all completions can be listed."""

    eot = 0

    def encode(self, text):
        return ["^ab".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("^ab"[i] for i in ids if i)


TINY = GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=2, n_embd=8)


def pair_of_models():
    return loud(GPT(TINY), 1), loud(GPT(TINY), 2)


def drawn(count: int = 4000) -> Samples:
    policy, reference = pair_of_models()
    return sample(policy, reference, Letters(), ["ab"] * count, max_new_tokens=4, seed=0, reward=len)


def test_the_divergence_is_that_of_all_completions():
    """KL(pi || pi_ref) by listing them all, against the mean of log-ratios of samples: within 4.9 of its own
    standard errors (1e-6), and the error is that of independent draws."""
    policy, reference = pair_of_models()
    completions = enumerate_completions(3, 4, eos=0)
    tables = [completion_logps(gpt, torch.tensor([[1, 2]]), completions)[0] for gpt in (policy, reference)]
    exact = kl_divergence(*tables).item()
    log_ratio = tables[0] - tables[1]
    spread = ((tables[0].exp() * log_ratio**2).sum() - exact**2).sqrt().item()
    found = mean_of(drawn().log_ratios)
    assert abs(found.value - exact) <= 4.9 * found.error and exact > 0.05
    assert found.error == pytest.approx(spread / math.sqrt(4000), rel=0.1)


def test_each_sample_is_what_it_says():
    samples = drawn(50)
    policy, reference = pair_of_models()
    for place, text in enumerate(samples.texts):
        ids = Letters().encode(text) + [0] * int(samples.ended[place])
        assert len(ids) == samples.lengths[place] and samples.rewards[place] == len(text)
        row = torch.tensor([[1, 2, *ids]])
        batch = SequenceBatch(row, torch.tensor([2]), torch.tensor([2 + len(ids)]))
        ratio = sequence_logps(policy, batch) - sequence_logps(reference, batch)
        assert samples.log_ratios[place].item() == pytest.approx(ratio.item(), abs=1e-9)  # float64
    assert 0 < samples.ended.sum() < 50
    assert sample(policy, policy, Letters(), ["a"] * 9, max_new_tokens=4, seed=0).log_ratios.abs().max() == 0


def test_a_single_draw_has_no_standard_error():
    assert str(mean_of(torch.tensor([-1e-9]))) == "0.00"  # nor a sign that is not there
    assert str(mean_of(torch.tensor([1.0, 2.0]))) == "1.50 ± 0.50"


def test_the_same_seed_draws_the_same_and_a_long_prompt_loses_its_left_end():
    policy, reference = pair_of_models()
    draws = [
        sample(policy, reference, Letters(), [prompt] * 20, max_new_tokens=4, seed=3).texts
        for prompt in ("a" * 9 + "bbab", "bbab", "aaaabbab")
    ]
    assert draws[0] == draws[1] == draws[2]
    other = sample(policy, reference, Letters(), ["bbab"] * 20, max_new_tokens=4, seed=4).texts
    assert other != draws[0]


def test_a_prompt_given_as_ids_is_read_as_it_is():
    """Where a prompt was cut inside a character, its text has other ids; here b alone says nothing of ^."""
    policy, reference = pair_of_models()
    found = sample(policy, reference, Letters(), [[0, 2], [0, 2], [2]] * 30, max_new_tokens=4, seed=3)
    assert found.prompts[:3] == ["b", "b", "b"]
    texts = sample(policy, reference, Letters(), found.prompts, max_new_tokens=4, seed=3)
    same = (found.log_ratios - texts.log_ratios).abs() < 1e-9  # float64, in rows of other widths
    assert same[2::3].all() and not same[::3].any()


def test_more_new_tokens_than_the_context_are_refused():
    """The limit of a prompt would be 0 or negative, which keeps all of it or cuts its right end."""
    policy, reference = pair_of_models()
    for many in (8, 11):
        with pytest.raises(InputError, match=rf"^max_new_tokens must be below .* of 8, got {many}\.$"):
            sample(policy, reference, Letters(), ["abab"], max_new_tokens=many, seed=0)
    with pytest.raises(InputError, match="at least one prompt"):
        sample(policy, reference, Letters(), [], max_new_tokens=4, seed=0)


def test_no_policy_exceeds_the_bound():
    """beta log Z of a finite world is reached by pi* alone; the estimate from all of the reference's mass,
    each completion as often as it is likely, is that number exactly."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(16, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 20, (16,), generator=generator)
    reference = (counts / counts.sum()).log().double()
    each = torch.arange(16).repeat_interleave(counts)
    zeros = torch.zeros(len(each))
    samples = Samples([""] * len(each), [""] * len(each), zeros > 0, zeros, zeros, rewards[each])
    bound = best_objective(samples, beta=0.4)
    best = optimal_logps(reference.log_softmax(-1), rewards, beta=0.4)
    assert rlhf_objective(best, reference.log_softmax(-1), rewards, beta=0.4).item() == pytest.approx(bound)
    for seed in range(20):
        other = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = (reference + other).log_softmax(-1)
        assert rlhf_objective(other, reference.log_softmax(-1), rewards, beta=0.4) < bound


# --------------------------------------------------------------------------------- seeds and prompts


def test_intervals_hold_the_mean_as_often_as_they_say():
    """2,000 tables of 3 seeds x 12 prompts with effects of both: 95 % within what chance leaves, and not far
    above it. Counting 36 independent values would cover about 70 %."""
    generator = torch.Generator().manual_seed(5)
    count, hits, naive = 2000, 0, 0
    for _ in range(count):
        seeds, prompts, rest = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((3, 1), (1, 12), (3, 12))
        )
        table = 0.6 * seeds + prompts + rest
        interval = crossed_interval(table)
        hits += interval.low <= 0 <= interval.high
        naive += abs(table.mean()) < 1.96 * table.std() / 6
    deviation = math.sqrt(0.95 * 0.05 / count)
    # Satterthwaite's degrees of freedom are an approximation: a deviation of 2 % is known for few seeds
    assert 0.95 - 0.02 - 3 * deviation < hits / count < 0.995
    assert naive / count < 0.85


def test_the_interval_is_satterthwaites():
    """[D10.5] Mean squares by loops: the variance of the mean, and degrees of freedom by Satterthwaite."""
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table, S, P = values.tolist(), 3, 4
    rows, columns = [sum(row) / P for row in table], [sum(column) / S for column in zip(*table)]
    mean = sum(rows) / S
    seeds = sum(P * (row - mean) ** 2 for row in rows) / (S - 1)
    prompts = sum(S * (column - mean) ** 2 for column in columns) / (P - 1)
    rest = sum((table[s][p] - rows[s] - columns[p] + mean) ** 2 for s in range(S) for p in range(P)) / 6
    total = max(seeds + prompts - rest, seeds, prompts)
    degrees = total**2 / (seeds**2 / 2 + prompts**2 / 3 + rest**2 / 6)
    assert 1 < degrees < 11 and min(seeds, prompts, rest) > 0.1  # each of them tells
    half = student_95(degrees) * math.sqrt(total / 12)
    interval = crossed_interval(values)
    assert interval == pytest.approx((mean, mean - half, mean + half), rel=1e-12)  # a few float64 sums
    two = crossed_interval(values[:1, :2])  # one degree of freedom is enough, none is not
    assert two.high - two.value == pytest.approx(12.706 * abs(table[0][0] - table[0][1]) / 2)
    assert crossed_interval(values[:, :1]) == (pytest.approx(columns[0]), -math.inf, math.inf)
    cut = crossed_interval(values, within=(mean - half / 2, mean + half / 3))
    assert cut == pytest.approx((mean, mean - half / 2, mean + half / 3), rel=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 7, 8.5, 10, 12, 15, 20, 30, 45, 60, 500])
def test_students_quantiles_hold_95_percent(degrees):
    """With x = sqrt(degrees) tan(a) Student's density is cos(a)^(degrees - 1): up to the quantile it holds
    0.95 of the whole, or a little more between the entries of the table."""

    def integral(end):  # midpoints: an error of 1e-7 for a smooth function on 10^4 of them
        angles = (torch.arange(10_000, dtype=torch.float64) + 0.5) * end / 10_000
        return (angles.cos() ** (degrees - 1)).sum().item() * end / 10_000

    share = integral(math.atan(student_95(degrees) / math.sqrt(degrees))) / integral(math.pi / 2)
    # Half of the third decimal, on two sides where the density is at most 0.06; chords add up to 1.5e-3.
    assert 0.95 - 6e-5 < share < 0.95 + (6e-5 if degrees in evaluate._T else 1.5e-3)


def test_one_seed_is_the_mean_of_independent_prompts():
    """Reduces to mean and standard error."""
    values = torch.tensor([[0.0, 1.0, 3.0, 4.0, 7.0]], dtype=torch.float64)
    interval = crossed_interval(values)
    error = values.std().item() / math.sqrt(5)
    assert interval.value == pytest.approx(3.0) and interval.high - interval.value == pytest.approx(
        student_95(4) * error
    )


def test_win_rates_over_seeds_are_the_mean_of_each_seeds():
    """A tie is half a win, the interval stays within 0 and 1, and one seed gives `win_rate`."""
    rewards, opponents = torch.tensor([[2.0, 1.0, 1.0, 3.0], [1.0, 1.0, 2.0, 2.0]]), torch.ones(4)
    both = win_interval(rewards, opponents)
    each = [win_rate(row, opponents).value for row in rewards]
    assert both.value == sum(each) / 2 == 0.75 and both.low > 0 and both.high == 1
    assert win_interval(rewards[:1], opponents) == win_rate(rewards[0], opponents)


# ----------------------------------------------------------------------------------------- judged samples


def test_ranks_are_plackett_luces():
    """P(first before second) = sigmoid(r1 - r2) for each two of three, and P(best) = softmax(r): within 4.9
    standard errors (1e-6). Noise of another law may pass the first, and fails the second."""
    rewards = {"x": 1.0, "y": 0.0, "z": -0.5}
    noise = torch.Generator().manual_seed(0)
    count = 10_000
    ranks = [_ranks(list(rewards), rewards.get, noise) for _ in range(count)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        share = sum(rank[first] < rank[second] for rank in ranks) / count
        values = torch.tensor([list(rewards.values())], dtype=torch.float64)
        expected = bradley_terry(values[:, first], values[:, second]).item()
        assert abs(share - expected) <= 4.9 * math.sqrt(expected * (1 - expected) / count)
    for place, expected in enumerate(torch.tensor(list(rewards.values())).softmax(-1).tolist()):
        share = sum(rank[place] == 1 for rank in ranks) / count
        assert abs(share - expected) <= 4.9 * math.sqrt(expected * (1 - expected) / count)
    assert all(sorted(rank) == [1, 2, 3] for rank in ranks)


def test_pairs_keep_the_better_rank_as_chosen():
    rows = [{"prompt": "p", "responses": ["a", "b"], "ranking": [2, 1]},
            {"prompt": "q", "responses": ["c", "d"], "ranking": [1, 2]}]  # fmt: skip
    assert as_pairs(rows) == [
        {"prompt": "p", "chosen": "b", "rejected": "a"}, {"prompt": "q", "chosen": "c", "rejected": "d"}
    ]  # fmt: skip


class Deaf:
    """Hears the same whatever is said, and answers in nine letters."""

    eot = 0

    def encode(self, text):
        return [1, 2]

    def decode(self, ids):
        return "".join("^abcdefghi"[i] for i in ids if i)


def test_judged_samples_are_whole_different_and_reproducible():
    """Letters and an end that comes early or late: rows hold only what ended by itself, is not blank, and
    no text twice; where too few do, that is said."""
    policy = Policy(loud(GPT(GPTConfig(10, 40, 1, 2, 8)), 4), Deaf())
    options = {"reward": len, "max_new_tokens": 20, "seed": 2}
    rows = judged_samples(policy, 15, 2, **options)
    assert rows == judged_samples(policy, 15, 2, **options) and len(rows) == 15
    for row in rows:
        assert sorted(row["ranking"]) == [1, 2] and len(set(row["responses"])) == 2
        assert all(0 < len(text) < 20 for text in row["responses"])
    with pytest.raises(InputError, match="--max-new-tokens 20"):
        judged_samples(policy, 15, 5, **options)


# --------------------------------------------------------------------------------------------- win rates


def outcomes(wins: int, ties: int, losses: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of comparisons that end so."""
    first = torch.tensor([1.0] * wins + [0.0] * ties + [-1.0] * losses)
    return first, torch.zeros(len(first))


def coverage(rate: float, ties: float, count: int, experiments: int = 3000) -> float:
    """How often the interval holds the true win rate."""
    generator = torch.Generator().manual_seed(0)
    wins, size = rate - ties / 2, torch.full((experiments,), float(count))
    w = torch.binomial(size, torch.full_like(size, wins), generator=generator)
    t = torch.binomial(size - w, torch.full_like(size, ties / (1 - wins)), generator=generator)
    kinds, times = torch.stack([w, t, size - w - t], -1).long().unique(dim=0, return_counts=True)
    covered = 0
    for kind, repeats in zip(kinds.tolist(), times.tolist()):
        interval = win_rate(*outcomes(*kind))
        covered += repeats * (interval.low <= rate <= interval.high)
    return covered / experiments


@pytest.mark.parametrize(
    ("rate", "ties"),
    [(0.5, 0), (0.8, 0), (0.97, 0), (0.5, 0.2), (0.8, 0.2), (0.97, 0.05), (0.5, 0.5), (0.75, 0.5)],
)
@pytest.mark.parametrize("count", [100, 1000])
def test_the_interval_covers(rate, ties, count):
    """It holds the true win rate 95 % of the time, with ties and without. Fails for Wilson's, which
    forgets them (99.7 % where half of 100 are ties), and for mean plus or minus two errors (80 % at 0.97)."""
    found = coverage(rate, ties, count)
    # 4.9 binomial errors of 3000 experiments: 0.0195. Without ties the outcome is one whole number, so that
    # what is covered jumps, by up to half the chance of the likeliest
    jump = 0.5 / math.sqrt(2 * math.pi * count * (rate * (1 - rate) - ties / 4))
    assert abs(found - 0.95) <= 0.0195 + (jump if ties == 0 else 0), found


@pytest.mark.parametrize(("wins", "losses"), [(0, 5), (3, 1), (50, 50), (97, 3)])
def test_without_ties_the_interval_is_wilsons(wins, losses):
    n, z = wins + losses, evaluate.NORMAL_95
    p = wins / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = win_rate(*outcomes(wins, 0, losses))
    # bisection ends within 2^-50 of a lead; a discriminant of zero is known to the root of a rounding
    assert found[:2] == pytest.approx((p, centre - half), abs=1e-7)
    assert found.high == pytest.approx(centre + half, abs=1e-7)


def test_win_rates_both_ways_add_up():
    """Exchanging the two exchanges everything, for samples and for tables; a tie is half a win."""
    one, other = win_rate(*outcomes(7, 5, 2)), win_rate(*outcomes(2, 5, 7))
    assert one.value == pytest.approx(9.5 / 14) and one.low < one.value < one.high
    assert (one.value + other.value, one.low + other.high, one.high + other.low) == pytest.approx((1, 1, 1))
    even = win_rate(*outcomes(0, 30, 0))
    assert even.value == 0.5 and 0.4 < even.low < 0.5 < even.high < 0.6
    policy, reference, rewards = tables_of_win_rates()
    both = exact_win_rate(policy, reference, rewards) + exact_win_rate(reference, policy, rewards)
    torch.testing.assert_close(both, torch.ones(3).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(exact_win_rate(policy, policy, rewards), torch.full((3,), 0.5).double())


def tables_of_win_rates() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two policies over 12 completions with rewards of which many are equal; one never says two of them."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    logits[0, :, :2] = -math.inf
    rewards = torch.randint(5, (3, 12), generator=generator).double()
    return *logits.log_softmax(-1), rewards


def test_exact_win_rates_are_those_of_all_pairs():
    policy, reference, rewards = tables_of_win_rates()
    found = exact_win_rate(policy, reference, rewards)
    for x in range(3):
        total = 0.0
        for p, r in zip(policy[x].exp().tolist(), rewards[x].tolist()):
            for q, s in zip(reference[x].exp().tolist(), rewards[x].tolist()):
                total += p * q * (1.0 if r > s else 0.5 if r == s else 0.0)
        assert found[x].item() == pytest.approx(total, abs=1e-14)  # sums of 144 float64 terms
    assert (found - 0.5).abs().min() > 0.01


def test_sampled_win_rates_find_the_exact_one():
    policy, reference, rewards = (table[0] for table in tables_of_win_rates())
    generator = torch.Generator().manual_seed(0)
    first, second = (
        rewards[torch.multinomial(logps.exp(), 4000, replacement=True, generator=generator)]
        for logps in (policy, reference)
    )
    found = win_rate(first, second)
    # the interval reaches two errors each way, so 4.9 of them are 2.5 times its half
    exact = exact_win_rate(policy, reference, rewards).item()
    assert abs(found.value - exact) < 2.5 * (found.high - found.low) / 2 < 0.05


def test_rewards_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match=r"shape[^\n]*\.$"):
        win_rate(torch.zeros(3), torch.zeros(4))
    with pytest.raises(InputError, match=r"\(N,\)[^\n]*\.$"):
        win_rate(torch.zeros(3, 1), torch.zeros(3, 1))
    even = torch.full((2,), 0.5).log()
    with pytest.raises(InputError, match=r"^rewards must be finite[^\n]*\.$"):
        exact_win_rate(even, even, torch.tensor([0.0, math.nan]))


MUTANTS = {
    "the divergence the other way round": (
        evaluate.sample, "logps - ref_logps", "ref_logps - logps",
        test_the_divergence_is_that_of_all_completions,
    ),
    "the prompt loses its right end": (
        evaluate.sample, "[-longest:]", "[:longest]",
        test_the_same_seed_draws_the_same_and_a_long_prompt_loses_its_left_end,
    ),
    "an error without the root": (
        evaluate.mean_of, "math.sqrt(len(values))", "len(values)",
        test_the_divergence_is_that_of_all_completions,
    ),
    "ties are losses": (
        evaluate.exact_win_rate, "(beaten[0] + beaten[1]) / 2", "beaten[0]",
        test_exact_win_rates_are_those_of_all_pairs,
    ),
    "rewards out of order": (
        evaluate.exact_win_rate, "gather(-1, order).cumsum", "cumsum",
        test_exact_win_rates_are_those_of_all_pairs,
    ),
    "seeds forgotten": (
        evaluate.crossed_interval, "total / (S * P)", "by_rest / (S * P)",
        test_intervals_hold_the_mean_as_often_as_they_say,
    ),
    "trainings win ties": (
        evaluate.win_interval, ").sign()", ").ge(0) * 2 - 1",
        test_win_rates_over_seeds_are_the_mean_of_each_seeds,
    ),
    "a variance that forgets ties": (
        evaluate._furthest_lead, "2 * l + lead", "1", lambda: test_the_interval_covers(0.5, 0.5, 100),
    ),
    "ties as wins of the first": (
        evaluate.win_rate, "first_rewards > second_rewards", "first_rewards >= second_rewards",
        test_win_rates_both_ways_add_up,
    ),
    "noise of the wrong sign": (
        _ranks, "-torch.empty_like", "torch.empty_like", test_ranks_are_plackett_luces,
    ),
    "cut samples are judged": (
        judged_samples, "not ended or", "", test_judged_samples_are_whole_different_and_reproducible,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
