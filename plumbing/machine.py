"""Many processes, one run: share each batch among them, keep them in step.

train.py is written as if it were alone. What it asks of `Machine` is the same with one process,
where most of it does nothing. Nothing of the method is here.
"""

import dataclasses
import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from data import IGNORE, InputError, blank_image, to_device
from model import MoVEKD
from plumbing.checkpoints import Checkpoints, Progress, load_checkpoint
from plumbing.checks import check_shared_memory
from plumbing.cli import Stopped
from plumbing.config import Config
from plumbing.files import flop_counter
from plumbing.launcher import launched
from plumbing.sharding import (SHARD_TEACHERS_ABOVE, compile_parts, note_what_trains, recompute,
                               send_from_first, shard, shard_frozen)
from plumbing.signals import listen
from teachers import Teachers

# one process is meant
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


A_WEEK = timedelta(days=7)


class Share(NamedTuple):
    """A micro-batch's share of a step's answer tokens and of its images, over all processes.

    Means over micro-batches, weighed so, add up to the mean over the step's batch.
    """

    text: float
    images: float

    def weigh(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """L_text is a mean over answer tokens, all other terms are means over images."""
        weighed = {}
        for name, term in terms.items():
            weighed[name] = (self.text if name == "L_text" else self.images) * term
        return weighed


class Machine:
    """This process among those of a run: its device, its part of each batch, the checkpoints."""

    def __init__(self, c: Config):
        self.c = c
        self.stop = ""          # the signal that told the run to stop
        self.launcher = os.getppid() if launched() else None
        self.training = False
        self.doing = "before the first step: nothing is lost"
        self.former_handlers = {}
        self.lock = None        # the open file that holds the run folder
        check_shared_memory(c)
        if launched() or c.precision == "bf16":
            self.join()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.first = self.rank == 0
        # the first process may work alone for hours, where other messages come within minutes
        self.patient = dist.new_group(backend="gloo", timeout=A_WEEK) if self.world > 1 else None
        self.sharded = self.world > 1 or c.precision == "bf16"
        self.checkpoints = Checkpoints(Path(c.out) / "checkpoints", c.keep, self.rank, self.world)

    def join(self) -> None:
        """Meet the other processes. One that is alone joins too, for FSDP's mixed precision."""
        backend = "gloo"
        if self.c.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            backend = "cpu:gloo,cuda:nccl"
        if launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def leave(self) -> None:
        """Part from the other processes, stop listening, and let another run into the folder."""
        if self.lock is not None:
            self.lock.close()
        for number, handler in self.former_handlers.items():
            signal.signal(number, handler)
        self.disconnect()

    @staticmethod
    def disconnect() -> None:
        """Part from the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def trained(self, then: str) -> None:
        """The model is written: no process needs another, and a signal ends what follows.

        `then` is what the run says if a signal comes, or has come while the model was written.
        """
        self.disconnect()
        self.training = False
        self.doing = then
        if self.stop:
            raise Stopped(f"stopped by {self.stop} {then}")

    def listen(self) -> None:
        """From now on SIGTERM, Ctrl-C and a closed terminal (SIGHUP) end the run in order."""
        self.former_handlers = listen(self.on_signal)

    def on_signal(self, number: int, _) -> None:
        """While a stage is trained note it, to end the step and save; else end at once."""
        self.stop = signal.Signals(number).name
        if not self.training:
            raise Stopped(f"stopped by {self.stop} {self.doing}")

    @contextmanager
    def first_alone(self):
        """The first process does the block by itself, then the others: what it made they find."""
        if self.rank:
            dist.barrier(self.patient)
        yield
        if self.first and self.world > 1:
            dist.barrier(self.patient)

    def check_folder(self, out: Path) -> None:
        """Raise InputError unless all processes see one run folder, on however many machines."""
        if self.world == 1:
            return
        name = [f"seen-{time.time_ns()}.tmp"]
        dist.broadcast_object_list(name, src=0, group=self.patient)
        file = out / name[0]
        if self.first:
            file.touch()
        dist.barrier(self.patient)
        unseen = self.total({"": torch.tensor(int(not file.exists()))})[""].item()
        if self.first:
            file.unlink()
        if unseen:
            raise InputError(f"--out {out}: {unseen} of {self.world} processes do not see the "
                             "folder of the first; on several machines it must be on a file "
                             "system that they share")

    def total(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the processes, in one message."""
        if self.world == 1:
            return values
        flat = torch.cat([value.detach().cpu().double().flatten() for value in values.values()])
        dist.all_reduce(flat)
        pieces = flat.split([value.numel() for value in values.values()])
        sums = {}
        for (name, value), piece in zip(values.items(), pieces):
            sums[name] = piece.view(value.shape).to(value.dtype)
        return sums

    def total_terms(self, sums: dict[str, torch.Tensor], counts: dict) -> dict[str, torch.Tensor]:
        """A step's terms over all processes; without an image only the losses mean something."""
        values = self.total(sums)
        if not counts["images"]:
            values = {name: value for name, value in values.items() if name.startswith("L_")}
        return values

    # --- models

    def building(self):
        """Inside, models are built: by the first process as ever, by the others without numbers."""
        return nullcontext() if self.first else torch.device("meta")

    def send(self, module: nn.Module) -> None:
        """Bring a module to the devices, and what the first process has loaded to the others."""
        if self.world > 1:
            dist.barrier(self.patient)  # it may still be loading
            send_from_first(module, self.c.device)
        else:
            module.to(self.c.device)

    def begin_stage(self, model: MoVEKD) -> None:
        """What is trained has changed."""
        if self.sharded:
            note_what_trains(model)

    def place(self, model: MoVEKD, teachers: Teachers) -> None:
        """Bring all models to their devices, in their precision, sharded and compiled as asked."""
        c = self.c
        bf16 = c.precision == "bf16"
        if bf16:
            teachers.bfloat16()
        if c.recompute:
            recompute(model.vlm.blocks)
        if self.sharded:
            # the whole student is smaller than two blocks of a 7B LLM
            units = [model.vlm.student, *model.vlm.llm.blocks]
            shard(model, units, c.device, self.world, bf16)
        else:
            model.float().to(c.device)
        for name, encoder in teachers.encoders.items():
            large = sum(p.numel() for p in encoder.parameters()) > SHARD_TEACHERS_ABOVE
            # CLIP stays whole: its [CLS] row reads the weights of a block from outside
            if self.world > 1 and name != "clip" and large:
                shard_frozen(encoder, c.device, self.world)
        teachers.to(c.device)
        if c.compile == "on":
            compile_parts(model, teachers)

    # --- batches

    def micro_batches(self, batch_size: int) -> tuple[int, range]:
        """In how many micro-batches a batch is dealt out, and which are this process's."""
        own = 1
        if self.c.micro_batch:
            own = math.ceil(batch_size / self.world / self.c.micro_batch)
        return self.world * own, range(self.rank * own, (self.rank + 1) * own)

    def share_work(self, micro: list[dict]) -> tuple[list[tuple[dict, Share]], dict]:
        """This process's micro-batches of a step, each with its Share; and counts over all.

        Raises InputError for a row that cannot be used.
        """
        for batch in micro:
            if "fault" in batch:
                raise InputError(f'{batch["fault"]}; --skip-bad leaves such rows out')
            for line in batch["skipped"]:
                tqdm.write(f"skipped: {line}", file=sys.stderr)
        if self.launcher and os.getppid() != self.launcher:
            self.stop = "the end of its launcher"  # killed: nobody would pass signals on
        texts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in micro]
        images = [len(batch["image_names"]) for batch in micro]
        counts = {
            "text": sum(texts),
            "images": sum(images),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in micro),
            "skipped": sum(len(batch["skipped"]) for batch in micro),
            "cut": sum(batch["cut"] for batch in micro),
            "stop": int(bool(self.stop)),
            "written": int(self.checkpoints.written()),
        }
        sums = self.total({name: torch.tensor(count) for name, count in counts.items()})
        counts = {name: int(count) for name, count in sums.items()}
        if counts["written"] == self.world:
            self.checkpoints.finish()  # every process has written its files of the last one
        work = []
        for batch, text, pictured in zip(micro, texts, images):
            share = Share(text / max(1, counts["text"]), pictured / max(1, counts["images"]))
            work.append((self.on_device(batch), share))
        return work, counts

    def on_device(self, batch: dict) -> dict:
        """A batch on this process's device.

        If the models are sharded, one without an image gets a blank picture to stand in, which
        stands in no text and whose share is 0. A process that left the student out would keep the
        others waiting; and a last micro-batch that left it out would not send the gradients that
        the ones before have added up.
        """
        if self.sharded and batch["images"] is None:
            blank = blank_image(self.c.image_size)[None]                    # (1, 3, R, R)
            batch = {**batch, "images": blank, "image_names": [None], "stand_in": True}
        moved = {}
        for name, value in batch.items():
            moved[name] = to_device(value, self.c.device)
        return moved

    # --- a step

    def seed_step(self, progress: Progress) -> None:
        """Seed LoRA dropout, so that a resumed run draws what the straight one drew."""
        seed = self.c.seed * 1_000_003 + progress.stage * 1_000_000 + progress.step
        torch.manual_seed(seed * 1_009 + self.rank)

    @contextmanager
    def count_flops(self, progress: Progress, steps: int):
        """Count the stage's FLOPs: those of its first step, over all processes, times the steps."""
        if str(progress.stage) in progress.flops:
            yield
            return
        with flop_counter() as counter:
            yield
        count = torch.tensor(float(counter.get_total_flops()), dtype=torch.float64)
        progress.flops[str(progress.stage)] = steps * self.total({"": count})[""].item()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a micro-batch. FSDP takes the mean over the processes of what is a sum."""
        (loss * self.world).backward()

    def sync_gradients(self, model: MoVEKD, on: bool) -> None:
        """Off for all but the last micro-batch: gradients add up where they are, are sent once."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(on)

    # --- checkpoints

    def save_due(self, progress: Progress, steps: int, counts: dict) -> bool:
        """Whether a state is to be kept now: every --save-every steps, after stage 1, on a stop."""
        if counts["stop"] or not self.c.save_every:
            return bool(counts["stop"])
        end_of_stage1 = progress.stage == 1 and progress.step == steps
        return end_of_stage1 or progress.step % self.c.save_every == 0

    def save(self, model: MoVEKD, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        name = f"stage{progress.stage}-{progress.step:08}"
        self.checkpoints.save(name, model, optimizer, dataclasses.asdict(progress))

    def resume(self, path: Path | None, model: nn.Module,
               optimizer: torch.optim.Optimizer) -> None:
        """Fill model and optimizer from a checkpoint, if there is one to go on from."""
        if path:
            load_checkpoint(path, model, optimizer, self.world)
