"""What sft and dpo print at the end: samples to read, and what they add up to."""

from __future__ import annotations

import math
import textwrap

import torch

from ...closed_form import soft_value
from ...rivals.evaluate import Samples, mean_of

WIDTH, PROMPT_END = 100, 160  # characters of a line; of a prompt's end that is shown


def visible(text: str) -> str:
    r"""A text that a terminal cannot take for a command: control characters but white space as \x1b.

    >>> print(visible("one\x1b[2J two"))
    one\x1b[2J two
    """
    return "".join(
        sign if sign.isprintable() or sign.isspace() else sign.encode("unicode_escape").decode()
        for sign in text
    )


def text_lines(label: str, text: str) -> list[str]:
    """A text under a label, wrapped, on as many lines as it needs."""
    words = " ".join(visible(text).split()) or "(nothing)"
    return textwrap.wrap(
        words, WIDTH, initial_indent=f"  {label:<16}", subsequent_indent=" " * 18, break_on_hyphens=False
    )


def prompt_line(prompt: str) -> str:
    """The end of a prompt, on one line."""
    shown = " ".join(visible(prompt).split())
    return shown if len(shown) <= PROMPT_END else "... " + shown[-PROMPT_END:]


def sample_lines(shown: int, samples: dict[str, Samples]) -> list[str]:
    """The first prompts, each with its sample by every policy, given by the policy's name."""
    lines = []
    for place, prompt in list(enumerate(next(iter(samples.values())).prompts))[:shown]:
        lines.append(prompt_line(prompt))
        for name, drawn in samples.items():
            reward = "" if drawn.rewards is None else f"{drawn.rewards[place]:+.2f}"
            lines += text_lines(f"{name:<7}{reward:>7}", drawn.texts[place])
    return lines


def summary(before: Samples, after: Samples, beta: float) -> list[str]:
    """Reward, divergence and length before and after, and the best that beta allows."""
    judged = before.rewards is not None
    measures = [  # name, whether it is known, its value
        ("true reward", judged, lambda s: mean_of(s.rewards)),
        ("  samples with a positive one", judged, lambda s: f"{(s.rewards > 0).double().mean():.0%}"),
        ("KL(policy, reference), nats", True, lambda s: mean_of(s.log_ratios)),
        (f"reward - {beta:g} KL (Eq. 3)", judged, lambda s: mean_of(s.rewards - beta * s.log_ratios)),
        ("tokens", True, lambda s: mean_of(s.lengths)),
        ("ended by themselves", True, lambda s: f"{s.ended.double().mean():.0%}"),
    ]
    lines = [f"{'':<34}{'before':>14}{'after':>14}"]
    lines += [f"{name:<34}{of(before)!s:>14}{of(after)!s:>14}" for name, known, of in measures if known]
    if judged:
        best = best_objective(before, beta)
        lines.append(
            f"No policy can exceed reward - {beta:g} KL = {best:.2f}: it is beta log Z, here estimated"
        )
        lines.append(f"from the reference's {len(before.texts)} samples (derivations.md, D3.4).")
    return lines


def best_objective(reference: Samples, beta: float) -> float:
    """beta log E[exp(r / beta)] over the reference's samples: no policy's E[r] - beta KL is above it [D3.4].

    The mean is taken over prompts too, inside the logarithm, which by Jensen's inequality is no less than the
    mean of each prompt's own beta log Z.
    """
    uniform = torch.full((len(reference.texts),), -math.log(len(reference.texts)), dtype=torch.float64)
    return soft_value(uniform, reference.rewards.double(), beta=beta).item()
