"""What a submission's results look like to Gradescope: one test for each exercise, in its results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .exercises import all_exercises

if TYPE_CHECKING:
    from .grade import Result


def results_json(results: Sequence[Result], row: dict[str, object]) -> str:
    """Gradescope's results.json for one student.

    Args:
        results: of the student's files.
        row: the student's row of the gradebook.
    """
    messages = {number: message for result in results for number, message in result.messages.items()}
    tests = [
        {
            "number": number,
            "name": exercise.function,
            "score": row[number],
            "max_score": exercise.points,
            "output": messages.get(number) or f"{number} {exercise.function}: not handed in.",
            "visibility": "visible",
        }
        for number, exercise in all_exercises().items()
        if row[number] != ""
    ]
    told = {"score": row["points"], "output": row["remarks"], "visibility": "visible", "tests": tests}
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"
