"""What a policy does when it speaks: its samples, their divergence from a reference, their reward.

A loss on pairs says how well the policy orders other people's completions; only its own samples say what it
has become.

But: sampling is generation.py's, scoring policy.py's; here they are put together, in chunks.

Shapes: N prompts, one sample each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .generation import generate, rows_at_once
from .model import GPT
from .policy import shared_prompt_batch, shared_prompt_logps
from .tokenizer import Tokenizer


class Mean(NamedTuple):
    """A mean over independent draws and its standard error [D7.6]."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:z.2f}" + (f" ± {self.error:.2f}" if math.isfinite(self.error) else "")


def mean_of(values: Tensor) -> Mean:
    """(N,) -> mean and standard error, which is NaN for a single draw [D7.6]."""
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(values.mean().item(), error)


class Samples(NamedTuple):
    """One sample of each of N prompts [D7.6].

    Fields:
        prompts, texts: N strings each.
        ended: (N,) whether it ended by itself, with end-of-text.
        lengths: (N,) tokens, end-of-text included.
        log_ratios: (N,) log pi(y|x) - log pi_ref(y|x), nats; their mean estimates KL(pi || pi_ref).
        rewards: (N,) true rewards, or None where nobody knows them.
    """

    prompts: list[str]
    texts: list[str]
    ended: Tensor
    lengths: Tensor
    log_ratios: Tensor
    rewards: Tensor | None


def sample(
    model: GPT,
    reference: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    reward: Callable[[str], float] | None = None,
) -> Samples:
    """Sample each prompt once at temperature 1, and compare with the reference [D7.6].

    Args:
        model, reference: on one device; the reference may be the model itself.
        prompts: N texts; an empty one starts from end-of-text. A prompt too long for the context loses its
            left end, as in training.
        max_new_tokens: where a sample is cut.
        reward: completion text -> true reward.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    room = model.config.block_size - max_new_tokens
    ids = [(tokenizer.encode(prompt) or [tokenizer.eot])[-room:] for prompt in prompts]
    completions: list[list[int]] = []
    ratios = []
    together = rows_at_once(model, max(map(len, ids)) + max_new_tokens)
    for start in range(0, len(ids), together):
        some = ids[start : start + together]
        drawn = generate(model, some, max_new_tokens=max_new_tokens, eos=tokenizer.eot, generator=generator)
        completions += drawn
        batch = shared_prompt_batch(some, [[y] for y in drawn]).to(model.wte.weight.device)
        with torch.no_grad():
            ratios.append(shared_prompt_logps(model, batch) - shared_prompt_logps(reference, batch))
    texts = [tokenizer.decode(y) for y in completions]
    return Samples(
        list(prompts),
        texts,
        torch.tensor([y[-1] == tokenizer.eot for y in completions]),
        torch.tensor([len(y) for y in completions]),
        torch.cat(ratios)[:, 0].cpu(),
        None if reward is None else torch.tensor([reward(text) for text in texts]),
    )
