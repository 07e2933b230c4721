"""Checks of tools.gpu_check: how long the parts of a step take, and the step.

Letters: B samples, T tokens, n tokens and d width of the student, D width of the LLM, h its heads.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from data import Conversations, to_device
from model import Student
from mole import MoLE
from plumbing.sets import loader_options, make_loader
from plumbing.build import build_encoder
from plumbing.checks import check_shared_memory
from plumbing.config import FULL
from plumbing.sets import training_size
from real.image_files import DiskImages
from real.pretrained_llm import PretrainedLLM
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records
from tools.gpu_checks_common import (LLM_LAYERS, LeftOut, Place, Row, build_without_numbers, free,
                                     full_config, llama_shape, median_seconds, random_batch,
                                     random_pixels, require_library, training)
from tools.gpu_checks_memory import fitting
from tools.measuring import SHAPES, count_flops
from tools.meta import encoder_flops, forward_flops, loader_images, step_flops
from tools.plan import TEXT
from tools.vision import expert_options

# TFLOP/s of bf16 with fp32 sums, dense, by the makers' data sheets
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362,
         "RTX 4090": 165}


def share_of_peak(place: Place, flops: float, seconds: float) -> str:
    """TFLOP/s; on a GPU also their share of its data sheet's, or of a matrix product's."""
    reached = flops / seconds / 1e12
    text = f"{reached:.3g} TFLOP/s"
    if not place.cuda:
        return text
    name = torch.cuda.get_device_name()
    for card, peak in PEAKS.items():
        if all(word in name for word in card.split()):
            return f"{text}, {100 * reached / peak:.0f} % of {peak}"
    a = torch.randn(8192, 8192, device=place.device, dtype=torch.bfloat16)
    peak = 2 * 8192 ** 3 / median_seconds(place, lambda: a @ a, 5) / 1e12
    return f"{text}, {100 * reached / peak:.0f} % of a matrix product's {peak:.0f}"


def speed_row(place: Place, name: str, form: Callable, flops: float) -> Row:
    """Milliseconds and the share of the card's FLOP/s."""
    seconds = median_seconds(place, form, 5)
    return Row(name, "measured", f"{1e3 * seconds:.4g} ms, {share_of_peak(place, flops, seconds)}")


def both_forms(place: Place, name: str, module: nn.Module, run: Callable,
               flops: float) -> Iterator[Row]:
    """A module's speed eager, then compiled; run(module) is what is timed."""
    yield speed_row(place, f"{name}, eager", lambda: run(module), flops)
    title = f"{name}, compiled"
    try:
        place.require_gpu("torch.compile is meant for it")
        place.require_seconds(100)
    except LeftOut as e:
        yield Row(title, "measured", str(e), None)
        return
    module.compile()
    yield speed_row(place, title, lambda: run(module), flops)


@torch.no_grad()
def check_teachers_speed(place: Place) -> Iterator[Row]:
    """Each teacher's forward on a micro-batch."""
    c = full_config(place)
    samples = c.micro_batch if place.cuda else 2
    images = to_device(loader_images(c, samples, random_pixels), place.device)
    for name in c.teachers:
        with torch.device("meta"):
            flops = samples * encoder_flops(build_encoder(c, name, {}))
        with torch.device(place.device):
            encoder = build_encoder(c, name, {}).eval()
        if place.cuda:
            encoder.bfloat16()
        forms = {"": encoder}
        if hasattr(encoder.net, "stages"):  # convolutions, whose weights have two layouts
            layout = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
            forms[", channels_last"] = layout
        for form, module in forms.items():
            yield from both_forms(place, f"teacher {name} on {samples} images{form}", module,
                                  lambda module: module(images), flops)


def check_llama_layer_speed(place: Place) -> Iterator[Row]:
    """One layer of Vicuna-7B, forward and backward, nothing padded."""
    require_library()
    B, T = (4, 2048) if place.cuda else (1, 256)
    with torch.device(place.device):
        llm = PretrainedLLM("a random Llama", llama_shape(place, 1))
        x = torch.randn(B, T, llm.dim, requires_grad=True)                          # (B, T, D)
        positions = torch.arange(T)[None]                                           # (1, T)
    if place.cuda:
        llm.bfloat16()
        x = x.detach().bfloat16().requires_grad_()                                  # (B, T, D)
    rotary = llm.model.get_decoder().rotary_emb(x, positions)                  # 2 x (1, T, D/h)

    def run(layer: nn.Module) -> None:
        out = layer(x, attention_mask=None, position_ids=positions,
                    position_embeddings=rotary)                                     # (B, T, D)
        out.sum().backward()

    layer = llm.blocks[0]
    flops = count_flops(lambda: run(layer))
    yield from both_forms(place, f"one layer of the LLM, B = {B}, T = {T}", layer, run, flops)


