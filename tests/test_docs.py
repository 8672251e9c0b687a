"""The README says what the code does: its commands parse, its map is complete, its values are printed."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from dpo_minimal.__main__ import COMMANDS, _parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_example_prints_what_it_shows():
    """The numbers in the README's comments are the ones its code prints."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "dpo_loss" in b)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    shown = [float(n) for line in re.findall(r"# (tensor.*)", block) for n in re.findall(r"[\d.]*\d", line)]
    values = [float(n) for n in re.findall(r"[\d.]*\d", printed.getvalue())]
    assert len(shown) == 5
    assert values == pytest.approx(shown, abs=1.01e-4)  # one unit of the last printed digit


def test_readme_commands_parse():
    """Every option that the README shows is one that the command line takes."""
    lines = re.findall(r"^python -m dpo_minimal (.*)$", README, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)
        if "--help" not in words:
            _parser().parse_args(words if words[0] in COMMANDS else ["bandit", *words])


def test_readme_map_names_every_file():
    """The map of files is complete."""
    package = ROOT / "dpo_minimal"
    for path in package.glob("*.py"):
        if path.name not in ("__init__.py", "__main__.py", "version.py"):
            assert path.name in README, f"README.md's map lacks {path.name}"


def test_readme_links_lead_somewhere():
    """Files exist, and anchors are headings of the document they point into."""
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", README):
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path}#{anchor}"


@pytest.mark.slow
def test_readme_statistics_are_those_of_the_default_run(tmp_path, capsys):
    """The excerpt of the statistics table: each row's theory and last column, digit by digit."""
    assert main(["statistics", "--output-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out.split("\n")
    excerpt = README.split("## What finite data determine")[1].split("```")[1].strip("\n").split("\n")
    for row in excerpt[1:]:
        label, theory, value = re.split(r"\s{2,}", row)
        found = [re.split(r"\s{2,}", line) for line in printed if line.startswith(label)]
        assert [(cells[1], cells[-1]) for cells in found] == [(theory, value)], label
