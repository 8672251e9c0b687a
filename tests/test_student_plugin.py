"""`pytest --student answers.py`, the file of stubs that it judges, and what an answer may not do."""

import functools
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dpo_course import checks, own_work, template
from dpo_course.exercises import CHAPTERS, all_exercises, of_chapter

import dpo_minimal as dpo
from dpo_minimal import dpo_loss as under_another_name
from notebooks import build

ANSWERS = """
import torch
import torch.nn.functional as F
from dpo_minimal import kl_divergence as kl  # the library's: no answer

def dpo_loss(a, b, c, d, beta):
    return -F.logsigmoid(beta * (a - b))

def optimal_logps(ref, rewards, beta):
    return (ref + rewards / beta).log_softmax(-1)

def gradient_weights(*arguments):
    raise NotImplementedError
"""


def run(folder, *arguments):
    """(exit code, output) of pytest in this folder, without what the project's own configuration says."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "dpo_course.plugin",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_one_test_for_each_exercise_that_the_file_defines(tmp_path):
    """With the verdict's message for a failure and nothing of ours around it, and no other test; also on
    several processes and beside the collector of docstrings, as this project's own configuration has it."""
    (tmp_path / "answers.py").write_text(ANSWERS)
    (tmp_path / "test_other.py").write_text("def test_other(): assert False")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --doctest-modules -n 2\nfilterwarnings = error\n"
    )
    code, output = run(tmp_path, "--student", "answers.py", "-rs")
    assert code == 1 and "1 failed, 1 passed, 1 skipped" in output, output
    assert "Exercise 3.1 dpo_loss" in output and "answers.py:12: not solved yet" in output
    message = checks.judge("3.1", lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - b))).message
    assert message in output and "looks like      the reference is missing" in message
    assert "plugin.py" not in output and "Traceback" not in output and "test_other" not in output


@pytest.mark.slow
def test_what_cannot_be_imported_is_one_sentence(tmp_path):
    (tmp_path / "answers.py").write_text("x = 1\n\n1 / 0\n")
    code, output = run(tmp_path, "--student", "answers.py")
    assert code == 2 and "answers.py, line 3: ZeroDivisionError: division by zero" in output
    assert "plugin.py" not in output
    code, output = run(tmp_path, "--student", "missing.py")
    assert code == 4 and "--student missing.py: give a Python file" in output


def test_the_plugin_costs_other_projects_nothing():
    """It is loaded wherever the package is installed: torch is not."""
    code = "import sys, dpo_course.plugin; assert not {'torch', 'dpo_minimal'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- the stubs


def test_the_template_has_every_stub_and_its_text():
    """Of one notebook, or of all; it can be imported, and nothing in it is solved."""
    text = template.template(list(CHAPTERS))
    namespace = {"__name__": "answers"}
    exec(compile(text, "answers.py", "exec"), namespace)
    for number, exercise in all_exercises().items():
        function = namespace[exercise.function]
        assert f"Exercise {number}: " in function.__doc__
        with pytest.raises(NotImplementedError):
            function(*inspect.signature(function).parameters)
    one = template.template(["3"])
    assert "def dpo_loss(policy_chosen, " in one and "optimal_logps" not in one and "matplotlib" not in one
    assert "SOLUTION" not in text and max(map(len, text.splitlines())) <= 110


def test_the_template_brings_what_an_answer_builds_on():
    """The exhibits that notebook 9 asks to repair."""
    assert "def exhibit_a(token_logps, scored):" in template.template(["9"])


def test_the_template_is_not_written_over(tmp_path, capsys):
    output = tmp_path / "answers.py"
    assert template.main(["3", "--output", str(output)]) == 0
    assert f"pytest --student {output}" in capsys.readouterr().out and "dpo_loss" in output.read_text()
    for arguments, told in (
        (["3", "--output", str(output)], "exists; --force replaces it"),
        (["3", "--output", str(tmp_path / "x.txt")], "must end in .py"),
        (["12"], "no notebook 12; there are 1, 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            template.main(arguments)
        assert stop.value.code == 2 and told in capsys.readouterr().err


# ------------------------------------------------------------------------------------- own work


def loss(a, b, c, d, beta):
    return -F.logsigmoid(beta * (a - c - b + d))


def borrowed(a, b, c, d, beta):
    return dpo.dpo_loss(a, b, c, d, beta=beta).losses


def borrowed_under_another_name(a, b, c, d, beta):
    return under_another_name(a[None], b[None], c[None].clone(), d.view(1, -1), beta=beta)[0][0]


def borrowed_weights(a, b, c, d, beta):
    return dpo.dpo_loss(a, b, c, d, beta=beta).gradient_weights


def borrowed_oracle(*given):
    return all_exercises()["3.1"].expected(*given)


def built_on_the_library(ref, rewards, beta):
    return ref + rewards / beta - dpo.soft_value(ref, rewards, beta=beta)[:, None] / beta


@pytest.mark.parametrize(
    ("number", "answer", "lender"),
    [
        ("3.1", borrowed, "dpo_loss"),
        ("3.1", borrowed_under_another_name, "dpo_loss"),
        ("4.1", borrowed_weights, "dpo_loss"),
        ("3.1", borrowed_oracle, "minus_log_odds_share"),
        ("3.1", loss, None),
        ("2.3", built_on_the_library, None),
        ("3.2", lambda logps, ref, beta: dpo.preference_matrix(beta * (logps - ref)), None),
    ],
)
def test_a_call_of_the_librarys_own_function_is_no_answer(number, answer, lender):
    """Under any name, with any field, and the check's own function neither. To build on the library is none
    of these."""
    verdict = checks.judge(number, answer)
    told = f"the library's `{lender}` does the work; write it without that call"
    assert (verdict.status, verdict.mistake) == (("wrong", told) if lender else ("right", None))
    assert lender is None or told in verdict.message


@pytest.mark.slow  # as the experiments among them are
@pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)
def test_no_published_solution_is_taken_for_a_call(source):
    """Some use the library, as their exercises ask."""
    namespace = {}
    for cell in build.solved_notebook(source).cells:
        if {"setup", "exercise"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    for number, exercise in of_chapter(source.stem.split("_")[0].lstrip("0")).items():
        assert own_work.lender(exercise, namespace[exercise.function]) is None, number


def test_an_answer_that_overwrites_the_library_is_told_and_costs_no_other():
    def overwriting(*given):
        torch.sigmoid = F.logsigmoid = torch.Tensor.exp = lambda t: t  # the last one is inherited
        return -F.logsigmoid(given[0])

    before = torch.sigmoid, F.logsigmoid, torch.Tensor.exp
    verdict = checks.judge("3.1", overwriting)
    assert verdict.status == "wrong"
    for name in ("torch.sigmoid", "Tensor.exp", "torch.nn.functional.logsigmoid"):
        assert name in verdict.message
    assert (torch.sigmoid, F.logsigmoid, torch.Tensor.exp) == before
    assert checks.judge("3.1", loss).status == "right"


def test_what_torch_overwrites_itself_is_nobodys_fault(monkeypatch):
    """When it loads its compiler, as an optimizer does, it wraps some functions of its own."""
    library = own_work.Library()

    @functools.wraps(torch.manual_seed)
    def wrapped(seed):
        return seed

    monkeypatch.setattr(torch, "manual_seed", wrapped)
    assert library.restore() == [] and torch.manual_seed is wrapped
