"""A training run: evaluation, log, progress, checkpoints, and resuming after an interruption.

`train` yields a record a step; here each is shown and logged, and every so many steps the state is saved.
Everything that a run does is a function of its settings and its data, so that a run which was interrupted,
even killed, goes on from its last checkpoint to the same weights, bit for bit on a CPU with the same number
of threads. README.md, "Runs", lists the files.

But: what is trained on what (experiments/text/sft.py, dpo.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

from ..model import GPT
from ..train import Objective, Record, Window, average, make_optimizer, train, warm_up
from ..validation import InputError
from . import processes
from .adapters import learnt
from .batches import Example, in_passes, windows
from .files import read_bytes
from .objectives import make_window
from .runs import record_line, refuse_link, write_records
from .training_state import load_training_state, save_training_state

METRICS_FILE, CHECKPOINTS, LOCK_FILE = "metrics.jsonl", "checkpoints", ".lock"
RECENT = 10  # steps over which displacement is judged
KEEP = 2  # checkpoints: the newest, and the one before it, to go back to by deleting the newest


class Settings(NamedTuple):
    """How to train; the names are those of the flags, and steps are optimizer steps."""

    learning_rate: float
    optimizer: str
    per_device_train_batch_size: int  # rows that go through the model together
    gradient_accumulation_steps: int  # such micro-batches a step
    num_train_epochs: int
    max_steps: int | None
    warmup_steps: int
    max_grad_norm: float | None
    logging_steps: int
    eval_steps: int  # 0 evaluates before and after only
    save_steps: int  # 0 saves at the end only
    seed: int
    dtype: str
    device: str

    @property
    def window_size(self) -> int:
        """Rows of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class Data(NamedTuple):
    """Rows to train on and to evaluate on; reference log-probabilities (N, K) of each, or None for SFT."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    train_reference: Tensor | None = None
    held_out_reference: Tensor | None = None
    policy: GPT | None = None  # for a loss with a KL estimate, as `make_window` takes it


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the run was saved; the message says where."""


def planned_steps(settings: Settings, data: Data) -> int:
    """How many optimizer steps the run takes."""
    steps = len(_epoch(settings, data, 0)) * settings.num_train_epochs
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def _epoch(settings: Settings, data: Data, epoch: int) -> list[list[list[int]]]:
    micro, seed = settings.per_device_train_batch_size, settings.seed
    return windows(data.train, window_size=settings.window_size, micro_size=micro, seed=seed, epoch=epoch)


def _windows_from(settings: Settings, data: Data, first_step: int, last_step: int) -> Iterator[Window]:
    """The windows of steps first_step to last_step: the same whether or not the run began earlier."""
    mine = slice(processes.number, None, processes.count)
    all_steps = (rows for epoch in itertools.count() for rows in _epoch(settings, data, epoch))
    for rows in itertools.islice(all_steps, first_step - 1, last_step):
        where = {"dtype": settings.dtype, "device": settings.device, "policy": data.policy}
        yield make_window(data.train, rows, data.train_reference, **where)._replace(mine=mine)


