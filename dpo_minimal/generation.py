"""Samples from a GPT, one token at a time for many prompts at once, with the keys and values kept.

`generate` is also importable from policy.py, where log pi(y|x) of what it draws is computed.

Shapes: B prompts, P tokens of the longest, V vocabulary, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import GPT
from .validation import InputError, check_count, check_positive, widen


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Sample one completion of each prompt [D9.1].

    Each token is drawn from `sampling_probabilities` of the model's logits. With temperature 1 and neither
    top_k nor top_p that is the policy itself: exp(sequence_logps) is the probability of a completion that
    ended with end-of-text. Prompts may differ in length: they are right-padded, the padding is masked, and
    each row counts its own positions. Of many prompts, `rows_at_once` go through the model together.

    Args:
        model: the policy; it is not changed.
        prompts: B sequences of token ids, none empty.
        max_new_tokens: where to cut a completion that does not end by itself.
        eos: the end-of-text id, at which a completion ends; None never ends early.
        temperature, top_k, top_p: see `sampling_probabilities`; temperature 0 takes the likeliest token.
        generator: source of randomness, on the model's device; the same seed and prompts give the same
            samples.
    Returns:
        B lists of token ids without their prompts, the end-of-text included where it was drawn.
    Raises:
        InputError: an empty prompt, a prompt that with max_new_tokens exceeds the context, an option out of
            range or unused.

    Example:
        >>> from dpo_minimal.model import GPT, GPTConfig
        >>> gpt = GPT(GPTConfig(vocab_size=7, block_size=16, n_layer=1, n_head=2, n_embd=8))
        >>> [len(ids) for ids in generate(gpt, [[1, 2, 3], [4]], max_new_tokens=5)]
        [5, 5]
    """
    _check(model, prompts, max_new_tokens, eos, temperature, top_k, top_p)
    cut, rows = (temperature, top_k, top_p), []
    together = rows_at_once(model, max(map(len, prompts)) + max_new_tokens)
    with torch.inference_mode():
        for start in range(0, len(prompts), together):
            some = prompts[start : start + together]
            rows += _generate(model, some, max_new_tokens, eos, cut, generator).tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def rows_at_once(model: GPT, slots: int) -> int:
    """How many rows of so many tokens have caches of at most a gigabyte together; at most 512 [D9.1]."""
    bytes_each = 2 * model.config.n_layer * model.config.n_embd * slots * model.wte.weight.element_size()
    return max(1, min(512, 2**30 // bytes_each))


def _generate(model: GPT, prompts, max_new_tokens: int, eos, cut, generator) -> Tensor:
    """(B, max_new_tokens) ids; what follows an end-of-text is to be ignored."""
    temperature, top_k, top_p = cut
    device = model.wte.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    B, P = len(prompts), int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (P - len(prompt))] for prompt in prompts], device=device)
    slots = torch.arange(P + max_new_tokens, device=device)
    readable = (slots < lengths.unsqueeze(-1)) | (slots >= P)  # (B, S): not the padding of the prompts
    caches = model.empty_caches(B, len(slots))

    causal = torch.ones(P, P, dtype=torch.bool, device=device).tril()
    hidden = model.hidden(ids, mask=causal, caches=caches)[torch.arange(B, device=device), lengths - 1]
    drawn = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    rows, running = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        probabilities = sampling_probabilities(
            model.project(hidden), temperature=temperature, top_k=top_k, top_p=top_p
        )
        # A number for every prompt, ended or not, so that a row's numbers do not depend on the other rows.
        uniform = torch.rand(B, 1, dtype=torch.float64, generator=generator, device=device)
        token = _draw(probabilities, uniform[rows])  # (running rows, 1)
        drawn[rows, step] = token.squeeze(-1)
        if eos is not None:
            running &= token.squeeze(-1) != eos
            if 4 * running.sum() <= 3 * len(rows):  # a quarter have ended: go on with the others alone
                rows, lengths, readable, token = (x[running] for x in (rows, lengths, readable, token))
                for cache in caches:
                    cache.keep(running)
                running = running[running]
                if len(rows) == 0:
                    break
        if step + 1 < max_new_tokens:
            mask = readable[:, None, None, : P + step + 1]  # (B, 1, 1, filled)
            hidden = model.hidden(token, (lengths + step).unsqueeze(-1), mask, caches).squeeze(1)
    return drawn


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B, V) -> (B, 1): where a number in [0, 1) of each row, (B, 1), falls in the cumulated probabilities.

    torch.multinomial draws a number for each entry of the vocabulary, a tenth of the time of a sample. In
    float64, so that the sum's rounding (1e-16) never reaches a token that is to have no probability.
    """
    cumulated = probabilities.double().cumsum(-1)
    if not torch.isfinite(cumulated[:, -1]).all():
        raise InputError("the model's logits are not finite: its weights are damaged; use earlier ones.")
    token = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return token.clamp_(max=probabilities.shape[-1] - 1)


def sampling_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution from which the next token is drawn: softmax(logits / temperature), cut and
    normalised again [D9.1].

    Args:
        logits: (..., V).
        temperature: > 0 flattens (above 1) or sharpens (below 1); 0 puts all on the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: of what is left keep the fewest likeliest tokens that together have at least this
            probability.
    Returns:
        (..., V), float32 or wider.

    Example:
        >>> sampling_probabilities(torch.tensor([0.5, 0.3, 0.2]).log(), top_p=0.7)
        tensor([0.6250, 0.3750, 0.0000])
    """
    logits = widen(logits)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    if temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # 0 / 1e-40, not infinity
    probabilities = logits.softmax(-1)
    if top_k is None and top_p in (None, 1):
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered = F.pad(ordered[..., :top_k], (0, max(0, ordered.shape[-1] - top_k)))
    if top_p not in (None, 1):  # in float64: a large vocabulary's tail is less than float32's rounding
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered  # what the likelier tokens have together
        ordered = ordered.masked_fill(before >= top_p * (before + ordered)[..., -1:], 0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(ordered).scatter(-1, index, ordered)


def _check(model: GPT, prompts, max_new_tokens: int, eos, temperature: float, top_k, top_p) -> None:
    check_count("max_new_tokens", max_new_tokens)
    if not prompts:
        raise InputError("generate needs at least one prompt.")
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; start from end-of-text instead.")
        if len(prompt) + max_new_tokens > block_size:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, more than "
                f"the context of {block_size}; shorten one of them."
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InputError(f"prompt {number} holds an id outside the vocabulary of {vocab_size} tokens.")
    if eos is not None and not 0 <= eos < vocab_size:
        raise InputError(f"eos must lie in [0, {vocab_size}), got {eos}.")
    if temperature != 0:
        check_positive("temperature", temperature)
    elif top_k is not None or top_p is not None:
        raise InputError("temperature 0 takes the likeliest token, so top_k and top_p are unused; omit them.")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise InputError(f"top_p must lie in (0, 1], got {top_p!r}; 1 keeps all tokens.")
