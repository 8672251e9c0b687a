"""What every method of the sentiment experiment starts from: the SFT model, prefixes, and labelled pairs.

Each stage leaves a file in the run folder and is not done again where that file is there, so an interrupted
run goes on to the same result.

But: no method is trained here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...model import GPT, GPTConfig
from ...text.batches import Example
from ...text.checkpoint import WEIGHTS_FILE
from ...text.objectives import reference_logps, sft_objective
from ...text.runs import write_json, write_records
from ...text.tokenizer import Tokenizer, train_bpe
from ...text.training_run import Data, Settings, run_training
from ...validation import InputError
from ..text.setup import MODEL, Policy, load_policy, save_policy
from .data import Plan, Texts, file_texts, grammar_texts, pairs_of, sample_rows, take_prefixes
from .truth import BagOfWords, Truth, read_reviews, save_judge, truth_of

TEXTS_FILE, TRUTH_FILE, PROMPTS_FILE, SAMPLES_FILE = (
    "texts.json", "truth.json", "prompts.json", "preferences.jsonl",
)  # fmt: skip
SFT = "sft"


class World(NamedTuple):
    """All that a method needs.

    Fields:
        policy: the SFT model, which is every method's start and reference.
        truth: the true reward.
        examples, reference: training pairs and the reference's log-probabilities of them.
        train_prompts, held_out, other: prefixes as token ids.
    """

    policy: Policy
    truth: Truth
    examples: list[Example]
    reference: Tensor
    train_prompts: list[list[int]]
    held_out: list[list[int]]
    other: list[list[int]]


def make_world(folder: Path, plan: Plan, *, reviews: str | None, noise: str, seed: int, resume: bool) -> None:
    """All stages before the methods, each where its file is missing; prints what each gave."""
    texts = _texts_stage(folder, plan, reviews, seed)
    policy = _sft_stage(folder, plan, texts, seed, resume)
    judge = _judge(folder)
    if not (folder / PROMPTS_FILE).exists():
        tokenizer = policy.tokenizer
        own = take_prefixes([*map(tokenizer.encode, texts.own)], plan.prefixes + plan.held_out, seed=seed)
        other = take_prefixes([*map(tokenizer.encode, texts.other)], plan.other, seed=seed + 1)
        held_out, train = own[: plan.held_out], own[plan.held_out :]
        write_json(folder / PROMPTS_FILE, {"train": train, "held_out": held_out, "other": other})
    if not (folder / SAMPLES_FILE).exists():
        rows = sample_rows(
            policy, read_json(folder / PROMPTS_FILE)["train"], truth_of(judge, policy.tokenizer),
            max_new_tokens=plan.max_new_tokens, noise=noise, seed=seed + 2,
            progress=partial(tqdm, desc="four samples a prefix", disable=None, leave=False),
        )  # fmt: skip
        write_records(folder / SAMPLES_FILE, rows)


@cache
def load_world(folder: Path) -> World:
    """What `make_world` left in a folder (absolute); the reference's log-probabilities are computed again."""
    policy = load_policy(str(folder / SFT))
    policy.model.requires_grad_(False)
    rows = read_rows(folder)
    found = read_json(folder / PROMPTS_FILE)
    whole = [Example(row["prompt"], row["completions"], "") for row in rows]
    logps = reference_logps(policy.model, whole, micro_size=16, dtype="float32")
    examples, reference = pairs_of(rows, logps)
    truth = truth_of(_judge(folder), policy.tokenizer)
    return World(policy, truth, examples, reference, found["train"], found["held_out"], found["other"])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of preferences.jsonl."""
    lines = (folder / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_json(path: Path) -> Any:
    """A file of this run. Raises InputError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: is damaged; delete it, and --resume makes it again.") from None


def _judge(folder: Path) -> BagOfWords | None:
    path = folder / TRUTH_FILE
    return BagOfWords(**read_json(path)) if path.exists() else None


def _texts_stage(folder: Path, plan: Plan, reviews: str | None, seed: int) -> Texts:
    """The texts, kept so that a file that changes under a run does no harm; of a file also the judge."""
    path = folder / TEXTS_FILE
    if path.exists():
        return Texts(**read_json(path))
    if reviews is None:
        texts = grammar_texts(plan, seed)
    else:
        texts, judge, share = file_texts(read_reviews(reviews), seed)
        save_judge(judge, folder / TRUTH_FILE)
        print(
            f"ground truth: a logistic regression on {len(judge.weights):,} words, right on {share:.1%} of "
            "the held-out reviews.", flush=True,
        )  # fmt: skip
    write_json(path, texts._asdict())
    return texts


def _sft_stage(folder: Path, plan: Plan, texts: Texts, seed: int, resume: bool) -> Policy:
    """The SFT model, in RUN/sft; every token but the first of a review is learnt."""
    target = folder / SFT
    if (target / MODEL / WEIGHTS_FILE).exists():
        return load_policy(str(target))
    tokenizer = vocabulary(texts.learn, plan.vocab_size)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, plan.context, plan.n_layer, 4, plan.n_embd))
    learn, held_out = (_as_examples(some, tokenizer, plan.context) for some in (texts.learn, texts.held_out))
    settings = Settings(
        learning_rate=plan.sft_learning_rate, optimizer="adamw", per_device_train_batch_size=32,
        gradient_accumulation_steps=1, num_train_epochs=plan.sft_epochs, max_steps=None, warmup_steps=20,
        max_grad_norm=1.0, logging_steps=10, eval_steps=0, save_steps=200, seed=seed, dtype="float32",
        device="cpu",
    )  # fmt: skip
    target.mkdir(exist_ok=True)
    objective = sft_objective(model, dtype="float32")
    run_training(target, model, objective, Data(learn, held_out), settings, name="SFT", resume=resume)
    policy = Policy(model, tokenizer)
    save_policy(policy, target)
    return policy


def vocabulary(texts: Sequence[str], most: int) -> Tokenizer:
    """A BPE of so many ids; where the texts have too few pairs for that, of half as many, and so on."""
    text, size = "\n".join(texts), most
    while True:
        try:
            return train_bpe(text, size)
        except InputError:
            if size <= 257:
                raise
            size = max(257, size // 2)


def _as_examples(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[Example]:
    """Reviews as [first token | the rest, end-of-text], cut at the context; a single token has no rest."""
    rows = [tokenizer.encode(text) for text in texts]
    return [
        Example(ids[:1], [[*ids[1:], tokenizer.eot][: context - 1]], f"review {number}")
        for number, ids in enumerate(rows, start=1)
        if len(ids) > 1
    ]