def evaluate(objective: Objective, settings: Settings, data: Data) -> Record:
    """Loss and metrics on the held-out rows, named eval_...; nothing where none are held out.

    Processes share the passes, whose results are added up in one order however many they are.
    """
    if not data.held_out:
        return {}
    rows = in_passes(data.held_out, settings.per_device_train_batch_size)
    where = {"dtype": settings.dtype, "device": settings.device, "policy": data.policy}
    window = make_window(data.held_out, rows, data.held_out_reference, **where)

    def results_of(micro: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            loss, metrics = objective(micro)
        return loss.cpu(), {name: value.cpu() for name, value in metrics.items()}

    window = window._replace(micro_batches=processes.in_shares(results_of, window.micro_batches))
    return {f"eval_{name}": value for name, value in average(lambda results: results, window).items()}


def run_training(
    folder: Path,
    model: GPT,
    objective: Objective,
    data: Data,
    settings: Settings,
    *,
    name: str,
    check_first: Callable[[Window], None] | None = None,
    look: Callable[[], Record] = dict,
    resume: bool = False,
) -> list[Record]:
    """Train a model, writing metrics and checkpoints into a run folder.

    Args:
        folder: exists; without resume, it has no checkpoints yet.
        model: altered in place.
        objective: as `train` takes it, on this model.
        name: for the progress bar.
        check_first: called with the first window, before the first step.
        look: further measurements at each evaluation, by their names.
        resume: go on from the newest checkpoint, from the beginning where there is none.
    Returns: all records of metrics.jsonl.
    Raises:
        InputError: no steps to take, loss or gradient not finite, a damaged checkpoint, a full disk.
        Interrupted: Ctrl-C; the state after the last whole step is saved.
    """
    last_step = planned_steps(settings, data)
    optimizer = make_optimizer(learnt(model), settings.optimizer, settings.learning_rate)
    done, records = _go_on(folder, model, optimizer) if resume else (0, [])
    log = _Log(folder / METRICS_FILE, records)
    _note_a_long_warm_up(settings, last_step)
    if done == 0:
        if check_first is not None:
            check_first(next(_windows_from(settings, data, 1, 1)))
        log.add({"step": 0, **evaluate(objective, settings, data), **look()})
    stream = train(
        objective, optimizer, _windows_from(settings, data, done + 1, last_step),
        scheduler=warm_up(optimizer, settings.learning_rate, settings.warmup_steps, first_step=done + 1),
        max_grad_norm=settings.max_grad_norm, first_step=done + 1, add_up=processes.add_up,
    )  # fmt: skip
    progress = _Progress(name, done, last_step, rows=min(settings.window_size, len(data.train)))
    with _Interrupt() as interrupt, progress.bar:
        for record in stream:
            step = int(record["step"])
            progress.show(record)
            if step % settings.logging_steps == 0 or step in (1, last_step):
                log.add(record)
            if _due(step, settings.eval_steps, last_step):
                log.add({"step": step, **evaluate(objective, settings, data), **look()})
            stop = interrupt.asked  # read once: the signal may come between saving and stopping
            if _due(step, settings.save_steps, last_step) or stop:
                _save(folder, model, optimizer, step)
            if stop:
                raise Interrupted(f"saved after step {step} of {last_step}")
            progress.resume()
    return log.records


def _note_a_long_warm_up(settings: Settings, last_step: int) -> None:
    if settings.warmup_steps > last_step:
        print(
            f"note: all {last_step} steps are warm-up, up to {last_step / settings.warmup_steps:.0%} of "
            f"--learning-rate {settings.learning_rate:g}; lower --warmup-steps for more."
        )


def _due(step: int, every: int, last_step: int) -> bool:
    return step == last_step or (every > 0 and step % every == 0)


# ----------------------------------------------------------------------------------------------- resuming


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder until the block ends, or the process, however it ends.

    Raises InputError where another one is in it (a file system without locks cannot tell), or where a part of
    it is a link to a folder, into which the run might write; one to a checkpoint is only read or removed.
    """
    refuse_link(folder)
    for path in filter(Path.is_symlink, folder.rglob("*")):
        if path.name == LOCK_FILE or (path.is_dir() and not path.name.startswith("step-")):
            raise InputError(f"{path}: is a link, but a run writes into its own folder; remove the link.")
    handle = os.open(folder / LOCK_FILE, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with open(handle, "r+") as file:  # and it stays: another process may have opened it by then
        try:
            if os.name == "nt":
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter is Windows'
            raise InputError(
                f"{folder}: another process is training in it; wait for its end, or name another folder."
            ) from None
        except OSError:  # no locks there
            pass
        yield


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first; a file, or a folder of another name, such as a copy that a user keeps, is left alone."""
    found = [path for path in (folder / CHECKPOINTS).glob("step-*") if path.name[5:].isdecimal()]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name[5:]))


