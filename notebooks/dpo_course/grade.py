"""Grade a folder of submitted notebooks: `python -m dpo_course.grade SUBMISSIONS`.

SUBMISSIONS holds a folder for each student (`alice/03_dpo.ipynb`), or a notebook for each. Every notebook is
examined in a process of its own. A cell or check that takes too long, or that ends the process, costs its
own exercise and no other: the examination is begun again without it.
"""

from __future__ import annotations

import argparse
import collections
import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dpo_minimal.text.runs import write_atomically

from .exercises import all_exercises

ROOT = Path(__file__).parent.parent  # what the process that examines imports this package from


class Result(NamedTuple):
    """What came of one notebook.

    Fields: student; notebook, its file name; status, of each exercise by number; mistakes, the named ones;
    remarks, what the teacher should know.
    """

    student: str
    notebook: str
    status: dict[str, str]
    mistakes: dict[str, str]
    remarks: list[str]


def submissions(folder: Path) -> list[tuple[str, Path]]:
    """(student, notebook) for every notebook below the folder, in order.

    A student is the folder just below `folder`, or the notebook's own name if it lies in `folder` itself.
    """
    notebooks = sorted(
        path for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts and path.is_file()
    )
    parts = [path.relative_to(folder).parts for path in notebooks]
    return [(path.stem if len(p) == 1 else p[0], path) for path, p in zip(notebooks, parts)]


def grade(student: str, path: Path, *, seconds: float) -> Result:
    """Examine one notebook, as often as it takes to get past what hangs or dies.

    Args:
        seconds: time for each cell and for each check.
    """
    result = Result(student, path.name, {}, {}, [])
    skipped: set[str] = set()
    while True:
        records, reason = _examine(path, skipped, seconds)
        for record in records:
            if "status" in record:
                result.status[record["item"]] = record["status"]
                skipped.add(record["item"])
                if record["mistake"]:
                    result.mistakes[record["item"]] = record["mistake"]
                if record["remark"]:
                    _remark(result, f"{record['item']} {record['remark']}")
            elif "error" in record and "NotImplementedError" not in record["error"]:
                _remark(result, f"{record['item']} raised {record['error']}")
            elif "failed" in record:
                _remark(result, record["failed"])
        item = next((record["begin"] for record in reversed(records) if "begin" in record), "starting")
        if item == "end" or any("failed" in record for record in records):
            return result
        _remark(result, f"{item} {reason}")
        if item in skipped or item in ("starting", "reading"):
            return result  # nothing that could be left out
        skipped.add(item)
        if not item.startswith("cell"):
            result.status[item] = "wrong"


def _remark(result: Result, remark: str) -> None:
    if remark not in result.remarks:  # a cell that raises does so at every attempt
        result.remarks.append(remark)


def _examine(path: Path, skipped: set[str], seconds: float) -> tuple[list[dict], str]:
    """One attempt: the report's records, and why the process ended if it did not reach the end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        workplace = Path(folder) / "work"  # where a submission's own files go
        workplace.mkdir()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_course.examine", str(path.resolve()), str(report), *sorted(skipped)],
            cwd=workplace, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        reason = "ended the process"
        seen, since = 0, time.monotonic()
        while process.poll() is None:
            size = report.stat().st_size
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > seconds:
                reason = f"took longer than {seconds:g} s"
                break
            time.sleep(0.02)
        _end(process)
        *whole, _ = report.read_text(encoding="utf-8").split("\n")  # what the end has cut off does not count
        return [json.loads(line) for line in whole], reason


def _end(process: subprocess.Popen) -> None:
    """Stop the process and whatever it started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass
    process.wait()


# --------------------------------------------------------------------------------------------- the table


def gradebook(results: list[Result]) -> list[dict[str, object]]:
    """One row a student: points for each exercise, their sum, remarks. What was not handed in stays empty."""
    exercises = all_exercises()
    rows: dict[str, dict[str, object]] = {}
    for result in results:
        row = rows.setdefault(
            result.student, {"student": result.student, **dict.fromkeys(exercises, ""), "remarks": ""}
        )
        for number, status in result.status.items():
            points = exercises[number].points if status == "right" else 0
            row[number] = max(points, row[number] or 0)  # handed in twice: the better one
        told = [*(f"{n}: {mistake}" for n, mistake in result.mistakes.items()), *result.remarks]
        if told:
            row["remarks"] = "; ".join(
                filter(None, [row["remarks"], f"{result.notebook}: {'; '.join(told)}"])
            )
    for row in rows.values():
        row["points"] = sum(row[number] or 0 for number in exercises)
    return list(rows.values())


def write_csv(rows: list[dict[str, object]], path: Path) -> None:
    """The gradebook as CSV, whole or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, ["student", "points", *all_exercises(), "remarks"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text = table.getvalue().encode("utf-8", "backslashreplace")  # a file's name may be no text
    write_atomically(path, lambda temporary: temporary.write_bytes(text))


def summary(results: list[Result]) -> str:
    """How many solved each exercise, and the commonest known mistakes, for people."""
    lines = []
    for number, exercise in all_exercises().items():
        status = [result.status[number] for result in results if number in result.status]
        if not status:
            continue
        lines.append(f"{number} {exercise.function:<24} solved by {status.count('right')} of {len(status)}")
        named = collections.Counter(r.mistakes[number] for r in results if number in r.mistakes)
        lines += [f"      {count} x {mistake}" for mistake, count in named.most_common(3)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_course.grade",
        description="Grade a folder of submitted notebooks: one CSV with the points of every exercise.",
    )
    parser.add_argument("submissions", type=Path, help="a folder of students' folders, or of notebooks")
    parser.add_argument("--output", type=Path, default=Path("grades.csv"), help="the CSV (grades.csv)")
    parser.add_argument("--force", action="store_true", help="replace the CSV if it exists")
    parser.add_argument("--seconds", type=float, default=30, help="time for each cell and each check (30)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at once (one a core)")
    options = parser.parse_args(arguments)
    if not options.submissions.is_dir():
        parser.error(f"{options.submissions} is no folder.")
    if options.seconds <= 0 or options.jobs < 1:
        parser.error("--seconds must be positive and --jobs at least 1.")
    if options.output.exists() and not options.force:
        parser.error(f"{options.output} exists; --force replaces it, --output gives another name.")
    found = submissions(options.submissions)
    if not found:
        parser.error(f"{options.submissions} holds no notebooks (*.ipynb).")
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(grade, student, path, seconds=options.seconds) for student, path in found]
        results = [future.result() for future in tqdm(futures, unit="notebook")]
    write_csv(gradebook(results), options.output)
    print(summary(results))
    print(f"{options.output}: {len({r.student for r in results})} students, {len(results)} notebooks.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
