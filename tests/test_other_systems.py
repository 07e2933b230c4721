"""macOS and Windows, as far as Linux can tell: the source, and runs that miss what they lack.

No test here has run on either. Windows refuses to rename onto a file with Path.rename, and to
rename or delete one that is open or mapped; it lacks modules, functions and signals of POSIX, and
has neither fork nor sessions. Both are simulated.
"""

import ast
import importlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing import batches, plots, run_folder
from plumbing.cli import run
from plumbing.config import TINY
from plumbing.evaluate import print_accuracy, questions_of
from plumbing.files import read_json, read_tensors, write_json, write_tensors
from plumbing.finished_run import save_weights
from plumbing.sets import build_datasets, build_tokenizer, load_sets
from plumbing.teacher_outputs import TeacherCache
from real.records import read_records
from teachers import VisionEncoder
from tests.common import HERE, SHORT, assert_same_run, run_here
from tiny.world import WorldImages, world_records

SOURCES = sorted([*HERE.glob("*.py"), *HERE.glob("*/*.py")])
OURS = [path for path in SOURCES if not path.name.startswith(("test_", "tests_", "conftest"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
POSIX_NAMES = {  # of os and signal
    "fork", "forkpty", "killpg", "getpgid", "setsid", "setpgid", "mkfifo", "posix_fallocate",
    "sched_getaffinity", "getuid", "geteuid", "uname", "statvfs", "nice", "sync", "O_DIRECTORY",
    "wait3", "wait4", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "alarm",
    "pthread_kill", "setitimer"}
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


def test_nothing_of_posix_without_a_fallback():
    """Its modules are imported in a `try` only, its names used beside a `hasattr`; no rename."""
    for path in OURS:
        check_posix(path)


def check_posix(path: Path) -> None:
    guarded = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Try) or (isinstance(node, ast.FunctionDef)
                                         and "hasattr(" in ast.unparse(node)):
            guarded.update(ast.walk(node))
    for node in ast.walk(TREES[path]):
        place = f"{path}: line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import) and node not in guarded:
            assert not POSIX_MODULES & {alias.name for alias in node.names}, place
        if isinstance(node, ast.ImportFrom):
            assert node.module not in POSIX_MODULES, place
        if isinstance(node, ast.Attribute) and node not in guarded:
            of = getattr(node.value, "id", "")
            assert of not in ("os", "signal") or node.attr not in POSIX_NAMES, place
        # Path.replace does on every system what Path.rename does on POSIX
        if isinstance(node, ast.Call):
            assert name_of(node) not in ("rename", "renames"), place


# ------------------------------------------------------------------------------------------------
# Windows


def is_held(path: Path) -> bool:
    """Whether this process has a file open or mapped; Windows then neither moves nor deletes it."""
    real = str(Path(path).resolve())
    handles = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
               if os.path.exists(f"/proc/self/fd/{n}")]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return real in handles or f" {real}\n" in maps


@pytest.fixture
def windows(monkeypatch):
    """File operations that refuse what Windows refuses; no modules and functions of POSIX."""
    def refusing(operation):
        def refuse(path, *args, **kwargs):
            for place in (path, *args):
                if isinstance(place, (str, Path)) and Path(place).is_file() and is_held(place):
                    raise PermissionError(13, "used by another process", str(place))
            return operation(path, *args, **kwargs)
        return refuse

    def rename(path, target):
        if Path(target).exists():
            raise FileExistsError(17, "exists already", str(target))
        return os.rename(path, target)

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(run_folder, "fcntl", None)
    monkeypatch.setattr(run_folder, "resource", None)
    for name in ("posix_fallocate", "killpg", "mkfifo", "setsid"):
        monkeypatch.delattr(os, name)


def test_what_the_simulation_refuses(windows, tmp_path):
    """A mapped file cannot be moved or deleted, one that nobody holds can."""
    np.save(tmp_path / "a.npy", np.zeros(9))
    (tmp_path / "b").write_bytes(b"")
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    with pytest.raises(PermissionError):
        (tmp_path / "a.npy").replace(tmp_path / "b")
    with pytest.raises(PermissionError):
        (tmp_path / "a.npy").unlink()
    del mapped
    with pytest.raises(FileExistsError):
        (tmp_path / "a.npy").rename(tmp_path / "b")
    (tmp_path / "a.npy").replace(tmp_path / "b")


def make_cache(folder: Path) -> TeacherCache:
    pictures = WorldImages("train", 2)
    names = ["train-0/0.png", "train-0/1.png"]
    return TeacherCache(folder, "eva", VisionEncoder(TINY.eva).eval(), names, pictures, "here",
                        pictures.fingerprint(names), batch=1)


def test_files_are_written_and_replaced_on_windows(windows, tmp_path):
    """The teachers' cache; JSON, weights and pictures, where an older file is."""
    cache = make_cache(tmp_path)
    assert cache.read(["train-0/1.png"], torch.device("cpu")).tokens.shape == (1, 64, 80)
    for value in (1, 2):
        write_json(tmp_path / "a.json", value)
        write_tensors(tmp_path / "a.safetensors", {"a": torch.tensor(value)})
        save_weights(tmp_path / "run", {"a": torch.tensor(value)})
    assert read_json(tmp_path / "a.json") == 2
    for file in (tmp_path / "a.safetensors", tmp_path / "run/model.safetensors"):
        assert read_tensors(file, "")["a"] == 2
    assert run_folder.peak_rss_mb() == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_that_fails_leaves_nothing_on_windows(windows, tmp_path, monkeypatch):
    """The mapped files are closed before they are deleted."""
    monkeypatch.setattr("plumbing.teacher_outputs.row_checksums", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_cache(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_on_windows(windows, workplace, capsys):
    """The same run, byte for byte: cache, checkpoints, and the files of an older run replaced."""
    shutil.copytree(workplace / "runs/tiny", workplace / "runs/windows")
    run_here(workplace, *SHORT, "--out", "runs/windows", "--cache-teachers", "runs/windows-cache",
             "--save-every", "2", "--keep", "1", "--overwrite")
    assert_same_run(workplace / "runs/windows", workplace / "runs/tiny")
    assert not list((workplace / "runs").rglob("*.tmp"))
    assert "peak 0" not in capsys.readouterr().out


def test_a_picture_that_is_looked_at_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    """A viewer on Windows holds curves.png: the old one stays, a line says so."""
    (tmp_path / "log.jsonl").write_text('{"stage": 2, "step": 0, "L_text": 1.0}\n',
                                        encoding="utf-8")
    plots.plot_curves(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()

    def held(path, target):
        raise PermissionError(13, "used by another process", str(target))

    monkeypatch.setattr(Path, "replace", held)
    plots.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert "curves.png: is open in another program" in capsys.readouterr().err


def test_any_character_on_a_console_of_256(monkeypatch):
    """Code page 1252: a type of question in Russian and Chinese is printed, not a traceback."""
    page = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", page)
    kinds = dict.fromkeys(("что это?", "图里有什么", "größe"), 50.0)
    columns = {f"{name}accuracy": kinds for name in ("", "blank_", "majority_", "chance_")}
    run(lambda: print_accuracy({**columns, "macro_accuracy": 50.0}))
    shown = page.buffer.getvalue().decode("cp1252")
    assert "\\u0447\\u0442\\u043e" in shown and "\\u56fe" in shown and "größe" in shown


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


POOR = """
import os, pathlib, signal, sys
for name in {modules!r}:
    sys.modules[name] = None
for name in {names!r}:
    for module in (os, signal):
        if hasattr(module, name):
            delattr(module, name)

def rename(path, target):
    if os.path.exists(target):
        raise FileExistsError(17, "exists already", str(target))
    os.rename(path, target)

pathlib.Path.rename = rename
sys.path.insert(0, {here!r})
import plumbing.batches
plumbing.batches.START = "spawn"
import train
from plumbing.cli import run

if __name__ == "__main__":
    run(train.main)
"""


@pytest.mark.slow
def test_a_run_in_a_process_that_has_nothing_of_posix(workplace, tmp_path):
    """From stage 0 to the evaluation, in processes without the modules, functions and signals."""
    # what Python's own modules for Linux cannot do without
    names = sorted(POSIX_NAMES - {"fork", "uname", "statvfs", "SIGKILL", "SIGCHLD"})
    poor = POOR.format(modules=sorted(POSIX_MODULES - {"posix"}), names=names, here=str(HERE))
    (tmp_path / "poor.py").write_text(poor, encoding="utf-8")
    flags = [*SHORT, "--save-every", "2", "--workers", "1"]
    done = subprocess.run([sys.executable, "poor.py", *flags], cwd=tmp_path, capture_output=True,
                          encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "runs/tiny", workplace / "runs/tiny")


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
