"""Prompt read once, K completions scored: the same numbers and gradients as K sequences on their own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import CAUGHT, plant
from test_policy import ALL, EOS, PROMPTS, ROUNDING, SMALL, VOCAB, gradients, loop_logp, loud

from dpo_minimal import model as model_module
from dpo_minimal import policy
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import (
    SequenceBatch,
    SharedPromptBatch,
    completion_logps,
    sequence_logps,
    shared_prompt_batch,
    shared_prompt_logps,
    token_logps,
)
from dpo_minimal.validation import InputError

GPT_2 = loud(GPT(SMALL))
tokens = st.integers(0, VOCAB - 1)


@st.composite
def ragged(draw, K=None) -> tuple[list[list[int]], list[list[list[int]]]]:
    """One to four prompts of 1 to 4 tokens, each with the same number of completions of 1 to 5."""
    B, K = draw(st.integers(1, 4)), K or draw(st.integers(1, 3))
    prompts = [draw(st.lists(tokens, min_size=1, max_size=4)) for _ in range(B)]
    completions = [[draw(st.lists(tokens, min_size=1, max_size=5)) for _ in range(K)] for _ in range(B)]
    return prompts, completions


def separate(gpt: GPT, prompts, completions) -> torch.Tensor:
    """(B, K) by one forward pass for each completion: nothing shared and nothing padded."""
    rows = []
    for prompt, answers in zip(prompts, completions, strict=True):
        for ids in answers:
            lengths = torch.tensor([len(prompt)]), torch.tensor([len(prompt) + len(ids)])
            rows.append(sequence_logps(gpt, SequenceBatch(torch.tensor([prompt + ids]), *lengths)))
    return torch.cat(rows).view(len(prompts), -1)


@given(ragged())
def test_values_equal_a_token_by_token_loop(drawn):
    """One completion seeing another, a position off by one, a first token predicted from the wrong place."""
    prompts, completions = drawn
    shared = shared_prompt_logps(GPT_2, shared_prompt_batch(prompts, completions))
    for b, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
        for k, ids in enumerate(answers):
            assert shared[b, k].item() == pytest.approx(loop_logp(GPT_2, prompt, ids), abs=ROUNDING)


@settings(max_examples=15)
@given(ragged(), st.sampled_from([1, 8]), st.integers(0, 2**32 - 1))
def test_gradients_equal_those_of_separate_sequences(drawn, multiple, seed):
    """Equal log-probabilities do not show that fillers and padding leave the gradient alone."""
    prompts, completions = drawn
    shape = len(prompts), len(completions[0])
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = shared_prompt_batch(prompts, completions, multiple=multiple)
    shared = gradients(GPT_2, (weights * shared_prompt_logps(GPT_2, batch)).sum())
    alone = gradients(GPT_2, (weights * separate(GPT_2, prompts, completions)).sum())
    for name, gradient in alone.items():
        # sums of up to 60 scored tokens' gradients, of size up to 10^3, in another order
        torch.testing.assert_close(shared[name], gradient, rtol=0, atol=1e-9, msg=name)


def test_all_completions_side_by_side_sum_to_one():
    """40 completions in one row: the probabilities of all completions of a prompt sum to one."""
    gpt = loud(GPT(GPTConfig(vocab_size=VOCAB, block_size=200, n_layer=2, n_head=2, n_embd=8)))
    completions = [ids[:n] for ids, n in zip(ALL.ids.tolist(), ALL.lengths.tolist())]
    batch = shared_prompt_batch(PROMPTS.tolist(), [completions] * len(PROMPTS))
    table = shared_prompt_logps(gpt, batch)
    assert table.logsumexp(-1).abs().max() < ROUNDING
    torch.testing.assert_close(table, completion_logps(gpt, PROMPTS, ALL), rtol=0, atol=ROUNDING)


@given(ragged(K=2), tokens, st.randoms(use_true_random=False))
def test_what_is_not_read_does_not_matter_bitwise(drawn, pad, random):
    """Neither the ids of the padding nor those of the other completion reach a log-probability."""
    prompts, completions = drawn
    batch = shared_prompt_batch(prompts, completions, multiple=16)
    ids = batch.ids.clone()
    place = torch.arange(ids.shape[1])
    end_of_first = batch.prompt_lengths + batch.completion_lengths[:, 0]
    ids[place >= end_of_first.unsqueeze(-1)] = pad  # the second completion and the padding
    altered = shared_prompt_logps(GPT_2, batch._replace(ids=ids))
    assert torch.equal(altered[:, 0], shared_prompt_logps(GPT_2, batch)[:, 0])


def test_gradient_is_exactly_zero_at_padding_and_other_positions():
    """A position that pads is read as position 0 and must not move its embedding."""
    batch = shared_prompt_batch([[1, 2]], [[[0, 3], [3]]], multiple=8)
    found = gradients(GPT_2, shared_prompt_logps(GPT_2, batch).sum())["wpe.weight"]
    rows = found.abs().sum(-1)
    assert (rows[:3] > 0).all()  # the prompt's two and the first token of the longer completion
    assert (rows[3:] == 0).all()  # the last token of a completion predicts nothing that is scored
    more = batch._replace(ids=F.pad(batch.ids, (0, 24)))
    torch.testing.assert_close(  # 24 paddings at position 0: not one of them leaks; another summing order
        gradients(GPT_2, shared_prompt_logps(GPT_2, more).sum())["wpe.weight"], found, rtol=0, atol=ROUNDING
    )


def test_only_completion_positions_reach_the_vocabulary(monkeypatch):
    """The projection is what takes time: 5 scored tokens cost one block of 64 rows, not 4 x 8 positions."""
    projected = []
    project = GPT.project
    monkeypatch.setattr(GPT, "project", lambda gpt, h: projected.append(h.shape[0]) or project(gpt, h))
    prompts, completions = [[1] * 40] * 4, [[[0] * 20, [3] * 12]] * 4
    gpt = GPT(GPTConfig(vocab_size=VOCAB, block_size=64, n_layer=1, n_head=1, n_embd=4))
    shared_prompt_logps(gpt, shared_prompt_batch(prompts, completions))
    assert projected == [128]  # 4 x 32 scored tokens of 4 x 72 positions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_target_logps_are_log_softmax_and_gather(dtype, monkeypatch):
    """Value and gradient, in parts of three rows, against autograd in float64; and the table holds but once.

    Tolerances: float64 and float32 rounding of 40 terms; in bfloat16 the logits are exact (the same numbers),
    sums are float32, and the gradient is rounded to a part in 2^8 of itself.
    """
    monkeypatch.setattr(policy, "_rows_at_a_time", lambda logits: 3)
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(10, 40, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(40, (10,), generator=generator)
    incoming = torch.randn(10, generator=generator, dtype=torch.float64)
    exact = logits.double().requires_grad_()
    expected = exact.log_softmax(-1)[torch.arange(10), targets]
    (gradient,) = torch.autograd.grad((incoming * expected).sum(), exact)
    ours = logits.clone().requires_grad_()
    found = policy._TargetLogps.apply(ours * 1, targets)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    within = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=within, atol=20 * within)
    (given,) = torch.autograd.grad((incoming.to(found.dtype) * found).sum(), ours, retain_graph=True)
    assert given.dtype == dtype
    rounding = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    smallest = 1e-13 if dtype == torch.float64 else 1e-6  # of differences of numbers near 1
    torch.testing.assert_close(given.double(), gradient, rtol=rounding, atol=smallest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found.sum(), ours)  # a second time, over the overwritten table


def test_gradients_are_the_same_each_time_on_two_threads():
    """Completions share the state that predicts their first token. Added up in whatever order threads
    arrive, their gradients differed in the last bit from run to run, and resumed runs from whole ones.
    A single row of many completions, so that both threads add to that one state; with indexing in place of
    the embedding, each of 36 repetitions differed from the first."""
    gpt = GPT(GPTConfig(vocab_size=VOCAB, block_size=2000, n_layer=1, n_head=1, n_embd=64))
    answers = torch.randint(VOCAB, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()
    batch = shared_prompt_batch([[1, 2]], [answers])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [gradients(gpt, shared_prompt_logps(gpt, batch).square().sum()) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert all(torch.equal(again[name], gradient) for name, gradient in found[0].items())


def test_per_token_terms_add_up_and_sit_at_their_tokens():
    """`token_logps` is what `score` shows; a shift by one would blame the wrong word."""
    prompt, completion = [0, 3], [1, 1, EOS]
    batch = SequenceBatch(torch.tensor([prompt + completion + [0]]), torch.tensor([2]), torch.tensor([5]))
    terms = token_logps(GPT_2, batch)[0]
    assert terms[[0, 1, 5]].tolist() == [0, 0, 0]
    for t in range(3):
        before = loop_logp(GPT_2, prompt, completion[:t]) if t else 0.0
        expected = loop_logp(GPT_2, prompt, completion[: t + 1]) - before
        assert terms[2 + t].item() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(
    "prompts, completions, named",
    [
        ([], [], "at least one prompt"),
        ([[1]], [[[1]], [[2]]], "same number"),
        ([[1], [2]], [[[1], [2]], [[1]]], "same number"),
        ([[1], []], [[[1]], [[2]]], "empty"),
        ([[1]], [[[1], []]], "empty"),
    ],
)
def test_batches_that_make_no_sense_are_refused(prompts, completions, named):
    with pytest.raises(InputError, match=named):
        shared_prompt_batch(prompts, completions)


@pytest.mark.parametrize("prompt, answers", [(0, [[1, 1]]), (2, [[0, 2]]), (3, [[4, 4]]), ([1, 1], [[1, 1]])])
def test_lengths_that_do_not_fit_are_refused(prompt, answers):
    """An empty completion has log-probability 0, which would look like certainty."""
    lengths = torch.tensor(prompt).view(-1)
    with pytest.raises(InputError):
        shared_prompt_logps(
            GPT_2, SharedPromptBatch(torch.zeros(1, 8, dtype=torch.long), lengths, torch.tensor(answers))
        )


# ------------------------------------------------------------------------------------------ bfloat16 on a CPU


@pytest.mark.parametrize("masked", [False, True])
def test_hand_written_attention_equals_the_fused_one(masked):
    """In bfloat16 on a CPU another code path runs; value and gradients must be those of the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(2, 3, 6, 8, generator=generator).bfloat16() for _ in range(4))
    mask = (torch.rand(2, 1, 6, 6, generator=generator) < 0.7) | torch.eye(6, dtype=torch.bool)
    mask = mask if masked else None
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = model_module._attend(*inputs, mask)
        results.append([y, *torch.autograd.grad((y * weights.to(dtype)).sum(), inputs)])
    for rounded, exact in zip(*results, strict=True):
        # scores, weights and sums are rounded to 8 bits each: a few units of 2^-8 of the largest entry
        torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=5 * 2**-8 * exact.abs().max().item())


