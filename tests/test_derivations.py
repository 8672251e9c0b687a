"""The derivations: every step is executed on random instances, and every result can be traced."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from document import (
    BLOCKS,
    OPENING,
    PAPER,
    SECTIONS,
    TEXTS,
    blocks_of,
    opening_names,
    run_block,
    run_section,
    world,
)
from test_altered_equations import ALTERED

import dpo_minimal
from notebooks.syllabus import HEADING, ROOT, sections

HEADINGS = sections()


def without_blocks(text: str) -> str:
    """The text with its fenced blocks emptied, so that lines keep their numbers."""
    fenced = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    return fenced.sub(lambda match: "\n" * match[0].count("\n"), text)


PROSE = {document: without_blocks(text) for document, text in TEXTS.items()}
WORDS_ONLY = {"D1.1", "D14.10"}  # sections without a block
by_document = pytest.mark.parametrize("document", TEXTS)


@pytest.mark.parametrize("tag", SECTIONS)
def test_every_step_holds_on_random_instances(tag):
    """All blocks of a section, in order, on 16 worlds of its own: some with constant rewards, and at least 12
    with others."""
    opening, worlds = opening_names(), [world(tag, number) for number in range(16)]
    assert sum(drawn["rewards"].unique().numel() > 1 for drawn in worlds) >= 12
    for drawn in worlds:
        run_section(SECTIONS[tag], opening, drawn)


@pytest.mark.parametrize("tag", [tag for tag in SECTIONS if tag != OPENING])
def test_every_comparison_is_reached_and_compares(tag):
    """Within 40 worlds every `same`, `shows` and `assert` of a section is executed, and none is hollow:
    the sides are different expressions, `shows` has a text, an assertion is no constant."""
    reached, expected = set(), set()

    def noting(name, original):
        def wrapper(*arguments, **options):
            reached.add(name)
            return original(*arguments, **options)

        return wrapper

    class Note(ast.NodeTransformer):
        def visit_Call(self, node):
            self.generic_visit(node)
            if isinstance(node.func, ast.Name) and node.func.id in ("same", "shows"):
                sides = [ast.dump(side) for side in node.args]
                assert len(sides) >= 2 and sides[0] != sides[1], f"line {node.lineno} compares nothing"
                within = [option.value for option in node.keywords if option.arg == "within"]
                assert all(isinstance(w, ast.Constant) and w.value <= 0.01 for w in within), node.lineno
                name = f"{node.func.id} {node.lineno}:{node.col_offset}"
                expected.add(name)
                call = f"noting({name!r}, {node.func.id})"
                node.func = ast.copy_location(ast.parse(call, mode="eval").body, node.func)
            return node

        def visit_Assert(self, node):
            self.generic_visit(node)
            assert not isinstance(node.test, ast.Constant), f"line {node.lineno} asserts nothing"
            name = f"assert {node.lineno}"
            expected.add(name)
            note = ast.parse(f"noting({name!r}, lambda: None)()").body[0]
            return [ast.copy_location(note, node), node]

    codes = []
    for block in SECTIONS[tag]:
        tree = ast.parse("\n" * (block.line - 1) + block.source)
        before = len(expected)
        tree = ast.fix_missing_locations(Note().visit(tree))
        assert len(expected) > before, f"the block of line {block.line} compares nothing"
        codes.append(compile(tree, block.document, "exec"))

    for number in range(40):
        if reached == expected:
            break
        names = {**opening_names(), **world(tag, number), "noting": noting}
        for code in codes:
            exec(code, names)
    assert reached == expected


def test_a_failing_block_is_reported_by_tag_and_line():
    """The line is the document's own, and the message shows the statement and both sides."""
    text = '### <a id="d99"></a>D9.9 A mistake\n\nWords.\n\n```python\nx = 2\nsame(x + x, 5)\n```\n'
    with pytest.raises(AssertionError, match=r"\[D9\.9\] laws\.md:7: same\(x \+ x, 5\)\nleft 4"):
        run_block(blocks_of(text, "laws.md")[0], dict(opening_names()))


def test_no_block_is_left_out():
    """A fence that nobody knows, a block that is never closed, and one that belongs to no section."""
    heading = '### <a id="d99"></a>D9.9 A mistake\n\n'
    wrong = {
        "```py\nx\n```": "unknown fence",
        "```python\nx": "never closed",
        " ```python\nx": "unknown fence",
    }
    for text, told in wrong.items():
        with pytest.raises(AssertionError, match=told):
            blocks_of(heading + text, "laws.md")
    with pytest.raises(AssertionError, match="no section"):
        blocks_of(heading + "## Results\n\n```python\nx\n```", "laws.md")
    assert blocks_of(heading + "```sh\nls\n```", "laws.md") == []


