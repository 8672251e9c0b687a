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
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from ...generation import generate
from ...policy import shared_prompt_batch, shared_prompt_logps
from ...text.data import KINDS, load_dataset
from ...text.reviews import prompts as review_prompts
from ...text.reviews import sentiment
from ...validation import InputError, check_not_negative
from ..options import COMMON, Option, add_options, must, resolve
from .report import prompt_line, text_lines
from .setup import Policy, load_policy

LONGEST = 128  # tokens of a sample where no number is given
TOGETHER = 32  # samples; GPT-2's caches and logits of so many take some two gigabytes
GROUPS = {
    "model": {"model": COMMON["model"]._replace(required=True)},
    "prompts": {
        "prompt": Option("a prompt of your own; may be repeated", list, metavar="TEXT"),
        "data": Option(
            "prompts of a file that sft, dpo or audit reads (default: film reviews)", str, metavar="FILE"
        ),
        "kind": Option("what the rows of --data are", str, "preferences", choices=KINDS),
        "rows": Option("the first N of the prompts of --data or of the reviews", int, 5),
    },
    "samples": {
        "count": Option("samples of each prompt", int, 1),
        "max_new_tokens": Option(f"most tokens of a sample (default {LONGEST}, or what the context leaves)"),
        "temperature": Option(
            "1 is the policy itself, above is more even; 0 takes the likeliest token each time",
            float, 1.0, check=check_not_negative, metavar="T",
        ),
        "top_k": Option("draw from the K likeliest tokens only (default: from all)", metavar="K"),
        "top_p": Option(
            "draw from the fewest tokens that together have probability P (default: from all)",
            float, check=must(lambda p: 0 < p <= 1, "lie in (0, 1]"), metavar="P",
        ),
        "seed": COMMON["seed"]._replace(help="of the draws and of the generated prompts"),
    },
    "run": {
        "device": COMMON["device"],
        "json": Option("print one JSON object a sample, nothing else", bool),
    },
}  # fmt: skip
add_arguments = partial(add_options, groups=GROUPS)


class Sample(NamedTuple):
    """One completion of one prompt."""

    prompt: str
    completion: str
    ended: bool  # whether end-of-text was drawn
    tokens: int  # drawn, end-of-text included
    logp: float  # log pi(completion | prompt), nats
    reward: float | None  # the true one, or None where nobody knows it


_Prompt = tuple[str, str, list[int]]  # place, for messages; text; ids


def run(args: argparse.Namespace) -> list[Sample]:
    """Draw and print; nothing is written. Returns the samples, the first prompt's first."""
    greedy, reviews = args.temperature == 0, args.prompt is None and args.data is None
    likeliest = "the likeliest token each time"
    alone = f"{{}} is not used with --temperature 0, whose only sample is {likeliest}; leave it out."
    args = resolve(
        args, GROUPS,
        ("prompt", args.data is not None, "{} and --data both give the prompts; leave one out."),
        ("kind", args.data is None,
         "{} is used only with --data, of whose rows it tells the kind; leave it out."),
        ("rows", args.prompt is not None,
         "{} is not used with --prompt, as all prompts given are taken; leave it out."),
        ("count top_k top_p", greedy, alone),
        ("seed", greedy and not reviews,
         "{} is not used with --temperature 0, which draws nothing; leave it out."),
    )  # fmt: skip
    policy = load_policy(args.model)
    policy.model.to(args.device)
    prompts = _prompts(args, policy)
    most = _longest(policy, prompts, args.max_new_tokens)
    samples = list(_draw(args, policy, prompts, most, reviews))
    if args.json:
        for sample in samples:
            known = {name: value for name, value in sample._asdict().items() if value is not None}
            print(json.dumps(known))
        return samples
    cuts = [f"{name} {value}" for name, value in (("top-k", args.top_k), ("top-p", args.top_p)) if value]
    manner = ", ".join([f"temperature {args.temperature:g}", *cuts, f"seed {args.seed}"])
    manner = likeliest if greedy else manner
    print(f"{args.model}: {args.count} of each prompt, at most {most} tokens, {manner}.")
    print(f"Before each sample: {'reward  ' if reviews else ''}log pi(y|x) in nats.")
    for number, sample in enumerate(samples):
        if number % args.count == 0:
            print("\n" + prompt_line(sample.prompt))
        reward = "" if sample.reward is None else f"{sample.reward:+.2f} "
        text = sample.completion + ("" if sample.ended else " [cut]")
        print("\n".join(text_lines(f"{reward}{sample.logp:8.2f}", text)))
    return samples


def _prompts(args: argparse.Namespace, policy: Policy) -> list[_Prompt]:
    """The prompts with their ids, each once."""
    if args.prompt is not None:
        named = {text: f"--prompt {text[:40]!r}" for text in args.prompt}
        if len(named) < len(args.prompt):
            raise InputError("--prompt gives the same text twice; take --count for more samples of it.")
    elif args.data is not None:
        dataset, named = load_dataset(args.data, args.kind), {}
        if dataset.unread:
            print(dataset.columns(), file=sys.stderr)  # not into the JSON
        for row, place in zip(dataset.rows, dataset.places, strict=True):
            named.setdefault(row.prompt, place)
    else:
        openings = review_prompts(10 * args.rows, seed=args.seed)
        named = {text: f"review prompt {text!r}" for text in openings}
        if len(named) < args.rows:
            raise InputError(
                f"--rows {args.rows}: the generated reviews have not so many openings; lower it."
            )
    if args.prompt is None:
        named = dict(list(named.items())[: args.rows])
    prompts = []
    for text, place in named.items():
        try:
            ids = policy.tokenizer.encode(text) or [policy.tokenizer.eot]
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        prompts.append((place, text, ids))
    return prompts


def _longest(policy: Policy, prompts: list[_Prompt], asked: int | None) -> int:
    """Tokens that a sample may have. Raises InputError naming a prompt that leaves too few in the context."""
    context = policy.model.config.block_size
    place, _, ids = max(prompts, key=lambda prompt: len(prompt[2]))
    if len(ids) + (asked or 1) > context:
        what = "a sample" if asked is None else f"--max-new-tokens {asked}"
        raise InputError(
            f"{place}: has {len(ids)} tokens, which leaves too few of the model's context of {context} for "
            f"{what}; shorten it{'' if asked is None else ' or lower that number'}."
        )
    return min(LONGEST, context - len(ids)) if asked is None else asked


def _draw(
    args: argparse.Namespace, policy: Policy, prompts: list[_Prompt], most: int, reviews: bool
) -> Iterator[Sample]:
    """`--count` samples of each prompt, in order."""
    model, tokenizer = policy
    generator = torch.Generator(args.device).manual_seed(args.seed)
    wanted = [prompt for prompt in prompts for _ in range(args.count)]
    for start in tqdm(range(0, len(wanted), TOGETHER), desc="sampling", disable=None, leave=False):
        some = wanted[start : start + TOGETHER]
        ids = [prompt[2] for prompt in some]
        drawn = generate(
            model, ids, max_new_tokens=most, eos=tokenizer.eot, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, generator=generator,
        )  # fmt: skip
        with torch.no_grad():
            batch = shared_prompt_batch(ids, [[y] for y in drawn]).to(args.device)
            logps = shared_prompt_logps(model, batch)[:, 0].tolist()
        for (_, prompt, _), y, logp in zip(some, drawn, logps, strict=True):
            text = tokenizer.decode(y)
            reward = sentiment(text) if reviews else None
            yield Sample(prompt, text, y[-1] == tokenizer.eot, len(y), logp, reward)
