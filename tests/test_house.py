"""The house: which file may import which, and how large everything may grow. Prints its table (pytest -s)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dpo_minimal"
# From left to right: a file imports its own annex, those to the left of it, and the book.
ANNEXES = ("zoo", "laws", "text", "rivals", "bench", "experiments")
# Raised only by a decision with its reason in the commit that does it.
BUDGETS = {  # what is counted: lines, and words where it says so
    "book (root files)": 2905,
    "micro.py": 150,
    "experiments": 7460,
    "package": 21200,
    "README.md": 160,
    "README.md, words": 1800,
    "derivations.md": 1500,
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def files() -> dict[str, Path]:
    """Module name within the package -> its file; a folder's `__init__` has the folder's name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a file imports, at its top or inside a function."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*[p for p in package if p][: len(package) - node.level + 1], *(node.module or "").split(".")]
        module = ".".join(part for part in base if part)
        for alias in node.names:
            whole = f"{module}.{alias.name}".strip(".")
            found.add(whole if whole in known else module)
    return found - {""}  # `from . import __version__` in __main__


def annex_of(name: str) -> str:
    return name.split(".")[0] if name.split(".")[0] in ANNEXES else ""


def test_imports_run_to_the_left_and_never_in_a_circle():
    """A root file imports root files only; an annex the book, itself, and the annexes to its left."""
    known = files()
    graph = {name: imports_of(name, path, known) for name, path in known.items() if name}
    list(TopologicalSorter(graph).static_order())  # raises CycleError naming the circle
    place = {"": -1, **{annex: k for k, annex in enumerate(ANNEXES)}}
    for name, imported in graph.items():
        if name == "__main__":
            continue
        for other in imported:
            assert place[annex_of(other)] <= place[annex_of(name)], f"{name} imports {other}, to its right"


def test_every_folder_of_the_package_is_known():
    """A new annex is a decision about the order above."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(ANNEXES)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def measured() -> dict[str, int]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        "book (root files)": sum(lines(path) for path in PACKAGE.glob("*.py")),
        "micro.py": lines(PACKAGE / "micro.py"),
        "experiments": sum(lines(path) for path in (PACKAGE / "experiments").rglob("*.py")),
        "package": sum(lines(path) for path in PACKAGE.rglob("*.py")),
        "README.md": len(readme.splitlines()),
        "README.md, words": len(readme.split()),
        "derivations.md": lines(ROOT / "derivations.md"),
    }


def test_budgets():
    """Nothing has outgrown its budget."""
    found = measured()
    annexes = {a: sum(map(lines, (PACKAGE / a).rglob("*.py"))) for a in ANNEXES if (PACKAGE / a).is_dir()}
    print(f"\n{'':<20} {'is':>7} {'may be':>7}")
    for name, budget in BUDGETS.items():
        print(f"{name:<20} {found[name]:>7,} {budget:>7,}")
    print("lines by annex: " + ", ".join(f"{name} {count:,}" for name, count in annexes.items()))
    over = {name: (found[name], budget) for name, budget in BUDGETS.items() if found[name] > budget}
    assert not over, f"beyond the budget: {over}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_and_no_function_is_long(path):
    """At most 400 lines a file and 60 a function."""
    assert lines(path) <= LONGEST_FILE
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"