def test_autocast_scores_in_float32_and_leaves_weights_float32():
    """A sum of bfloat16 terms near 500 nats would be rounded to multiples of 2."""
    gpt = GPT(GPTConfig(vocab_size=64, block_size=256, n_layer=1, n_head=2, n_embd=16))
    prompts, completions = [[1, 2, 3]] * 2, [[[5] * 100, [6] * 120], [[7] * 90, [8] * 30]]
    batch = shared_prompt_batch(prompts, completions)
    exact = shared_prompt_logps(gpt, batch)
    with torch.autocast("cpu", torch.bfloat16):
        logps = shared_prompt_logps(gpt, batch)
    logps.sum().backward()
    assert logps.dtype == torch.float32
    assert {p.grad.dtype for p in gpt.parameters()} == {torch.float32}
    # each term is -log 64 up to an error of a logit (0.05 here) rounded to 8 bits; 120 of them, random signs
    assert (logps - exact).abs().max() < 120 * 0.2 * 2**-8
    assert exact.abs().max() > 120 * 0.9 * math.log(64) and not torch.equal(logps, logps.bfloat16().float())


# -------------------------------------------------------------------------------------------------- mutants

MUTANTS = {
    "completions see each other": (
        policy.shared_prompt_states, "(same | (part == 0).unsqueeze(-2)) & ", "",
        test_values_equal_a_token_by_token_loop,
    ),
    "positions run on through the first completion": (
        policy.shared_prompt_states, "(place - start + offset)", "place",
        test_values_equal_a_token_by_token_loop,
    ),
    "first token predicted by the completion before": (
        policy.shared_prompt_states, "torch.where(first, prompt_lengths[row], token)", "token",
        test_values_equal_a_token_by_token_loop,
    ),
    "terms shifted by one token": (
        policy.token_logps, "index_put((row, place), logps)", "index_put((row, place - 1), logps)",
        test_per_token_terms_add_up_and_sit_at_their_tokens,
    ),
    "scores not scaled": (
        model_module._attend, "q.shape[-1] ** -0.5", "1.0", test_hand_written_attention_equals_the_fused_one,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(**({"masked": True} if function is model_module._attend else {}))
