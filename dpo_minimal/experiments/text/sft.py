"""`python -m dpo_minimal sft`: supervised fine-tuning, from which every preference training starts.

Maximum likelihood of completions given their prompts: the loss is -log pi(y|x) / (tokens of y), in nats.
Only the completion is scored, its one end-of-text included; the prompt is read but not learnt.

  dpo-minimal sft                                      a small GPT-2 learns to write film reviews
  dpo-minimal sft --data rows.jsonl                    a new small GPT-2, with a vocabulary of its own
  dpo-minimal sft --data rows.jsonl --model gpt2       go on from a released GPT-2, or from any folder of one
  dpo-minimal sft --data pairs.jsonl --model FOLDER    the chosen of pairs: the paper's Preferred-FT
  dpo-minimal sft --data rows.jsonl --model gpt2 --lora-r 8    learn an adapter (LoRA)

Rows are {prompt, completion}, {instruction, input, output}, {text}, chat messages, or preference pairs. DPO
assumes that its reference knows the completions it compares: without this step it compares answers that the
model would never give.

A run folder holds model/ (Hugging Face's layout: GPT2LMHeadModel.from_pretrained reads it; tiktoken.json is
the vocabulary), metrics.jsonl, training.png, config.json and checkpoints/.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from ...model import GPT, GPTConfig
from ...text import processes
from ...text.data import Dataset
from ...text.objectives import sft_objective
from ...text.tokenizer import TOKENIZERS, make_tokenizer
from ...text.training_run import Data
from ...validation import InputError
from ..options import COMMON, DATA, RUN, TRAINING, Option, add_options, altered, at_least, resolve
from . import figure, setup
from .report import sample_lines
from .setup import Policy, Rows, load_policy

CONTEXT, REVIEWS_CONTEXT = 256, 96  # a review is shorter than 96 tokens, but not than 96 bytes
VOCABULARY = 1024  # of a BPE of its own
FINE_TUNING_RATE = 2e-5  # of a model that knows a language already
SHOWN = 4
GROUPS = {
    "data": altered(
        DATA, rows={"reviews": 8000},
        max_length={"help": DATA["max_length"].help[:-1] + "; of a new model it is this number, else "
                    f"{CONTEXT}, or {REVIEWS_CONTEXT} for the reviews unless read as bytes)"},
    ),
    "model": {
        "model": COMMON["model"]._replace(
            help="start from this run, folder, or released name (gpt2 to gpt2-xl), with its own tokenizer "
            f"and a default learning rate of {FINE_TUNING_RATE:g} (default: a new small GPT-2)"
        ),
        "tokenizer": Option(
            "of a new model: raw bytes, a BPE learnt from the data, or GPT-2's own", str, "bpe",
            choices=TOKENIZERS,
        ),
        "vocab_size": Option(
            f"tokens of that BPE (default: {VOCABULARY}, or as many as the data allow)", reviews=704,
            check=at_least(258),
        ),
        "n_layer": Option("layers of a new model", int, 4, 3),
        "n_head": Option("heads of a new model", int, 4),
        "n_embd": Option("width of a new model", int, 128),
    },
    "training": altered(
        TRAINING, learning_rate={"default": 1e-3, "reviews": 2e-3}, optimizer={"default": "adamw"},
        per_device_train_batch_size={"reviews": 16}, gradient_accumulation_steps={"reviews": 2},
        warmup_steps={"reviews": 20},
    ),
    "adapter (LoRA)": setup.LORA,
    "run": altered(RUN, eval_steps={"reviews": 100}),
}  # fmt: skip
add_arguments = partial(add_options, groups=GROUPS)


def run(args: argparse.Namespace) -> Path:
    """Check everything, train, and write the run folder, which is returned."""
    made, rate = args.model is not None, {"default": FINE_TUNING_RATE, "reviews": FINE_TUNING_RATE}
    tuning = GROUPS | {"training": altered(GROUPS["training"], learning_rate=rate)}
    options = resolve(
        args, tuning if made else GROUPS,
        ("tokenizer vocab_size n_layer n_head n_embd", made,
         "{} is given by the model of --model; leave it out."),
        ("lora_r", not made, "{} needs --model: the weights of a new model all have to be learnt."),
        ("vocab_size", args.tokenizer not in (None, "bpe"),
         f"{{}} is used only with --tokenizer bpe, not {args.tokenizer}; leave it out."),
        ("eval_steps", args.held_out == 0, "{} is not used with --held-out 0; leave it out."),
        command="sft",
    )  # fmt: skip
    setup.begin(options)
    dataset = setup.load_rows(options, "demonstrations", options.rows, options.seed)
    policy = _new_policy(options, dataset) if options.model is None else load_policy(options.model)
    rows = setup.prepare(options, dataset, policy)
    del dataset  # its texts: from here on there are tokens
    with setup.resumable("sft", setup.open_folder(options, "sft")) as folder:
        return _train(options, folder, policy, rows)


def _train(options: argparse.Namespace, folder: Path, policy: Policy, rows: Rows) -> Path:
    setup.pin_start(folder, policy, rows)
    model = policy.model.to(options.device)
    print(f"{setup.size_of(model):,} parameters, {policy.tokenizer.vocab_size} tokens.", flush=True)
    model = model if options.lora_r is None else setup.adapted(options, model)
    policy = policy._replace(model=model)
    records = setup.train_in(
        folder, options, policy, sft_objective(model, dtype=options.dtype), Data(rows.train, rows.held_out),
        name="SFT",
    )  # fmt: skip
    if not processes.leads():
        return folder
    figure.sft_figure(records, folder / "training.png")
    length = setup.sample_length(None, model.config.block_size)
    samples = setup.draw_samples(options, policy, model, rows, SHOWN, length)
    print("\n".join(["", "What it writes:", *sample_lines(SHOWN, {"": samples}), ""]))
    print(f"Wrote {folder}/model, training.png, metrics.jsonl and config.json.", flush=True)
    return folder


def _new_policy(options: argparse.Namespace, dataset: Dataset) -> Policy:
    """A GPT-2 with random weights, and its tokenizer."""
    texts = (row.prompt + row.completion for row in dataset.rows)
    given = options.vocab_size
    try:
        tokenizer = make_tokenizer(options.tokenizer, texts, given or VOCABULARY, at_most=given is None)
    except InputError as error:
        if options.tokenizer != "bpe" or given is None:  # GPT-2's vocabulary cannot be fetched, a bad text
            raise
        raise InputError(f"--vocab-size {given}: {error}") from None
    size = tokenizer.vocab_size
    if options.tokenizer == "bpe" and given is None and size < VOCABULARY:
        print(f"note: the vocabulary has {size} tokens instead of {VOCABULARY}, as many as the data allow.\n")
    reviews = options.data is None and options.tokenizer != "bytes"
    context = options.max_length or (REVIEWS_CONTEXT if reviews else CONTEXT)
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd")}
    torch.manual_seed(options.seed)
    return Policy(GPT(GPTConfig(tokenizer.vocab_size, context, **shape)), tokenizer)
