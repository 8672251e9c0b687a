"""`python -m dpo_minimal score`: what a policy prefers, pair by pair and token by token.

DPO's reward of a completion is implicit: beta log(pi(y|x) / pi_ref(y|x)). Of a pair (yw chosen, yl rejected)

  margin        reward of yw - reward of yl; above 0 the policy orders the pair as the data do
  loss          -log sigmoid(margin) (Eq. 7)
  weight        beta sigmoid(-margin): how hard the loss's gradient pulls on this pair, near beta where the
                order is wrong, near 0 where the policy is sure of it
  contribution  of a token: beta (log pi - log pi_ref) of it after all before it, with a minus if rejected

A log-probability is a sum over tokens, so the contributions of a pair add up to its margin: they show which
words the policy learnt from. What is shown is rounded; the sum is exact to 1e-9 in --json. Green raises the
margin, red lowers it, and the deeper the more.

With policy = reference all log-ratios, contributions and margins are 0, the loss is ln 2 = 0.693 and the weight
beta / 2. By hand, with beta = 0.1: let log pi of yw go from -14 under the reference to -12, and that of yl from
-13 to -15. The rewards are +0.2 and -0.2, the margin 0.4, the loss -log sigmoid(0.4) = 0.5130, the weight 0.1
sigmoid(-0.4) = 0.0401, less than 0.05: the pair is partly learnt. If " great" in yw became e times likelier,
its contribution is +0.1; if " dull" in yl became e times less likely, that is +0.1 too.

  dpo-minimal score --model runs/dpo-001                           generated film reviews; the run knows its
                                                                   reference and beta
  dpo-minimal score --model FOLDER --reference FOLDER --data pairs.jsonl
  dpo-minimal score --model gpt2-medium --reference gpt2 --prompt "2 + 2 =" --chosen " 4" --rejected " 5"

Pairs are read as in training: a long prompt loses its left end, a completion nothing. At the end stand means over
all pairs with their standard errors. Both log-ratios below 0 mean that both completions became less likely: the
loss sees only their difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..audit import FEW, Audit
from ..batches import Example, tokenize, windows
from ..checkpoint import state_fingerprint
from ..data import Dataset, dataset_from_rows, load_dataset
from ..evaluate import mean_of
from ..losses import PreferenceLoss, dpo_loss
from ..model import GPT
from ..policy import SequenceBatch, shared_prompt_batch, token_logps
from ..reviews import comparisons
from ..tokenizer import Tokenizer
from ..validation import InputError, check_count, check_device, check_positive
from .sample import visible
from .text_options import CONFIG_FILE, read_run_config
from .text_report import WIDTH, prompt_line
from .text_setup import MODEL, Policy, context_of, load_policy

BETA = 0.1  # the paper's
REVIEWS, SHOWN, TOGETHER = 200, 5, 8  # generated pairs; pairs shown; pairs that go through a model together
SIDES = ("chosen", "rejected")
_GREEN, _RED = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # of 256 colours, pale to deep
_ROUNDED = 0.00005  # what is shown as 0.0000


class Scores(NamedTuple):
    """N pairs under a policy and its reference.

    Fields:
        policy, reference: for each pair [chosen, rejected], each the (tokens,) log-probabilities in nats.
        log_ratios: (N, 2) log pi / pi_ref of chosen and rejected.
        results: losses, rewards and gradient weights, each (N,).
    """

    policy: list[list[Tensor]]
    reference: list[list[Tensor]]
    log_ratios: Tensor
    results: PreferenceLoss

    @property
    def margins(self) -> Tensor:
        """(N,) chosen minus rejected reward."""
        return self.results.chosen_rewards - self.results.rejected_rewards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--model", metavar="MODEL", required=True, help="the policy: a run, a folder, or a released name"
    )
    parser.add_argument(
        "--reference", metavar="MODEL",
        help="the same of the reference, with the same vocabulary (default, for a run of dpo: what it started "
        "from)",
    )  # fmt: skip
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--data", metavar="FILE",
        help=f"preference pairs as dpo and audit read them (default: {REVIEWS} generated film reviews)",
    )  # fmt: skip
    pairs.add_argument("--skip-bad-rows", action="store_true", help="leave out and list bad rows of --data")
    for name in ("prompt", *SIDES):
        pairs.add_argument(f"--{name}", metavar="TEXT", help="of a single pair of your own, exactly as it is")
    pairs.add_argument(
        "--max-length", type=int, metavar="N",
        help="tokens of a prompt with its longest completion (default: what both models can read)",
    )  # fmt: skip
    parser.add_argument(
        "--beta", type=float, metavar="B", help=f"default that of the run, else {BETA}, the paper's"
    )
    parser.add_argument(
        "--rows", type=int, metavar="N",
        help=f"pairs to show, the first ones (default {SHOWN}; with --json all); 0 shows the means alone",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--json", action="store_true", help="print all numbers, one JSON object a pair, last the means"
    )
    parser.add_argument(
        "--no-color", action="store_true", help="as where NO_COLOR is set, or the output is no terminal"
    )


def run(args: argparse.Namespace) -> Scores:
    """Score and print; nothing is written. Returns the scores of all pairs."""
    _check(args)
    config = _run_of(args.model)
    policy = load_policy(args.model)
    reference = _reference(args, config, policy)
    beta = args.beta or config["options"].get("beta", BETA)
    dataset = _dataset(args)
    examples, audit = tokenize(
        dataset, policy.tokenizer, skip_bad_rows=args.skip_bad_rows,
        max_length=min(context_of(args, policy.model), context_of(args, reference.model)),
    )  # fmt: skip
    scores = score(policy.model, reference.model, examples, beta=beta, device=args.device)
    if args.json:
        _print_json(args, scores, examples, audit, policy.tokenizer, beta)
    else:
        _print_tables(args, scores, examples, audit, policy.tokenizer, beta)
    return scores


def _check(args: argparse.Namespace) -> None:
    given = [name for name in ("prompt", *SIDES) if getattr(args, name) is not None]
    if args.data is not None and given:
        raise InputError(f"--{given[0]} and --data both give pairs; leave one out.")
    if given and len(given) < 3:
        missing = next(name for name in ("prompt", *SIDES) if name not in given)
        raise InputError(f"--{given[0]} needs --{missing}: a pair is --prompt, --chosen and --rejected.")
    if args.skip_bad_rows and args.data is None:
        raise InputError("--skip-bad-rows is used only with --data, which alone may have bad rows.")
    if args.json and args.no_color:
        raise InputError("--no-color is not used with --json, which has no colours; leave it out.")
    if args.rows is not None:
        check_count("--rows", args.rows, minimum=0)
    if args.beta is not None:
        check_positive("--beta", args.beta)
    check_device(args.device)


def _run_of(name: str) -> dict[str, Any]:
    """config.json of a run of dpo; one without options where `name` is no such run."""
    folder = Path(name)
    if (folder / MODEL).is_dir() and (folder / CONFIG_FILE).exists():
        config = read_run_config(folder)
        if config.get("command") == "dpo":
            return config
    return {"options": {}}


def _reference(args: argparse.Namespace, config: dict[str, Any], policy: Policy) -> Policy:
    """The reference that is named, or else the one that the run of dpo started from."""
    name = args.reference
    if name is None:
        fine_tuned = Path(args.model) / "sft"  # what dpo makes for itself where it is given no model
        name = config["options"].get("model") or (str(fine_tuned) if fine_tuned.is_dir() else None)
    if name is None:
        raise InputError(
            f"--model {args.model}: is no run of dpo that tells what it started from; name that by --reference."
        )
    try:
        reference = load_policy(name)
    except InputError as error:
        reason = str(error).removeprefix(f"--model {name}: ").removeprefix(f"{name}: ")
        raise InputError(f"--reference {name}: {reason}") from None
    started = config.get("start", {}).get("model")
    if args.reference is None and started not in (None, state_fingerprint(reference.model)):
        raise InputError(
            f"--model {args.model}: {name}, which the run started from, has other weights by now; name a copy "
            "of the old ones, or these all the same, by --reference."
        )
    if reference.tokenizer.fingerprint != policy.tokenizer.fingerprint:
        raise InputError(
            f"--reference {name}: has another vocabulary than --model {args.model}, so their tokens cannot be "
            "compared; name the model that training started from."
        )
    return reference


def _dataset(args: argparse.Namespace) -> Dataset:
    if args.data is not None:
        return load_dataset(args.data, "preferences", skip_bad_rows=args.skip_bad_rows)
    if args.prompt is not None:
        pair = {name: getattr(args, name) for name in ("prompt", *SIDES)}
        return dataset_from_rows([pair], "the pair given", "preferences")
    return dataset_from_rows(comparisons(REVIEWS, seed=0), "reviews", "preferences")


# ----------------------------------------------------------------------------------------------- numbers


def score(policy: GPT, reference: GPT, examples: list[Example], *, beta: float, device: str) -> Scores:
    """Both models' token log-probabilities of every pair, and what DPO makes of their sums.

    Args:
        examples: N >= 1, each with [chosen, rejected].
        beta: > 0.
    Raises:
        InputError: a log-probability is not finite, naming the pair.
    """
    found = {}
    for name, model in (("model", policy), ("reference", reference)):
        found[name] = completion_token_logps(model, examples, device)
        for example, sides in zip(examples, found[name], strict=True):
            if not all(torch.isfinite(logps).all() for logps in sides):
                raise InputError(
                    f"{example.place}: has a log-probability under --{name} that is not finite, so its "
                    "weights are broken; train it anew."
                )
    sums = {
        name: torch.tensor([[logps.sum() for logps in sides] for sides in pairs], dtype=torch.float64)
        for name, pairs in found.items()
    }
    results = dpo_loss(*sums["model"].unbind(-1), *sums["reference"].unbind(-1), beta=beta)
    return Scores(found["model"], found["reference"], sums["model"] - sums["reference"], results)


def completion_token_logps(model: GPT, examples: list[Example], device: str) -> list[list[Tensor]]:
    """log pi of each token of each completion after all before it: for each of N examples K (tokens,) tensors.

    Nats, computed in float32, given in float64 so that what is added up keeps every digit. On the CPU.
    """
    model = model.to(device)
    count = len(examples)
    (passes,) = windows(examples, window_size=count, micro_size=min(TOGETHER, count), seed=0, epoch=0)
    result: list[list[Tensor]] = [[] for _ in examples]
    for rows in tqdm(passes, desc="scoring", disable=None, leave=False):
        owners = [(row, completion) for row in rows for completion in examples[row].completions]
        ids, prompt_lengths, lengths = shared_prompt_batch(
            [examples[row].prompt for row, _ in owners], [[completion] for _, completion in owners]
        ).to(device)
        with torch.no_grad():
            batch = SequenceBatch(ids, prompt_lengths, prompt_lengths + lengths[:, 0])
            logps = token_logps(model, batch).double().cpu()
        for (row, completion), line in zip(owners, logps, strict=True):
            start = len(examples[row].prompt)
            result[row].append(line[start : start + len(completion)])
    return result


def contributions(scores: Scores, pair: int, beta: float) -> list[Tensor]:
    """What each token of [chosen, rejected] adds to the pair's margin: two (tokens,) tensors.

    beta log(pi / pi_ref) of the token, with a minus if rejected; all together are the margin.
    """
    chosen, rejected = (
        beta * (policy - reference)
        for policy, reference in zip(scores.policy[pair], scores.reference[pair], strict=True)
    )
    return [chosen, -rejected]


def means(scores: Scores) -> dict[str, Tensor]:
    """What the means are over: name -> (N,)."""
    margins = scores.margins
    return {
        "loss": scores.results.losses,
        "margin": margins,
        "accuracy": (margins > 0).double(),
        "ties": (margins == 0).double(),
        "weight": scores.results.gradient_weights,
        "log_ratio_chosen": scores.log_ratios[:, 0],
        "log_ratio_rejected": scores.log_ratios[:, 1],
    }


# --------------------------------------------------------------------------------------------- reporting


def _print_json(
    args: argparse.Namespace,
    scores: Scores,
    examples: list[Example],
    audit: Audit,
    tokenizer: Tokenizer,
    beta: float,
) -> None:
    for pair, example in enumerate(examples[: args.rows]):
        print(json.dumps(_pair_record(scores, pair, example, tokenizer, beta)))
    averages = {name: mean_of(values) for name, values in means(scores).items()}
    summary: dict[str, Any] = {"pairs": len(examples), "beta": beta}
    for name, mean in averages.items():
        summary |= {name: mean.value, f"{name}_error": mean.error if math.isfinite(mean.error) else None}
    print(json.dumps({"summary": summary, "audit": audit.as_dict(places=FEW)}))


def _pair_record(
    scores: Scores, pair: int, example: Example, tokenizer: Tokenizer, beta: float
) -> dict[str, Any]:
    results = scores.results
    record: dict[str, Any] = {"place": example.place, "prompt": tokenizer.decode(example.prompt)}
    rewards = (results.chosen_rewards[pair], results.rejected_rewards[pair])
    parts = contributions(scores, pair, beta)
    for side, name in enumerate(SIDES):
        policy, reference = scores.policy[pair][side], scores.reference[pair][side]
        record[name] = {
            "completion": tokenizer.decode(example.completions[side]),
            "logp": policy.sum().item(),
            "reference_logp": reference.sum().item(),
            "log_ratio": scores.log_ratios[pair, side].item(),
            "reward": rewards[side].item(),
            "tokens": list(map(tokenizer.token_text, example.completions[side])),
            "token_logps": policy.tolist(),
            "reference_token_logps": reference.tolist(),
            "contributions": parts[side].tolist(),
        }
    return record | {
        "margin": scores.margins[pair].item(),
        "weight": results.gradient_weights[pair].item(),
        "loss": results.losses[pair].item(),
    }


def _print_tables(
    args: argparse.Namespace,
    scores: Scores,
    examples: list[Example],
    audit: Audit,
    tokenizer: Tokenizer,
    beta: float,
) -> None:
    colour = _has_colours() and not args.no_color
    print(f"{args.model}, beta {beta:g}\n\n{audit}")
    for pair, example in enumerate(examples[: SHOWN if args.rows is None else args.rows]):
        print("\n".join(["", *pair_lines(scores, pair, example, tokenizer, beta, colour=colour)]))
    print(f"\nAll {len(examples)} pairs" + (", mean ± standard error" if len(examples) > 1 else ""))
    for name, values in means(scores).items():
        mean = mean_of(values)
        error = f" ± {mean.error:.4f}" if math.isfinite(mean.error) else ""
        print(f"  {name.replace('_', ' '):<20}{mean.value:>10.4f}{error}")


def _has_colours() -> bool:
    """Whether standard output shows colours and nobody has switched them off (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def pair_lines(
    scores: Scores, pair: int, example: Example, tokenizer: Tokenizer, beta: float, *, colour: bool
) -> list[str]:
    """One pair as lines: its numbers, then each token with its contribution."""
    results = scores.results
    parts = contributions(scores, pair, beta)
    lines = [example.place, "  " + prompt_line(visible(tokenizer.decode(example.prompt)))]
    lines.append(f"  {'':<10}{'log pi':>12}{'log pi_ref':>12}{'log-ratio':>12}{'reward':>12}")
    for side, (name, rewards) in enumerate(zip(SIDES, results[1:3], strict=True)):
        policy, reference = scores.policy[pair][side].sum(), scores.reference[pair][side].sum()
        ratio = scores.log_ratios[pair, side]
        lines.append(f"  {name:<10}{policy:>12.4f}{reference:>12.4f}{ratio:>+12.4f}{rewards[pair]:>+12.4f}")
    lines.append(
        f"  margin {scores.margins[pair]:+.4f}, loss {results.losses[pair]:.4f}, weight "
        f"{results.gradient_weights[pair]:.4f} of {beta:g}; what each token adds to the margin:"
    )
    largest = max(float(part.abs().max()) for part in parts)
    cell = partial(_cell, largest=largest, colour=colour)
    for name, ids, values in zip(SIDES, example.completions, parts, strict=True):
        lines.append(f"  {name}, together {values.sum():+.4f}")
        tokens = [f"[{tokenizer.token_text(token)}]" for token in ids]
        lines += _grid(tokens, values.tolist(), cell)
    return lines


def _grid(tokens: list[str], values: list[float], cell) -> list[str]:
    """Cells of one width, side by side, as many as fit on a line."""
    width = max(map(len, tokens)) + 9
    columns = max(1, (WIDTH - 4) // (width + 1))
    cells = [cell(token, value, width) for token, value in zip(tokens, values, strict=True)]
    return ["    " + " ".join(cells[at : at + columns]) for at in range(0, len(cells), columns)]


def _cell(token: str, value: float, width: int, *, largest: float, colour: bool) -> str:
    """A token and what it adds; black on green or red of one of five depths where colours are wanted."""
    number = f"{value:+.4f}"
    text = token + number.rjust(width - len(token))
    if not colour or abs(value) < _ROUNDED:
        return text
    shades = _GREEN if value > 0 else _RED
    return f"\x1b[30;48;5;{shades[min(4, int(5 * abs(value) / largest))]}m{text}\x1b[0m"
