"""The grader: points, named mistakes, odd answers, and submissions that loop, print without end or exit."""

import builtins
import contextlib
import copy
import csv
import functools
import json
import re
import sys

import nbformat
import pytest
import torch
from dpo_course import checks, given
from dpo_course.cells import cells_to_run, chapters_of, code_cells, names, read
from dpo_course.examine import NEWER, RENAMED, Session, examine
from dpo_course.exercises import all_exercises, of_chapter
from dpo_course.grade import Result, grade, gradebook, main, summary, write_csv

from dpo_minimal.bench.checks import Verdict, complain
from dpo_minimal.bench.exercises import samples
from notebooks import build

(SOURCE,) = build.FOLDER.glob("source/03_*.py")
student_notebook = functools.cache(build.student_notebook)
RIGHT = "def dpo_loss(a, b, c, d, beta):\n    return -F.logsigmoid(beta * (a - c - b + d))"
SECOND = given.of_chapter("3").tasks["3.2"].function
(SOLVED,) = (c.source for c in build.solved_notebook(SOURCE).cells if c.source.startswith(f"def {SECOND}("))
ALSO_RIGHT = SOLVED + "\n    # no copy"
WRONG = "def dpo_loss(a, b, c, d, beta):\n    return -F.logsigmoid(beta * (a - b))"


def submit(folder, *answers, added=None):
    """The student's notebook 3 with some exercises answered, and perhaps a cell added after the set-up."""
    notebook = copy.deepcopy(student_notebook(SOURCE))
    for answer in answers:
        definition = re.search(r"def \w+\(", answer)[0]
        (cell,) = (c for c in notebook.cells if c.source.startswith(definition))
        cell.source = answer
    if added is not None:
        notebook.cells.insert(2, nbformat.v4.new_code_cell(added))
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / "03_dpo.ipynb")
    return folder / "03_dpo.ipynb"


@pytest.mark.slow
def test_a_folder_is_graded(tmp_path, capsys):
    """One CSV: points by exercise, two for a central one; what was not handed in stays empty."""
    submit(tmp_path / "in" / "ada", "%%time\n" + RIGHT, ALSO_RIGHT)
    bob = submit(tmp_path / "in" / "bob", WRONG, ALSO_RIGHT)
    bob.write_text(bob.read_text(encoding="utf-8").replace(f"def {SECOND}", f"def my_{SECOND}"), "utf-8")
    output = tmp_path / "grades.csv"
    assert main([str(tmp_path / "in"), "--output", str(output)]) == 0
    maximum, ada, bob = csv.DictReader(output.read_text(encoding="utf-8").splitlines())
    points = sum(exercise.points for exercise in of_chapter("3").values())
    assert (maximum["student"], maximum["3.1"], maximum["points"]) == ("maximum", "2", str(points))
    assert (ada["student"], ada["3.1"], ada["3.2"], ada["3.3"], ada["1.1"]) == ("ada", "2", "1", "0", "")
    assert (ada["points"], ada["remarks"]) == ("3", "")
    assert (bob["3.1"], bob["points"]) == ("0", "0") and "the reference is missing" in bob["remarks"]
    assert f"3.2 {RENAMED}; there is `my_{SECOND}`" in bob["remarks"]
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


