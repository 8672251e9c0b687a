"""The options that sft and dpo share: declared, given their defaults, checked, and read back on --resume.

Every option is None until it is given, so that two things can be told apart: a flag that contradicts the run
to go on with, and a default. Defaults stand in one table a command: those for a file, and those for the
generated reviews.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from ...text.objectives import DTYPES
from ...text.training_run import Settings
from ...train import OPTIMIZERS
from ...validation import InputError, check_count, check_device, check_positive, check_seed

CONFIG_FILE = "config.json"


HELD_OUT, MOST_HELD_OUT = 0.05, 500  # more rows would cost more time at each look than they tell


class Defaults(NamedTuple):
    """What an option is where nobody gives it.

    Fields:
        file: with --data.
        reviews: what differs for the generated reviews.
    """

    file: dict[str, Any]
    reviews: dict[str, Any]

    def of(self, data: str | None) -> dict[str, Any]:
        return self.file if data is not None else self.file | self.reviews

    def text(self, name: str) -> str:
        """The defaults of an option, for its help."""
        file = self.file[name]
        found = f"default {'off' if file is None else file}"
        if name in self.reviews and self.reviews[name] != file:
            found += f"; reviews {self.reviews[name]}"
        return found


# What sft and dpo have in common. Batch and warm-up are the paper's.
COMMON = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1,
    "max_steps": None,
    "warmup_steps": 150,
    "max_grad_norm": 1.0,
    "held_out": None,
    "max_length": None,
    "max_prompt_length": None,
    "logging_steps": 1,
    "eval_steps": 50,
    "save_steps": 200,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
}


def add_data_options(
    parser: argparse.ArgumentParser, defaults: Defaults, rows: str, context_note: str = ""
) -> None:
    """--data and what is done to its rows; `rows` says what they are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="FILE",
        help=f"{rows}: JSON or JSONL, gzipped or not; see `dpo-minimal audit --data FILE` first "
        "(default: film reviews that the package makes up itself)",
    )  # fmt: skip
    group.add_argument(
        "--rows", type=int, metavar="N",
        help=f"without --data: how many rows to make up (default {defaults.reviews['rows']})",
    )  # fmt: skip
    group.add_argument(
        "--skip-bad-rows", action="store_true", default=None,
        help="leave out and list bad rows instead of stopping at the first",
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=int, metavar="N",
        help="tokens of a prompt with its longest completion; a longer prompt loses its left end, a "
        f"completion never loses anything (default: the model's context{context_note})",
    )  # fmt: skip
    group.add_argument("--max-prompt-length", type=int, metavar="N", help="and of the prompt alone")
    group.add_argument(
        "--held-out", type=float, metavar="FRACTION",
        help="part of the rows kept for evaluation, whole prompts at a time; 0 keeps none (default "
        f"{HELD_OUT}, but {MOST_HELD_OUT} rows at most)",
    )  # fmt: skip


def add_training_options(parser: argparse.ArgumentParser, defaults: Defaults) -> argparse._ArgumentGroup:
    """The optimizer and its steps; returns the group, for more of them."""
    group = parser.add_argument_group("training")
    for flag, kind, text in (
        ("--learning-rate", float, "reached at the end of the warm-up, then constant"),
        ("--per-device-train-batch-size", int, "rows that go through the model together"),
        ("--gradient-accumulation-steps", int, "such batches an optimizer step, exact to rounding"),
        ("--num-train-epochs", int, "passes over the data"),
        ("--max-steps", int, "optimizer steps at most"),
        ("--warmup-steps", int, "steps in which the learning rate grows linearly"),
        ("--max-grad-norm", float, "clip the gradient to this norm; 0 clips nothing"),
    ):
        group.add_argument(
            flag, type=kind, metavar="N" if kind is int else "X",
            help=f"{text} {_in(defaults, flag[2:].replace('-', '_'))}",
        )  # fmt: skip
    group.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="without weight decay " + _in(defaults, "optimizer")
    )
    return group


