"""tools.lesson: the numbers of the answers, on a short run."""

import math
import re

import pytest

from data import InputError
from tools import lesson


def told(capsys, *argv) -> str:
    capsys.readouterr()
    lesson.main([str(arg) for arg in argv])
    return capsys.readouterr().out


def test_the_bound_is_met(capsys):
    """The largest n x largest is n e / (n - 1 + e): below e, and reached by one token."""
    for n, largest in re.findall(r"n (\d+): n x largest ([\d.]+)", told(capsys, "bound")):
        assert float(largest) == pytest.approx(int(n) * math.e / (int(n) - 1 + math.e), abs=1e-3)
        assert float(largest) < math.e


def test_an_adapter_is_counted(capsys):
    """The parameters of the DINOv2 adapter are those of its two Linears, written out."""
    built, written = re.findall(r"([\d,]+)(?: parameters|$)", told(capsys, "dinov2").strip())
    assert built == written == "1,838,720"


def test_one_token(capsys):
    """1/n leaves (n - 1)/n of the loss that W^tok alone would not see."""
    assert "L_kd 0.9722" in told(capsys, "one-token")


@pytest.mark.parametrize("exercise", ["router", "fish"])
def test_shares_of_experts_add_up(exercise, workplace, capsys, monkeypatch):
    """Each group of three shares is 100 %, but for rounding."""
    monkeypatch.setattr(lesson, "PICTURES", 60)
    out = told(capsys, exercise, workplace / "runs/tiny")
    groups = re.findall(r"(\d+\.\d) / +(\d+\.\d) / +(\d+\.\d)", out)
    assert len(groups) == {"router": 12, "fish": 18}[exercise]
    for group in groups:
        assert sum(map(float, group)) == pytest.approx(100, abs=0.2)


def test_uniform_weights_double_the_mean_error(workplace, capsys, monkeypatch):
    """The lines of all three forms; a run of no teachers is one line."""
    monkeypatch.chdir(workplace)
    lines = told(capsys, "uniform", "runs/tiny").splitlines()
    assert [line.split()[0] for line in lines] == ["paper", "released", "uniform", "1/n"]


def test_a_run_that_cannot_answer(released_folder):
    with pytest.raises(InputError, match="no held-out picture"):
        lesson.main(["uniform", str(released_folder)])
