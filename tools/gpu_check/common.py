"""Common code of tools.gpu_check: the rows, and models that train on random weights.

Checked are kinds, kernels, memory and time. On a CPU the same code runs at small sizes.

Letters: B samples, T tokens of the LLM's sequence, n tokens of the student.
"""

import dataclasses
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from data import IGNORE, InputError
from model import MoVEKD
from plumbing.config import FULL, TINY, Config
from plumbing.processes import Machine, Step
from plumbing.sharding import place_models, refresh_trained
from real.pretrained_llm import require_transformers
from teachers import Teachers
from tools.plan.memory import PeakMemory, loader_images
from tools.plan.models import count, random_models
from train import clip_gradients, forward_backward

SMALL_LLM = dict(vocab_size=320, hidden_size=64, intermediate_size=176, num_attention_heads=4)


class LeftOut(Exception):
    """A check that is left out here; its text is the reason."""


class Row(NamedTuple):
    """A line of the table; `ok` is None if the check was left out."""

    check: str
    expected: str
    got: str
    ok: bool | None


@dataclasses.dataclass
class Setup:
    """The device and the limits of the checks."""

    device: str         # "cuda" or "cpu"
    folder: Path        # for runs, checkpoints and pictures; empty at first
    deadline: float     # on time.monotonic's clock

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def require(self, condition: bool, message: str) -> None:
        """Raise LeftOut unless a condition holds."""
        if not condition:
            raise LeftOut(message)

    def require_gpu(self, reason: str) -> None:
        """Raise LeftOut on a CPU."""
        self.require(self.cuda, f"wants a GPU: {reason}")

    def require_seconds(self, seconds: float) -> None:
        """Raise LeftOut if so many are not left; small sizes need a fifth of them."""
        wanted = seconds if self.cuda else seconds / 5
        left = self.deadline - time.monotonic()
        self.require(left >= wanted, f"wants {wanted:.0f} s, and {max(0, left):.0f} s are left")

    def free(self) -> None:
        """Give back the memory of what ran before, and count peaks from here on."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def full_config(setup: Setup, **changes) -> Config:
    """Return --full on a GPU; on a CPU its switches at the tiny preset's sizes."""
    c = dataclasses.replace(FULL, device=setup.device, out=str(setup.folder / "checks"), workers=0,
                            processes=1)
    if not setup.cuda:
        small = {name: getattr(TINY, name) for name in (*FULL.teachers, "image_size", "mole_rank")}
        c = dataclasses.replace(c, max_length=160, micro_batch=8, **small)
    return dataclasses.replace(c, **changes)


def llama_shape(setup: Setup, layers: int):
    """Return the transformers config of Vicuna-7B, or on a CPU of a small LLM, with fewer layers.

    Raises LeftOut if transformers is not installed.
    """
    try:
        transformers = require_transformers()
    except InputError as e:
        raise LeftOut(str(e)) from None
    small = {} if setup.cuda else SMALL_LLM
    return transformers.LlamaConfig(num_hidden_layers=layers, **small)


def training_batch(c: Config, model: MoVEKD, samples: int, tokens: int) -> dict:
    """Make a batch as data.collate does, (B, T): each sample an image, then an answer to the end.

    Padded on the right: sample i is i tokens shorter than the first.
    """
    n = model.vlm.student.num_tokens
    size = (samples, tokens)
    ids = torch.randint(1, 300, size)                                               # (B, T)
    ids[:, 1:1 + n] = model.vlm.image_token
    labels = ids.masked_fill(ids == model.vlm.image_token, IGNORE)                  # (B, T)
    mask = torch.ones(size, dtype=torch.long)                                       # (B, T)
    for i in range(1, samples):
        ids[i, -i:] = 0
        labels[i, -i:] = IGNORE
        mask[i, -i:] = 0
    return {"input_ids": ids.to(c.device), "labels": labels.to(c.device),
            "attention_mask": mask.to(c.device), "images": loader_images(c, samples, c.device),
            "image_names": [None] * samples, "skipped": [], "cut": 0}


class Trainer:
    """A stage of train.py without data, log and checkpoints."""

    def __init__(self, c: Config, model: MoVEKD, teachers: Teachers):
        self.c = c
        self.model = model
        self.teachers = teachers

    def start_stage(self, stage: int) -> None:
        """Freeze and unfreeze, and make an optimizer."""
        self.model.set_stage(stage)
        self.model.train()
        refresh_trained(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def backward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Run forward and backward; return the terms of the loss."""
        return forward_backward(self.c, self.model, self.teachers, Step.of(batch))

    def gradients(self, batch: dict) -> torch.Tensor:
        """Return all gradients of a batch, (P,), with the same dropout masks at each call."""
        torch.manual_seed(0)
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(batch)
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    def step(self, batch: dict) -> None:
        """Run a whole step."""
        self.backward(batch)
        clip_gradients(self.parameters, self.c.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, batch: dict) -> float:
        """Return the bytes at the worst moment of a step, weights and optimizer included."""
        self.step(batch)
        if self.c.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(batch)
            return torch.cuda.max_memory_allocated()
        self.optimizer.state.clear()
        with PeakMemory() as counter:
            self.step(batch)
            self.step(batch)  # only the second has the optimizer's state from the start
        weights = count(self.model.parameters()) + count(self.teachers.parameters())
        return 4 * weights + counter.peak


@contextmanager
def training(setup: Setup, c: Config, layers: int, stage: int) -> Iterator[Trainer]:
    """Yield a Trainer on random models, placed as train.py places them."""
    setup.free()
    shape = llama_shape(setup, layers)
    machine = Machine(c)
    try:
        model, teachers = random_models(c, setup.device, shape)
        place_models(model, teachers, c, machine.world)
        trainer = Trainer(c, model, teachers)
        trainer.start_stage(stage)
        yield trainer
    finally:
        machine.leave()
