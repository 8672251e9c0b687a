"""The course's notebooks: what is written matches its source, keeps to the pattern, and runs."""

import ast
import functools
import html
import re

import nbformat
import pytest

from notebooks import build

SOURCES = build.sources()
NAMES = [source.stem for source in SOURCES]
by_notebook = pytest.mark.parametrize("source", SOURCES, ids=NAMES)
# Built or read once for all tests, which change nothing; what is executed is built anew.
student_notebook, solved_notebook = (
    functools.cache(build.student_notebook),
    functools.cache(build.solved_notebook),
)


@functools.cache
def kept(path):
    """The notebook of this file."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """(alternative text, output) of each picture that a cell has drawn."""
    return [
        (html.unescape(alt), output)
        for output in cell.outputs
        for alt in re.findall(
            r'<img alt="([^"]*)" src="data:image/png;base64,', output.get("data", {}).get("text/html", "")
        )
    ]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# ------------------------------------------------------------------------------- from source to notebooks


def test_solutions_become_stubs():
    code = "def f(x):\n    ### BEGIN SOLUTION\n    y = x\n    return y\n    ### END SOLUTION\n"
    assert build.stub(code) == "def f(x):\n    raise NotImplementedError  # your code"
    assert build.solution(code) == "def f(x):\n    y = x\n    return y"


def test_a_derivation_opens_below_the_first_cell_that_names_it(tmp_path):
    """Once each; below the header what only the header names; without code, and without links to files."""
    source = tmp_path / "01_x.py"
    cells = ("# 1 · X: [D2.4], [D4.4], [D3.3]", "by [D3.3], [D4.4] and [D3.3](x)", "again [D4.4]", "[D12.1]")
    tags = ("", "", "", ' tags=["answer"]')
    source.write_text("\n".join(f"# %% [markdown]{tag}\n# {text}" for tag, text in zip(tags, cells)))
    for notebook in (build.student_notebook(source), build.solved_notebook(source)):
        below = [place for place, cell in enumerate(notebook.cells) if "tags" in cell.metadata][:2]
        assert below == [1, 3]
        header, second = (notebook.cells[place].source for place in below)
        assert re.findall(r"<summary>(.*?)</summary>", header) == ["Derivation of D2.4: Why the exponential"]
        assert re.findall(r"<summary>Derivation of (D[\d.]+)", second) == ["D3.3", "D4.4"]
        assert "E8 counts that among the errata" in header
        assert r"E_\pi\Big[\log\frac{\pi(y)}{\frac1Z\pi_{\rm ref}(y)e^{r(y)/\beta}}-\log Z\Big]" in second
        assert "```" not in header + second and "shows(" not in header + second
        assert "## " not in header + second and "]: " not in header + second
    source.write_text("# %% [markdown]\n# [D9.9]")
    with pytest.raises(ValueError, match=r"no section D9\.9"):
        build.student_notebook(source)


@by_notebook
def test_no_notebook_needs_another_file(source):
    """A relative link is dead in a notebook that stands alone, on GitHub, and above JupyterLab's folder."""
    for notebook in (student_notebook(source), solved_notebook(source)):
        links = re.findall(r"\]\(([^)\s]*)\)", prose(notebook))
        assert all(link.startswith("https://") for link in links if "\\" not in link), links


def test_eleven_notebooks():
    assert [name.split("_")[0] for name in NAMES] == [f"{n:02}" for n in range(1, 12)]


@by_notebook
def test_no_copy_is_stale(source):
    """`python -m notebooks.build` has been run since the source was changed."""
    told = "run `python -m notebooks.build`"
    assert not build.is_stale(build.student_path(source), student_notebook(source)), told
    assert not build.is_stale(build.solved_path(source), solved_notebook(source)), told


def test_a_stale_copy_is_noticed(tmp_path):
    notebook = student_notebook(SOURCES[0])
    path = tmp_path / "notebook.ipynb"
    assert build.is_stale(path, notebook)
    build.write(notebook, path)
    assert not build.is_stale(path, notebook)
    for change in (
        lambda copy: copy.cells[-1].update(source="other"),
        lambda copy: copy.cells.pop(),
        lambda copy: copy.cells[1].metadata.update(tags=[]),
    ):
        copy = nbformat.read(path, as_version=4)
        change(copy)
        build.write(copy, tmp_path / "changed.ipynb")
        assert build.is_stale(tmp_path / "changed.ipynb", notebook)


