"""The loss card: one page on what a preference loss does, each line a measured number beside DPO's and IPO's.

What is measured stands in measures.py, and where training ends in ends.py. Here are the verdict, the page and
the figure.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..losses import Loss
from ..validation import InputError
from ..zoo import LOSSES
from .measures import Curves, Findings, curves, displacement, endings, finite_data, invariances, on_gpt, shape
from .subject import BETA, POSITIONS, Subject, examine

BESIDE = {"DPO": "dpo", "IPO": "ipo"}  # whose findings stand beside a loss's own


@dataclass(frozen=True)
class Card:
    """What was found of a loss.

    Fields: name; options it was called with; verdict in one sentence; findings, by the keys of card.json;
    beside, those of DPO and IPO; curves of the loss and of these, by name.
    """

    name: str
    options: dict[str, float]
    verdict: str
    findings: Findings
    beside: dict[str, Findings]
    curves: dict[str, Curves] = field(repr=False)

    def json(self) -> dict[str, Any]:
        """The findings with name, options and verdict, as numbers, booleans, texts and None."""
        return {"name": self.name, "options": self.options, "verdict": self.verdict, **self.findings}

    def text(self) -> str:
        """The page."""
        columns = [(self.name[:14], self.findings), *self.beside.items()]
        options = ", ".join(f"{name} {value:g}" for name, value in self.options.items())
        lines = [f"{self.name} ({options})" if options else self.name]
        lines += [*textwrap.wrap(self.verdict, 100), ""]
        for title, rows in PAGE.items():
            lines.append(f"{title:<44}" + "".join(f"{name:>15}" for name, _ in columns))
            for label, tag, show in rows:
                cells = "".join(f"{show(findings):>15}" for _, findings in columns)
                lines.append(f"  {label:<42}{cells}   [{tag}]")
            lines.append("")
        return "\n".join(lines)

    def figure(self, path: str | Path) -> None:
        """Write a PNG: the loss and both pulls against the margin, beside DPO's and IPO's."""
        from .figures import draw_card

        draw_card(Path(path), self.curves, self.verdict)


def loss_card(
    loss: Loss | Callable,
    *,
    reads: Sequence[str] = POSITIONS,
    options: dict[str, float] | None = None,
    quick: bool = False,
) -> Card:
    """Measure what a preference loss does (`dpo_minimal/bench/README.md` explains every line).

    Args:
        loss: a function of log-probabilities (B,), summed over tokens, that returns losses (B,) or a tuple
            that begins with them, or a record of `zoo.LOSSES`. What it reads is told by the names of its
            parameters, which are those of `losses.READS`: `policy_chosen_logps`, ...
        reads: of a function with other names, the tables whose chosen and rejected columns come first by
            position: of "policy", "reference" and "lengths" (tokens); refused where the names tell it.
        options: of the loss, such as {"beta": 0.1}; a beta that is not given is 0.5.
        quick: fewer data sets and steps.
    Raises:
        InputError: it fails, is random, changes its inputs, gives no loss per pair or no gradient, or needs
            what the card cannot give.
    """
    subject = Subject(loss, reads, options)
    with _one_thread():
        examine(subject)
        try:
            findings, own = _findings(subject, quick), curves(subject)
        except InputError:
            raise
        except Exception as error:
            problem = f"raises {type(error).__name__} while it is measured: {error}"
            raise InputError(f"{subject.name} {problem}") from error
        others = {
            title: _beside(name, subject.options.get("beta", BETA), quick) for title, name in BESIDE.items()
        }
    name = f"your {subject.name}" if subject.name in BESIDE else subject.name
    lines = {name: own} | {title: drawn for title, (_, drawn) in others.items()}
    beside = {title: found for title, (found, _) in others.items()}
    return Card(name, subject.options, verdict(findings, subject.options), findings, beside, lines)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tables are small: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _findings(subject: Subject, quick: bool) -> Findings:
    found = shape(subject) | invariances(subject)
    batch = found["batch_dependent"]
    found |= endings(subject, batch, quick=quick)
    found |= {"efficiency": None, "n_kl": None, "n_kl_law": None}
    beta = subject.options.get("beta", found["best_beta"] or BETA)
    if found["ends_at_optimum"]:
        found |= finite_data(subject, batch, beta, quick=quick)
    found |= on_gpt(subject, batch, beta, quick=quick) | displacement(subject)
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in found.items()}


@cache
def _beside(name: str, beta: float, quick: bool) -> tuple[Findings, Curves]:
    subject = Subject(LOSSES[name], (), {"beta": beta})
    return _findings(subject, quick), curves(subject)


# ------------------------------------------------------------------------------------------ the verdict


def verdict(found: Findings, options: dict[str, float]) -> str:
    """One sentence: where training ends, and why it is not pi* where it is not."""
    if found["worlds_without_end"]:
        share = f"{found['worlds_without_end']} of {found['worlds']} worlds"
        return f"has no end in {share} where people disagree: some completion becomes certain or impossible."
    if found["worlds_undecided"]:
        return "goes to and fro where people disagree: its end could not be decided."
    without = [words for key, words in _LIMITS.items() if found[key] is False]
    limits = f"; has no end on {' or on '.join(without)}" if without else ""
    if found["ends_at_optimum"]:
        at = "" if "beta" in options else f" of β = {found['best_beta']:.3g}"
        return f"ends at π*{at}{limits}."
    best = f"π* of β = {found['best_beta']:.3g}" if found["best_beta"] else ""
    if found["ends_at_optimum_of_best_beta"]:
        near_its_own = math.isclose(found["best_beta"], options["beta"], rel_tol=0.01)
        best = f"π* of β = {found['best_beta']:.8g}" if near_its_own else best
        return f"ends elsewhere: at {best} and not of its own β = {options['beta']:.8g}{limits}."
    near = f", near {best}" if best and found["kl_at_best_beta"] <= 1e-3 and "beta" in options else ""
    return f"ends elsewhere: {found['kl_to_optimal']:.2g} nats from π*{near}, {_reason(found)}{limits}."


_LIMITS = {
    "end_on_unanimous_pairs": "unanimous pairs",
    "end_where_one_never_loses": "a completion that never loses",
}


def _reason(found: Findings) -> str:
    if found["kl_to_reference"] <= 1e-3:
        return "at the reference itself, which training does not leave"
    if not found["reads_reference"]:
        return "without regard to the reference"
    if not found["end_reads_reference"]:
        return "the same whatever the reference"
    if found["reads_lengths"]:
        return "and where depends on lengths"
    if found["depends_on_pairs"]:
        return "and where depends on which pairs are shown"
    return "the same whichever pairs are shown"


# ------------------------------------------------------------------------------------------ the page


def _number(key: str, form: str = ".3g") -> Callable[[Findings], str]:
    def show(found: Findings) -> str:
        value = found[key]
        return "-" if value is None else format(value, form)

    return show


def _word(key: str, yes: str = "yes", no: str = "no", none: str = "-") -> Callable[[Findings], str]:
    return lambda found: {True: yes, False: no, None: none}[found[key]]


def _from(key: str, never: str = "never") -> Callable[[Findings], str]:
    return lambda found: never if found[key] is None else f"from {found[key]:.1f}"


def _finite(found: Findings) -> str:
    words = {True: "yes", False: "no", None: "refused"}
    answers = [words[value] for value in found["finite_at_large_margins"].values()]
    return answers[0] if len(set(answers)) == 1 else "/".join(answers)


# Part -> its lines: label, tag of the section that explains it, what to show of the findings.
PAGE: dict[str, list[tuple[str, str, Callable[[Findings], str]]]] = {
    "A pair": [
        ("loss where policy = reference", "D4.3", _number("value_at_reference", ".4g")),
        ("finite at margins of ±1e4, 64/32/16 bit", "D5.2", _finite),
        ("rises with the margin", "D5.1", _from("rises_from")),
        ("is concave in the margin", "D5.2", _from("concave_from")),
        ("both completions are pulled alike", "D5.1", _word("equal_pulls")),
        ("share of the pull left at margin 8", "D5.4", _number("pull_left_at_sure_pairs", ".2g")),
        ("margin of a unanimous pair grows like", "D11.6", lambda found: found["growth_on_unanimous_pairs"]),
        ("pulls the wrong way", "D5.4", _from("negative_pull_from")),
        ("its own weights are its gradient", "D5.1", _word("own_weights_are_its_gradient")),
    ],
    "What a pair's loss depends on": [
        ("reads the reference", "D4.2", _word("reads_reference")),
        ("reads lengths", "D13.5", _word("reads_lengths")),
        ("depends on the other pairs of its batch", "D4.4", _word("batch_dependent")),
        ("ignores a shift of the prompt's logits", "D4.2", _word("ignores_shift_of_logits")),
        ("ignores a shift of the reference", "D4.2", _word("ignores_shift_of_reference")),
        ("ignores a swap of the pair", "D2.1", _word("ignores_swap_of_the_pair")),
    ],
    "Where training ends": [
        ("KL to π*, worst world, nats", "D4.4", _number("kl_to_optimal", ".2g")),
        ("β whose π* is nearest", "D3.5", _number("best_beta")),
        ("KL to that π*, nats", "D3.5", _number("kl_at_best_beta", ".2g")),
        ("KL to its own known optimum, nats", "D12.1", _number("kl_to_own_optimum", ".2g")),
        ("KL to the reference, worst world, nats", "D3.2", _number("kl_to_reference", ".2g")),
        ("reward below the frontier", "D10.1", _number("reward_below_frontier", ".2g")),
        ("depends on which pairs are shown", "D12.1", _word("depends_on_pairs")),
        ("moves with the reference", "D12.6", _word("end_reads_reference")),
        ("has an end on unanimous pairs", "D11.6", _word("end_on_unanimous_pairs")),
        ("has an end where one never loses", "D11.1", _word("end_where_one_never_loses")),
        ("KL to π* if a tenth is mislabelled, nats", "D12.2", _number("kl_after_flips", ".2g")),
    ],
    "Finite data": [
        ("squared error over the Cramér-Rao bound", "D11.3", _number("efficiency", ".3g")),
        ("N KL, nats", "D11.5", _number("n_kl", ".3g")),
        ("its law, nats", "D11.5", _number("n_kl_law", ".3g")),
    ],
    "Networks": [
        ("a GPT: KL to π*, nats", "D9.1", _number("gpt_kl_to_optimal", ".2g")),
        ("change of the mean length, tokens", "D13.5", _number("gpt_length_change", "+.3f")),
        ("the same of π*", "D13.5", _number("gpt_length_change_of_optimum", "+.3f")),
        ("log π(chosen) at margin 1, shared features", "D13.1", _number("displacement", "+.3f")),
    ],
}
