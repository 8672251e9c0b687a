"""Read the derivations: their sections, the python blocks, and how to run these on a drawn instance.

They are derivations.md and the chapters that stand beside the code they are about (notebooks/syllabus.py
lists them): one numbering of tags, one opening block, one index for each document.
"""

import random
from functools import cache
from types import CodeType
from typing import NamedTuple

import torch
from strategies import normal

from notebooks.syllabus import DOCUMENTS, HEADING, ROOT

# Document, as its path within the project -> its text.
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
FENCES = ("```python", "```sh", "```")  # python is executed; commands and what they print are not
OPENING = "D1.2"  # the section whose first block makes the names that every other block is given
PAPER = [f"Eq. {number}" for number in range(1, 23)]
PAPER += ["Sec. 4", "Definition 1", "Lemma 1", "Lemma 2", "Theorem 1", "Proposition 1"]


class Block(NamedTuple):
    """One fenced python block: its document, its section's tag, the line its code begins on, the code."""

    document: str
    tag: str
    line: int
    source: str


def blocks_of(text: str, document: str) -> list[Block]:
    """The python blocks of a document, in order, each with the tag of the heading it stands under.

    Raises:
        AssertionError: a fence that is none of `FENCES`, or a python block without a tag. Its code would
            silently not run.
    """
    blocks, tag, start, fence = [], "", 0, ""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        place = f"{document}:{number}"
        if not fence and line.startswith("## "):
            tag = ""
        if not fence and (heading := HEADING.match(line)):
            tag = heading[2]
        if not line.strip().startswith(("```", "~~~")):
            continue
        assert line == "```" or (not fence and line in FENCES), f"{place}: unknown fence {line!r}"
        if fence == "```python":
            assert tag, f"{place}: this block stands in no section"
            blocks.append(Block(document, tag, start, "\n".join(lines[start - 1 : number - 1])))
        fence, start = ("" if fence else line), number + 1
    assert not fence, f"{document}: the block of line {start} is never closed"
    return blocks


def sections_of(blocks: list[Block]) -> dict[str, list[Block]]:
    """Tag -> its blocks, which share their names and start anew in the next section."""
    sections: dict[str, list[Block]] = {}
    for block in blocks:
        sections.setdefault(block.tag, []).append(block)
    return sections


class BlockFailure(AssertionError):
    """A comparison of a document did not hold; the message names the tag, the file and the line."""


@cache
def compiled(block: Block) -> CodeType:
    """A block's code, with the document's own line numbers."""
    return compile("\n" * (block.line - 1) + block.source, block.document, "exec")


def run_block(block: Block, names: dict) -> None:
    """Execute one block in `names`. A comparison that fails becomes a BlockFailure, any other exception is
    raised as it is with the document's line in its traceback."""
    code = compiled(block)
    try:
        exec(code, names)
    except AssertionError as error:
        trace, line = error.__traceback__, block.line
        while trace is not None:
            if trace.tb_frame.f_code is code:
                line = trace.tb_lineno
            trace = trace.tb_next
        statement = block.source.split("\n")[line - block.line].strip()
        message = f"[{block.tag}] {block.document}:{line}: {statement}\n{error}"
        raise BlockFailure(message) from error


def run_section(section: list[Block], opening: dict, instance: dict) -> None:
    """Run a section's blocks in order on one instance. The opening block has made `opening`."""
    names = {**opening, **instance}
    names.pop("random", None)  # it draws from the opening block's generator, not from the instance's
    for block in section:
        run_block(block, names)


BLOCKS = [block for document, text in TEXTS.items() for block in blocks_of(text, document)]
SECTIONS = sections_of(BLOCKS)


@cache
def opening_names() -> dict:
    """The names that the opening block makes. Copied before use, never changed."""
    names: dict = {}
    run_block(SECTIONS[OPENING][0], names)
    return names


def world(name: str, number: int) -> dict:
    """What the opening block makes, drawn: 1 to 3 prompts, 2 to 8 completions, beta in [0.05, 20].

    Extremes are drawn on purpose: uniform and nearly deterministic references, constant and tied rewards,
    a policy that is the reference. Rewards stay below some 13, so that e^(r / beta) does not overflow. The
    same name and number give the same world.
    """
    draw = random.Random(f"{name} {number}")
    X, K = draw.randint(1, 3), draw.randint(2, 8)
    beta = draw.choice([draw.uniform(0.05, 5.0), draw.choice([0.05, 1.0, 20.0])])
    reference_scale = draw.choice([1.0, 3.0, 1.0, 3.0, 6.0, 0.0])
    reward_scale = (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 0.1, 0.0)[number % 8]
    extreme = draw.choice(["none", "none", "none", "none", "tied rewards", "policy is reference"])
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    ref_logps = normal(X, K, generator=generator, scale=reference_scale).log_softmax(-1)
    rewards = normal(X, K, generator=generator, scale=reward_scale)
    logps = normal(X, K, generator=generator).log_softmax(-1)
    if extreme == "tied rewards":
        rewards = rewards.round()
    if extreme == "policy is reference":
        logps = ref_logps.clone()
    w, l = torch.randperm(K, generator=generator)[:2].tolist()
    return {
        "X": X, "K": K, "ref_logps": ref_logps, "rewards": rewards, "logps": logps, "beta": beta,
        "w": w, "l": l, "exists": ref_logps > -torch.inf, "generator": generator,
    }  # fmt: skip
