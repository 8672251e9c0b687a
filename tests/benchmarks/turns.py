"""A contestant's end of the pipe: wait for a turn without using the CPU, work for some seconds, report.

A command is one JSON line: {"seconds": s, "steps": n} asks for a block of steps that lasts at least so long
and counts at least so many; end of file ends the contest. A report is one JSON line too.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from .tasks import digest


class Turns:
    """Counts what a training loop does and stops it between two blocks.

    The loop calls `ready` once and then `step_done` after each step; both wait for a turn and return False
    when the contest is over. The clock runs from a turn's beginning to the end of its last step, so
    loading data and logging count.
    """

    def __init__(self, commands: TextIO, reports: TextIO, device: str):
        self.losses: list[float] = []  # what the loop logged since the last report
        self._commands, self._reports, self._device = commands, reports, device
        self._imports_mib = memory_mib("VmRSS")

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

    def step_done(self, items: int, *, may_pause: bool = True) -> bool:
        """Count a step of so many pairs or tokens; where a loop is not in a fair state to stop (ours sorts
        an epoch by length), it says so with may_pause."""
        self._items += items
        self._steps += 1
        if not may_pause or self._steps < self._wanted["steps"]:
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
            "losses": self.losses,
            "peak_mib": memory_mib("VmHWM"),
        }
        if self._device == "cuda":
            report["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.losses = []
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
    """Resident memory of this process: VmRSS now, VmHWM at most so far (on other systems at most, for both)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before it started this process
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
