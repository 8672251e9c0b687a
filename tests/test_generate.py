"""Samples: drawn from the policy that scores them, with or without cache, whatever else is in the batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant
from test_policy import ALL, EOS, LENGTH, SMALL, VOCAB, loop_logp, loud

from dpo_minimal import generation
from dpo_minimal.generation import generate, sampling_probabilities
from dpo_minimal.laws.sampling_laws import chi_square_quantile
from dpo_minimal.model import GPT, GPTConfig, LayerCache
from dpo_minimal.validation import InputError

GPT_2 = loud(GPT(SMALL))
RAGGED = [[0], [3, 1, 0, 2], [1, 1], [2, 3, 3]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greedy_loop(gpt: GPT, prompt: list[int], new: int, eos: int | None) -> list[int]:
    """The likeliest token again and again, each from a full forward pass."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_equals_a_loop_without_cache(seed, eos):
    """A cache slot misplaced, a position off by one, padding read: another token is the likeliest."""
    gpt = loud(GPT(SMALL), seed)
    samples = generate(gpt, RAGGED, max_new_tokens=8, temperature=0, eos=eos)
    assert samples == [greedy_loop(gpt, prompt, 8, eos) for prompt in RAGGED]
    assert eos is not None or {len(ids) for ids in samples} == {8}


def frequencies_match(samples: list[list[int]], logps: dict[tuple[int, ...], float]) -> bool:
    """Pearson's chi-square of counts against probabilities, cells expected below 5 taken together.

    False alarm 1e-6 of each call: the chi-square law is a limit, good to a few per cent in the tail with
    cells of 5 and more.
    """
    n = len(samples)
    counts = dict.fromkeys(logps, 0)
    for ids in samples:
        counts[tuple(ids)] += 1  # a KeyError is a completion that should not exist
    cells = [(counts[ids], n * math.exp(logp)) for ids, logp in logps.items()]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = [sum(column) for column in zip(*(cell for cell in cells if cell[1] < 5), strict=True)]
    if rest and rest[1] >= 5:
        large.append(tuple(rest))
    statistic = sum((count - expected) ** 2 / expected for count, expected in large)
    return statistic < chi_square_quantile(1 - 1e-6, len(large) - 1)


def test_completions_have_the_policys_probabilities():
    """12,000 samples against exp(log pi(y|x)) of every completion, of two prompts of different lengths."""
    prompts = [[0], [3, 1, 0, 2]]
    samples = generate(GPT_2, prompts * 6_000, max_new_tokens=LENGTH, eos=EOS, generator=seeded(0))
    completions = [ids[:n] for ids, n in zip(ALL.ids.tolist(), ALL.lengths.tolist())]
    for row, prompt in enumerate(prompts):
        logps = {tuple(ids): loop_logp(GPT_2, prompt, ids) for ids in completions}
        assert frequencies_match(samples[row::2], logps)


@given(st.integers(2, 8), st.data())
def test_probabilities_are_those_of_the_definition(vocab, data):
    """Temperature, then the k likeliest, then the fewest of them that hold top_p, then normalise."""
    logits = torch.tensor(
        data.draw(st.lists(st.floats(-9, 9), min_size=vocab, max_size=vocab)), dtype=torch.float64
    )
    temperature = data.draw(st.floats(0.2, 3))
    top_k = data.draw(st.none() | st.integers(1, vocab + 1))
    top_p = data.draw(st.none() | st.floats(0.05, 1))
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits.tolist())}
    kept = sorted(weights, key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        total, enough = 0.0, top_p * sum(weights[i] for i in kept)
        for count, i in enumerate(kept, start=1):
            total += weights[i]
            if total >= enough * (1 - 1e-12):  # where the sum meets top_p exactly, rounding decides
                kept = kept[:count]
                break
    expected = [weights[i] if i in kept else 0.0 for i in range(vocab)]
    result = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    at_the_edge = top_p is not None and (result > 0).sum() == len(kept) + 1
    if not at_the_edge:
        # float64 softmax of arguments up to 45: relative error of some 50 roundings
        torch.testing.assert_close(
            result, torch.tensor(expected, dtype=torch.float64) / sum(expected), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("temperature", [0, 0.5, 1, 2])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 2, 7)])
