"""Checkpoints to resume from: all processes write them at once, in the background (DCP).

They hold safetensors and JSON only, so nothing that is read from a checkpoint can run code.
"""

import hashlib
import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.optim import Optimizer

from data import InputError
from plumbing.files import read_json, write_json

FILES = 8           # of each process: DCP puts a file together in memory before it writes it
ERRORS = (Exception, dcp.CheckpointException)   # DCP's is not an Exception


@dataclass
class Progress:
    """Position and counts of a run: a checkpoint has them beside the tensors."""

    stage: int = 0
    step: int = 0               # steps done in the stage
    log: list = field(default_factory=lambda: [0, 0])   # bytes of log.jsonl, and their CRC-32
    skipped: int = 0            # rows that --skip-bad left out
    cut: int = 0                # conversations cut at --max-length
    flops: dict = field(default_factory=dict)   # of each stage: its first step's times the steps
    data: dict = field(default_factory=dict)    # a fingerprint of the training data
    config: dict = field(default_factory=dict)  # the Config that it trains with


class Writer(dcp.HuggingFaceStorageWriter):
    """DCP's writer of safetensors, which completes the checkpoint when all files are written."""

    def __init__(self, folder: Path, state: dict[str, torch.Tensor], progress: dict, keep: int):
        numbers = {name: 1 + i % FILES for i, name in enumerate(state)}
        super().__init__(str(folder), numbers, save_distributed=True)
        self.progress, self.keep = progress, keep

    def finish(self, **_) -> None:
        """Complete the checkpoint and drop old ones. DCP calls it in the first process only."""
        content = {"progress": self.progress, "files": checksums(self.path)}
        content["crc32"] = zlib.crc32(json.dumps(content).encode())
        write_json(self.path / "progress.json", content)
        final = self.path.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        self.path.replace(final)
        for old in saved_checkpoints(final.parent)[:-self.keep]:
            shutil.rmtree(old)


class Checkpoints:
    """The last `keep` states of a run, in folder/stage2-00000500/ and so on; .tmp until complete.

    A state is what is trained, its optimizer's, and a Progress; any number of processes can load
    it. What a killed run has left is cleared when the next one locks the run folder.
    """

    def __init__(self, folder: Path, keep: int, rank: int, world: int):
        self.folder, self.keep, self.rank = folder, keep, rank
        self.pending = None     # a future, and the folder that is written to
        # of its own: messages sent while files are written must not mix with those of the run
        self.group = dist.new_group(backend="gloo") if world > 1 else None

    def save(self, name: str, root: nn.Module, optimizer: Optimizer, progress: dict) -> None:
        """Copy the state in all processes; the files follow. Raises InputError if it has NaN."""
        self.finish()
        check_parameters(root)
        temporary = self.folder / (name + ".tmp")
        state = trained_state(root, optimizer)
        writer = Writer(temporary, state, progress, self.keep)
        future = dcp.async_save(state, storage_writer=writer, process_group=self.group,
                                no_dist=self.group is None)
        self.pending = future, temporary

    def written(self) -> bool:
        """Return whether the last save has ended, and `finish` was not called since."""
        return self.pending is not None and self.pending[0].done()

    def finish(self) -> None:
        """Wait for the last save. Raises InputError, and leaves nothing of it, if it has failed."""
        if self.pending is None:
            return
        future, temporary = self.pending
        self.pending = None
        try:
            future.result()
        except ERRORS as e:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free // 2 ** 20
            raise InputError(f"{temporary}: cannot be written ({last_line(e)}); {free:,} MB are "
                             "free there") from None


def last_line(error: BaseException) -> str:
    """Return the last line of an error: DCP's contain a traceback, and end with the reason."""
    return str(error).rstrip().rpartition("\n")[2]


def check_parameters(root: nn.Module) -> None:
    """Raise InputError if a parameter is NaN or infinite: such a state is not worth keeping."""
    for name, p in root.named_parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        if not local.isfinite().all():
            raise InputError(f"{name} has become nan or inf; the last checkpoint is from before: "
                             "go on from it with a lower learning rate")


def trained_state(root: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of trained parameters and of their optimizer, by name, not copied."""
    options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    state, moments = get_state_dict(root, optimizer, options=options)
    state.update(moments)
    # The optimizer's settings are numbers: the schedule sets the learning rate, the code the rest.
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def checksums(folder: Path) -> dict[str, str]:
    """Return {file: its SHA-256} of the safetensors files in a checkpoint's folder."""
    def checksum(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    with ThreadPoolExecutor() as pool:  # they may be many GB
        sums = pool.map(checksum, paths)
    return {path.name: value for path, value in zip(paths, sums, strict=True)}


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first: their names are in the order of the run."""
    return sorted(path for path in folder.glob("stage*-*") if path.suffix != ".tmp")


def newest_checkpoint(folder: Path, skip_damaged: bool) -> tuple[Path, dict]:
    """Return the newest checkpoint and its progress. Raises InputError if there is none whole."""
    found = saved_checkpoints(folder)
    if not found:
        raise InputError(f"{folder}: holds no checkpoint to go on from; a run saves one every "
                         "--save-every steps and when it is told to stop")
    for path in reversed(found):
        fault, progress = examine(path)
        if fault is None:
            return path, progress
        if not skip_damaged:
            raise InputError(f"{path}: damaged: {fault}; --resume {folder.parent} --skip-damaged "
                             "goes on from an older one, if there is one")
    raise InputError(f"{folder}: every checkpoint is damaged; the newest: {examine(found[-1])[0]}")


def examine(path: Path) -> tuple[str | None, dict]:
    """Return the fault of a checkpoint, or None; and its progress."""
    try:
        content = read_json(path / "progress.json")
        unchanged = content.pop("crc32") == zlib.crc32(json.dumps(content).encode())
    except (InputError, KeyError, TypeError, AttributeError):  # missing, or other JSON
        unchanged = False
    if not unchanged:
        return "progress.json is missing, or has changed since it was written", {}
    progress, files = content["progress"], content["files"]
    found = checksums(path)
    for name in sorted({*files, *found}):
        if files.get(name) != found.get(name):
            return f"{name} is missing, has changed since it was written, or was put there", {}
    return None, progress


def load_checkpoint(path: Path, root: nn.Module, optimizer: Optimizer, world: int) -> None:
    """Fill the trained parameters and their optimizer from a checkpoint. Raises InputError."""
    state = trained_state(root, optimizer)
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        reader.read_metadata()  # here too: what fails there DCP logs with its traceback
        dcp.load(state, storage_reader=reader, no_dist=world == 1)  # in place
    except ERRORS as e:
        raise InputError(f"{path}: cannot be read: {last_line(e)}") from None
