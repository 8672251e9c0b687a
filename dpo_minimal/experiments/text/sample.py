"""`python -m dpo_minimal sample`: what a model writes.

  dpo-minimal sample --model runs/dpo-001                         openings of film reviews, with true rewards
  dpo-minimal sample --model gpt2 --prompt "The film" --count 3   a prompt of yours; --prompt may be repeated
  dpo-minimal sample --model FOLDER --data pairs.jsonl            the prompts of a file, each once

MODEL is a run, a folder in Hugging Face's layout with its tiktoken.json, or a released name. A prompt is read
as in training, apart from its completion, so a space after it belongs to the completion.

Beside each sample stands log pi(y|x), in nats, of all its tokens, its end-of-text included: the policy's own,
whatever --temperature, --top-k and --top-p did to the draw. A sample that did not end by itself is marked
[cut], and its log pi is that of what was drawn. The true reward, from -3 to 3, exists for film reviews only.
The same seed, prompts and options give the same samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm

from ...generation import generate
from ...policy import shared_prompt_batch, shared_prompt_logps
from ...text.data import KINDS, load_dataset
from ...text.reviews import prompts as review_prompts
from ...text.reviews import sentiment
from ...validation import InputError, check_count, check_device, check_seed
from .report import prompt_line, text_lines
from .setup import Policy, load_policy

ROWS, LONGEST = 5, 128  # prompts where none are given; tokens of a sample where no number is
TOGETHER = 32  # samples; GPT-2's caches and logits of so many take some two gigabytes


class Sample(NamedTuple):
    """One completion of one prompt.

    Fields:
        prompt, completion: texts.
        ended: whether end-of-text was drawn.
        tokens: how many were drawn, end-of-text included.
        logp: log pi(completion | prompt), nats.
        reward: the true one, or None where nobody knows it.
    """

    prompt: str
    completion: str
    ended: bool
    tokens: int
    logp: float
    reward: float | None


class _Prompt(NamedTuple):
    place: str  # for messages
    text: str
    ids: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="a run, a folder, or a released name (gpt2 to gpt2-xl)",
    )
    what = parser.add_argument_group("prompts")
    what.add_argument("--prompt", metavar="TEXT", action="append", help="may be repeated")
    what.add_argument(
        "--data",
        metavar="FILE",
        help="prompts of a file that sft, dpo or audit reads (default: film reviews)",
    )
    what.add_argument("--kind", choices=KINDS, help="what the rows of --data are (default preferences)")
    what.add_argument("--rows", type=int, metavar="N", help=f"the first N of these prompts (default {ROWS})")
    how = parser.add_argument_group("samples")
    how.add_argument("--count", type=int, metavar="N", help="of each prompt (default 1)")
    how.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help=f"where a sample is cut (default {LONGEST}, less where the model's context is shorter)",
    )  # fmt: skip
    how.add_argument(
        "--temperature", type=float, metavar="T", default=1.0,
        help="1 (default) is the policy itself, above is more even; 0 takes the likeliest token each time",
    )  # fmt: skip
    how.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    how.add_argument("--top-p", type=float, metavar="P", help="from the fewest that together have P of it")
    how.add_argument("--seed", type=int, help="of the draws and of the generated prompts (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample, nothing else")


def run(args: argparse.Namespace) -> list[Sample]:
    """Draw and print; nothing is written. Returns the samples, the first prompt's first."""
    _check(args)
    policy = load_policy(args.model)
    policy.model.to(args.device)
    prompts = _prompts(args, policy)
    most = _room(policy, prompts, args.max_new_tokens)
    samples = list(_draw(args, policy, prompts, most))
    if args.json:
        for sample in samples:
            known = {name: value for name, value in sample._asdict().items() if value is not None}
            print(json.dumps(known))
        return samples
    reward = "reward  " if _reviews(args) else ""
    print(f"{args.model}: {args.count or 1} of each prompt, at most {most} tokens, {_manner(args)}.")
    print(f"Before each sample: {reward}log pi(y|x) in nats.")
    for number, sample in enumerate(samples):
        if number % (args.count or 1) == 0:
            print("\n" + prompt_line(sample.prompt))
        print("\n".join(_sample_lines(sample)))
    return samples


