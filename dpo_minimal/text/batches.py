"""Checked rows become token ids, a held-out part, and the optimizer steps of an epoch; the audit counts what
was cut, left out or suspicious.

How prompts and completions are encoded, joined and cut is said in README.md, "Tokens". Lengths say where they
end; no token id is searched for.

But: no files (data.py), no tensors and no padding (policy.py), no model.

Shapes: N examples, K completions of one prompt; token ids are plain lists.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..validation import InputError, check_count
from .audit import FINDINGS, Audit, Findings, Lengths
from .data import NOUNS, Dataset, completions_of
from .examples import Example, Examples
from .tokenizer import Tokenizer


def tokenize(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    skip_bad_rows: bool = False,
) -> tuple[Examples, Audit]:
    """Encode checked rows, cut prompts on the left until each row fits, and count all that happened.

    Args:
        dataset: from `load_dataset` or `dataset_from_rows`; it is not altered.
        max_length: tokens of a prompt with its longest completion, end-of-text included; at least 2.
        max_prompt_length: most tokens of a prompt; None: only max_length limits it.
        skip_bad_rows: leave out and count a row that cannot fit, instead of stopping at it.
    Returns: (examples, audit), examples in the order of the file.
    Raises:
        InputError: a completion of max_length tokens or more, or a text that cannot be encoded, naming its
            place; no row is left; an option out of range.
    """
    check_limits(max_length, max_prompt_length)
    examples = Examples()
    sizes: list[tuple[int, ...]] = []  # of the prompt and its completions, before any cut
    findings: Findings = {name: [] for name in FINDINGS} | {"skipped": list(dataset.skipped)}
    findings |= {name: list(places) for name, places in dataset.findings.items()}
    rows = tqdm(dataset.rows, desc="tokenising", unit="row", disable=None, leave=False)
    for row, place in zip(rows, dataset.places, strict=True):
        texts, prompt_text, label = completions_of(row), row.prompt, getattr(row, "label", None)
        try:
            prompt = tokenizer.encode(prompt_text) or [tokenizer.eot]
            completions = [[*tokenizer.encode(text), tokenizer.eot] for text in texts]
        except InputError as error:  # a text without an encoding; the tokenizer does not know its row
            if not skip_bad_rows:
                raise InputError(f"{place}: {error}") from None
            findings["skipped"].append(f"{place}: {error}")
            continue
        sizes.append((len(prompt), *map(len, completions)))
        longest = max(map(len, completions))
        if longest >= max_length:
            problem = f"{place}: a completion of {longest} tokens with its end-of-text"
            if not skip_bad_rows:
                raise InputError(
                    f"{problem} leaves none of --max-length {max_length} for a prompt; raise it, or leave "
                    "such rows of a file out with --skip-bad-rows."
                )
            findings["too_long"].append(problem)
            continue
        limit = min(max_length - longest, max_prompt_length or max_length)
        examples.append(Example(prompt[-limit:], completions, place, label))
        if len(prompt) > limit:
            findings["truncated"].append(place)
        if _merges_across(prompt_text, texts, tokenizer):
            findings["merged"].append(place)
    if not examples:
        none_fits = f"none of {len(dataset.rows)} rows fits --max-length {max_length}; raise it."
        raise InputError(none_fits if dataset.rows else "the data hold no rows; add some.")
    _compare_rows(examples, findings)
    return examples, _audit(dataset, examples, sizes, findings)


def check_limits(max_length: int, max_prompt_length: int | None) -> None:
    """Raise InputError for limits that no row could meet."""
    check_count("--max-length", max_length, minimum=2)
    if max_prompt_length is not None:
        check_count("--max-prompt-length", max_prompt_length)
        if max_prompt_length >= max_length:
            raise InputError(
                f"--max-prompt-length {max_prompt_length} has no effect, because a prompt and its completion "
                f"share --max-length {max_length}; give a smaller number or leave it out."
            )


def _merges_across(prompt: str, completions: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Whether a token would cross the border if the two were encoded together: "costs " and "46" become
    "costs" and " 46". A few characters on either side decide, because no tokenizer here joins words across a
    space."""
    left = prompt[-_BOUNDARY:]
    return any(
        tokenizer.encode(left + right) != tokenizer.encode(left) + tokenizer.encode(right)
        for right in (text[:_BOUNDARY] for text in completions)
        if left and not _APART.search(left[-2:] + right[:1])
    )


_BOUNDARY = 64
# Where GPT-2's pattern ends a word at the border whatever stands around it, so that nothing can merge: before
# a space that is the first one; after a line end that is the only white space; between a sign and a letter or
# digit, except the apostrophe's "'s". Most rows are of these kinds, and encoding would take longer.
_APART = re.compile(r"""(?:\S[ ]|\S\n\S|[.,:;!?)\]"][A-Za-z0-9])\Z""")


