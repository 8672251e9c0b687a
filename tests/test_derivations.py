"""derivations.md: every step is executed on random instances, and every result can be traced."""

import ast
import importlib
import inspect
import re
import zlib
from pathlib import Path

import pytest
from document import (
    OPENING,
    PAPER,
    SECTIONS,
    TEXT,
    blocks_of,
    instances,
    opening_names,
    run_block,
    run_section,
)
from hypothesis import given, seed, settings
from test_altered_equations import ALTERED

import dpo_minimal

TESTS = Path(__file__).parent
ROOMS = ("closed_form", "preferences", "losses", "bandit", "certificates", "finite_data", "sampling_laws")
ROOMS += ("baselines", "model", "generation", "policy", "evaluate")
BLOCKS = blocks_of(TEXT)
HEADINGS = dict(re.findall(r"^### (D\d+\.\d+) (.*)$", TEXT, re.MULTILINE))
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)


WORDS_ONLY = {"D1.1", "D14.10"}  # sections without a block


@pytest.mark.parametrize("tag", SECTIONS)
def test_every_step_holds_on_random_instances(tag):
    """All blocks of a section, in order, on at least 25 different worlds whose rewards are not constant, and
    on constant ones besides; each section has draws of its own."""
    opening, worlds = opening_names(), set()

    @seed(zlib.crc32(tag.encode()))
    @settings(max_examples=45)  # more than 25: Hypothesis repeats simple worlds, and seldom the same ones
    @given(instances())
    def run(instance):
        run_section(SECTIONS[tag], opening, instance)
        if instance["rewards"].unique().numel() > 1:
            worlds.add((instance["rewards"].numpy().tobytes(), instance["beta"]))

    run()
    assert len(worlds) >= 25


@pytest.mark.parametrize("tag", [tag for tag in SECTIONS if tag != OPENING])
def test_every_comparison_is_reached_and_compares(tag):
    """Within 40 instances every `same`, `shows` and `assert` of a section is executed, and none is hollow:
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
        codes.append(compile(tree, "derivations.md", "exec"))

    @seed(zlib.crc32(tag.encode()))
    @settings(max_examples=40)
    @given(instances())
    def run(instance):
        if reached == expected:
            return
        names = {**opening_names(), **instance, "noting": noting}
        for code in codes:
            exec(code, names)

    run()
    assert reached == expected


def test_a_failing_block_is_reported_by_tag_and_line():
    """The line is the document's own, and the message shows the statement and both sides."""
    text = "### D9.9 A mistake\n\nWords.\n\n```python\nx = 2\nsame(x + x, 5)\n```\n"
    with pytest.raises(AssertionError, match=r"\[D9\.9\] derivations\.md:7: same\(x \+ x, 5\)\nleft 4"):
        run_block(blocks_of(text)[0], dict(opening_names()))


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
        assert not wide, f"line {block.line}: {wide}"


def test_every_section_is_there_once_and_executed():
    """Chapters 1 to 14, each with sections numbered from 1; all but two of them have blocks."""
    tags = re.findall(r"^### (D\d+\.\d+) ", TEXT, re.MULTILINE)
    chapters = [len([tag for tag in tags if tag.startswith(f"D{chapter}.")]) for chapter in range(1, 15)]
    assert tags == [
        f"D{chapter}.{n}" for chapter, count in enumerate(chapters, 1) for n in range(1, count + 1)
    ]
    assert set(tags) - set(SECTIONS) == WORDS_ONLY
    assert len(BLOCKS) >= 250
    titles = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    linked = re.findall(r"\(#([^)]*)\)", TEXT.split("\nContents: ")[1].split("\n")[0])
    assert linked == [anchor_of(title) for title in titles if title[0].isdigit()]


def test_every_erratum_has_its_block():
    """Errata are numbered without gaps, and each is followed by its counterexample before the next."""
    parts = re.split(r"^\*\*E(\d+)\.\*\* ", TEXT, flags=re.MULTILINE)
    numbers, bodies = parts[1::2], parts[2::2]
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert len(numbers) >= 30
    for number, body in zip(numbers, bodies):
        assert "```python" in body, f"E{number} has no block"