def test_same_tells_right_from_wrong():
    """The document's instruments: rounding is taken for equal, and nothing else, NaN least of all."""
    same, shows = opening_names()["same"], opening_names()["shows"]
    same(1e6 * (1 + 1e-10), 1e6)
    shows([0.8474, -2.0], "0.847", "-2")
    for wrong in (1 + 3e-9, -1.0, float("nan"), float("inf"), [1.0, 1.0, 1.1]):
        with pytest.raises(AssertionError):
            same(wrong, 1.0)
    with pytest.raises(AssertionError):
        same([[1.0, 1.0]], [1.0, 1.0])  # of another shape
    for value, text in ((0.8476, "0.847"), (0.8464, "0.847"), (-0.847, "0.847"), (float("nan"), "0.847")):
        with pytest.raises(AssertionError):
            shows(value, text)


def test_every_block_fits_the_page():
    """Lines beyond 110 columns are cut off on a screen."""
    for block in BLOCKS:
        wide = [line for line in block.source.split("\n") if len(line) > 110]
        assert not wide, f"{block.document}:{block.line}: {wide}"


def test_every_section_is_there_once_and_executed():
    """One page and chapters 1 to 14, over all documents, each with sections numbered from 1; all but two of
    them have blocks."""
    tags = re.findall(r"^### .*?(D\d+\.\d+) ", "\n".join(TEXTS.values()), re.MULTILINE)
    chapters = [len([tag for tag in tags if tag.startswith(f"D{chapter}.")]) for chapter in range(15)]
    assert tags == [f"D{chapter}.{n}" for chapter, count in enumerate(chapters) for n in range(1, count + 1)]
    assert min(chapters) >= 1
    assert set(tags) - set(SECTIONS) == WORDS_ONLY
    assert len(BLOCKS) >= 250


def test_the_contents_lead_to_every_chapter():
    """Chapters 1 to 9 and the index within derivations.md, the others in the documents that have them."""
    text = TEXTS["derivations.md"]
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    contents = text.split("\nContents: ")[1]
    linked = re.findall(r"\(#([^)]*)\)", contents.split("\n")[0])
    assert linked == [anchor_of(title) for title in titles if title[0].isdigit() or title == "Index"]
    elsewhere = re.findall(r"\[(\d+ [^\]]*)\]\(([^)]*)\)", contents.split("\n")[2])
    assert [document for _, document in elsewhere] == [name for name in TEXTS if name != "derivations.md"]
    for title, document in elsewhere:
        assert f"\n## {title}\n" in TEXTS[document]


def test_the_first_equation_is_on_the_first_screen():
    """Within the first 20 lines, and before any table."""
    assert "$$" in TEXTS["derivations.md"].split("\n")[:20]


def test_every_erratum_has_its_block():
    """Errata are numbered without gaps, and each is followed by its counterexample before the next."""
    parts = re.split(r"^\*\*E(\d+)\.\*\* ", TEXTS["notebooks/errata.md"], flags=re.MULTILINE)
    numbers, bodies = parts[1::2], parts[2::2]
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert len(numbers) >= 30
    for number, body in zip(numbers, bodies):
        assert "```python" in body, f"E{number} has no block"


# ------------------------------------------------------------------------------------------ traceability


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def modules() -> dict[str, ModuleType]:
    """The modules that a docstring's tag may stand in: the book's, and those of the annexes with mathematics.
    `micro` says the book's functions again, under the same names."""
    package, found = Path(dpo_minimal.__file__).parent, {}
    for annex in ("", "zoo", "laws", "text", "rivals"):
        for path in sorted((package / annex).glob("*.py")):
            if path.stem != "micro" and not path.stem.startswith("__"):
                name = f"{annex}.{path.stem}".strip(".")
                found[name] = importlib.import_module(f"dpo_minimal.{name}")
    return found


def public_names(module: ModuleType) -> dict[str, object]:
    """A module's own public functions and classes."""
    return {
        name: member
        for name, member in vars(module).items()
        if getattr(member, "__module__", None) == module.__name__
        and not name.startswith("_")
        and (inspect.isfunction(member) or inspect.isclass(member))
    }


def tags_in(text: str) -> list[str]:
    """The tags that a text names in brackets, in order."""
    return [
        tag for group in re.findall(r"\[(D\d+\.\d+(?:, D\d+\.\d+)*)\]", text) for tag in group.split(", ")
    ]


def functions_by_tag() -> dict[str, list[str]]:
    """Tag -> the public names whose docstrings name it."""
    table: dict[str, list[str]] = {}
    for module in modules().values():
        for name, member in public_names(module).items():
            for tag in dict.fromkeys(tags_in(member.__doc__ or "")):
                table.setdefault(tag, []).append(name)
    return table


