"""The course elsewhere: alone in an empty folder, in nbgrader, in Otter, on Colab; without its solutions."""

import copy
import csv
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from dpo_course.checks import judge
from dpo_course.exercises import of_chapter
from dpo_course.grade import grade, gradebook
from IPython.core.inputtransformer2 import TransformerManager

from dpo_minimal.validation import InputError
from notebooks import build, classrooms, syllabus
from notebooks.stubs import SOLUTION, STUB

SOURCES = build.sources()
by_notebook = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
(DPO,) = (source for source in SOURCES if source.stem == "03_dpo")
student_notebook = functools.cache(build.student_notebook)


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def exercises(source):
    return list(of_chapter(str(int(source.stem[:2]))).values())


def solutions(source):
    """Function -> the code that answers it."""
    cells = tagged(build.solved_notebook(source), "exercise")
    return {exercise.function: cell.source for exercise, cell in zip(exercises(source), cells, strict=True)}


# ------------------------------------------------------------------------------------------ the students' set


def test_the_students_set_has_no_solutions(tmp_path, capsys):
    """The students' copies, which test_notebooks.py searches for solutions, and a README that lists them."""
    assert classrooms.main(["students", str(tmp_path / "set"), "3", "5"]) == 0
    chosen = build.chosen(["3", "5"])
    names = {f"{source.stem}.ipynb" for source in chosen}
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"README.md", *names}
    for source in chosen:
        notebook = nbformat.read(tmp_path / "set" / f"{source.stem}.ipynb", as_version=4)
        assert notebook == student_notebook(source)
    readme = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((?!https)([^)]*)\)", readme)) == names and syllabus.requirement() in readme
    assert "set Repository in pyproject.toml" in capsys.readouterr().err


