"""Grade a class: `python -m dpo_course.grade SUBMISSIONS` writes one CSV with the points of every exercise.

SUBMISSIONS holds a folder for each student (`alice/03_dpo.ipynb`), or a file for each; or it is a learning
platform's zip: see submissions.py. Students hand in notebooks, scripts, or zips of them. Every notebook is
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
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tqdm import tqdm

from dpo_minimal.text.runs import write_atomically

from .exercises import CHAPTERS, all_exercises
from .gradescope import results_json
from .submissions import Submission, submission, submissions, unpack

ROOT = Path(__file__).parent.parent  # what the process that examines imports this package from


class Result(NamedTuple):
    """What came of one notebook or script.

    Fields: student; notebook, its file name; status, of each exercise by number; mistakes, the named ones;
    remarks, what the teacher should know; messages, what the check says; copied, the exercises answered by
    the published solution, to the letter.
    """

    student: str
    notebook: str
    status: dict[str, str]
    mistakes: dict[str, str]
    remarks: list[str]
    messages: Mapping[str, str] = MappingProxyType({})
    copied: frozenset[str] = frozenset()


def grade(student: str, path: Path, *, seconds: float) -> Result:
    """Examine one notebook, as often as it takes to get past what hangs or dies.

    Args:
        seconds: time for each cell and for each check.
    """
    skipped: dict[str, str] = {}  # item -> what happened there
    while True:
        records, reason = _examine(path, set(skipped), seconds)
        item = next((record["begin"] for record in reversed(records) if "begin" in record), "starting")
        if item == "end" or any("failed" in record for record in records):
            return _result(student, path, records, skipped)
        stuck = item in skipped or item in ("starting", "reading")  # nothing that could be left out
        skipped[item] = reason
        if stuck:
            return _result(student, path, records, skipped)


def _result(student: str, path: Path, records: list[dict], skipped: dict[str, str]) -> Result:
    """What the records of the last attempt say, and what was left out of it."""
    died = {item: "wrong" for item in skipped if item in all_exercises()}
    messages = {item: f"{item}: it {skipped[item]}." for item in died}
    result = Result(student, path.name, died, {}, [], messages, frozenset(_copied(records)))
    for item, reason in skipped.items():
        _remark(result, f"{item} {reason}")
    for record in records:
        if "status" in record:
            result.status[record["item"]] = record["status"]
            messages[record["item"]] = record["message"]
            if record["mistake"]:
                result.mistakes[record["item"]] = record["mistake"]
        if record.get("remark"):
            _remark(result, f"{record['item']} {record['remark']}")
        elif "error" in record and "NotImplementedError" not in record["error"]:
            _remark(result, f"{record['item']} raised {record['error']}")
        elif "failed" in record:
            _remark(result, record["failed"])
    if result.copied:
        _remark(result, f"{', '.join(sorted(result.copied))} to the letter as in the published solution")
    return result


def _copied(records: list[dict]) -> list[str]:
    return [record["item"] for record in records if record.get("copied")]


def grade_all(handed_in: list[Submission], *, seconds: float, jobs: int) -> list[Result]:
    """One result for each file, and one for each student without any."""
    files = [(each.student, path) for each in handed_in for path in each.files]
    told = [Result(each.student, "", {}, {}, each.remarks) for each in handed_in if each.remarks]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(grade, student, path, seconds=seconds) for student, path in files]
        results = told + [future.result() for future in tqdm(futures, unit="file", leave=None)]
    order = [each.student for each in handed_in]
    return sorted(results, key=lambda result: order.index(result.student))


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


def gradebook(results: list[Result], chapters: list[str] | None = None) -> list[dict[str, object]]:
    """One row a student: points for each exercise, their sum, remarks. What was not handed in stays empty.

    Of two answers to an exercise a student's own counts before a copy of the published one, and then the
    better one.

    Args:
        chapters: the notebooks that were set; what is not handed in of these counts 0.
    """
    exercises = all_exercises()
    rows: dict[str, dict[str, object]] = {}
    best: dict[tuple[str, str], tuple[bool, int]] = {}
    for result in results:
        row = rows.setdefault(
            result.student, {"student": result.student, **dict.fromkeys(exercises, ""), "remarks": ""}
        )
        for number, status in result.status.items():
            answer = number not in result.copied, exercises[number].points if status == "right" else 0
            best[result.student, number] = max(answer, best.get((result.student, number), answer))
        told = [*(f"{n}: {mistake}" for n, mistake in result.mistakes.items()), *result.remarks]
        if told:
            told = f"{result.notebook}: {'; '.join(told)}" if result.notebook else "; ".join(told)
            row["remarks"] = "; ".join(filter(None, [row["remarks"], told]))
    for student, row in rows.items():
        row |= {number: 0 for number in exercises if number.partition(".")[0] in (chapters or ())}
        row |= {number: points for (whose, number), (_, points) in best.items() if whose == student}
        row["points"] = sum(row[number] or 0 for number in exercises)
    return list(rows.values())


def maxima(rows: list[dict[str, object]]) -> dict[str, object]:
    """The row of what could be had: for each exercise that anybody handed in, and in all."""
    points = {
        number: exercise.points if any(row[number] != "" for row in rows) else ""
        for number, exercise in all_exercises().items()
    }
    return {"student": "maximum", "points": sum(each or 0 for each in points.values()), **points}


def write_csv(rows: list[dict[str, object]], path: Path) -> None:
    """The gradebook as CSV, below a row of maxima, whole or not at all."""
    table = io.StringIO()
    writer = csv.DictWriter(table, ["student", "points", *all_exercises(), "remarks"], lineterminator="\n")
    writer.writeheader()
    for row in (maxima(rows), *rows):
        writer.writerow({name: harmless(value) for name, value in row.items()})
    text = table.getvalue().encode("utf-8", "backslashreplace")  # a file's name may be no text
    write_atomically(path, lambda temporary: temporary.write_bytes(text))


def harmless(value: object) -> object:
    """A text that no spreadsheet takes for a formula: an apostrophe before what would begin one."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


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
        description="Grade submitted notebooks, scripts and zips of them: one CSV with the points of every "
        "exercise. With --gradescope, one student's submission for Gradescope.",
    )
    parser.add_argument("submissions", type=Path, help="a folder or zip of students' folders, or of files")
    parser.add_argument("--output", type=Path, default=Path("grades.csv"), help="the CSV (grades.csv)")
    parser.add_argument("--force", action="store_true", help="replace the CSV if it exists")
    parser.add_argument(
        "--notebooks",
        nargs="+",
        choices=CHAPTERS,
        metavar="N",
        help="the notebooks that were set, such as 3 4: what is not handed in of them counts 0, and others "
        "are not graded (all, and what is not handed in stays empty)",
    )
    parser.add_argument(
        "--gradescope",
        type=Path,
        metavar="RESULTS",
        help="all files are one student's: write Gradescope's results.json here, and no CSV",
    )
    parser.add_argument("--seconds", type=float, default=30, help="time for each cell and each check (30)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at once (one a core)")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.jobs < 1:
        parser.error("--seconds must be positive and --jobs at least 1.")
    if not options.gradescope and options.output.exists() and not options.force:
        parser.error(f"{options.output} exists; --force replaces it, --output gives another name.")
    with tempfile.TemporaryDirectory() as folder:
        found = _handed_in(options, Path(folder), parser)
        results = grade_all(found, seconds=options.seconds, jobs=options.jobs)
    if options.notebooks:
        results = [_only(result, options.notebooks) for result in results]
    if options.gradescope:
        text = results_json(results, gradebook(results, options.notebooks)[0])
        write_atomically(options.gradescope, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return 0
    write_csv(gradebook(results, options.notebooks), options.output)
    print(summary(results))
    files = sum(bool(result.notebook) for result in results)
    print(f"{options.output}: {len({r.student for r in results})} students, {files} notebooks and scripts.")
    return 0


def _handed_in(
    options: argparse.Namespace, unpacked: Path, parser: argparse.ArgumentParser
) -> list[Submission]:
    """What is to be graded; the parser's error where there is nothing."""
    place = options.submissions
    if place.suffix.lower() == ".zip" and place.is_file():
        try:
            unpack(place, unpacked / place.stem)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            parser.error(f"{place} cannot be unpacked: {error}.")
        place = unpacked / place.stem
    if not place.is_dir():
        parser.error(f"{place} is no folder and no zip.")
    if options.gradescope:
        return [submission("student", [place], unpacked / "student")]
    found = submissions(place, unpacked / "students")
    if not found:
        parser.error(
            f"{options.submissions} holds no notebooks, scripts or zips, and no folders of students."
        )
    return found


def _only(result: Result, chapters: list[str]) -> Result:
    """The result without what was not set."""
    kept = {number: s for number, s in result.status.items() if number.partition(".")[0] in chapters}
    mistakes = {number: mistake for number, mistake in result.mistakes.items() if number in kept}
    return result._replace(status=kept, mistakes=mistakes)


if __name__ == "__main__":
    raise SystemExit(main())