def test_bad_arguments_are_refused(tmp_path, capsys):
    missing, empty = str(tmp_path / "missing"), str(tmp_path)
    for arguments, told in (
        ([missing], "is no folder and no zip"),
        ([empty], "holds no notebooks"),
        ([empty, "--seconds", "0"], "--seconds must be positive"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)
def test_only_what_the_student_wrote_is_run(source):
    """And the checks. Demonstrations take seconds each; a class of thirty should not wait for them."""
    notebook = copy.deepcopy(student_notebook(source))
    (chapter,) = chapters_of(source.with_suffix(".ipynb"), notebook)
    run = cells_to_run(notebook, [chapter])
    assert len(run) == 2 + 2 * len(of_chapter(chapter))  # what installs, and the set-up
    assert run[1][0] == "cell 2" and "import torch" in run[1][1]
    notebook.cells.insert(4, nbformat.v4.new_code_cell("helper = 1"))
    assert ("cell 3", "helper = 1") in cells_to_run(notebook, [chapter])


def test_what_the_package_knows_of_the_notebooks_is_not_stale():
    from notebooks import given as writer

    for source in build.sources():
        assert not writer.is_stale(source), "run `python -m notebooks.build`"
    tasks, exercises = given.all_tasks(), all_exercises()
    assert {n: task.function for n, task in tasks.items()} == {n: e.function for n, e in exercises.items()}
    functions = [task.function for task in tasks.values()]
    assert len(functions) == len(set(functions)), "a script would answer two exercises at once"


def test_which_notebook_it_is(tmp_path):
    """By its metadata, its file's name, wherever that stands in it, or its functions."""
    notebook = student_notebook(build.sources()[9])
    assert chapters_of(tmp_path / "mine.ipynb", notebook) == ["10"]
    bare = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RIGHT)])
    for name, chapter in (("10_your_own_loss", "10"), ("byron_1_2_05_plackett_luce-1", "5"), ("03", "3")):
        assert chapters_of(tmp_path / f"{name}.ipynb", {"cells": [], "metadata": {}}) == [chapter]
    assert chapters_of(tmp_path / "homework.ipynb", bare) == ["3"]


# ------------------------------------------------------------------------------- what cells mean in Jupyter

# Cells of a notebook, and the variables among x, y, z that Jupyter has after them, where x is 7 before.
CELLS = {
    "valid Python": (["y = (10\n % x)"], {"y": 3}),
    "Python beside a magic": (["%pwd\ny = (10\n % x)\nz = '''\n%ls\n!ls'''"],
                              {"y": 3, "z": "\n%ls\n!ls"}),
    "help": (["x?\ny = 1", "?x", "x.real??"], {"y": 1}),
    "a command in an if": (["if x:\n    !exit 1\n    y = 1\nelse:\n    !exit 2"], {"y": 1}),
    "a command's output": (["y = !exit 0\nz = x"], {"y": [], "z": 7}),
    "a magic's output": (["y = %timeit -n1 -r1 -q x\nz = x"], {"y": None, "z": 7}),
    "a timed cell": (["\n%%time\nx -= 1\ny = x"], {"x": 6, "y": 6}),
    "a timed statement": (["%time y = x + 1"], {"y": 8}),
    "a timed loop": (["%%timeit -n1 -r1\nx = 0"], {}),
    "magic in magic": (["%%capture\n%%time\n%pwd\ny = (10\n % x)"], {"y": 3}),
    "no Python": (["%%bash\nx=0", "%%writefile x.py\nx = 0", "%%html\n<p>"], {}),
    "await": (["async def f(): return x\ny = await f()", "%pwd\nz = await f()"], {"y": 7, "z": 7}),
    "indentation": (["    y = x\n    z = y"], {"y": 7, "z": 7}),
    "a copied prompt": ([">>> y = x\n>>> if y:\n...     z = y"], {"y": 7, "z": 7}),
    "display": (["display(x)\ny = x"], {"y": 7}),
    "the shell itself": (["get_ipython().run_line_magic('pwd', '')\ny = x"], {"y": 7}),
    "annotations": (["def f(a: x): return a\ny = f.__annotations__['a']"], {"y": 7}),
    "mistakes": (["y = 1\ny = (", "z = 1\n1 / 0\nz = 2", "%time x +", "exit()"], {"z": 1}),
    "line ends of Windows": (["%%time\r\nif x:\r\n    y = '''a\r\nb'''\r\n"], {"y": "a\nb"}),
}  # fmt: skip


