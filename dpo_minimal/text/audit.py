"""The audit of a tokenized data set: lengths, and everything that may be wrong with it.

But: what only tokens show is counted by `batches.tokenize`.
"""

from __future__ import annotations

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
    "too_long": ("warning", "too long for max_length and left out, as no completion is ever cut; raise it"),
    "truncated": ("warning", "prompt cut on the left to fit; raise max_length or max_prompt_length"),
    "empty_prompt": ("note", "no prompt; end-of-text takes its place"),
    "literal_end_of_text": (
        "warning",
        f"{END_OF_TEXT} spelled out in the text, where it is plain text; delete it",
    ),
    "identical": ("warning", "two completions with the same tokens, which teach nothing; drop the row"),
    "duplicated": ("warning", "repeats an earlier row, which so counts more than once; keep one of each"),
    "contradictory": ("warning", "an earlier row's completions, judged otherwise; fine if people disagree"),
    "repeated_prompt": ("note", "prompt of an earlier row; a split keeps them on one side"),
    "merged": ("note", "other tokens if prompt and completion were encoded together, as some tools do"),
}
Findings = dict[str, list[str]]  # for each of these names the places where it was found


def text_findings(prompt: str, completions: Sequence[str]) -> Iterator[str]:
    """The names of what the text of one row shows, before any token."""
    if not prompt:
        yield "empty_prompt"
    if any(END_OF_TEXT in text for text in (prompt, *completions)):
        yield "literal_end_of_text"


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
