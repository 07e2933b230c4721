"""Starting processes, signals with loader workers, and what several machines must share."""

import atexit
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import spawn, start_processes

from data import InputError
from plumbing import checks, processes, sharding
from plumbing.processes import Machine, launch
from plumbing.signals import SIGNALS
from tests import launched
from tests.common import C, small_vlm


@pytest.fixture
def start_two(monkeypatch, tmp_path):
    """Return a function that launches two processes in an empty folder, as train.py does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield lambda work, *arguments: launch(work, arguments, 2)
    for number, handler in former.items():
        signal.signal(number, handler)


def test_a_process_that_fails_ends_the_others(start_two):
    """The others may wait for it for ever: they get SIGTERM. The status is that of the failed."""
    assert start_two(launched.save, "23") == 2
    assert Path("saved1").exists()


def signal_when_ready() -> None:
    """Send this process SIGTERM when both of its processes are ready."""
    while not all(Path(f"ready{rank}").exists() for rank in range(2)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("statuses, expected", [
    ("33", 3), pytest.param("31", 1, marks=pytest.mark.slow)])
def test_a_signal_is_passed_on_and_3_means_saved(start_two, statuses, expected):
    """SIGTERM reaches each process once; one that has saved does not end one that still saves."""
    thread = threading.Thread(target=signal_when_ready)
    thread.start()
    assert start_two(launched.save, statuses) == expected
    thread.join()
    assert Path("saved0").exists() and Path("saved1").exists()


@pytest.mark.slow
def test_a_signal_before_the_processes_listen(start_two, monkeypatch, capfd):
    """The status is 3, and one line says that nothing is lost."""
    def start_and_signal(*args, **options):
        context = start_processes(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return context

    monkeypatch.setattr(processes, "start_processes", start_and_signal)
    assert start_two(time.sleep, 1000) == 3
    assert capfd.readouterr().err == "stopped by SIGTERM before the first step: nothing is lost\n"


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(start_two, capsys):
    """One that the machine has killed cannot say so itself."""
    assert start_two(signal.raise_signal, signal.SIGKILL) == 1
    line = r"error: process . was ended by SIGKILL; the machine's memory may have run out\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_small_shared_memory_is_one_line(monkeypatch):
    """64 MB, as in Docker, are known to be too few before anything is loaded."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    monkeypatch.setattr(checks, "SHARED_MEMORY", Path("/"))
    full = dataclasses.replace(C, workers=8, micro_batch=16, image_size=1024, processes=8)
    with pytest.raises(InputError, match="has 64 MB free.* want 6,442 MB.* --shm-size=7g"):
        checks.check_shared_memory(full)
    checks.check_shared_memory(dataclasses.replace(full, workers=0))


def test_angles_stay_in_fp32():
    """A VLM in bf16 keeps the LLM's buffers, which are its table of angles, in fp32."""
    vlm = small_vlm()
    vlm.llm.register_buffer("inv_freq", torch.rand(4))
    angles = vlm.llm.inv_freq.clone()
    sharding.cast_vlm(vlm, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in vlm.parameters())
    assert torch.equal(vlm.llm.inv_freq, angles)


class Twins(nn.Module):
    """Two layers that share a weight, and a table that no state dict has."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.table


def check_numbers_are_sent(rank: int) -> None:
    """A model on the meta device becomes the first process's: shared weight, hidden table, all."""
    expected = torch.load("twins.pt", weights_only=False)
    with torch.device("meta" if rank else "cpu"):
        model = Twins()
        sharded = nn.Sequential(Twins(), nn.Linear(3, 2))
    if rank == 0:
        model.load_state_dict(expected.state_dict())
        sharded[0].load_state_dict(expected.state_dict())
    sharding.send_from_first(model, "cpu")
    assert model.a.weight is model.b.weight
    assert torch.equal(model(torch.ones(1, 3)), expected(torch.ones(1, 3)))
    sharding.shard(sharded, [sharded[0]], "cpu", 2, bf16=False)
    sharding.refresh_trained(sharded)
    assert torch.equal(sharded[0](torch.ones(1, 3)), expected(torch.ones(1, 3)))


def check_folder_is_seen(machine: Machine) -> None:
    """A process that does not see the lock of the first, or sees an older one, is told so."""
    with machine.first_alone():
        if machine.first:
            Path("run.lock").write_text("process 7", encoding="utf-8")
    machine.check_folder(Path("."))
    own = Path(f"own{machine.rank}")
    own.mkdir()
    (own / "run.lock").write_text(f"process {machine.rank}", encoding="utf-8")
    expected = pytest.raises(InputError, match="process 1 does not see the folder of the first")
    with contextlib.nullcontext() if machine.first else expected:
        machine.check_folder(own)


def both(rank: int, folder: Path, port: int) -> None:
    """Run the checks of one of two processes."""
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    machine = Machine(C)
    check_folder_is_seen(machine)
    check_numbers_are_sent(rank)
    atexit.register(os._exit, 0)    # as run_one: a thread of gloo's sometimes aborts the end


def test_two_processes_load_save_and_wait(tmp_path):
    """The checks of `both`: numbers are sent, one shared --out."""
    torch.save(Twins(), tmp_path / "twins.pt")
    spawn(both, (tmp_path, get_free_port()), nprocs=2)     # raises what a process raises
