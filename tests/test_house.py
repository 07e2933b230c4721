"""The rules of the house: who may import whom, how long things may be, what stands at the top."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PAPER = ("mole", "kd_loss", "teachers", "model", "data", "train")
FLOORS = ("data mole kd_loss teachers", "model", "plumbing.files plumbing.signals", "tiny", "real",
          "plumbing", "train", "tools")
FLAT = FLOORS[0].split()  # these import nothing of ours, not each other either
TOP = {"README.md", "LICENSE", "CONTRIBUTING.md", "pyproject.toml", "requirements.txt",
       "requirements-full.txt", "requirements-test.txt", ".gitignore", "test_movekd.py",
       *(f"{name}.py" for name in PAPER)}
ROOMS = {".ci", ".github", "docs", "plumbing", "real", "tests", "tiny", "tools"}
BUDGETS = {"mole.py": 190, "kd_loss.py": 140, "teachers.py": 300, "model.py": 290, "data.py": 320,
           "train.py": 210, "test_movekd.py": 700, "plumbing": 2_900, "real": 750, "tiny": 970,
           "tools": 3_400, "tests": 4_900}


def tracked() -> list[Path]:
    """The files that git tracks, or would: all but what is ignored."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE, check=True,
                          capture_output=True, encoding="utf-8")
    paths = [Path(line) for line in done.stdout.splitlines()]
    return [path for path in paths if (HERE / path).is_file()]


def module_files() -> dict[str, Path]:
    """The .py files of the house that are no tests, by module name."""
    names = {}
    for path in tracked():
        if path.suffix == ".py" and path.parts[0] not in ("tests", "test_movekd.py"):
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            names[name] = HERE / path
    return names


FILES = module_files()


def lines_of(path: Path) -> list[str]:
    return (HERE / path).read_text(encoding="utf-8").splitlines()


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & set(FILES)


def floor(module: str) -> int:
    """The number of a module's floor; a folder's own floor is for modules without one."""
    for name in (module, module.split(".")[0]):
        for number, names in enumerate(FLOORS):
            if name in names.split():
                return number
    raise AssertionError(f"{module} has no floor")


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    """The order of FLOORS: a module imports nothing of a floor above its own."""
    for other in imports(FILES[module]):
        assert module not in FLAT, f"{module} imports {other}"
        assert floor(other) <= floor(module), f"{module} imports {other}"
        assert other != "train" or floor(module) == floor("tools"), f"{module} imports train"


def test_no_circle():
    """No two modules import each other, by whatever way round; so no import hides in a function."""
    graph = {module: imports(path) for module, path in FILES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def functions(path: Path) -> dict[str, int]:
    """The functions of a file and the lines of each, from `def` on."""
    lines = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            name = f"{path.name}: {node.name}, line {node.lineno}"
            lines[name] = node.end_lineno - node.lineno + 1
    return lines


def test_functions_are_short():
    """No function has more than 45 lines, nor has MoVEKD.forward, the whole method."""
    for path in FILES.values():
        assert not {name: n for name, n in functions(path).items() if n > 45}


@pytest.mark.parametrize("room", BUDGETS)
def test_each_room_keeps_its_budget(room):
    """The lines of its .py files, as wc counts them."""
    files = [path for path in tracked() if path.suffix == ".py" and path.parts[0] == room]
    assert files and sum(len(lines_of(path)) for path in files) <= BUDGETS[room]


def test_all_of_it_keeps_its_budget():
    """Six files at most 1,560 lines; everything that is no test at most 9,500."""
    assert sum(len(lines_of(Path(f"{name}.py"))) for name in PAPER) <= 1_560
    assert sum(len(lines_of(path)) for path in FILES.values()) <= 9_500


def test_training_loads_little():
    """`import train` loads at most 24 files of ours and 4,500 lines: a run loads what it needs."""
    code = "import sys, train; print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True,
                          encoding="utf-8")
    own = [Path(word) for word in done.stdout.split() if word.startswith(str(HERE) + "/")]
    own = [path for path in own if ".venv" not in path.parts]
    assert len(own) <= 24, own
    assert sum(len(lines_of(path)) for path in own) <= 4_500


def test_nothing_else_stands_at_the_top():
    """The paper's files, and what every repository has."""
    assert {path.parts[0] for path in tracked()} <= TOP | ROOMS


def test_train_reads_from_top_to_bottom():
    """Five import lines from the folders; L_total is written once; comments say why."""
    code = lines_of(Path("train.py"))
    ours = [line for line in code if line.startswith(("from plumbing", "from tiny", "from real"))]
    assert len(ours) <= 5
    everything = [line for path in FILES.values() for line in lines_of(path)]
    assert sum(line.strip().startswith("L_total = L_text +") for line in everything) == 1
    least = {"train.py": 15, "teachers.py": 8, "model.py": 8, "data.py": 8}
    for name, per_hundred in least.items():
        assert 100 * comments(name) >= per_hundred * code_lines(name), name


def comments(name: str) -> int:
    """The lines of a file that are a comment."""
    return sum(line.strip().startswith("#") for line in lines_of(Path(name)))


def code_lines(name: str) -> int:
    """The lines of a file without blank lines, comments and docstrings."""
    lines = lines_of(Path(name))
    for node in ast.walk(ast.parse("\n".join(lines))):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[first:last] = [""] * (last - first)
    return sum(bool(line.strip()) for line in lines) - comments(name)


def test_lines_are_short():
    """No line of any .py has more than 100 characters."""
    for path in tracked():
        if path.suffix == ".py":
            for i, line in enumerate(lines_of(path), start=1):
                assert len(line) <= 100, f"{path}: line {i}"
