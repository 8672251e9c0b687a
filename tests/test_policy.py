"""Log-probabilities of completions: against a token-by-token loop, and against each other."""

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from dpo_minimal.bandit import random_bandit
from dpo_minimal.closed_form import next_token_logps
from dpo_minimal.experiments.bandit import convergence
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import (
    Completions,
    EnumeratedPolicy,
    SequenceBatch,
    completion_logps,
    enumerate_completions,
    prefix_tree,
    sequence_logps,
)
from dpo_minimal.validation import InputError

VOCAB, EOS, LENGTH, PROMPT = 4, 2, 3, 2
SMALL = GPTConfig(vocab_size=VOCAB, block_size=12, n_layer=2, n_head=2, n_embd=8)
PROMPTS = torch.tensor([[0, 3], [1, 1], [2, 0]])
ALL = enumerate_completions(VOCAB, LENGTH, EOS)


def loud(gpt: GPT, seed: int = 0) -> GPT:
    """The same GPT in float64 with large random parameters: conditionals far from uniform, no two alike.
    A shift by one token would be invisible to a policy with uniform conditionals."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.double().parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return gpt


class ForbiddingGPT(GPT):
    """Gives end-of-text the logit -inf, as a constrained decoder does."""

    def project(self, hidden):
        forbidden = torch.zeros(self.config.vocab_size, dtype=hidden.dtype)
        forbidden[EOS] = -math.inf
        return super().project(hidden) + forbidden


def loop_logp(gpt: GPT, prompt: list[int], completion: list[int]) -> float:
    """log pi(completion | prompt), one forward pass a token, nothing shared and nothing padded."""
    total = 0.0
    for t, token in enumerate(completion):
        with torch.no_grad():
            logits = gpt(torch.tensor([prompt + completion[:t]]))[0, -1]
        total += (logits[token] - logits.exp().sum().log()).item()
    return total


def explicit_batch(prompts: torch.Tensor, completions: Completions) -> SequenceBatch:
    """Every prompt with every completion as rows of their own, prompt-major."""
    X, Y = len(prompts), len(completions.ids)
    ids = torch.cat([prompts.repeat_interleave(Y, 0), completions.ids.repeat(X, 1)], -1)
    prompt_lengths = torch.full((X * Y,), prompts.shape[1])
    return SequenceBatch(ids, prompt_lengths, prompt_lengths + completions.lengths.repeat(X))


def ragged_batch(pad: int = 0, extra: int = 0) -> SequenceBatch:
    """Four rows whose prompts and completions have different lengths, padded with `pad`."""
    rows = [([0], [1, 3, 2]), ([3, 1, 0], [2]), ([1, 1], [0, 0, 1, 3, 2]), ([2, 3, 3, 0], [1, 0])]
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + extra
    ids = torch.full((len(rows), width), pad)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
    return SequenceBatch(
        ids,
        torch.tensor([len(prompt) for prompt, _ in rows]),
        torch.tensor([len(prompt) + len(completion) for prompt, completion in rows]),
    )


def gradients(gpt: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, _ in gpt.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(gpt.parameters()))))


# A log-probability here is a sum of at most 5 terms of size up to 10; each passes through a few hundred
# float64 roundings of 1.1e-16, which LayerNorm and the softmax amplify by about ten at these weights.
# Batches of other shapes add in another order. A token missed, doubled or shifted moves it by about 1.
ROUNDING = 1e-11


# ------------------------------------------------------------------------------------------- enumeration


@given(st.integers(2, 4), st.integers(1, 4), st.data())
def test_enumeration_lists_each_completion_once(vocab, length, data):
    """A completion missed or listed twice: probabilities would not sum to one, and Z would be wrong."""
    eos = data.draw(st.integers(0, vocab - 1))
    completions = enumerate_completions(vocab, length, eos)
    listed = [tuple(ids[:n]) for ids, n in zip(completions.ids.tolist(), completions.lengths.tolist())]
    cut = set()
    for string in itertools.product(range(vocab), repeat=length):  # cut every string after its first end
        cut.add(string[: string.index(eos) + 1] if eos in string else string)
    assert len(listed) == len(cut) and set(listed) == cut
    assert len(listed) == sum((vocab - 1) ** t for t in range(length)) + (vocab - 1) ** length
    assert [len(completion) for completion in listed] == sorted(len(completion) for completion in listed)
    for ids, n in zip(completions.ids.tolist(), completions.lengths.tolist()):
        assert ids[n:] == [eos] * (length - n)  # filled up with end-of-text, as promised


def test_enumeration_makes_nothing_larger_than_its_result():
    """A level of prefixes too many would be V times as large: 80 GB for GPT-2's vocabulary and length 1."""
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        completions = enumerate_completions(30, 2, 0)
    assert largest == completions.ids.numel()


