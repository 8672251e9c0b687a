"""The command line: `python -m dpo_minimal [command] [options]`; without a command, bandit."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__
from .experiments.bandit import command as bandit
from .experiments.frontier import command as frontier
from .experiments.sentiment import command as sentiment
from .experiments.statistics import command as statistics
from .experiments.text import audit, dpo, sample, score, sft
from .validation import InputError

COMMANDS = {
    "bandit": (bandit, "train towards the closed-form optimum and prove that it is reached"),
    "statistics": (
        statistics,
        "what finite data determine: thousands of data sets against the laws of theory",
    ),
    "frontier": (frontier, "every method beside the best possible, on worlds where that is known exactly"),
    "sentiment": (sentiment, "every method on film reviews whose judge is known: the paper's Fig. 2 to 4"),
    "sft": (sft, "teach a GPT-2 to continue prompts: the start of every preference training"),
    "dpo": (dpo, "train a GPT-2 on preferences; without arguments, film reviews from SFT to DPO"),
    "audit": (audit, "what a model will read of a preference file, and what is wrong with it"),
    "sample": (sample, "what a model writes: samples of prompts, with their log-probabilities"),
    "score": (score, "what a model prefers, pair by pair and token by token, against its reference"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpo-minimal",
        description="Direct Preference Optimization from scratch, checked against the closed-form optimum.",
        epilog="Without a command, bandit is run, with whatever options follow; "
        "`python -m dpo_minimal bandit --help` lists them.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-minimal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        module.add_arguments(sub)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after bad input (one sentence on stderr), 130 after
    Ctrl-C, 141 where nobody reads the output any more."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = ("-h", "--help", "--version", *COMMANDS)
    if not arguments or (arguments[0] not in own and arguments[0].startswith("-")):
        arguments.insert(0, "bandit")
    options = _parser().parse_args(arguments)
    command, _ = COMMANDS[vars(options).pop("command")]
    try:
        command.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # as after `| head -1`; what is still buffered must go somewhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print(f"dpo-minimal: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        reason = error.strerror or str(error)
        print(f"dpo-minimal: error: {place}cannot be used ({reason}); make room or mend it.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\ndpo-minimal: {str(interruption) or 'interrupted.'}", file=sys.stderr)
        return 130
    return 0


def entry_point() -> None:
    """The console script `dpo-minimal`."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
