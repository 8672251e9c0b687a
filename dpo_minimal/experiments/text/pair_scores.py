"""Preference pairs token by token: their numbers under a policy and its reference, as tables and as records.

Shapes: N pairs; a completion of T tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...losses import PreferenceLoss, dpo_loss
from ...model import GPT
from ...policy import shared_prompt_token_logps
from ...text.batches import Example, in_passes
from ...text.objectives import layout
from ...text.tokenizer import Tokenizer
from ...validation import InputError
from .report import WIDTH, prompt_line

TOGETHER = 4  # pairs that go through a model together; more are no faster on a CPU and take memory
SIDES = ("chosen", "rejected")
_GREEN, _RED = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # of 256 colours, pale to deep
_INVISIBLE = 0.00005  # is shown as 0.0000


class PairScores(NamedTuple):
    """N pairs under a policy and its reference."""

    examples: list[Example]  # the pairs as token ids
    policy: list[list[Tensor]]  # for each pair [chosen, rejected]: (T,) log-probabilities in nats, float64
    reference: list[list[Tensor]]  # likewise
    log_ratios: Tensor  # (N, 2) log pi / pi_ref of chosen and rejected
    results: PreferenceLoss  # losses, implicit rewards and gradient weights, each (N,)
    beta: float  # the factor of the log-ratios

    @property
    def margins(self) -> Tensor:
        """(N,) chosen minus rejected reward."""
        return self.results.chosen_rewards - self.results.rejected_rewards

    def contributions(self, pair: int) -> list[Tensor]:
        """What each token of [chosen, rejected] adds to a pair's margin: two (T,) tensors.

        beta log(pi / pi_ref) of the token, with a minus if rejected; all together are the margin.
        """
        chosen, rejected = zip(self.policy[pair], self.reference[pair], strict=True)
        return [self.beta * (chosen[0] - chosen[1]), self.beta * (rejected[1] - rejected[0])]

    def columns(self) -> dict[str, Tensor]:
        """What means are taken over: name -> (N,)."""
        margins = self.margins
        return {
            "loss": self.results.losses,
            "margin": margins,
            "accuracy": (margins > 0).double(),
            "ties": (margins == 0).double(),
            "weight": self.results.gradient_weights,
            "log_ratio_chosen": self.log_ratios[:, 0],
            "log_ratio_rejected": self.log_ratios[:, 1],
        }


def score_pairs(
    policy: GPT, reference: GPT, examples: list[Example], *, beta: float, device: str
) -> PairScores:
    """Both models' token log-probabilities of every pair, and what DPO makes of their sums.

    Args:
        policy, reference: moved to the device.
        examples: N >= 1, each with [chosen, rejected].
        beta: > 0.
    Raises InputError: a log-probability is not finite, naming the pair.
    """
    tokens, sums = [], []
    for flag, model in (("--model", policy), ("--reference", reference)):
        found = completion_token_logps(model.to(device), examples, device)
        sums.append(torch.tensor([[logps.sum() for logps in sides] for sides in found], dtype=torch.float64))
        broken = (~sums[-1].isfinite()).any(-1).nonzero()
        if len(broken):
            raise InputError(
                f"{examples[int(broken[0])].place}: its log-probability under {flag} is not finite, as the "
                "numbers inside that model overflow; train it anew."
            )
        tokens.append(found)
    results = dpo_loss(*sums[0].unbind(-1), *sums[1].unbind(-1), beta=beta)
    return PairScores(examples, *tokens, sums[0] - sums[1], results, beta)


def completion_token_logps(model: GPT, examples: list[Example], device: str) -> list[list[Tensor]]:
    """log pi of each token after all before it: for each of N examples K completions, each (T,).

    Nats, computed in float32, given in float64 so that what is added up keeps every digit; on the CPU.
    """
    result: list[list[Tensor]] = [[] for _ in examples]
    for rows in tqdm(in_passes(examples, TOGETHER), desc="scoring", disable=None, leave=False):
        batch = layout([examples[row] for row in rows], dtype="float32", device=device)
        with torch.no_grad():
            logps, _ = shared_prompt_token_logps(model, batch)
        sides = iter(logps.double().cpu().split(batch.completion_lengths.flatten().tolist()))
        for row in rows:
            result[row] = [next(sides) for _ in examples[row].completions]
    return result


def pair_record(scores: PairScores, pair: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """All numbers of a pair, for JSON."""
    example, results = scores.examples[pair], scores.results
    contributions = scores.contributions(pair)
    record: dict[str, Any] = {"place": example.place, "prompt": tokenizer.decode(example.prompt)}
    for side, name in enumerate(SIDES):
        policy, reference = scores.policy[pair][side], scores.reference[pair][side]
        record[name] = {
            "completion": tokenizer.decode(example.completions[side]),
            "logp": policy.sum().item(),
            "reference_logp": reference.sum().item(),
            "log_ratio": scores.log_ratios[pair, side].item(),
            "reward": results[1 + side][pair].item(),
            "tokens": list(map(tokenizer.token_text, example.completions[side])),
            "token_logps": policy.tolist(),
            "reference_token_logps": reference.tolist(),
            "contributions": contributions[side].tolist(),
        }
    return record | {
        "margin": scores.margins[pair].item(),
        "weight": results.gradient_weights[pair].item(),
        "loss": results.losses[pair].item(),
    }


def pair_lines(pair: dict[str, Any], beta: float, *, colour: bool) -> list[str]:
    """A `pair_record` as lines: its numbers, then each token with its contribution."""
    lines = [pair["place"], "  " + prompt_line(pair["prompt"])]
    lines.append(f"  {'':<10}{'log pi':>12}{'log pi_ref':>12}{'log-ratio':>12}{'reward':>12}")
    for name in SIDES:
        logp, reference, ratio, reward = (
            pair[name][key] for key in ("logp", "reference_logp", "log_ratio", "reward")
        )
        lines.append(f"  {name:<10}{logp:>12.4f}{reference:>12.4f}{ratio:>+12.4f}{reward:>+12.4f}")
    lines.append(
        f"  margin {pair['margin']:+.4f}, loss {pair['loss']:.4f}, weight {pair['weight']:.4f} of {beta:g}; "
        "what each token adds to the margin:"
    )
    largest = max(abs(value) for name in SIDES for value in pair[name]["contributions"])
    for name in SIDES:
        tokens, values = [f"[{token}]" for token in pair[name]["tokens"]], pair[name]["contributions"]
        width = max(map(len, tokens)) + 9
        columns = max(1, (WIDTH - 4) // (width + 1))
        cells = list(map(partial(_cell, width=width, largest=largest, colour=colour), tokens, values))
        lines.append(f"  {name}, together {sum(values):+.4f}")
        lines += ["    " + " ".join(cells[at : at + columns]) for at in range(0, len(cells), columns)]
    return lines


def _cell(token: str, value: float, *, width: int, largest: float, colour: bool) -> str:
    """A token and what it adds; where colours are wanted black on green or red of one of five depths."""
    number = f"{value:+z.4f}"
    text = token + number.rjust(width - len(token))
    if not colour or abs(value) < _INVISIBLE:
        return text
    shades = _GREEN if value > 0 else _RED
    return f"\x1b[30;48;5;{shades[min(4, int(5 * abs(value) / largest))]}m{text}\x1b[0m"
