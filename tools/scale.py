"""Many processes, one run: start them, share each batch among them, shard what is trained (FSDP2), keep checkpoints (DCP).

train.py is written as if it were alone; what it asks of this file is the same with one process, where most of it does nothing.
Nothing of the method is here.
"""

import functools
import json
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun
from torch.utils.checkpoint import checkpoint

from data import InputError

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")  # that is meant: one process

SHARD_TEACHERS_ABOVE = 500_000_000  # parameters; a smaller teacher is cheaper to hold on every GPU than to gather for every batch

# ---------------------------------------------------------------------------------------------------------------------
# Processes


def launched() -> bool:
    """Whether torchrun, or `launch`, started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launch(script: str, argv: list[str], processes: int) -> int:
    """Run `script argv` in so many processes of this machine, as torchrun does; returns the exit status. The processes speak for themselves: no
    report of the launcher's own. A SIGTERM is passed on, and they have ten minutes to save."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        torchrun(parse_args(["--standalone", f"--nproc-per-node={processes}", "--shutdown-timeout=600", script, *argv]))
    except ChildFailedError as e:
        return max(1, e.get_first_failure()[1].exitcode)  # below 0: ended by a signal
    except torch.distributed.elastic.multiprocessing.api.SignalException:
        pass  # the processes have saved and ended
    return 0


def join(device: str, alone: bool = False) -> None:
    """Meet the other processes; `alone` is for one that is started by itself and yet wants FSDP's mixed precision."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def first_alone():
    """The first process does the block by itself, then the others: what it made they find."""
    if rank():
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def total(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over the processes, in one message."""
    if world() == 1:
        return values
    flat = torch.cat([value.detach().double().flatten().cpu() for value in values.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape).to(value.dtype) for (name, value), part in zip(values.items(), parts)}


class Stop:
    """Whether a SIGTERM has come: the scheduler wants the machine back."""

    def __init__(self):
        self.came = False
        signal.signal(signal.SIGTERM, self.note)

    def note(self, *_):
        self.came = True


# ---------------------------------------------------------------------------------------------------------------------
# Memory: sharding and recomputing


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Activation checkpointing: of each block only the input is kept, and its forward is run again in backward. By the forward method, so that no
    parameter's name changes."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda block=block: (nullcontext(), untouched(block)))


@contextmanager
def untouched(block: nn.Module):
    """The tensors that the block's modules hold (MoLE's router probabilities) are after the second run what they were before it: those of the second run
    would hold its graph, which never runs backward, and with it the activations of every block so far."""
    before = [(module, name, value) for module in block.modules() for name, value in vars(module).items() if torch.is_tensor(value)]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def shard(root: nn.Module, blocks: Iterable[nn.Module], device: str, bf16: bool) -> None:
    """FSDP2: each process holds a part of every parameter, its gradient and optimizer state, in fp32; a block is gathered, in bf16 if asked for, when it
    runs. What is in no block is gathered with the root, whose forward must therefore be the one that is called. Gradients are reduced in fp32."""
    mesh = init_device_mesh(device, (world(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in (*blocks, root):
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)


def shard_frozen(encoder: nn.Module, device: str) -> None:
    """The same for a teacher that is too large to be held whole by every GPU: its stages or blocks, in the precision it has."""
    mesh = init_device_mesh(device, (world(),))
    for module in (*getattr(encoder.net, "stages", getattr(encoder.net, "blocks", ())), encoder):
        fully_shard(module, mesh=mesh)


def sync_gradients(root: nn.Module, on: bool) -> None:
    """Off for all but the last micro-batch of a step: their gradients are added up where they are, and sent once."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(on)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(root: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, whole and on the CPU; in the first process, for the others nothing."""
    if not isinstance(root, FSDPModule):
        return root.state_dict()
    return get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoints:
    """The last `keep` states of a run: folder/stage2-00000500/ and so on, each written by all processes at once, in the background, under another name
    until it is whole. A state is what is trained, its optimizer's, and `meta`, a JSON object that says where the run stands; it can be loaded by another
    number of processes."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep, self.pending = folder, keep, None
        # a group of its own: the files are written while the run goes on, and its messages must not mix with the run's
        self.group = dist.new_group(backend="gloo") if world() > 1 else None

    def save(self, name: str, root: nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> None:
        """Returns when the state is copied; the files follow."""
        self.finish()
        temporary = self.folder / (name + ".tmp")
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / "meta.json").write_text(json.dumps(meta))
        future = dcp.async_save(state_of(root, optimizer), checkpoint_id=temporary, process_group=self.group, no_dist=world() == 1)
        self.pending = future, temporary

    def finish(self) -> None:
        """Wait for the files of the last save, then give them their name and drop what is older than the last `keep`."""
        if self.pending is None:
            return
        future, temporary = self.pending
        future.result()
        self.pending = None
        if world() > 1:
            dist.barrier()
        if rank() == 0:
            shutil.rmtree(temporary.with_suffix(""), ignore_errors=True)
            temporary.rename(temporary.with_suffix(""))
            for old in saved(self.folder)[:-self.keep]:
                shutil.rmtree(old)


def saved(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first: their names are in the order of the run."""
    return sorted(path for path in folder.glob("stage*-*") if path.suffix != ".tmp")


def where(folder: Path) -> tuple[Path, dict]:
    """The newest checkpoint and its meta. Raises InputError if there is none."""
    if not (found := saved(folder)):
        raise InputError(f"{folder}: holds no checkpoint to go on from; a run saves one every --save-every steps and when it gets a SIGTERM")
    return found[-1], json.loads((found[-1] / "meta.json").read_text())


def state_of(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    options = StateDictOptions(ignore_frozen_params=True)
    return {"model": get_model_state_dict(root, options=options), "optimizer": get_optimizer_state_dict(root, optimizer, options=options)}


def load(path: Path, root: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill what is trained and the optimizer, in place."""
    state = state_of(root, optimizer)
    dcp.load(state, checkpoint_id=path, no_dist=world() == 1)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)  # the frozen are not in it
    set_model_state_dict(root, state["model"], options=options)
    set_optimizer_state_dict(root, optimizer, state["optimizer"], options=StateDictOptions(ignore_frozen_params=True))