def test_the_command_refuses_what_it_does_not_know(capsys):
    for arguments, told in (
        (["12"], "no notebook 12"),
        (["--check", "--force"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit) as stop:
            build.main(arguments)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_a_forced_build_that_fails_leaves_the_old_notebook(monkeypatch, tmp_path, capsys):
    """What was executed before is not lost to a cell that fails now."""

    def fails(*_):
        raise build.CellExecutionError("cell", "Error", "in a cell")

    path = tmp_path / "solved.ipynb"
    path.write_text("the old one")
    monkeypatch.setattr(build, "execute", fails)
    monkeypatch.setattr(build, "solved_path", lambda _: path)
    assert build.main(["3", "--force"]) == 1
    assert path.read_text() == "the old one"
    assert "a cell failed" in capsys.readouterr().err


def test_outputs_are_kept_while_the_code_is_the_same(monkeypatch, tmp_path):
    """A word changed in the prose executes nothing; a letter changed in the code, or --force, does."""
    executed = []
    monkeypatch.setattr(build, "execute", lambda *_: executed.append(1) or 1.0)
    monkeypatch.setattr(build, "student_path", lambda _: tmp_path / "student.ipynb")
    monkeypatch.setattr(build, "solved_path", lambda _: tmp_path / "solved.ipynb")
    monkeypatch.setattr(build.given, "is_stale", lambda _: False)
    source, text = tmp_path / "01_x.py", "# %% [markdown]\n# words\n\n# %%\nprint(1)\n"
    source.write_text(text)
    build.build(source)
    first = nbformat.read(tmp_path / "solved.ipynb", as_version=4)
    first.cells[1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    build.write(first, tmp_path / "solved.ipynb")
    source.write_text(text.replace("words", "other words"))
    assert build.build(source) == "student's written, solved written, its code unchanged"
    second = nbformat.read(tmp_path / "solved.ipynb", as_version=4)
    assert second.cells[0].source == "other words" and second.cells[1].outputs == first.cells[1].outputs
    assert len(executed) == 1
    build.build(source, force=True)
    source.write_text(text.replace("print(1)", "print(2)"))
    build.build(source)
    assert len(executed) == 3


# --------------------------------------------------------------------------------------------- the pattern


@by_notebook
def test_the_header(source):
    """Claim, prerequisites, minutes, difficulty, and sections of derivations.md; 20 to 60 minutes in all."""
    header = student_notebook(source).cells[0].source
    assert re.match(rf"# {int(source.stem[:2])} · ", header)
    for part in ("**Before this:**", "**Difficulty:**", "**Derivations:** [D", "**The claim.**"):
        assert part in header
    read, solve = (int(re.search(rf"\*\*{word}:\*\* (\d+) minutes", header)[1]) for word in ("Read", "Solve"))
    assert 20 <= read + solve <= 60
    assert len(re.search(r"[●○]+", header)[0]) == 3


@by_notebook
def test_a_figure_by_the_third_code_cell(source):
    cells = code_cells(kept(build.solved_path(source)))
    drawn = [bool(pictures(cell)) for cell in cells]
    assert any(drawn[:3])
    assert sum(drawn) >= 3


@by_notebook
def test_every_figure_is_described(source):
    """For those who cannot see it: as alternative text, and instead of the picture where none is shown.
    Each picture stands in the file once."""
    from dpo_course import figures

    described = set(figures.descriptions().values())
    for cell in code_cells(kept(build.solved_path(source))):
        for alternative, output in pictures(cell):
            assert len(alternative) > 20 and alternative in described
            assert output.data["text/plain"] == alternative
        assert not any("image/png" in output.get("data", {}) for output in cell.outputs)


@by_notebook
def test_cells_are_short(source):
    """At most twelve lines of code, not counting blank lines, comments and docstrings."""
    for cell in code_cells(solved_notebook(source)):
        if "setup" not in cell.metadata.get("tags", []):
            assert lines_of_code(cell.source) <= 12, cell.source


def lines_of_code(code):
    tree = ast.parse(code)
    documented = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))]
    skipped = set()
    for node in documented:
        if ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(code.split("\n"), start=1)
    return sum(
        1 for n, line in lines if n not in skipped and line.strip() and not line.lstrip().startswith("#")
    )


def test_lines_of_code_are_counted():
    assert lines_of_code('def f():\n    """Two\n    lines."""\n    # why\n\n    return 1  # here\n') == 2


