"""Several processes train one model: torchrun starts them, and each takes its part of every window.

All build the same windows; each puts every n-th micro-batch through the model, with its share of the *whole*
window [D5.2]. One sum over the n processes, before the norm is taken, is the window's gradient, so that all
take the same step. The first process alone writes and prints.

But: no wrapper of the model, no sharded weights. In a single process nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..validation import InputError

TIMEOUT = timedelta(minutes=30)  # of waiting for another process; the first may be drawing samples
number, count, store = 0, 1, None  # of this process; of all; what all of them can read


class Lost(BaseException):
    """Another process has ended, or is silent. No InputError: SIGTERM may raise it anywhere, so that an
    `except InputError` that adds a place would name an innocent one."""


@contextlib.contextmanager
def joined(command: str) -> Iterator[None]:
    """Join the processes that torchrun has started. Raises InputError for a command that does not train."""
    global number, count, store
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    if command not in ("sft", "dpo"):
        raise InputError(f"only sft and dpo train in several processes; start {command} without torchrun.")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    signal.signal(signal.SIGTERM, _give_up)  # from torchrun, where another process has ended badly
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (sys.stdout, sys.stderr) if leads() else (nowhere, nowhere)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


def begin(device: str, steps: int) -> None:
    """Take this process's GPU, if on GPUs. Raises InputError: fewer GPUs or micro-batches than processes."""
    if count > steps:
        text = f"gives only {steps} of {count} processes work; start {steps}, or raise it."
        raise InputError(f"--gradient-accumulation-steps {steps}: {text}")
    if count > 1 and device != "cpu":
        if device != "cuda" or (own := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            text = f"each process takes a GPU; give cuda, and start at most {torch.cuda.device_count()} here."
            raise InputError(f"--device {device}: {text}")
        torch.cuda.set_device(own)


def report(text: str) -> None:
    """Print the sentence with which a command fails: of several processes, that of the first to fail."""
    if store is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on this process ends by itself
        with contextlib.suppress(RuntimeError):  # the store has ended with its machine
            if store.add("failed", 1) > 1:
                return time.sleep(1)  # torchrun ends all when one ends: not before the first has spoken
    print(text, file=sys.stderr, flush=True)


def leads() -> bool:
    """Whether this process writes and prints: the first, or the only one."""
    return number == 0


def gather(value: Any) -> list[Any]:
    """What each process has, in their order."""
    return [value] if count == 1 else _all(dist.all_gather_object, [value] * count, value)


def _all(collective: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    try:
        collective(result, *arguments)
    except RuntimeError:  # of gloo or NCCL: the connection is closed, or silent
        _give_up()
    return result


def _give_up(*_: Any) -> None:
    raise Lost(f"another process failed, or was silent for {TIMEOUT}; see its report, then --resume.")


def from_first(work: Callable[[], Any]) -> Any:
    """What `work` returns in the first process; the others wait for it."""
    return gather(work() if leads() else None)[0]


def in_shares(work: Callable[[Any], Any], items: Sequence[Any], progress: Callable = iter) -> list[Any]:
    """`list(map(work, items))` in every process, of which each does every n-th; results are on the CPU."""
    parts = gather([work(item) for item in progress(items[number::count])])
    return [parts[index % count][index // count] for index in range(len(items))]


def add_up(means: dict[str, Tensor], parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sums over all processes: of means, returned, and of gradients, in place; what one lacks counts as 0."""
    if count == 1:
        return means
    names = dict.fromkeys(name for part in gather(list(means)) for name in part)
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    nothing = learnt[0].new_full((), -0.0)  # x + -0.0 is x to the last bit; -0.0 + 0.0 is 0.0
    parts = [nothing.expand_as(p) if p.grad is None else p.grad for p in learnt]
    parts += [means.get(name, nothing) for name in names]
    sums = _all(dist.all_reduce, torch.cat([part.reshape(-1) for part in parts]))
    pieces = [piece.view_as(part) for piece, part in zip(sums.split([p.numel() for p in parts]), parts)]
    for parameter, piece in zip(learnt, pieces):
        parameter.grad = piece
    return dict(zip(names, pieces[len(learnt) :]))
