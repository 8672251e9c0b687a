"""GPT-2 in plain PyTorch: learned positions, pre-norm blocks, tanh-GELU, tied output head.

Parameter names are those of the released GPT-2 (wte, wpe, h.0.attn.c_attn, ...), so a checkpoint reads
like the code:

    GPT  =  token + position embeddings  ->  n_layer x Block  ->  LayerNorm  ->  logits through wte
    Block = x + Attention(LN(x));  x + MLP(LN(x))

But: no dropout (policy and reference must give the same log-probability twice), no training loop
(train.py), no scoring or sampling (policy.py), no file formats.

Shapes: B sequences, T tokens, C = n_embd channels, H heads, D = C / H channels a head, V vocabulary,
S slots of a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .validation import InputError, check_ids


@dataclass(frozen=True)
class GPTConfig:
    """The five numbers that fix a GPT-2's shape; `GPTConfig.preset("gpt2")` gives released ones [D9.1].

    Raises InputError where a number is not a positive integer or n_head does not divide n_embd.
    """

    vocab_size: int
    block_size: int  # longest sequence: the number of learned positions
    n_layer: int
    n_head: int
    n_embd: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"GPTConfig: {name} must be a positive integer, got {value!r}.")
        if self.n_embd % self.n_head:
            raise InputError(
                f"GPTConfig: n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})."
            )

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """The shape of a released model: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"."""
        if name not in _PRESETS:
            raise InputError(f"GPTConfig: no preset {name!r}; choose one of {', '.join(_PRESETS)}.")
        n_layer, n_head, n_embd = _PRESETS[name]
        return cls(vocab_size=50257, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


_PRESETS = {
    "gpt2": (12, 12, 768),  # 124M parameters
    "gpt2-medium": (24, 16, 1024),  # 355M
    "gpt2-large": (36, 20, 1280),  # 774M
    "gpt2-xl": (48, 25, 1600),  # 1558M
}


class Attention(nn.Module):
    """Multi-head self-attention: every position reads from the positions that its mask row allows."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, *kv = heads = heads.permute(2, 0, 3, 1, 4)  # (B, T, 3, H, D) -> three of (B, H, T, D)
        if cache is not None:
            kv = cache.append(heads[1:])  # (B, H, filled, D): what came before, and this
        y = _attend(q, *kv, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, H, T, D) -> (B, T, C)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v over what the mask allows; without a mask, causal."""
    one = mask is not None and q.shape[-2] == 1
    if q.device.type != "cpu" or (q.dtype != torch.bfloat16 and not one):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # On a CPU the fused kernel takes longer than these lines for one query, as in sampling; and in bfloat16
    # its backward pass five times as long.
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
    return scores.softmax(-1).to(v.dtype) @ v


class LayerCache:
    """One layer's keys and values of the tokens read so far, so that sampling reads each token once [D9.1].

    Keys and values are (2, B, H, S, D), for S = `slots` tokens a row, of which the first `filled` are read.
    """

    def __init__(self, config: GPTConfig, rows: int, slots: int, like: Tensor):
        width = config.n_embd // config.n_head
        self.keys_values = like.new_empty(2, rows, config.n_head, slots, width)
        self.filled = 0

    def append(self, keys_values: Tensor) -> Tensor:
        """Add (2, B, H, T, D) of T more tokens; return those of all tokens so far."""
        start, self.filled = self.filled, self.filled + keys_values.shape[3]
        self.keys_values[..., start : self.filled, :] = keys_values
        return self.keys_values[..., : self.filled, :]

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only: (B,) true for those."""
        self.keys_values = self.keys_values[:, rows]


class MLP(nn.Module):
    """Two linear maps with a tanh-approximated GELU between; the released weights need that form."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block: each half adds to x what it computes from the normalised x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token ids in, next-token logits out [D9.1].

    `forward(ids)` gives the logits of every position. Code that needs only some positions calls `hidden` and
    then `project` on those, because projecting onto the vocabulary takes most of a small model's time.

    Example:
        >>> gpt = GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8))
        >>> gpt(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 7])
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self._initialise()

    def _initialise(self) -> None:
        """OpenAI's: normal weights of deviation 0.02 (positions 0.01), biases 0, LayerNorm the identity;
        projections into the residual stream are divided by the root of their number."""
        projections = 2 * self.config.n_layer
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" not in name:
                deviation = 0.01 if name == "wpe.weight" else 0.02
                if name.endswith("c_proj.weight"):
                    deviation /= projections**0.5
                nn.init.normal_(parameter, std=deviation)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V); logits[:, t] predict token t + 1."""
        return self.project(self.hidden(ids))

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """The normalised last hidden state, (B, T, C).

        Args:
            ids: (B, T) token ids.
            positions: (T,) or (B, T) position of each token; by default those after what the caches hold.
            mask: (T, T) or (B, 1, T, T) boolean, True where row may read column; by default causal. With
                the positions it lets one call hold a whole tree of continuations (policy.py).
            caches: what earlier calls read (`empty_caches`), extended by this call; the mask then has a
                column for each token read so far.
        Raises:
            InputError: ids of another shape or beyond the vocabulary, or positions beyond the context.
        """
        if ids.dim() != 2 or ids.numel() == 0:
            raise InputError(f"GPT: ids must have shape (B, T) and not be empty, got {tuple(ids.shape)}.")
        check_ids("GPT: ids", ids, self.config.vocab_size)
        T, start = ids.shape[1], 0 if caches is None else caches[0].filled
        longest = start + T if positions is None else int(positions.max()) + 1
        if longest > self.config.block_size:
            raise InputError(
                f"GPT: a sequence of {longest} tokens exceeds the context of {self.config.block_size}; "
                "shorten it or raise block_size."
            )
        if positions is None:
            positions = torch.arange(start, start + T, device=ids.device)
        if mask is None and start > 0:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=ids.device).tril(start)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C) + (T, C) or (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, mask, None if caches is None else caches[layer])
        return self.ln_f(x)

    def empty_caches(self, rows: int, slots: int) -> list[LayerCache]:
        """One cache a layer, each for `slots` tokens of `rows` sequences."""
        return [LayerCache(self.config, rows, slots, like=self.wte.weight) for _ in self.h]

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V), through the tied token embedding."""
        return F.linear(hidden, self.wte.weight)
