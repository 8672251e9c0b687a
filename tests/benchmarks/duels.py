"""Starts the contestants' processes and lets two of them take turns, so that noise hits both alike.

Two processes are alive at a time: ours, and one opponent after the other. While one works the other sleeps.
What is compared is a round: a block of ours and a block of the opponent's, one straight after the other,
their order changing from round to round. Before that they prove that they do the same work.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dpo_minimal.validation import InputError

from .tasks import CHECKED_STEPS, STEPS_PER_EPOCH, Task

ROOT = Path(__file__).resolve().parents[2]

# Of the losses' way from ln 2. Seen: 4e-5 in float32; 0.02 in bfloat16, whose numbers are 0.4 % apart.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Duel(NamedTuple):
    """What one opponent and ours did in their rounds.

    Fields:
        task: the opponent's.
        ours_facts, facts: what each said at its start (contestant.py).
        disagreement: `check_same_losses`; None for sampling, and for an adapter against all weights.
        rounds: (block of ours, block of the opponent's) as reported by contestant.py.
    """

    task: Task
    ours_facts: dict
    facts: dict
    disagreement: float | None
    rounds: list[tuple[dict, dict]]


class Contestant:
    """A contestant's process, from its start to its end; `facts` is what it said when it was ready."""

    def __init__(self, task: Task):
        self.task = task
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.contestant", json.dumps(task._asdict())],
            cwd=ROOT, env=os.environ | surroundings(task), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        try:
            self.facts = self._report()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *unused: object) -> None:
        """End of file is the sign to stop; what does not heed it is killed."""
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def block(self, seconds: float, steps: int) -> dict:
        """Let it work for a multiple of so many steps, until so much time has passed."""
        with contextlib.suppress(BrokenPipeError):  # it has died: the missing report tells
            print(json.dumps({"seconds": seconds, "steps": steps}), file=self._process.stdin, flush=True)
        return self._report()

    def _report(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines() or ["nothing"]
            raise InputError(
                f"{describe(self.task)} stopped; the last it said was {said[-1]!r}, so mend that or leave it "
                "out with --against."
            )
        return json.loads(line)


def surroundings(task: Task) -> dict[str, str]:
    """Environment variables: offline, a cache beside the weights, one GPU."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{task.folder}/cache",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(task.threads),
    }
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return settings | ({"CUDA_VISIBLE_DEVICES": gpu} if task.device == "cuda" else {})


def contest(
    ours: Task, opponents: list[str], *, rounds: int, seconds: float, notify: Callable[[Duel], None]
) -> list[Duel]:
    """Ours against each opponent in turn, all with the same weights and tokens.

    A block is whole epochs, so its pairs are the same for everybody. Before the rounds come the steps whose
    losses are compared, and a block to warm up.

    Args:
        ours: the task of our side; an opponent's differs in its name alone.
        opponents: keys of CONTESTANTS.
        rounds, seconds: of each duel; a block lasts at least so many seconds.
        notify: called with each duel when it ends.
    Raises:
        InputError: a contestant stops, or does not do the same work as ours.
    """
    epoch = 1 if ours.contestant == "ours-sampling" else STEPS_PER_EPOCH
    duels = []
    with Contestant(ours) as us:
        our_start = us.block(0, CHECKED_STEPS)
        us.block(seconds, epoch)
        for name in opponents:
            with Contestant(ours._replace(contestant=name)) as them:
                check_same_facts(them.task, us.facts, them.facts)
                start = them.block(0, CHECKED_STEPS)
                disagreement = None
                if name != "all-weights":  # which learns something else than an adapter
                    disagreement = check_same_losses(them.task, our_start["losses"], start["losses"])
                # A peer goes round in one order, so its epochs may begin anywhere.
                them.block(seconds, epoch if name == "all-weights" else 1)
                played = []
                for number in range(rounds):
                    order = (us, them) if number % 2 == 0 else (them, us)
                    blocks = {side: side.block(seconds, epoch) for side in order}
                    played.append((blocks[us], blocks[them]))
                duels.append(Duel(them.task, us.facts, them.facts, disagreement, played))
                notify(duels[-1])
    return duels


def check_same_facts(task: Task, ours: dict, theirs: dict) -> None:
    """Raise InputError where the two do not hold the same tokens or do not use the same number of threads."""
    for fact in ("tokens", "rows", "threads"):
        if ours[fact] != theirs[fact]:
            raise InputError(
                f"{describe(task)} has other {fact} than ours ({theirs[fact]} against {ours[fact]}), so "
                "nothing can be compared; mend it or leave it out with --against."
            )


def check_same_losses(task: Task, ours: list[float], theirs: list[float]) -> float | None:
    """How far the losses of the first steps lie apart, as a share of their way from ln 2.

    From the second step on a loss depends on gradient and optimizer too. None where nothing is trained.
    Raises InputError where they lie further apart than rounding explains.
    """
    if not ours and not theirs:
        return None
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    way = max(abs(loss - math.log(2)) for loss in ours)
    if not all(difference <= LOSS_TOLERANCE[task.dtype] * way for difference in apart):  # NaN neither
        raise InputError(
            f"{describe(task)} has losses {theirs} where ours are {ours}, so the two do not train alike; "
            "mend it or leave it out with --against."
        )
    return max(apart) / way


def describe(task: Task) -> str:
    return f"contestant {task.contestant} ({task.shape}, {task.dtype})"
