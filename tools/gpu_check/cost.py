"""Checks of tools.gpu_check: memory and time against what tools.plan says.

Letters: T tokens of the LLM's sequence, n tokens of the student.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from data import Conversations
from plumbing.batches import loader_options, make_loader
from plumbing.checkpoints import Checkpoints
from plumbing.checks import check_shared_memory
from plumbing.config import FULL, Config
from plumbing.sets import training_size
from real.image_files import DiskImages
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records
from tools.gpu_check.common import Row, Setup, full_config, llama_shape, training, training_batch
from tools.plan.memory import CONTEXT, FRAGMENTS, activations, memory, samples_that_fit
from tools.plan.models import TEXT, count, forward_flops, meta_models, step_flops

LLM_LAYERS = 32     # of Vicuna-7B
SLOWEST = 0.2   # of a matrix product's FLOP/s; tools.plan assumes 0.4 of the data sheet's

# ------------------------------------------------------------------------------------------------
# Memory


def fitting(setup: Setup, c: Config, layers: int, stage: int,
            tokens: int) -> tuple[int, int, float]:
    """Return (layers of the LLM, samples, bytes by tools.plan) of a step that this GPU can hold.

    As asked for if that fits; else fewer layers, then fewer samples.
    """
    room = 1e9
    if setup.cuda:
        room = torch.cuda.get_device_properties(0).total_memory / 1e9
    while True:
        model, teachers = meta_models(c, llama_shape(setup, layers))
        model.set_stage(stage)
        per_sample = activations(c, model, teachers, tokens)
        fixed = memory(c, model, teachers, gpus=1, accumulate=False)
        samples = min(c.micro_batch, samples_that_fit(fixed, per_sample, room))
        if samples == c.micro_batch or layers == 1:
            break
        layers //= 2
    tensors = sum(fixed.values()) - fixed["CUDA's context"]
    setup.require(samples > 0,
                  f"wants more memory: {tensors / 1e9:.0f} GB before the first sample")
    return layers, samples, tensors + samples * per_sample


def check_memory(setup: Setup) -> Iterator[Row]:
    """A step of stage 1 at micro-batch 16 and T = 2048 against tools.plan."""
    setup.require_seconds(60)
    # on a CPU what FSDP allocates is not seen
    changes = {} if setup.cuda else {"precision": "fp32", "recompute": False}
    c = full_config(setup, **changes)
    layers, samples, planned = fitting(setup, c, LLM_LAYERS if setup.cuda else 2, 1, c.max_length)
    with training(setup, c, layers, stage=1) as trainer:
        got = trainer.peak(training_batch(c, trainer.model, samples, c.max_length))
    sizes = f"micro-batch {samples}, T = {c.max_length}, {layers} layers of the LLM"
    yield Row(f"memory of a step of stage 1, {sizes}",
              f"{planned / 1e9:.3g} GB +- 15 % (tools.plan)", f"{got / 1e9:.3g} GB",
              abs(got / planned - 1) <= 0.15)
    if setup.cuda:
        available, total = torch.cuda.mem_get_info()
        context = total - available - torch.cuda.memory_reserved()
        yield Row("CUDA's context and workspaces",
                  f"<= {1.5 * CONTEXT / 1e9:.2g} GB (tools.plan assumes {CONTEXT / 1e9:g})",
                  f"{context / 1e9:.2f} GB", context <= 1.5 * CONTEXT)


def check_fragments(setup: Setup) -> Iterator[Row]:
    """Ten steps whose T varies: what the allocator holds beside what tensors take."""
    setup.require_gpu("a CPU has no caching allocator")
    setup.require_seconds(60)
    c = full_config(setup)
    layers, samples, _ = fitting(setup, c, 4, 2, 1600)
    with training(setup, c, layers, stage=2) as trainer:
        torch.cuda.reset_peak_memory_stats()
        for i in range(10):
            trainer.step(training_batch(c, trainer.model, samples, 640 + (i * 7 % 10) * 100))
        allocated = torch.cuda.max_memory_allocated()
        ratio = torch.cuda.max_memory_reserved() / allocated
    yield Row("reserved / allocated, ten steps with T = 640 to 1540", f"< {1 + FRAGMENTS:g}",
              f"{ratio:.3f} of {allocated / 1e9:.1f} GB", ratio < 1 + FRAGMENTS)


def check_checkpoint(setup: Setup) -> Iterator[Row]:
    """A checkpoint of stage 2: its size on disk and on the host."""
    c = full_config(setup, teachers=("clip",), lambda_kd=0.0, micro_batch=2)
    folder = setup.folder / "checkpoint"
    with training(setup, c, 1, stage=2) as trainer:
        n = trainer.model.vlm.student.num_tokens
        trainer.step(training_batch(c, trainer.model, 2, n + 40))
        size = 12 * count(trainer.model.parameters())
        setup.require(shutil.disk_usage(setup.folder).free > 2 * size,
                      f"wants {2 * size / 1e9:.0f} GB in {setup.folder.parent}")
        checkpoints = Checkpoints(folder, 1, rank=0, world=1)
        before = reset_host_peak()
        checkpoints.save("stage2-00000001", trainer.model, trainer.optimizer, {})
        checkpoints.finish()
        grown = host_peak() - before
    written = sum(path.stat().st_size for path in folder.glob("*/*"))
    shutil.rmtree(folder)
    yield Row("a checkpoint on disk", f"{size / 1e9:.3g} GB, 12 bytes per parameter",
              f"{written / 1e9:.3g} GB", abs(written / size - 1) < 0.1)
    setup.require_gpu("its memory on the host is too small to be seen here")
    yield Row("host memory of a checkpoint", f"<= twice the state: {2 * size / 1e9:.3g} GB",
              f"{grown / 1e9:.3g} GB", grown <= 2.2 * size)


def reset_host_peak() -> float:
    """Return the bytes of host memory that this process holds; host_peak counts from here on.

    As Linux counts it; elsewhere NaN.
    """
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return host_peak()


def host_peak() -> float:
    """Return the most bytes of host memory that this process has held since reset_host_peak."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * float(line.split()[1])
    return math.nan


