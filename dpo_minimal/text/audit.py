"""The audit of a tokenized data set: lengths, and everything that may be wrong with it.

But: what only tokens show is counted by `batches.tokenize`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .tokenizer import END_OF_TEXT


class Lengths(NamedTuple):
    """Of token counts."""

    mean: float
    median: float
    max: int


# What an audit may find: level, description and remedy.
FINDINGS = {
    "skipped": ("warning", "bad and left out; correct them in the file"),
    "labelled_bad": ("note", "labelled bad and left out, as nobody wants them imitated"),
    "too_long": ("warning", "too long for max_length and left out, as no completion is ever cut; raise it"),
    "truncated": ("warning", "prompt cut on the left to fit; raise max_length or max_prompt_length"),
    "empty_prompt": ("note", "no prompt; end-of-text takes its place"),
    "mixed": ("warning", "another template than the first row's; write all rows alike"),
    "glued": ("warning", "nothing between prompt and answer; end prompts with a space or a line end"),
    "repeats_prompt": ("warning", "a completion repeats its prompt, which is learnt; cut it off"),
    "human_turn": ("warning", "a turn of the human inside a completion, which is learnt; end it before"),
    "template_marks": ("warning", "marks of a chat template spelled out, here plain text; use messages"),
    "json_messages": ("warning", "text that is JSON of messages; give the messages themselves"),
    "literal_end_of_text": ("warning", END_OF_TEXT + " spelled out, where it is plain text; delete it"),
    "against_scores": ("warning", "chosen has the lower score of the two; exchange them or drop the row"),
    "tied_scores": ("warning", "chosen and rejected have the same score, which is a tie; drop the row"),
    "tied": ("note", "responses tied with another are left out, as a ranking has one for each rank"),
    "one_class": ("warning", "all labels are the same, so that nothing is told apart; add the other kind"),
    "white_space": ("warning", "completions that differ only in white space; drop the row"),
    "identical": ("warning", "two completions with the same tokens, which teach nothing; drop the row"),
    "duplicated": ("warning", "repeats an earlier row, which so counts more than once; keep one of each"),
    "contradictory": ("warning", "an earlier row's completions, judged otherwise; fine if people disagree"),
    "repeated_prompt": ("note", "prompt of an earlier row; a split keeps them on one side"),
    "merged": ("note", "other tokens if prompt and completion were encoded together, as some tools do"),
}
Findings = dict[str, list[str]]  # for each of these names the places where it was found

_HUMAN = re.compile(
    r"\n[ \t]*Human:|\n\n[ \t]*User:|###[ \t]?(?:Human|User|Instruction):|\[INST\]|<start_of_turn>user"
    r"|<[|\uff5c](?:im_start\|>|start_header_id\|>)?[Uu]ser"
)
_MARK = re.compile(
    r"<[|\uff5c](?!endoftext)\w[\w\u2581-]{0,29}[|\uff5c]>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|</s>(?=\s*\Z|<s>|USER:)"  # and not what is struck out in HTML
)
_JSON = re.compile(r"""(?s)\[?\s*\{.*?['"](role|from)['"]\s*:\s*['"](user|human|system|assistant|gpt)\b""")
_UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\uffef\U00020000-\U0003ffff]")


def text_findings(prompt: str, completions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What the text of one row shows, before any token: (name, what to add to its place)."""
    texts = (prompt, *completions)
    if not prompt:
        yield "empty_prompt", ""
    for completion in completions:
        if prompt and _glued(prompt[-1], completion[0]):
            yield "glued", f" ({prompt[-12:]!r} + {completion[:12]!r})"
            break
    if any(map(_HUMAN.search, completions)):
        yield "human_turn", ""
    if any(map(_MARK.search, texts)):
        yield "template_marks", ""
    if any(_JSON.match(text.lstrip()) for text in texts):
        yield "json_messages", ""
    if any(END_OF_TEXT in text for text in texts):
        yield "literal_end_of_text", ""
    if len({"".join(text.split()) for text in completions}) < len(set(completions)):
        yield "white_space", ""


def _glued(left: str, right: str) -> bool:
    """Whether a word begins right after a word or the end of a sentence, in a language with spaces."""
    kind = unicodedata.category(left)  # of a letter, a mark, a number, or punctuation that does not open
    ended = kind[0] in "LMN" or kind in ("Pe", "Pf", "Po")
    return ended and right.isalnum() and not _UNSPACED.search(left + right)


FEW = 3  # places shown of each finding


class Audit(NamedTuple):
    """Counts of a tokenized data set; `print(audit)` shows them, `as_dict` records them."""

    rows: int  # that are left
    noun: str  # what they are, such as "preference pairs"
    prompts: int  # different ones
    # Of "prompt", "completion" (end-of-text included) and "row" (prompt and longest completion, which
    # max_length bounds), in tokens, before any cut, rows that do not fit included.
    lengths: dict[str, Lengths]
    lead: float | None  # of rows with several completions: mean tokens of the first (best) minus the last
    best_longer: float | None  # the share of these rows in which the first is longer
    good: float | None  # of labelled completions, the share whose label is True
    findings: Findings  # the places where each was found

    def __str__(self) -> str:
        """A few lines; of the findings only those that were made."""
        lines = [
            f"{self.noun}: {self.rows}, different prompts: {self.prompts}",
            f"{'tokens, before any cut':<28} {'mean':>8} {'median':>8} {'max':>8}",
        ]
        names = ("prompt", "completion, with its end", "prompt + longest completion")
        for name, (mean, median, largest) in zip(names, self.lengths.values()):
            lines.append(f"{name:<28} {mean:>8.1f} {median:>8g} {largest:>8}")
        if self.lead is not None:
            lines.append(
                f"Chosen (best) is longer than rejected (worst) in {self.best_longer:.0%} of the rows; "
                f"the mean difference is {self.lead:+.1f} tokens."
            )
        if self.good is not None:
            lines.append(f"{self.good:.0%} of the completions are labelled good.")
        for name, places in self.findings.items():
            if places:
                level, text = FINDINGS[name]
                rows = "row" if len(places) == 1 else "rows"
                lines.append(f"{level}, {len(places)} {rows}: {text}.")
                lines.append("    " + _listed(places))
        return "\n".join(lines)

    def as_dict(self, *, places: int | None = None) -> dict[str, Any]:
        """Plain numbers and strings for JSON; `places` limits how many are listed of each finding."""
        return self._asdict() | {
            "lengths": {key: lengths._asdict() for key, lengths in self.lengths.items()},
            "findings": {
                name: {"count": len(found), "places": found[:places]} for name, found in self.findings.items()
            },
        }


def _listed(places: list[str]) -> str:
    """The first few, with the name of the file, which ends at the comma, written once."""
    file = places[0][: places[0].find(", ") + 2]
    shown = [places[0], *(place.removeprefix(file) for place in places[1:FEW])]
    more = f"; and {len(places) - FEW} more" if len(places) > FEW else ""
    return "; ".join(place.removesuffix(".") for place in shown) + more
