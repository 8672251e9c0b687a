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
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...generation import generate
from ...model import GPT, GPTConfig
from ...preferences import bradley_terry
from ...text.batches import Example
from ...text.checkpoint import WEIGHTS_FILE
from ...text.objectives import reference_logps, sft_objective
from ...text.reviews import demonstrations
from ...text.runs import read_json_object, write_json, write_records
from ...text.tokenizer import Tokenizer, train_bpe
from ...text.training_run import Data, Settings, run_training
from ...text.truth import BagOfWords, Truth, accuracy, fit_bag_of_words, read_reviews, truth_of
from ...validation import InputError
from ..text.setup import MODEL, Policy, load_policy, save_policy

K = 4  # samples of a prefix
SHORTEST, LONGEST = 2, 8  # tokens of a prefix
NOISES = ("none", "bradley-terry")
TEXTS_FILE, TRUTH_FILE, PROMPTS_FILE = "texts.json", "truth.json", "prompts.json"
SAMPLES_FILE = "preferences.jsonl"


class Stream(IntEnum):
    """What random numbers are for, see `sampling_generator`."""

    SAMPLES, OPPONENT, OTHER_OPPONENT, DRAWS, ROUNDS = range(5)


class Plan(NamedTuple):
    """The sizes of a run; the same for every method where a method is meant."""

    demonstrations: int  # reviews of the grammar to fine-tune on (of a file: all but a tenth)
    vocab_size: int
    context: int
    n_layer: int
    n_embd: int  # the model has four heads
    sft_epochs: int  # in batches of 32
    sft_learning_rate: float
    prefixes: int  # to train on
    held_out: int
    other: int  # of the other distribution
    max_new_tokens: int  # where a sample is cut
    steps: int  # gradient steps of a training on pairs
    batch: int  # prefixes in each, with their K completions
    learning_rate: float  # of every method's policy, AdamW; it falls to zero over the steps, but for PPO
    warmup: int
    best_of: int  # held-out prefixes of which 384 samples are drawn
    noise: str  # of the labels, one of NOISES


class Labelled(NamedTuple):
    """A prefix with K completions, and what is known of them."""

    example: Example
    reference: Tensor  # (K,) log pi_ref, nats
    pairs: list[tuple[int, int]]  # which completion is preferred to which


# "learn", "held_out" (for SFT's own check); "own" (the training prompts' kind), "other" (another kind)
Texts = dict[str, list[str]]


class World(NamedTuple):
    """All that a method needs; prefixes as token ids."""

    policy: Policy  # the SFT model, which is every method's start and reference
    truth: Truth  # the true reward
    rows: list[dict[str, Any]]  # of preferences.jsonl
    labelled: list[Labelled]  # nine tenths of the training prefixes
    examples: list[Example]  # their pairs one by one
    reference: Tensor  # the reference's log-probabilities of these
    held_out_pairs: list[Example]  # of the last tenth, which tells what was learnt from the others
    held_out_reference: Tensor
    train_prompts: list[list[int]]
    held_out: list[list[int]]
    other: list[list[int]]


# ------------------------------------------------------------------------------------------------- stages


def make_world(folder: Path, plan: Plan, *, reviews: str | None, seed: int, resume: bool) -> None:
    """All stages before the methods, each where its file is missing; prints what each gave."""
    texts, prompts, samples = (folder / name for name in (TEXTS_FILE, PROMPTS_FILE, SAMPLES_FILE))
    if not texts.exists():  # a copy, so that a file that changes under a run does no harm
        write_json(texts, file_texts(folder, reviews, seed) if reviews else grammar_texts(plan, seed))
    found = read_json_object(texts)
    policy = _sft(folder / "sft", plan, found, seed, resume)
    if not prompts.exists():
        own, other = ([*map(policy.tokenizer.encode, found[kind])] for kind in ("own", "other"))
        own = take_prefixes(own, plan.prefixes + plan.held_out, seed=seed)
        held_out, train = own[: plan.held_out], own[plan.held_out :]
        other = take_prefixes(other, plan.other, seed=seed + 1)
        write_json(prompts, {"train": train, "held_out": held_out, "other": other})
    if not samples.exists():
        truth, prefixes = _truth(folder, policy.tokenizer), read_json_object(prompts)["train"]
        write_records(samples, sample_rows(policy, prefixes, truth, plan, seed + 2))