@given(st.integers(2, 4), st.integers(1, 4), st.data())
def test_enumeration_is_prefix_free(vocab, length, data):
    """If one completion began another, the shorter one's probability would be counted twice."""
    completions = enumerate_completions(vocab, length, data.draw(st.integers(0, vocab - 1)))
    listed = [tuple(ids[:n]) for ids, n in zip(completions.ids.tolist(), completions.lengths.tolist())]
    proper = {completion[:t] for completion in listed for t in range(len(completion))}
    assert not proper & set(listed)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1, 2, 0), "vocab_size"), ((3, 0, 0), "max_length"), ((3, 2, 3), "eos"), ((3, 2, -1), "eos")],
)
def test_enumeration_refuses_what_makes_no_sense(arguments, named):
    """An end-of-text outside the vocabulary would silently give completions that never end."""
    with pytest.raises(InputError, match=rf"^{named} must [^\n]*\.$"):
        enumerate_completions(*arguments)


# ----------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_of_all_completions_sum_to_one(seed):
    """#68. Fails on a label shift, a mean in place of a sum, end-of-text scored twice or never, prompt
    tokens counted, or completions of unequal length mishandled."""
    gpt = loud(GPT(SMALL), seed)
    with torch.no_grad():
        tree = completion_logps(gpt, PROMPTS, ALL)
        plain = sequence_logps(gpt, explicit_batch(PROMPTS, ALL)).view(len(PROMPTS), -1)
    for logps in (tree, plain):
        # #68: L V^L roundings; here each is amplified like a log-probability's, see ROUNDING
        torch.testing.assert_close(
            logps.exp().sum(-1), torch.ones(len(PROMPTS)).double(), rtol=0, atol=ROUNDING
        )
    # not uniform: otherwise a shifted target would go unseen
    assert (tree.amax(-1) - tree.amin(-1) > 3).all()


def test_probabilities_of_a_prefix_sum_to_its_own():
    """#68 at each node: a tree that reads a wrong ancestor can still sum to one as a whole, but the
    completions that begin with h would then not add up to P(h)."""
    gpt = loud(GPT(SMALL))
    with torch.no_grad():
        chances = completion_logps(gpt, PROMPTS, ALL).exp()
    words = [token for token in range(VOCAB) if token != EOS]
    for length in (1, 2):
        for prefix in itertools.product(words, repeat=length):
            begins = (ALL.ids[:, :length] == torch.tensor(prefix)).all(-1)
            for x, prompt in enumerate(PROMPTS.tolist()):
                expected = math.exp(loop_logp(gpt, prompt, list(prefix)))
                # relative error of exp(logp) is the absolute error of logp, see ROUNDING
                assert chances[x, begins].sum().item() == pytest.approx(expected, rel=ROUNDING)


# -------------------------------------------------------------------------- three ways to the same number


