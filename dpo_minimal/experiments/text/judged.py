"""Preferences between a model's own completions, judged by a known reward: the protocol of the paper's 6.1.

    prompts  ->  K samples of each from the SFT model  ->  true rewards  ->  Plackett-Luce ranking (Eq. 18)

For K = 2 that is Bradley-Terry. Pairs that the reference itself has drawn are the ones DPO is derived for:
they lie where the policy will be judged, and teach no words that the reference does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from ...generation import generate, rows_at_once
from ...text.reviews import prompts
from ...validation import InputError
from .setup import Policy


def judged_samples(
    policy: Policy, count: int, K: int, *, reward: Callable[[str], float], max_new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Rows {"prompt", "responses", "ranking"} of K different samples each, rank 1 for the best.

    A prompt is passed over where a sample did not end, is blank, or came twice: what was cut has no end to
    learn, and equal answers have no order. Ranks are drawn, so with probability 1 - sigmoid(r1 - r2) the
    worse of two is preferred, as it is with people.

    Args: reward judges a completion; the other arguments are those of the names.
    Raises InputError where too few prompts remain.
    """
    model, tokenizer = policy
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    openings = prompts(2 * count, seed=seed)  # more than enough: one in some hundred is passed over
    rows: list[dict[str, Any]] = []
    together = max(1, rows_at_once(model, model.config.block_size) // K)
    for start in tqdm(range(0, len(openings), together), desc="sampling", disable=None, leave=False):
        some = openings[start : start + together]
        ids = [tokenizer.encode(prompt) for prompt in some for _ in range(K)]
        drawn = generate(model, ids, max_new_tokens=max_new_tokens, eos=tokenizer.eot, generator=generator)
        for place, prompt in enumerate(some):
            samples = drawn[K * place : K * (place + 1)]
            texts = [tokenizer.decode(sample) for sample in samples]
            ended = all(sample[-1] == tokenizer.eot for sample in samples)
            if not ended or len(set(texts)) < K or not all(text.strip() for text in texts):
                continue
            rows.append({"prompt": prompt, "responses": texts, "ranking": _ranks(texts, reward, noise)})
        if len(rows) >= count or len(rows) + len(openings) - start - len(some) < count:  # done, or hopeless
            break
    if len(rows) < count:
        raise InputError(
            f"of {len(openings)} prompts only {len(rows)} got {K} different samples that ended within "
            f"--max-new-tokens {max_new_tokens}; fine-tune --model longer or raise that number."
        )
    return rows[:count]


def _ranks(texts: list[str], reward: Callable[[str], float], noise: torch.Generator) -> list[int]:
    """Ranks by reward plus Gumbel noise, which is Plackett-Luce."""
    rewards = torch.tensor([reward(text) for text in texts], dtype=torch.float64)
    gumbel = -torch.empty_like(rewards).exponential_(generator=noise).log()
    order = (rewards + gumbel).argsort(descending=True)
    return (order.argsort() + 1).tolist()


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rankings of two as rows {"prompt", "chosen", "rejected"}."""
    pairs = []
    for row in rows:
        (_, chosen), (_, rejected) = sorted(zip(row["ranking"], row["responses"]))
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs
