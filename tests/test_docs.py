"""The README and those of the annexes say what the code does: commands parse, the map is complete, links lead
somewhere, values are printed."""

import re
import shlex
from pathlib import Path

import pytest
from test_house import ANNEXES, PACKAGE

from dpo_minimal.__main__ import COMMANDS, _parser, main
from dpo_minimal.bench.card import verdict
from dpo_minimal.bench.measures import endings, invariances
from dpo_minimal.bench.subject import Subject

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "runs", ".pytest_cache", ".ipynb_checkpoints"} & set(path.parts)
)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.parametrize(
    ("document", "name"), [(ROOT / "README.md", "my_loss"), (PACKAGE / "bench" / "README.md", "focal")]
)
def test_the_verdicts_quoted_are_those_of_the_whole_card(document, name):
    """Of the loss that the document shows: where it ends in all worlds, in the words of the card."""
    text = document.read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {name}(" in b)
    found: dict = {}
    exec(block, found)
    subject = Subject(found[name], (), None)
    findings = invariances(subject) | endings(subject, reads_batch=False, quick=False)
    quoted = " ".join(re.search(r"```\n(ends .*?)```", text, re.DOTALL)[1].split())
    assert quoted == verdict(findings, subject.options)


def commands_of(document: Path) -> list[str]:
    """What a document shows after `python -m dpo_minimal`, a line each."""
    shown = r"^(?:pip install .* && )?python -m dpo_minimal(?: (.*))?$"
    return re.findall(shown, document.read_text(encoding="utf-8"), re.MULTILINE)


@each_document
def test_commands_parse(document):
    """Every option that a document shows is one that the command line takes."""
    for line in commands_of(document):
        words = shlex.split(line, comments=True)
        if "--help" not in words:
            _parser().parse_args(words if words and words[0] in COMMANDS else ["bandit", *words])


def test_the_documents_show_every_command():
    """Each command stands in some document as it is typed; so none of the lines above went unseen."""
    shown = {(line.split() or ["bandit"])[0] for document in DOCUMENTS for line in commands_of(document)}
    assert set(COMMANDS) <= shown


def test_the_map_is_complete():
    """Every file of the book, and every annex with a README of its own."""
    for path in PACKAGE.glob("*.py"):
        if path.name not in ("__init__.py", "__main__.py", "version.py"):
            assert f"`{path.name}`" in README, f"README.md's map lacks {path.name}"
    for annex in ANNEXES:
        assert f"`{annex}/`" in README, f"README.md's map lacks {annex}/"
        assert (PACKAGE / annex / "README.md").exists(), f"{annex}/ has no README.md"


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    headings = [re.sub("<[^>]*>", "", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document):
    """Files exist, and anchors are headings of the document they point into."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text)
    defined = re.findall(r"^\[[^\]]+\]: (?!http)([^#\s]*)#?(\S*)$", text, re.MULTILINE)
    for path, anchor in inline + defined:
        target = document.parent / path if path else document
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


@each_document
def test_no_table_cell_is_a_paragraph(document):
    """At most 40 words a cell: a table is looked up, not read."""
    for line in document.read_text(encoding="utf-8").splitlines():
        for cell in line.split("|") if line.startswith("|") else []:
            assert len(cell.split()) <= 40, cell


@pytest.mark.slow
def test_the_statistics_quoted_are_those_of_the_default_run(tmp_path, capsys):
    """The excerpt in laws/README.md: each row's theory and last column, digit by digit."""
    assert main(["statistics", "--output-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out.split("\n")
    text = (PACKAGE / "laws" / "README.md").read_text(encoding="utf-8")
    excerpt = text.split("## What `statistics` finds")[1].split("```")[3].strip("\n").split("\n")
    assert len(excerpt) == 6
    for row in excerpt[1:]:
        label, theory, value = re.split(r"\s{2,}", row)
        found = [re.split(r"\s{2,}", line) for line in printed if line.startswith(label)]
        assert [(cells[1], cells[-1]) for cells in found] == [(theory, value)], label
