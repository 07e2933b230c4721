"""The memory of a run, counted over its processes."""

import re
import subprocess
import sys

import pytest

from tools.host_memory import main, proportional_kb, tree


def test_processes_are_counted_once():
    """A child's memory is found, and that of a process that has ended is 0."""
    code = "import time; block = bytearray(50_000_000); print(len(block), flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code + "; time.sleep(1000)"],
                             stdout=subprocess.PIPE)
    child.stdout.readline()
    assert tree(child.pid) == [child.pid]
    assert 50_000 * 0.9 < proportional_kb(child.pid)[1] < 100_000
    child.kill()
    child.wait()
    assert proportional_kb(child.pid) == (0, 0)


@pytest.mark.slow
def test_a_run_that_fails_keeps_its_status(capfd):
    """train.py's own line and status, and the peak of what it came to, no other."""
    try:
        main(["--tiny", "--seed", "x"])
    except SystemExit as e:
        assert e.code == 2
    out, errors = capfd.readouterr()
    assert "error:" in errors
    assert re.search(r"processes before the first step: \d+ MB", out)
    assert "processes after" not in out
