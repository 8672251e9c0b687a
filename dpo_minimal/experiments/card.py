"""`python -m dpo_minimal card`: what a preference loss does, on one page, beside DPO and IPO.

  python -m dpo_minimal card my_loss.py:my_loss     a function of yours
  python -m dpo_minimal card simpo --option beta=2  one of those that come with the package
  python -m dpo_minimal card --all                  all of these: which of them end at pi*?

Your function takes log-probabilities of completions, summed over tokens, as tensors (B,), and returns the
losses (B,), one for each pair, without their mean:

  def my_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta):

With these names it may take them in any order, and leave out those that it does not read; chosen_lengths and
rejected_lengths are token counts. With other names they are given by position, as --reads says. The card
trains tables whose optimum pi* is known, finite data and a small GPT; where the loss has a beta, pi* is that
of the same beta. Every line names the section of the derivations that explains it.
"""  # noqa: E501 (the line to be copied)

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ..bench.card import Card, loss_card
from ..bench.loading import load_function
from ..text.runs import refuse_used_folder, write_json, write_text
from ..validation import InputError
from ..zoo import LOSSES, no_such_loss
from .study import run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.usage = "%(prog)s (LOSS | --all) [options]"
    parser.add_argument(
        "loss", nargs="?", metavar="LOSS",
        help=f"FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, or {', '.join(LOSSES)}",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="a card of each loss of the package, and a table")
    parser.add_argument(
        "--option", action="append", metavar="NAME=VALUE",
        help="an option of the loss, a number; once for each (default: its own defaults, and beta=0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--reads", default="policy,reference", metavar="TABLES",
        help="what the first parameters of a function with other names are, chosen before rejected: of "
        "policy, reference, lengths (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer worlds, data sets and steps: some 10 s")
    parser.add_argument("--output-dir", metavar="DIR", help="new folder (default runs/card-NNN)")


def run(args: argparse.Namespace) -> Path:
    """Measure, print the page or the table, write the run folder, which is returned."""
    if bool(args.loss) == args.all:
        raise InputError("card takes the name of one loss, or --all.")
    if args.all and args.option:
        raise InputError("--all takes the losses' own options; leave out --option, or name one loss.")
    refuse_used_folder(args.output_dir)
    options, reads = dict(map(_option, args.option or ())), tuple(args.reads.replace(" ", "").split(","))
    chosen = LOSSES if args.all else {"card": _named(args.loss)}
    cards = {}
    for name, loss in tqdm(chosen.items(), desc="measuring", disable=not args.all):
        cards[name] = loss_card(loss, reads=reads, options=options, quick=args.quick)
    page = table_of_cards(cards) if args.all else cards["card"].text()
    folder = run_folder("card", vars(args))  # only now: an interrupted run leaves none behind
    for name, card in cards.items():
        write_json(folder / f"{name}.json", card.json())
        card.figure(folder / f"{name}.png")
    file = folder / ("table.md" if args.all else "card.txt")
    write_text(file, page + "\n")
    print(page)
    print(f"Wrote {folder}: {file.name}, and {'for each loss' if args.all else 'card'}.json and .png.")
    return folder


def _named(name: str):
    if ":" in name:
        return load_function(name)
    if name not in LOSSES:
        raise no_such_loss(name, remedy="write FILE.py:FUNCTION, or")
    return LOSSES[name]


def _option(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.replace("-", "_"), float(value)
    except ValueError:
        raise InputError(f"--option {text}: write NAME=NUMBER, such as beta=0.1.") from None


_HEADER = """\
| loss | ends at π* | KL to π* | nearest β: KL | π_ref | pulls alike | one end for all pairs | unanimous pairs | a tenth mislabelled |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""  # noqa: E501


def table_of_cards(cards: dict[str, Card]) -> str:
    """Which preference losses end at pi*? One row a loss; divergences in nats, of the worst world."""
    return "\n".join([_HEADER, *(_row(name, card) for name, card in cards.items())])


def _row(name: str, card: Card) -> str:
    found = card.json()
    yes = {True: "yes", False: "no", None: "–"}

    def number(key: str) -> str:
        return "–" if found[key] is None else f"{found[key]:.2g}" if found[key] > 1e-9 else "0"

    end = {True: "**yes**", False: "no", None: "not decided"}[found["ends_at_optimum"]]
    if found["worlds_without_end"]:
        end = f"no end in {found['worlds_without_end']} of {found['worlds']} worlds"
    best = "–" if found["best_beta"] is None else f"{found['best_beta']:.3g}: {number('kl_at_best_beta')}"
    pairs = None if found["depends_on_pairs"] is None else not found["depends_on_pairs"]
    cells = (
        f"`{name}`", end, number("kl_to_optimal"), best, "read" if found["reads_reference"] else "not read",
        yes[found["equal_pulls"]], yes[pairs], yes[found["end_on_unanimous_pairs"]], number("kl_after_flips"),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
