"""Checks of tools.gpu_check: the memory of steps and of checkpoints against tools.plan."""

import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from plumbing.checkpoints import Checkpoints
from plumbing.config import Config
from tools.gpu_checks_common import (LLM_LAYERS, LeftOut, Place, Row, build_without_numbers, free,
                                     full_config, random_batch, require_library, training)
from tools.measuring import count
from tools.meta import activations
from tools.plan_memory import CONTEXT, FRAGMENTS, memory


def fitting(place: Place, c: Config, layers: int, stage: int,
            tokens: int) -> tuple[int, int, float]:
    """(layers of the LLM, samples, bytes by tools.plan) of a step that this GPU has room for.

    As asked for if that fits; else fewer layers, then fewer samples.
    """
    room = 1e18
    if place.cuda:
        room = torch.cuda.get_device_properties(0).total_memory / 1e9
    while True:
        model, teachers = build_without_numbers(place, c, layers)
        model.set_stage(stage)
        m = memory(c, model, teachers, 1, False, activations(c, model, teachers, tokens))
        samples = min(c.micro_batch, m.fits(room))
        if samples == c.micro_batch or layers == 1:
            break
        layers //= 2
    if samples < 1:
        raise LeftOut(f"wants more memory: {m.fixed / 1e9:.0f} GB before the first sample")
    return layers, samples, m.fixed + samples * m.per_sample


def check_memory(place: Place) -> Iterator[Row]:
    """A step of stage 1 at micro-batch 16 and T = 2048 against tools.plan."""
    require_library()
    place.require_seconds(60)
    changes = {} if place.cuda else {"precision": "fp32", "recompute": False}
    c = full_config(place, **changes)  # on a CPU what FSDP allocates is not seen
    layers, samples, planned = fitting(place, c, LLM_LAYERS if place.cuda else 2, 1, c.max_length)
    free(place)
    with training(place, c, layers, stage=1) as step:
        got = step.peak(random_batch(c, step.model, samples, c.max_length))
    what = f"micro-batch {samples}, T = {c.max_length}, {layers} layers of the LLM"
    yield Row(f"memory of a step of stage 1, {what}",
              f"{planned / 1e9:.3g} GB +- 15 % (tools.plan)", f"{got / 1e9:.3g} GB",
              abs(got / planned - 1) <= 0.15)
    if place.cuda:
        available, total = torch.cuda.mem_get_info()
        context = total - available - torch.cuda.memory_reserved()
        yield Row("CUDA's context and workspaces",
                  f"<= {1.5 * CONTEXT / 1e9:.2g} GB (tools.plan assumes {CONTEXT / 1e9:g})",
                  f"{context / 1e9:.2f} GB", context <= 1.5 * CONTEXT)


def check_fragments(place: Place) -> Iterator[Row]:
    """Ten steps whose T varies: what the allocator holds beside what tensors take."""
    place.require_gpu("a CPU has no caching allocator")
    place.require_seconds(60)
    c = full_config(place)
    layers, samples, _ = fitting(place, c, 4, 2, 1600)
    free(place)
    with training(place, c, layers, stage=2) as step:
        torch.cuda.reset_peak_memory_stats()
        for i in range(10):
            step(random_batch(c, step.model, samples, 640 + (i * 7 % 10) * 100))
        allocated = torch.cuda.max_memory_allocated()
        ratio = torch.cuda.max_memory_reserved() / allocated
    yield Row("reserved / allocated, ten steps with T = 640 to 1540", f"< {1 + FRAGMENTS:g}",
              f"{ratio:.3f} of {allocated / 1e9:.1f} GB", ratio < 1 + FRAGMENTS)


def check_checkpoint(place: Place) -> Iterator[Row]:
    """A checkpoint of stage 2: how long training waits, and what it takes on the host."""
    c = full_config(place, teachers=("clip",), lambda_kd=0.0, micro_batch=2)
    with training(place, c, 1, stage=2) as step:
        step(random_batch(c, step.model, 2, step.model.vlm.student.num_tokens + 40))
        size = 12 * count(step.model.parameters())
        if shutil.disk_usage(place.folder).free < 2 * size:
            raise LeftOut(f"wants {2 * size / 1e9:.0f} GB in {place.folder.parent}")
        saved = Checkpoints(place.folder / "checkpoint", 1, rank=0, world=1)
        before = reset_host_peak()
        start = time.perf_counter()
        saved.save("stage2-00000001", step.model, step.optimizer, {})
        waited = time.perf_counter() - start
        saved.finish()
        seconds = time.perf_counter() - start
        grown = host_peak() - before
    written = sum(path.stat().st_size for path in place.folder.glob("checkpoint/*/*"))
    shutil.rmtree(place.folder / "checkpoint")
    yield Row("a checkpoint on disk", f"{size / 1e9:.3g} GB, 12 bytes a parameter",
              f"{written / 1e9:.3g} GB", abs(written / size - 1) < 0.1)
    yield Row("seconds that training waits for it; until it is complete", "measured",
              f"{waited:.2f} s; {seconds:.2f} s, {written / 1e9 / seconds:.2g} GB/s")
    expected = f"the state once: {size / 1e9:.3g} GB"
    if place.cuda:
        yield Row("host memory of a checkpoint", expected, f"{grown / 1e9:.3g} GB",
                  grown <= 1.5 * size)
    else:
        yield Row("host memory of a checkpoint", expected, "too small to be seen here", None)


def reset_host_peak() -> float:
    """Bytes of host memory that this process holds; host_peak counts from here on.

    As Linux counts it; elsewhere nan.
    """
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return host_peak()


def host_peak() -> float:
    """The most bytes of host memory that this process has held since reset_host_peak."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * float(line.split()[1])
    return math.nan
