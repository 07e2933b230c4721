"""Checks of tools.gpu_check that start train.py as a person would: results, signals, resuming."""

import contextlib
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import train
from plumbing.run_folder import read_log
from tools.gpu_checks_common import LeftOut, Place, Row

HERE = Path(__file__).parents[1]
SHORT = ("--tiny --processes 1 --stage0-scale 0.01 --cache-teachers= --log-every 1 "
         "--n-pretrain 128 --n-train 64 --n-described 32 --n-text 32 --n-eval 12 "
         "--stage1-batch 8 --stage2-batch 8").split()
# what --full has switched on, at toy sizes
LIKE_FULL = ("--precision bf16 --recompute --workers 2 --mole-dropout 0.05 --max-steps 12 "
             "--save-every 5").split()
TIMEOUT = 150       # seconds; a run of these takes a tenth


def start(place: Place, *flags: str, **environment: str) -> subprocess.Popen:
    """`python train.py ...` in the checks' folder, in a process group of its own."""
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *flags], cwd=place.folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                            env={**os.environ, **environment}, start_new_session=True)


def signal_all(process: subprocess.Popen, name: str) -> None:
    """Signal a run and its workers. Raises LeftOut on Windows, where the run is killed."""
    if not hasattr(os, "killpg"):
        process.kill()
        raise LeftOut("Windows has no process groups, to which a signal could be sent")
    os.killpg(process.pid, getattr(signal, name))


def finish(process: subprocess.Popen, status: int = 0, timeout: float = TIMEOUT) -> str:
    """Wait for a run's end; what it wrote on stderr. Raises RuntimeError for another status."""
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        signal_all(process, "SIGKILL")
        raise RuntimeError(f"no end after {timeout} s") from None
    if process.returncode != status:
        last = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"exit status {process.returncode}, not {status}: {last}")
    return errors


def largest_difference(a: dict, b: dict, start: str = "") -> tuple[float, str]:
    """The largest difference of two log lines, relative above 1, and the number's name.

    With `start`, of the numbers whose names start so.
    """
    worst = (0.0, "none")
    for name, value in a.items():
        if isinstance(value, float) and name.startswith(start):
            difference = abs(value - b[name]) / max(1.0, abs(value))
            if not math.isfinite(difference):
                difference = math.inf
            worst = max(worst, (difference, name))
    return worst


# ------------------------------------------------------------------------------------------------
# Results


def check_fp32_run(place: Place) -> Iterator[Row]:
    """The first log line of --tiny on the GPU is that on the CPU."""
    place.require_gpu("the CPU would be compared with itself")
    for device in ("cpu", "cuda"):
        # torch lets cuDNN convolve fp32 in TF32, which has three digits: not here
        finish(start(place, *SHORT, "--max-steps", "2", "--device", device, "--out",
                     f"runs/{device}", NVIDIA_TF32_OVERRIDE="0"))
    theirs = read_log(place.folder / "runs/cpu")[0]
    ours = read_log(place.folder / "runs/cuda")[0]
    difference, name = largest_difference(theirs, ours)
    yield Row("first log line of --tiny, fp32: device against CPU", "<= 1e-3 apart",
              f"{difference:.1e} ({name})", difference <= 1e-3)


def check_bf16_run(place: Place) -> Iterator[Row]:
    """Both stages as --full runs them: bf16, recomputed, with workers and checkpoints."""
    finish(start(place, *SHORT, *LIKE_FULL, "--device", place.device, "--out", "runs/straight"))
    log = read_log(place.folder / "runs/straight")
    losses = [line["L_total"] for line in log]
    yield Row("--tiny in bf16, recomputed, 2 workers, both stages", "24 steps, every loss finite",
              f"{len(log)} steps, L_total {losses[0]:.3g} to {losses[-1]:.3g}",
              len(log) == 24 and all(map(math.isfinite, losses)))
    yield Row("kd_clip of its first step: the student starts as CLIP", "0.0",
              str(log[0]["kd_clip"]), log[0]["kd_clip"] == 0)


# ------------------------------------------------------------------------------------------------
# Stopped and resumed


