"""Many processes, one run: start them, divide each step's work among them, keep them in step."""

import atexit
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import ProcessExitedException, get_context, start_processes
from tqdm import tqdm

from data import IGNORE, InputError, blank_image, to_device
from model import VLM
from plumbing import cli, signals
from plumbing.config import STAGES, Config


def launched() -> bool:
    """Return whether torchrun, or `launch`, started this process."""
    return "RANK" in os.environ


def wanted_processes(c: Config) -> int:
    """Return how many processes this one should start in its place; 1: none."""
    if launched():
        return 1
    return c.processes or (torch.cuda.device_count() if c.device == "cuda" else 1)


def launch(work: Callable, arguments: tuple, processes: int) -> int:
    """Run `work(*arguments)` in so many processes; pass signals on; return the exit status."""
    # Libraries read these as they load. Without the second, uneven batches fragment CUDA memory.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    received = []
    signals.listen(lambda number, _: received.append(number))
    stopped = get_context("spawn").Event()
    signals.block(True)  # a new process inherits it, and lets signals through when it listens
    everyone = (work, arguments, processes, get_free_port(), stopped)
    context = start_processes(run_one, everyone, processes, join=False)
    signals.block(False)
    try:
        # if one fails, join sends the others SIGTERM, and SIGKILL 30 s later
        while not context.join(timeout=0.1):
            while received:
                number = received.pop(0)
                for process in context.processes:
                    if process.is_alive() and os.name != "nt":  # on Windows Ctrl-C goes to all
                        os.kill(process.pid, number)
    except ProcessExitedException as e:
        if e.exit_code > 0:
            return e.exit_code
        hint = "; the machine's memory may have run out" if e.signal_name == "SIGKILL" else ""
        print(f"error: process {e.error_index} was ended by {e.signal_name}{hint}", file=sys.stderr)
        return 1
    return signals.STOPPED if stopped.is_set() else 0


def run_one(rank: int, work: Callable, arguments: tuple, world: int, port: int, stopped) -> None:
    """Run `work` as one of the processes, with torchrun's environment variables."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}",
                      LOCAL_WORLD_SIZE=f"{world}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    if hasattr(os, "setsid"):
        os.setsid()  # it gets a terminal's Ctrl-C once, through `launch`
    tqdm.set_lock(threading.RLock())  # its own would outlive os._exit below, with a warning
    signals.begin_program()
    signals.block(False)
    status = 0
    try:
        cli.run(lambda: work(*arguments))
    except SystemExit as e:
        status = e.code
    if status == signals.STOPPED:
        stopped.set()
        status = 0  # another status would end those that still save
    # leave out the end of the interpreter: a thread of gloo's sometimes aborts it there
    atexit.register(os._exit, status)


class Weights(NamedTuple):
    """A micro-batch's fractions of a step's answer tokens and images, over all processes."""

    text: float
    images: float

    def apply(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weight terms, so that those of micro-batches add up to those of the step's batch."""
        # L_text is a mean over answer tokens, any other term one over images
        weights = {"L_text": self.text}
        return {name: weights.get(name, self.images) * term for name, term in terms.items()}


class Step(NamedTuple):
    """One process's work of one step: its micro-batches, and counts over all processes."""

    number: int                                     # from 0
    micro_batches: list[tuple[dict, Weights]]
    counts: dict[str, int]

    @classmethod
    def of(cls, batch: dict) -> "Step":
        """Make a step of one batch for one process, as a script may want it."""
        return cls(0, [(batch, Weights(1.0, 1.0))], {"images": len(batch["image_names"])})