def variables(namespace):
    return {name: namespace[name] for name in "xyz" if name in namespace}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_does_what_it_does_in_jupyter(name, tmp_path, monkeypatch):
    """And it starts no command and writes no file."""
    monkeypatch.chdir(tmp_path)
    cells, expected = CELLS[name]
    session = Session()
    session.namespace["x"] = 7
    for code in cells:
        with contextlib.suppress(Exception, SystemExit):
            session.execute(code, name)
    assert variables(session.namespace) == {"x": 7, **expected}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cells_above_do_so_in_ipython(tmp_path, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell puts another one there
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    for cells, expected in CELLS.values():
        shell.reset()
        shell.user_ns["x"] = 7
        for code in cells:
            shell.run_cell(code)
        assert variables(shell.user_ns) == {"x": 7, **expected}, cells


def test_a_notebook_is_read_as_jupyter_reads_it(tmp_path):
    """Source as text or as lines, line ends of Windows, a byte-order mark, the format before 2015; code that
    stands in a raw or markdown cell is not run."""
    cells = [nbformat.v4.new_raw_cell("raw = 1"), nbformat.v4.new_markdown_cell("marked = 1")]
    notebook = nbformat.v4.new_notebook(
        cells=[*cells, *map(nbformat.v4.new_code_cell, ("if 1:\n    a = '%'", ""))]
    )
    expected = [("cell 1", "if 1:\n    a = '%'"), ("cell 2", "")]
    path = tmp_path / "03.ipynb"
    lines = nbformat.writes(notebook)
    whole = json.dumps(notebook)
    old = json.dumps(nbformat.convert(notebook, 3))
    assert '"source": [' in lines and '"source": "' in whole and '"worksheets"' in old
    for text in (lines, whole, old, whole.replace("\\n", "\\r\\n"), "\ufeff" + lines.replace("\n", "\r\n")):
        path.write_bytes(text.encode())
        assert code_cells(read(path)) == expected, text


# ------------------------------------------------------------------- doubled, deleted and renamed exercises

STUB = 'def dpo_loss(a, b, c, d, beta):\n    """Mine."""\n    raise NotImplementedError'
ANSWERS = {  # cells instead of the exercise's own: whether the answer is right, and the remark
    "once": ([RIGHT], "right", None),
    "no magic": (["%%time\n" + RIGHT], "right", None),
    "twice": ([WRONG, RIGHT], "right", "is defined twice: the last one counts"),
    "a worse one last": ([RIGHT, RIGHT, WRONG], "wrong", "is defined twice: the last one counts"),
    "a copy of the stub": ([RIGHT, STUB, STUB], "right", None),
    "no answer": ([STUB], "not solved yet", None),
    "no answer, twice": ([STUB, STUB], "not solved yet", None),
    "a result of the same name": ([RIGHT, "dpo_loss = torch.ones(2)"], "right", None),
    "the package's beside it": ([RIGHT, "from dpo_minimal import dpo_loss"], "right", None),
    "the package's alone": (["from dpo_minimal import dpo_loss"], "missing", RENAMED),
    "deleted": ([], "missing", RENAMED),
    "renamed": ([RIGHT.replace("dpo", "my_dpo")], "missing", f"{RENAMED}; there is `my_dpo_loss`"),
    "two more": ([RIGHT.replace("loss(", f"loss{n}(") for n in (1, 2)], "missing",
                 f"{RENAMED}; there is `dpo_loss2` and `dpo_loss1`"),
    "broken": ([RIGHT + ")"], "missing", None),
}  # fmt: skip


OTHERS = of_chapter("3").keys() - {"3.1"}


def student_copy(*answers, added=(), number="3.1"):
    """The student's notebook 3 with these cells instead of the stub of an exercise, and others below it."""
    notebook = copy.deepcopy(student_notebook(SOURCE))
    stub = given.all_tasks()[number].stub
    (place,) = (k for k, cell in enumerate(notebook.cells) if cell.source == stub)
    notebook.cells[place : place + 1] = map(nbformat.v4.new_code_cell, answers)
    notebook.cells[place + len(answers) + 1 : place + len(answers) + 1] = map(
        nbformat.v4.new_code_cell, added
    )
    return notebook


@pytest.fixture
def records(tmp_path, monkeypatch):
    """What `examine` reports of a notebook, its answers judged by a few draws; only 3.1, unless told."""

    def judge(number, function):
        exercise = checks.find_exercise(number)
        try:
            wrong = any(complain(exercise, function, given) for given in samples(exercise.inputs))
        except NotImplementedError:
            return Verdict("not solved yet", "")
        return Verdict("wrong" if wrong else "right", f"{number}: {'wrong' if wrong else 'right'}")

    monkeypatch.setattr(checks, "judge", judge)

    def examined(notebook, *, skipped=OTHERS):
        path, report = tmp_path / "03_dpo.ipynb", tmp_path / "report.jsonl"
        report.unlink(missing_ok=True)
        nbformat.write(notebook, path)
        examine(path, report, set(skipped))
        return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]

    return examined


