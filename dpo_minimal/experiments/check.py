"""`python -m dpo_minimal check`: is your code what you think it is? A wrong answer is shown with the smallest
input that tells, what is expected, what your function gives, and the name of the mistake where it is known.

  dpo-minimal check --dpo-loss losses.py:dpo_loss --reward-model-loss my.package:ranking_loss
  dpo-minimal check --sequence-logps "trainer.py:batch_logps(logits, labels, average_log_prob=False)"

FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION. If all its parameters have names of inputs, it gets these inputs,
else the inputs in the order of the help below. Another order is written as a call, after the function's name.
The first of several values is taken for the answer, and one number for the mean over the batch; the message
says what was assumed. For methods, `from dpo_minimal import check_dpo_loss` does the same in a test.
Exit code 0: all are right; 1: one is not; 2: they could not be checked.
"""

from __future__ import annotations

import argparse
import re
from functools import partial

from ..bench.conformance import CHECKS, WHAT
from ..bench.loading import load_function
from ..validation import InputError, check_positive
from .options import Option, add_options, flag_of, resolve

GROUPS = {
    "what functions should be": {n: Option(what, list, metavar="FUNCTION") for n, what in WHAT.items()},
    "how they are called": {
        "arguments": Option("the call of functions that are named without one: inputs in another order", str),
        "beta": Option("for functions that take no beta: theirs", float, check=check_positive),
        "scale": Option("a constant factor of the answers: 1.442695041 if they are bits", float, 1.0),
    },
}
add_arguments = partial(add_options, groups=GROUPS)


def run(args: argparse.Namespace) -> int:
    """Print the verdicts. Returns the exit code: whether any function is wrong."""
    args = resolve(args, GROUPS)
    named = [(name, text) for name in WHAT for text in getattr(args, name) or ()]
    if not named:
        raise InputError("name a function to check, as in --dpo-loss FILE.py:FUNCTION.")
    fixed = {} if args.beta is None else {"beta": args.beta}
    calls = [re.fullmatch(r"(.*?)(?:\((.*)\))?", text, re.DOTALL).groups(args.arguments) for _, text in named]
    if args.arguments is not None and all(text.endswith(")") for _, text in named):
        raise InputError("--arguments is for functions that are named without a call; leave it out.")
    verdicts = []
    for (name, _), (target, call) in zip(named, calls):
        try:
            verdicts.append(CHECKS[name](load_function(target), call, args.scale, **fixed))
        except InputError as error:
            raise InputError(f"{flag_of(name)} {error}") from None
    print("\n\n".join(f"{text}, as {verdict}" for (_, text), verdict in zip(named, verdicts)))
    return int(not all(verdicts))
