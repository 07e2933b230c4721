"""Other locales, scripts, ways to start a process, and devices, as far as Linux can show them."""

import dataclasses
import os
import subprocess
import sys
import warnings

import pytest

from data import Conversations, InputError
from plumbing import plots, sets
from plumbing.checks import check_machine, find_device
from plumbing.config import TINY
from plumbing.evaluate import questions_of
from plumbing.files import read_json, write_json
from tests.common import HERE, SHORT, conversation, images, save_png
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records


@pytest.mark.slow
def test_text_is_utf8_whatever_the_locale(workplace):
    """A run in plain ASCII's locale: its files are UTF-8, its console shows \\u... ."""
    save_png(workplace / "a.png", images(1)[0])
    turns = conversation("<image>\nчто это?", "größe 图")
    write_json(workplace / "russian.json", [{"image": "a.png", "conversations": turns}] * 12)
    flags = ["--out", "runs/russian", "--data", "russian.json", "--eval-data", "russian.json"]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *SHORT, *flags], cwd=workplace,
                          env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "что это?".encode("ascii", "backslashreplace") in done.stdout
    assert {"что", "größe", "图"} <= set(read_json(workplace / "runs/russian/vocabulary.json"))


def test_answers_in_any_script_are_drawn_without_a_warning(tmp_path):
    """An untrained LLM answers anything: a box stands for what the font has no glyph for."""
    records = world_records("test", "question", 3)
    answers = ["图里 🦊\u0000\u200f", "a\tb\nc", "$x_1$ \ue000", "\U0010fffd红"] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_samples(tmp_path / "samples.png", questions_of(records), answers,
                           WorldImages("test", 3))
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_a_spawned_worker_gives_the_same_samples(monkeypatch):
    """Its pickled copy of a data set, at work in another process, gives the batches of this one."""
    monkeypatch.setattr(sets, "START", "spawn")
    records = world_records("train", "chat", 4) + world_records("train", "text", 4)
    tokenizer = WordTokenizer.from_records(records)
    dataset = Conversations(records, WorldImages("train", 4), tokenizer, "v1", 36, 999)
    loaded = []
    for workers in (0, 1):
        options = sets.loader_options(dataclasses.replace(TINY, workers=workers))
        loaded.append(list(sets.make_loader(dataset, 2, 1, 0, tokenizer.pad, **options)))
    for ours, theirs in zip(*loaded, strict=True):
        assert ours["input_ids"].equal(theirs["input_ids"])
        assert ours["image_names"] == theirs["image_names"]
        assert ours["images"] is None or ours["images"].equal(theirs["images"])


def test_the_device_is_checked(monkeypatch):
    """"auto" is a device that is here; what Apple's cannot train is an error."""
    check_machine(dataclasses.replace(TINY, device=find_device("auto")), trains=True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    for fields, line in (({"precision": "bf16"}, "--precision fp32"),
                         ({"processes": 2}, "one process")):
        with pytest.raises(InputError, match=f"--device mps: .*{line}"):
            check_machine(dataclasses.replace(TINY, device="mps", **fields), trains=True)