def of_exercise(records, number="3.1"):
    """Whether the answer is right, and the remark."""
    (record,) = (record for record in records if record.get("item") == number)
    return record.get("status"), record["remark"]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_odd_answer_is_remarked_and_costs_no_more_than_its_mistake(name, records):
    answers, status, remark = ANSWERS[name]
    assert of_exercise(records(student_copy(*answers))) == (status, remark)


def test_an_answer_in_a_markdown_cell_is_remarked(records):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(RIGHT)])
    told = "is not there: its cell is no code cell, and so is not run"
    assert of_exercise(records(notebook)) == ("missing", told)


def test_an_exercise_that_a_copy_never_had_is_empty(records):
    """A copy from before the exercise was added to the course; not one from which its cell was deleted."""
    notebook = student_copy()
    assert of_exercise(records(notebook)) == ("missing", RENAMED)
    notebook.cells = [c for c in notebook.cells if "Exercise 3.1" not in c.source and '"3.1"' not in c.source]
    assert of_exercise(records(notebook)) == (None, NEWER)


def test_what_the_check_was_given_is_the_answer(records):
    """Under any name: it was right there. The stub that was left alone takes nothing away."""
    mine = RIGHT.replace("dpo_loss", "mine")
    other = student_copy(STUB, mine)
    for cell in other.cells:
        cell.source = cell.source.replace('check("3.1", dpo_loss)', 'check("3.1", mine).require()')
    assert of_exercise(records(other)) == ("right", "is answered by `mine` that was given to the check")
    for cell in other.cells:
        cell.source = cell.source.replace("+ d", "- d") if cell.source == mine else cell.source
    found = records(other)
    assert of_exercise(found)[0] == "wrong"
    assert not any("error" in record for record in found), "what .require() raises is the verdict"


def test_a_right_answer_stays_right_whatever_a_later_cell_does_to_its_names(records):
    """As in the notebook, where it is checked before that cell is run."""
    answer = "def helper(u):\n    return F.softplus(-u)", RIGHT.replace("-F.logsigmoid", "helper")
    assert of_exercise(records(student_copy(*answer, added=["helper = None"]))) == ("right", None)
    late = student_copy(answer[1], added=[answer[0]])  # and one that becomes right later is right as well
    assert of_exercise(records(late)) == ("right", None)


# ------------------------------------------------------------------------- names from demonstrations


def test_names_that_a_cell_needs_and_binds():
    code = "import a\nb = a.x + c\nfor d in e: d += f\ndef g(h=i):\n    j = k\n    return [b for l in m]"
    assert names(code) == ({"c", "e", "f", "i", "k", "m"}, {"a", "b", "d", "g"})
    assert names("x = x + 1") == ({"x"}, {"x"})
    assert names("class A:\n    y = z\n    w = y") == ({"z"}, {"A"})
    assert names("%time v = u\n") == ({"get_ipython"}, set())
    assert names("this is no Python") == (set(), set())


