"""What the text commands share: models, rows and samples by their options; the run folder of sft and dpo."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...model import GPT
from ...rivals.evaluate import Samples, sample
from ...text import checkpoint, processes
from ...text.adapters import TARGETS, adapters_of, add_adapter, learnt, save_adapter
from ...text.allocator import keep_freed_memory
from ...text.batches import split_by_prompt, tokenize
from ...text.data import Dataset, dataset_from_rows, load_dataset
from ...text.examples import Examples
from ...text.reviews import comparisons, demonstrations, sentiment
from ...text.runs import new_run_folder, read_json_object, refuse_used_folder, versions, write_json
from ...text.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer, save_tokenizer
from ...text.training_run import Data, Interrupted, Settings, alone_in, planned_steps, run_training
from ...text.training_state import STATE_FILE
from ...train import Objective, Record
from ...validation import InputError, check_positive, check_range
from ..options import CONFIG_FILE, HELD_OUT, LORA_RATE, MOST_HELD_OUT, WARM_UP, Option, must, read_run_config

MODEL, ADAPTER = "model", "adapter"  # where a run keeps its result; what it learnt, where that is an adapter
LORA = {
    "lora_r": Option(
        "freeze all weights and learn (alpha / r) B A of this rank r beside linear maps, kept in adapter/, "
        f"merged in model/; the default learning rate is then {LORA_RATE} times as high",
        check=lambda flag, r: check_range(flag, r, 1, 10**4, "more is no small change"),
    ),
    "lora_alpha": Option("alpha", float, 16.0, check=check_positive),
    "lora_target": Option("which maps of a block", str, ",".join(TARGETS), metavar="NAMES", check=must(
        lambda names: {*names.split(",")} <= {*TARGETS}, f"be one or more of {','.join(TARGETS)}")),
    "lora_dropout": Option("0 only: it would make policy and reference differ by noise", float, check=must(
        lambda rate: rate == 0, "be 0, because dropout makes policy and reference differ by noise")),
}  # fmt: skip


class Policy(NamedTuple):
    """A model and the vocabulary it was trained with."""

    model: GPT
    tokenizer: Tokenizer


def load_policy(name: str) -> Policy:
    """The model of a folder, of a run's folder, or of a released GPT-2's name, with its tokenizer.

    Raises InputError where there is none, or where the two do not belong together.
    """
    source = _folder_of(name) or name
    folder = checkpoint.find_folder(checkpoint.base_of(source))
    if folder is not None:
        checkpoint.read_config(folder / CONFIG_FILE)  # without it, that there is no tokenizer says little
    tokenizer = load_policy_tokenizer(name)
    return Policy(checkpoint.load_model(source, vocab_size=tokenizer.vocab_size), tokenizer)


def load_policy_tokenizer(name: str) -> Tokenizer:
    """The tokenizer alone, of the same folders, runs and names; no weights are read or fetched."""
    folder = checkpoint.find_folder(checkpoint.base_of(_folder_of(name) or name))
    return gpt2_tokenizer() if folder is None else load_tokenizer(folder)


def _folder_of(name: str) -> Path | None:
    """Where a model lies: in a run, its result; None for a released model's name."""
    folder = Path(name)
    if (folder / MODEL).is_dir():
        return folder / MODEL
    found = checkpoint.find_folder(name)
    if (folder / CONFIG_FILE).exists() and "options" in read_json_object(folder / CONFIG_FILE):
        raise InputError(f"--model {name}: that run has no model yet; finish it with --resume {name}.")
    if (folder / STATE_FILE).exists():
        raise InputError(f"--model {name}: is a state for --resume; name its run, once finished.")
    return found


def adapted(options: argparse.Namespace, model: GPT) -> GPT:
    """The model with the adapter that --lora-r asks for, which alone is trained."""
    targets = options.lora_target.split(",")
    model = add_adapter(model, options.lora_r, options.lora_alpha, targets=targets, seed=options.seed)
    print(f"{sum(w.numel() for w in learnt(model)):,} parameters of an adapter are trained.", flush=True)
    return model


