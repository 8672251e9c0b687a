"""Starts the contestants' processes and lets two of them take turns, so that noise hits both alike.

Two processes are alive at a time: ours, and one opponent after the other. While one works the other sleeps.
What is compared is a round: a block of ours and a block of the opponent's, one straight after the other,
their order changing from round to round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from dpo_minimal.validation import InputError

from .tasks import Task

ROOT = Path(__file__).resolve().parents[2]


class Duel(NamedTuple):
    """What one opponent and ours did in their rounds.

    Fields:
        task: the opponent's.
        ours_facts, facts: what each said at its start (turns.py).
        rounds: (block of ours, block of the opponent's) as reported by turns.py.
    """

    task: Task
    ours_facts: dict
    facts: dict
    rounds: list[tuple[dict, dict]]


class Contestant:
    """A contestant's process, from its start to its end; `facts` is what it said when it was ready."""

    def __init__(self, task: Task):
        self.task = task
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = start(task, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
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

    def block(self, seconds: float, steps: int = 1) -> dict:
        """Let it work for so many seconds and steps at least."""
        try:
            print(json.dumps({"seconds": seconds, "steps": steps}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has died: the missing report tells
        return self._report()

    def _report(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines() or ["nothing"]
            raise InputError(
                f"contestant {self.task.contestant} ({self.task.shape}, {self.task.dtype}) stopped; the last "
                f"it said was {said[-1]!r}, so mend that or leave it out with --against."
            )
        return json.loads(line)


def start(task: Task, **pipes: int | IO) -> subprocess.Popen:
    """Start contestant.py, offline, with a cache of its own beside the weights."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(Path(task.folder) / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(task.threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if task.device == "cuda":
        settings["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.contestant", json.dumps(task._asdict())],
        cwd=ROOT,
        env=os.environ | settings,
        text=True,
        **pipes,
    )


def write_weights(task: Task) -> None:
    """Make the folder of weights that a contest's tasks name."""
    made = start(task._replace(contestant="weights"), stdin=subprocess.DEVNULL)
    if made.wait() != 0:
        raise InputError(
            f"the weights of shape {task.shape} could not be written to {task.folder}; see above."
        )


def contest(
    ours: Task,
    opponents: list[str],
    *,
    rounds: int,
    seconds: float,
    notify: Callable[[Duel], None] = lambda duel: None,
) -> list[Duel]:
    """Ours against each opponent in turn, all with the same weights and tokens.

    Args:
        ours: the task of our side; an opponent's differs in its name alone.
        opponents: names of contestant.py.
        rounds, seconds: of each duel; a block lasts at least so many seconds, and one such block of each
            goes before them to warm up.
        notify: called with each duel when it ends.
    """
    duels = []
    with Contestant(ours) as us:
        us.block(seconds, steps=2)
        for name in opponents:
            with Contestant(ours._replace(contestant=name)) as them:
                check_same_work(us, them)
                them.block(seconds, steps=2)
                played = []
                for number in range(rounds):
                    pair = (us, them) if number % 2 == 0 else (them, us)
                    blocks = {side: side.block(seconds) for side in pair}
                    played.append((blocks[us], blocks[them]))
                duels.append(Duel(them.task, us.facts, them.facts, played))
                notify(duels[-1])
    return duels


def check_same_work(us: Contestant, them: Contestant) -> None:
    """Raise InputError where the two do not hold the same tokens or do not use the same number of threads."""
    for fact in ("tokens", "rows", "threads"):
        if us.facts[fact] != them.facts[fact]:
            raise InputError(
                f"contestant {them.task.contestant} holds other {fact} than ours ({them.facts[fact]} against "
                f"{us.facts[fact]}), so nothing can be compared; mend it or leave it out with --against."
            )