def index_rows(document: str) -> dict[str, list[str]]:
    """A document's index: tag -> result, paper, code, tests."""
    table = TEXTS[document].split("\n## Index\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.split("\n")
        if line.startswith("| [D")
    ]
    return {tags_in(row[0])[0]: row for row in rows}


def test_every_public_function_names_a_tag():
    """Whoever reads a docstring is led to the derivation: everything that the package exports, but for the
    bench, and every function of a module with mathematics, which is one where some docstring names a tag."""
    tagged = {name for names in functions_by_tag().values() for name in names}
    bench = {name for name, file in dpo_minimal._FILE_OF.items() if file.startswith("bench.")}
    assert set(dpo_minimal.__all__) - {"InputError", "__version__"} - bench <= tagged
    for place, module in modules().items():
        names = public_names(module)
        if place != "train" and not place.startswith("text.") and tagged & set(names):
            assert [name for name in names if inspect.isfunction(names[name]) and name not in tagged] == []


def test_every_tag_in_the_code_is_a_section():
    """In the tests and the course as in the package: no tag leads nowhere."""
    for folder in (ROOT / "dpo_minimal", ROOT / "tests", ROOT / "notebooks"):
        for path in folder.rglob("*.py"):
            assert set(tags_in(path.read_text(encoding="utf-8"))) <= {*HEADINGS, "D9.9"}, path.name