@by_notebook
def test_the_pattern(source):
    """Equations with tags, a prediction for every answer, exercises with their check, one open question."""
    student, solved = student_notebook(source), solved_notebook(source)
    text = prose(student)
    assert text.count("$$") >= 2 and tagged(student, "derivation")
    assert text.count("**Predict before you run.**") >= 2
    assert len(re.findall(r"^## An open question$", text, re.MULTILINE)) == 1
    exercises, checks = tagged(student, "exercise"), tagged(student, "check")
    headings = re.findall(r"^### Exercise (\d+\.\d): ", text, re.MULTILINE)
    assert headings == [re.search(r'check\("(\d+\.\d)"', cell.source)[1] for cell in checks]
    assert len(headings) == len(exercises) >= 3
    assert all("raise NotImplementedError" in cell.source for cell in exercises)
    assert not tagged(student, "answer") and tagged(solved, "outcome")
    assert len(tagged(student, "prediction")) == text.count("**Predict before you run.**")
    assert all(cell.source.startswith("<details>") for cell in tagged(student, "outcome"))
    assert not re.search(r"!\[|<img", text), "equations and figures are not pasted pictures"


@by_notebook
def test_no_cell_needs_or_hides_a_students_answer(source):
    """A notebook runs with nothing solved; and a plot's variable must not take the place of a function."""
    solved = solved_notebook(source)
    answers = {re.match(r"def (\w+)", cell.source)[1] for cell in tagged(solved, "exercise")}
    for cell in code_cells(solved):
        if not {"exercise", "check"} & set(cell.metadata.get("tags", [])):
            names = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
            assert not names & answers, cell.source


@by_notebook
def test_students_do_not_find_the_solutions(source):
    """No line of a solution is left in the student's notebook, nor any output."""
    student, solved = student_notebook(source), solved_notebook(source)
    for stub, answer in zip(tagged(student, "exercise"), tagged(solved, "exercise")):
        kept = [line for line in answer.source.split("\n") if line in stub.source.split("\n")]
        assert all(line.lstrip().startswith(("def ", '"""')) or not line.strip() for line in kept)
        assert "SOLUTION" not in stub.source + answer.source
        assert "return" not in stub.source
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(student))


@by_notebook
def test_solved_notebooks_were_executed_in_order_and_without_error(source):
    cells = code_cells(kept(build.solved_path(source)))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs)
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
        if "check" in cell.metadata.get("tags", []):
            assert ": right." in cell.outputs[0].text


# ----------------------------------------------------------------------------------- slow: they are executed


@pytest.mark.slow
@by_notebook
def test_solved_notebooks_run_in_time_and_say_the_same_again(source, tmp_path_factory, testrun_uid):
    """At most 90 s each and six minutes together, on two cores; every number in their text comes back."""
    kept, fresh = nbformat.read(build.solved_path(source), as_version=4), build.solved_notebook(source)
    seconds = build.execute(fresh, build.solved_path(source).parent)
    for before, after in zip(code_cells(kept), code_cells(fresh)):
        assert_same_text(text_of(before), text_of(after))
    shared = tmp_path_factory.getbasetemp().parent / f"seconds-{testrun_uid}"  # by all workers of this run
    shared.mkdir(exist_ok=True)
    (shared / source.stem).write_text(str(seconds))
    assert seconds <= 90
    together = {path.name: float(path.read_text()) for path in shared.iterdir()}  # the last one sees all
    assert sum(together.values()) <= 360, together


def text_of(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def assert_same_text(before, after):
    """The same words, and numbers within 2 %, for other processors round otherwise; what is below 1e-3 is
    rounding, optimisation error or a p-value, and may differ tenfold."""
    number = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    assert re.sub(number, "#", before) == re.sub(number, "#", after)
    for left, right in zip(re.findall(number, before), re.findall(number, after)):
        left, right = float(left), float(right)
        allowed = 0.02 * abs(left) if abs(left) >= 1e-3 else 10 * abs(left) + 1e-12
        assert abs(left - right) <= allowed, f"{left} has become {right}\n{before}\n{after}"


# ------------------------------------------------------------------------------------------------ figures


def test_figures_without_labels_or_description_are_refused(monkeypatch):
    import matplotlib.pyplot as plt
    from dpo_course import figures

    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, **_: shown.append(bundle))
    monkeypatch.setattr(figures, "descriptions", lambda: {"1.a": "a line", "1.b": " "})
    figure, axes = plt.subplots()
    with pytest.raises(ValueError, match="needs a label"):
        figures.show(figure, "1.a")
    axes.set(xlabel="step")
    with pytest.raises(ValueError, match="needs a label"):
        figures.show(figure, "1.a")
    axes.set(ylabel="loss (nats)")
    with pytest.raises(ValueError, match="describe figure"):
        figures.show(figure, "1.b")
    figures.show(figure, "1.a")
    assert shown[0]["text/plain"] == "a line"
    assert shown[0]["text/html"].startswith('<img alt="a line" src="data:image/png;base64,iVBOR')


