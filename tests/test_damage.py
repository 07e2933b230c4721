"""Files of our own that are damaged, a disk that refuses: one line, and nothing half written."""

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import InputError
from plumbing import finished_run
from plumbing.checkpoints import examine, saved_checkpoints
from plumbing.files import read_tensors, temporary_name, write_tensors
from plumbing.finished_run import load_run, save_weights
from plumbing.run_log import RunLog
from plumbing.teacher_outputs import TeacherCache
from tests.common import SHORT, assert_same_run, damage, tiny_teachers
from tiny.pretrain import FOLDER
from tiny.world import WorldImages

HOW = ("flipped", "halved", "empty", "missing", "a folder", "a pipe")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("file", ["model.safetensors", "vocabulary.json"])
def test_a_damaged_run_does_not_answer(kept, tmp_path, file, how):
    """What `ask` and --evaluate read: a bit flipped, halved, empty, gone, a folder, a pipe."""
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        shutil.copy(kept / "runs/kept" / name, tmp_path / name)
    load_run(tmp_path, "cpu")
    damage(tmp_path / file, how)
    with pytest.raises(InputError, match=file):
        load_run(tmp_path, "cpu")


def test_other_words_in_the_same_file_are_noticed(kept, tmp_path):
    """Two words that change places give every answer another meaning, and no tensor tells."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(kept / "runs/kept" / name, tmp_path / name)
    text = (kept / "runs/kept/vocabulary.json").read_text(encoding="utf-8")
    swapped = text.replace('"red"', '"_"').replace('"blue"', '"red"').replace('"_"', '"blue"')
    (tmp_path / "vocabulary.json").write_text(swapped, encoding="utf-8")
    with pytest.raises(InputError, match="vocabulary.json: has changed since .*model.safetensors"):
        load_run(tmp_path, "cpu")


def test_weights_that_are_no_numbers_are_not_read(tmp_path):
    """nan in a file that is otherwise as it was written."""
    write_tensors(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="a.safetensors: w holds nan or inf; train again"):
        read_tensors(tmp_path / "a.safetensors", "train again")


@pytest.mark.parametrize("how", HOW[:3])
def test_damaged_weights_of_stage0_are_named(workplace, tmp_path, monkeypatch, how):
    """With the remedy: deleted, the file is made again."""
    shutil.copytree(workplace / FOLDER, tmp_path / FOLDER)
    monkeypatch.chdir(tmp_path)
    file = next(Path(FOLDER).glob("eva-*.safetensors"))
    damage(file, how)
    with pytest.raises(InputError, match="eva-.*safetensors: damaged: .*delete it"):
        train.main([*SHORT])


NAMES = [f"train-0/{i}" for i in range(4)]


def make_cache(folder: Path, encoder) -> TeacherCache:
    pictures = WorldImages("train", 4)
    return TeacherCache(folder, "eva", encoder, NAMES, pictures, "here", "as drawn")


@pytest.mark.parametrize("how", [*HOW, "zeroed", "reordered"])
@pytest.mark.parametrize("part", ["tokens.npy", "crc32.npy", "json"])
def test_a_damaged_cache_is_named(tmp_path, part, how):
    """The row, or the file; a row of zeros and rows that changed places are as damaged as any."""
    encoder = tiny_teachers().encoders["eva"]
    make_cache(tmp_path, encoder)
    file = next(tmp_path.glob(f"*.{part}"))
    if how in ("zeroed", "reordered"):
        if part == "json":
            return  # it has no rows
        rows = np.load(file)
        rows[:] = 0 if how == "zeroed" else rows[::-1].copy()
        np.save(file, rows)
    elif part == "json" and how == "missing":
        return  # then it is made again
    else:
        damage(file, how)
    with pytest.raises(InputError, match="eva"):
        make_cache(tmp_path, encoder).read(NAMES, torch.device("cpu"))


def test_what_dead_processes_left_is_cleared(tmp_path):
    """Of this machine's dead processes only: the living, and other machines, may still write."""
    host = platform.node()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"a.bin.{host}-{dead.pid}.tmp", f"a.bin.{host}-1.tmp", "a.bin.other-1.tmp"):
        (tmp_path / name).touch()
    own = temporary_name(tmp_path / "a.bin")
    assert own.name == f"a.bin.{host}-{os.getpid()}.tmp"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"a.bin.{host}-1.tmp", "a.bin.other-1.tmp"}


# ------------------------------------------------------------------------------------------------
# A disk that refuses


@contextlib.contextmanager
def largest_file(size: int):
    """No file may be larger: what a full disk does, but for the error's number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size, place", [(300_000, "stage0"), (60_000, "cache"),
                                         (500_000, "checkpoints"), (200, "config.json")])
def test_a_full_disk_is_one_line(workplace, tmp_path, monkeypatch, size, place):
    """Stage 0, cache, checkpoint, config: the place and the reason; no half of a file stays."""
    monkeypatch.chdir(tmp_path)
    if place != "stage0":
        shutil.copytree(workplace / FOLDER, FOLDER)
    if place in ("checkpoints", "config.json"):
        shutil.copytree(workplace / "runs/teachers", "runs/teachers")
    with largest_file(size), pytest.raises((InputError, OSError)) as error:
        train.main([*SHORT, "--out", "runs/full", "--save-every", "2"])
    said = f"{getattr(error.value, 'filename', '')} {error.value}"
    assert place in said or (place == "cache" and "teachers" in said), said
    assert not list(tmp_path.rglob("*.tmp"))
    for path in saved_checkpoints(Path("runs/full/checkpoints")):
        assert examine(path)[0] is None


def test_the_log_keeps_no_half_line(tmp_path, monkeypatch):
    """A line that the disk cuts is taken back."""
    monkeypatch.chdir(tmp_path)
    c = train.parse_flags(["--tiny", "--out", "."])[0]
    log = RunLog(c, True, False, train.Progress(), watch=None)
    log.append("a whole line\n")
    with largest_file(20), pytest.raises(OSError, match="log.jsonl"):
        log.append("another line, which is too long\n")
    assert Path("log.jsonl").read_text(encoding="utf-8") == "a whole line\n"


def test_a_trained_model_is_written_elsewhere(kept, tmp_path, monkeypatch):
    """If the run folder refuses it, it is in the folder that the line names, whole.

    From the last checkpoint, which the end of stage 2 makes, it is exported again.
    """
    monkeypatch.chdir(kept)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(finished_run.tempfile, "tempdir", None)
    shutil.copytree("runs/kept", "runs/refused")

    def refuse(folder, tensors, **about):
        if folder.name == "refused":
            raise OSError(28, "No space left on device", str(folder))
        save_weights(folder, tensors, **about)

    with monkeypatch.context() as patch:
        patch.setattr(finished_run, "save_weights", refuse)
        with pytest.raises(InputError, match="No space left on device.*move its files"):
            train.main(["--resume", "runs/refused"])
    elsewhere = next(tmp_path.glob("movekd-*"))
    expected = Path("runs/kept/model.safetensors").read_bytes()
    assert (elsewhere / "model.safetensors").read_bytes() == expected
    train.main(["--resume", "runs/refused"])
    assert_same_run(Path("runs/refused"), Path("runs/kept"))
