"""The grader: points, named mistakes, and submissions that loop, print without end, raise or exit."""

import copy
import csv

import nbformat
import pytest

from notebooks import build
from notebooks.exercises import all_exercises, of_chapter
from notebooks.grade import Result, grade, gradebook, main, submissions, summary

(SOURCE,) = build.FOLDER.glob("source/03_*.py")
RIGHT = "def dpo_loss(a, b, c, d, beta):\n    return -F.logsigmoid(beta * (a - c - b + d))"
ALSO_RIGHT = (
    "def implied_preferences(logps, ref_logps, beta):\n"
    "    reward = beta * (logps - ref_logps)\n"
    "    return torch.sigmoid(reward[:, None] - reward)"
)
WRONG = "def dpo_loss(a, b, c, d, beta):\n    return -F.logsigmoid(beta * (a - b))"


def submit(folder, *answers, added=None):
    """The student's notebook 3 with some exercises answered, and perhaps a cell added after the set-up."""
    notebook = copy.deepcopy(build.student_notebook(SOURCE))
    for answer in answers:
        name = answer.split("(")[0]
        (cell,) = (c for c in notebook.cells if c.source.startswith(f"{name}("))
        cell.source = answer
    if added is not None:
        notebook.cells.insert(2, nbformat.v4.new_code_cell(added))
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / "03_dpo.ipynb")
    return folder / "03_dpo.ipynb"


def test_a_folder_is_graded(tmp_path, capsys):
    """One CSV: points by exercise, two for a central one; what was not handed in stays empty."""
    submit(tmp_path / "in" / "ada", RIGHT, ALSO_RIGHT)
    submit(tmp_path / "in" / "bob", WRONG)
    output = tmp_path / "grades.csv"
    assert main([str(tmp_path / "in"), "--output", str(output)]) == 0
    ada, bob = csv.DictReader(output.read_text(encoding="utf-8").splitlines())
    assert (ada["student"], ada["3.1"], ada["3.2"], ada["3.3"], ada["1.1"]) == ("ada", "2", "1", "0", "")
    assert (ada["points"], ada["remarks"]) == ("3", "")
    assert (bob["3.1"], bob["points"]) == ("0", "0") and "the reference is missing" in bob["remarks"]
    told = capsys.readouterr().out
    assert "solved by 1 of 2" in told and "1 x the reference is missing" in told
    with pytest.raises(SystemExit):
        main([str(tmp_path / "in"), "--output", str(output)])
    assert "exists; --force replaces it" in capsys.readouterr().err


def test_a_gradebook_has_one_row_a_student():
    """Of two copies of a notebook the better one counts, exercise by exercise."""
    results = [
        Result("ada", "03_dpo.ipynb", {"3.1": "right", "3.2": "wrong"}, {"3.2": "β is missing"}, []),
        Result("ada", "03_dpo (copy).ipynb", {"3.1": "wrong", "3.2": "right"}, {}, ["cell 2 raised"]),
        Result("bob", "04.ipynb", {}, {}, ["unreadable"]),
    ]
    ada, bob = gradebook(results)
    assert (ada["3.1"], ada["3.2"], ada["3.3"], ada["points"]) == (2, 1, "", 3)
    assert ada["remarks"] == "03_dpo.ipynb: 3.2: β is missing; 03_dpo (copy).ipynb: cell 2 raised"
    assert (bob["points"], bob["remarks"]) == (0, "04.ipynb: unreadable")
    assert "3.1 dpo_loss                 solved by 1 of 2" in summary(results)


def test_students_are_folders_or_notebooks(tmp_path):
    for name in (
        "ada/03.ipynb",
        "ada/week/04.ipynb",
        "bob.ipynb",
        "ada/.ipynb_checkpoints/03.ipynb",
        "x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [(student, path.name) for student, path in submissions(tmp_path)]
    assert found == [("ada", "03.ipynb"), ("ada", "04.ipynb"), ("bob", "bob.ipynb")]


def test_bad_arguments_are_refused(tmp_path, capsys):
    missing, empty = str(tmp_path / "missing"), str(tmp_path)
    for arguments, told in (
        ([missing], "is no folder"),
        ([empty], "holds no notebooks"),
        ([empty, "--seconds", "0"], "--seconds must be positive"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_only_what_the_student_wrote_is_run():
    """The course's own demonstrations take seconds each; a class of thirty should not wait for them."""
    from notebooks.examine import cells_to_run

    notebook = build.student_notebook(SOURCE)
    cells = cells_to_run(notebook, "3")
    assert len(cells) == 1 + len(of_chapter("3")) and cells[0][0] == 1 and "import torch" in cells[0][1]
    notebook.cells.insert(3, nbformat.v4.new_code_cell("helper = 1"))
    assert (2, "helper = 1") in cells_to_run(notebook, "3")


HOSTILE = {
    "loops in a cell": ([RIGHT, ALSO_RIGHT], "while True: pass", 3, "cell 2 took longer than"),
    "loops in an answer": (
        ["def dpo_loss(a, b, c, d, beta):\n    while True: pass", ALSO_RIGHT], None, 1, "3.1 took longer",
    ),
    "prints a gigabyte": ([RIGHT], "for _ in range(2000): print('x' * 500_000)", 2, ""),
    "raises in a cell": ([RIGHT], "1 / 0", 2, "ZeroDivisionError"),
    "raises in an answer": (["def dpo_loss(*_):\n    1 / 0", ALSO_RIGHT], None, 1, ""),
    "exits in a cell": ([RIGHT], "exit()", 2, "cell 2 raised"),
    "exits in an answer": (["def dpo_loss(*_):\n    exit()", ALSO_RIGHT], None, 1, ""),
    "ends the process": ([RIGHT], "import os\nos._exit(0)", 2, "cell 2 ended the process"),
    "ends the process in an answer": (
        ["def dpo_loss(*_):\n    import os\n    os._exit(0)", ALSO_RIGHT], None, 1, "3.1 ended the process",
    ),
    "leaves a thread": (
        [RIGHT], "import threading, time\nthreading.Thread(target=time.sleep, args=(10**6,)).start()", 2, "",
    ),
    "asks a question": ([RIGHT], "input()", 2, None),  # nobody answers: an error, or an empty line
    "uses magics": ([RIGHT], "%matplotlib inline\n!ls", 2, ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_submission_costs_its_own_exercise_only(name, tmp_path):
    answers, added, points, remark = HOSTILE[name]
    path = submit(tmp_path / "eve", *answers, added=added)
    result = grade("eve", path, seconds=20)  # a quiet machine imports torch in two
    (row,) = gradebook([result])
    assert row["points"] == points, row
    if remark is not None:
        assert remark in row["remarks"] and bool(remark) == bool(result.remarks), row


def test_a_file_that_is_no_notebook_is_told(tmp_path):
    (tmp_path / "03_dpo.ipynb").write_text("not json")
    result = grade("eve", tmp_path / "03_dpo.ipynb", seconds=60)
    assert result.status == {} and "no notebook" in result.remarks[0]
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "homework.ipynb")
    assert (
        "none of the course's notebooks" in grade("eve", tmp_path / "homework.ipynb", seconds=60).remarks[0]
    )


def test_points():
    """Central exercises count twice."""
    assert {exercise.points for exercise in all_exercises().values() if exercise.central} == {2}
    assert {exercise.points for exercise in all_exercises().values() if not exercise.central} == {1}
