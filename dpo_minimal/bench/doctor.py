"""A doctor for training logs: what must hold in any log of DPO, and does it hold in this one? [D13.7]

README.md, "The log doctor", lists what is looked for; the rules are in rules.py.
"""

from __future__ import annotations

from pathlib import Path

from ..validation import InputError, check_positive
from ..zoo import LOSSES, TRL, no_such_loss
from .case import Case, Finding
from .logs import Log, read_log
from .rules import EXPLAINED_BY, RULES


def diagnose(path: str | Path, *, beta: float | None = None, loss_type: str | None = None) -> list[Finding]:
    """What is wrong in a training log, or worth knowing; a healthy log has no finding [D13.7].

    Args:
        path: metrics.jsonl, trainer_state.json, the text of a console, or CSV (`logs.read_log`).
        beta: that of the run, where the file does not say; > 0.
        loss_type: its loss, by our name or TRL's. Where nobody says it is taken for the sigmoid loss, unless
            the first record shows another one.
    Returns: findings; contradictions first.
    Raises:
        InputError: the file cannot be read as a log; an option is out of range or contradicts the file.
    """
    return examine(case_of(read_log(path), beta, loss_type))


def case_of(log: Log, beta: float | None = None, loss_type: str | None = None) -> Case:
    """A log with what is claimed of its run. Raises InputError as `diagnose` does."""
    if beta is not None:
        check_positive("--beta", beta)
    if loss_type is not None and TRL.get(loss_type, loss_type) not in LOSSES:
        raise no_such_loss(loss_type, "--loss-type ")
    written = {"--beta": log.settings.get("beta"), "--loss-type": log.settings.get("loss_type")}
    given = {"--beta": beta, "--loss-type": loss_type and TRL.get(loss_type, loss_type)}
    for flag, value in given.items():
        if None not in (value, written[flag]) and value != written[flag]:
            raise InputError(f"{flag} {value}: the run has {written[flag]}, as its log says; leave it out.")
    beta, name = (written[flag] if value is None else value for flag, value in given.items())
    return Case(log, beta, LOSSES.get(name or ""), loss_is_claimed=name is not None)


def examine(case: Case) -> list[Finding]:
    """All findings, without those that another one explains."""
    found = [finding for rule in RULES for finding in rule(case)]
    names = {finding.name for finding in found}
    return [finding for finding in found if not names & EXPLAINED_BY.get(finding.name, set())]