def _compare_rows(examples: Examples, findings: Findings) -> None:
    """Find what rows have in common, as the model sees them: by digests of their ids after every cut."""
    seen: dict[str, dict[bytes, tuple[str, bytes]]]
    seen = {"repeated_prompt": {}, "duplicated": {}, "contradictory": {}}
    for row in examples.as_arrays():
        parts = (row.prompt, *row.completions)
        prompt, *completions = (hashlib.blake2b(ids, digest_size=16).digest() for ids in parts)
        if len(set(completions)) < len(completions):
            findings["identical"].append(row.place)
        whole = b"".join([prompt, *completions, repr(row.label).encode()])
        unordered = b"".join([prompt, *sorted(completions)])
        this = row.place, whole
        for (name, known), key in zip(seen.items(), (prompt, whole, unordered)):
            first = known.setdefault(key, this)
            if first is not this and (name != "contradictory" or first[1] != whole):
                findings[name].append(f"{row.place} (as {first[0].rpartition(', ')[2]})")


def _audit(dataset: Dataset, examples: Examples, sizes: list[tuple[int, ...]], findings: Findings) -> Audit:
    counts = {
        "prompt": [size[0] for size in sizes],
        "completion": [length for size in sizes for length in size[1:]],
        "row": [size[0] + max(size[1:]) for size in sizes],
    }
    pairs = (e.completions for e in examples.as_arrays() if len(e.completions) > 1)
    leads = [len(completions[0]) - len(completions[-1]) for completions in pairs]
    labels = [e.label for e in examples.as_arrays() if e.label is not None]
    return Audit(
        rows=len(examples),
        noun=NOUNS[type(dataset.rows[0])],
        prompts=len(examples) - len(findings["repeated_prompt"]),
        lengths={k: Lengths(statistics.fmean(c), statistics.median(c), max(c)) for k, c in counts.items()},
        lead=statistics.fmean(leads) if leads else None,
        best_longer=sum(lead > 0 for lead in leads) / len(leads) if leads else None,
        good=sum(labels) / len(labels) if labels else None,
        findings=findings,
    )


# ------------------------------------------------------------------------------------------- held-out part