@cache
def load_world(folder: Path) -> World:
    """What `make_world` left in a folder (absolute); the reference's log-probabilities are computed again."""
    policy = load_policy(str(folder / "sft"))
    policy.model.requires_grad_(False)
    rows = [json.loads(line) for line in (folder / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()]
    labelled, cut = labelled_of(rows, policy.model), first_held_out(rows)
    pairs = *pairs_of(labelled[:cut]), *pairs_of(labelled[cut:])
    found = read_json_object(folder / PROMPTS_FILE)
    prompts = (found[name] for name in ("train", "held_out", "other"))
    return World(policy, _truth(folder, policy.tokenizer), rows, labelled[:cut], *pairs, *prompts)


def first_held_out(prefixes: Sequence[Any]) -> int:
    """How many of the training prefixes teach; the pairs of the others, a tenth, are held out."""
    return len(prefixes) - max(1, len(prefixes) // 10)


def _truth(folder: Path, tokenizer: Tokenizer) -> Truth:
    path = folder / TRUTH_FILE
    return truth_of(BagOfWords(**read_json_object(path)) if path.exists() else None, tokenizer)


# -------------------------------------------------------------------------------------- texts and SFT model


def grammar_texts(plan: Plan, seed: int) -> Texts:
    """Reviews of the grammar; prompts that a verb follows ("The new comedy ...") are the training's kind.

    The other kind are the prompts that a sentence follows ("We saw a comedy last night."), which no
    preference pair begins with; SFT reads both.
    """
    rows = demonstrations(plan.demonstrations + 300, seed=seed)
    whole = [row["prompt"] + row["completion"] for row in rows]
    own = [text for text, row in zip(whole, rows) if row["prompt"][-1] not in ".:"]
    other = [text for text, row in zip(whole, rows) if row["prompt"][-1] in ".:"]
    return {"learn": whole[300:], "held_out": whole[:300], "own": own, "other": other}


def file_texts(folder: Path, reviews: str, seed: int) -> Texts:
    """Texts of a file; the truth, learnt from nine tenths of its labels, is written into the folder.

    The other kind of prompts are those of the package's grammar in lower case: another author's.
    """
    order = read_reviews(reviews)
    random.Random(seed).shuffle(order)
    tenth = len(order) // 10
    held_out, learn = order[:tenth], order[tenth:]
    learnt = fit_bag_of_words(learn)
    write_json(folder / TRUTH_FILE, learnt._asdict())
    print(
        f"ground truth: a logistic regression on {len(learnt.weights):,} words, right on "
        f"{accuracy(learnt, held_out):.1%} of the held-out reviews.", flush=True,
    )  # fmt: skip
    other = [row["prompt"].lower() + row["completion"].lower() for row in demonstrations(2000, seed=seed)]
    parts = {"learn": learn, "held_out": held_out[:300], "own": order}
    return {name: [review.text for review in some] for name, some in parts.items()} | {"other": other}


def _sft(folder: Path, plan: Plan, texts: Texts, seed: int, resume: bool) -> Policy:
    """The SFT model; every token but the first of a review is learnt."""
    if (folder / MODEL / WEIGHTS_FILE).exists():
        return load_policy(str(folder))
    tokenizer = vocabulary(texts["learn"], plan.vocab_size)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, plan.context, plan.n_layer, 4, plan.n_embd))
    data = Data(*(_as_examples(texts[k], tokenizer, plan.context) for k in ("learn", "held_out")))
    settings = Settings(
        learning_rate=plan.sft_learning_rate, optimizer="adamw", per_device_train_batch_size=32,
        gradient_accumulation_steps=1, num_train_epochs=plan.sft_epochs, max_steps=None, warmup_steps=20,
        max_grad_norm=1.0, logging_steps=10, eval_steps=0, save_steps=200, seed=seed, dtype="float32",
        device="cpu",
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    objective = sft_objective(model, dtype="float32")
    run_training(folder, model, objective, data, settings, name="SFT", resume=resume)
    policy = Policy(model, tokenizer)
    save_policy(policy, folder)
    return policy


def vocabulary(texts: Sequence[str], most: int) -> Tokenizer:
    """A BPE of so many ids; where the texts have too few pairs for that, of half as many, and so on."""
    try:
        return train_bpe("\n".join(texts), most)
    except InputError:
        if most <= 257:
            raise
        return vocabulary(texts, max(257, most // 2))


def _as_examples(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[Example]:
    """Reviews as [first token | the rest, end-of-text], cut at the context; a single token has no rest."""
    rows = enumerate(map(tokenizer.encode, texts), start=1)
    return [
        Example(ids[:1], [[*ids[1:], tokenizer.eot][: context - 1]], f"review {number}")
        for number, ids in rows if len(ids) > 1
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- prefixes and pairs


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


def label_pairs(
    rewards: Tensor, completions: Sequence[Sequence[int]], *, noise: str, generator: torch.Generator
) -> tuple[list[tuple[int, int]], int]:
    """The pairs of K completions of one prefix as (chosen, rejected) positions, and how many were left out.

    Without noise the better one is chosen, and equal rewards have no order, so that pair is left out. With
    "bradley-terry" the first is chosen with probability sigmoid(r1 - r2), and only a pair of the same
    completion twice is left out.

    Args: rewards (K,) true ones.
    """
    pairs, left_out, values = [], 0, rewards.double()
    for i, j in combinations(range(len(values)), 2):
        first_wins, tie = bool(values[i] > values[j]), bool(values[i] == values[j])
        if noise == "bradley-terry":
            uniform = torch.rand(1, dtype=torch.float64, generator=generator)
            first_wins = bool(uniform < bradley_terry(values[i : i + 1], values[j : j + 1]))
            tie = list(completions[i]) == list(completions[j])
        if tie:
            left_out += 1
        else:
            pairs.append((i, j) if first_wins else (j, i))
    return pairs, left_out


def sample_rows(
    policy: Policy, prefixes: Sequence[list[int]], truth: Truth, plan: Plan, seed: int
) -> list[dict[str, Any]]:
    """Four samples of each prefix with their rewards and labelled pairs: rows of preferences.jsonl."""
    model, tokenizer = policy
    generator, labels = (torch.Generator().manual_seed(seed + k) for k in range(2))
    rows, length = [], plan.max_new_tokens
    each = [prefix for prefix in prefixes for _ in range(K)]
    drawn = generate(model, each, max_new_tokens=length, eos=tokenizer.eot, generator=generator)
    rewards = truth(each, drawn)
    for place in range(0, len(each), K):
        own, r = drawn[place : place + K], rewards[place : place + K]
        pairs, left_out = label_pairs(r, own, noise=plan.noise, generator=labels)
        rows.append(
            {"prompt": each[place], "completions": own, "rewards": r.tolist(), "pairs": pairs,
             "left_out": left_out, "text": tokenizer.decode(each[place]),
             "responses": [tokenizer.decode(y) for y in own]}
        )  # fmt: skip
    return rows


def labelled_of(rows: Sequence[dict[str, Any]], reference: GPT) -> list[Labelled]:
    """Rows of preferences.jsonl with the reference's log-probabilities."""
    places = [f"prefix {number}" for number in range(1, len(rows) + 1)]
    examples = [Example(row["prompt"], row["completions"], place) for row, place in zip(rows, places)]
    logps = reference_logps(reference, examples, micro_size=16, dtype="float32")
    return [Labelled(example, own, row["pairs"]) for example, own, row in zip(examples, logps, rows)]


def with_pairs(labelled: Sequence[Labelled]) -> list[Labelled]:
    """Those that have any. Raises InputError where none has."""
    found = [row for row in labelled if row.pairs]
    if not found:
        raise InputError("no two samples differ in reward, so there is nothing to prefer; use more prefixes.")
    return found


def pairs_of(labelled: Sequence[Labelled]) -> tuple[list[Example], Tensor]:
    """Every pair by itself: P examples [chosen, rejected] and the reference's log-probabilities (P, 2)."""
    examples, reference = [], []
    for (prompt, completions, place, *_), logps, pairs in with_pairs(labelled):
        for chosen, rejected in pairs:
            where = f"{place}, samples {chosen + 1} and {rejected + 1}"
            examples.append(Example(prompt, [completions[chosen], completions[rejected]], where))
            reference.append(logps[[chosen, rejected]])
    return examples, torch.stack(reference)


def sampling_generator(*parts: int) -> torch.Generator:
    """Random numbers of a stage of their own: streams of different parts never meet."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**62
    return torch.Generator().manual_seed(seed)


def path_of(folder: Path, name: str) -> Path:
    """The file of a job, see `kept`."""
    return folder / "methods" / f"{name}.npz"
