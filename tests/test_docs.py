"""README, CONTRIBUTING and docs name what is there: names, tests, flags, links and commands."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from data import InputError
from plumbing.config import FULL, TINY
from plumbing.flags import parse_flags
from tiny import REFERENCES

HERE = Path(__file__).parent.parent
PAGES = sorted([*HERE.glob("*.md"), *HERE.glob("docs/*.md")])
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
# commands shown in code blocks: the program and its arguments, up to two spaces and a remark
COMMAND = re.compile(r"^    .*?python3? (train\.py|-m [\w.]+) ?(.*?)(?:\s{2,}.*)?$", re.M)
OTHERS = ("venv", "pytest")     # modules that are not ours


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_a_file_exists(page):
    """`file.py: name` is a function or class at the top of that file, `test_x` a test."""
    for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", TEXTS[page]):
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if hasattr(node, "name")}
        assert name.split(".")[0] in names, f"{page.name}: {file}: {name}"
    for file in re.findall(r"`((?:tiny|real|plumbing|tools|tests|docs)/[\w/]+\.\w+)`", TEXTS[page]):
        assert (HERE / file).exists(), f"{page.name}: {file}"
    for name in re.findall(r"`(test_\w+)`", TEXTS[page]):
        assert re.search(rf"^def {name}\(", TESTS, re.M), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("program,rest", sorted(set(COMMAND.findall("\n".join(TEXTS.values())))))
def test_every_command_shown_parses(program, rest):
    """Every `python train.py ...` has flags that exist; every `python -m` has a module."""
    if program == "train.py":
        flags = shlex.split(rest.replace(" dinov2", "").replace("runs/", "runs/no-"))
        if not {"--resume", "--evaluate", "--init-from", "--config"} & set(flags):
            parse_flags(flags)
            return
        with pytest.raises(InputError, match="no such file"):  # runs that nobody has
            parse_flags(flags)
    else:
        name = program.removeprefix("-m ")
        assert name in OTHERS or importlib.util.find_spec(name), name


def test_every_flag_named_in_the_text_exists():
    """A flag in backquotes is one of train.py's or of a tool's."""
    sources = [path.read_text(encoding="utf-8") for path in HERE.glob("*/**/*.py")]
    known = set(re.findall(r'"(--[\w-]+)"', "\n".join(sources)))
    config = ast.parse((HERE / "plumbing/config.py").read_text(encoding="utf-8"))
    for node in ast.walk(config):
        if isinstance(node, ast.AnnAssign):
            known.add("--" + node.target.id.replace("_", "-"))
    theirs = {"--nnodes", "--nproc-per-node", "--shutdown-timeout", "--ipc"}
    for page, text in TEXTS.items():
        if page.name == "messages.md":
            continue  # wrong flags are what it is about
        for flag in re.findall(r"`(--[a-z][\w-]+)", text):
            presets = ("--tiny", "--small", "--full", "--recipe")
            assert flag in known | theirs or flag in presets, f"{page.name}: {flag}"


TABLE = re.compile(r"^\|.*\|\n\|[-:| ]+\|\n(?:\|.*\|\n)*", re.M)  # header, rule, rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_whole(page):
    """Every line that begins with | is rendered as a row: a blank line would end its table."""
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    rows = sum(table.count("\n") for table in TABLE.findall(prose + "\n"))
    assert rows == len(re.findall(r"^\|", prose, re.M))


def test_the_numbers_that_tiny_changes():
    """The table of docs/differences.md has the values of FULL and TINY."""
    text = TEXTS[HERE / "docs/differences.md"]
    rows = re.findall(r"^\|[^|]+, `--([\w-]+)` \| (\S+) \| (\S+) \|", text, re.M)
    assert len(rows) >= 9
    for name, paper, tiny in rows:
        for c, shown in ((FULL, paper), (TINY, tiny)):
            value = getattr(c, name.replace("-", "_"))
            assert shown == (f"{value:g}" if isinstance(value, float) else str(value)), name


def test_the_references_are_those_of_the_results():
    """What a run is shown beside stands in the tables of docs/results.md."""
    for variant, (_, mean, width, _) in REFERENCES.items():
        row = f"(`{variant}`) | {mean} ± {width} |"
        assert row in TEXTS[HERE / "docs/results.md"], row


def test_the_readme_can_be_read_in_one_sitting():
    lines = TEXTS[HERE / "README.md"].splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


@pytest.mark.slow
def test_the_step_by_hand_is_a_step():
    """The README's lines for a notebook run as they stand: every part of the model learns."""
    code = TEXTS[HERE / "README.md"].split("in a notebook:\n\n")[1].split("\n\n")[0]
    names = {}
    exec(code.replace("    ", ""), names)
    for name, parameters in names["model"].parameter_groups().items():
        assert any(p.grad is not None and p.grad.any() for p in parameters), name
