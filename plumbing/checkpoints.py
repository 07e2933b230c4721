"""Checkpoints to resume from, written by all processes at once (DCP).

Nothing that is read from disk can run code: DCP's index is unpickled by a reader that knows DCP's
own classes only, all else by torch.load(weights_only=True).
"""

import io
import json
import pickle
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from data import InputError
from plumbing.files import read_json, write_json


@dataclass
class Progress:
    """Where a run stands, and what it has counted: a checkpoint keeps it beside the tensors."""

    stage: int = 1
    step: int = 0               # steps done in the stage
    log: list = field(default_factory=lambda: [0, 0])   # bytes of log.jsonl, and their CRC-32
    skipped: int = 0            # rows that --skip-bad left out
    cut: int = 0                # conversations cut at --max-length
    flops: dict = field(default_factory=dict)   # of each stage: its first step's times the steps
    data: dict = field(default_factory=dict)    # a fingerprint of what the run is trained on

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
        """Return when the state is copied; the files follow. Raises InputError for nan or inf."""
        self.finish()
        check_parameters(root)
        temporary = self.folder / (name + ".tmp")
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_json(temporary / "meta.json", meta)
        if self.world > 1:
            dist.barrier(self.group)  # else another process would make the folder first
        state = state_of(root, optimizer)
        future = dcp.async_save(state, checkpoint_id=temporary, process_group=self.group,
                                no_dist=self.world == 1)
        self.pending = future, temporary

    def written(self) -> bool:
        """Whether this process has written its files of a save that is not finished yet."""
        return self.pending is not None and self.pending[0].done()

    def finish(self) -> None:
        """Wait for the files of the last save, give them their name, and drop what is too old.

        All processes call it. meta.json, written last, has a checksum of each file.
        """
        if self.pending is None:
            return
        future, temporary = self.pending
        self.pending = None
        try:
            future.result()
        except (Exception, CheckpointException) as e:  # DCP's is no Exception
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free // 2 ** 20
            fault = str(e).splitlines()[-1] if str(e) else type(e).__name__
            raise InputError(f"{temporary}: cannot be written ({fault}); {free:,} MB are free there"
                             ) from None
        own = checksums(temporary, f"__{self.rank}_*")
        parts = [own]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, own, group=self.group)
        if self.rank == 0:
            files = checksums(temporary, ".metadata")
            for part in parts:
                files.update(part)
            meta = read_json(temporary / "meta.json")
            meta["files"] = files
            meta["crc32"] = zlib.crc32(json.dumps(meta).encode())
            write_json(temporary / "meta.json", meta)
            final = temporary.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            for old in saved_checkpoints(self.folder)[:-self.keep]:
                shutil.rmtree(old)


def check_parameters(root: nn.Module) -> None:
    """Raise InputError if a parameter is no number: such a state is not worth keeping."""
    for name, p in root.named_parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        if not local.isfinite().all():
            raise InputError(f"{name} has become nan or inf; the last checkpoint is from before: "
                             "go on from it with a lower learning rate")


def checksums(folder: Path, pattern: str) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} of the files that a pattern names."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        size = path.stat().st_size
        found[path.name] = [size, crc_of_start(path, size)]
    return found


def crc_of_start(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of a file."""
    crc = 0
    with open(path, "rb") as file:
        while size > 0:
            block = file.read(min(size, 1 << 24))
            if not block:
                break  # it is shorter
            crc = zlib.crc32(block, crc)
            size -= len(block)
    return crc


def saved_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first: their names are in the order of the run."""
    return sorted(path for path in folder.glob("stage*-*") if path.suffix != ".tmp")


def newest_checkpoint(folder: Path, skip_damaged: bool) -> tuple[Path, dict]:
    """The newest checkpoint and its meta. Raises InputError if there is none, or it is damaged.

    With skip_damaged an older one is taken in place of a damaged one.
    """
    found = saved_checkpoints(folder)
    if not found:
        raise InputError(f"{folder}: holds no checkpoint to go on from; a run saves one every "
                         "--save-every steps and when it is told to stop")
    for path in reversed(found):
        fault, meta = examine(path)
        if fault is None:
            return path, meta
        if not skip_damaged:
            raise InputError(f"{path}: damaged: {fault}; --resume {folder.parent} --skip-damaged "
                             "goes on from an older one, if there is one")
    raise InputError(f"{folder}: every checkpoint is damaged; the newest: {examine(found[-1])[0]}")


def examine(path: Path) -> tuple[str | None, dict]:
    """What is wrong with a checkpoint, or None; and its meta."""
    try:
        meta = read_json(path / "meta.json")
        crc = meta.pop("crc32")
        files = dict(meta)["files"]
        if crc != zlib.crc32(json.dumps(meta).encode()):
            return "meta.json has changed since it was written", {}
        del meta["files"]
        log_bytes, log_crc = Progress(**meta).log
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"meta.json cannot be read ({type(e).__name__})", {}
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes in place of {size}", {}
        if checksums(path, name)[name][1] != crc:
            return f"{name} has changed since it was written", {}
    log = path.parent.parent / "log.jsonl"  # resumed with it
    if not log.is_file() or crc_of_start(log, log_bytes) != log_crc:
        return "log.jsonl, up to where the checkpoint was made, is missing or has changed", {}
    return None, meta


def state_of(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The tensors of what is trained, and of its optimizer."""
    options = StateDictOptions(ignore_frozen_params=True)
    return {"model": get_model_state_dict(root, options=options),
            "optimizer": get_optimizer_state_dict(root, optimizer, options=options)}


def load_checkpoint(path: Path, root: nn.Module, optimizer: torch.optim.Optimizer,
                    world: int) -> None:
    """Fill what is trained and the optimizer, in place."""
    reader = SafeReader(path)
    reader.read_metadata()  # here too, for DCP would wrap what it raises
    state = state_of(root, optimizer)
    try:
        dcp.load(state, storage_reader=reader, planner=SafePlanner(), no_dist=world == 1)
    except CheckpointException as e:  # DCP's wrapper of what happened in each process
        cause, _ = next(iter(e.failures.values()))
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"{path}: cannot be read: {str(cause).splitlines()[0]}") from None
    # not strict: the frozen tensors are not in it
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(root, state["model"], options=options)
    options = StateDictOptions(ignore_frozen_params=True)
    set_optimizer_state_dict(root, optimizer, state["optimizer"], options=options)


# ------------------------------------------------------------------------------------------------
# Reading without running

_METADATA = "torch.distributed.checkpoint.metadata"
ADMITTED = {  # what DCP's index is made of
    _METADATA: ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "bool",
              "uint8", "device"),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


class SafeUnpickler(pickle.Unpickler):
    """An unpickler of DCP's index, to which no other class or function is known."""

    def find_class(self, module: str, name: str):
        if name in ADMITTED.get(module, ()):
            return super().find_class(module, name)
        raise InputError(f"a checkpoint's .metadata names {module}.{name}, which no checkpoint "
                         "needs: it was crafted to run code; delete it")


class SafeReader(FileSystemReader):
    """DCP's reader, but for how it reads the index, which all processes share."""

    def read_metadata(self, *_, **__) -> Metadata:
        """DCP's index. Raises InputError if it names what no index needs."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = SafeUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, but for scalars (the optimizer's settings), which it would unpickle."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        """One scalar. Raises InputError if it is anything that runs code."""
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise InputError("a checkpoint holds something that is no number: it was crafted to "
                             "run code; delete it") from None
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
