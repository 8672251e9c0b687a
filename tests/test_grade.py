"""The grader: points, named mistakes, and submissions that loop, print without end, raise or exit."""

import contextlib
import copy
import csv
import json
import re
import sys

import nbformat
import pytest
from dpo_course import checks
from dpo_course.examine import Session, cells_to_run, chapter_of, code_cells, examine, read
from dpo_course.exercises import all_exercises, of_chapter
from dpo_course.grade import Result, grade, gradebook, main, submissions, summary, write_csv

from dpo_minimal.bench.checks import Verdict, complain
from dpo_minimal.bench.exercises import samples
from notebooks import build

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
    bob.write_text(bob.read_text(encoding="utf-8").replace("def implied_", "def my_implied_"), "utf-8")
    output = tmp_path / "grades.csv"
    assert main([str(tmp_path / "in"), "--output", str(output)]) == 0
    ada, bob = csv.DictReader(output.read_text(encoding="utf-8").splitlines())
    assert (ada["student"], ada["3.1"], ada["3.2"], ada["3.3"], ada["1.1"]) == ("ada", "2", "1", "0", "")
    assert (ada["points"], ada["remarks"]) == ("3", "")
    assert (bob["3.1"], bob["points"]) == ("0", "0") and "the reference is missing" in bob["remarks"]
    renamed = "the cell was deleted or the function renamed; there is `my_implied_preferences`"
    assert bob["remarks"].endswith(f"3.2 is not there: {renamed}")
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
    notebook = build.student_notebook(SOURCE)
    cells = cells_to_run(notebook, "3")
    assert len(cells) == 1 + len(of_chapter("3")) and cells[0][0] == 2 and "import torch" in cells[0][1]
    notebook.cells.insert(4, nbformat.v4.new_code_cell("helper = 1"))
    assert (3, "helper = 1") in cells_to_run(notebook, "3")


def test_a_notebook_of_two_digits_is_known(tmp_path):
    """By its metadata and by its file's name."""
    notebook = build.student_notebook(build.sources()[9])
    assert chapter_of(tmp_path / "mine.ipynb", notebook) == "10"
    assert chapter_of(tmp_path / "10_your_own_loss.ipynb", {"metadata": {}}) == "10"
    assert len(cells_to_run(notebook, "10")) == 1 + len(of_chapter("10"))


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
    expected = [([], "if 1:\n    a = '%'"), ([], "")]
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
RENAMED = "is not there: the cell was deleted or the function renamed"
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


def examined(notebook, tmp_path, monkeypatch):
    """The record of exercise 3.1, judged by a few draws."""

    def judge(number, function):
        exercise = checks.find_exercise(number)
        try:
            wrong = any(complain(exercise, function, given) for given in samples(exercise.inputs))
        except NotImplementedError:
            return Verdict("not solved yet", "")
        return Verdict("wrong" if wrong else "right", "")

    monkeypatch.setattr(checks, "judge", judge)
    path, report = tmp_path / "03_dpo.ipynb", tmp_path / "report.jsonl"
    nbformat.write(notebook, path)
    examine(path, report, {"3.2", "3.3", "3.4"})
    records = map(json.loads, report.read_text(encoding="utf-8").splitlines())
    (record,) = (record for record in records if "status" in record)
    return record["status"], record["remark"]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_odd_answer_is_remarked_and_costs_no_more_than_its_mistake(name, tmp_path, monkeypatch):
    cells, status, remark = ANSWERS[name]
    setup = [c for c in build.student_notebook(SOURCE).cells if "setup" in c.metadata.get("tags", [])]
    notebook = nbformat.v4.new_notebook(cells=setup)
    notebook.cells += map(nbformat.v4.new_code_cell, cells)
    assert examined(notebook, tmp_path, monkeypatch) == (status, remark)


def test_an_answer_in_a_markdown_cell_is_remarked(tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(RIGHT)])
    status, remark = examined(notebook, tmp_path, monkeypatch)
    assert (status, remark) == ("missing", "is not there: its cell is no code cell, and so is not run")


UNTELLABLE = "raise ValueError('\\ud800')", "class Mute(Exception):\n    __str__ = None\nraise Mute"


def test_what_cannot_be_written_does_not_end_the_grading(tmp_path, monkeypatch):
    """Half of a surrogate pair in an error or in a file's name, and an error that cannot be told."""
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, UNTELLABLE)))
    assert examined(notebook, tmp_path, monkeypatch) == ("missing", RENAMED)
    report = (tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()
    errors = [json.loads(line)["error"] for line in report if "error" in line]
    assert errors == ["ValueError: \\ud800", "Mute"]
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
