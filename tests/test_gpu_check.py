"""tools.gpu_check on a CPU: what it can check there holds, and each check sees what is wrong."""

import copy
import mmap
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from plumbing.config import TINY
from teachers import VisionEncoder
from tests.common import SHORT, images, run_here
from tools import gpu_check, gpu_checks_correctness
from tools.gpu_checks_common import Place, Row
from tools.gpu_checks_correctness import attention_kernels, check_start
from tools.gpu_checks_memory import host_peak, reset_host_peak
from tools.gpu_checks_runs import largest_difference, recompilations, synchronisations

WARNING = "called a synchronizing CUDA operation"


def check(capsys, *flags: str) -> tuple[int, list[list[str]]]:
    """The exit status of gpu_check on the CPU, and the cells of its rows."""
    status = 0
    try:
        gpu_check.main(["--device", "cpu", *flags])
    except SystemExit as e:
        status = e.code
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return status, [line.strip("| ").split(" | ") for line in lines[1:]]


def failing(place: Place):
    """Is about something."""
    yield Row("first", "1", "1", True)
    raise RuntimeError("CUDA error: it\nexploded")


def impossible(place: Place):
    place.require_gpu("it is about one")
    yield Row("never", "", "")


def test_a_check_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    """It says what was raised, stops no other check, and makes the exit status 1.

    What is left out says why and is no failure. --out holds the same table.
    """
    checks = {"failing": failing, "impossible": impossible,
              "late": lambda place: place.require_seconds(1e9)}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    file = tmp_path / "table.md"
    status, rows = check(capsys, "--out", str(file))
    assert status == 1
    assert [row[-1] for row in rows] == ["yes", "NO", "left out", "left out"]
    assert rows[1][1:3] == ["Is about something.", "RuntimeError: CUDA error: it"]
    assert rows[2][-2] == "wants a GPU: it is about one"
    assert re.match(r"wants 200000000 s, and 1\d\d s are left", rows[3][-2])
    lines = file.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert [line.strip("| ").split(" | ") for line in table[1:]] == rows
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(gpu_check, "CHECKS", {"impossible": impossible})
    assert check(capsys)[0] == 0


def test_a_cpu_passes_what_it_can_check(capsys):
    """Group, views, start, dtypes, recomputing, kernels, memory, a layer's time: all rows are ok.

    The slow test has the others.
    """
    pytest.importorskip("transformers")
    names = ("versions group views start bf16 dtypes recompute attention memory llama-layer "
             "mole").split()
    status, rows = check(capsys, "--only", *names)
    assert status == 0, rows
    assert not [row for row in rows if row[-1] == "NO"]
    assert all(row[0].endswith("compiled") for row in rows if row[-1] == "left out")


@torch.no_grad()
def test_convnext_has_its_channels_last_anyway():
    """timm's blocks give maps of this layout, so weights of it change neither values nor layout.

    Only the first convolution, of the picture, sees the other.
    """
    encoder = VisionEncoder(TINY.convnext).eval()
    layout = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    seen = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, out: seen.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)))
    pictures = images(2)
    torch.testing.assert_close(layout(pictures).tokens, encoder(pictures).tokens, rtol=1e-5,
                               atol=1e-5)
    assert seen == [False] + [True] * (len(seen) - 1)
    assert len(seen) > 5


def test_without_transformers_the_llm_is_left_out(monkeypatch, capsys):
    """A row that names the package."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, rows = check(capsys, "--only", "memory", "llama-layer")
    assert status == 0
    assert [row[-1] for row in rows] == ["left out", "left out"]
    assert all("transformers, which is not installed" in row[-2] for row in rows)


def test_unfused_attention_is_seen():
    """The profiler's name of attention that is taken apart is not that of a fused kernel."""
    q = torch.randn(1, 2, 8, 16)
    for backend, name in ((SDPBackend.MATH, "attention_math"),
                          (SDPBackend.FLASH_ATTENTION, "flash_attention")):
        with sdpa_kernel(backend):
            found = attention_kernels(lambda: F.scaled_dot_product_attention(q, q, q))
        assert found == {name}


def test_a_student_that_does_not_start_as_clip_is_seen(monkeypatch, tmp_path):
    """With the released code's initial experts kd_clip is not 0."""
    options = gpu_checks_correctness.expert_options
    monkeypatch.setattr(gpu_checks_correctness, "expert_options",
                        lambda *args, **more: {**options(*args, **more), "init": "kaiming"})
    rows = list(check_start(Place("cpu", tmp_path, float("inf"))))
    assert [row.ok for row in rows] == [False, False]


def test_synchronisations_are_counted_by_our_own_line(workplace, monkeypatch):
    """Only those below the named function, by the innermost line of ours."""
    clip = train.clip_gradients

    def warn_and_clip(*args):
        warnings.warn(WARNING)
        return clip(*args)

    monkeypatch.setattr(train, "clip_gradients", warn_and_clip)
    with synchronisations("train_stage") as found:
        run_here(workplace, *SHORT, "--max-steps", "2", "--out", "runs/waits")
        warnings.warn(WARNING)  # not below it
    [(line, number)] = found.items()
    assert re.fullmatch(r"train\.py:\d+ train_stage", line)
    assert number == 4


def test_recompilations_are_read_from_torchs_log():
    """As TORCH_LOGS=recompiles writes them; at torch's limit of 8 it is a failure."""
    line = "V1125 [0/{}] [__recompiles] Recompiling function forward in /a/b/{}.py:12\n"
    log = "".join(line.format(i, name) for i, name in enumerate(["teachers"] * 3 + ["mole"]))
    row = recompilations(log)
    assert row.ok and row.got == "3: forward of teachers.py x3; forward of mole.py x1"
    assert not recompilations(line.format(1, "model") * 8).ok


def test_log_lines_are_compared_number_by_number():
    """Relative where numbers are large, absolute where small; what is no number is never close."""
    ours = {"L": 1e-5, "g": 200.0, "step": 3}
    theirs = {"L": 0.0, "g": 201.0, "step": 4}
    assert largest_difference(ours, theirs) == (pytest.approx(0.005), "g")
    assert largest_difference({"L_kd": 1.0, "g": 9.0}, {"L_kd": 1.5, "g": 0.0}, "L_")[0] == 0.5
    assert largest_difference({"L": float("nan")}, {"L": 1.0})[0] == float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="counted as Linux does")
def test_the_hosts_peak_is_counted_from_its_reset():
    """What was held and freed before does not count, what is held and freed after does."""
    size = 60_000_000

    def hold_and_free() -> None:
        """Pages of the system itself: malloc may give some that were freed and are still held."""
        with mmap.mmap(-1, size) as pages:
            for start in range(0, size, mmap.PAGESIZE):
                pages[start] = 1

    hold_and_free()
    before = reset_host_peak()
    assert host_peak() - before < size / 3
    hold_and_free()
    assert 0.9 * size < host_peak() - before < 1.5 * size


@pytest.mark.slow
def test_all_that_a_cpu_can_check(tmp_path, capsys):
    """The whole table, runs that are killed and stopped too (2 min)."""
    status, rows = check(capsys, "--out", str(Path(tmp_path) / "table.md"))
    assert status == 0, [row for row in rows if row[-1] == "NO"]
    reasons = [row[-2] for row in rows if row[-1] == "left out"]
    assert reasons and all(reason.startswith(("wants ", "too small")) for reason in reasons)
