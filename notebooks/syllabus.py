"""The two tables of notebooks/README.md, read off the notebooks' sources, so that they cannot disagree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
DERIVATIONS = FOLDER.parent / "derivations.md"


class Header(NamedTuple):
    """What a source says about itself: its title, and the parts of its second line, by name."""

    title: str
    parts: dict[str, str]


def anchor(heading: str) -> str:
    """What follows the # in a link to this heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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
    index = DERIVATIONS.read_text(encoding="utf-8").split("## Index")[1].split("\n## ")[0]
    rows = ["| in the paper | result | notebooks |", "|---|---|---|"]
    texts = {str(n): source.read_text(encoding="utf-8") for n, source in enumerate(sources, start=1)}
    for line in re.findall(r"^\| \[D.*", index, re.MULTILINE):
        result, paper = (column.strip() for column in line.split("|")[1:3])
        tag, title = re.match(r"\[(D[\d.]+)\] (.*)", result).groups()
        if not paper:
            continue
        where = [number for number, text in texts.items() if f"[{tag}]" in text]
        if where:
            place = f"../derivations.md#{anchor(f'{tag} {title}')}"
            rows.append(f"| {paper} | [{tag}]({place}) {title} | {', '.join(where)} |")
    return "\n".join(rows)


def filled_in(readme: str, sources: list[Path]) -> str:
    """The README with both tables as the sources have them now."""
    for name, table in (("syllabus", syllabus_table(sources)), ("equations", equations_table(sources))):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        readme = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return readme
