"""For lecturers: the derivations as one page without their code, and slides of the solved notebooks.

Both are single HTML files that need no network. Equations are MathML, which browsers draw themselves.

Left out on purpose: speaker's notes, transitions, themes.
"""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode

from dpo_minimal.text.runs import write_text
from dpo_minimal.validation import InputError

from . import syllabus

PAGES = Path(__file__).parent / "pages"
TITLE = "Derivations of Direct Preference Optimization"
QUESTION = "<p><strong>Predict before you run.</strong>"
# Set-up, and what would show a solution: the exercise's code, the remark after it, and the checks.
NOT_SHOWN = {"install", "setup", "exercise", "check", "answer", "derivation"}


def write_lecture(path: Path, chapters: list[str]) -> None:
    """Write the page of these chapters, "0" to "14"; those of derivations.md, if there are none.

    Raises:
        InputError: there is no such chapter, or no such folder, or math-core is missing.
    """
    if path.suffix != ".html":
        raise InputError(
            f"--lecture takes the name of an HTML file, and {path} does not end in .html; the numbers of "
            "chapters come first: python -m notebooks.build 3 4 5 --lecture."
        )
    known = all_chapters()
    if unknown := [chapter for chapter in chapters if chapter not in known]:
        raise InputError(f"no chapter {', '.join(unknown)}; there are {', '.join(known)}.")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}; make it first.")
    of_the_book = [chapter for chapter in known if int(chapter) < 10]
    write_text(path, lecture_page([known[chapter] for chapter in sorted(chapters or of_the_book, key=int)]))