def add_run_options(parser: argparse.ArgumentParser, defaults: Defaults, command: str) -> None:
    """Where and how often."""
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", metavar="DIR", help=f"new folder (default runs/{command}-NNN)")
    group.add_argument(
        "--resume", metavar="DIR",
        help="go on with an interrupted run, to the same weights as if it had not been interrupted; all "
        "other options are then those of the run",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES,
        help="of the matrix products; weights, log-softmax and loss are float32 in any case "
        + _in(defaults, "dtype"),
    )  # fmt: skip
    group.add_argument("--device", help="cpu or cuda " + _in(defaults, "device"))
    group.add_argument("--seed", type=int, help="the same seed gives the same run " + _in(defaults, "seed"))
    for flag, text in (
        ("--logging-steps", "write every Nth step, the first and the last to metrics.jsonl"),
        ("--eval-steps", "look at the held-out rows every N steps; 0 only before and after"),
        ("--save-steps", "write a checkpoint every N steps; 0 only at the end"),
    ):
        group.add_argument(
            flag, type=int, metavar="N", help=f"{text} {_in(defaults, flag[2:].replace('-', '_'))}"
        )


def _in(defaults: Defaults, name: str) -> str:
    return f"({defaults.text(name)})"


def resolve(args: argparse.Namespace, command: str, defaults: Defaults) -> argparse.Namespace:
    """All options with a value: of the run to resume, else given, else default.

    `resume` is then a Path or None.

    Raises InputError: an option out of range or without use here, or one that contradicts the resumed run.
    """
    if args.resume is not None:
        return _resumed(args, command)
    if args.data is not None:
        if args.rows is not None:
            raise InputError("--rows is used only without --data, for the generated reviews; leave it out.")
    elif args.skip_bad_rows is not None:
        raise InputError("--skip-bad-rows is used only with --data: the generated reviews have no bad rows.")
    values = defaults.of(args.data)
    options = argparse.Namespace(
        **{name: values.get(name) if value is None else value for name, value in vars(args).items()}
    )
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "logging_steps",
    ):
        check_count(_flag(name), getattr(options, name))
    for name in ("warmup_steps", "eval_steps", "save_steps"):
        check_count(_flag(name), getattr(options, name), minimum=0)
    for name in ("max_steps", "max_length", "max_prompt_length"):
        if getattr(options, name) is not None:
            check_count(_flag(name), getattr(options, name))
    if options.data is None:
        check_count("--rows", options.rows, minimum=100)
    check_seed("--seed", options.seed)
    check_positive("--learning-rate", options.learning_rate)
    if not 0 <= options.max_grad_norm < float("inf"):
        raise InputError(f"--max-grad-norm must be a number from 0 on, got {options.max_grad_norm}.")
    if options.held_out is not None and not 0 <= options.held_out < 1:
        raise InputError(f"--held-out must lie in [0, 1), got {options.held_out}.")
    check_device(options.device)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(options: argparse.Namespace) -> Settings:
    """The part of the options that the training loop takes."""
    values = {name: getattr(options, name) for name in Settings._fields}
    return Settings(**values | {"max_grad_norm": options.max_grad_norm or None})


# ----------------------------------------------------------------------------------------------- resuming


def _resumed(args: argparse.Namespace, command: str) -> argparse.Namespace:
    folder = Path(args.resume)
    config = read_run_config(folder)
    if config.get("command") != command:
        raise InputError(
            f"--resume {folder}: is a run of {config.get('command')!r}; go on with it by that command."
        )
    options = config["options"]
    if missing := sorted(set(vars(args)) - set(options)):
        raise InputError(f"--resume {folder}: was made without {_flag(missing[0])}; start a new run.")
    for name, value in vars(args).items():
        if value is not None and name != "resume" and value != options.get(name):
            was = options.get(name)
            there = "is not given" if was is None else f"is {was}"
            raise InputError(f"--resume {folder}: {_flag(name)} {there} in that run; leave it out.")
    return argparse.Namespace(**options | {"resume": folder})


def read_run_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises InputError where it is missing or not one."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--resume {folder}: has no {CONFIG_FILE}; name the folder of a run.") from None
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read; start a new run.") from None
    fields = {"options": dict, "threads": int}
    if not isinstance(config, dict) or any(not isinstance(config.get(k), v) for k, v in fields.items()):
        raise InputError(f"{path}: is not that of a run of sft or dpo; name another folder.")
    return config
