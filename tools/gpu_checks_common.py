"""What the checks of tools.gpu_check share: where they run, their rows, and models to run.

Weights are random and pictures are noise: what is checked are kinds, kernels, memory and time. On a
CPU the same code runs at toy sizes.

Letters: B samples, T tokens of the LLM's sequence, n tokens of the student, R pixels.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from data import IGNORE, to_device
from model import MoVEKD
from plumbing.config import FULL, TINY, Config
from plumbing.machine import Machine
from real.pretrained_llm import PretrainedLLM, require_transformers
from teachers import Teachers
from tools.measuring import PeakMemory, count
from tools.meta import MetaTokenizer, loader_images, random_models, without_values
from train import clip_gradients

LLM_LAYERS = 32     # of Vicuna-7B
TOY_LLM = dict(vocab_size=320, hidden_size=64, intermediate_size=176, num_attention_heads=4)


class LeftOut(Exception):
    """A check that is not made here; its text says why."""


class Row(NamedTuple):
    """A line of the table; `ok` is None if the check was left out."""

    check: str
    expected: str
    got: str
    ok: bool | None = True


@dataclasses.dataclass
class Place:
    """Where the checks run."""

    device: str         # "cuda" or "cpu"
    folder: Path        # for runs, checkpoints and pictures; empty at first
    deadline: float     # on time.monotonic's clock

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def require_gpu(self, why: str) -> None:
        """Raise LeftOut on a CPU."""
        if not self.cuda:
            raise LeftOut(f"wants a GPU: {why}")

    def require_seconds(self, seconds: float) -> None:
        """Raise LeftOut if so many are not left; at toy sizes a fifth of them will do."""
        wanted = seconds if self.cuda else seconds / 5
        left = self.deadline - time.monotonic()
        if left < wanted:
            raise LeftOut(f"wants {wanted:.0f} s, and {max(0, left):.0f} s are left")


def free(place: Place) -> None:
    """Give back the memory of the check before, and count peaks from here."""
    gc.collect()
    if place.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------------------------------------------------------
# Models and batches


def full_config(place: Place, **changes) -> Config:
    """--full on a GPU; on a CPU its switches at the tiny preset's sizes."""
    c = dataclasses.replace(FULL, device=place.device, out=str(place.folder / "checks"), workers=0,
                            processes=1)
    if not place.cuda:
        small = {name: getattr(TINY, name) for name in (*FULL.teachers, "image_size", "mole_rank")}
        c = dataclasses.replace(c, max_length=160, micro_batch=8, **small)
    return dataclasses.replace(c, **changes)


def llama_shape(place: Place, layers: int):
    """The transformers config of Vicuna-7B, or of a toy on a CPU, with so many layers."""
    transformers = require_library()
    toy = {} if place.cuda else TOY_LLM
    return transformers.LlamaConfig(num_hidden_layers=layers, **toy)


def require_library():
    """transformers; raises LeftOut if it is not installed."""
    try:
        return require_transformers()
    except ValueError as e:
        raise LeftOut(str(e)) from None


def build(place: Place, c: Config, layers: int, device: str) -> tuple[MoVEKD, Teachers]:
    """A run's models with random weights on a device, the LLM with so many layers."""
    shape = llama_shape(place, layers)
    with torch.device(device):
        return random_models(c, PretrainedLLM(c.llm, shape))


def build_without_numbers(place: Place, c: Config, layers: int) -> tuple[MoVEKD, Teachers]:
    """The same on the meta device, for what tools.plan counts."""
    model, teachers = build(place, c, layers, "meta")
    return without_values(model), teachers


def random_pixels(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_batch(c: Config, model: MoVEKD, samples: int, tokens: int) -> dict:
    """A batch as data.collate makes it, (B, T): each sample an image, then an answer to the end.

    Padded on the right: sample i is i tokens shorter than the first.
    """
    n = model.vlm.student.num_tokens
    size = (samples, tokens)
    ids = torch.randint(1, 300, size)                                               # (B, T)
    ids[:, 1:1 + n] = MetaTokenizer.image
    labels = ids.masked_fill(ids == MetaTokenizer.image, IGNORE)                    # (B, T)
    mask = torch.ones(size, dtype=torch.long)                                       # (B, T)
    for i in range(1, samples):
        ids[i, -i:], labels[i, -i:], mask[i, -i:] = 0, IGNORE, 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask,
             "images": loader_images(c, samples, random_pixels)}
    batch = {name: to_device(value, c.device) for name, value in batch.items()}
    return {**batch, "image_names": [None] * samples, "skipped": [], "cut": 0}


# ------------------------------------------------------------------------------------------------
# Training steps


class Step:
    """A training step as train.py's loop makes it, without the log."""

    def __init__(self, c: Config, machine: Machine, model: MoVEKD, teachers: Teachers):
        self.c = c
        self.machine = machine
        self.model = model
        self.teachers = teachers

    def start_stage(self, stage: int) -> None:
        """What is trained, and an optimizer for it."""
        self.model.set_stage(stage)
        self.model.train()
        self.machine.begin_stage(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def backward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Forward and backward; returns the terms."""
        terms = self.model(batch, self.teachers)
        L_total = (terms["L_text"] + self.c.lambda_kd * terms["L_kd"]
                   + self.c.balance_weight * terms["L_balance"])                    # ()
        self.machine.backward(L_total)
        return terms

    def __call__(self, batch: dict) -> None:
        self.backward(batch)
        clip_gradients(self.trained, self.c.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, batch: dict) -> float:
        """Bytes at the worst moment of a step: weights, gradients, optimizer, activations."""
        self(batch)
        if self.c.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self(batch)
            return torch.cuda.max_memory_allocated()
        self.optimizer.state.clear()
        with PeakMemory() as measured:
            self(batch)
            self(batch)  # only the second has the optimizer's state from the start
        weights = count(self.model.parameters()) + count(self.teachers.parameters())
        return 4 * weights + measured.peak


@contextmanager
def training(place: Place, c: Config, layers: int, stage: int) -> Iterator[Step]:
    """A Step on random models, placed as train.py places them; parts from the group at the end."""
    model, teachers = build(place, c, layers, place.device)
    machine = Machine(c)
    try:
        machine.place(model, teachers)
        step = Step(c, machine, model, teachers)
        step.start_stage(stage)
        yield step
    finally:
        machine.disconnect()


def median_seconds(place: Place, form: Callable, repeats: int) -> float:
    """The median time of a form, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        form()
        if place.cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
