"""What the doctor's rules share: a log, what is claimed of its run, and how exactly its numbers are known.

What a log records of training is a mean over rows, micro-batches and steps. Linear identities survive means,
inequalities of convex functions do in one direction, and values at the start do not: these are looked for in
records of the first step alone [D13.7].
"""

from __future__ import annotations

import itertools
import math
import tomllib
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from ..losses import Loss
from .logs import Log, Record

LN2 = math.log(2)
# Relative rounding of a logged mean. bfloat16 has 8 significant bits and rounds by 2^-9, each row and their
# mean; whether a trainer computes in it is not in its log. Ours are float32, 24 bits, with room for the order
# of additions.
HALF, SINGLE = 2.0**-8, 2.0**-20
RECENT = 10  # records at the end that must agree: by chance, if each were a coin, 2^-10
REWARDS, LOGPS = ("rewards/chosen", "rewards/rejected"), ("logps/chosen", "logps/rejected")
RATIO, MARGINS, ACCURACY = "dpo/chosen_logratio", "rewards/margins", "rewards/accuracies"


class Finding(NamedTuple):
    """What a log shows.

    Fields:
        name: of the kind; always the same.
        seen: where, and the numbers.
        meaning: why it cannot be, or what it means.
        remedy: what to do.
        tag: the section that derives it, "D5.1".
    """

    name: str
    seen: str
    meaning: str
    remedy: str
    tag: str


@cache
def _words() -> dict[str, dict[str, str]]:
    return tomllib.loads(Path(__file__).with_name("findings.toml").read_text(encoding="utf-8"))


def finding(name: str, seen: str, **numbers: float | str) -> Finding:
    """A finding with its words; of "ties.pairs" the name is "ties"."""
    words = _words()[name]
    return Finding(
        name.partition(".")[0], seen, words["meaning"].format(**numbers), words["remedy"].format(**numbers),
        words["tag"],
    )  # fmt: skip


class Case:
    """A log, and what is claimed of its run: None where nobody says."""

    def __init__(self, log: Log, beta: float | None, loss: Loss | None, *, loss_is_claimed: bool):
        self.log, self.beta, self.loss, self.loss_is_claimed = log, beta, loss, loss_is_claimed
        self.training, self.precision = log.training, SINGLE if log.ours else HALF
        self.reads_reference = loss is None or "reference" in loss.reads
        self.evaluations = list(itertools.chain(*log.evaluations.values()))
        self.records = [*self.training, *self.evaluations]
        begun = [
            data[0] for data in log.evaluations.values() if 0 in (data[0].of("step"), data[0].of("epoch"))
        ]
        self.start = begun + [record for record in log.training[:1] if record.of("step") == 1]
        # Where loss and rewards are means of the same rows with the same weights. Not in TRL's evaluations:
        # the loss is a mean over rows, the rewards are means over batches, of which the last is smaller.
        self.same_rows = self.records if log.ours else self.training

    @cached_property
    def is_sigmoid(self) -> bool:
        """Whether the loss is -log sigmoid(margin): as claimed, or else as far as the first record tells.

        |l(m) - ln 2| <= |m|, so a loss far from ln 2 beside rewards near 0 is another one.
        """
        if self.loss_is_claimed or not self.training:
            return not self.loss_is_claimed or (self.loss is not None and self.loss.name == "dpo")
        first = self.training[0]
        size = sum(abs(first.of(name)) for name in REWARDS)
        return not abs(first.of("loss") - LN2) > size + HALF + self.error(first, "loss")  # nan: not known

    @cached_property
    def loss_at_start(self) -> float | None:
        """The loss where policy = reference, where it is known."""
        if not self.loss_is_claimed:
            return LN2 if self.is_sigmoid else None
        if self.loss is None or self.loss.start is None or self.loss.rows != "preferences":
            return None
        given = {o.name: self.log.settings.get(o.name) for o in self.loss.options} | {"beta": self.beta}
        try:
            return self.loss.start(2, **{name: value for name, value in given.items() if value is not None})
        except TypeError:  # it depends on an option that nobody gave
            return None

    def error(self, record: Record, *names: str) -> float:
        """How far writing may have moved the sum of some numbers."""
        return sum(self.log.rounding(name, record.of(name)) for name in names)

    def is_systematic(self, count: int, of: int) -> bool:
        """Whether so many records with a contradiction between loss and rewards are held against the log.

        In ours, one. Older versions of TRL logged the loss of all processes and the rewards of the first,
        which differ by chance in either direction: for so many the chance is 1/1000 (Hoeffding), or 2^-n.
        """
        return count >= (1 if self.log.ours else max(1, min(of, of / 2 + math.sqrt(of * math.log(1000) / 2))))


def having(records: list[Record], *names: str) -> list[Record]:
    """The records in which all of these are finite."""
    return [record for record in records if all(math.isfinite(record.of(name)) for name in names)]


def the_last(records: list[Record]) -> list[Record]:
    """The end of a training: `RECENT` records, or half of a shorter one; none of fewer than six."""
    return records[-min(RECENT, len(records) // 2) :] if len(records) >= 6 else []


def shown(record: Record, *names: str) -> str:
    """'step 3: loss 0.7012, grad_norm 2.1'."""
    return f"{record.place}: " + ", ".join(f"{n} {record.of(n):.4g}" for n in names if n in record.values)


def counted(records: list) -> str:
    """'3 records'."""
    return f"{len(records)} record" + "s" * (len(records) != 1)


def softplus(x: float) -> float:
    """log(1 + e^x): the loss of a pair with margin -x."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def least_loss(margin: float, accuracy: float) -> float:
    """The least mean of -log sigmoid(m) for margins with this mean, of which this share is above 0 [D13.7].

    Jensen on each side: those on the mean's side share it, the others are at 0. Infinite where no margins
    have both.
    """
    share = accuracy if margin > 0 else 1 - accuracy
    if share <= 0:
        return math.inf if margin else LN2
    return (1 - share) * LN2 + share * softplus(-margin / share)
