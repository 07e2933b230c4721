"""The order of the house: who may import whom, and how long things may be."""

import ast
import graphlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PAPER = ("mole", "kd_loss", "teachers", "model", "data", "train")
FLOORS = ("data mole kd_loss teachers", "model", "plumbing.files plumbing.signals", "tiny", "real",
          "plumbing", "train", "tools")
FLAT = FLOORS[0].split()  # these import nothing of ours, not each other either


def module_files() -> dict[str, Path]:
    """The .py files of the house that are no tests, by module name."""
    paths = [HERE / f"{name}.py" for name in PAPER]
    for folder in ("tiny", "real", "plumbing", "tools"):
        paths += sorted((HERE / folder).rglob("*.py"))
    names = {}
    for path in paths:
        parts = path.relative_to(HERE).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


FILES = module_files()


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
    """No function has more than 45 lines; MoVEKD.forward, the whole method, at most 40."""
    for path in FILES.values():
        long = {name: n for name, n in functions(path).items() if n > 45}
        assert not long
    forwards = [n for name, n in functions(HERE / "model.py").items() if ": forward" in name]
    assert max(forwards) <= 40


def test_lines_are_short():
    """No line of any .py has more than 100 characters; the six files have 1,750 lines at most."""
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 100, f"{path}: line {i}"
    texts = [(HERE / f"{name}.py").read_text(encoding="utf-8") for name in PAPER]
    assert sum(len(text.splitlines()) for text in texts) <= 1_750
