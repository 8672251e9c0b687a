"""What every study goes through, plan -> runs -> rows -> table -> figure, and the tools of each stage.

            frontier                  frontier --pairs        sentiment
    plan    command.plan: jobs        pairs.plan              methods.all_runs, jobs_of
    runs    methods.Run               pairs.Point             methods.measure, results.Group
    rows    command._rows             the points themselves   results.results_of
    table   command.results_table     pairs.summary           command.results_table, ...
    figure  figure.frontier_figure    figure.pairs_figure     figure.frontier_figure, win_rate_figure

A job is a function without arguments; what it returns is a run, or several.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..text.allocator import keep_freed_memory
from ..text.runs import new_run_folder, versions, write_arrays, write_json, write_text
from ..validation import InputError

Job = Callable[[], Any]
Arrays = dict[str, Any]  # by name: arrays, or what `kept` makes arrays of
Files = dict[str, Callable[[Path], None]]  # by name


class Study(NamedTuple):
    """The stages of one study, as `carry_out` goes through them; a part is a world, for example."""

    plan: dict[str, list[Job]]  # the jobs of each part
    table: Callable[[Any], list[str]]  # the runs of a part -> the lines to print when they are there
    files: Callable[[list[Any]], Files]  # the runs of all parts -> what writes each file
    # What the jobs of a part returned, in their order -> its runs; here of jobs that return one or a list.
    runs: Callable[[list[Any]], Any] = lambda found: [
        run for each in found for run in (each if isinstance(each, list) else [each])
    ]


def carry_out(study: Study, folder: Path, *, workers: int = 1) -> None:
    """Run a study, print its tables, and write its files into the folder."""
    found = []
    for part, jobs in study.plan.items():
        found.append(study.runs(run_jobs(jobs, part, workers)))
        print("", *study.table(found[-1]), sep="\n", flush=True)
    files = study.files(found)
    for name, write in files.items():
        write(folder / name)
    print(f"\nWrote {folder}/{', '.join(files)} and config.json.", flush=True)


def run_jobs(jobs: Sequence[Job], name: str, workers: int) -> list[Any]:
    """What the jobs return, in their order; it does not depend on the number of processes.

    Raises InputError where a process died.
    """
    bar = partial(tqdm, total=len(jobs), desc=name, unit="run", leave=False, disable=None)
    if workers == 1:
        return [job() for job in bar(jobs)]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        return list(bar(pool.map(_call, jobs)))
    except BrokenProcessPool:
        raise InputError(
            "a process that trained a method ended, maybe because memory was short; continue with "
            "--resume and --workers 1."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread, so that sums do not depend on the machine; Ctrl-C ends it at once."""
    torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))


def _call(job: Job) -> Any:
    """The job's result; Ctrl-C unwinds it, so that what it was writing is removed, and ends the process."""
    try:
        return job()
    except SystemExit:
        os._exit(130)  # else the pool would give it the next job


def kept(path: Path, job: Callable[..., Arrays], *arguments: Any) -> dict[str, np.ndarray]:
    """What a job returns, as arrays in an .npz file; where that is there the job is not run again."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_arrays(path, job(*arguments))
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def table(
    columns: Sequence[tuple[str, str, str]], rows: Iterable[Sequence[Any]], indent: str = ""
) -> list[str]:
    """The lines of a printed table, the header first.

    Args:
        columns: title, alignment and width of the text, format of a number: ("KL", ">6", ".3f").
        rows: a cell for each column; a text, such as "-" for no number, is printed as it is.

    Example:
        >>> table([("method", "<8", ""), ("KL", ">6", ".2f")], [("DPO", 1.5), ("PPO", "-")])
        ['method       KL', 'DPO        1.50', 'PPO           -']
    """

    def cell(value: Any, width: str, form: str) -> str:
        text = value if isinstance(value, str) else f"{value:{form}}"
        return f"{text:{width}}"

    titles, widths, forms = zip(*columns)
    return [indent + " ".join(map(cell, row, widths, forms)) for row in (titles, *rows)]


def run_folder(command: str, options: dict[str, Any]) -> Path:
    """Make the folder of --output-dir, with the command, its options and the versions in config.json."""
    folder = new_run_folder(options["output_dir"], command)
    write_json(folder / "config.json", {"command": command, **options, **versions()})
    return folder


def write_csv(path: Path, rows: Sequence[dict[str, Any]], *, line_end: str = "\n") -> None:
    """Write rows under the names of all their columns; what a row does not have is left empty."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
