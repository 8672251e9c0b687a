"""All exercises of the course, by number; one file holds those of one notebook."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of the notebooks are known without loading torch
    from dpo_minimal.bench.exercises import Exercise

CHAPTERS = {
    "1": "preferences",
    "2": "optimum",
    "3": "dpo",
    "4": "gradient_weight",
    "5": "plackett_luce",
    "6": "sequences",
    "7": "loss_zoo",
    "8": "comparisons",
    "9": "what_goes_wrong",
    "10": "your_own_loss",
    "11": "training_log",
}


def of_chapter(chapter: str) -> dict[str, Exercise]:
    """The exercises of one notebook, by number; only their file is loaded."""
    module = import_module(f"{__name__}.{CHAPTERS[chapter]}")
    return {exercise.number: exercise for exercise in module.EXERCISES}


def all_exercises() -> dict[str, Exercise]:
    """Every exercise, in the order of the course."""
    return {number: exercise for chapter in CHAPTERS for number, exercise in of_chapter(chapter).items()}
