"""The rules of the house: who may import whom, how long things may be, what stands at the top."""

import ast
import graphlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PAPER = ("mole", "kd_loss", "teachers", "model", "data", "train")
LEVELS = ("data mole kd_loss teachers", "model", "plumbing.files plumbing.signals", "tiny", "real",
          "plumbing", "train", "tools")
FLAT = LEVELS[0].split()  # these import nothing of ours, not each other either
TOP = {"README.md", "LICENSE", "CONTRIBUTING.md", "pyproject.toml", "requirements.txt",
       "requirements-full.txt", "requirements-test.txt", ".gitignore", "test_movekd.py",
       *(f"{name}.py" for name in PAPER)}
ROOMS = {".ci", ".github", "docs", "plumbing", "real", "tests", "tiny", "tools"}
BUDGETS = {"mole.py": 190, "kd_loss.py": 140, "teachers.py": 300, "model.py": 300, "data.py": 320,
           "train.py": 210, "test_movekd.py": 700, "plumbing": 3_124, "real": 926, "tiny": 970,
           "tools": 3_550, "tests": 4_905}


def tracked() -> list[Path]:
    """Return the files that git tracks, or would: all except what is ignored."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE, check=True,
                          capture_output=True, encoding="utf-8")
    paths = [Path(line) for line in done.stdout.splitlines()]
    return [path for path in paths if (HERE / path).is_file()]


TRACKED = tracked()
FILES = {  # of the house, by module name; tests are no part of it
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): HERE / path
    for path in TRACKED if path.suffix == ".py" and path.parts[0] not in ("tests", "test_movekd.py")
}


def lines_of(path: Path) -> list[str]:
    return (HERE / path).read_text(encoding="utf-8").splitlines()


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the modules of ours that the import statements among some nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{node.module}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & set(FILES)


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, at its top or inside a function."""
    return imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def level(module: str) -> int:
    """Return the place of a module in LEVELS; a folder's is for modules without their own."""
    for name in (module, module.split(".")[0]):
        for number, names in enumerate(LEVELS):
            if name in names.split():
                return number
    raise AssertionError(f"{module} stands in no level")


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    """A module imports nothing of a level above its own, and `train` is for the tools alone."""
    for other in imports(FILES[module]):
        assert module not in FLAT, f"{module} imports {other}"
        assert level(other) <= level(module), f"{module} imports {other}"
        assert other != "train" or level(module) == level("tools"), f"{module} imports train"


def test_no_circle():
    """No two modules import each other, by whatever way round; so no import hides in a function."""
    graph = {module: imports(path) for module, path in FILES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_functions_are_short():
    """No function has more than 45 lines, nor has MoVEKD.forward, the whole method."""
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{path}: {node.name}"


@pytest.mark.parametrize("room", BUDGETS)
def test_each_room_keeps_its_budget(room):
    """The lines of its .py files, as wc counts them."""
    files = [path for path in TRACKED if path.suffix == ".py" and path.parts[0] == room]
    assert files and sum(len(lines_of(path)) for path in files) <= BUDGETS[room]


def test_all_of_it_keeps_its_budget():
    """Six files at most 1,560 lines; everything that is no test at most 10,010."""
    assert sum(len(lines_of(Path(f"{name}.py"))) for name in PAPER) <= 1_560
    assert sum(len(lines_of(path)) for path in FILES.values()) <= 10_010


def test_training_loads_little():
    """`import train` loads at most 24 files of ours and 4,500 lines: a run loads what it needs."""
    loaded, new = set(), {"train"}
    while new:
        loaded |= new
        trees = [ast.parse(FILES[module].read_text(encoding="utf-8")) for module in new]
        new = set().union(*(imported(tree.body) for tree in trees)) - loaded
    assert len(loaded) <= 24, loaded
    assert sum(len(lines_of(FILES[module])) for module in loaded) <= 4_500


def test_nothing_else_stands_at_the_top():
    """The paper's files, and what every repository has."""
    assert {path.parts[0] for path in TRACKED} <= TOP | ROOMS


def test_train_reads_from_top_to_bottom():
    """Five import lines from the folders, and L_total is written once."""
    code = lines_of(Path("train.py"))
    ours = [line for line in code if line.startswith(("from plumbing", "from tiny", "from real"))]
    assert len(ours) <= 5
    everything = [line for path in FILES.values() for line in lines_of(path)]
    assert sum(line.strip().startswith("L_total = L_text +") for line in everything) == 1