def test_probabilities_of_any_number_of_rows(shape, temperature):
    """(..., V): each row by itself, also at the temperatures that people write."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sampling_probabilities(logits, temperature=temperature).view(-1, 7).tolist()
    for row, probabilities in zip(logits.view(-1, 7).tolist(), found):
        weights = [float(x == max(row)) if temperature == 0 else math.exp(x / temperature) for x in row]
        assert probabilities == pytest.approx([w / sum(weights) for w in weights], rel=1e-13)


def test_small_probabilities_and_temperatures_are_kept():
    """float32, as models are: a tail of 2^20 tokens with 1e-9 each has 0.1 % together, of which a running sum
    in float32 sees nothing, so that top_p cut it away. A temperature near 0 must not make NaN of a difference
    of 0 divided by it."""
    logits = torch.full((2**20,), -20.7)
    logits[0] = 0
    everything = sampling_probabilities(logits)
    torch.testing.assert_close(sampling_probabilities(logits, top_p=1.0), everything, rtol=0, atol=0)
    kept = (sampling_probabilities(logits, top_p=0.9995) > 0).sum().item()
    first, each, total = (x.item() for x in (*everything[:2].double(), everything.double().sum()))
    # So many of the tail reach 0.9995 of all; one more or less by the rounding of the division.
    assert kept == pytest.approx(1 + (0.9995 * total - first) / each, abs=2)
    for temperature in (1e-6, 1e-40):
        cold = sampling_probabilities(torch.tensor([0.3, 0.5, 0.2]), temperature=temperature)
        assert cold.tolist() == [0, 1, 0]


def test_top_p_that_is_met_exactly_keeps_no_more():
    """Quarters, whose sums have no rounding: two of them are one half."""
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.6, 3), (0.75, 3), (1.0, 4)):
        assert (sampling_probabilities(torch.zeros(4), top_p=top_p) > 0).sum() == kept


def test_rare_tokens_are_drawn():
    """A tail of 2^20 tokens with 1e-9 each: near 1, sums in float32 lie 6e-8 apart, so that of sixty tokens
    one would be drawn and the others never. Each has its place; its middle is found."""
    probabilities = torch.cat([torch.tensor([0.999]), torch.full((2**20,), 1e-9)])
    wide = probabilities.double()
    for token in (1, 7, 2**19, 2**20 - 5, 2**20):
        uniform = (wide[:token].sum() + wide[token] / 2) / wide.sum()
        assert generation._draw(probabilities[None], uniform.view(1, 1)).item() == token


def test_rows_together_fill_a_gigabyte():
    """Keys and values of every layer, as they are laid out; and one row goes through, however large it is."""
    large = GPT(GPTConfig(vocab_size=8, block_size=4096, n_layer=1, n_head=2, n_embd=512))
    each = sum(cache.keys_values.nbytes for cache in large.empty_caches(1, 4096))
    rows = generation.rows_at_once(large, 4096)
    assert rows * each <= 2**30 < (rows + 1) * each
    assert generation.rows_at_once(large, 2**31) == 1
    assert generation.rows_at_once(GPT_2, 8) == 512


def test_many_prompts_go_through_in_parts(monkeypatch):
    """5,000 prompts of GPT-2 would ask for 94 GB of keys and values. The parts are those of calls of their
    own, one after the other with one generator."""
    monkeypatch.setattr(generation, "rows_at_once", lambda model, slots: 3)
    rows, made = [], GPT.empty_caches
    monkeypatch.setattr(
        GPT, "empty_caches", lambda gpt, count, slots: rows.append(count) or made(gpt, count, slots)
    )
    generator, again = seeded(5), seeded(5)
    samples = generate(GPT_2, RAGGED * 2, max_new_tokens=3, eos=EOS, generator=generator)
    assert rows == [3, 3, 2]
    parts = [
        generate(GPT_2, (RAGGED * 2)[start : start + 3], max_new_tokens=3, eos=EOS, generator=again)
        for start in (0, 3, 6)
    ]
    assert samples == [row for part in parts for row in part]


def test_damaged_weights_do_not_give_samples():
    """NaN is above no number, so that the last token of the vocabulary was drawn for ever."""
    gpt = GPT(SMALL)
    with torch.no_grad():
        gpt.wte.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="logits are not finite"):
        generate(gpt, [[0, 1]], max_new_tokens=2)


def test_cut_distributions_are_sampled_token_by_token():
    """top_k = 2 at temperature 0.7: frequencies of the first two tokens against products of conditionals."""
    prompt, logps = [3, 0], {}
    for first in range(VOCAB):
        for second in range(VOCAB):
            p = [
                sampling_probabilities(GPT_2(torch.tensor([ids]))[0, -1], temperature=0.7, top_k=2)
                for ids in (prompt, [*prompt, first])
            ]
            probability = (p[0][first] * p[1][second]).item()
            if probability > 0:
                logps[first, second] = math.log(probability)
    assert len(logps) == 4
    options = dict(max_new_tokens=2, temperature=0.7, top_k=2, generator=seeded(1))
    assert frequencies_match(generate(GPT_2, [prompt] * 5_000, **options), logps)


def test_a_small_top_p_takes_the_likeliest_token():
    """And all of it takes what is drawn without."""
    options = dict(max_new_tokens=LENGTH, eos=EOS)
    greedy = generate(GPT_2, RAGGED, temperature=0, **options)
    assert generate(GPT_2, RAGGED, top_p=1e-6, generator=seeded(0), **options) == greedy
    plain, whole = (generate(GPT_2, RAGGED * 9, top_p=p, generator=seeded(0), **options) for p in (None, 1))
    assert plain == whole


def test_numbers_that_are_drawn_have_more_than_24_bits(monkeypatch):
    """With as many as float32 has, a token rarer than 6e-8 would get that probability, or none."""
    drawn, draw = [], generation._draw
    monkeypatch.setattr(generation, "_draw", lambda p, uniform: drawn.append(uniform) or draw(p, uniform))
    generate(GPT_2, RAGGED * 9, max_new_tokens=3, generator=seeded(0))
    assert len(drawn) == 3 and (torch.cat(drawn) * 2**24 % 1 != 0).all()


def test_same_seed_same_samples_another_seed_others():
    draw = [generate(GPT_2, RAGGED * 20, max_new_tokens=6, generator=seeded(seed)) for seed in (5, 5, 6)]
    assert draw[0] == draw[1] != draw[2]


def test_nothing_follows_the_end_of_text():
    """An end-of-text ends its completion and is kept; without `eos` nothing is special."""
    samples = generate(GPT_2, RAGGED * 50, max_new_tokens=8, eos=EOS, generator=seeded(2))
    assert all(EOS not in ids[:-1] for ids in samples)
    assert {len(ids) for ids in samples} == set(range(1, 9))
    assert all(len(ids) == 8 or ids[-1] == EOS for ids in samples)
    assert any(EOS in ids[:-1] for ids in generate(GPT_2, RAGGED * 50, max_new_tokens=8, generator=seeded(2)))


def test_forbidden_tokens_are_never_drawn():
    """A probability of exactly zero at either end of the vocabulary, and a uniform number near 0 or 1."""
    probabilities = torch.tensor([[0.0, 0.25, 0.75, 0.0]]).expand(50_000, -1)
    uniform = torch.rand(50_000, 1, dtype=torch.float64, generator=seeded(3))
    drawn = generation._draw(probabilities, uniform).flatten()
    assert set(drawn.tolist()) == {1, 2}
    share = (drawn == 1).float().mean().item()
    assert abs(share - 0.25) < 4.9 * (0.25 * 0.75 / 50_000) ** 0.5  # 4.9 standard errors: 1e-6


def test_weights_and_gradients_are_left_alone():
    gpt = loud(GPT(SMALL))
    before = [p.clone() for p in gpt.parameters()]
    generate(gpt, RAGGED, max_new_tokens=4)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(gpt.parameters(), before))


@pytest.mark.parametrize(
    "prompts, options, named",
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1] * 10], {}, "prompt 1 has 10 tokens"),
        ([[1, VOCAB]], {}, "prompt 1 holds an id outside"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"eos": VOCAB}, "eos"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"temperature": 0, "top_k": 3}, "unused"),
        ([[1]], {"temperature": 0, "top_p": 0.5}, "unused"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
    ],
)
def test_what_makes_no_sense_is_refused(prompts, options, named):
    with pytest.raises(InputError, match=named):
        generate(GPT_2, prompts, **{"max_new_tokens": 3, **options})


def test_draw_at_zero():
    """A uniform number of exactly 0 must not pick a first token of probability 0."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert generation._draw(torch.tensor([[0.0, 0.5, 0.5]]), zero).item() == 1
    with pytest.raises(InputError, match="logits are not finite"):  # of one row of two
        generation._draw(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), zero.expand(2, 1))