def _save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, step: int) -> None:
    target = folder / CHECKPOINTS / f"step-{step:06d}"
    if target.exists() or not processes.leads():  # after an interruption, or the first's to save
        return
    target.parent.mkdir(exist_ok=True)
    save_training_state(target, model, optimizer, {"step": step})
    if target.parent.is_symlink():  # what lies there may be another run's
        return
    for old in _checkpoints(folder)[:-KEEP]:
        if old.is_symlink():  # to where a user has moved it
            old.unlink()
        else:
            shutil.rmtree(old)


def _go_on(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[int, list[Record]]:
    """Restore the newest checkpoint; (steps done, records up to there)."""
    found = _checkpoints(folder)
    if not found:
        return 0, []
    done = int(found[-1].name[5:])
    if load_training_state(found[-1], model, optimizer).get("step") != done:
        raise InputError(f"{found[-1]}: its state is not of step {done}, as its name says; delete it.")
    path, records = folder / METRICS_FILE, []
    lines = read_bytes(path).split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not all(isinstance(value, int | float | None) for value in record.values()):
                raise TypeError
            if record["step"] <= done:
                records.append(record)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            if number < len(lines):  # the last is that at which the run was killed
                raise InputError(f"{path}, line {number}: is no record of a run; delete it.") from None
    return done, records


class _Log:
    """metrics.jsonl: rewritten at the start, then a line a record."""

    def __init__(self, path: Path, records: list[Record]):
        self.path, self.records = path, list(records)
        write_records(path, records)

    def add(self, record: Record) -> None:
        if len(record) == 1:  # no held-out rows to evaluate
            return
        self.records.append(record)
        if not processes.leads():
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(record_line(record))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); free some space.") from None


class _Interrupt:
    """Ctrl-C sets a flag that is read between steps; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            ask = self._ask if processes.leads() else signal.SIG_IGN  # the first decides for all
            self.before = signal.signal(signal.SIGINT, ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not print, which the signal may have interrupted.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    def __exit__(self, *_: Any) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)


def is_displaced(recent: Sequence[Record]) -> bool:
    """Whether chosen completions lost probability, by number and on average, over the last `RECENT` steps.

    Single windows do so by chance.
    """
    if len(recent) < RECENT or not all("dpo/chosen_logratio" in record for record in recent):
        return False
    names = "dpo/displacement", "dpo/chosen_logratio"
    share, logratio = (sum(record[name] for record in recent) / RECENT for name in names)
    return share > 0.5 and logratio < 0


class _Progress:
    """A bar on a terminal, elsewhere `LINES` lines; one warning when likelihoods are displaced."""

    LINES = 10

    def __init__(self, name: str, done: int, last_step: int, rows: int):
        self.name, self.last_step, self.rows, self.warned = name, last_step, rows, False
        self.done, self.seconds, self.resumed = 0, 0.0, time.perf_counter()
        self.recent: deque[Record] = deque(maxlen=RECENT)
        silent = not sys.stderr.isatty()
        self.bar = tqdm(total=last_step, initial=done, desc=name, unit="step", disable=silent)

    def resume(self) -> None:
        """Start the clock again: evaluating and saving between two steps is not counted."""
        self.resumed = time.perf_counter()

    def show(self, record: Record) -> None:
        step = int(record["step"])
        self.done += 1
        self.seconds += time.perf_counter() - self.resumed
        rate = self.done * self.rows / self.seconds
        shown = {"loss": f"{record['loss']:.3f}"}
        if "rewards/margins" in record:
            shown["accuracy"] = f"{record['rewards/accuracies']:.2f}"
            shown["margin"] = f"{record['rewards/margins']:.2f}"
        shown["rows/s"] = f"{rate:.0f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        before, after = ((s * self.LINES) // self.last_step for s in (step - 1, step))
        if self.bar.disable and after > before:
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.name}: step {step} of {self.last_step}, {text}", flush=True)
        self.recent.append(record)
        if not self.warned and is_displaced(self.recent):
            self.warned = True
            tqdm.write(
                f"Displacement: in the last {RECENT} steps to {step}, most chosen completions were less "
                "likely than under the reference. The loss sees only the margin; if samples get worse, lower "
                "the learning rate or raise beta (notebooks/what-goes-wrong.md, D13.1)."
            )
