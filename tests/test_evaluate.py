"""Samples and what is measured on them: against every completion of a small GPT."""

import math

import pytest
import torch
from planting import CAUGHT, plant
from test_policy import loud

from dpo_minimal import evaluate
from dpo_minimal.closed_form import kl_divergence, optimal_logps, rlhf_objective
from dpo_minimal.evaluate import Samples, mean_of, sample
from dpo_minimal.experiments.judged import _ranks, as_pairs, judged_samples
from dpo_minimal.experiments.text_report import best_objective
from dpo_minimal.experiments.text_setup import Policy
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import SequenceBatch, completion_logps, enumerate_completions, sequence_logps
from dpo_minimal.preferences import bradley_terry
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


MUTANTS = {
    "the divergence the other way round": (
        evaluate.sample, "shared_prompt_logps(model, batch) - shared_prompt_logps(reference, batch)",
        "shared_prompt_logps(reference, batch) - shared_prompt_logps(model, batch)",
        test_the_divergence_is_that_of_all_completions,
    ),
    "the prompt loses its right end": (
        evaluate.sample, "[-room:]", "[:room]",
        test_the_same_seed_draws_the_same_and_a_long_prompt_loses_its_left_end,
    ),
    "an error without the root": (
        evaluate.mean_of, "math.sqrt(len(values))", "len(values)",
        test_the_divergence_is_that_of_all_completions,
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