def wait_for_checkpoint(place: Place, process: subprocess.Popen, run: str) -> str:
    """The name of a run's first complete checkpoint, as soon as it is there."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and process.poll() is None:
        for path in sorted((place.folder / run / "checkpoints").glob("stage*-*")):
            if path.suffix != ".tmp":
                return path.name
        time.sleep(0.02)
    raise RuntimeError(f"no checkpoint in {run}: {process.communicate()[1].strip()[-200:]}")


def compare_with_straight(place: Place, run: str) -> Row:
    """The resumed run's log against that of the run that was never stopped."""
    if not (place.folder / "runs/straight/log.jsonl").exists():
        raise LeftOut("the run to compare with has failed")
    # some sums of a GPU have no fixed order, so its runs are alike and not equal
    limit, names = (0.05, "L_") if place.cuda else (0.0, "")
    ours, theirs = read_log(place.folder / run), read_log(place.folder / "runs/straight")
    worst = max(largest_difference(a, b, names) for a, b in zip(ours, theirs, strict=True))
    return Row(f"{run.removeprefix('runs/')} and resumed: its log against the straight run's",
               f"<= {limit:g} apart", f"{worst[0]:.1e} ({worst[1]})", worst[0] <= limit)


def check_kill(place: Place) -> Iterator[Row]:
    """SIGKILL after a checkpoint, then --resume."""
    flags = [*SHORT, *LIKE_FULL, "--device", place.device, "--out", "runs/killed"]
    process = start(place, *flags)
    name = wait_for_checkpoint(place, process, "runs/killed")
    signal_all(process, "SIGKILL")
    process.communicate()
    finish(start(place, "--resume", "runs/killed"))
    yield Row("killed, then --resume", "goes on from a checkpoint", f"{name} or later, to the end")
    yield compare_with_straight(place, "runs/killed")


def check_sigterm(place: Place) -> Iterator[Row]:
    """SIGTERM to the whole process group, workers too, as launchers and schedulers send it."""
    flags = [*SHORT, *LIKE_FULL, "--device", place.device, "--out", "runs/stopped"]
    process = start(place, *flags)
    wait_for_checkpoint(place, process, "runs/stopped")
    signal_all(process, "SIGTERM")
    errors = finish(process, status=3)
    said = re.search(r"stopped by SIGTERM at .*", errors)
    yield Row("SIGTERM with 2 workers", "saved; exit status 3", said.group() if said else errors,
              said is not None)
    finish(start(place, "--resume", "runs/stopped"))
    yield compare_with_straight(place, "runs/stopped")


# ------------------------------------------------------------------------------------------------
# Waiting and compiling


@contextlib.contextmanager
def synchronisations(function: str) -> Iterator[Counter]:
    """Count, by our own line, torch's warnings of synchronisation below a function of that name."""
    found = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        stack = traceback.extract_stack()
        ours = [frame for frame in stack[:-1] if Path(frame.filename).parent == HERE
                or Path(frame.filename).parent.name == "plumbing"]
        if "synchronizing" in str(message) and function in [frame.name for frame in ours]:
            found[f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield found


def check_synchronisations(place: Place) -> Iterator[Row]:
    """Where the loop of train.py waits for the device, over two steps of each stage."""
    place.require_gpu("a CPU has nothing to wait for")
    flags = [*SHORT, "--device", "cuda", "--max-steps", "2", "--out", "runs/waits"]
    with contextlib.chdir(place.folder), contextlib.redirect_stdout(io.StringIO()):
        with synchronisations("train_stage") as found:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train.main(flags)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    lines = [f"{line} x{number}" for line, number in found.most_common(12)]
    yield Row("synchronisations of four steps", "listed", "; ".join(lines) or "none")


def check_recompilations(place: Place) -> Iterator[Row]:
    """--compile on batches of varying size: how often each function is compiled again."""
    place.require_gpu("torch.compile is meant for it")
    place.require_seconds(200)
    process = start(place, *SHORT, "--compile", "on", "--max-steps", "8", "--device", "cuda",
                    "--out", "runs/compiled", TORCH_LOGS="recompiles")
    yield recompilations(finish(process, timeout=200))


def recompilations(errors: str) -> Row:
    """The row of what TORCH_LOGS=recompiles wrote."""
    again = Counter(re.findall(r"Recompiling function (\S+) in \S+?(\w+\.py):", errors))
    worst = max(again.values(), default=0)
    lines = [f"{function} of {file} x{number}" for (function, file), number in again.most_common(5)]
    # at torch's limit it gives up, and the function runs uncompiled from there on
    return Row("--compile on: times a function was compiled again", "< 8, torch's limit",
               f"{worst}: {'; '.join(lines) or 'none'}", worst < 8)