# ------------------------------------------------------------------------------------------ traceability


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def public_names() -> dict[str, object]:
    """Every public function and class of the rooms that hold mathematics, in the order of the files."""
    found = {name: getattr(dpo_minimal, name) for name in ("PreferencePair", "load_preferences", "train")}
    for room in ROOMS:
        module = importlib.import_module(f"dpo_minimal.{room}")
        for name, member in vars(module).items():
            own = getattr(member, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and (inspect.isfunction(member) or inspect.isclass(member)):
                found[name] = member
    return found


def tags_in(text: str) -> list[str]:
    """The tags that a text names in brackets, in order."""
    return [
        tag for group in re.findall(r"\[(D\d+\.\d+(?:, D\d+\.\d+)*)\]", text) for tag in group.split(", ")
    ]


def functions_by_tag() -> dict[str, list[str]]:
    """Tag -> the public names whose docstrings name it."""
    table: dict[str, list[str]] = {}
    for name, member in public_names().items():
        for tag in dict.fromkeys(tags_in(member.__doc__ or "")):
            table.setdefault(tag, []).append(name)
    return table


def index_rows() -> list[list[str]]:
    """The index, a list of cells a row: result, paper, code, tests."""
    table = TEXT.split("\n## Index\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if "[D" in line
    ]


def test_every_public_function_names_a_tag():
    """Whoever reads a docstring is led to the derivation."""
    names, exported = public_names(), set(dpo_minimal.__all__) - {"InputError", "__version__"}
    assert exported <= set(names)
    bare = [name for name, member in names.items() if not tags_in(member.__doc__ or "")]
    assert [name for name in bare if inspect.isfunction(names[name]) or name in exported] == []


def test_every_tag_in_the_code_is_a_section():
    """In the tests and the course as in the package: no tag leads nowhere."""
    for folder in (Path(dpo_minimal.__file__).parent, TESTS, TESTS.parent / "notebooks"):
        for path in folder.rglob("*.py"):
            assert set(tags_in(path.read_text(encoding="utf-8"))) <= {*HEADINGS, "D9.9"}, path.name


def test_every_tag_in_the_text_is_a_link_to_its_section():
    """[D3.4] in the prose works through a link definition at the end, with the anchor of the heading."""
    defined = dict(re.findall(r"^\[(D\d+\.\d+)\]: #(.*)$", TEXT, re.MULTILINE))
    for tag, title in HEADINGS.items():
        assert defined.pop(tag) == anchor_of(f"{tag} {title}")
    assert defined == {}
    assert set(re.findall(r"\[(D\d+\.\d+)\]", PROSE)) <= set(HEADINGS)
    anchors = {anchor_of(heading) for heading in re.findall(r"^#{2,3} (.*)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PROSE)) <= anchors


def test_the_index_lists_every_result_with_its_functions_and_tests():
    """The table from the paper to tag, function and test agrees with the headings, docstrings and tests."""
    rows = index_rows()
    assert [row[0] for row in rows] == [f"[{tag}] {title}" for tag, title in HEADINGS.items()]
    by_tag = functions_by_tag()
    for (result, _, code, tests), tag in zip(rows, HEADINGS):
        assert re.findall(r"`(\w+)`", code) == by_tag.get(tag, []), result
        for name, path in re.findall(r"\[(\w+)\]\(([\w/.]+)\)", tests):
            source = (TESTS.parent / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), name


def paper_items() -> dict[str, set[str]]:
    """Tag -> the equations, lemmas, ... that the index's second column gives it."""
    items = {}
    for row, tag in zip(index_rows(), HEADINGS):
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
    for cells, tag in zip(index_rows(), HEADINGS):
        assert not items[tag] & set(PAPER) or "](tests/" in cells[3], f"{tag} names no test"


def test_the_mathematics_survives_the_page():
    """Markdown eats some of TeX within single dollars, and an odd dollar swallows a paragraph."""
    for number, line in enumerate(PROSE.split("\n"), start=1):
        assert line.count("$") % 2 == 0, f"odd number of dollars: {line}"
        for formula in line.split("$")[1::2]:
            assert not re.search(r"\\[{},;!|\\*_]|(?<!\\)\*|<[a-zA-Z]", formula), f"{number}: ${formula}$"
            assert formula == formula.strip() and formula.count("{") == formula.count("}"), formula
