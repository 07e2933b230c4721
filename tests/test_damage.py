"""Files of our own that are damaged, a disk that refuses: one line, and nothing half written."""

import contextlib
import itertools
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import InputError
from plumbing import files
from plumbing.build import build_encoder, build_vlm
from plumbing.checkpoints import Progress, examine, saved_checkpoints
from plumbing.config import TINY, Config
from plumbing.files import read_json, read_tensors, write_json, write_tensors
from plumbing.finished_run import load_run
from plumbing.run_log import RunLog
from real.encoder_weights import load_net
from real.image_files import load_image
from tests.common import SHORT, C, damage
from tiny.llm import WordTokenizer

HOW = ("flipped", "halved", "empty", "missing", "a folder", "a pipe")


@pytest.mark.parametrize("file, how", [
    *itertools.product(["model.safetensors", "vocabulary.json"], HOW),
    ("vocabulary.json: has changed since .*model.safetensors", "two words swapped"),
    ("config.json: --lm-heads 5", {"lm_heads": 5}),
    ("config.json: --clip 'rubbish': must read", {"clip": "rubbish"}),
    ("config.json: .*cannot be the student", {"clip": "resnet50 img_size=64"})])
def test_a_damaged_run_does_not_answer(kept, tmp_path, file, how):
    """What `ask` and --evaluate read: a bit flipped, halved, empty, gone, a folder, other words.

    A config.json that was edited, too, is one line.
    """
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        shutil.copy(kept / "runs/kept" / name, tmp_path / name)
    load_run(tmp_path, "cpu")
    if how == "two words swapped":  # every answer gets another meaning
        words = read_json(tmp_path / "vocabulary.json")
        write_json(tmp_path / "vocabulary.json", [*words[:-2], words[-1], words[-2]])
    elif isinstance(how, dict):
        config = read_json(tmp_path / "config.json")
        write_json(tmp_path / "config.json", {**config, **how})
    else:
        damage(tmp_path / file, how)
    with pytest.raises(InputError, match=file):
        load_run(tmp_path, "cpu")


@pytest.mark.parametrize("name", ["llm", "eva"])
def test_weights_of_stage0_that_do_not_fit_are_named(workplace, tmp_path, name):
    """A tensor missing, or of another shape; the checksums are right."""
    file = next((workplace / C.stage0).glob(f"{name}-*.safetensors"))
    tensors = read_tensors(file, "")
    first = next(iter(tensors))
    made_of = {name: tmp_path / file.name}
    for changed in ({**tensors, first: torch.ones(3, 3)},
                    {key: value for key, value in tensors.items() if key != first}):
        write_tensors(tmp_path / file.name, changed)
        with pytest.raises(InputError, match=f"{file.name}: does not fit .*; delete it, and it is"):
            if name == "llm":
                build_vlm(C, WordTokenizer.from_texts(["a"]), made_of)
            build_encoder(C, "eva", made_of)


KINDS = {
    "a.parquet": (b"PAR1", "is parquet: .*pandas.read_parquet.*to_json"),
    "a.gz": (b"\x1f\x8b\b", "is compressed: gunzip"), "a.csv": (b"id,image\n", "pandas.read_csv"),
    "a.arrow": (b"\xff\xff\xff\xff", "Dataset.from_file"), "a.yml": (b"- id: 1", "yaml.safe_load"),
    "a.json": ("[]".encode("utf-16"), "UTF-16: iconv -f UTF-16"),
    "c.json": (b"\n<!DOCTYPE html>", "is a web page"), "d.json": (b"hello", "not valid JSON"),
    "e.json": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named(tmp_path, name):
    """With what brings it into JSON; images and weights too say that they are another file."""
    content, fault = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=fault):
        read_json(tmp_path / name)
    if name in ("c.json", "e.json"):
        with pytest.raises(InputError, match=fault):
            load_image(tmp_path / name, 32)
        with pytest.raises(InputError, match=f"not readable as weights: .*{fault}"):
            load_net(TINY.eva, tmp_path / name)


def test_weights_that_are_no_numbers_are_not_read(tmp_path):
    """NaN in a file that is otherwise as it was written."""
    write_tensors(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="a.safetensors: w holds nan or inf; train again"):
        read_tensors(tmp_path / "a.safetensors", "train again")


@pytest.mark.parametrize("how", HOW[:3])
def test_damaged_weights_of_stage0_are_named(workplace, tmp_path, monkeypatch, how):
    """With the remedy: deleted, the file is made again."""
    shutil.copytree(workplace / C.stage0, tmp_path / C.stage0)
    monkeypatch.chdir(tmp_path)
    file = next(Path(C.stage0).glob("eva-*.safetensors"))
    damage(file, how)
    with pytest.raises(InputError, match="eva-.*safetensors: damaged: .*delete it"):
        train.main([*SHORT])


def test_what_dead_processes_left_is_cleared(tmp_path):
    """Of this machine's dead processes only: others may still write."""
    host = platform.node()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"a.bin.{host}-{dead.pid}.tmp", f"a.bin.{host}-1.tmp", "a.bin.other-1.tmp"):
        (tmp_path / name).touch()
    own = files.temporary_name(tmp_path / "a.bin")
    assert own.name == f"a.bin.{host}-{os.getpid()}.tmp"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"a.bin.{host}-1.tmp", "a.bin.other-1.tmp"}


@contextlib.contextmanager
def largest_file(size: int):
    """Let no file be larger, which is what a full disk does, except for the error's number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size, place", [
    pytest.param(300_000, "stage0", marks=pytest.mark.slow), (60_000, "cache"),
    (1_890_000, "checkpoints"), (200, "config.json")])
def test_a_full_disk_is_one_line(workplace, tmp_path, monkeypatch, size, place):
    """Stage 0, cache, checkpoint, config: the place and the reason; no half of a file stays."""
    monkeypatch.chdir(tmp_path)
    if place != "stage0":
        shutil.copytree(workplace / C.stage0, C.stage0)
    if place in ("checkpoints", "config.json"):
        shutil.copytree(workplace / "runs/teachers", "runs/teachers")
    with largest_file(size), pytest.raises((InputError, OSError)) as error:
        train.main([*SHORT, "--out", "runs/full", "--save-every", "2"])
    said = f"{getattr(error.value, 'filename', '')} {error.value}"
    assert place in said or (place == "cache" and "teachers" in said), said
    assert not list(tmp_path.rglob("*.tmp"))
    for path in saved_checkpoints(Path("runs/full/checkpoints")):
        assert examine(path)[0] is None


def test_the_log_keeps_no_half_line(tmp_path):
    """A line that the disk cuts is taken back."""
    log = RunLog(Config(out=str(tmp_path)), True, Progress(), {}, None)
    log.append("a whole line\n")
    with largest_file(20), pytest.raises(OSError, match="log.jsonl"):
        log.append("another line, which is too long\n")
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == "a whole line\n"
