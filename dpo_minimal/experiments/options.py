"""The options of commands: each is declared once, for parser, help, checks, defaults and --resume.

An option is None until `resolve` fills in its default. So what is given, but of no use or against the run to
resume, can be told from a default.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..text.objectives import DTYPES
from ..text.runs import read_json_object
from ..train import OPTIMIZERS
from ..validation import InputError, check_count, check_device, check_not_negative, check_positive, check_seed

CONFIG_FILE = "config.json"
WARM_UP = 150  # the paper's
LORA_RATE = 10  # times the default learning rate, where an adapter is all that learns
HELD_OUT, MOST_HELD_OUT = 0.05, 500  # more rows would make evaluations longer than their precision is worth


class Option(NamedTuple):
    """An option of a command."""

    help: str  # what it is for; its default is added
    kind: type = int  # or float, str; bool for a flag without a value; list for a text that may be repeated
    default: Any = None  # None where something else decides, as its help then says
    reviews: Any = None  # the default without --data, for the generated reviews, where that is another
    check: Callable[[str, Any], None] | None = None  # of flag and value; integers must be 1 or more anyway
    metavar: str | None = None  # if not N or X
    choices: Collection[str] | None = None
    required: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keywords for argparse's add_argument."""
        named = (("default", self.default), ("without --data", self.reviews))
        defaults = "; ".join(f"{name} {value}" for name, value in named if value is not None)
        text = self.help
        if defaults:  # one bracket, also where the help has one on what else decides
            text = f"{text[:-1]}; {defaults})" if text.endswith(")") else f"{text} ({defaults})"
        if self.kind is bool:
            return {"help": text, "action": "store_true", "default": None}
        metavar = self.metavar or {int: "N", float: "X"}.get(self.kind)
        found = {"help": text, "metavar": metavar, "choices": self.choices, "required": self.required}
        return found | ({"action": "append"} if self.kind is list else {"type": self.kind})


Group = dict[str, Option]  # by their names, which are the flags with _ for -
Groups = dict[str, Group]  # by their titles in the help


def at_least(minimum: int) -> Callable[[str, int], None]:
    """A check of integers."""
    return partial(check_count, minimum=minimum)


def must(rule: Callable[[float], bool], text: str) -> Callable[[str, float], None]:
    """A check of numbers: what must be, and how to say it."""

    def check(flag: str, value: float) -> None:
        if not rule(value):
            raise InputError(f"{flag} must {text}, got {value}.")

    return check


COMMON: Group = {
    "model": Option("a run, a folder, or a released name (gpt2 to gpt2-xl)", str, metavar="MODEL"),
    "skip_bad_rows": Option("leave out and list bad rows of --data instead of stopping at the first", bool),
    "device": Option("cpu or cuda", str, "cpu", check=lambda _, name: check_device(name), metavar="DEVICE"),
    "seed": Option("the same seed gives the same run", int, 0, check=check_seed),
}
# What sft and dpo share. Batch and warm-up are the paper's.
DATA: Group = {
    "data": Option(
        "rows to train on: JSON or JSONL, gzipped or not; see `dpo-minimal audit --data FILE` first "
        "(default: film reviews that the package generates)", str, metavar="FILE",
    ),
    "rows": Option("how many rows to generate", check=at_least(100)),
    "skip_bad_rows": COMMON["skip_bad_rows"],
    "max_length": Option(
        "tokens of a prompt with its longest completion; a longer prompt loses its left end, a completion "
        "is never cut (default: the model's context)"
    ),
    "max_prompt_length": Option("tokens of the prompt alone (default: no such limit)"),
    "held_out": Option(
        "share of the rows kept for evaluation, whole prompts at a time; 0 keeps none (default "
        f"{HELD_OUT}, but {MOST_HELD_OUT} rows at most, and none of too few)", float,
        check=must(lambda share: 0 <= share < 1, "lie in [0, 1)"),
    ),
}  # fmt: skip
TRAINING: Group = {
    "learning_rate": Option("reached at the end of the warm-up, then constant", float, check=check_positive),
    "per_device_train_batch_size": Option("rows that go through the model together", int, 8),
    "gradient_accumulation_steps": Option("such batches a step, of all processes; exact to rounding", int, 8),
    "num_train_epochs": Option("passes over the data", int, 1),
    "max_steps": Option("optimizer steps at most (default: no limit)"),
    "warmup_steps": Option(
        "steps in which the learning rate grows linearly (default: the paper's "
        f"{WARM_UP}, but a tenth of all steps at most)", check=at_least(0),
    ),
    "max_grad_norm": Option("largest norm of the gradient; 0: any", float, 1.0, check=check_not_negative),
    "optimizer": Option("without weight decay", str, choices=OPTIMIZERS),
}  # fmt: skip
RUN: Group = {
    "output_dir": Option("new folder (default: the next free runs/COMMAND-NNN)", str, metavar="DIR"),
    "resume": Option(
        "go on with an interrupted run, to the same weights as if it had not been interrupted; all other "
        "options are then those of the run", str, metavar="DIR",
    ),
    "dtype": Option("of matrix products; weights and loss stay float32", str, "float32", choices=DTYPES),
    "device": COMMON["device"],
    "seed": COMMON["seed"],
    "logging_steps": Option("write every Nth step, the first and the last to metrics.jsonl", int, 1),
    "eval_steps": Option("evaluate every N steps; 0: only before and after", int, 50, check=at_least(0)),
    "save_steps": Option("write a checkpoint every N steps; 0: only at the end", int, 200, check=at_least(0)),
}  # fmt: skip


