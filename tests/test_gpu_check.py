"""tools.gpu_check on a CPU: what it can check there holds, and each check sees what is wrong."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.gpu_check import __main__ as program
from tools.gpu_check import correctness
from tools.gpu_check.common import Row, Setup, full_config, llama_shape
from tools.gpu_check.correctness import attention_kernels, check_start


def check(capsys, *flags: str) -> tuple[int, list[list[str]]]:
    """Return the exit status of gpu_check on the CPU, and the cells of its rows."""
    status = 0
    try:
        program.main(["--device", "cpu", *flags])
    except SystemExit as e:
        status = e.code
    return status, cells(capsys.readouterr().out)


def cells(text: str) -> list[list[str]]:
    """Return the cells of a table's rows."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [row.strip("| ").split(" | ") for row in rows[1:]]


def failing(setup: Setup):
    """Is about something."""
    yield Row("first", "1", "1", True)
    raise RuntimeError("CUDA error: it\nexploded")


def test_a_check_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    """The exception is in its row, other checks go on, status 1; what is left out is no failure."""
    left_out = {"gpu": lambda setup: setup.require_gpu("it is about one"),
                "late": lambda setup: setup.require_seconds(1e9),
                "llm": lambda setup: llama_shape(setup, layers=1)}
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(program, "CHECKS", {"failing": failing, **left_out})
    file = tmp_path / "table.md"
    status, rows = check(capsys, "--out", str(file))
    assert status == 1
    assert [row[-1] for row in rows] == ["yes", "NO", "left out", "left out", "left out"]
    assert rows[1][1:3] == ["Is about something.", "RuntimeError: CUDA error: it"]
    assert rows[2][-2] == "wants a GPU: it is about one"
    assert rows[3][-2].startswith("wants 200000000 s, and ")
    assert "transformers, which is not installed" in rows[4][-2]
    assert cells(file.read_text(encoding="utf-8")) == rows
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(program, "CHECKS", left_out)
    assert check(capsys)[0] == 0


QUICK = "--only group start bf16 dtypes recompute attention memory"


@pytest.mark.parametrize("flags, expected", [
    (QUICK, {"yes"}), pytest.param("", {"yes", "left out"}, marks=pytest.mark.slow)])
def test_a_cpu_passes_what_it_can_check(capsys, flags, expected):
    """All rows are ok or want a GPU; slow (2 min): runs that are killed and stopped too."""
    pytest.importorskip("transformers")
    status, rows = check(capsys, *flags.split())
    assert status == 0, [row for row in rows if row[-1] == "NO"]
    assert {row[-1] for row in rows} == expected
    assert all(row[-2].startswith("wants ") for row in rows if row[-1] == "left out")


def test_unfused_attention_is_seen():
    """The profiler's name of attention that is taken apart is not that of a fused kernel."""
    q = torch.randn(1, 2, 8, 16)
    for backend, name in ((SDPBackend.MATH, "attention_math"),
                          (SDPBackend.FLASH_ATTENTION, "flash_attention")):
        with sdpa_kernel(backend):
            kernels = attention_kernels(lambda: F.scaled_dot_product_attention(q, q, q))
        assert kernels == {name}


def test_a_student_that_does_not_start_as_clip_is_seen(monkeypatch, tmp_path):
    """With the released code's initial experts its tokens are not CLIP's."""
    setup = Setup("cpu", tmp_path, float("inf"))
    released = full_config(setup, mole_init="kaiming")
    monkeypatch.setattr(correctness, "full_config", lambda setup: released)
    assert [row.ok for row in check_start(setup)] == [False, False]