def every_greedy_loop():
    """One seed's likeliest tokens may survive a bug that moves the logits a little."""
    for seed in range(8):
        test_greedy_equals_a_loop_without_cache(seed, None)


def test_rows_that_go_on_alone_are_what_they_were():
    """Sixteen prompts, end-of-text about once in three tokens: half leave early, then half of those. The
    samples are those of a run in which nobody ends, cut at the first end-of-text (float64: no two tokens are
    so close that another batch shape would decide)."""
    gpt = loud(GPT(GPTConfig(vocab_size=3, block_size=32, n_layer=2, n_head=2, n_embd=8)), seed=1).double()
    prompts = [[1] * length for length in range(1, 17)]
    options = {"max_new_tokens": 12, "temperature": 1.0}
    for seed in range(4):
        whole = generate(gpt, prompts, generator=torch.Generator().manual_seed(seed), **options)
        cut = generate(gpt, prompts, eos=0, generator=torch.Generator().manual_seed(seed), **options)
        assert cut == [row[: row.index(0) + 1] if 0 in row else row for row in whole]
        assert len({len(row) for row in cut}) > 3


MUTANTS = {
    "padding of prompts is read": (
        generation._generate, "(slots < lengths.unsqueeze(-1)) | (slots >= P)", "(slots >= 0).expand(B, -1)",
        every_greedy_loop,
    ),
    "positions count the padding": (
        generation._generate, "(lengths + step).unsqueeze(-1)", "(lengths * 0 + P + step).unsqueeze(-1)",
        every_greedy_loop,
    ),
    "the next token is read off the padded end": (
        generation._generate, "[torch.arange(B, device=device), lengths - 1]", "[:, -1]",
        every_greedy_loop,
    ),
    "keys are kept as values": (
        LayerCache.append, "] = keys_values", "] = keys_values[:1]",
        every_greedy_loop,
    ),
    "who goes on alone keeps another's keys": (
        LayerCache.keep, "[:, rows]", "[:, : rows.sum()]",
        test_rows_that_go_on_alone_are_what_they_were,
    ),
    "who goes on alone takes another's numbers": (
        generation._generate, "uniform[rows]", "uniform[: len(rows)]",
        test_rows_that_go_on_alone_are_what_they_were,
    ),
    "temperature multiplies": (
        generation.sampling_probabilities, ") / temperature", ") * temperature",
        test_probabilities_are_those_of_the_definition,
    ),
    "the token that crosses top_p is dropped": (
        generation.sampling_probabilities, "before >= top_p", "before + ordered >= top_p",
        test_probabilities_are_those_of_the_definition,
    ),
    "zero probability at the lower end": (
        generation._draw, "right=True", "right=False",
        test_draw_at_zero,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises((*CAUGHT, KeyError)):
        guard()
