"""Texts, prefixes and labelled pairs of the sentiment experiment, and the sizes of a run.

    reviews -> prefixes of 2 to 8 tokens -> four samples of each -> true rewards -> six pairs

as in the paper's App. C.1.

But: no files and no training (sentiment_world.py).

Shapes: N prefixes, K = 4 samples of each, P pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...generation import generate, rows_at_once
from ...preferences import bradley_terry
from ...text.batches import Example
from ...text.reviews import demonstrations
from ...validation import InputError
from ..text.setup import Policy
from .truth import BagOfWords, Review, Truth, accuracy, fit_bag_of_words

K = 4  # samples of a prefix
SHORTEST, LONGEST = 2, 8  # tokens of a prefix
NOISES = ("none", "bradley-terry")


class Plan(NamedTuple):
    """The sizes of a run; the same for every method where a method is meant.

    Fields:
        demonstrations: reviews of the grammar to fine-tune on (of a file: all but a tenth).
        vocab_size, context, n_layer, n_embd: of the model; it has four heads.
        sft_epochs, sft_learning_rate: of the fine-tuning, in batches of 32.
        prefixes, held_out, other: training prefixes; held-out ones; those of the other distribution.
        max_new_tokens: where a sample is cut.
        steps, pairs: gradient steps of a method, and pairs in each (completions: twice that).
        learning_rate, warmup: of every method's policy, AdamW.
        best_of: held-out prefixes of which 128 samples are drawn.
    """

    demonstrations: int
    vocab_size: int
    context: int
    n_layer: int
    n_embd: int
    sft_epochs: int
    sft_learning_rate: float
    prefixes: int
    held_out: int
    other: int
    max_new_tokens: int
    steps: int
    pairs: int
    learning_rate: float
    warmup: int
    best_of: int


class Texts(NamedTuple):
    """Where prefixes come from: reviews to learn, those of the training prompts' kind, and of another kind.

    Fields: learn, held_out (for SFT's own check), own, other: texts.
    """

    learn: list[str]
    held_out: list[str]
    own: list[str]
    other: list[str]


# ------------------------------------------------------------------------------------------------- texts


def grammar_texts(plan: Plan, seed: int) -> Texts:
    """Reviews of the grammar; prompts that a verb follows ("The new comedy ...") are the training's kind.

    The other kind are the prompts that a sentence follows ("We saw a comedy last night."), which no
    preference pair begins with; SFT reads both.
    """
    rows = demonstrations(plan.demonstrations + 300, seed=seed)
    whole = [row["prompt"] + row["completion"] for row in rows]
    opening = [row["prompt"][-1] in ".:" for row in rows]
    own = [text for text, is_opening in zip(whole, opening) if not is_opening]
    other = [text for text, is_opening in zip(whole, opening) if is_opening]
    return Texts(whole[300:], whole[:300], own, other)


def file_texts(reviews: Sequence[Review], seed: int) -> tuple[Texts, BagOfWords, float]:
    """Texts of a file, the judge learnt from nine tenths of its labels, and its accuracy on the rest.

    The other kind of prompts are those of the package's grammar in lower case: another author's.
    """
    order = list(reviews)
    random.Random(seed).shuffle(order)
    tenth = len(order) // 10
    held_out, learn = order[:tenth], order[tenth:]
    judge = fit_bag_of_words(learn)
    own = [review.text for review in order]
    other = [row["prompt"].lower() + row["completion"].lower() for row in demonstrations(2000, seed=seed)]
    texts = Texts([review.text for review in learn], [review.text for review in held_out[:300]], own, other)
    return texts, judge, accuracy(judge, held_out)


def take_prefixes(texts: Sequence[Sequence[int]], count: int, *, seed: int) -> list[list[int]]:
    """Different beginnings of texts, 2 to 8 tokens each, every length as likely, in random order.

    Args: texts as token ids; one shorter than its prefix and a further token is passed over.
    Raises InputError where there are not enough different ones.
    """
    draw = random.Random(f"prefixes {seed}")
    order = list(range(len(texts)))
    draw.shuffle(order)
    found: dict[tuple[int, ...], None] = {}
    for number in order:
        length = draw.randint(SHORTEST, LONGEST)
        if len(texts[number]) > length:
            found.setdefault(tuple(texts[number][:length]))
    if len(found) < count:
        raise InputError(
            f"{len(texts)} reviews have {len(found)} different beginnings of {SHORTEST} to {LONGEST} tokens, "
            f"but {count} are needed; give more reviews."
        )
    kept = list(found)
    draw.shuffle(kept)  # short ones are found early, because they repeat
    return [list(prefix) for prefix in kept[:count]]


# ------------------------------------------------------------------------------------------------- pairs


def label_pairs(
    rewards: Tensor, completions: Sequence[Sequence[int]], *, noise: str, generator: torch.Generator
) -> tuple[list[tuple[int, int]], int]:
    """The pairs of K completions of one prefix as (chosen, rejected) positions, and how many were left out.

    Without noise the better one is chosen, and equal rewards have no order, so that pair is left out. With
    "bradley-terry" the first is chosen with probability sigmoid(r1 - r2), and only a pair of the same
    completion twice is left out.

    Args: rewards (K,) true ones.
    """
    pairs, left_out = [], 0
    values = rewards.double()
    for i, j in combinations(range(len(values)), 2):
        first_wins = bool(values[i] > values[j])
        if noise == "bradley-terry":
            uniform = torch.rand(1, dtype=torch.float64, generator=generator)
            first_wins = bool(uniform < bradley_terry(values[i : i + 1], values[j : j + 1]))
            tie = list(completions[i]) == list(completions[j])
        else:
            tie = bool(values[i] == values[j])
        if tie:
            left_out += 1
        else:
            pairs.append((i, j) if first_wins else (j, i))
    return pairs, left_out


def sample_rows(
    policy: Policy,
    prefixes: Sequence[list[int]],
    truth: Truth,
    *,
    max_new_tokens: int,
    noise: str,
    seed: int,
    progress: Callable[[range], Any] = iter,
) -> list[dict[str, Any]]:
    """Four samples of each prefix with their rewards and labelled pairs: rows of preferences.jsonl."""
    model, tokenizer = policy
    generator, labels = (torch.Generator().manual_seed(seed + k) for k in range(2))
    rows = []
    together = max(1, rows_at_once(model, LONGEST + max_new_tokens) // K)
    for start in progress(range(0, len(prefixes), together)):
        some = [prefix for prefix in prefixes[start : start + together] for _ in range(K)]
        drawn = generate(model, some, max_new_tokens=max_new_tokens, eos=tokenizer.eot, generator=generator)
        rewards = truth(some, drawn)
        for place in range(0, len(some), K):
            own, r = drawn[place : place + K], rewards[place : place + K]
            pairs, left_out = label_pairs(r, own, noise=noise, generator=labels)
            rows.append(
                {"prompt": some[place], "completions": own, "rewards": r.tolist(), "pairs": pairs,
                 "left_out": left_out, "text": tokenizer.decode(some[place]),
                 "responses": [tokenizer.decode(y) for y in own]}
            )  # fmt: skip
    return rows


def pairs_of(rows: Sequence[dict[str, Any]], logps: Tensor) -> tuple[list[Example], Tensor]:
    """Rows as training pairs: P examples [chosen, rejected] and the reference's log-probabilities (P, 2).

    Args: logps (N, K) of all completions under the reference.
    """
    examples, reference = [], []
    for number, row in enumerate(rows):
        for chosen, rejected in row["pairs"]:
            two = [row["completions"][chosen], row["completions"][rejected]]
            place = f"prefix {number + 1}, samples {chosen + 1} and {rejected + 1}"
            examples.append(Example(row["prompt"], two, place))
            reference.append(logps[number, [chosen, rejected]])
    if not examples:
        raise InputError("no two samples differ in reward, so there is nothing to prefer; use more prefixes.")
    return examples, torch.stack(reference)