def check_mole_speed(place: Place) -> Iterator[Row]:
    """MoLE beside the FFN it is put around, as in stage 1: the FFN is frozen."""
    c = full_config(place)
    s = SHAPES["ViT-L"]
    dtype = torch.bfloat16 if place.cuda else torch.float32
    with torch.device(place.device):
        student = Student(c.clip)
        ffn = student.net.blocks[0].mlp.requires_grad_(False)
        # a copy, for compiling the one must not compile the other
        mole = MoLE(copy.deepcopy(ffn), student.dim, **expert_options(s, s.dropout)).to(dtype)
        shape = (16 if place.cuda else 2, 1 + student.num_tokens, student.dim)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)                     # (B, 1 + n, d)

    def run(module: nn.Module) -> None:
        module(x).sum().backward()

    for name, module in (("plain FFN", ffn), ("MoLE FFN", mole)):
        flops = count_flops(lambda: run(module))
        yield from both_forms(place, f"{name} of the student, B = {len(x)}", module, run, flops)


def check_stage2_speed(place: Place) -> Iterator[Row]:
    """A step of stage 2 with 4 and with 8 layers of the LLM, extrapolated to all of them."""
    require_library()
    place.require_seconds(90)
    c = full_config(place)
    few, more, repeats = (4, 8, 5) if place.cuda else (1, 2, 3)
    model, teachers = build_without_numbers(place, c, LLM_LAYERS)
    tokens = model.vlm.student.num_tokens + TEXT[2]
    if not place.cuda:
        tokens = c.max_length
    layers, samples, _ = fitting(place, c, more, 2, tokens)
    if layers < more:
        raise LeftOut(f"has no room for {more} layers of the LLM")
    times = []
    for layers in (few, more):
        free(place)
        with training(place, c, layers, stage=2) as step:
            batch = random_batch(c, step.model, samples, tokens)
            times.append(median_seconds(place, lambda: step(batch), repeats))
    yield Row(f"a step of stage 2, {few} and {more} layers, micro-batch {samples}, T = {tokens}",
              "measured", f"{times[0]:.3g} s, {times[1]:.3g} s")
    what = f"a step of stage 2, extrapolated to {LLM_LAYERS} layers, without communication"
    if not place.cuda:
        yield Row(what, "", "wants a GPU: a toy's layer is too small to be timed", None)
        return
    whole = times[1] + (LLM_LAYERS - more) * (times[1] - times[0]) / (more - few)
    flops = samples * sum(step_flops(c, 2, forward_flops(c, model, teachers, tokens)).values())
    yield Row(what, "2.35 s on an H100, 36 % (an estimate)",
              f"{whole:.3g} s, {share_of_peak(place, flops, whole)}, recomputing counted")


def check_loader(place: Place) -> Iterator[Row]:
    """Photographs of 640 x 480 from files, through the loader and its workers."""
    workers = min(FULL.workers, os.cpu_count() or 1)
    c = full_config(place, workers=workers)
    check_shared_memory(c)
    number, batch_size = (512, 16) if place.cuda else (16, 4)
    folder = place.folder / "pictures"
    folder.mkdir()
    drawn = WorldImages("train", 16)
    records = world_records("train", "chat", 16)
    for i, record in enumerate(records):
        picture = to_pil_image(drawn(record["image"])).resize((640, 480))
        record["image"] = f"{i}.jpg"
        picture.save(folder / record["image"])
    records = records * (number // 16)
    dataset = Conversations(records, DiskImages(folder, training_size(c)),
                            WordTokenizer.from_records(records), "v1", 36, c.max_length)
    batches = iter(make_loader(dataset, batch_size, 1, 0, 0, **loader_options(c)))
    next(batches)  # the workers have started
    start = time.perf_counter()
    seen = sum(len(batch["image_names"]) for batch in batches)
    rate = seen / (time.perf_counter() - start)
    expected = "> 7, what a GPU eats (an estimate)" if place.cuda else "measured"
    yield Row(f"the loader's images a second, {workers} workers, {training_size(c)} px", expected,
              f"{rate:.3g}", rate > 7 or not place.cuda)