def split_by_prompt(examples: Sequence[Example], fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """Hold rows out for evaluation so that no prompt is on both sides.

    Prompts are compared by their ids after every cut: two texts that the model cannot tell apart count as
    one prompt. Where all rows have the same one, such as none, completions are compared as well. A prompt's
    side depends on its ids and the seed, not on the order of the rows.

    Args:
        examples: N rows.
        fraction: of the rows to hold out, in [0, 1); met as closely as whole prompts allow. 0 holds out none.
        seed: another seed, another split.
    Returns: (train, held_out), each in the order of the rows.
    Raises InputError: a fraction out of range, or one that leaves a side empty.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise InputError(f"the held-out fraction must lie in [0, 1), got {fraction!r}.")
    examples = Examples(examples)
    if fraction == 0:
        return examples, examples[:0]
    one_prompt = all(a.prompt == b.prompt for a, b in itertools.pairwise(examples.as_arrays()))
    keys = [
        _digest(seed, tuple(map(tuple, (row.prompt, *(row.completions if one_prompt else ())))))
        for row in examples.as_arrays()
    ]
    rows, what = Counter(keys), "completions" if one_prompt else "prompts"
    target, held_rows, held_prompts = fraction * len(examples), 0, set()
    for prompt in sorted(rows):
        if abs(held_rows + rows[prompt] - target) < abs(held_rows - target):
            held_rows += rows[prompt]
            held_prompts.add(prompt)
    if held_rows in (0, len(examples)):
        side, change = ("held-out", "higher") if held_rows == 0 else ("training", "lower")
        raise InputError(
            f"a held-out fraction of {fraction} leaves the {side} part empty: there are {len(examples)} rows "
            f"with {len(rows)} different {what}, which stay whole; give a {change} fraction, more "
            "prompts, or 0 to hold nothing out."
        )
    train = examples[[index for index, prompt in enumerate(keys) if prompt not in held_prompts]]
    return train, examples[[index for index, prompt in enumerate(keys) if prompt in held_prompts]]


def _digest(*parts: Any) -> bytes:
    """Bytes that look random and depend on nothing but the parts."""
    return hashlib.sha256(repr(parts).encode()).digest()


# ------------------------------------------------------------------------------------------ optimizer steps


def windows(
    examples: Sequence[Example], *, window_size: int, micro_size: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The optimizer steps of one epoch: each a window of micro-batches of rows of similar length.

    A shuffled epoch is cut into pools of a few windows. A pool is sorted by length, and each window gets one
    micro-batch of its short rows, one of the next longer ones, and so on. So rows that are padded to one
    length hardly differ in it, while each step holds rows of all lengths, as a random sample does; every row
    is equally likely at every step. Where a window is one micro-batch, its rows are of one length, and steps
    differ in it.

    Args:
        examples: N >= 1 rows.
        window_size: rows of an optimizer step; the last one of the epoch holds what is left over.
        micro_size: rows that go through the model together, at most window_size.
        seed, epoch: with the rows they fix the result; each epoch has an order of its own.
    Returns:
        Steps, each a list of micro-batches, each a list of indices into `examples`; every index once. The
        rows of a micro-batch have the same number of completions, so rankings of uneven length may make
        more and smaller ones.
    Raises InputError: no examples, a size out of range.
    """
    check_count("the number of examples", len(examples))
    check_count("window_size", window_size)
    check_count("micro_size", micro_size)
    if micro_size > window_size:
        raise InputError(
            f"micro_size must be at most window_size, got {micro_size} and {window_size}; lower the first."
        )

    sizes = [  # K and the tokens of a row [prompt | completion 1 | ... | completion K]
        (len(row.completions), len(row.prompt) + sum(map(len, row.completions)))
        for row in Examples(examples).as_arrays()
    ]

    def alike(micro: list[int]) -> list[list[int]]:  # one part for each number of completions
        return [list(part) for _, part in itertools.groupby(micro, key=lambda index: sizes[index][0])]

    generator = torch.Generator().manual_seed(int.from_bytes(_digest(seed, epoch)[:8]))
    order = torch.randperm(len(examples), generator=generator).tolist()
    micro_sizes = [min(micro_size, window_size - start) for start in range(0, window_size, micro_size)]
    steps: list[list[list[int]]] = []
    full = len(order) - len(order) % window_size
    for start in range(0, full, POOL * window_size):
        pool = sorted(order[start : min(start + POOL * window_size, full)], key=sizes.__getitem__)
        steps += _deal(pool, micro_sizes, generator)
    if rest := sorted(order[full:], key=sizes.__getitem__):
        steps.append([rest[start : start + micro_size] for start in range(0, len(rest), micro_size)])
    return [[part for micro in step for part in alike(micro)] for step in steps]


def in_passes(examples: Sequence[Example], micro_size: int) -> list[list[int]]:
    """All rows once, as micro-batches of indices: one step of `windows`, for what is only evaluated."""
    count = len(examples)
    (step,) = windows(examples, window_size=count, micro_size=min(micro_size, count), seed=0, epoch=0)
    return step


# Windows of a pool. With prompts of 16-48 tokens, completions of 8-64 and windows of 32 in micro-batches of
# 8, the padded rows hold 1.35 times the needed tokens where micro-batches are random, 1.11 times in pools of
# one window, 1.017 of eight, 1.008 of sixteen: from there on the clock does not notice.
POOL = 8


def _deal(pool: list[int], micro_sizes: list[int], generator: torch.Generator) -> Iterator[list[list[int]]]:
    """Cut a sorted pool into one block for each place of a window; give each window a random part of each."""
    count = len(pool) // sum(micro_sizes)
    blocks, start = [], 0
    for size in micro_sizes:
        order = torch.randperm(count, generator=generator).tolist()
        blocks.append([pool[start + size * k : start + size * (k + 1)] for k in order])
        start += size * count
    return ([list(micro) for micro in window] for window in zip(*blocks))


def mismatched(examples: Sequence[Example]) -> Examples:
    """For each row a row of another prompt, on whose completions KTO's KL estimate is computed.

    A matched completion would measure how well the policy learnt its row, not how far it moved. Rows are put
    in a circle, prompt by prompt, and each gets the row a fixed number of places further on: where no prompt
    has more than half of the rows, all are used equally often.

    Args: N rows with at least two different prompts.
    Raises InputError: all prompts are the same.

    Example:
        >>> rows = [Example([1], [[5, 0]], "row 1"), Example([2], [[6, 0]], "row 2")]
        >>> [row.place for row in mismatched(rows)]
        ['row 2', 'row 1']
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(tuple(example.prompt), []).append(index)
    if len(groups) < 2:
        raise InputError(
            "the KL estimate pairs a prompt with the completion of another, but there are not two different "
            "prompts; add rows with other prompts."
        )
    circle = [index for group in groups.values() for index in group]
    shift = max(map(len, groups.values()))  # from its first row on, leads out of every group
    order, start = list(circle), 0
    for group in groups.values():
        for offset, index in enumerate(group):
            step = shift + offset % (len(circle) - shift)
            order[index] = circle[(start + step) % len(circle)]
        start += len(group)
    return Examples(examples)[order]


def with_mismatched(
    examples: Sequence[Example], *, max_length: int, others: Sequence[Example] = ()
) -> Examples:
    """Rows with one more completion each, of another prompt: as KTO reads them.

    Of pairs it is the chosen one of `mismatched` in every other row and the rejected one in between, because
    KTO's estimate needs the completions that it is trained on, which are both. A prompt is cut on the left to
    fit.

    Args:
        examples: N rows of [chosen, rejected], or of one labelled completion.
        max_length: as in `tokenize`.
        others: further rows of which only the completions are used, where N are too few to have two prompts.
    Returns: N examples with another prompt's completion last.
    Raises InputError: all prompts are the same, or a completion of max_length tokens or more.
    """
    result = Examples()
    pool = examples + others if others else examples
    for number, (own, other) in enumerate(zip(examples, mismatched(pool))):
        completions = [*own.completions, other.completions[number % len(other.completions)]]
        limit = max_length - max(map(len, completions))
        if limit < 1:
            raise InputError(
                f"{own.place} with the completion of {other.place}: leaves none of --max-length {max_length} "
                "for a prompt; give the number that the rows were tokenised with."
            )
        result.append(own._replace(prompt=own.prompt[-limit:], completions=completions))
    return result
