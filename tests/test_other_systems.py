"""What Linux can test of other systems: encodings, consoles, spawned processes, fonts."""

import ast
import importlib
import io
import pickle
import sys
import types
import warnings

import pytest

from plumbing import batches, launcher, plots
from plumbing.cli import run
from plumbing.config import TINY
from plumbing.evaluate import print_accuracy, questions_of
from plumbing.sets import build_datasets, build_tokenizer, load_sets
from real.records import read_records
from tests.common import HERE, SHORT, assert_same_run, run_here
from tiny.world import WorldImages, world_records

SOURCES = sorted([*HERE.glob("*.py"), *HERE.glob("*/*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
IN_TEXT_MODE = {"text", "universal_newlines"}


def name_of(call: ast.Call) -> str:
    """The last part of what is called."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


# ------------------------------------------------------------------------------------------------
# The source


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text, which has an encoding."""
    name, keywords = name_of(call), {keyword.arg for keyword in call.keywords}
    if name in ("read_text", "write_text") or keywords & IN_TEXT_MODE:
        return True
    module = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name not in ("open", "fdopen") or getattr(module, "id", "") == "Image":
        return False
    words = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
    modes = [word for word in words if isinstance(word, str) and set(word) <= set("rwxab+t")]
    return not any("b" in mode for mode in modes)


def test_every_text_has_an_encoding():
    """open, read_text, write_text and processes read as text: never the locale's encoding."""
    for path, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and opens_text(call):
                given = {keyword.arg for keyword in call.keywords}
                assert "encoding" in given, f"{path}: line {call.lineno}: {ast.unparse(call)}"


def test_what_counts_as_text():
    """The check above sees what it should see."""
    text = ("open(p)", "open(p, 'w')", "path.open()", "p.read_text()", "run(a, text=True)")
    binary = ("open(p, 'rb')", "path.open('wb')", "open(p, mode='r+b')", "Image.open(p)", "run(a)")
    assert [opens_text(ast.parse(code, mode="eval").body) for code in text] == [True] * 5
    assert [opens_text(ast.parse(code, mode="eval").body) for code in binary] == [False] * 5


def test_any_character_on_a_console_of_256(monkeypatch):
    """Code page 1252: a type of question in Russian and Chinese is printed, not a traceback."""
    page = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", page)
    kinds = dict.fromkeys(("что это?", "图里有什么", "größe"), 50.0)
    columns = {f"{name}accuracy": kinds for name in ("", "blank_", "majority_", "chance_")}
    run(lambda: print_accuracy({**columns, "macro_accuracy": 50.0}))
    shown = page.buffer.getvalue().decode("cp1252")
    assert "\\u0447\\u0442\\u043e" in shown and "\\u56fe" in shown and "größe" in shown


def test_ctrl_c_on_windows_reaches_the_processes_by_itself(monkeypatch):
    """Without sessions the console signals all; Windows could pass on nothing but an end."""
    class Child:
        returncode = None
        polls = 0

        def poll(self):
            self.polls += 1
            self.returncode = 3 if self.polls > 3 else None
            return self.returncode

        def send_signal(self, number):
            raise ValueError(f"Unsupported signal: {number}")

    monkeypatch.setattr(launcher, "os", types.SimpleNamespace(name="nt"))
    assert launcher.watch([Child(), Child()], [2]) is None


# ------------------------------------------------------------------------------------------------
# Processes that are spawned, not forked


def test_what_a_spawned_worker_gets_can_be_pickled(tmp_path):
    """Dataset, and what a worker does first: of the tiny world and of rows in a file."""
    sets = load_sets(TINY.__class__(n_pretrain=4, n_train=4, n_described=2, n_text=2, n_eval=2))
    tokenizer = build_tokenizer(TINY, sets)
    datasets = list(build_datasets(TINY, sets, tokenizer, 36).values())
    (tmp_path / "train.json").write_text(
        '[{"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "é"}]},'
        ' {"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}]}]',
        encoding="utf-8")
    records = read_records(tmp_path / "train.json", tmp_path, skip_bad=False)
    rows = type(datasets[0])(records, batches.PREFETCH, tokenizer, "v1", 36, 99)
    for dataset in (*datasets, rows):
        copy = pickle.loads(pickle.dumps(dataset))
        for i in range(len(dataset)):
            ours, theirs = dataset[i], copy[i]
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours["image"] is None or ours["image"].equal(theirs["image"])
    assert pickle.loads(pickle.dumps(batches.begin_worker)) is not None


def test_fork_is_for_linux_only(monkeypatch):
    """macOS has fork too, but its libraries may fail in one."""
    for system, start in (("darwin", "spawn"), ("win32", "spawn"), ("linux", "fork")):
        monkeypatch.setattr(sys, "platform", system)
        assert importlib.reload(batches).START == start


@pytest.mark.slow
def test_spawned_workers_give_the_same_log(workplace, monkeypatch):
    """`--workers 1` with spawn forced: the log and the weights of the run without workers."""
    monkeypatch.setattr(batches, "START", "spawn")
    run_here(workplace, *SHORT, "--out", "runs/spawned", "--workers", "1")
    assert_same_run(workplace / "runs/spawned", workplace / "runs/tiny")


# ------------------------------------------------------------------------------------------------
# Characters that the plots' font lacks


def test_answers_in_any_script_are_drawn_without_a_warning(tmp_path):
    """An untrained LLM says anything: a box stands for what the font has no glyph for."""
    records = world_records("test", "question", 3)
    answers = ["图里 🦊\u0000\u200f", "a\tb\nc", "$x_1$ \ue000", "\U0010fffd红"] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_samples(tmp_path / "samples.png", questions_of(records), answers,
                           WorldImages("test", 3))
    assert (tmp_path / "samples.png").stat().st_size > 10_000
    assert plots.drawable("red 红 é\tя") == "red \u25a1 é я"