@by_notebook
def test_no_copy_links_to_a_file_beside_it(source):
    """A notebook that stands alone has no other file; a link leads to an address or to a heading."""
    for cell in student_notebook(source).cells:
        if cell.cell_type == "markdown":
            assert not re.findall(r"\]\((?!https?:|#)[^)]*\.\w+[^)]*\)", cell.source)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files = {"a.txt": "a", "b/c.txt": "c"}
    classrooms.write(files, tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "b" / "c.txt").read_text() == "c"
    with pytest.raises(InputError, match=r"folder: is not empty; name a new folder\."):
        classrooms.write(files, tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written"):
        classrooms.write(files, tmp_path / "file")

    def full(path, *_, **__):
        if path.name == "c.txt":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        classrooms.write(files, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_the_command_refuses_what_it_does_not_know(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for arguments, told in (
        (["students", str(tmp_path / "full"), "3"], "is not empty"),
        (["nbgrader", str(tmp_path / "new"), "12"], "no notebook 12"),
        (["moodle", str(tmp_path / "new")], "invalid choice: 'moodle'"),
    ):
        with pytest.raises(SystemExit) as stop:
            classrooms.main(arguments)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------- the project's address, and Colab


def test_the_address_stands_in_one_place(monkeypatch):
    """Of another address, every badge, every cell and every version is made; nothing keeps the old one."""
    old = syllabus.repository()
    monkeypatch.setattr(syllabus, "repository", lambda: "https://github.com/teacher/course")
    readme = syllabus.filled_in(syllabus.README.read_text(encoding="utf-8"), SOURCES)
    for source in SOURCES:
        assert f"/github/teacher/course/blob/main/notebooks/{source.stem}.ipynb)" in readme
    for version in classrooms.VERSIONS.values():
        for name, text in version([DPO]).items():
            assert old not in text
            if name.endswith(".ipynb"):
                assert "dpo-minimal[course] @ git+https://github.com/teacher/course" in text
    assert old not in readme


def test_an_address_of_which_no_badge_can_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(syllabus, "ROOT", tmp_path)
    for address in ("https://example.org/teacher/course", "https://github.com/teacher", "github.com/a/b"):
        (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{address}"\n')
        with pytest.raises(ValueError, match=r"should read https://github\.com/OWNER/NAME"):
            syllabus.repository.__wrapped__()  # which is remembered otherwise


def test_every_students_copy_has_the_same_cell_that_installs_right_before_its_set_up():
    cells = {cell.source for source in SOURCES for cell in tagged(student_notebook(source), "install")}
    assert cells == {build.INSTALL.format(requirement=syllabus.requirement())}
    for source in SOURCES:
        tags = [cell.metadata.get("tags") for cell in student_notebook(source).cells]
        assert tags[tags.index(["install"]) + 1] == ["setup"] and tags.count(["install"]) == 1


@pytest.mark.parametrize(
    ("found", "asked", "complaint"),
    [
        ([True, True], 0, None),
        ([False, True], 1, None),
        ([False, False], 1, "The course could not be installed"),
    ],
    ids=["it is there", "it is fetched", "it cannot be fetched"],
)
def test_the_cell_installs_what_is_missing(found, asked, complaint, monkeypatch):
    """The cell as Jupyter runs it, with a pip that only counts."""
    calls, answers = [], iter(found)

    class Shell:
        def run_line_magic(self, name, line):
            calls.append((name, line))

    code = TransformerManager().transform_cell(tagged(student_notebook(DPO), "install")[0].source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: next(answers) or None)
    if complaint is None:
        exec(code, {"get_ipython": Shell})
    else:
        with pytest.raises(ImportError, match=complaint):
            exec(code, {"get_ipython": Shell})
    assert calls == [("pip", f'install -q "{syllabus.requirement()}"')] * asked


# --------------------------------------------------------------------------- slow: without the clone


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The folder into which the project's wheel was installed: all that a notebook has without the clone."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(syllabus.ROOT / name, work / name)
    hidden = shutil.ignore_patterns("__pycache__")
    for name in ("dpo_minimal", "notebooks"):
        shutil.copytree(syllabus.ROOT / name, work / name, ignore=hidden)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--quiet", "--no-build-isolation"]  # setuptools comes with torch
    subprocess.run([*pip, "wheel", *options, "-w", str(work / "wheels"), str(work)], check=True)
    (wheel,) = (work / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", *options[:2], "--target", str(work / "site"), str(wheel)], check=True)
    return work / "site"


def run_alone(notebook, source, installed, folder, monkeypatch):
    """Execute the notebook as the only file of a folder, with the installed package."""
    nbformat.write(notebook, folder / f"{source.stem}.ipynb")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    where = "import dpo_course, dpo_minimal\nprint(dpo_course.__file__, dpo_minimal.__file__)"
    notebook.cells.append(nbformat.v4.new_code_cell(where))
    build.execute(notebook, folder)
    assert notebook.cells[-1].outputs[0].text.split() == [
        str(installed / package / "__init__.py") for package in ("dpo_course", "dpo_minimal")
    ]
    return ["".join(output.text for output in cell.outputs) for cell in tagged(notebook, "check")]


@pytest.mark.slow
@by_notebook
def test_student_notebooks_run_to_the_end_alone_in_an_empty_folder(source, installed, tmp_path, monkeypatch):
    """With every exercise a stub: checks say so, and nothing else depends on them."""
    notebook = copy.deepcopy(student_notebook(source))
    told = run_alone(notebook, source, installed, tmp_path, monkeypatch)
    assert all(text.endswith("not solved yet.\n") for text in told) and len(told) == len(exercises(source))


@pytest.mark.slow
@pytest.mark.parametrize("number", ["3", "6"])
def test_solved_notebooks_run_alone_too(number, installed, tmp_path, monkeypatch):
    """Two that use most of the package: a table's training, a GPT's."""
    (source,) = build.chosen([number])
    notebook = build.solved_notebook(source)
    for text in run_alone(notebook, source, installed, tmp_path, monkeypatch):
        assert ": right." in text


@pytest.mark.slow
def test_the_wheel_has_no_solutions(installed):
    """Of the course it has what notebooks import, and neither their sources nor the solved ones."""
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"bin", "dpo_course", "dpo_minimal"}
    assert not list(installed.rglob("*.ipynb"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in installed.rglob("dpo_course/**/*.py"))
    assert "BEGIN SOLUTION" not in text


# ------------------------------------------------------------------------- the graders of other people

SOLVED = solutions(DPO)
# A mistake that has a name; an answer that is right although it warns, which prints where errors are printed;
# the rest is blank.
PARTLY = {
    "dpo_loss": "def dpo_loss(a, b, c, d, beta):\n    return -F.logsigmoid(beta * (a - b))",
    "implied_preferences": SOLVED["implied_preferences"].replace(
        "    reward =", "    __import__('warnings').warn('old')\n    reward ="
    ),
}
# What nbgrader's own gradebook says: submission -> function -> points.
NBGRADER_POINTS = """
import json
from nbgrader.api import Gradebook
with Gradebook("sqlite:///gradebook.db") as book:
    notebooks = {s.student.id: s.notebooks[0] for s in book.assignment_submissions("03_dpo")}
    told = {n: {g.name.removeprefix("check-"): g.score for g in b.grades} for n, b in notebooks.items()}
    print(json.dumps(told))
"""
SUBMISSIONS = {"blank": {}, "partly": PARTLY, "solved": SOLVED}


def answered(notebook, answers):
    """A submission: the notebook with these functions' code for their stubs, and without the demonstrations,
    which take most of a notebook's time."""
    notebook = copy.deepcopy(notebook)
    kept = {"setup", "exercise", "check"}
    notebook.cells = [c for c in notebook.cells if kept & set(c.metadata.get("tags", []))]
    for cell in tagged(notebook, "exercise"):
        name = re.match(r"def (\w+)", cell.source)[1]
        cell.source = answers.get(name, cell.source)
    return notebook


@pytest.fixture(scope="session")
def our_points(tmp_path_factory):
    """Submission -> function -> points: none, those that our own grader gives, and all."""
    path = tmp_path_factory.mktemp("partly") / f"{DPO.stem}.ipynb"
    nbformat.write(answered(student_notebook(DPO), PARTLY), path)
    (row,) = gradebook([grade("partly", path, seconds=60)])
    points = {exercise.function: row[exercise.number] for exercise in exercises(DPO)}
    blank = dict.fromkeys(points, 0)
    assert points == blank | {"implied_preferences": 1}
    solved = {exercise.function: exercise.points for exercise in exercises(DPO)}
    return {"blank": blank, "partly": points, "solved": solved}


def wrong_answer():
    """What our check says of the wrong answer: the smallest input, and the mistake's name."""
    found = {"F": torch.nn.functional}
    exec(PARTLY["dpo_loss"], found)
    message = judge("3.1", found["dpo_loss"]).message
    assert "smallest input" in message and "the reference is missing" in message
    return message


def test_a_check_prints_nothing_that_the_answer_prints(capfd):
    """nbgrader gives no points to a check that writes to stderr, and a warning does so."""
    found = {"torch": torch}
    exec(PARTLY["implied_preferences"], found)
    assert judge("3.2", found["implied_preferences"]).passed
    assert capfd.readouterr() == ("", "")


def needs(module):
    """Skip a test without this package, which is asked for before anything of it is imported."""
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} comes with requirements-bench.txt")


def run(*command, cwd):
    """Run a Python module as a command, with no settings but those of its folder; return what it prints."""
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(cwd), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@by_notebook
def test_every_exercise_is_graded_in_nbgrader(source):
    """The answer stands between markers, a check that raises below it; ids do not depend on numbers."""
    cells = classrooms.nbgrader_notebook(source).cells
    graded = [cell for cell in cells if cell.metadata.get("nbgrader", {}).get("grade")]
    points = {cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points for cell in graded}
    assert points == {f"check-{exercise.function}": exercise.points for exercise in exercises(source)}
    for cell, exercise in zip(graded, exercises(source), strict=True):
        answer = cells[cells.index(cell) - 1]
        assert answer.metadata.nbgrader.grade_id == f"answer-{exercise.function}"
        assert answer.metadata.nbgrader.solution and len(SOLUTION.findall(answer.source)) == 1
        assert cell.source.endswith(f'check("{exercise.number}", {exercise.function}).require()')
    for tag in ("install", "setup"):
        (cell,) = tagged(classrooms.nbgrader_notebook(source), tag)
        assert cell.metadata.nbgrader.locked and not cell.metadata.nbgrader.solution


@pytest.mark.slow
@needs("nbgrader")
def test_a_round_trip_through_nbgrader(tmp_path, our_points):
    """Instructor's version, release, three submissions, grades, all by nbgrader itself: no points without an
    answer, all for the solutions, and for each exercise those of our own grader."""
    name = DPO.stem
    classrooms.write(classrooms.nbgrader([DPO]), tmp_path / "course")
    run("nbgrader", "generate_assignment", name, cwd=tmp_path / "course")
    release = nbformat.read(tmp_path / "course" / "release" / name / f"{name}.ipynb", as_version=4)
    ours = tagged(student_notebook(DPO), "exercise")
    assert [c.source for c in tagged(release, "exercise")] == [c.source for c in ours]  # the same stubs
    for student, answers in SUBMISSIONS.items():
        path = tmp_path / "course" / "submitted" / student / name / f"{name}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(answered(release, answers), path)
    run("nbgrader", "autograde", name, cwd=tmp_path / "course")
    run("nbgrader", "export", cwd=tmp_path / "course")
    with (tmp_path / "course" / "grades.csv").open(encoding="utf-8") as table:
        totals = {row["student_id"]: (row["score"], row["max_score"]) for row in csv.DictReader(table)}
    assert totals == {"blank": ("0.0", "5.0"), "partly": ("1.0", "5.0"), "solved": ("5.0", "5.0")}
    (tmp_path / "course" / "told.py").write_text(NBGRADER_POINTS, encoding="utf-8")
    assert json.loads(run("told", cwd=tmp_path / "course")) == our_points
    graded = nbformat.read(
        tmp_path / "course" / "autograded" / "partly" / name / f"{name}.ipynb", as_version=4
    )
    (error,) = (o for o in tagged(graded, "check")[0].outputs if o.output_type == "error")
    assert error.evalue == wrong_answer()


@by_notebook
def test_every_exercise_is_a_question_in_otter(source):
    """Raw cells that begin and end in order, with name, points and a test of each exercise."""
    cells = classrooms.otter_notebook(source).cells
    raw = [cell.source for cell in cells if cell.cell_type == "raw"]
    assert raw[0].startswith(f"# ASSIGNMENT CONFIG\nname: {source.stem}\n")
    wanted = []
    for exercise in exercises(source):
        question = (
            f"# BEGIN QUESTION\nname: {exercise.function}\npoints: {exercise.points}\ncheck_cell: false"
        )
        wanted += [
            question,
            "# BEGIN SOLUTION",
            "# END SOLUTION",
            "# BEGIN TESTS",
            "# END TESTS",
            "# END QUESTION",
        ]
        place = next(n for n, cell in enumerate(cells) if cell.source == question)
        assert STUB in cells[place + 2].source and "# BEGIN SOLUTION NO PROMPT" in cells[place + 2].source
        assert f'judge("{exercise.number}", {exercise.function}).require()' in cells[place + 5].source
    assert raw[1:] == wanted


@pytest.mark.slow
@needs("otter")
def test_a_round_trip_through_otter(tmp_path, our_points):
    """Master notebook, student's notebook, autograder, points of three submissions, all by Otter itself."""
    classrooms.write(classrooms.otter([DPO]), tmp_path / "master")
    run("otter", "assign", f"{DPO.stem}.ipynb", "dist", "--no-run-tests", cwd=tmp_path / "master")
    made = tmp_path / "master" / "dist"
    student = nbformat.read(made / "student" / f"{DPO.stem}.ipynb", as_version=4)
    (autograder,) = (made / "autograder").glob("*.zip")
    ours = tagged(student_notebook(DPO), "exercise")
    assert [cell.source for cell in tagged(student, "exercise")] == [cell.source for cell in ours]
    for name, answers in SUBMISSIONS.items():
        (tmp_path / name).mkdir()
        nbformat.write(answered(student, answers), tmp_path / name / f"{DPO.stem}.ipynb")
        run("otter", "run", "-a", str(autograder), f"{DPO.stem}.ipynb", cwd=tmp_path / name)
        results = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["tests"][1:]
        assert {test["name"]: test["score"] for test in results} == our_points[name], name
        if name == "partly":
            told = "\n".join(line.strip() for line in results[0]["output"].split("\n"))
            assert "\n".join(line.strip() for line in wrong_answer().split("\n")) in told