class Machine:
    """This process among those of a run: its device, its part of each batch, its signals."""

    def __init__(self, c: Config):
        self.c = c
        self.stop = ""              # the signal that told the run to stop
        self.state = "before the first step: nothing is lost"   # the run then prints it
        self.training = False
        self.lock = None            # the open file that holds the run folder
        self.former_handlers = {}
        self.launcher = os.getppid() if launched() else None
        if launched() or c.precision == "bf16":
            backend = "cpu:gloo,cuda:nccl" if c.device == "cuda" else "gloo"
            if c.device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            if launched():
                dist.init_process_group(backend)
            else:  # FSDP's mixed precision needs a group even of one
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.first = self.rank == 0
        self.sharded = self.world > 1 or c.precision == "bf16"
        # Rank 0 may work alone for hours, while messages of the training come within minutes.
        week = timedelta(days=7)
        self.patient = dist.new_group(backend="gloo", timeout=week) if self.world > 1 else None

    def leave(self) -> None:
        """Leave the process group, stop listening, and unlock the run folder."""
        if self.lock is not None:
            self.lock.close()
        for number, handler in self.former_handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()

    def on_signal(self, number: int, _) -> None:
        """Note the signal while a stage is trained, so that its step is saved; else end the run."""
        self.stop = signal.Signals(number).name
        if not self.training:
            raise signals.Stopped(f"stopped by {self.stop} {self.state}")

    def end_training(self, state: str) -> None:
        """Leave the process group; from now on a signal ends the run, with the message `state`."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.training = False
        self.state = state
        if self.stop:
            raise signals.Stopped(f"stopped by {self.stop} {state}")

    @contextmanager
    def first_alone(self):
        """Run rank 0 first; the others then find its files."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Wait for all processes, for hours if need be."""
        if self.world > 1:
            dist.barrier(self.patient)

    def check_folder(self, out: Path) -> None:
        """Raise InputError unless this process sees the lock that rank 0 has just written."""
        lock = out / "run.lock"
        written = [lock.read_text(encoding="utf-8") if self.first else ""]
        dist.broadcast_object_list(written, src=0, group=self.patient)
        if not lock.is_file() or lock.read_text(encoding="utf-8") != written[0]:
            raise InputError(f"--out {out}: process {self.rank} does not see the folder of the "
                             "first; all machines must share the file system that it is on")

    def total(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return sums over the processes, by one all-reduce."""
        if self.world == 1:
            return values
        flat = torch.cat([value.detach().cpu().double().flatten() for value in values.values()])
        dist.all_reduce(flat)
        pieces = flat.split([value.numel() for value in values.values()])
        return {name: piece.view(value.shape).to(value.dtype)
                for (name, value), piece in zip(values.items(), pieces, strict=True)}

    def micro_batches(self, stage: int) -> tuple[int, range]:
        """Return how many micro-batches a batch of a stage has, and which are this process's."""
        batch_size = getattr(self.c, f"{STAGES[stage]}_batch")
        size = self.c.micro_batch
        own = math.ceil(batch_size / self.world / size) if size else 1
        return self.world * own, range(self.rank * own, (self.rank + 1) * own)

    def make_step(self, number: int, batches: list[dict], vlm: VLM, written: bool = False) -> Step:
        """Make a step of this process's batches. Raises InputError for a row that is unusable."""
        for batch in batches:
            if "fault" in batch:
                raise InputError(f'{batch["fault"]}; --skip-bad leaves such rows out')
            for line in batch["skipped"]:
                tqdm.write(f"skipped: {line}", file=sys.stderr)
        if self.launcher and os.getppid() != self.launcher:
            self.stop = "the end of its launcher"  # which was killed, and can pass on no signal
        texts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches]
        images = [len(batch["image_names"]) for batch in batches]
        # "written": whether this process has written its files of the last checkpoint
        own = {"text": sum(texts), "images": sum(images),
               "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
               "skipped": sum(len(batch["skipped"]) for batch in batches),
               "cut": sum(batch["cut"] for batch in batches),
               "stop": int(bool(self.stop)), "written": int(written)}
        sums = self.total({name: torch.tensor(count) for name, count in own.items()})
        counts = {name: int(count) for name, count in sums.items()}
        micro_batches = []
        for batch, text, pictures in zip(batches, texts, images, strict=True):
            weights = Weights(text / max(1, counts["text"]), pictures / max(1, counts["images"]))
            if self.sharded and batch["images"] is None:
                batch = with_stand_in(batch, vlm, self.c.image_size)
            batch = {name: to_device(value, self.c.device) for name, value in batch.items()}
            micro_batches.append((batch, weights))
        return Step(number, micro_batches, counts)


def with_stand_in(batch: dict, vlm: VLM, image_size: int) -> dict:
    """Add a sample with a blank picture and nothing to learn to a batch without images."""
    # A sharded student must run in every process at once. The sample's image terms have weight 0.
    samples = {}
    for name, token, pad in (("input_ids", vlm.image_token, 0), ("labels", IGNORE, IGNORE)):
        row = torch.full((vlm.student.num_tokens,), token)                  # (n,)
        rows = [*batch[name], row]                                          # B + 1 of any length
        samples[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return {**batch, **samples, "image_names": [None],
            "images": blank_image(image_size)[None]}                        # (1, 3, R, R)
