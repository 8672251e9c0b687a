"""What every contestant is given: a GPT-2 shape, one folder of weights, and the same tokens.

Only the standard library, so that each process makes the same tokens from the same seed, whatever else it
imports. Tokens are random: speed does not depend on what they mean.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import NamedTuple

CONTESTANTS = {  # name: (label in the table, module and function, options of the function)
    "ours": ("ours", "ours.train_ours", {}),
    "trl": ("TRL as it comes", "trl_dpo.train_trl", {}),
    "trl-precomputed": ("TRL, references precomputed", "trl_dpo.train_trl", {"precompute": True}),
    "trl-no-checkpointing": ("TRL, no checkpointing", "trl_dpo.train_trl", {"checkpoint": False}),
    "trl-precomputed-no-checkpointing": (
        "TRL, precomputed, no checkpointing", "trl_dpo.train_trl", {"precompute": True, "checkpoint": False},
    ),
    "plain": ("plain loop of tutorials", "hugging_face.train_plainly", {}),
    "ours-lora": ("ours, LoRA", "ours.train_ours", {"lora": True}),
    "trl-lora": ("TRL with PEFT's LoRA", "trl_dpo.train_trl", {"lora": True}),
    "all-weights": ("ours, all weights", "ours.train_ours", {}),
    "ours-sampling": ("ours, sampling (tokens/s)", "ours.sample_ours", {}),
    "hugging-face-sampling": ("Hugging Face generate (tokens/s)", "hugging_face.sample_hugging_face", {}),
}  # fmt: skip


class Shape(NamedTuple):
    """A GPT-2 and the batch it is trained with."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    pairs_per_step: int


SHAPES = {
    "small": Shape(n_layer=4, n_head=4, n_embd=128, vocab_size=512, block_size=256, pairs_per_step=32),
    "124M": Shape(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024, pairs_per_step=8),
}
OURS_OF = {  # opponents of another side of ours than "ours"
    "hugging-face-sampling": "ours-sampling", "trl-lora": "ours-lora", "all-weights": "ours-lora",
}  # fmt: skip
RANK, ALPHA = 64, 16  # of the adapters, on all four maps of a block; both start from the same file
BETA = 0.1
MAX_GRAD_NORM = 1.0  # TRL's default, so everybody's
LEARNING_RATE = 1e-4  # of AdamW, constant; high enough to move the losses that are compared
LORA_RATE = 10  # times as high for an adapter, whose first steps move the losses less
STEPS_PER_EPOCH = 8  # few, because a block is whole epochs: then its pairs are the same for everybody
CHECKED_STEPS = 3  # at the start, on the first pairs in their order: everybody's losses must be the same
SAMPLES, NEW_TOKENS = 64, 64  # of the sampling contest
PROMPT, COMPLETION = (16, 48), (8, 64)  # tokens, uniform; a completion's end-of-text included


class Task(NamedTuple):
    """All that a contestant's process is told.

    Fields:
        contestant: a key of CONTESTANTS.
        shape: a key of SHAPES.
        dtype: "float32", or "bfloat16" for autocast of float32 weights.
        device: "cpu" or "cuda".
        threads: of the CPU, for torch.
        folder: of the weights, in Hugging Face's layout.
        pairs_per_step, micro_size: of an optimizer step; how many of them ours takes at a time.
        seed: of weights, tokens and order.
    """

    contestant: str
    shape: str
    dtype: str
    device: str
    threads: int
    folder: str
    pairs_per_step: int
    micro_size: int
    seed: int = 0


def end_of_text(task: Task) -> int:
    """The last id, as in GPT-2's vocabulary; no other token of a pair is it."""
    return SHAPES[task.shape].vocab_size - 1


def make_pairs(task: Task) -> list[list[list[int]]]:
    """The data set of one epoch: [prompt, chosen, rejected], both completions ending with end-of-text."""
    draw, eot = random.Random(f"pairs {task.seed}"), end_of_text(task)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(eot) for _ in range(count)]

    return [
        [tokens(draw.randint(*PROMPT)), *([*tokens(draw.randint(*COMPLETION) - 1), eot] for _ in range(2))]
        for _ in range(task.pairs_per_step * STEPS_PER_EPOCH)
    ]


def make_prompts(task: Task) -> list[list[int]]:
    """The prompts of the sampling contest."""
    draw, eot = random.Random(f"prompts {task.seed}"), end_of_text(task)
    return [[draw.randrange(eot) for _ in range(draw.randint(*PROMPT))] for _ in range(SAMPLES)]


def digest(rows: list) -> str:
    """SHA-256 of lists of token ids, to see that contestants hold the same ones in the same order."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