def save_policy(policy: Policy, folder: Path, start: str = "") -> None:
    """Write a run's result, model/, the weights last: where they are, all is. What was adapted is `start`."""
    if adapters_of(policy.model):
        base = _folder_of(start)
        save_adapter(policy.model, folder / ADAPTER, str(base.resolve()) if base else start)
    save_tokenizer(policy.tokenizer, folder / MODEL)
    checkpoint.save_model(policy.model, folder / MODEL, eos=policy.tokenizer.eot)


def size_of(model: GPT) -> int:
    """How many numbers a model has learnt, the tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def context_of(options: argparse.Namespace, context: int) -> int:
    """The tokens a row may have in a model of so many. Raises InputError where --max-length asks for more."""
    if options.max_length is None:
        return context
    if options.max_length > context:
        raise InputError(f"--max-length {options.max_length}: the model reads {context} tokens; lower it.")
    return options.max_length


def sample_length(given: int | None, context: int) -> int:
    """--max-new-tokens, by default half of the context and 128 at most.

    Raises InputError where no token would be left for a prompt.
    """
    if given is None:
        return max(1, min(128, context // 2))
    if given >= context:
        raise InputError(
            f"--max-new-tokens {given}: leaves none of a context of {context} for a prompt; lower it."
        )
    return given


def load_rows(options: argparse.Namespace, kind: str, count: int, seed: int = 0) -> Dataset:
    """The rows of --data, else so many generated reviews."""
    if options.data is not None:
        return load_dataset(options.data, kind, skip_bad_rows=bool(options.skip_bad_rows))
    made = comparisons if kind == "preferences" else demonstrations
    return dataset_from_rows(made(count, seed=seed), "reviews", kind)


class Rows(NamedTuple):
    """Rows as tokens, and the SHA-256 of what they are as texts."""

    train: Examples
    held_out: Examples
    fingerprint: str


def prepare(options: argparse.Namespace, dataset: Dataset, policy: Policy) -> Rows:
    """Rows as tokens, some of them held out; the audit is printed."""
    examples, audit = tokenize(
        dataset, policy.tokenizer, max_length=context_of(options, policy.model.config.block_size),
        max_prompt_length=options.max_prompt_length, skip_bad_rows=bool(options.skip_bad_rows),
    )  # fmt: skip
    print(*[dataset.columns()] * (options.data is not None), f"{audit}\n", sep="\n", flush=True)
    digest = hashlib.sha256()
    for part in json.JSONEncoder().iterencode(dataset.rows):  # in one piece it would be a copy of the file
        digest.update(part.encode())
    given, usual = options.held_out, min(HELD_OUT, MOST_HELD_OUT / len(examples))
    try:
        parts = split_by_prompt(examples, usual if given is None else given, seed=options.seed)
    except InputError:
        if given is not None:
            raise
        print("note: too few rows or prompts to hold some out, so there is no eval_loss; see --held-out.\n")
        parts = examples, examples[:0]
    return Rows(*parts, digest.hexdigest())


def draw_samples(
    options: argparse.Namespace, policy: Policy, reference: GPT, rows: Rows, count: int, length: int
) -> Samples | None:
    """A sample of each of the first prompts, of held-out rows where there are any; None for a count of 0, and
    in every process but the first.

    The same prompts and random numbers in every call, so that two policies can be compared.
    """
    prompts = [row.prompt for row in (rows.held_out or rows.train)[:count]]
    if not prompts or not processes.leads():
        return None
    return sample(
        policy.model, reference, policy.tokenizer, prompts, seed=options.seed, max_new_tokens=length,
        reward=sentiment if options.data is None else None,
    )  # fmt: skip


def begin(options: argparse.Namespace) -> None:
    """Refuse an unusable --output-dir before any work; set up the process."""
    processes.begin(options.device, options.gradient_accumulation_steps)
    if options.resume is None and processes.leads():
        refuse_used_folder(options.output_dir)
    start = options.lora_r and options.model and (_folder_of(options.model) or options.model)
    if start and checkpoint.base_of(start) != str(start):  # the new one's base would be no model
        raise InputError(f"--model {start}: is an adapter; with --lora-r name its run, which has it merged.")
    if options.data is None and options.model is None:
        torch.set_num_threads(1)  # a model this small gains little from a second core
    keep_freed_memory()


def open_folder(options: argparse.Namespace, command: str) -> Path:
    """The run's folder with its config.json: a new one, or the one to go on with."""
    if options.resume is not None:
        torch.set_num_threads(read_run_config(options.resume)["threads"])  # sums depend on it
        return options.resume
    folder = processes.from_first(lambda: new_run_folder(options.output_dir, command))
    config = {"command": command, "options": vars(options), "threads": torch.get_num_threads(), **versions()}
    write_json(folder / CONFIG_FILE, config)
    return folder