def test_rows_and_groups_are_drawn_as_they_are():
    import matplotlib.pyplot as plt
    from dpo_course import figures
    from matplotlib.colors import to_hex

    figure, axes = plt.subplots()
    figures.rows_of_words(axes, ["abcd", "efgh"], prompts=[1, 2], lengths=[4, 3])
    boxes = [to_hex(box.get_facecolor(), keep_alpha=False) for box in axes.patches]
    grey, sky, white = to_hex("0.88"), figures.SKY.lower(), "#ffffff"
    assert boxes == [grey, sky, sky, sky, grey, grey, sky, white]
    assert [text.get_text() for text in axes.texts] == [*"abcd", *"efg"], "padding has no word"
    plt.close(figure)

    figure, axes = plt.subplots()
    figures.bars_side_by_side(
        axes, ["x", "y"], {"a": [1.0, 2.0], "b": [3.0, 4.0]}, ["red", "blue"], fmt="%.1f"
    )
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 3, 4]
    places = [round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches]
    assert places == [0, 1, 0, 1] and axes.patches[0].get_x() < axes.patches[2].get_x()
    assert [text.get_text() for text in axes.texts] == ["1.0", "2.0", "3.0", "4.0"]
    plt.close(figure)


def test_the_slider_is_an_extra(monkeypatch, capsys):
    """Without ipywidgets, or where outputs are kept, it says what would stand there, and draws nothing."""
    from dpo_course import figures

    monkeypatch.setenv("COURSE_STATIC", "1")
    figures.slide(lambda value: pytest.fail("drawn"), [1.0, 2.0], "β", "bars")
    assert capsys.readouterr().out == "With ipywidgets installed, a slider for β stands here.\n"


# ----------------------------------------------------------------------------------------------- notebook 9


def test_the_exhibits_on_show_are_those_that_are_tested():
    """Notebook 9 shows the very code that its checks examine."""

    def exhibits(code):
        functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        return {
            f.name: ast.dump(ast.Module(_bare(f), [])) for f in functions if f.name.startswith("exhibit_")
        }

    def _bare(function):
        return function.body[1:] if ast.get_docstring(function) is not None else function.body

    notebook = student_notebook(SOURCES[8])
    python = [cell for cell in code_cells(notebook) if "install" not in cell.metadata.get("tags", [])]
    shown = exhibits("\n\n".join(cell.source for cell in python))
    tested = exhibits(
        (build.FOLDER / "dpo_course" / "exercises" / "what_goes_wrong.py").read_text(encoding="utf-8")
    )
    assert len(shown) == 6
    assert shown == tested


def test_the_readmes_tables_are_those_of_the_sources():
    """The syllabus, and which equation is where."""
    readme = build.syllabus.README.read_text(encoding="utf-8")
    assert readme == build.syllabus.filled_in(readme, SOURCES), "run `python -m notebooks.build`"
    table = build.syllabus.equations_table(SOURCES)
    for equation in (1, 2, 3, 4, 5, 6, 7, 8, 10, 18, 19, 20, 21):
        assert re.search(rf"^\| [^|]*\b{equation}\b", table, re.MULTILINE), f"no notebook has Eq. {equation}"


def test_the_readmes_show_what_a_check_says():
    """Those of the course and of the engine behind it quote a refusal; it is the real one."""
    import torch
    from dpo_course.checks import judge

    def loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        margin = beta * (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
        return -torch.nn.functional.logsigmoid(margin)

    message = judge("3.1", loss).message
    for readme in (build.FOLDER / "README.md", build.FOLDER.parent / "dpo_minimal" / "bench" / "README.md"):
        assert message in readme.read_text(encoding="utf-8")
