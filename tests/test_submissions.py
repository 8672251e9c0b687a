"""Who handed in what: folders, files, zips and platforms' names; scripts as cells; an answer's own work."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dpo_course import given
from dpo_course.cells import chapters_of, code_cells, read
from dpo_course.exercises import of_chapter
from dpo_course.grade import main
from dpo_course.submissions import submissions

from notebooks import build

ROOT = Path(__file__).parent.parent
ANSWER = """import torch.nn.functional as F


def dpo_loss(a, b, c, d, beta):
    return -F.logsigmoid(beta * (a - c - b + d))
"""


def zipped(files):
    """A zip of these files, as bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def found(tmp_path, files):
    """What `submissions` makes of these files: student -> (names of files, remarks)."""
    for name, content in files.items():
        path = tmp_path / "class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    handed_in = submissions(tmp_path / "class", tmp_path / "unpacked")
    return {each.student: ([path.name for path in each.files], each.remarks) for each in handed_in}


# -------------------------------------------------------------------------------------- students

NAMES = {  # file -> the student whose it is
    "ada/03_dpo.ipynb": "ada",
    "ada/week 2/04_gradient_weight.ipynb": "ada",
    "bob.ipynb": "bob",
    "bob_03_dpo.ipynb": "bob",
    "04_gradient_weight_bob.ipynb": "bob",
    "answers_bob.py": "bob",
    "03_dpo (1).ipynb": "class",  # nothing tells students apart: the folder's own name
    "04_gradient_weight-Copy1.ipynb": "class",
    "answers.py": "class",
    "Ada Byron_12345_assignsubmission_file_/03_dpo.ipynb": "Ada Byron",
    "Ada Byron_12345_assignsubmission_file_04_gradient_weight.ipynb": "Ada Byron",
    "curiem_LATE_11_678_03_dpo-1.ipynb": "curiem",
    "curiem_11_680_04_gradient_weight.ipynb": "curiem",
    "Week_3_noe_attempt_2026-11-28-10-00-00_03_dpo.ipynb": "noe",
    "Week_3_noe_attempt_2026-11-28-10-00-00.txt": "noe",  # Blackboard writes it beside
}


def test_a_student_is_one_row_whatever_the_platform_writes(tmp_path):
    whose = {student: files for student, (files, _) in found(tmp_path, dict.fromkeys(NAMES, ANSWER)).items()}
    assert sorted(whose) == sorted(set(NAMES.values()))
    for student, files in whose.items():
        assert len(files) == sum(
            owner == student and not name.endswith("txt") for name, owner in NAMES.items()
        ), student


def test_namesakes_are_two(tmp_path):
    files = {f"Ada Byron_{n}_assignsubmission_file_/03_dpo.ipynb": "" for n in (1, 2)}
    assert list(found(tmp_path, files)) == ["Ada Byron (1)", "Ada Byron (2)"]


def test_the_courses_own_files_are_nobodys_answers(tmp_path):
    """Who hands in the whole folder `notebooks/`, or the clone, is graded by the student's copies."""
    own = dict.fromkeys(("ada/notebooks/03_dpo.ipynb", "ada/notebooks/answers.py"), ANSWER)
    ours = ["notebooks/solutions/03_dpo.ipynb", "notebooks/source/03_dpo.py", "dpo_minimal/losses.py",
            "notebooks/dpo_course/exercises/dpo.py", "tests/student_answers.py", ".hidden/03.ipynb",
            "notebooks/build.py"]  # fmt: skip
    files = own | {f"ada/{name}": ANSWER for name in ours[:-1]} | {f"ada/{ours[-1]}": "x = 1"}
    files |= {"bob/solutions/03_dpo.ipynb": "", "eve.zip": zipped({"notebooks/solutions/03_dpo.ipynb": ""})}
    told = "only files in solutions, which are the course's own, were handed in"
    expected = {"ada": (["03_dpo.ipynb", "answers.py"], []), "bob": ([], [told]), "eve": ([], [told])}
    assert found(tmp_path, files) == expected


def test_a_student_without_a_notebook_has_a_row(tmp_path):
    """A script, a zip, a zip in a folder, a script with other names; and what cannot be graded is told."""
    inner = {"homework/03_dpo.ipynb": "", "__MACOSX/homework/._03_dpo.ipynb": "", "notes.txt": ""}
    files = {
        "a.py": ANSWER,
        "b.zip": zipped(inner | {"more.zip": zipped({"04.ipynb": ""})}),
        "c/homework.zip": zipped(inner),
        "d/mine.py": ANSWER.replace("dpo_loss", "loss"),
        "e/report.pdf": "",
        "f.zip": b"no zip",
        "Fay Noe_7_assignsubmission_file_report.pdf": "",
        "readme.txt": "",
    }
    nothing = "no notebook, no script and no zip of them was handed in"
    students = found(tmp_path, files)
    assert students.pop("f")[1][0].startswith("f.zip cannot be unpacked: ")
    assert students == {
        "a": (["a.py"], []), "b": (["03_dpo.ipynb", "04.ipynb"], []), "c": (["03_dpo.ipynb"], []),
        "d": (["mine.py"], []), "e": ([], [nothing]), "Fay Noe": ([], [nothing]),
    }  # fmt: skip


def test_a_zip_that_does_harm_is_refused(tmp_path, monkeypatch):
    """Too large, too deep, or leading outside."""
    monkeypatch.setattr("dpo_course.submissions.LARGEST", 1000)
    bomb, deep = (
        zipped({"03.ipynb": " " * 1001}),
        zipped({"a.zip": zipped({"b.zip": zipped({"03.ipynb": ""})})}),
    )
    students = found(tmp_path, {"a.zip": bomb, "b.zip": deep, "c.zip": zipped({"../../../03.ipynb": ""})})
    assert "holds more than" in students["a"][1][0] and "a zip in a zip" in students["b"][1][0]
    assert students["c"] == (["03.ipynb"], []) and not list(tmp_path.rglob("../03.ipynb"))


