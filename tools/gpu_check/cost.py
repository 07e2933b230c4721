"""Checks of tools.gpu_check: memory and time of a step against tools.plan's prediction.

Letters: T tokens of the LLM's sequence.
"""

import time
from collections.abc import Callable, Iterator

import torch

from plumbing.config import Config
from plumbing.files import flop_counter
from tools.gpu_check.common import Row, Setup, full_config, llama_shape, training, training_batch
from tools.plan.memory import CONTEXT, FRAGMENTS, activations, memory, samples_that_fit
from tools.plan.models import meta_models

LLM_LAYERS = 32     # of Vicuna-7B
SLOWEST = 0.2       # of a matrix product's speed; tools.plan assumes 0.4 of the data sheet's


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
    setup.require(samples > 0, f"wants more memory: {tensors / 1e9:.0f} GB before the first sample")
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
    """Ten steps whose T varies: memory that the allocator holds beside that of tensors."""
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


def check_time(setup: Setup) -> Iterator[Row]:
    """A step of stage 2 with 8 layers of the LLM: its fraction of the GPU's peak speed."""
    setup.require_gpu("small sizes tell nothing about its speed")
    setup.require_seconds(60)
    c = full_config(setup)
    layers, samples, _ = fitting(setup, c, 8, 2, c.max_length)
    with training(setup, c, layers, stage=2) as trainer:
        batch = training_batch(c, trainer.model, samples, c.max_length)
        with flop_counter() as counter:
            trainer.step(batch)
        seconds = median_seconds(trainer.step, batch)
    a = torch.randn(8192, 8192, device=setup.device, dtype=torch.bfloat16)
    peak = 2 * 8192 ** 3 / median_seconds(torch.mm, a, a)                           # FLOP/s
    reached = counter.get_total_flops() / seconds / peak
    yield Row(f"a step of stage 2, {layers} layers, micro-batch {samples}, T = {c.max_length}",
              f">= {100 * SLOWEST:g} % of a matrix product's {peak / 1e12:.0f} TFLOP/s",
              f"{100 * reached:.0f} %, {1e3 * seconds:.0f} ms", reached >= SLOWEST)


def median_seconds(function: Callable, *args) -> float:
    """Return the median time of five calls on the GPU, after one that warms up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        function(*args)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]