def test_an_answer_may_use_what_a_demonstration_defines(records):
    """As it does in Jupyter; and all demonstrations up to that one are run, for they build on one another."""
    own = set(given.of_chapter("3").demonstrations)
    demonstrations = [c.source for c in student_copy().cells if given.digest(c.source) in own]
    name = sorted(names(demonstrations[0])[1] - {*"abcd", "beta"})[0]
    answer = RIGHT.replace("return ", f"return 0 * len([{name}]) ")
    notebook = student_copy(answer)
    run = [code for _, code in cells_to_run(notebook, ["3"])]
    assert demonstrations[0] in run and demonstrations[-1] not in run
    assert of_exercise(records(notebook)) == ("right", None)
    changed = student_copy(RIGHT.replace("return ", "return 0 * mine "))
    for cell in changed.cells:
        if cell.source == demonstrations[0]:
            cell.source += "\nmine = 1"
    assert of_exercise(records(changed)) == ("right", None), "a changed one is the student's"


# ------------------------------------------------------------- overwritten, borrowed, copied, old


def test_an_answer_that_overwrites_the_library_costs_itself_only(records):
    """In a cell the name is restored and remarked; while the answer is called, that is its mistake."""
    found = records(student_copy("torch.sigmoid = torch.logsumexp = None\n" + RIGHT), skipped=())
    assert of_exercise(found)[0] == "right" and "sigmoid" in torch.sigmoid.__name__
    assert [r["remark"] for r in found if "overwrites" in (r.get("remark") or "")] == [
        "overwrites torch.logsumexp, torch.sigmoid: restored"
    ]


def test_a_published_solution_is_remarked_and_counts_after_the_students_own(records):
    """A folder that has both is graded by the student's own, right or wrong."""
    notebook = build.solved_notebook(SOURCE)
    notebook.cells = [cell for cell in notebook.cells if cell.source.startswith(f"def {SECOND}(")]
    (record,) = [r for r in records(notebook, skipped=()) if r.get("item") == "3.2"]
    assert record["copied"] == bool(given.all_tasks()["3.2"].solution)
    published = Result("ada", "a.ipynb", {"3.1": "right", "3.2": "right"}, {}, [], copied=frozenset({"3.1"}))
    own = Result("ada", "b.ipynb", {"3.1": "wrong", "3.2": "wrong"}, {}, [])
    for results in ([published, own], [own, published]):
        (row,) = gradebook(results)
        assert (row["3.1"], row["3.2"], row["points"]) == (0, 1, 1)
    (row,) = gradebook([published])
    assert row["3.1"] == 2


def test_without_ipython_its_lines_do_nothing(monkeypatch):
    """As where only the package is installed."""
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("IPython"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    session = Session()
    session.execute("%matplotlib inline\nx = 1\nif x:\n    !ls\nx?\n?x\ny = x", "cell")
    assert session.namespace["y"] == 1


def test_names_are_no_formulas_in_the_csv(tmp_path):
    rows = gradebook(
        [Result(name, "", {"3.1": "right"}, {}, ["=1+1"]) for name in ("=cmd()", "@x", "-1", "Eva")]
    )
    write_csv(rows, tmp_path / "grades.csv")
    _, *rows = csv.DictReader((tmp_path / "grades.csv").read_text(encoding="utf-8").splitlines())
    assert [row["student"] for row in rows] == ["'=cmd()", "'@x", "'-1", "Eva"]
    assert all((row["remarks"], row["3.1"]) == ("'=1+1", "2") for row in rows)


def test_what_was_set_and_not_handed_in_is_zero():
    (row,) = gradebook([Result("ada", "", {"3.1": "right"}, {}, [])], ["3", "4"])
    assert (row["3.1"], row["3.2"], row["4.1"], row["5.1"], row["points"]) == (2, 0, 0, "", 2)


UNTELLABLE = "raise ValueError('\\ud800')", "class Mute(Exception):\n    __str__ = None\nraise Mute"


def test_what_cannot_be_written_does_not_end_the_grading(tmp_path, records):
    """Half of a surrogate pair in an error or in a file's name, and an error that cannot be told."""
    found = records(nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, UNTELLABLE))))
    assert [record["error"] for record in found if "error" in record] == ["ValueError: \\ud800", "Mute"]
    rows = gradebook([Result("\udce9va", "03.ipynb", {}, {}, ["no notebook"])])
    write_csv(rows, tmp_path / "grades.csv")
    assert "\\udce9va" in (tmp_path / "grades.csv").read_text(encoding="utf-8")


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