@contextlib.contextmanager
def resumable(command: str, folder: Path) -> Iterator[Path]:
    """Says after Ctrl-C how to go on; where a run is part of another, the outer one says it."""
    try:
        with alone_in(folder) if processes.leads() else contextlib.nullcontext():
            yield folder
    except KeyboardInterrupt as interruption:
        reason = str(interruption).partition(";")[0] or "interrupted"
        how = f"dpo-minimal {command} --resume {folder}"
        raise Interrupted(f"{reason}; go on with `{how}`.") from None


def pin_start(folder: Path, policy: Policy, rows: Rows) -> str:
    """Note what a run starts from, or require that it still is the same; returns the model's fingerprint.

    Raises InputError naming what has changed: the data or the model under a run that is half done.
    """
    facts = {"data": rows.fingerprint, "vocabulary": policy.tokenizer.fingerprint}
    facts["model"] = checkpoint.state_fingerprint(policy.model)
    if any(other != facts for other in processes.gather(facts)):
        raise InputError("the processes do not read the same data and weights; give all the same files.")
    config = read_run_config(folder)
    before = config.setdefault("start", facts)
    for name, value in facts.items():
        if before.get(name) != value:
            raise InputError(
                f"--resume {folder}: its {name} is not what it was when the run began; put that back or "
                "start a new run."
            )
    write_json(folder / CONFIG_FILE, config)
    return facts["model"]


def _warm_up(folder: Path, steps: int) -> int:
    """The warm-up of a run of so many steps, where none was given; said, and kept in config.json."""
    found = min(WARM_UP, steps // 10)
    if found < WARM_UP:
        print(
            f"note: warm-up takes {found} of {steps} steps, a tenth, not the paper's {WARM_UP}; "
            "--num-train-epochs gives more steps.\n"
        )
    config = read_run_config(folder)
    config["options"]["warmup_steps"] = found
    write_json(folder / CONFIG_FILE, config)
    return found


def train_in(
    folder: Path, options: argparse.Namespace, policy: Policy, objective: Objective, data: Data, **more: Any
) -> list[Record]:
    """`run_training` as the options say, and the result in model/; returns all records."""
    values = {name: getattr(options, name) for name in Settings._fields}
    settings = Settings(**values | {"max_grad_norm": options.max_grad_norm or None})
    if settings.warmup_steps is None:
        settings = settings._replace(warmup_steps=_warm_up(folder, planned_steps(settings, data)))
    resume = options.resume is not None
    records = run_training(folder, policy.model, objective, data, settings, resume=resume, **more)
    if processes.count > 1 and len({*processes.gather(checkpoint.state_fingerprint(policy.model))}) > 1:
        raise AssertionError("the weights of the processes have come apart, which is a bug in here")
    processes.from_first(lambda: save_policy(policy, folder, options.model or str(folder / "sft")))
    return records