def write_slides(folder: Path, notebooks: dict[str, NotebookNode]) -> list[Path]:
    """Write the slides of solved, executed notebooks, by name; return the files.

    Raises:
        InputError: the folder is a file, or has the name of a notebook, or math-core is missing.
    """
    if folder.name.isdigit():
        raise InputError(f"the numbers come first: python -m notebooks.build {folder.name} --slides.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --slides takes a folder.")
    written = {folder / f"{name}.html": slides(notebook) for name, notebook in notebooks.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        write_text(path, text)
    return list(written)


# --------------------------------------------------------------------------------------- the lecture page


def all_chapters() -> dict[str, str]:
    """The chapters' numbers, and their Markdown with its heading, over all documents."""
    found = {}
    for document in syllabus.DOCUMENTS:
        for part in re.split(r"^(?=## )", document.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            if tag := syllabus.HEADING.search(part):
                found[re.match(r"D(\d+)", tag[2])[1]] = part
    return found


def lecture_page(chapters: list[str]) -> str:
    """One HTML page: contents, a switch that shows the code, and the chapters (Markdown)."""
    text = "\n".join(chapters)
    anchors = {anchor for anchor, _, _ in syllabus.HEADING.findall(text)}
    links = "\n".join(
        f"[{tag}]: #{section.anchor}"
        for tag, section in syllabus.sections().items()
        if section.anchor in anchors
    )
    contents = []
    for chapter in chapters:
        title = re.match(r"## (.*)", chapter)[1]
        sections = [
            f"  - [{tag} {title}](#{anchor})" for anchor, tag, title in syllabus.HEADING.findall(chapter)
        ]
        contents += [f"- [{title}](#{_anchor(title)})", *sections]
    text = re.sub(
        r"^## (.*)$", lambda match: f'## <a id="{_anchor(match[1])}"></a>{match[1]}', text, flags=re.MULTILINE
    )
    fill = {"title": TITLE, "contents": to_html("\n".join(contents)), "body": to_html(f"{text}\n\n{links}\n")}
    return filled("lecture.html", fill)


def _anchor(title: str) -> str:
    """The anchor that GitHub gives this heading: links of the documents lead there."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# -------------------------------------------------------------------------------------------------- slides


class Slide(NamedTuple):
    """The heading and what stands below it, as HTML; its kind: "of-code", "outcome", "lead" or ""."""

    heading: str
    content: str
    kind: str = ""


def slides(notebook: NotebookNode) -> str:
    """One HTML file: a slide for each heading, each text and the outputs of each cell; code if wanted.

    The browser splits what is too long for a slide (pages/slides.html).
    """
    found: list[Slide] = []
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if NOT_SHOWN & tags:
            continue
        heading = found[-1].heading.replace("h1>", "h2>") if found else ""
        if cell.cell_type == "markdown":
            found += _of_text(cell.source, heading, outcome="outcome" in tags)
            continue
        # A text that only leads to what a cell prints stands above it.
        lead = [found.pop()] if found and found[-1].kind == "lead" else []
        found.append(Slide(heading, f'<pre class="source">{html.escape(cell.source)}</pre>', "of-code"))
        shown = "\n".join([*(slide.content for slide in lead), *map(_output, cell.outputs)])
        found += [Slide(heading, shown)] if shown else []
    title = html.escape(re.search("^# (.*)", notebook.cells[0].source)[1])
    body = "\n".join(
        f'<section id="s{number}" class="{kind}" tabindex="-1">\n{heading}\n{content}\n</section>'
        for number, (heading, content, kind) in enumerate(found, start=1)
        if content
    )
    return filled("slides.html", {"title": title, "body": body})


def _of_text(text: str, heading: str, *, outcome: bool) -> list[Slide]:
    """The slides of a Markdown cell below this heading: one for each heading in it."""
    text = re.sub(r"^\*\*Before this:\*\*.*\n(?:.+\n)*", "", text, flags=re.MULTILINE)
    found = []
    for part in re.split(r"^(?=#{1,3} )", text, flags=re.MULTILINE):
        if own := re.match(r"(#+) (.*)\n?", part):
            level = min(len(own[1]), 2)
            heading, part = f"<h{level}>{_markdown().renderInline(own[2])}</h{level}>", part[own.end() :]
        content = to_html(part).replace(QUESTION, QUESTION.replace("<p>", '<p class="question">'))
        kind = "outcome" if outcome else "" if own or QUESTION in to_html(part) else "lead"
        if own or content:
            found.append(Slide(heading, content, kind))
    return found


def _output(output: NotebookNode) -> str:
    """What a cell has printed or drawn, as HTML."""
    if output.output_type == "stream":
        return f"<pre>{html.escape(output.text)}</pre>" if output.name == "stdout" else ""
    data = output.get("data", {})
    return data.get("text/html") or f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"


# ----------------------------------------------------------------------------------------------- rendering


def filled(template: str, values: dict[str, str]) -> str:
    """A template of pages/ with each `{{name}}` replaced."""
    text = (PAGES / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)


def to_html(text: str) -> str:
    """Markdown as HTML, equations as MathML. Links to files, which a page alone has not, are dropped.

    Raises:
        InputError: math-core is missing, or cannot read an equation.
    """
    page = _markdown().render(text)
    return re.sub(r"</math></span>([,.;:!?)]+)", r"</math>\1</span>", page)  # no line begins with a comma


@functools.cache
def _markdown() -> MarkdownIt:
    try:
        from math_core import LatexError, LatexToMathML
    except ImportError as error:
        raise InputError(
            "math-core, which turns equations into MathML, is missing: pip install math-core."
        ) from error
    converter = LatexToMathML(fancy_error=False)

    def equation(text: str, options: dict) -> str:
        try:
            return converter.convert_with_local_state(text, displaystyle=options["display_mode"])
        except LatexError as error:
            raise InputError(f"the equation {text} is no LaTeX that math-core reads: {error}") from error

    def link_open(renderer, tokens, place, options, env) -> str:
        target = tokens[place].attrs["href"]
        return f'<a href="{html.escape(target)}">' if target.startswith(("#", "https://")) else "<a>"

    parser = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=equation)
    parser.add_render_rule("link_open", link_open)
    return parser
