"""tools.lesson: the numbers of the answers, on a short run."""

import re

import pytest

from data import InputError
from plumbing.sets import load_eval_set
from tools import lesson
from tools.explain.numbers import make_batch, measure
from tools.explain.whole_run import load_whole_run


def printed(capsys, *argv) -> str:
    """The text that an exercise prints."""
    capsys.readouterr()
    lesson.main([str(arg) for arg in argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("exercise,numbers", [
    ("bound", r"n 36: n x largest 2\.5944, formula 2\.5944, .*\n.*\n.*2\.7102, formula 2\.7102"),
    ("dinov2", r"576 x 1024: (1,838,720) parameters, .* = \1\n"),
    ("one-token", r"L_kd 0\.9722 = \(n - 1\)/n; W\^tok alone: 0\.0000\.")])
def test_numbers_that_need_no_run(exercise, numbers, capsys):
    """The largest weight is its bound, an adapter has as many parameters as its two Linears."""
    assert re.search(numbers, printed(capsys, exercise))


@pytest.mark.parametrize("exercise", ["router", "fish"])
def test_percentages_of_experts_add_up(exercise, workplace, capsys, monkeypatch):
    """Each group of three percentages adds up to 100, apart from rounding."""
    monkeypatch.setattr(lesson, "PICTURES", 60)
    out = printed(capsys, exercise, workplace / "runs/tiny")
    groups = re.findall(r"(\d+\.\d) / +(\d+\.\d) / +(\d+\.\d)", out)
    assert len(groups) == {"router": 12, "fish": 18}[exercise]
    for group in groups:
        assert sum(map(float, group)) == pytest.approx(100, abs=0.2)


def test_uniform_weights_double_the_mean_error(workplace, capsys, monkeypatch):
    """With uniform weights a teacher's loss = twice the mean of its errors in tools.explain."""
    monkeypatch.chdir(workplace)
    lines = printed(capsys, "uniform", "runs/tiny").splitlines()
    assert [line.split()[0] for line in lines] == ["paper", "released", "uniform", "1/n"]
    run = load_whole_run(workplace / "runs/tiny")
    records, get_image = load_eval_set(run.c)
    batch = make_batch(run, records[0], get_image(records[0]["image"]), "right")
    for name, errors in measure(run, run.model, batch).errors.items():
        loss = float(re.search(rf"{name} ([\d.]+)", lines[2])[1])
        assert loss == pytest.approx(2 * errors.mean().item(), abs=1e-4)


@pytest.mark.slow
def test_trained_adapters_let_go_of_what_only_the_teacher_sees():
    """Teacher -> student, its own signal enters and is gone at the minimum; else it stays."""
    paper, radio = lesson.teacher_signal(True), lesson.teacher_signal(False)
    assert max(paper.values()) > 0.5
    assert paper[3000] < 0.05
    assert radio[3000] > 0.95


def test_a_run_that_cannot_answer(released_folder):
    """A run without teachers is refused in one line."""
    with pytest.raises(InputError, match="no held-out picture"):
        lesson.main(["uniform", str(released_folder)])
