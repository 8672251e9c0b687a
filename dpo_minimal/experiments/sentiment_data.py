"""What every method of the sentiment experiment starts from: the SFT model, prefixes, and labelled pairs.

    reviews -> SFT model -> prefixes of 2 to 8 tokens -> four samples of each -> true rewards -> six pairs

as in the paper's App. C.1. Each stage leaves a file in the run folder and is not done again where that file
is there, so an interrupted run goes on to the same result.

But: no method is trained here.

Shapes: N prefixes, K = 4 samples of each, P pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..batches import Example
from ..checkpoint import WEIGHTS_FILE
from ..generation import generate, rows_at_once
from ..model import GPT, GPTConfig
from ..objectives import reference_logps, sft_objective
from ..preferences import bradley_terry
from ..reviews import demonstrations
from ..runs import write_json, write_records
from ..tokenizer import Tokenizer, train_bpe
from ..training_run import Data, Settings, run_training
from ..validation import InputError
from .sentiment_truth import (
    BagOfWords,
    Review,
    Truth,
    accuracy,
    fit_bag_of_words,
    read_reviews,
    save_judge,
    truth_of,
)
from .text_setup import MODEL, Policy, load_policy, save_policy

K = 4  # samples of a prefix
SHORTEST, LONGEST = 2, 8  # tokens of a prefix
NOISES = ("none", "bradley-terry")
TEXTS_FILE, TRUTH_FILE, PROMPTS_FILE, SAMPLES_FILE = (
    "texts.json", "truth.json", "prompts.json", "preferences.jsonl",
)  # fmt: skip
SFT = "sft"


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
            f"but {count} are needed; give more reviews or lower --prefixes."
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


# ------------------------------------------------------------------------------------------------ stages


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


def load_world(folder: Path) -> World:
    """What `make_world` left; the reference's log-probabilities are computed again, in seconds."""
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
