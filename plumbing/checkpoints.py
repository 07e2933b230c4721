"""Checkpoints to resume from, written by all processes at once (DCP)."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict,
                                                     set_model_state_dict,
                                                     set_optimizer_state_dict)

from plumbing.cli import InputError


@dataclass
class Progress:
    """Where a run stands, and what it has counted: a checkpoint keeps it beside the tensors."""

    stage: int = 1
    step: int = 0               # steps done in the stage
    log_bytes: int = 0          # of log.jsonl
    skipped: int = 0            # rows that --skip-bad left out
    cut: int = 0                # conversations cut at --max-length
    flops: dict = field(default_factory=dict)   # of each stage: its first step's times the steps

    def advance(self, counts: dict) -> None:
        """A step is done."""
        self.step += 1
        self.skipped += counts["skipped"]
        self.cut += counts["cut"]


class Checkpoints:
    """The last `keep` states of a run: folder/stage2-00000500/ and so on.

    A state is what is trained, its optimizer's, and `meta`, a JSON object that says where the run
    stands. It is written in the background, under another name until it is complete, and can be
    loaded by another number of processes.
    """

    def __init__(self, folder: Path, keep: int, rank: int, world: int):
        self.folder = folder
        self.keep = keep
        self.rank = rank
        self.world = world
        self.pending = None
        # a group of its own: the files are written while the run goes on, and its messages must
        # not mix with the run's
        self.group = dist.new_group(backend="gloo") if world > 1 else None

    def save(self, name: str, root: nn.Module, optimizer: torch.optim.Optimizer,
             meta: dict) -> None:
        """Return when the state is copied; the files follow."""
        self.finish()
        temporary = self.folder / (name + ".tmp")
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / "meta.json").write_text(json.dumps(meta))
        state = state_of(root, optimizer)
        future = dcp.async_save(state, checkpoint_id=temporary, process_group=self.group,
                                no_dist=self.world == 1)
        self.pending = future, temporary

    def finish(self) -> None:
        """Wait for the files of the last save, give them their name, and drop what is too old."""
        if self.pending is None:
            return
        future, temporary = self.pending
        future.result()
        self.pending = None
        if self.world > 1:
            dist.barrier()
        if self.rank == 0:
            final = temporary.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in saved_checkpoints(self.folder)[:-self.keep]:
                shutil.rmtree(old)


def saved_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first: their names are in the order of the run."""
    return sorted(path for path in folder.glob("stage*-*") if path.suffix != ".tmp")


def newest_checkpoint(folder: Path) -> tuple[Path, dict]:
    """The newest checkpoint and its meta. Raises InputError if there is none."""
    found = saved_checkpoints(folder)
    if not found:
        raise InputError(f"{folder}: holds no checkpoint to go on from; a run saves one every "
                         "--save-every steps and when it gets a SIGTERM")
    return found[-1], json.loads((found[-1] / "meta.json").read_text())


def state_of(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The tensors of what is trained, and of its optimizer."""
    options = StateDictOptions(ignore_frozen_params=True)
    return {"model": get_model_state_dict(root, options=options),
            "optimizer": get_optimizer_state_dict(root, optimizer, options=options)}


def load_checkpoint(path: Path, root: nn.Module, optimizer: torch.optim.Optimizer,
                    world: int) -> None:
    """Fill what is trained and the optimizer, in place."""
    state = state_of(root, optimizer)
    dcp.load(state, checkpoint_id=path, no_dist=world == 1)
    # not strict: the frozen tensors are not in it
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(root, state["model"], options=options)
    options = StateDictOptions(ignore_frozen_params=True)
    set_optimizer_state_dict(root, optimizer, state["optimizer"], options=options)
