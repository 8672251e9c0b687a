"""`python -m dpo_minimal audit`: what a model will read of a file, and what is wrong with it.

Mistakes in preference data raise no error: an answer cut before its end, a pair in both orders, a chosen
answer that is merely longer. Before training, this command reads a file as sft and dpo do and prints

  lengths    of prompts and completions in tokens, and how many rows a --max-length would hold
  lead       how much longer chosen is than rejected: DPO learns length where length is what differs
  troubles   rows cut, too long, doubled, judged both ways or spelling out end-of-text, each with its place
             and the remedy; what is not listed was not found
  a row      token by token, as the model sees it: [prompt][ tokens] then each completion with its one
             [<|endoftext|>], which is learnt like any other token

Lengths depend on the tokenizer: bytes, unless --model names the model that is to be trained, or --tokenizer
another kind. Nothing is written. Warnings leave the exit code 0; a file that cannot be read as asked gives 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from functools import partial

from ...text.audit import Audit
from ...text.batches import Example, tokenize
from ...text.data import KINDS, Dataset, completions_of
from ...text.tokenizer import TOKENIZERS, Tokenizer, make_tokenizer
from ..options import COMMON, Option, add_options, at_least, resolve
from .setup import load_policy_tokenizer, load_rows

REVIEWS = 1000  # rows where there is no file
VOCABULARY = 512  # of a BPE trained on the data
UNLIMITED = 2**31 - 1
BARS, BAR_WIDTH, LINE, SHOWN = 10, 40, 100, 48
GROUPS = {
    "data": {
        "data": Option(
            f"JSON or JSONL, gzipped or not (default: {REVIEWS} generated film reviews)", str, metavar="FILE",
        ),
        "kind": Option(
            "what the rows are: pairs of chosen and rejected, rankings with the best first, completions with "
            "a label, or prompts with one completion to imitate", str, "preferences", choices=KINDS,
        ),
        "skip_bad_rows": COMMON["skip_bad_rows"],
    },
    "reading": {
        "tokenizer": Option(
            f"raw bytes (default), a BPE of up to {VOCABULARY} tokens learnt from the data, or GPT-2's own",
            str, choices=TOKENIZERS,
        ),
        "model": Option("the tokenizer of this run, folder, or released name", str, metavar="MODEL"),
        "max_length": Option(
            "what a limit of N tokens for prompt and longest completion would do (default: no limit); rows "
            "that cannot fit, at which training would stop, are counted", check=at_least(2),
        ),
        "max_prompt_length": Option("and a limit for the prompt alone"),
    },
    "output": {"json": Option("print one JSON object, with every place", bool)},
}  # fmt: skip
add_arguments = partial(add_options, groups=GROUPS)


def run(args: argparse.Namespace) -> Audit:
    """Read, tokenise, print; nothing is written. Returns the audit."""
    args = resolve(
        args, GROUPS,
        ("max_prompt_length", args.max_length is None, "{} is used only with --max-length; give both."),
        ("tokenizer", args.model is not None, "{} is given by the model of --model; leave it out."),
        ("kind", args.data is None and args.kind in ("rankings", "labels"),
         f"{{}} {args.kind} needs --data: the generated reviews have no {args.kind}."),
    )  # fmt: skip
    dataset = load_rows(args, args.kind, REVIEWS)
    tokenizer = _tokenizer(args, dataset)
    examples, audit = tokenize(
        dataset, tokenizer, max_length=UNLIMITED if args.max_length is None else args.max_length,
        max_prompt_length=args.max_prompt_length, skip_bad_rows=True,
    )  # fmt: skip
    source = args.data or f"{REVIEWS} generated reviews"
    if args.json:
        settings = {"data": source, "kind": args.kind, "field": dataset.field, "read": dataset.read,
                    "not_read": dataset.unread, "max_length": args.max_length,
                    "max_prompt_length": args.max_prompt_length, "tokenizer": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}  # fmt: skip
        example = {"place": examples[0].place, **_as_texts(examples[0], tokenizer)}
        print(json.dumps(settings | audit.as_dict() | {"example": example}, indent=2))
        return audit
    limit = "none" if args.max_length is None else f"{args.max_length} tokens"
    print(f"{source}, read as {args.kind}\n{dataset.columns()}")
    few = args.model is None and tokenizer.kind == "bpe" and tokenizer.vocab_size < VOCABULARY
    tokens = f"{tokenizer.vocab_size} tokens{', as many as the data allow' if few else ''}"
    print(f"tokenizer: {tokenizer.kind} with {tokens}; limit of a row: {limit}\n")
    print(f"{audit}\n")
    print("prompt + longest completion, as the model reads them: how many rows, and how many up to here")
    print("\n".join(histogram([len(e.prompt) + max(map(len, e.completions)) for e in examples.as_arrays()])))
    print(f"\nThe first row, token by token ({examples[0].place}):")
    print("\n".join(_shown(examples[0], tokenizer)))
    return audit


def _tokenizer(args: argparse.Namespace, dataset: Dataset) -> Tokenizer:
    if args.model is not None:
        return load_policy_tokenizer(args.model)
    texts = (text for row in dataset.rows for text in (row.prompt, *completions_of(row)))
    return make_tokenizer(args.tokenizer or "bytes", texts, VOCABULARY, at_most=True)


def histogram(counts: list[int]) -> list[str]:
    """Lines with a bar for each range of counts, their number, and the share of all up to there.

    Args: counts, at least one.

    Example:
        >>> for line in histogram([8, 9, 9, 9, 11]):
        ...     print(line)
                  8  ##############                                1   20%
                  9  ########################################      3   80%
                 10                                                0   80%
                 11  ##############                                1  100%
    """
    low, high = min(counts), max(counts)
    widths = (digit * 10**zeros for zeros in itertools.count() for digit in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < BARS)
    bins = Counter(count // width for count in counts)
    lines, below = [], 0
    for number in range(low // width, high // width + 1):
        below += bins[number]
        first, last = number * width, (number + 1) * width - 1
        name = str(first) if width == 1 else f"{first}-{last}"
        bar = "#" * -(-bins[number] * BAR_WIDTH // max(bins.values()))
        lines.append(f"{name:>11}  {bar:<{BAR_WIDTH}} {bins[number]:>6}  {below / len(counts):>4.0%}")
    return lines


def _shown(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The row as lines of bracketed tokens, the middle of long parts left out."""
    lines = []
    for name, tokens in _as_texts(example, tokenizer).items():
        words = [f"[{token}]" for token in tokens]
        if len(words) > SHOWN:
            words[SHOWN // 2 : -SHOWN // 2] = [f" ... {len(words) - SHOWN} more ... "]
        line = f"  {name:<12}"
        for word in words:
            if len(line) + len(word) > LINE:
                lines.append(line)
                line = " " * 14
            line += word
        lines.append(line)
    return lines


def _as_texts(example: Example, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Prompt and completions by their names, each token as text."""
    many = len(example.completions)
    names = {1: ["completion"], 2: ["chosen", "rejected"]}.get(many, [f"rank {n + 1}" for n in range(many)])
    if example.label is not None:
        names = ["good" if example.label else "bad"]
    parts = zip(["prompt", *names], [example.prompt, *example.completions], strict=True)
    return {name: list(map(tokenizer.token_text, ids)) for name, ids in parts}