def altered(group: Group, **changes: dict[str, Any]) -> Group:
    """The group with other fields of some of its options."""
    return group | {name: group[name]._replace(**fields) for name, fields in changes.items()}


def declared(groups: Groups) -> Group:
    """All options of a command."""
    return {name: option for group in groups.values() for name, option in group.items()}


def flag_of(name: str) -> str:
    """The flag of an option: --max-steps of max_steps."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, groups: Groups) -> None:
    """Declare a command's options, by the titles of their groups."""
    for title, group in groups.items():
        section = parser.add_argument_group(title)
        for name, option in group.items():
            section.add_argument(flag_of(name), **option.arguments())
    needed = [f" {flag_of(name)} {each.metavar}" for name, each in declared(groups).items() if each.required]
    parser.usage = f"%(prog)s{''.join(needed)} [options]"


def resolve(
    args: argparse.Namespace, groups: Groups, *rules: tuple[str, bool, str], command: str | None = None
) -> argparse.Namespace:
    """All options with a value: given, else default; of a run to resume, those of the run.

    Args:
        rules: what is refused although in range, mostly as it has no use beside other options: names of
            options, whether they are refused, and the message, with {} for the flag.
        command: which makes run folders, so that --resume is one of its options.
    Raises InputError: a rule, an option out of range, or one that contradicts the run to resume.
    """
    if command is not None and args.resume is not None:
        return _resumed(args, declared(groups), command)
    data = getattr(args, "data", None)  # which frontier and sentiment do not have
    of_data = (
        ("skip_bad_rows", data is None,
         "{} is used only with --data, whose rows may be bad; leave it out."),
        ("rows", command is not None and data is not None,
         "{} is used only without --data, for the generated reviews; leave it out."),
        ("lora_alpha lora_target lora_dropout", getattr(args, "lora_r", None) is None,
         "{} is used only with --lora-r; leave it out."),
    )  # fmt: skip
    for names, refused, message in (*of_data, *rules):
        for name in names.split():
            if refused and getattr(args, name, None) is not None:
                raise InputError(message.format(flag_of(name)))
    values = dict(vars(args))
    for name, option in declared(groups).items():
        if values[name] is None:
            values[name] = option.reviews if data is None and option.reviews else option.default
            if name == "learning_rate" and values.get("lora_r") is not None:
                values[name] = float(f"{LORA_RATE * values[name]:g}")
        else:
            _check(name, option, values[name])
    return argparse.Namespace(**values)


def _check(name: str, option: Option, value: Any) -> None:
    kinds = (int, float) if option.kind is float else option.kind
    if not isinstance(value, kinds) or value not in (option.choices or [value]):  # only if a file says so
        raise InputError(f"{flag_of(name)} cannot be {value!r}; restore the run's {CONFIG_FILE}.")
    if option.check is not None or option.kind is int:
        (option.check or check_count)(flag_of(name), value)


def _resumed(args: argparse.Namespace, group: Group, command: str) -> argparse.Namespace:
    folder = Path(args.resume)
    config = read_run_config(folder)
    if config.get("command") != command:
        raise InputError(
            f"--resume {folder}: is a run of {config.get('command')!r}; go on with it by that command."
        )
    options = config["options"]
    if missing := sorted(set(vars(args)) - set(options) - {"resume"}):
        raise InputError(f"--resume {folder}: was made without {flag_of(missing[0])}; start a new run.")
    for name, value in vars(args).items():
        if value is not None and name != "resume" and value != options.get(name):
            was = options.get(name)
            there = "is not given" if was is None else f"is {was}"
            raise InputError(f"--resume {folder}: {flag_of(name)} {there} in that run; leave it out.")
    for name, option in group.items():  # the device may be gone, the file altered
        if options.get(name) is not None:
            _check(name, option, options[name])
    return argparse.Namespace(**options | {"resume": folder})


def read_run_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises InputError where it is missing or not one."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise InputError(f"--resume {folder}: has no {CONFIG_FILE}; name the folder of a run.")
    config = read_json_object(path)
    threads = config.get("threads")
    if not isinstance(config.get("options"), dict) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"{path}: is not that of a run of sft or dpo; name another folder.")
    return config
