"""Starting processes, signals with loader workers, and what several machines must share."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from data import InputError
from plumbing import checkpoints, checks
from plumbing.sets import loader_options, make_loader
from plumbing.checkpoints import Checkpoints
from plumbing.checks import check_shared_memory
from plumbing.launcher import launch
from plumbing.machine import Machine
from plumbing.sharding import cast_vlm, gather_full, note_what_trains, send_from_first, shard
from tests.common import C, HERE, SHORT, small_vlm, some_conversations, total_loss, whole_method

# ------------------------------------------------------------------------------------------------
# The launcher


def script(folder: Path, body: str) -> str:
    """A program for `launch`: `rank` is its process's."""
    path = folder / "script.py"
    text = f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{body}\n"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("statuses, expected", [("00", 0), ("02", 2), ("33", 3), ("10", 1)])
def test_the_exit_status_is_that_of_the_process_that_failed(tmp_path, statuses, expected):
    """0 if all are done, 3 if they were stopped, else the status of the first that failed."""
    program = script(tmp_path, "sys.exit(int(sys.argv[1][rank]))")
    assert launch(program, [statuses], 2) == expected


def test_a_process_that_fails_ends_the_others(tmp_path):
    """The others may wait for it for ever."""
    start = time.monotonic()
    program = script(tmp_path, "time.sleep(1000 * rank)\nsys.exit(2)")
    assert launch(program, [], 2) == 2
    assert time.monotonic() - start < 500


SAVES = """
def save(*_):
    open(f"saved{rank}", "w").close()
    sys.exit(%d)
signal.signal(signal.SIGTERM, save)
open(f"ready{rank}", "w").close()
time.sleep(1000)
"""


