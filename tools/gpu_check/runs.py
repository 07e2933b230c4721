"""Checks of tools.gpu_check that start train.py as a person would: results, signals, resuming."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from plumbing.run_folder import read_log
from plumbing.signals import STOPPED
from tools.gpu_check.common import Row, Setup

TRAIN = Path(__file__).parents[2] / "train.py"
SHORT = ("--tiny --processes 1 --stage0-scale 0.01 --cache-teachers= --log-every 1 "
         "--n-pretrain 128 --n-train 64 --n-described 32 --n-text 32 --n-eval 12 "
         "--stage1-batch 8 --stage2-batch 8")
# what --full has switched on, at small sizes
LIKE_FULL = (f"{SHORT} --precision bf16 --recompute --workers 2 --mole-dropout 0.05 --max-steps 12 "
             "--save-every 5")
TIMEOUT = 150       # seconds; a run of these takes a tenth


def start(setup: Setup, flags: str, **environment: str) -> subprocess.Popen:
    """Start `python train.py ...` in the checks' folder, in a process group of its own."""
    return subprocess.Popen([sys.executable, str(TRAIN), *flags.split()], cwd=setup.folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                            env={**os.environ, **environment}, start_new_session=True)


def finish(process: subprocess.Popen, status: int = 0, timeout: float = TIMEOUT) -> str:
    """Wait for a run's end and return its stderr. Raises RuntimeError for another exit status."""
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"no end after {timeout} s") from None
    if process.returncode != status:
        last = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"exit status {process.returncode}, not {status}: {last}")
    return errors


def largest_difference(a: dict, b: dict, prefix: str = "") -> tuple[float, str]:
    """Return the largest difference of two log lines, relative above 1, and the number's name.

    With a prefix, only numbers with such names are compared.
    """
    worst = (0.0, "none")
    for name, value in a.items():
        if isinstance(value, float) and name.startswith(prefix):
            difference = abs(value - b[name]) / max(1.0, abs(value))
            if not math.isfinite(difference):
                difference = math.inf
            worst = max(worst, (difference, name))
    return worst


def check_fp32_run(setup: Setup) -> Iterator[Row]:
    """The first log line of --tiny on the GPU is that on the CPU."""
    setup.require_gpu("the CPU would be compared with itself")
    logs = {}
    for device in ("cpu", "cuda"):
        # torch lets cuDNN convolve fp32 in TF32, which has three digits: not here
        finish(start(setup, f"{SHORT} --max-steps 2 --device {device} --out runs/{device}",
                     NVIDIA_TF32_OVERRIDE="0"))
        logs[device] = read_log(setup.folder / "runs" / device)
    difference, name = largest_difference(logs["cpu"][0], logs["cuda"][0])
    yield Row("first log line of --tiny, fp32: device against CPU", "<= 1e-3 apart",
              f"{difference:.1e} ({name})", difference <= 1e-3)


def check_resume(setup: Setup) -> Iterator[Row]:
    """Runs like --full (bf16, recomputed, with workers), one straight, others ended and resumed."""
    setup.require(hasattr(os, "killpg"), "Windows has no process groups, which could be signalled")
    flags = f"{LIKE_FULL} --device {setup.device} --out runs/"
    finish(start(setup, f"{flags}straight"))
    log = read_log(setup.folder / "runs/straight")
    losses = [line["L_total"] for line in log]
    yield Row("--tiny in bf16, recomputed, 2 workers, both stages", "24 steps, every loss finite",
              f"{len(log)} steps, L_total {losses[0]:.3g} to {losses[-1]:.3g}",
              len(log) == 24 and all(map(math.isfinite, losses)))
    # some sums of a GPU have no fixed order, so its runs are alike and not equal
    limit, prefix = (0.05, "L_") if setup.cuda else (0.0, "")
    # to the whole process group, workers too, as launchers and schedulers send it
    for name, status in (("SIGKILL", -signal.SIGKILL), ("SIGTERM", STOPPED)):
        process = start(setup, f"{flags}{name}")
        wait_for_checkpoint(process, setup.folder / "runs" / name)
        os.killpg(process.pid, getattr(signal, name))
        finish(process, status)
        finish(start(setup, f"--resume runs/{name}"))
        resumed = read_log(setup.folder / "runs" / name)
        worst = max(largest_difference(a, b, prefix) for a, b in zip(resumed, log, strict=True))
        yield Row(f"ended by {name} and resumed: its log against the straight run's",
                  f"<= {limit:g} apart", f"{worst[0]:.1e} ({worst[1]})", worst[0] <= limit)


def wait_for_checkpoint(process: subprocess.Popen, run: Path) -> None:
    """Wait until a run's first checkpoint is complete. Raises RuntimeError if none comes."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and process.poll() is None:
        if any(path.suffix != ".tmp" for path in run.glob("checkpoints/stage*-*")):
            return
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"no checkpoint in {run}: {process.communicate()[1].strip()[-200:]}")


def check_recompilations(setup: Setup) -> Iterator[Row]:
    """--compile on batches of varying size: how often each function is compiled again."""
    setup.require_gpu("torch.compile is meant for it")
    setup.require_seconds(200)
    flags = f"{SHORT} --compile on --max-steps 8 --device cuda --out runs/compiled"
    process = start(setup, flags, TORCH_LOGS="recompiles")
    yield recompilations(finish(process, timeout=200))


def recompilations(errors: str) -> Row:
    """Return the row of what TORCH_LOGS=recompiles wrote."""
    times = Counter(re.findall(r"Recompiling function (\S+) in \S+?(\w+\.py):", errors))
    worst = max(times.values(), default=0)
    lines = [f"{function} of {file} x{number}" for (function, file), number in times.most_common(5)]
    # at torch's limit it gives up, and the function runs uncompiled from there on
    return Row("--compile on: times a function was compiled again", "< 8, torch's limit",
               f"{worst}: {'; '.join(lines) or 'none'}", worst < 8)
