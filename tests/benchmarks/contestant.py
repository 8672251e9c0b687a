"""The process of one contestant: python -m tests.benchmarks.contestant TASK, with the task as JSON.

Commands come on standard input, reports leave on standard output, one JSON line each; whatever a library
prints goes to standard error. {"seconds": s, "steps": n} asks for a block of steps: so many or a multiple of
it, until so much time has passed. End of file ends the contest. Each branch of `main` imports only what its
contestant needs.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from .tasks import CHECKED_STEPS, Task, digest

TRL_VARIANTS = {  # name: (references precomputed, gradient checkpointing)
    "trl": (False, True),  # both as its defaults have them
    "trl-precomputed": (True, True),
    "trl-no-checkpointing": (False, False),
    "trl-precomputed-no-checkpointing": (True, False),
}


class Turns:
    """Counts what a training loop does and stops it between two blocks.

    The loop calls `ready` once and then `step_done` after each step; both wait for a turn without using the
    CPU and return False when the contest is over. The clock runs from a turn's beginning to the end of its
    last step, so laying out batches and logging count.
    """

    def __init__(self, commands: TextIO, reports: TextIO, device: str):
        self._commands, self._reports, self._device = commands, reports, device
        self._imports_mib = memory_mib("VmRSS")
        self._losses: list[float | Tensor] = []  # of the steps at the start that are compared

    def ready(self, rows: list, *, reference_seconds: float = 0.0) -> bool:
        """Say which tokens are held and what one pass of the reference over them took, if it is cached."""
        facts = {
            "tokens": digest(rows),
            "rows": len(rows),
            "reference_seconds": reference_seconds,
            "imports_mib": self._imports_mib,
            "threads": torch.get_num_threads(),
        }
        return self._next(facts)

    def step_done(self, items: int, loss: float | Tensor | None = None) -> bool:
        """Count a step of so many pairs or tokens, and keep its loss if it is one of the first."""
        self._items += items
        self._steps += 1
        if loss is not None and len(self._losses) < CHECKED_STEPS:
            self._losses.append(loss)
        if self._steps % self._wanted["steps"]:
            return True
        if self._device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        if seconds < self._wanted["seconds"]:
            return True
        report = {
            "items": self._items,
            "steps": self._steps,
            "seconds": seconds,
            "losses": [float(loss) for loss in self._losses],
            "peak_mib": memory_mib("VmHWM"),
        }
        if self._device == "cuda":
            report["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return self._next(report)

    def _next(self, report: dict) -> bool:
        print(json.dumps(report), file=self._reports, flush=True)
        line = self._commands.readline()  # sleeps here while it is another's turn
        if not line:
            return False
        self._wanted = json.loads(line)
        self._items = self._steps = 0
        self._start = time.perf_counter()
        return True


def memory_mib(field: str) -> float:
    """Resident memory of this process: VmRSS now, VmHWM at most so far (outside Linux at most, for both)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before it started this process
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    variant = {}
    match task.contestant:
        case "ours":
            from dpo_minimal.allocator import keep_freed_memory

            from .ours import train_ours as work

            keep_freed_memory()  # as the package's own commands do
        case "ours-sampling":
            from .ours import sample_ours as work
        case "plain":
            from .hugging_face import train_plainly as work
        case "hugging-face-sampling":
            from .hugging_face import sample_hugging_face as work
        case name:
            from .trl_dpo import train_trl as work

            variant = dict(zip(("precomputed", "checkpointing"), TRL_VARIANTS[name]))
    work(task, Turns(sys.stdin, reports, task.device), **variant)


if __name__ == "__main__":
    main()
