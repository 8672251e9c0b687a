"""The command line: `python -m dpo_minimal [command] [options]`; without a command, bandit."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

from . import __version__
from .experiments import card, check, doctor, judge
from .experiments.bandit import command as bandit
from .experiments.frontier import command as frontier
from .experiments.games import command as games
from .experiments.page import command as page
from .experiments.sentiment import command as sentiment
from .experiments.statistics import command as statistics
from .experiments.text import audit, dpo, sample, score, sft
from .text import processes
from .validation import InputError

COMMANDS = {
    "bandit": (bandit, "train to the closed-form optimum and prove that it is reached"),
    "statistics": (statistics, "what finite data determine: thousands of data sets beside the theory"),
    "frontier": (frontier, "every method beside the best possible, in worlds where that is known exactly"),
    "games": (games, "preferences without a reward: cycles, and where each method takes them"),
    "sentiment": (sentiment, "every method on film reviews of known reward: the paper's Fig. 2 to 4"),
    "page": (page, "one HTML file to play with: beta, training, pairs, frontier and tokens on sliders"),
    "card": (card, "what a preference loss does: yours, or one of the package's"),
    "check": (check, "your loss or your log-probabilities: are they what you think they are?"),
    "doctor": (doctor, "what is wrong in a training log, by what must hold in any"),
    "audit": (audit, "what a model reads of a preference file, and what is wrong with the file"),
    "sft": (sft, "supervised fine-tuning of a GPT-2: the start of every preference training"),
    "dpo": (dpo, "train a GPT-2 on preferences; without options, film reviews from SFT to DPO"),
    "sample": (sample, "samples of a model, with their log-probabilities"),
    "score": (score, "what a model prefers to its reference, pair by pair and token by token"),
    "judge": (judge, "which of two answers is better, asked of any server; and do people agree with it?"),
}
DESCRIPTION = "Direct Preference Optimization from scratch, checked against the closed-form optimum."
FIRST_STEPS = """
first steps:
  dpo-minimal                             bandit: a small example whose exact answer is known
  dpo-minimal dpo                         a language model before and after DPO, in about two minutes
  dpo-minimal audit --data pairs.jsonl    your preference pairs: are they fit for training?
  dpo-minimal dpo --data pairs.jsonl --model gpt2    train on them; sample and score show what came of it
  dpo-minimal COMMAND --help              what a command does, its options and their defaults

Without a command, bandit is run, with whatever options follow. `python -m dpo_minimal` is the same program.
"""


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="dpo-minimal", usage="%(prog)s [COMMAND] [options]", description=DESCRIPTION,
        epilog=FIRST_STEPS, formatter_class=partial(plain, max_help_position=16),
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dpo-minimal {__version__}")
    commands = parser.add_subparsers(
        prog="dpo-minimal", title="commands", dest="command", required=True, metavar="COMMAND [options]"
    )
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(
            name, usage="%(prog)s [options]", help=summary, description=module.__doc__, formatter_class=plain,
            allow_abbrev=False,
        )  # fmt: skip
        module.add_arguments(sub)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or what a command returns that judges; 2 after bad input
    (one sentence on stderr), 130 after Ctrl-C, 141 where nobody reads the output any more."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0][:1] == "-" and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "bandit")
    options = _parser().parse_args(arguments)
    name = vars(options).pop("command")
    try:
        with processes.joined(name):
            outcome = COMMANDS[name][0].run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # as after `| head -1`; what is still buffered must go somewhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, processes.Lost) as error:
        processes.report(f"dpo-minimal: error: {error}")
        return 2
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        problem = f"{place}cannot be used ({error.strerror or error})"
        processes.report(f"dpo-minimal: error: {problem}; free some space or repair it.")
        return 2
    except KeyboardInterrupt as interruption:
        processes.report(f"\ndpo-minimal: {str(interruption) or 'interrupted.'}")
        return 130
    return outcome if isinstance(outcome, int) else 0


def entry_point() -> None:
    """The console script `dpo-minimal`."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters that a text has
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
