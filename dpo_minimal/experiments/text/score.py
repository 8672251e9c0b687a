"""`python -m dpo_minimal score`: what a policy prefers, pair by pair and token by token.

DPO's reward of a completion is implicit, beta log(pi(y|x) / pi_ref(y|x)). Of a pair, yw chosen, yl rejected:

  margin        reward of yw - reward of yl; above 0 the policy orders the pair as the data do
  loss          -log sigmoid(margin)                                                             (Eq. 7)
  weight        beta sigmoid(-margin), the factor of this pair's gradient: near beta where the order is
                wrong, near 0 where it is right by far
  contribution  of a token: beta (log pi - log pi_ref) of it after all before it, with a minus if rejected

A log-probability is a sum over tokens, so the contributions of a pair add up to its margin (in --json to
1e-9): they show in which words policy and reference differ. Green raises the margin, red lowers it.

Where policy = reference, log-ratios, contributions and margins are 0, the loss is ln 2 = 0.693 and the weight
beta / 2. By hand, with beta = 0.1: let log pi of yw be -12, and -14 under the reference; that of yl -15 and
-13. The rewards are then +0.2 and -0.2, the margin 0.4, the loss -log sigmoid(0.4) = 0.5130, and the weight
0.1 sigmoid(-0.4) = 0.0401, less than 0.05: part of the pair is learnt. If " great" in yw is e times likelier
than under the reference, its contribution is +0.1; if " dull" in yl is e times less likely, +0.1 too.

  dpo-minimal score --model runs/dpo-001                         generated film reviews; the run knows its
                                                                 reference and beta
  dpo-minimal score --model FOLDER --reference FOLDER --data pairs.jsonl
  dpo-minimal score --model gpt2-medium --reference gpt2 --prompt "2 + 2 =" --chosen " 4" --rejected " 5"

Loss and weight are DPO's, also of a run with another --loss-type. Pairs are read as in training. Last come
the means over all pairs with their standard errors. Where both mean log-ratios are below 0, both kinds of
completion have become less likely: the loss sees only their difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ...rivals.evaluate import mean_of
from ...text.audit import FEW, Audit
from ...text.batches import tokenize
from ...text.checkpoint import state_fingerprint
from ...text.data import dataset_from_rows
from ...text.tokenizer import Tokenizer
from ...validation import InputError, check_positive
from ...zoo import LOSSES
from ..options import COMMON, CONFIG_FILE, Option, add_options, at_least, read_run_config, resolve
from .pair_scores import SIDES, PairScores, pair_lines, pair_record, score_pairs
from .setup import MODEL, Policy, context_of, load_policy, load_rows

BETA = 0.1  # the paper's
REVIEWS, SHOWN = 200, 5  # generated pairs; pairs shown
PAIR = ("prompt", *SIDES)
GROUPS = {
    "models": {
        "model": COMMON["model"]._replace(required=True),
        "reference": Option(
            "likewise, with the same vocabulary (default, for a run of dpo: what it started from)", str,
            metavar="MODEL",
        ),
        "beta": Option(
            f"factor of the rewards (default: the run's, if its loss has a reference, else {BETA})", float,
            check=check_positive,
        ),
    },
    "pairs": {
        "data": Option(
            f"pairs as dpo reads them (default: {REVIEWS} generated film reviews)", str, metavar="FILE",
        ),
        "skip_bad_rows": COMMON["skip_bad_rows"],
        **{name: Option("of a pair of your own, exactly as it is", str, metavar="TEXT") for name in PAIR},
        "max_length": Option(
            "tokens of prompt and longest completion (default: what both models read)", check=at_least(2),
        ),
    },
    "run": {
        "rows": Option(
            f"pairs to show, the first ones (default {SHOWN}; with --json all); 0 shows the means alone",
            check=at_least(0),
        ),
        "device": COMMON["device"],
        "json": Option("print all numbers, one JSON object a pair, last the means", bool),
        "no_color": Option("no colours, as where NO_COLOR is set or the output is not a terminal", bool),
    },
}  # fmt: skip
add_arguments = partial(add_options, groups=GROUPS)


def run(args: argparse.Namespace) -> PairScores:
    """Score and print; nothing is written. Returns the scores of all pairs."""
    given = [name for name in PAIR if getattr(args, name) is not None]
    missing = [f"--{name}" for name in PAIR if name not in given]
    args = resolve(
        args, GROUPS,
        (" ".join(PAIR), args.data is not None, "{} and --data both give pairs; leave one out."),
        (" ".join(PAIR), bool(given and missing),
         f"{{}} needs {' '.join(missing[:1])}: a pair is --prompt, --chosen and --rejected."),
        ("no_color", bool(args.json), "{} is not used with --json, which has no colours; leave it out."),
    )  # fmt: skip
    policy, folder = load_policy(args.model), Path(args.model)
    run_of_dpo: dict[str, Any] = {"options": {}}
    if (folder / MODEL).is_dir() and (folder / CONFIG_FILE).exists():
        config = read_run_config(folder)
        run_of_dpo = config if config.get("command") == "dpo" else run_of_dpo
    reference = _reference(args, run_of_dpo, policy)
    if given:
        pair = {name: getattr(args, name) for name in PAIR}
        dataset = dataset_from_rows([pair], "the pair given", "preferences")
    else:
        dataset = load_rows(args, "preferences", REVIEWS)
    if dataset.unread:
        print(dataset.columns(), file=sys.stderr)  # not into the JSON
    examples, audit = tokenize(
        dataset, policy.tokenizer, skip_bad_rows=bool(args.skip_bad_rows),
        max_length=min(*(context_of(args, gpt.config.block_size) for gpt in (policy.model, reference.model))),
    )  # fmt: skip
    loss = LOSSES.get(run_of_dpo["options"].get("loss_type"))
    of_run = run_of_dpo["options"].get("beta") if loss and "reference" in loss.reads else None
    beta = args.beta or of_run or BETA  # beta of a loss without a reference multiplies something else
    scores = score_pairs(policy.model, reference.model, examples, beta=beta, device=args.device)
    (_print_json if args.json else _print_tables)(args, scores, audit, policy.tokenizer)
    return scores


def _reference(args: argparse.Namespace, run: dict[str, Any], policy: Policy) -> Policy:
    """The reference that is named, or else the one that the run of dpo started from."""
    name = args.reference
    if name is None:
        made = Path(args.model) / "sft"  # by a run of dpo that was given no model
        name = run["options"].get("model") or (str(made) if made.is_dir() else None)
    if name is None:
        raise InputError(
            f"--model {args.model}: is no run of dpo, which would know what it started from; name that by "
            "--reference."
        )
    try:
        reference = load_policy(name)
    except InputError as error:
        reason = str(error).removeprefix(f"--model {name}: ").removeprefix(f"{name}: ")
        if args.reference is None:
            reason = f"which {args.model} started from: {reason[:-1]}; or say by --reference where it is."
        raise InputError(f"--reference {name}{',' if args.reference is None else ':'} {reason}") from None
    start = run.get("start", {}).get("model")
    if args.reference is None and start not in (None, state_fingerprint(reference.model)):
        raise InputError(
            f"--model {args.model}: {name}, which that run started from, has other weights by now; name a "
            "copy of the old ones, or the new ones all the same, by --reference."
        )
    if reference.tokenizer.fingerprint != policy.tokenizer.fingerprint:
        raise InputError(
            f"--reference {name}: has another vocabulary than --model {args.model}, so their tokens cannot "
            "be compared; name the model that training started from."
        )
    return reference


def _print_json(args: argparse.Namespace, scores: PairScores, audit: Audit, tokenizer: Tokenizer) -> None:
    count = len(scores.examples)
    for pair in range(count if args.rows is None else min(args.rows, count)):
        print(json.dumps(pair_record(scores, pair, tokenizer)))
    summary: dict[str, Any] = {"pairs": count, "beta": scores.beta}
    for name, values in scores.columns().items():
        mean, error = mean_of(values)
        summary |= {name: mean, f"{name}_error": error if math.isfinite(error) else None}
    print(json.dumps({"summary": summary, "audit": audit.as_dict(places=FEW)}))


def _print_tables(args: argparse.Namespace, scores: PairScores, audit: Audit, tokenizer: Tokenizer) -> None:
    count = len(scores.examples)
    shown = min(SHOWN if args.rows is None else args.rows, count)
    # no-color.org
    switched_off = args.no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    colour = sys.stdout.isatty() and not switched_off
    print(f"{args.model}, beta {scores.beta:g}")
    if count > 1 or any(audit.findings.values()):
        print(f"\n{audit}")
    for pair in range(shown):
        record = pair_record(scores, pair, tokenizer)
        print("\n".join(["", *pair_lines(record, scores.beta, colour=colour)]))
    if count == shown == 1:
        return  # its numbers stand there
    print(f"\nAll {count} pairs, mean ± standard error" if count > 1 else "\nThe one pair")
    for name, values in scores.columns().items():
        mean, error = mean_of(values)
        ending = f" ± {error:.4f}" if math.isfinite(error) else ""
        print(f"  {name.replace('_', ' '):<20}{mean:>10.4f}{ending}")
