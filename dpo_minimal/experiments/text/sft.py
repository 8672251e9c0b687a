"""`python -m dpo_minimal sft`: supervised fine-tuning, from which every preference training starts.

Maximum likelihood of completions given their prompts: the loss is -log pi(y|x) / (tokens of y), in nats.
Only the completion is scored, its one end-of-text included; the prompt is read but not learnt.

  dpo-minimal sft                                      a small GPT-2 learns to write film reviews
  dpo-minimal sft --data rows.jsonl                    a small GPT-2 of your own, with a vocabulary of its own
  dpo-minimal sft --data rows.jsonl --model gpt2       go on from a released GPT-2, or from any folder of one
  dpo-minimal sft --data pairs.jsonl --model FOLDER    the chosen of pairs: the paper's Preferred-FT

Rows are {prompt, completion}, {instruction, input, output}, {text}, chat messages, or preference pairs. DPO
assumes that its reference knows the completions it compares: without this step it pulls on answers that
the model would never give.

A run folder holds model/ (Hugging Face's layout: GPT2LMHeadModel.from_pretrained reads it; tiktoken.json is
the vocabulary), metrics.jsonl, training.png, config.json and checkpoints/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ...model import GPT, GPTConfig
from ...rivals.evaluate import sample
from ...text.batches import Example
from ...text.checkpoint import state_fingerprint
from ...text.data import Dataset, dataset_from_rows
from ...text.objectives import sft_objective
from ...text.reviews import demonstrations, sentiment
from ...text.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe
from ...text.training_run import Data, run_training
from ...validation import InputError, check_count
from .options import (
    COMMON,
    Defaults,
    add_data_options,
    add_run_options,
    add_training_options,
    resolve,
    settings_of,
)
from .report import sample_lines
from .setup import (
    Policy,
    begin,
    count_parameters,
    load_policy,
    open_folder,
    pin_start,
    prepare,
    read_rows,
    resumable,
    rows_fingerprint,
    sample_length,
    save_policy,
)

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128}
DEFAULTS = Defaults(
    file=COMMON | SHAPE
    | {"optimizer": "adamw", "learning_rate": 1e-3, "tokenizer": "bpe", "vocab_size": 1024, "rows": None,
       "context": 256},
    reviews={"rows": 16000, "vocab_size": 704, "context": 96, "learning_rate": 2e-3, "warmup_steps": 20,
             "gradient_accumulation_steps": 4},
)  # fmt: skip
FINE_TUNING = DEFAULTS._replace(  # of a model that knows a language already
    file=DEFAULTS.file | {"learning_rate": 2e-5}, reviews=DEFAULTS.reviews | {"learning_rate": 2e-5}
)
SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_data_options(
        parser, DEFAULTS, "rows with a prompt and a completion to imitate",
        f"; of a new model it is this number, else {DEFAULTS.file['context']}, or "
        f"{DEFAULTS.reviews['context']} for the reviews unless read as bytes",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL",
        help="start from this folder, run, or released name (gpt2 to gpt2-xl), with its own tokenizer and "
        f"a learning rate of {FINE_TUNING.file['learning_rate']:g} (default: a new small GPT-2)",
    )  # fmt: skip
    model.add_argument(
        "--tokenizer", choices=("bytes", "bpe", "gpt2"),
        help="of a new model: raw bytes, a BPE learnt from the data, GPT-2's own "
        f"({DEFAULTS.text('tokenizer')})",
    )  # fmt: skip
    model.add_argument(
        "--vocab-size", type=int, metavar="V", help=f"of that BPE ({DEFAULTS.text('vocab_size')})"
    )
    for name, text in (("n_layer", "layers"), ("n_head", "heads"), ("n_embd", "width")):
        flag = "--" + name.replace("_", "-")
        model.add_argument(flag, type=int, metavar="N", help=f"{text} of a new model ({DEFAULTS.text(name)})")
    add_training_options(parser, DEFAULTS)
    add_run_options(parser, DEFAULTS, "sft")


def run(args: argparse.Namespace) -> Path:
    """Check everything, train, and write the run folder, which is returned."""
    _refuse_unused(args)
    if args.eval_steps is not None and args.held_out == 0:
        raise InputError("--eval-steps is not used with --held-out 0; leave it out.")
    options = resolve(args, "sft", FINE_TUNING if args.model is not None else DEFAULTS)
    begin(options)
    dataset = _dataset(options)
    policy = _start(options, dataset)
    train, held_out = prepare(options, dataset, policy)
    folder = open_folder(options, "sft")
    with resumable("sft", folder):
        return _train(options, folder, policy, dataset, train, held_out)


def _train(
    options: argparse.Namespace,
    folder: Path,
    policy: Policy,
    dataset: Dataset,
    train: list[Example],
    held_out: list[Example],
) -> Path:
    start, vocabulary = state_fingerprint(policy.model), policy.tokenizer.fingerprint
    pin_start(folder, data=rows_fingerprint(dataset), vocabulary=vocabulary, model=start)
    model = policy.model.to(options.device)
    print(f"{count_parameters(model):,} parameters, {policy.tokenizer.vocab_size} tokens.", flush=True)
    records = run_training(
        folder, model, sft_objective(model, dtype=options.dtype), Data(train, held_out), settings_of(options),
        name="SFT", resume=options.resume is not None,
    )  # fmt: skip
    save_policy(policy, folder)
    from .figure import sft_figure  # matplotlib is slow to import: not before it is needed

    sft_figure(records, folder / "training.png")
    texts = [policy.tokenizer.decode(example.prompt) for example in (held_out or train)[:SHOWN]]
    samples = sample(
        model, model, policy.tokenizer, texts, seed=options.seed,
        max_new_tokens=sample_length(None, model.config.block_size),
        reward=sentiment if options.data is None else None,
    )  # fmt: skip
    print("\n".join(["", "What it writes:", *sample_lines(samples, SHOWN), ""]))
    print(f"Wrote {folder}/model, training.png, metrics.jsonl and config.json.", flush=True)
    return folder


def _refuse_unused(args: argparse.Namespace) -> None:
    for name in ("tokenizer", "vocab_size", *SHAPE):
        if args.model is not None and getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is given by the model of --model; leave it out.")
    if args.vocab_size is not None and args.tokenizer not in (None, "bpe"):
        raise InputError(
            f"--vocab-size is used only with --tokenizer bpe, not {args.tokenizer}; leave it out."
        )


def _dataset(options: argparse.Namespace) -> Dataset:
    if options.data is not None:
        return read_rows(options, "demonstrations")
    rows = demonstrations(options.rows, seed=options.seed)
    return dataset_from_rows(rows, "reviews", "demonstrations")


def _start(options: argparse.Namespace, dataset: Dataset) -> Policy:
    """The model to start from: that of --model, or a new one."""
    if options.model is not None:
        return load_policy(options.model)
    tokenizer = _tokenizer(options, dataset)
    # A review is shorter than 96 tokens, but not than 96 bytes.
    reviews = options.data is None and options.tokenizer != "bytes"
    context = (DEFAULTS.reviews if reviews else DEFAULTS.file)["context"]
    context = context if options.max_length is None else options.max_length
    config = GPTConfig(tokenizer.vocab_size, context, **{name: getattr(options, name) for name in SHAPE})
    torch.manual_seed(options.seed)
    return Policy(GPT(config), tokenizer)


def _tokenizer(options: argparse.Namespace, dataset: Dataset) -> Tokenizer:
    if options.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if options.tokenizer == "bytes":
        return byte_tokenizer()
    check_count("--vocab-size", options.vocab_size, minimum=258)
    try:
        return train_bpe("\n".join(row.prompt + row.completion for row in dataset.rows), options.vocab_size)
    except InputError as error:
        raise InputError(f"--vocab-size {options.vocab_size}: {error}") from None