# ------------------------------------------------------------------------------------------------
# Time


def median_seconds(setup: Setup, repeats: int, function: Callable, *args) -> float:
    """Return the median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function(*args)
        if setup.cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def check_stage2_speed(setup: Setup) -> Iterator[Row]:
    """A step of stage 2 with 4 and with 8 layers of the LLM, extrapolated to all of them."""
    setup.require_seconds(90)
    c = full_config(setup)
    few, more, repeats = (4, 8, 5) if setup.cuda else (1, 2, 3)
    model, teachers = meta_models(c, llama_shape(setup, LLM_LAYERS))
    tokens = model.vlm.student.num_tokens + TEXT[2] if setup.cuda else c.max_length
    layers, samples, _ = fitting(setup, c, more, 2, tokens)
    setup.require(layers == more, f"has no room for {more} layers of the LLM")
    times = {}
    for layers in (few, more):
        with training(setup, c, layers, stage=2) as trainer:
            batch = training_batch(c, trainer.model, samples, tokens)
            times[layers] = median_seconds(setup, repeats, trainer.step, batch)
    setup.require_gpu("a layer of small sizes is too quick to be timed")
    seconds = times[more] + (LLM_LAYERS - more) * (times[more] - times[few]) / (more - few)
    flops = samples * sum(step_flops(c, 2, forward_flops(c, model, teachers, tokens)).values())
    a = torch.randn(8192, 8192, device=setup.device, dtype=torch.bfloat16)
    peak = 2 * 8192 ** 3 / median_seconds(setup, 5, torch.mm, a, a)                 # FLOP/s
    reached = flops / seconds / peak
    yield Row(f"a step of stage 2, micro-batch {samples}, T = {tokens}, extrapolated to "
              f"{LLM_LAYERS} layers, without communication",
              f">= {100 * SLOWEST:g} % of a matrix product's {peak / 1e12:.0f} TFLOP/s",
              f"{100 * reached:.0f} %: {seconds:.3g} s", reached >= SLOWEST)


def check_loader(setup: Setup) -> Iterator[Row]:
    """Photographs of 640 x 480 from files, through the loader and its workers."""
    c = full_config(setup, workers=min(FULL.workers, os.cpu_count() or 1))
    check_shared_memory(c)
    number, batch_size = (512, 16) if setup.cuda else (16, 4)
    folder = setup.folder / "pictures"
    folder.mkdir()
    draw = WorldImages("train", 16)
    records = world_records("train", "chat", 16)
    for i, record in enumerate(records):
        picture = to_pil_image(draw(record["image"])).resize((640, 480))
        record["image"] = f"{i}.jpg"
        picture.save(folder / record["image"])
    records = records * (number // 16)
    dataset = Conversations(records, DiskImages(folder, training_size(c)),
                            WordTokenizer.from_records(records), "v1", 36, c.max_length)
    batches = iter(make_loader(dataset, batch_size, 1, 0, 0, **loader_options(c)))
    next(batches)  # the workers have started
    start = time.perf_counter()
    images = sum(len(batch["image_names"]) for batch in batches)
    rate = images / (time.perf_counter() - start)
    yield Row(f"the loader's images per second, {c.workers} workers, {training_size(c)} px",
              "> 7, what a GPU trains on (an estimate)", f"{rate:.3g}", rate > 7)
