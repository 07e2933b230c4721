"""What a person sees of a run while it trains; none of it changes the run."""

import dataclasses
import sys

import pytest
import torch

from data import InputError
from plumbing import plots, run_log
from plumbing.files import read_json
from plumbing.run_folder import read_log
from plumbing.run_log import HeldOut, Watch, next_commands, stage_words
from tests.common import C, SHORT, assert_same_run, run_here, some_conversations


@pytest.fixture(scope="module")
def sets():
    """Datasets of both stages."""
    return {1: some_conversations(32), 2: some_conversations(16)}


def test_the_output_explains_itself(workplace):
    """A line a stage in plain words, the heading of the log, and at the end what to try next."""
    out = (workplace / "output.txt").read_text(encoding="utf-8")
    for stage in (0, 1, 2):
        assert stage_words(dataclasses.replace(C, n_pretrain=128, n_train=64, n_described=32,
                                               n_text=32), stage) in out
    assert out.count(run_log.HEADING) == 2
    assert next_commands(C) in out and "--recipe ours" in out
    ours = dataclasses.replace(C, adapter_direction="student_to_teacher")
    assert "--recipe ours" not in next_commands(ours)  # it has just been run
    assert out.splitlines()[-1].startswith("result: ")
    assert "held-out accuracy of 48 questions" in out


def test_a_long_run_and_a_baseline_are_not_told_what_they_do():
    """The words are those of the whole method in the tiny world, of no other run."""
    assert stage_words(dataclasses.replace(C, llm="x"), 1) == ""
    assert stage_words(dataclasses.replace(C, lambda_kd=0.0), 1) == ""


def test_watching_changes_nothing(workplace, monkeypatch):
    """A run that is not asked in between has the same log and weights, byte for byte."""
    monkeypatch.setattr(HeldOut, "measure", lambda *_: None)
    monkeypatch.setattr(run_log, "EVERY", 1e9)
    run_here(workplace, *SHORT, "--out", "runs/unwatched")
    assert_same_run(workplace / "runs/unwatched", workplace / "runs/tiny")
    assert not (workplace / "runs/unwatched/held_out.json").exists()


def test_held_out_accuracy_is_asked_at_each_quarter(workplace):
    """Four points a stage; the last is the run's own accuracy, for all questions are asked."""
    points = read_json(workplace / "runs/tiny/held_out.json")
    assert [(p["stage"], p["step"]) for p in points] == [(s, k) for s in (1, 2)
                                                         for k in (1, 2, 3, 4)]
    result = read_json(workplace / "runs/tiny/result.json")
    assert points[-1]["accuracy"] == pytest.approx(result["macro_accuracy"])


def test_the_time_left_is_that_of_both_stages(sets, monkeypatch):
    """One step a second: what is left of stage 1, and all of stage 2."""
    c = dataclasses.replace(C, stage1_batch=4, stage2_batch=2)
    seen = Watch(c, True, sets, None)
    assert seen.steps == {1: 9, 2: 55}     # 38 rows in batches of 4; 22 in batches of 2, 5 epochs
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    seen.begin(1)
    assert seen.after_step(1, 1) == ""
    assert seen.after_step(1, 2) == "0:34 left of the run"     # 7 + 55 / 2


def test_curves_are_drawn_while_it_trains(workplace, sets, monkeypatch):
    """Not at every line, but as soon as the time is up; the file is never half."""
    drawn = []
    monkeypatch.setattr(run_log, "plot_curves", drawn.append)
    seen = Watch(C, True, sets, None)
    line = read_log(workplace / "runs/tiny")[0]
    seen.after_line(line)
    assert not drawn
    seen.next_drawing = 0.0
    seen.after_line(line)
    seen.after_line(line)
    assert len(drawn) == 1


def test_curves_of_any_run(workplace, tmp_path):
    """One line only, no experts, no teachers: there is a picture all the same."""
    line = '{"stage": 2, "step": 0, "L_text": 1.0}\n'
    (tmp_path / "log.jsonl").write_text(line, encoding="utf-8")
    plots.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_is_optional(workplace, sets, monkeypatch):
    """Missing: one line before any work. Installed: every number of a line is handed over."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard events: the package is not installed"):
        run_here(workplace, *SHORT, "--out", "runs/board", "--tensorboard", "events")

    class Writer:
        def __init__(self, folder):
            self.folder, self.written = folder, []

        def add_scalar(self, *scalar):
            self.written.append(scalar)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        type(torch)("torch.utils.tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    seen = Watch(dataclasses.replace(C, tensorboard="events"), True, sets, None)
    seen.after_line({"stage": 2, "step": 3, "L_text": 0.5, "experts": [[1.0]]})
    assert seen.writer.written == [("stage 2/L_text", 0.5, 3)]
