"""Measuring what a form costs: time, memory, FLOPs; and the shapes that it is measured at."""

import dataclasses
import gc
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plumbing.config import TINY
from plumbing.files import flop_counter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ------------------------------------------------------------------------------------------------
# Time, memory, FLOPs


def seconds(forms: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The median time of each form, over interleaved repeats.

    Interleaved, so that a slow moment of the machine meets all forms. Each round has another order,
    because a form that always ran behind the same large one would always find cold caches.
    """
    times = {name: [] for name in forms}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    for i in range(repeats + 1):
        for name in order.sample(list(forms), len(forms)):
            start = time.perf_counter()
            forms[name]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: statistics.median(t) for name, t in times.items()}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and still alive; `peak` is their largest sum.

    It is for the CPU and the meta device; CUDA has its own counter.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor):
                # made before, or behind our back: a view of it is not new
                self.note(tensor.untyped_storage(), size=0)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def note(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage once, until it is freed."""
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += size
            weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, key: int, size: int) -> None:
        """A storage is freed."""
        self.now -= size
        self.known.discard(key)


def peak_bytes(form: Callable) -> float:
    """The peak of what a form itself allocates; weights and inputs are not counted."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        form()
    return memory.peak


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward.

    Each storage counts once, parameters and their views do not.
    """
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(sizes.values())


def count_flops(form: Callable) -> int:
    """The FLOPs of a form."""
    with flop_counter() as counter:
        form()
    return counter.get_total_flops()


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers parameters hold."""
    return sum(p.numel() for p in parameters)


def backward(out: torch.Tensor) -> None:
    """Backward from the sum of any output."""
    out.sum().backward()


# ------------------------------------------------------------------------------------------------
# Shapes


@dataclasses.dataclass
class Shape:
    """The sizes at which the forms are measured."""

    name: str
    clip: str                   # spec of a ViT
    rank: int
    dropout: float              # of the LoRA
    batch: int
    pixels: int                 # of the loader's image
    views: tuple[int, ...]      # px of each encoder's view
    repeats: int


SHAPES = {
    "tiny": Shape("tiny", TINY.clip, rank=8, dropout=0.0, batch=16, pixels=128,
                  views=(48, 64, 128), repeats=50),
    "ViT-L": Shape("ViT-L/14-336", "vit_large_patch14_clip_quickgelu_336 img_size=336", rank=32,
                   dropout=0.05, batch=1, pixels=1024, views=(336, 1024, 1024), repeats=3),
}


def uint8_images(batch: int, pixels: int) -> torch.Tensor:
    """Random pictures, uint8 (B, 3, R, R)."""
    return torch.randint(0, 256, (batch, 3, pixels, pixels), dtype=torch.uint8, device=DEVICE)


def kd_tensors(batch: int, n: int, d: int) -> tuple:
    """Random V^s (B, n, d), V^t of three teachers, W^tok (B, n), equal W^tea (B, m)."""
    V_s = torch.randn(batch, n, d, device=DEVICE, requires_grad=True)           # (B, n, d)
    V_t = {}
    for name in TINY.teachers:
        V_t[name] = torch.randn(batch, n, d, device=DEVICE, requires_grad=True)     # (B, n, d)
    w_tok = torch.rand(batch, n, device=DEVICE).softmax(dim=1)                  # (B, n)
    w_tea = torch.full((batch, 3), 1 / 3, device=DEVICE)                        # (B, m)
    return V_s, V_t, w_tok, w_tea


# ------------------------------------------------------------------------------------------------
# A line of the table


@dataclasses.dataclass
class Row:
    """One comparison: what ours costs and what the other costs."""

    what: str
    measure: str            # "time", "FLOPs" or what kind of memory
    ratio_to: str
    ours: float
    other: float
    reach: float | None     # the ratio that was aimed at

    def line(self) -> str:
        """The row in Markdown."""
        factor, unit = {"time": (1e3, "ms"), "FLOPs": (1e-12, "T")}.get(self.measure, (1e-6, "MB"))
        ratio = self.ours / self.other
        cells = [self.what, self.measure, self.ratio_to,
                 f"{short(self.ours * factor)} {unit}", f"{short(self.other * factor)} {unit}",
                 f"{ratio:.2f}"]
        if self.reach is None:
            cells += ["", ""]
        else:
            cells += [f"<= {self.reach:.2f}", "yes" if ratio <= self.reach else "no"]
        return table_line(*cells)


def table_line(*cells) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def short(x: float) -> str:
    """Three digits, or all of a large number's."""
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"