# --------------------------------------------------------------------------------------- scripts


SCRIPTS = {  # a script -> its cells
    "x = 1\n\n@d\ndef f():\n    return 2\n\ny = 3": ["x = 1", "@d\ndef f():\n    return 2", "y = 3"],
    "# %% [markdown]\n# hi\n\n# %%\nx = 1\ny = 2": ["# hi", "x = 1\ny = 2"],
    "#!/bin/python\n# In[3]:\n%%time\nx = 1\n\n# In[ ]:\n!ls": ["#!/bin/python", "%%time\nx = 1", "!ls"],
    "x = (1\n\ndef f():\n    return 2\n": ["x = (1", "def f():\n    return 2"],  # broken: the rest is kept
}


@pytest.mark.parametrize(("text", "cells"), SCRIPTS.items())
def test_a_script_has_cells(text, cells, tmp_path):
    for ends in ("\n", "\r\n"):
        (tmp_path / "a.py").write_bytes(text.replace("\n", ends).encode("utf-8-sig"))
        assert [code for _, code in code_cells(read(tmp_path / "a.py")) if code] == cells
    (*_, (place, _)) = code_cells(read(tmp_path / "a.py"))
    assert place == f"line {text[: text.rindex(cells[-1])].count(chr(10)) + 1}"


def test_a_script_may_answer_several_notebooks(tmp_path):
    path = tmp_path / "anything.py"
    path.write_text(ANSWER + ANSWER.replace("dpo_loss", "optimal_logps"))
    assert chapters_of(path, read(path)) == ["2", "3"]


@pytest.mark.slow
def test_a_class_of_scripts_and_zips_is_graded(tmp_path):
    """A zip of the class, as a platform gives it. What a script does not speak of stays empty; a renamed
    function is remarked."""
    solved = "\n\n".join(cell.source for cell in build.solved_notebook(build.sources()[2]).cells
                         if {"setup", "exercise"} & set(cell.metadata.get("tags", [])))  # fmt: skip
    other = given.of_chapter("3").tasks["3.2"].function
    renamed = f"{ANSWER.replace('dpo_loss', 'my_dpo_loss')}\n\ndef {other}(*given):\n    return 0\n"
    files = {
        "Ada_1_assignsubmission_file_/a.py": ANSWER,
        "Bob_2_assignsubmission_file_/b.py": renamed,
        "Cy_3_assignsubmission_file_/c.zip": zipped({"d.py": solved}),
        "Di_4_assignsubmission_file_/d.pdf": "",
    }
    (tmp_path / "class.zip").write_bytes(zipped(files))
    assert main([str(tmp_path / "class.zip"), "--output", str(tmp_path / "grades.csv")]) == 0
    rows = csv.DictReader((tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines())
    _, ada, bob, cy, di = rows
    assert (ada["points"], ada["3.2"], di["points"]) == ("2", "", "0") and "no notebook" in di["remarks"]
    assert cy["points"] == str(sum(exercise.points for exercise in of_chapter("3").values()))
    assert (bob["3.1"], bob["points"]) == ("0", "0") and "there is `my_dpo_loss`" in bob["remarks"]


# ------------------------------------------------------------------------------- without the notebooks


@pytest.mark.slow
def test_gradescope_and_the_package_alone(tmp_path):
    """README's run_autograder, in folders as Gradescope has them, with the package as pip installs it and no
    clone: points, and the message of the check."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    project = tmp_path / "project"
    for name in ("dpo_minimal", "notebooks/dpo_course"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    subprocess.run([*pip, str(tmp_path / "site"), str(project)], check=True)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "notebooks/README.md").read_text("utf-8"), re.DOTALL)
    (script,) = (block for block in blocks if "run_autograder" in block or "--gradescope" in block)
    autograder = tmp_path / "autograder"
    for name in ("submission", "results"):
        (autograder / name).mkdir(parents=True)
    (autograder / "run_autograder").write_text(script.replace("/autograder", str(autograder)))
    wrong = ANSWER.replace("beta * (a - c - b + d)", "beta * (a - b)")
    other = given.of_chapter("3").tasks["3.2"].stub
    (autograder / "submission" / "answers.py").write_text(f"{wrong}\n\n{other}\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    surroundings = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PATH": path}
    subprocess.run(["bash", "run_autograder"], cwd=autograder, env=surroundings, check=True)
    results = json.loads((autograder / "results" / "results.json").read_text(encoding="utf-8"))
    tests = {test["number"]: test for test in results["tests"]}
    assert results["score"] == 0 and list(tests) == list(of_chapter("3"))
    assert (tests["3.1"]["name"], tests["3.1"]["score"], tests["3.1"]["max_score"]) == ("dpo_loss", 0, 2)
    assert "looks like      the reference is missing" in tests["3.1"]["output"]
    assert "not solved yet" in tests["3.2"]["output"] and "not handed in" in tests["3.3"]["output"]
    assert set(tests["3.1"]) == {"number", "name", "score", "max_score", "output", "visibility"}


def test_gradescope_gets_an_answer_where_nothing_was_handed_in(tmp_path):
    """Without results.json it would tell the student that the autograder has failed."""
    (tmp_path / "submission").mkdir()
    arguments = [str(tmp_path / "submission"), "--notebooks", "3", "--gradescope", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert results["score"] == 0 and len(results["tests"]) == len(of_chapter("3"))
    assert results["output"].startswith("no notebook, no script")
