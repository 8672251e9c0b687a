"""Where each result of the derivations stands, and the two tables of notebooks/README.md.

The tables are read off the notebooks' sources and the derivations' indices, so that they cannot disagree.
"""

from __future__ import annotations

import functools
import os
import re
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


def header(source: Path) -> Header:
    """The header of a notebook's source."""
    text = source.read_text(encoding="utf-8")
    title = re.search(r"^# # \d+ · (.*)$", text, re.MULTILINE)[1]
    line = re.search(r"^# \*\*Before this:\*\*.*(?:\n# \*\*.*)*", text, re.MULTILINE)[0]
    parts = re.findall(r"\*\*([\w ]+):\*\* (.*?)(?= · |$)", line.replace("\n# ", " "))
    return Header(title, dict(parts))


def syllabus_table(sources: list[Path]) -> str:
    """One row a notebook."""
    rows = [
        "| notebook | before it | minutes to read, to solve | difficulty | exercises |",
        "|---|---|---|---|---|",
    ]
    for number, source in enumerate(sources, start=1):
        title, parts = header(source)
        exercises = re.findall(
            r"^# ### Exercise ([\d.]+: .*)$", source.read_text(encoding="utf-8"), re.MULTILINE
        )
        minutes = ", ".join(parts[name].split()[0] for name in ("Read", "Solve"))
        files = f"[{number} {title}]({source.stem}.ipynb) ([solved](solutions/{source.stem}.ipynb))"
        before = re.split(r",? or what ", parts["Before this"])[0]
        rows.append(f"| {files} | {before} | {minutes} | {parts['Difficulty']} | {'; '.join(exercises)} |")
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