@by_document
def test_every_tag_in_the_text_is_a_link_to_its_section(document):
    """[D3.4] in the prose works through a link definition at the end: the anchor of a section of the same
    document, or path and anchor of one that stands elsewhere. All other links lead somewhere too."""
    text, own = TEXTS[document], {tag for tag, place in HEADINGS.items() if place.document == ROOT / document}
    assert not re.search(r"\[D\d+\.\d+,", PROSE[document]), "each tag has brackets of its own"
    used = set(re.findall(r"\[(D\d+\.\d+)\]", PROSE[document])) | own
    folder = (ROOT / document).parent
    right = {tag: f"#{HEADINGS[tag].anchor}" if tag in own else HEADINGS[tag].link(folder) for tag in used}
    assert dict(re.findall(r"^\[(D\d+\.\d+)\]: (.*)$", text, re.MULTILINE)) == right
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PROSE[document]):
        target = (folder / path).resolve() if path else ROOT / document
        assert target.exists(), path
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def anchors_of(text: str) -> set[str]:
    """The anchors of a document: those of its headings, tags and their HTML aside."""
    return {
        anchor_of(re.sub("<[^>]*>", "", heading)) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def test_every_anchor_is_the_same_in_all_viewers():
    """GitHub and VS Code make one of the heading's words; they agree if these are plain ASCII. JupyterLab
    makes another, but finds the one that the heading's HTML gives, so that must be the same."""
    for tag, section in HEADINGS.items():
        assert section.title.isascii(), section.title
        assert section.anchor == anchor_of(f"{tag} {section.title}")
    for document, text in TEXTS.items():
        untagged = re.findall(r"^### (?!<a id=).*D\d+\.\d+.*$", text, re.MULTILINE)
        assert not untagged, f"{document}: {untagged}"
    assert len(HEADINGS) == sum(len(HEADING.findall(text)) for text in TEXTS.values())  # no tag twice


@by_document
def test_the_index_lists_every_result_with_its_functions_and_tests(document):
    """The table from the paper to tag, function and test agrees with the headings, docstrings and tests."""
    rows, by_tag = index_rows(document), functions_by_tag()
    own = {tag: place for tag, place in HEADINGS.items() if place.document == ROOT / document}
    assert [row[0] for row in rows.values()] == [f"[{tag}] {place.title}" for tag, place in own.items()]
    for tag, (_, _, code, tests) in rows.items():
        assert sorted(re.findall(r"`(\w+)`", code)) == sorted(by_tag.get(tag, [])), tag
        for name, path in re.findall(r"\[(\w+)\]\(([\w/.]+)\)", tests):
            source = ((ROOT / document).parent / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), name


INDEX = {tag: row for document in TEXTS for tag, row in index_rows(document).items()}


def paper_items() -> dict[str, set[str]]:
    """Tag -> the equations, lemmas, ... that the index's second column gives it."""
    items = {}
    for tag, row in INDEX.items():
        items[tag] = set()
        for item in row[1].split(", "):
            if match := re.fullmatch(r"(?:Eq\. )?(\d+)(?:–(\d+))?", item):
                items[tag] |= {f"Eq. {n}" for n in range(int(match[1]), int(match[2] or match[1]) + 1)}
            else:
                items[tag].add(item)
    return items


def test_the_whole_paper_is_in_the_index():
    """Equations 1 to 22, Section 4's gradient, both lemmas, the theorem, the proposition, the definition:
    each beside the section whose blocks notice that it is altered, and that has a test of its own."""
    items = paper_items()
    assert set().union(*items.values()) >= set(PAPER)
    for row in ALTERED:
        assert row.equation in items[row.tag], f"{row.equation} is not in the row of {row.tag}"
    for tag, cells in INDEX.items():
        assert not items[tag] & set(PAPER) or "](tests/" in cells[3], f"{tag} names no test"


# -------------------------------------------------------------------------------------------- mathematics


def displays_of(text: str) -> list[tuple[int, str]]:
    """The displayed formulas of a text without fenced blocks, each with its line number.

    Raises:
        AssertionError: `$$` that does not stand alone on its line, or a display without a blank line before
            and after.
    """
    lines, found, start = [*text.split("\n"), ""], [], None
    for number, line in enumerate(lines, start=1):
        assert "$$" not in line or line == "$$", f"{number}: {line}"
        if line == "$$" and start is None:
            assert not lines[number - 2], f"{number}: no blank line before the display"
            start = number
        elif line == "$$":
            assert not lines[number], f"{number}: no blank line after the display"
            found.append((start + 1, "\n".join(lines[start : number - 1])))
            start = None
    assert start is None, f"{start}: a display without an end"
    return found


def inline_formulas_of(text: str) -> list[tuple[int, str]]:
    """The formulas between single dollars, each with its line number."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line != "$$":
            assert line.count("$") % 2 == 0, f"{number}: odd number of dollars: {line}"
            found += [(number, formula) for formula in line.split("$")[1::2]]
    return found


@by_document
def test_the_mathematics_survives_the_page(document):
    """What GitHub, JupyterLab and VS Code do to a formula before TeX sees it:

    - GitHub's Markdown removes a backslash before punctuation, so that `\\,` is a comma; takes `*` and some
      `_` for emphasis and `<a` for HTML; and of a line that begins like a list or a heading it makes one.
    - JupyterLab takes formulas out before Markdown comes, but knows no ```math, ends a formula at a blank
      line, and needs its braces balanced.
    - VS Code (KaTeX) wants no space within single dollars and no digit after them, and `$$` on its own line.
    """
    displays, inline = displays_of(PROSE[document]), inline_formulas_of(PROSE[document])
    assert "```math" not in TEXTS[document]
    for number, formula in displays + inline:
        assert not re.search(r"\\[{},;!|\\*_#%&]|\*|<[a-zA-Z]|\]\(", formula), f"{number}: ${formula}$"
        assert formula and formula == formula.strip(), f"{number}: ${formula}$"
        assert formula.count("{") == formula.count("}"), f"{number}: ${formula}$"
    for number, formula in displays:
        for line in formula.split("\n"):
            assert line.strip(), f"{number}: a blank line in the display"
            assert not re.match(r"\s*([-+=#>|~]\s|[-=]+$|\d+[.)]\s)", line), f"{number}: {line}"
    for line in PROSE[document].split("\n"):
        if line != "$$":
            outside = line.split("$")[0::2]
            assert not any(after[:1].isalnum() for after in outside[1:]), line
            assert not any(before[-1:].isalnum() for before in outside[:-1]), line


@by_document
def test_markdown_finds_every_formula_and_changes_none(document):
    """With a plugin for dollars (VS Code), a CommonMark parser finds each formula that stands in the text.
    Without one (GitHub), it finds nothing in them that it would change."""
    markdown_it = pytest.importorskip("markdown_it")
    dollars = pytest.importorskip("mdit_py_plugins.dollarmath")
    displays, inline = displays_of(PROSE[document]), inline_formulas_of(PROSE[document])
    plugged = markdown_it.MarkdownIt().enable("table")
    plugged.use(dollars.dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=False)
    tokens = plugged.parse(TEXTS[document])
    assert [t.content.strip() for t in tokens if t.type == "math_block"] == [
        formula for _, formula in displays
    ]
    children = [child for token in tokens for child in token.children or []]
    assert [c.content for c in children if c.type == "math_inline"] == [formula for _, formula in inline]
    for token in markdown_it.MarkdownIt().enable("table").parse(TEXTS[document]):
        dollars_before = 0
        for child in token.children or []:
            if child.type == "text":
                dollars_before += child.content.replace("$$", "$").count("$")
            else:
                assert dollars_before % 2 == 0 or child.type == "softbreak", (
                    f"{child.type} in: {token.content}"
                )