def _check(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.data is not None:
        raise InputError("--prompt and --data both give the prompts; leave one out.")
    if args.kind is not None and args.data is None:
        raise InputError("--kind is used only with --data, of whose rows it tells the kind; leave it out.")
    if args.rows is not None and args.prompt is not None:
        raise InputError("--rows is not used with --prompt, as all prompts given are taken; leave it out.")
    for flag, value in (
        ("--rows", args.rows),
        ("--count", args.count),
        ("--max-new-tokens", args.max_new_tokens),
    ):
        if value is not None:
            check_count(flag, value)
    if not 0 <= args.temperature < float("inf"):
        raise InputError(f"--temperature must be a number from 0 on, got {args.temperature}.")
    if args.top_k is not None:
        check_count("--top-k", args.top_k)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise InputError(f"--top-p must lie in (0, 1], got {args.top_p}; 1 keeps all tokens.")
    if args.temperature == 0:
        for flag, value in (("--count", args.count), ("--top-k", args.top_k), ("--top-p", args.top_p)):
            if value is not None:
                raise InputError(
                    f"{flag} is not used with --temperature 0, whose only sample is the likeliest token each "
                    "time; leave it out."
                )
        if args.seed is not None and not _reviews(args):
            raise InputError("--seed is not used with --temperature 0, which draws nothing; leave it out.")
    if args.seed is not None:
        check_seed("--seed", args.seed)
    check_device(args.device)


def _reviews(args: argparse.Namespace) -> bool:
    """Whether the prompts are generated ones."""
    return args.prompt is None and args.data is None


def _manner(args: argparse.Namespace) -> str:
    if args.temperature == 0:
        return "the likeliest token each time"
    cuts = [f"{name} {value}" for name, value in (("top-k", args.top_k), ("top-p", args.top_p)) if value]
    return ", ".join([f"temperature {args.temperature:g}", *cuts, f"seed {args.seed or 0}"])


def _prompts(args: argparse.Namespace, policy: Policy) -> list[_Prompt]:
    """The prompts with their ids, each once."""
    rows = ROWS if args.rows is None else args.rows
    if args.prompt is not None:
        named = {text: f"--prompt {text[:40]!r}" for text in args.prompt}
        if len(named) < len(args.prompt):
            raise InputError("--prompt gives the same text twice; take --count for more samples of it.")
    elif args.data is not None:
        dataset = load_dataset(args.data, args.kind or "preferences")
        named = {}
        for row, place in zip(dataset.rows, dataset.places, strict=True):
            named.setdefault(row.prompt, place)
        named = dict(list(named.items())[:rows])
    else:
        named = {text: f"review prompt {text!r}" for text in _openings(rows, args.seed or 0)}
    prompts = []
    for text, place in named.items():
        try:
            ids = policy.tokenizer.encode(text) or [policy.tokenizer.eot]
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        prompts.append(_Prompt(place, text, ids))
    return prompts


def _openings(count: int, seed: int) -> list[str]:
    """So many different openings of reviews."""
    drawn = list(dict.fromkeys(review_prompts(10 * count, seed=seed)))
    if len(drawn) < count:
        raise InputError(f"--rows {count}: the generated reviews have not so many openings; lower it.")
    return drawn[:count]


def _room(policy: Policy, prompts: list[_Prompt], asked: int | None) -> int:
    """Tokens that a sample may have. Raises InputError naming a prompt that leaves too little room."""
    context = policy.model.config.block_size
    place, _, ids = max(prompts, key=lambda prompt: len(prompt.ids))
    if len(ids) + (asked or 1) > context:
        wanted = "leaves no room" if asked is None else f"leaves no room for --max-new-tokens {asked}"
        raise InputError(
            f"{place}: has {len(ids)} tokens, which {wanted} in the model's context of {context}; shorten "
            f"it{'' if asked is None else ' or lower that number'}."
        )
    return min(LONGEST, context - len(ids)) if asked is None else asked


def _draw(args: argparse.Namespace, policy: Policy, prompts: list[_Prompt], most: int) -> Iterator[Sample]:
    """`--count` samples of each prompt, in order."""
    model, tokenizer = policy
    generator = torch.Generator(args.device).manual_seed(args.seed or 0)
    wanted = [prompt for prompt in prompts for _ in range(args.count or 1)]
    for start in tqdm(range(0, len(wanted), TOGETHER), desc="sampling", disable=None, leave=False):
        some = wanted[start : start + TOGETHER]
        ids = [prompt.ids for prompt in some]
        drawn = generate(
            model, ids, max_new_tokens=most, eos=tokenizer.eot, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, generator=generator,
        )  # fmt: skip
        with torch.no_grad():
            batch = shared_prompt_batch(ids, [[y] for y in drawn]).to(args.device)
            logps = shared_prompt_logps(model, batch)[:, 0].tolist()
        for prompt, y, logp in zip(some, drawn, logps, strict=True):
            text = tokenizer.decode(y)
            reward = sentiment(text) if _reviews(args) else None
            yield Sample(prompt.text, text, y[-1] == tokenizer.eot, len(y), logp, reward)


# --------------------------------------------------------------------------------------------- reporting


def _sample_lines(sample: Sample) -> list[str]:
    reward = "" if sample.reward is None else f"{sample.reward:+.2f} "
    text = sample.completion + ("" if sample.ended else " [cut]")
    return text_lines(f"{reward}{sample.logp:8.2f}", text)
