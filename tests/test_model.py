"""The GPT against a slow second implementation, and what its numbers at birth must be."""

import math

import pytest
import torch
from torch import nn

from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.validation import InputError

SMALL = GPTConfig(vocab_size=11, block_size=9, n_layer=3, n_head=2, n_embd=8)


def loud_gpt(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """A float64 GPT all of whose parameters, biases and LayerNorms included, matter to its output."""
    gpt = GPT(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return gpt


def random_ids(rows: int, length: int, config: GPTConfig = SMALL, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_one_sentence(message: str) -> None:
    assert message.endswith(".") and "\n" not in message and ". " not in message, message


# ------------------------------------------------------------------------------------ the slow reference


def slow_layer_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + 1e-5).sqrt() * gain + bias  # 1e-5 is the released model's epsilon


def slow_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def slow_logits(weights: dict[str, torch.Tensor], config: GPTConfig, ids: list[int]) -> torch.Tensor:
    """One sequence, position by position and head by head, from the released parameters' names alone."""
    D = config.n_embd // config.n_head

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oi,i->o", weights[f"{name}.weight"], x) + weights[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return slow_layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    stream = [weights["wte.weight"][token] + weights["wpe.weight"][t] for t, token in enumerate(ids)]
    for layer in range(config.n_layer):
        qkv = [linear(f"h.{layer}.attn.c_attn", norm(f"h.{layer}.ln_1", x)) for x in stream]
        for t in range(len(ids)):
            heads = []
            for head in range(config.n_head):
                query, key, value = (
                    slice(part * config.n_embd + head * D, part * config.n_embd + (head + 1) * D)
                    for part in range(3)
                )
                scores = [(qkv[t][query] * qkv[s][key]).sum() / math.sqrt(D) for s in range(t + 1)]
                chances = [score.exp() for score in scores]
                total = sum(chances)
                heads.append(sum(chance / total * qkv[s][value] for s, chance in enumerate(chances)))
            stream[t] = stream[t] + linear(f"h.{layer}.attn.c_proj", torch.cat(heads))
        for t in range(len(ids)):
            inner = slow_gelu(linear(f"h.{layer}.mlp.c_fc", norm(f"h.{layer}.ln_2", stream[t])))
            stream[t] = stream[t] + linear(f"h.{layer}.mlp.c_proj", inner)
    return torch.stack([weights["wte.weight"] @ norm("ln_f", x) for x in stream])


def test_logits_equal_a_slow_second_implementation():
    """Fails on a wrong head split, missing 1/sqrt(D), post-norm blocks, erf instead of tanh GELU, a wrong
    LayerNorm epsilon, an untied head, or positions off by one: each moves logits far beyond rounding."""
    gpt = loud_gpt()
    ids = random_ids(3, SMALL.block_size)
    weights = gpt.state_dict()
    expected = torch.stack([slow_logits(weights, SMALL, row) for row in ids.tolist()])
    with torch.no_grad():
        logits = gpt(ids)
    # float64: a few hundred roundings of 1.1e-16 on numbers of size up to about 10, amplified by LayerNorm;
    # a subtle mistake, erf for tanh in the GELU, moves logits by about 3e-4.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


def test_the_reference_implementation_feels_every_parameter():
    """Guards the test above: had some parameter no effect on the slow logits, a mistake in how the GPT uses
    it would go unseen. The key part of c_attn.bias alone has none: softmax ignores what it adds."""
    weights = {name: value.requires_grad_() for name, value in loud_gpt().state_dict().items()}
    slow_logits(weights, SMALL, random_ids(1, SMALL.block_size)[0].tolist()).square().sum().backward()
    C = SMALL.n_embd
    for name, value in weights.items():
        if name.endswith("c_attn.bias"):
            assert (value.grad[:C] != 0).all() and (value.grad[2 * C :] != 0).all(), name
        else:
            assert (value.grad != 0).all(), name


# ----------------------------------------------------------------------------------------- causality, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_later_tokens_change_nothing_before_them(dtype):
    """#73: a leak from the future makes the trained "conditional" probabilities no conditionals at all."""
    gpt = loud_gpt().to(dtype)
    ids = random_ids(4, SMALL.block_size)
    with torch.no_grad():
        logits = gpt(ids)
        for t in range(1, SMALL.block_size):
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 1 + random_ids(4, SMALL.block_size - t, seed=t)) % 11
            # bitwise: the same operations on the same numbers, as the shapes are the same
            assert torch.equal(gpt(changed)[:, :t], logits[:, :t])
            assert not torch.equal(gpt(changed)[:, t:], logits[:, t:])


def test_earlier_tokens_do_matter():
    """The counterpart of #73: a mask that hides everything but the present passes the causality test."""
    gpt = loud_gpt()
    ids = random_ids(1, SMALL.block_size)
    with torch.no_grad():
        last = gpt(ids)[0, -1]
        for t in range(SMALL.block_size - 1):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
            # far above the 1e-14 of rounding: the token's effect is of the order of the logits themselves
            assert (gpt(changed)[0, -1] - last).abs().max() > 1e-3


def test_explicit_positions_and_mask_equal_the_causal_default():
    """If they differ, a tree of continuations (policy.py) is scored by another model than a sequence is."""
    gpt = loud_gpt()
    T = 7
    ids = random_ids(2, T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    with torch.no_grad():
        default = gpt.hidden(ids)
        explicit = gpt.hidden(ids, torch.arange(T), causal)
        # another attention kernel may add in another order: some hundred roundings of 1e-16 at size 3
        torch.testing.assert_close(explicit, default, rtol=0, atol=1e-12)
        torch.testing.assert_close(gpt.project(explicit), gpt(ids), rtol=0, atol=1e-11)


def test_a_permuted_sequence_gives_the_permuted_result():
    """Fails if `positions` or `mask` were ignored or indexed the wrong way round (row reads column)."""
    gpt = loud_gpt()
    T = 6
    ids = random_ids(2, T)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mask = order.unsqueeze(1) >= order.unsqueeze(0)  # whoever comes earlier in time may be read
    with torch.no_grad():
        shuffled = gpt.hidden(ids[:, order], order, mask)
        # sums in another order: rounding of 1e-16 on numbers of size 3
        torch.testing.assert_close(shuffled, gpt.hidden(ids)[:, order], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------- size, head, dropout


@pytest.mark.parametrize(
    ("name", "layers", "width"),
    [("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600)],
)
def test_preset_has_the_released_number_of_parameters(name, layers, width):
    """Fails on an untied head, a missing bias or a wrong MLP width: a released checkpoint would not fit."""
    with torch.device("meta"):  # shapes only: nothing is allocated
        gpt = GPT(GPTConfig.preset(name))
    embeddings = 50257 * width + 1024 * width
    norm = 2 * width
    attention = (width + 1) * 3 * width + (width + 1) * width
    mlp = (width + 1) * 4 * width + (4 * width + 1) * width
    formula = embeddings + layers * (2 * norm + attention + mlp) + norm
    assert sum(parameter.numel() for parameter in gpt.parameters()) == formula
    if name == "gpt2":  # the published size of the smallest model, here to check the formula itself
        assert formula == 124_439_808
    assert all(parameter.is_meta for parameter in gpt.parameters())


def test_the_head_is_the_token_embedding():
    """An untied head would leave the logits unchanged when the embedding of an unread token moves."""
    gpt = loud_gpt()
    ids = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        before = gpt(ids)
        gpt.wte.weight[5] += 1.0  # token 5 is not among the inputs
        after = gpt(ids)
        expected = gpt.hidden(ids).sum(-1)  # its logit rises by the sum of the hidden state, the others stay
    others = torch.arange(SMALL.vocab_size) != 5
    assert torch.equal(after[..., others], before[..., others])
    # one rounding of a sum of 8 terms of size up to 10
    torch.testing.assert_close(after[..., 5] - before[..., 5], expected, rtol=0, atol=1e-12)
    assert not any("head" in name for name, _ in gpt.named_parameters())


def test_two_calls_in_training_mode_agree_bitwise():
    """Dropout makes policy and reference disagree at step 0, and the loss there is not ln 2."""
    gpt = loud_gpt().train()
    ids = random_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(gpt(ids), gpt(ids))
        assert torch.equal(gpt(ids), gpt.eval()(ids))
    assert not any(isinstance(module, nn.Dropout) for module in gpt.modules())


# ------------------------------------------------------------------------------------------ initialisation


def test_initial_weights_follow_openai():
    """Fails on a forgotten 1/sqrt(2 n_layer), on torch's own Linear or Embedding initialisation, or on
    positions drawn like tokens: the model would still train, but not like GPT-2."""
    config = GPTConfig(vocab_size=150, block_size=64, n_layer=3, n_head=4, n_embd=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(config)
    matrices = 0
    # False-alarm rate 1e-6 over all tests below: two tails of a variance and a mean for each matrix.
    t = math.log(4 * (2 + 4 * config.n_layer) / 1e-6)
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            matrices += 1
            deviation = 0.01 if name == "wpe.weight" else 0.02
            if name.endswith("c_proj.weight"):
                deviation = 0.02 / math.sqrt(2 * config.n_layer)
            n = parameter.numel()
            ratio = (parameter.double() / deviation).square().mean().item()
            # n * ratio is chi-square with n degrees: Laurent and Massart's bounds, valid at every n
            assert -2 * math.sqrt(t / n) <= ratio - 1 <= 2 * math.sqrt(t / n) + 2 * t / n, name
            # the mean of n normal draws: its Gaussian tail
            assert abs(parameter.double().mean().item()) <= deviation * math.sqrt(2 * t / n), name
    assert matrices == 2 + 4 * config.n_layer


def test_initial_weights_are_independent_draws():
    """Fails if layers were copies of one another or reseeded: then layers would start out alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = GPT(SMALL), GPT(SMALL)
    assert not torch.equal(first.h[0].mlp.c_fc.weight, first.h[1].mlp.c_fc.weight)
    assert not torch.equal(first.wte.weight, second.wte.weight)


# --------------------------------------------------------------------------------------------------- doors


@pytest.mark.parametrize("field", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_bad_config_is_refused(field, value):
    """A bad shape must be named at the door, not surface as a reshape error three calls later."""
    good = {"vocab_size": 5, "block_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 8}
    with pytest.raises(ValueError) as caught:
        GPTConfig(**{**good, field: value})
    assert_one_sentence(str(caught.value))
    assert field in str(caught.value) and repr(value) in str(caught.value)


def test_heads_must_divide_the_width():
    """Otherwise channels would be dropped by the integer division in silence, or view() would fail."""
    with pytest.raises(ValueError) as caught:
        GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=3, n_embd=8)
    assert_one_sentence(str(caught.value))
    assert "n_embd (8)" in str(caught.value) and "n_head (3)" in str(caught.value)


def test_unknown_preset_is_refused_with_the_choices():
    """A KeyError would not say which names there are."""
    with pytest.raises(ValueError) as caught:
        GPTConfig.preset("gpt3")
    assert_one_sentence(str(caught.value))
    for name in ("gpt3", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        assert name in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (2, 0), (2, 3, 4), ()])
def test_ids_of_another_shape_are_refused(shape):
    """(T,) ids would broadcast against the positions to (T, C) and fail, or worse pass, further down."""
    with pytest.raises(ValueError) as caught:
        GPT(SMALL)(torch.zeros(shape, dtype=torch.long))
    assert_one_sentence(str(caught.value))
    assert str(tuple(shape)) in str(caught.value)


def test_a_sequence_beyond_the_context_is_refused():
    """An IndexError from the position embedding would not tell the user what to shorten."""
    gpt = GPT(SMALL)
    T = SMALL.block_size
    assert gpt(torch.zeros(1, T, dtype=torch.long)).shape == (1, T, SMALL.vocab_size)  # the longest allowed
    for ids, positions in [
        (torch.zeros(1, T + 1, dtype=torch.long), None),
        (torch.zeros(1, 2, dtype=torch.long), torch.tensor([0, T])),
    ]:
        with pytest.raises(ValueError) as caught:
            gpt.hidden(ids, positions)
        assert_one_sentence(str(caught.value))
        assert str(T + 1) in str(caught.value) and str(T) in str(caught.value)


def test_more_tokens_than_the_context_are_fine_where_positions_repeat():
    """The limit is on positions, not on tokens: a tree of many short continuations must pass."""
    T = 2 * SMALL.block_size
    hidden = GPT(SMALL).hidden(
        torch.zeros(1, T, dtype=torch.long), torch.zeros(T, dtype=torch.long), torch.eye(T, dtype=torch.bool)
    )
    # every token sees only itself, at position 0: all rows hold the same numbers (float32, up to 1e-6)
    torch.testing.assert_close(hidden, hidden[:, :1].expand_as(hidden), rtol=0, atol=1e-5)


def test_a_cache_goes_on_where_it_ended():
    """Called again without positions or mask, the model goes on behind what the caches hold, causally. It
    read the second piece as if it were the first, and each token could see those after it."""
    gpt, ids = loud_gpt(), random_ids(2, 9)
    for sizes in ([1, 2, 6], [4, 3, 2]):
        whole, caches = gpt.hidden(ids), gpt.empty_caches(2, 9)
        pieces = [gpt.hidden(piece, caches=caches) for piece in ids.split(sizes, dim=1)]
        # float64 roundings, amplified by these weights; another position or neighbour moves it by about 1.
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-11)
    with pytest.raises(InputError, match="a sequence of 10 tokens exceeds the context of 9"):
        gpt.hidden(ids[:, :1], caches=caches)
