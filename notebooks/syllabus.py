"""The project's address, where each result of the derivations stands, and the two tables of README.md.

The tables are read off the notebooks' sources and the derivations' indices, so that they cannot disagree.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
README = FOLDER / "README.md"
# Chapters 0 to 9, and 10 to 14 beside the code that they are about.
DOCUMENTS = tuple(
    ROOT / path
    for path in (
        "derivations.md",
        "dpo_minimal/rivals/README.md",
        "dpo_minimal/laws/README.md",
        "dpo_minimal/zoo/README.md",
        "notebooks/what-goes-wrong.md",
        "notebooks/errata.md",
    )
)
# The anchor stands in the heading because JupyterLab's own ids are not GitHub's.
HEADING = re.compile(r'^### <a id="([^"]*)"></a>(D\d+\.\d+) (.*)$', re.MULTILINE)
NEXT = re.compile(r"^###? |^\[D\d+\.\d+\]: ", re.MULTILINE)  # where a section ends
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)  # in it a comment looks like a heading


class Header(NamedTuple):
    """What a source says about itself: its title, and the parts of its second line, by name."""

    title: str
    parts: dict[str, str]


class Section(NamedTuple):
    """Where a tag such as D3.4 leads: document, anchor, title; and its text as the document has it."""

    document: Path
    anchor: str
    title: str
    text: str

    def link(self, folder: Path) -> str:
        """The link from a document in this folder."""
        return f"{Path(os.path.relpath(self.document, folder)).as_posix()}#{self.anchor}"


@functools.cache  # a notebook asks for every cell of prose
def sections() -> dict[str, Section]:
    """Tag -> its section, over all documents."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for heading in HEADING.finditer(text):
            anchor, tag, title = heading.groups()
            rest = text[heading.end() :]
            end = NEXT.search(CODE.sub(lambda block: " " * len(block[0]), rest))
            found[tag] = Section(document, anchor, title, rest[: end.start() if end else None].strip())
    return found


def without_code(text: str) -> str:
    """The words and equations of a document: its blocks of code left out."""
    return re.sub(r"\n{3,}", "\n\n", CODE.sub("", text)).strip()


@functools.cache
def repository() -> str:
    """The project's address, without a slash at its end. It stands in pyproject.toml and nowhere else.

    Raises:
        ValueError: it is not on GitHub, from where alone Colab opens notebooks.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    if not re.fullmatch(r"https://github\.com/[^/\s]+/[^/\s]+", address):
        raise ValueError(
            f"pyproject.toml: Repository = {address!r} should read https://github.com/OWNER/NAME, of which "
            "badges and links are made."
        )
    return address


def requirement() -> str:
    """What pip installs in a place without the clone."""
    return f"dpo-minimal[course] @ git+{repository()}"


def address(path: Path) -> str:
    """Where a file of the project can be read without the clone."""
    return f"{repository()}/blob/main/{path.relative_to(ROOT).as_posix()}"


def badge(path: Path) -> str:
    """The picture that opens a notebook in Colab."""
    colab = "https://colab.research.google.com"
    place = address(path).removeprefix("https://github.com")
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github{place})"


def header(source: Path) -> Header:
    """The header of a notebook's source."""
    text = source.read_text(encoding="utf-8")
    title = re.search(r"^# # \d+ · (.*)$", text, re.MULTILINE)[1]
    line = re.search(r"^# \*\*Before this:\*\*.*(?:\n# \*\*.*)*", text, re.MULTILINE)[0]
    parts = re.findall(r"\*\*([\w ]+):\*\* (.*?)(?= · |$)", line.replace("\n# ", " "))
    return Header(title, dict(parts))


def with_solution(title: str, source: Path) -> str:
    """The student's notebook, the solved one, and Colab."""
    notebook = FOLDER / f"{source.stem}.ipynb"
    return f"[{title}]({notebook.name}) ([solved](solutions/{notebook.name})) {badge(notebook)}"


def syllabus_table(sources: list[Path], links: Callable[[str, Path], str] = with_solution) -> str:
    """One row a notebook.

    Args:
        links: from "3 Direct Preference Optimization" and the source to what stands in the first column.
    """
    rows = [
        "| notebook | before it | minutes to read, to solve | difficulty | exercises |",
        "|---|---|---|---|---|",
    ]
    for source in sources:
        title, parts = header(source)
        number = int(source.stem.split("_")[0])
        exercises = re.findall(
            r"^# ### Exercise ([\d.]+: .*)$", source.read_text(encoding="utf-8"), re.MULTILINE
        )
        minutes = ", ".join(parts[name].split()[0] for name in ("Read", "Solve"))
        files = links(f"{number} {title}", source)
        before = re.split(r",? or what ", parts["Before this"])[0]
        titles = "; ".join(exercises).replace("|", "\\|")  # of π(y|x), which would end the table's cell
        rows.append(f"| {files} | {before} | {minutes} | {parts['Difficulty']} | {titles} |")
    return "\n".join(rows)


def equations_table(sources: list[Path]) -> str:
    """One row a numbered equation of the paper that some notebook has: its derivation, and where it is."""
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    index = "".join(text.split("\n## Index\n")[1].split("\n## ")[0] for text in texts)
    known = sections()
    rows = ["| in the paper | result | notebooks |", "|---|---|---|"]
    notebooks = {str(n): source.read_text(encoding="utf-8") for n, source in enumerate(sources, start=1)}
    for line in re.findall(r"^\| \[D.*", index, re.MULTILINE):
        result, paper = (column.strip() for column in line.split("|")[1:3])
        tag, title = re.match(r"\[(D[\d.]+)\] (.*)", result).groups()
        if not paper:
            continue
        where = [number for number, text in notebooks.items() if f"[{tag}]" in text]
        if where:
            rows.append(f"| {paper} | [{tag}]({known[tag].link(FOLDER)}) {title} | {', '.join(where)} |")
    return "\n".join(rows)


def filled_in(readme: str, sources: list[Path]) -> str:
    """The README with both tables as the sources have them now."""
    for name, table in (("syllabus", syllabus_table(sources)), ("equations", equations_table(sources))):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        readme = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return readme
