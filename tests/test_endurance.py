"""Slow: a run that is killed again and again, one that goes on for long, and every field tried."""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import InputError
from plumbing.config import TINY
from plumbing.flags import flag
from tests.common import HERE, SHORT, assert_same_run, run_here, run_script, start


def start_silent(folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *flags], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_ten_random_points_a_run_ends_the_same(tmp_path):
    """kill -9 at ten random moments, from stage 0 to the end: log and weights bit for bit."""
    flags = [*SHORT, "--max-steps", "0", "--stage1-epochs", "40", "--stage2-epochs", "20",
             "--save-every", "2"]
    begun = time.monotonic()
    straight = tmp_path / "straight"    # the killed run makes its own stage 0 and cache
    straight.mkdir()
    run_here(straight, *flags, "--out", "runs/straight")
    whole = time.monotonic() - begun
    begun = time.monotonic()
    run_script(tmp_path, "--help")
    loading = time.monotonic() - begun      # the libraries alone
    generator = random.Random(0)
    out = tmp_path / "runs/killed"
    for _ in range(10):
        process = start_silent(tmp_path, *again(out, flags))
        with contextlib.suppress(subprocess.TimeoutExpired):
            # short enough that it hardly ever ends before the tenth kill
            assert process.wait(timeout=loading + generator.uniform(0, 0.08) * whole) == 0
        process.kill()
        process.wait()
    done = run_script(tmp_path, *again(out, flags))
    assert done.returncode == 0, done.stderr
    assert_same_run(straight / "runs/straight", out)


def again(out: Path, flags: list[str]) -> list[str]:
    """Return the arguments to go on: --resume, or all of them if there is no checkpoint yet."""
    if list(out.glob("checkpoints/stage*[0-9]")):
        return ["--resume", f"runs/{out.name}"]
    return [*flags, "--out", f"runs/{out.name}"]


@pytest.mark.slow
def test_processes_do_not_outlive_their_launcher(workplace):
    """kill -9 of the launcher of two processes: they finish their step, save and end."""
    flags = "--max-steps 0 --stage1-epochs 500 --processes 2 --out runs/orphans".split()
    process = start(workplace, *flags)
    for line in process.stdout:
        if line.startswith("stage 1 step 3 "):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 3  # the third is multiprocessing's, which ends when they have
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert len(list((workplace / "runs/orphans/checkpoints").glob("stage1-*[0-9]"))) == 1


@pytest.mark.slow
def test_memory_is_constant_for_half_an_hour(tmp_path):
    """Steps, log lines and checkpoints for 30 minutes: no more memory or files at the end."""
    flags = "--stage0-scale 0.01 --stage1-epochs 0 --stage2-epochs 1000 --save-every 100".split()
    process = start_silent(tmp_path, "--tiny", *flags)
    seen = []
    try:
        for minute in range(35):
            time.sleep(60)
            assert process.poll() is None
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            own = int(re.search(r"RssAnon:\s*(\d+)", status)[1]) / 1024     # no mapped files
            seen.append((own, len(os.listdir(f"/proc/{process.pid}/fd"))))
            print(f"minute {minute + 1}: {own:.0f} MB, {seen[-1][1]} open files")
    finally:
        process.kill()
        process.wait()
    memory, files = zip(*seen[5:], strict=True)     # in the first five minutes caches fill
    assert max(memory[-5:]) < 1.03 * max(memory[:5])
    assert max(files[-5:]) <= max(files[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(vars(TINY).keys() - {"processes"}))
def test_what_a_field_accepts_runs_two_steps(workplace, name):
    """Each of -1, 0, nan, inf, 10^12, an empty string and a word: one line, or a run to its end."""
    for value in ("-1", "0", "nan", "inf", "1000000000000", "", "word"):
        argv = [*SHORT, "--max-steps", "2", "--overwrite", "--out", "runs/swept",
                f"{flag(name)}={value}"]
        try:
            run_here(workplace, *argv)
        except (InputError, OSError) as e:
            assert "\n" not in str(e)
