"""What a person sees of a run while it trains; none of it changes the run."""

import dataclasses
import itertools
import sys
from unittest import mock

import pytest
import torch

import train
from data import InputError
from plumbing import plots, run_log
from plumbing.checkpoints import Progress
from plumbing.files import read_json
from plumbing.run_folder import read_log
from plumbing.run_log import HeldOut, RunLog, count_stage_steps, next_commands, stand_in_words
from tests.common import SHORT, C, assert_same_run, run_here, some_conversations


def new_log(folder, steps: int = 100, **fields) -> RunLog:
    """Return the log of a run in a folder, whose stages have so many steps each."""
    c = dataclasses.replace(C, out=str(folder), **fields)
    return RunLog(c, True, Progress(), {1: steps, 2: steps}, None)


def test_the_output_explains_itself(workplace, monkeypatch):
    """A line per stage, the log's heading, what to try next, if it is the whole tiny method."""
    out = (workplace / "output.txt").read_text(encoding="utf-8")
    for words in (stand_in_words(C), *train.STAGES.values()):
        assert words in out
    assert out.count(run_log.HEADING) == 2
    monkeypatch.chdir(workplace)
    assert next_commands(C) in out and "--recipe ours" in out
    assert "held-out accuracy of 48 questions" in out
    for other in ({"llm": "x"}, {"lambda_kd": 0.0}):
        assert stand_in_words(dataclasses.replace(C, **other)) == ""


def test_asking_and_drawing_change_nothing(workplace, monkeypatch):
    """A run that is neither asked nor drawn has the same log and weights, byte for byte."""
    monkeypatch.setattr(HeldOut, "measure", lambda *_: None)
    monkeypatch.setattr(run_log, "DRAW_SECONDS", 1e9)
    run_here(workplace, *SHORT, "--out", "runs/undrawn")
    assert_same_run(workplace / "runs/undrawn", workplace / "runs/tiny")
    assert not (workplace / "runs/undrawn/held_out.json").exists()


def test_held_out_accuracy_is_asked_at_each_quarter(workplace):
    """Four points per stage; the last is the run's own accuracy, because it has few questions."""
    points = read_json(workplace / "runs/tiny/held_out.json")
    steps = [(point["stage"], point["step"]) for point in points]
    assert steps == [*itertools.product((1, 2), (1, 2, 3, 4))]
    result = read_json(workplace / "runs/tiny/result.json")
    assert points[-1]["accuracy"] == pytest.approx(result["macro_accuracy"])


def test_a_stage_has_the_steps_of_its_epochs():
    """38 rows in batches of 4, once; 22 rows in batches of 2, five times."""
    c = dataclasses.replace(C, stage1_batch=4, stage2_batch=2)
    datasets = {1: some_conversations(32), 2: some_conversations(16)}
    assert count_stage_steps(c, datasets) == {1: 9, 2: 55}


def test_curves_are_drawn_while_it_trains(workplace, tmp_path, monkeypatch):
    """Not at every line, but as soon as the time is up."""
    drawn = []
    monkeypatch.setattr(plots, "plot_curves", drawn.append)
    log = new_log(tmp_path)
    log.bar(Progress()).close()
    line = read_log(workplace / "runs/tiny")[0]
    log.show(line)
    assert not drawn
    log.next_drawing = 0.0
    log.show(line)
    log.show(line)
    assert drawn == [tmp_path]


def test_curves_of_any_run(tmp_path):
    """One line only, no experts, no teachers: there is a picture, and nothing half written."""
    line = '{"stage": 2, "step": 0, "L_text": 1.0}\n'
    (tmp_path / "log.jsonl").write_text(line, encoding="utf-8")
    plots.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_is_optional(workplace, tmp_path, monkeypatch):
    """Missing: one line before any work. Installed: every number of a line is handed over."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard: the package is not installed"):
        run_here(workplace, *SHORT, "--out", "runs/board", "--tensorboard", "events")

    package = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    log = new_log(tmp_path, tensorboard="events")
    log.bar(Progress()).close()
    log.show({"stage": 2, "step": 3, "L_text": 0.5, "experts": [[1.0]]})
    package.SummaryWriter.assert_called_once_with("events")
    log.tensorboard.add_scalar.assert_called_once_with("stage 2/L_text", 0.5, 3)


# ------------------------------------------------------------------------------------------------
# Warnings of what goes wrong in silence: each once, with its number, and none of a sound run


def warnings(capsys, folder, experts: list[list[float]], kd_eva, steps: int = 300) -> list[str]:
    """Return the warnings of a stage in which each step has these fractions, and kd_eva(step)."""
    log = new_log(folder, steps)
    for step in range(steps):
        values = {"experts": torch.tensor(experts), "kd_clip": torch.tensor(0.0),
                  "kd_eva": torch.tensor(float(kd_eva(step)))}
        log.warn(2, values, last=step == steps - 1)
    return capsys.readouterr().err.splitlines()


def falling(step: int) -> float:
    return 2.0 - step / 300


def test_a_collapsed_router_is_said_once(capsys, tmp_path):
    """Layer 1's second expert has all tokens for 100 steps: one line, with layer and percentage."""
    line, = warnings(capsys, tmp_path, [[0.5, 0.5], [0.002, 0.998]], falling)
    assert "layer 1: expert 1 has 99.8 % of the tokens, for 100 steps" in line
    assert not warnings(capsys, tmp_path, [[0.5, 0.5], [0.1, 0.9]], falling)
    assert not warnings(capsys, tmp_path, [[1.0]], falling), "one expert has all by design"


def test_a_teacher_that_teaches_nothing_is_said_once(capsys, tmp_path):
    """Its loss is 2 at the start and 2 after 300 steps, or at the end of a shorter stage."""
    sound = [[0.5, 0.5]]
    for steps in (100, 300, 900):
        line, = warnings(capsys, tmp_path, sound, lambda step: 2 + 0.1 * (-1) ** step, steps)
        assert "teacher eva" in line and f"{min(steps, 300)} steps" in line
    assert not warnings(capsys, tmp_path, sound, falling)
    assert not warnings(capsys, tmp_path, sound, lambda step: 2, 99), "too short to tell"