def test_tree_sequence_and_loop_agree():
    """The prefix tree is a speed trick: it must give what one forward pass a token gives, for every prompt
    and completion. Fails on wrong positions, a mask transposed, or a context one token off."""
    gpt = loud(GPT(SMALL))
    with torch.no_grad():
        tree = completion_logps(gpt, PROMPTS, ALL)
        plain = sequence_logps(gpt, explicit_batch(PROMPTS, ALL)).view(len(PROMPTS), -1)
    loop = torch.tensor(
        [
            [
                loop_logp(gpt, prompt, ids[:n])
                for ids, n in zip(ALL.ids.tolist(), ALL.lengths.tolist())
            ]
            for prompt in PROMPTS.tolist()
        ],
        dtype=torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(tree, loop, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(plain, loop, rtol=0, atol=ROUNDING)


def test_ragged_sequences_equal_the_loop():
    """Prompts of different lengths in one batch: fails where one row's prompt length is used for another,
    where prompt tokens are scored, or where rows of equal sum are mixed up by the gather."""
    gpt = loud(GPT(SMALL))
    batch = ragged_batch()
    with torch.no_grad():
        logps = sequence_logps(gpt, batch)
    for row, (ids, p, n) in enumerate(zip(*(field.tolist() for field in batch))):
        assert logps[row].item() == pytest.approx(loop_logp(gpt, ids[:p], ids[p:n]), abs=ROUNDING)


def test_gradients_of_the_tree_equal_those_of_sequences():
    """A speed trick that is right forwards may be wrong backwards (a node's gradient kept once though many
    completions share it): training would then go elsewhere, with correct-looking losses."""
    gpt = loud(GPT(SMALL))
    weights = torch.randn(
        len(PROMPTS), len(ALL.ids), generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    tree = gradients(gpt, (weights * completion_logps(gpt, PROMPTS, ALL)).sum())
    logps = sequence_logps(gpt, explicit_batch(PROMPTS, ALL))
    plain = gradients(gpt, (weights.flatten() * logps).sum())
    largest = max(gradient.abs().max().item() for gradient in plain.values())
    for name in tree:
        # sums of some thousand float64 terms, each no larger than the largest gradient entry; entries that
        # are exactly zero in theory (the keys' bias) are that rounding alone, hence the common scale
        torch.testing.assert_close(tree[name], plain[name], rtol=0, atol=1e-12 * largest)
        if not name.endswith("c_attn.bias"):
            assert tree[name].abs().max() > 1e-6 * largest, name  # nothing is cut off from the gradient


@given(st.integers(0, 2**31 - 1))
def test_tree_of_any_subset_gives_the_same_columns(seed):
    """Fails where a tree relies on its completions being all of them, sorted, distinct or full length:
    a subset in any order, with repetitions, or cut short, must be scored completion by completion."""
    generator = torch.Generator().manual_seed(seed)
    gpt = loud(GPT(SMALL), seed=1)
    chosen = torch.randint(len(ALL.ids), (1 + seed % 9,), generator=generator)
    lengths = ALL.lengths[chosen]
    lengths = (lengths - torch.randint(2, lengths.shape, generator=generator)).clamp(min=1)  # some cut short
    subset = Completions(ALL.ids[chosen], lengths)
    with torch.no_grad():
        logps = completion_logps(gpt, PROMPTS[:1], prefix_tree(subset))
        plain = sequence_logps(gpt, explicit_batch(PROMPTS[:1], subset))
    torch.testing.assert_close(logps[0], plain, rtol=0, atol=ROUNDING)


@given(st.integers(0, 2**31 - 1))
def test_tree_holds_each_prefix_once(seed):
    """A prefix held twice costs time; one held too few times, or with a stranger among its ancestors, is
    scored after the wrong tokens."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(ALL.ids), (1 + seed % 12,), generator=generator)
    tree = prefix_tree(Completions(ALL.ids[chosen], ALL.lengths[chosen]))
    strings = [tuple(ALL.ids[y, : ALL.lengths[y]].tolist()) for y in chosen.tolist()]
    expected = {string[:t] for string in strings for t in range(len(string))}  # what some token follows
    # Spell out each node by its ancestors, ordered by depth; the root (depth 0, no token) is node 0.
    depth = [0, *tree.depth.tolist()]
    tokens = [None, *tree.tokens.tolist()]
    prefixes = []
    for node, row in enumerate(tree.ancestors.tolist()):
        path = sorted((depth[other], tokens[other]) for other, reads in enumerate(row) if reads and other)
        assert row[0] and row[node]
        assert [d for d, _ in path] == list(range(1, depth[node] + 1))
        prefixes.append(tuple(token for _, token in path))
    assert len(prefixes) == len(expected) and set(prefixes) == expected
    for y, string in enumerate(strings):
        for t in range(len(string)):
            assert prefixes[tree.context[y, t]] == string[:t]


def test_a_tree_built_once_serves_any_policy():
    """Fails if a tree kept anything of the model or the prompts it was first used with."""
    tree = prefix_tree(ALL)
    first, second = loud(GPT(SMALL), 0), loud(GPT(SMALL), 1)
    with torch.no_grad():
        for gpt in (first, second, first):
            for prompts in (PROMPTS, PROMPTS[:1, :1]):
                assert torch.equal(completion_logps(gpt, prompts, tree), completion_logps(gpt, prompts, ALL))
        assert torch.equal(EnumeratedPolicy(first, PROMPTS, ALL)(), completion_logps(first, PROMPTS, tree))


def test_conditionals_of_the_table_are_the_networks_own():
    """#66 and #67: the table of a GPT's completions, read back token by token by the closed form, must give
    the GPT's softmax at each step; the optimal policy is read back by the same function."""
    gpt = loud(GPT(SMALL))
    with torch.no_grad():
        table = completion_logps(gpt, PROMPTS, ALL)
        conditionals = next_token_logps(table, ALL.ids, ALL.lengths)  # (X, Y, T)
        for x, prompt in enumerate(PROMPTS.tolist()):
            for y, (ids, n) in enumerate(zip(ALL.ids.tolist(), ALL.lengths.tolist())):
                logps = gpt(torch.tensor([prompt + ids]))[0].log_softmax(-1)
                own = [logps[PROMPT - 1 + t, ids[t]].item() for t in range(n)]
                # each is a difference of two log-probabilities, each within ROUNDING
                assert conditionals[x, y, :n].tolist() == pytest.approx(own, abs=2 * ROUNDING)
                assert (conditionals[x, y, n:] == 0).all()
    torch.testing.assert_close(conditionals.sum(-1), table, rtol=0, atol=ROUNDING)  # telescoping


# ------------------------------------------------------------------------------- what must not be counted


def test_what_lies_beyond_the_length_does_not_matter():
    """#69: padding or stale ids read as text (masking by token id instead of by length)."""
    gpt = loud(GPT(SMALL))
    with torch.no_grad():
        expected = sequence_logps(gpt, ragged_batch(pad=0, extra=2))
        for pad in range(1, VOCAB):  # end-of-text among them
            # bitwise: the same operations on the same numbers wherever a token is scored
            assert torch.equal(sequence_logps(gpt, ragged_batch(pad=pad, extra=2)), expected)


def test_padding_of_completions_does_not_matter_to_the_tree():
    """#69 for the tree: what fills up `Completions.ids` is neither scored nor made a node."""
    gpt = loud(GPT(SMALL))
    beyond = torch.arange(LENGTH) >= ALL.lengths.unsqueeze(-1)
    with torch.no_grad():
        expected = completion_logps(gpt, PROMPTS, ALL)
        for fill in range(VOCAB):
            filled = Completions(ALL.ids.masked_fill(beyond, fill), ALL.lengths)
            assert torch.equal(completion_logps(gpt, PROMPTS, filled), expected)


def test_prompt_tokens_are_context_and_are_not_scored():
    """Counted prompts go unnoticed in DPO, where they cancel, and are wrong in every loss without a pair.
    Moving the boundary by one token must take exactly that token's log-probability away."""
    gpt = loud(GPT(SMALL))
    ids = torch.tensor([[1, 0, 3, 0, 2]])
    with torch.no_grad():
        token_logps = gpt(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        for boundary in range(1, 5):
            logp = sequence_logps(gpt, SequenceBatch(ids, torch.tensor([boundary]), torch.tensor([5])))
            # the same forward pass; only the sum's roundings differ
            assert logp.item() == pytest.approx(token_logps[boundary - 1 :].sum().item(), abs=ROUNDING)


def test_gradient_is_exactly_zero_at_padding():
    """#70: a gradient through padding trains on noise. The input embeddings of all positions that predict
    no completion token's past must get exactly nothing, and those that do must get something."""
    gpt = loud(GPT(SMALL))
    batch = ragged_batch(pad=EOS, extra=3)
    inputs = []
    handle = gpt.wte.register_forward_hook(lambda module, args, output: inputs.append(output))
    logps = sequence_logps(gpt, batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(logps.sum(), inputs)
    place = torch.arange(batch.ids.shape[1])
    read = place < batch.lengths.unsqueeze(-1) - 1  # the last token is predicted, never read
    assert (gradient[~read] == 0).all()
    assert (gradient[read].abs().amax(-1) > 0).all()


def test_no_parameter_feels_which_token_pads():
    """#70: bitwise the same gradients of all parameters whatever token pads, the tied embedding's rows
    (which serve as inputs and as outputs) included."""
    gpt = loud(GPT(SMALL))
    first, second = (
        gradients(gpt, sequence_logps(gpt, ragged_batch(pad=pad, extra=2)).sum()) for pad in (1, EOS)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_more_padding_changes_nothing():
    """#71: a completion's log-probability must not depend on the longest row it happens to sit with."""
    gpt = loud(GPT(SMALL))
    with torch.no_grad():
        expected = sequence_logps(gpt, ragged_batch())
        for extra in (1, 4):
            # another width may add in another order: rounding only
            logps = sequence_logps(gpt, ragged_batch(extra=extra))
            torch.testing.assert_close(logps, expected, rtol=0, atol=ROUNDING)
        for row in range(4):
            alone = sequence_logps(gpt, SequenceBatch(*(field[row : row + 1] for field in ragged_batch())))
            torch.testing.assert_close(alone, expected[row : row + 1], rtol=0, atol=ROUNDING)


def test_an_impossible_token_in_the_padding_gives_no_nan():
    """#72: -inf * 0 is NaN, so a mask that multiplies poisons the sum, and the gradient after it."""
    gpt = loud(ForbiddingGPT(SMALL))
    batch = ragged_batch(pad=EOS, extra=1)
    batch = batch._replace(lengths=batch.lengths - torch.tensor([1, 0, 1, 0]))  # rows 0, 2: end-of-text off
    kept = torch.tensor([0, 2, 3])  # row 1 scores an impossible end-of-text
    cut = Completions(torch.tensor([[0, EOS], [1, 3]]), torch.tensor([1, 2]))
    tree = completion_logps(gpt, PROMPTS, cut)
    plain = sequence_logps(gpt, batch)
    assert torch.isfinite(tree).all() and torch.isfinite(plain[kept]).all()
    for x, prompt in enumerate(PROMPTS.tolist()):
        assert tree[x, 0].item() == pytest.approx(loop_logp(gpt, prompt, [0]), abs=ROUNDING)
    for loss in (tree.sum(), plain[kept].sum()):
        assert all(torch.isfinite(gradient).all() for gradient in gradients(gpt, loss).values())
    assert plain[1].item() == -math.inf  # where it is scored, it counts


# ------------------------------------------------------------------------------------------- end-of-text


def test_end_of_text_is_scored_exactly_once():
    """Doubled, missing, or masked because it doubles as padding. Adding it to a completion must
    add its own conditional, and a completion cut at the maximal length has none."""
    gpt = loud(GPT(SMALL))
    prompt = PROMPTS[:1]
    listed = [tuple(ids[:n]) for ids, n in zip(ALL.ids.tolist(), ALL.lengths.tolist())]
    assert all(string.count(EOS) == (len(string) < LENGTH or string[-1] == EOS) for string in listed)
    with torch.no_grad():
        table = dict(zip(listed, completion_logps(gpt, prompt, ALL)[0].tolist()))
        for string in listed:
            if string[-1] != EOS:
                assert table[string] == pytest.approx(
                    loop_logp(gpt, prompt[0].tolist(), list(string)), abs=ROUNDING
                )
                continue
            without = torch.tensor([prompt[0].tolist() + list(string[:-1])])
            end = gpt(without)[0, -1].log_softmax(-1)[EOS].item()
            words = loop_logp(gpt, prompt[0].tolist(), list(string[:-1]))
            assert table[string] == pytest.approx(words + end, abs=ROUNDING)


# ------------------------------------------------------------------------------------------------ dtypes


def test_bfloat16_models_are_summed_in_float32():
    """#76: near 500 bfloat16 is spaced by 2, so a sum (or a difference) kept in it loses whole nats."""
    config = GPTConfig(vocab_size=64, block_size=160, n_layer=1, n_head=2, n_embd=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(config).bfloat16()
    T = config.block_size
    ids = torch.randint(64, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logps = sequence_logps(gpt, SequenceBatch(ids, torch.tensor([1, 1]), torch.tensor([T, T - 20])))
        tree = completion_logps(gpt, ids[:, :1], Completions(ids[:1, 1:], torch.tensor([T - 1])))
        logits = gpt(ids)[:, :-1].double()
    token_logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = torch.stack([token_logps[0].sum(), token_logps[1, : T - 21].sum()])
    assert logps.dtype == tree.dtype == torch.float32
    assert (expected < -500).all()
    # The logits themselves are bfloat16 numbers below 1/2 and may differ by one spacing (2^-9) at most,
    # where a kernel adds in another order; 160 terms of that is 0.31, against half a spacing of 1 nat.
    assert logits.abs().max() < 0.5
    assert (logps - expected).abs().max() <= T * 2**-9
    assert abs(tree[0, 0] - expected[0]) <= T * 2**-9
    assert not torch.equal(logps, logps.bfloat16().float())


def test_dtype_follows_the_model_from_float32_up():
    """A float64 evaluation silently done in float32 would limit every distance to 1e-6."""
    gpt = GPT(SMALL)
    for dtype in (torch.float32, torch.float64):
        gpt = gpt.to(dtype)
        assert sequence_logps(gpt, ragged_batch()).dtype == dtype
        assert completion_logps(gpt, PROMPTS, ALL).dtype == dtype


# ------------------------------------------------------------------------------------------------- doors


@pytest.mark.parametrize(
    ("prompt_lengths", "lengths", "named"),
    [
        ([2, 5], [4, 5], "row 1 has an empty completion"),
        ([4, 2], [3, 5], "row 0 has an empty completion"),
        ([0, 2], [4, 5], "prompt of at least one token"),
        ([2, 2], [4, 6], "length within the row"),
        ([2], [4, 5], r"prompt_lengths and lengths must have shape \(2,\)"),
        ([2, 2], [4], r"prompt_lengths and lengths must have shape \(2,\)"),
    ],
)
def test_sequences_that_cannot_be_scored_are_refused(prompt_lengths, lengths, named):
    """An empty completion would be scored 0, the log-probability of certainty; (1,) lengths would
    broadcast to all rows."""
    batch = SequenceBatch(
        torch.zeros(2, 5, dtype=torch.long), torch.tensor(prompt_lengths), torch.tensor(lengths)
    )
    with pytest.raises(InputError, match=rf"^[^\n]*{named}[^\n]*\.$"):
        sequence_logps(GPT(SMALL), batch)


@pytest.mark.parametrize("wrong", [-100, -1, SMALL.vocab_size])
def test_ids_beyond_the_vocabulary_are_refused(wrong):
    """-100 is how other libraries pad. A completion's last id is never read, only looked up among the logits,
    where -1 is somebody else's; and a GPT on a GPU would end the process."""
    gpt, prompts = GPT(SMALL), torch.zeros(2, 1, dtype=torch.long)
    ids = torch.zeros(2, 4, dtype=torch.long)
    ids[1, 3] = wrong
    named = rf"must lie in \[0, {SMALL.vocab_size}\), padding included, got [-\d]+ to \d+\.$"
    for call in (
        lambda: gpt(ids),
        lambda: sequence_logps(gpt, SequenceBatch(ids, torch.tensor([1, 1]), torch.tensor([4, 3]))),
        lambda: completion_logps(gpt, prompts, Completions(ids, torch.tensor([4, 4]))),
    ):
        with pytest.raises(InputError, match=named):
            call()
    with pytest.raises(InputError, match=r"a row of ids \(B, T\)\.$"):
        sequence_logps(gpt, SequenceBatch(ids[0], torch.tensor([1]), torch.tensor([4])))


@pytest.mark.parametrize("lengths", [[0, 2], [1, 4], [1], [[1, 1]]])
def test_completions_that_cannot_be_scored_are_refused(lengths):
    """A length of 0 would score nothing, one beyond the row would read another completion's tokens."""
    completions = Completions(torch.zeros(2, 3, dtype=torch.long), torch.tensor(lengths))
    with pytest.raises(InputError, match=r"^lengths must have shape \(2,\) with entries from 1 to 3\.$"):
        prefix_tree(completions)


@pytest.mark.parametrize("shape", [(2,), (0, 2), (2, 0), (1, 2, 2)])
def test_prompts_of_another_shape_are_refused(shape):
    """An empty prompt has no position that predicts the first token."""
    with pytest.raises(InputError, match=r"^prompts must have shape \(X, P\) [^\n]*\.$"):
        completion_logps(GPT(SMALL), torch.zeros(shape, dtype=torch.long), ALL)


def test_completions_beyond_the_context_are_refused():
    """Positions beyond the context would be an IndexError that names neither prompt nor completion. The last
    token is predicted and never read, so P + T - 1 positions are enough."""
    gpt = GPT(SMALL)
    fits = torch.zeros(1, SMALL.block_size - LENGTH + 1, dtype=torch.long)
    assert torch.isfinite(completion_logps(gpt, fits, ALL)).all()
    with pytest.raises(ValueError, match=r"^[^\n]*exceeds the context of 12[^\n]*\.$"):
        completion_logps(gpt, torch.zeros(1, SMALL.block_size - LENGTH + 2, dtype=torch.long), ALL)


# -------------------------------------------------------------------------------------- frozen reference


def digest(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def test_the_reference_stays_frozen_through_training(monkeypatch):
    """#77: a reference that is the policy itself, not a copy, moves along with it, and the loss
    stays at ln 2 although "training" runs. Hashes of its parameters and its table must not move."""
    seen = []
    make_world = convergence.gpt_world

    def spy(settings):
        world = make_world(settings)
        seen.append((world[0], digest(world[0])))
        return world

    monkeypatch.setattr(convergence, "gpt_world", spy)
    monkeypatch.setattr(convergence, "MAX_LENGTH", 2)  # 21 completions instead of 341
    settings = convergence.Settings(beta=0.5, pairs=1, table_steps=1, gpt_steps=20, seed=3, device="cpu")
    outcome = convergence.gpt_population(settings)
    ((reference, before),) = seen
    _, prompts, completions, _, _ = make_world(settings)
    assert digest(reference) == before
    assert all(parameter.grad is None for parameter in reference.parameters())
    with torch.no_grad():
        table = EnumeratedPolicy(reference.double(), prompts, completions)()
    assert torch.equal(table, outcome.ref_logps)
    assert not outcome.ref_logps.requires_grad
    # and the policy did move, away from the loss of the untrained pair
    assert outcome.records[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)  # float64, one logsigmoid
    assert outcome.records[-1]["loss"] < outcome.records[0]["loss"] - 1e-3
    assert (outcome.logps - outcome.ref_logps).abs().max() > 0.1


def test_a_tables_reference_stays_frozen_through_training():
    """#77 for the table: the policy's logits start as a copy, so training must not write into the world."""
    settings = convergence.Settings(beta=0.5, pairs=1, table_steps=20, gpt_steps=1, seed=3, device="cpu")
    world = random_bandit(2, 4, generator=torch.Generator().manual_seed(0))
    before = world.ref_logps.clone()
    outcome = convergence.tabular(world, settings)
    assert torch.equal(world.ref_logps, before) and torch.equal(outcome.ref_logps, before)
    assert (outcome.logps - before).abs().max() > 0.1