def signalled(folder: Path, body: str, monkeypatch) -> int:
    """The exit status of two processes whose launcher gets a SIGTERM when both are ready."""
    monkeypatch.chdir(folder)

    def send() -> None:
        while not all((folder / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    status = launch(script(folder, body), [], 2)
    thread.join()
    return status


def test_a_signal_is_passed_on_and_3_means_saved(tmp_path, monkeypatch):
    """SIGTERM reaches each process once; the status is 3 if they say that they have saved."""
    assert signalled(tmp_path, SAVES % 3, monkeypatch) == 3
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_save_that_fails_is_no_success(tmp_path, monkeypatch):
    """A process that ends with an error after SIGTERM has not saved: the status says so."""
    assert signalled(tmp_path, SAVES % 1, monkeypatch) == 1


def test_a_signal_before_the_processes_listen(tmp_path, monkeypatch, capsys):
    """They end at once; the status is 3, and one line says that nothing is lost."""
    body = "open(f'ready{rank}', 'w').close()\ntime.sleep(1000)"
    assert signalled(tmp_path, body, monkeypatch) == 3
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().err


def test_a_process_that_is_killed_is_named(tmp_path, capsys):
    """One that the machine has killed cannot say so itself."""
    program = script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert launch(program, [], 1) == 1
    line = "error: process 0 was ended by SIGKILL; the machine's memory may have run out"
    assert line in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Loader workers


def test_sigterm_to_all_processes_saves(workplace):
    """A run with loader workers, all of whose processes get SIGTERM, saves and ends with 3."""
    flags = [*SHORT, *"--max-steps 0 --stage1-epochs 9 --workers 2 --out runs/workers".split()]
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *flags], cwd=workplace,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("stage 1 step 3 "):
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate()
    assert process.returncode == 3, errors[-2000:]
    assert "stopped by SIGTERM at stage 1, step " in errors
    assert len(list((workplace / "runs/workers/checkpoints").iterdir())) == 1


def test_workers_share_the_records():
    """Workers are forked where that is possible: nothing of the dataset is pickled to them."""
    class Unpicklable(list):
        def __reduce__(self):
            raise AssertionError("pickled")

    dataset = some_conversations(4, 0)
    dataset.records = Unpicklable(dataset.records)
    options = loader_options(dataclasses.replace(C, workers=1))
    assert len(list(make_loader(dataset, 2, 1, 0, 0, **options))) == 2


def test_small_shared_memory_is_one_line(monkeypatch):
    """64 MB, as in Docker, are known to be too few before anything is loaded."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64e6, 0, 64e6))
    monkeypatch.setattr(checks, "SHARED_MEMORY", Path("/"))
    full = dataclasses.replace(C, workers=8, micro_batch=16, image_size=1024, processes=8)
    with pytest.raises(InputError, match="has 64 MB free.* want 6,442 MB.* --shm-size=7g"):
        check_shared_memory(full)
    check_shared_memory(dataclasses.replace(full, workers=0))


# ------------------------------------------------------------------------------------------------
# Precision


def test_a_stage_unfreezes_in_bf16():
    """What is frozen in stage 1 gets gradients in stage 2, in fp32 from bf16 arithmetic."""
    machine = Machine(dataclasses.replace(C, precision="bf16"))
    model, teachers, batch = whole_method()
    for stage in (1, 2):
        model.set_stage(stage)
        if stage == 1:
            machine.place(model, teachers)
        machine.begin_stage(model)
        total_loss(model(batch, teachers)).backward()
    machine.leave()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
    assert gather_full(model.vlm.llm.layers[0].mlp.gate_proj.weight.grad).abs().max() > 0


def test_angles_stay_in_fp32():
    """A VLM in bf16 keeps the LLM's buffers, which are its table of angles, in fp32."""
    vlm = small_vlm()
    vlm.llm.register_buffer("inv_freq", torch.rand(4))
    angles = vlm.llm.inv_freq.clone()
    cast_vlm(vlm, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in vlm.parameters())
    assert torch.equal(vlm.llm.inv_freq, angles)


# ------------------------------------------------------------------------------------------------
# Several processes at once, each check in the same two


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
    if rank == 0:
        model.load_state_dict(expected.state_dict())
    send_from_first(model, "cpu")
    assert model.a.weight is model.b.weight
    assert torch.equal(model(torch.ones(1, 3)), expected(torch.ones(1, 3)))

    with torch.device("meta" if rank else "cpu"):
        model = nn.Sequential(Twins(), nn.Linear(3, 2))
    if rank == 0:
        model[0].load_state_dict(expected.state_dict())
    shard(model, [model[0]], "cpu", 2, bf16=False)
    note_what_trains(model)
    assert torch.equal(model[0](torch.ones(1, 3)), expected(torch.ones(1, 3)))


def check_one_copy(machine: Machine) -> None:
    """Only the first process builds models with numbers."""
    with machine.building():
        vlm = small_vlm()
    assert {p.is_meta for p in vlm.parameters()} == {not machine.first}


def check_slow_folder(rank: int) -> None:
    """The first process is slow to make a checkpoint's folder: the other does not make it."""
    if rank == 0:
        write = checkpoints.write_json
        checkpoints.write_json = lambda *args: (time.sleep(1), write(*args))
    model = nn.Linear(2, 2)
    shard(model, [], "cpu", 2, bf16=False)
    optimizer = torch.optim.AdamW(model.parameters())
    kept = Checkpoints(Path("kept"), 1, rank, 2)
    for name in ("stage1-00000001", "stage1-00000002"):
        kept.save(name, model, optimizer, {})
    kept.finish()
    dist.barrier()
    assert [path.name for path in Path("kept").iterdir()] == ["stage1-00000002"]


def check_patience(machine: Machine) -> None:
    """The first process may work alone for a week, where other messages come within minutes."""
    used = []
    barrier = dist.barrier
    dist.barrier = lambda group=None: (used.append(group), barrier(group))
    with machine.first_alone():
        assert bool(used) == bool(machine.rank)
    dist.barrier = barrier
    assert used == [machine.patient]
    options = machine.patient._get_backend(torch.device("cpu")).options
    assert options._timeout == timedelta(days=7)


def check_folder_is_seen(machine: Machine) -> None:
    """Two machines whose --out is not one folder are told so, both."""
    Path("out").mkdir(exist_ok=True)
    dist.barrier()
    machine.check_folder(Path("out"))
    Path(f"own{machine.rank}").mkdir()
    with pytest.raises(InputError, match="1 of 2 processes do not see the folder of the first"):
        machine.check_folder(Path(f"own{machine.rank}"))


def both(rank: int, folder: Path, port: int) -> None:
    """What each of two processes checks."""
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    machine = Machine(C)
    check_patience(machine)
    check_folder_is_seen(machine)
    check_one_copy(machine)
    check_numbers_are_sent(rank)
    check_slow_folder(rank)
    Path(f"done{rank}").touch()


def test_two_processes_load_save_and_wait(tmp_path):
    """The checks of `both`: one copy of the numbers, one folder, patience, one shared --out."""
    torch.save(Twins(), tmp_path / "twins.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(both, (tmp_path, port), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
