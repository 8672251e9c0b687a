"""`python -m dpo_minimal doctor`: what is wrong in a training log of DPO, by what must hold in any such log.

  dpo-minimal doctor runs/dpo-001/metrics.jsonl
  dpo-minimal doctor trainer_state.json --beta 0.1
  dpo-minimal doctor train.log --loss-type ipo

Reads metrics.jsonl of this package (with config.json beside it), trainer_state.json of TRL, the text of a
console with TRL's lines {'loss': ...}, and CSV with TRL's names. Each finding says what was seen, why it
cannot be or what it means, and what to do; the tag names the section that proves it (derivations.md and, of
D13, notebooks/what-goes-wrong.md). Exit code 0: nothing was found; 1: something was; 2: it cannot be read.
"""

from __future__ import annotations

import argparse
import textwrap

from ..bench.doctor import Case, case_of, examine
from ..bench.logs import read_log
from ..bench.rules import slopes_of
from ..validation import check_positive
from .options import Option, add_options, resolve

GROUPS = {
    "what the log does not say": {
        "beta": Option("the run's beta, to compare with that of the rewards", float, check=check_positive),
        "loss_type": Option(
            "the run's loss, by our name or TRL's (default: DPO's, unless the first record shows another)",
            str, metavar="NAME",
        ),
    },
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("file", metavar="FILE", help="the log")
    add_options(parser, GROUPS)
    parser.usage = "%(prog)s FILE [options]"


def run(args: argparse.Namespace) -> int:
    """Print what was read, and the findings. Returns the exit code: whether there are any."""
    args = resolve(args, GROUPS)
    case = case_of(read_log(args.file), args.beta, args.loss_type)
    found = examine(case)
    print(_read(case))
    for finding in found:
        print(f"\n{finding.name}  [{finding.tag}]")
        for title in ("seen", "meaning", "remedy"):
            print(textwrap.fill(f"  {title:<8}{getattr(finding, title)}", 108, subsequent_indent=" " * 10))
    print("\nNothing that must hold is broken." if not found else "")
    return int(bool(found))


def _read(case: Case) -> str:
    """What was read, and what is known of the run."""
    loss = case.loss.name if case.loss else "dpo, assumed" if case.is_sigmoid else "unknown"
    beta = "unknown" if case.beta is None else f"{case.beta:g}"
    if case.beta is None and (slopes := slopes_of(case)):
        low, high = max(low for low, _, _ in slopes), min(high for _, high, _ in slopes)
        beta = f"between {low:.4g} and {high:.4g}, by the rewards"
    counts = f"{len(case.training)} records of training, {len(case.evaluations)} of evaluation"
    note = f"\nnote: {case.log.note}." if case.log.note else ""
    return f"{counts}; loss {loss}; beta {beta}.{note}"
