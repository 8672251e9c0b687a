"""The process of one contestant: python -m tests.benchmarks.contestant TASK, with the task as JSON.

Commands come on standard input, reports leave on standard output, one JSON line each; whatever a library
prints goes to standard error. {"seconds": s, "steps": n} asks for a block of steps: n or a multiple of it,
until so much time has passed. End of file ends the contest.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from .tasks import CHECKED_STEPS, CONTESTANTS, Task, digest


class Turns:
    """Counts what a training loop does and stops it between two blocks.

    The loop calls `ready` once and then `step_done` after each step; both wait for a turn without using the
    CPU and return False when the contest is over. The clock runs from a turn's beginning to the end of its
    last step, so laying out batches and logging count.
    """

    def __init__(self, commands: TextIO, reports: TextIO, device: str):
        self._commands, self._reports, self._device = commands, reports, device
        self._imports_mib = memory_mib("VmRSS")
        self._losses: list[float | Tensor] = []  # of the steps at the start, which are compared

    def ready(self, rows: list, *, reference_seconds: float = 0.0) -> bool:
        """Say which tokens are held and what one pass of the reference over them took, if it is cached."""
        facts = {"tokens": digest(rows), "rows": len(rows), "threads": torch.get_num_threads()}
        return self._next(facts | {"reference_seconds": reference_seconds, "imports_mib": self._imports_mib})

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
        report = {"items": self._items, "seconds": seconds, "peak_mib": memory_mib("VmHWM")}
        if self._device == "cuda":
            report["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return self._next(report | {"losses": [float(loss) for loss in self._losses]})

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
    """Resident memory of this process, from Linux: VmRSS now, VmHWM the most it ever was."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    _, place, options = CONTESTANTS[task.contestant]
    module, function = place.split(".")
    work = getattr(importlib.import_module(f".{module}", __package__), function)
    work(task, Turns(sys.stdin, reports, task.device), **options)


if __name__ == "__main__":
    main()
