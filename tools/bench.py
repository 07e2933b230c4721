"""Speed and memory of each fast form beside its plain form and its floor, in one run; and the numbers behind the README's tables.

    python -m tools.bench                   # fast forms, at tiny and at ViT-L/14-336 shapes; cost against size
    python -m tools.bench --shapes tiny     # without the large ones
    python -m tools.bench --differences     # what follows where paper and released code differ
    python -m tools.bench --direction       # why the direction of the adapters matters, in the smallest case
    python -m tools.bench --profile         # where a step of train.py --tiny spends its time

Times are medians of interleaved repeats, forward and backward where something is trained; compare ratios, not milliseconds. Memory is the peak
of what the code itself allocates, weights and inputs not counted. The plain forms are written here, as one would write them first.
"""

import argparse
import dataclasses
import gc
import math
import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
import train
from kd_loss import kd_loss, teacher_weights, token_weights
from model import Student, flop_counter, text_loss
from mole import MoLE, balance_loss, mole_layers
from teachers import ClipEncoder, EncoderAdapter, Teachers, VisionEncoder, adapt, build_adapters
from tools import scale
from tools.pretrain_tiny import stage0

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(forms: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median time of each form. Interleaved, so that a slow moment of the machine meets all of them, and in another order each round, for what
    always ran behind the same large form would always find cold caches."""
    times, order = {name: [] for name in forms}, random.Random(0)
    gc.collect()
    gc.disable()
    for i in range(repeats + 1):  # the first round warms up
        for name in order.sample(list(forms), len(forms)):
            start = time.perf_counter()
            forms[name]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] if i else []
    gc.enable()
    return {name: statistics.median(t) for name, t in times.items()}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and still alive; `peak` is their largest sum. For the CPU; CUDA has its own counter."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor):
                self.note(tensor.untyped_storage(), size=0)  # made before or behind our back: a view of it is not new
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def note(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += size
            weakref.finalize(storage, self.freed, storage._cdata, size)

    def freed(self, key: int, size: int) -> None:
        self.now -= size
        self.known.discard(key)


def peak_bytes(form: Callable) -> float:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        form()
    return memory.peak


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, each storage once, parameters not counted."""
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and not (tensor._base is not None and isinstance(tensor._base, nn.Parameter)):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(sizes.values())


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@dataclasses.dataclass
class Shape:
    name: str
    clip: str            # spec of a ViT
    rank: int
    dropout: float       # of the LoRA
    batch: int
    pixels: int          # of the loader's image
    views: tuple[int, ...]   # px of each encoder's view
    repeats: int


SHAPES = {
    "tiny": Shape("tiny", train.TINY.clip, 8, 0.0, 16, 96, (48, 64, 96), 50),
    "ViT-L": Shape("ViT-L/14-336", "vit_large_patch14_clip_quickgelu_336 img_size=336", 32, 0.05, 1, 1024, (336, 1024, 1024), 3),
}


def uint8_images(batch: int, pixels: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, pixels, pixels), dtype=torch.uint8, device=DEVICE)


# ---------------------------------------------------------------------------------------------------------------------
# The plain forms


class LoopMoLE(nn.Module):
    """MoLE as one writes it first: a LoRA an expert, its tokens gathered and its results scattered back."""

    def __init__(self, ffn: nn.Module, dim: int, num_experts: int, rank: int, dropout: float, form: str = "ffn"):
        super().__init__()
        self.ffn, self.router, self.dropout, self.form = ffn, nn.Linear(dim, num_experts), nn.Dropout(dropout), form
        hidden = ffn.fc1.out_features

        def loras(d_in, d_out, bias):
            return nn.ModuleList(nn.Sequential(nn.Linear(d_in, rank, bias), nn.Linear(rank, d_out, bias)) for _ in range(num_experts))

        self.loras = [loras(dim, dim, False)] if form == "ffn" else [loras(dim, hidden, True), loras(hidden, dim, True)]
        self.loras = nn.ModuleList(self.loras)

    def add(self, y, x, loras, choice):
        for e, lora in enumerate(loras):
            rows = (choice == e).nonzero()[:, 0]                                        # (N_e,)
            y = y.index_add(0, rows, lora(self.dropout(x[rows])))                       # (B*N, .)
        return y

    def forward(self, x):
        flat = x.flatten(0, 1)                                                          # (B*N, D)
        choice = self.router(flat).softmax(dim=-1).argmax(dim=-1)                       # (B*N,)
        if self.form == "ffn":
            return self.add(self.ffn(flat), flat, self.loras[0], choice).view_as(x)     # (B, N, D)
        h = self.ffn.act(self.add(self.ffn.fc1(flat), flat, self.loras[0], choice))     # (B*N, H)
        return self.add(self.ffn.fc2(h), h, self.loras[1], choice).view_as(x)           # (B, N, D)


def eager_blocks(encoder: ClipEncoder, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """CLIP with every attention map of every block kept, for one row of one of them."""
    net, maps = encoder.net, []
    x = net.norm_pre(net._pos_embed(net.patch_embed(encoder.view(images))))             # (B, 1 + n, D)
    for block in net.blocks:
        a = block.attn
        q, k, v = a.qkv(block.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)      # (B, h, 1 + n, D/h) each
        maps.append((q @ k.transpose(-2, -1) * a.scale).softmax(dim=-1))                # (B, h, 1 + n, 1 + n)
        x = x + a.proj((maps[-1] @ v).transpose(1, 2).flatten(2))                       # (B, 1 + n, D)
        x = x + block.mlp(block.norm2(x))                                               # (B, 1 + n, D)
    return x, maps


def stacked_kd_loss(student, teachers, w_tok, w_tea):
    """L_kd from a (B, n, d, m) stack of squared errors."""
    error = (torch.stack(list(teachers.values()), dim=-1) - student[..., None]).square()    # (B, n, d, m)
    weight = (w_tok + 1 / student.shape[1])[:, :, None, None]                           # (B, n, 1, 1)
    return (weight * error * w_tea[:, None, None, :]).mean(dim=2).sum(dim=(1, 2)).mean()    # ()


def pil_views(images: torch.Tensor, sizes: tuple[int, ...], mean, std) -> list[torch.Tensor]:
    """Each encoder's view through PIL, image by image, as an image processor makes it inside forward."""
    views = []
    for size in sizes:
        pictures = [TF.to_pil_image(image).resize((size, size), Image.Resampling.BICUBIC) for image in images.cpu()]
        views.append(torch.stack([TF.normalize(TF.to_dtype(TF.pil_to_tensor(p), torch.float32, scale=True), mean, std) for p in pictures]).to(images.device))
    return views


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclasses.dataclass
class Row:
    what: str
    measure: str        # "time" or what kind of memory
    ratio_to: str
    ours: float
    other: float
    reach: float | None

    def line(self) -> str:
        factor, unit = {"time": (1e3, "ms"), "FLOPs": (1e-12, "T")}.get(self.measure, (1e-6, "MB"))
        ours, other = (f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in (self.ours * factor, self.other * factor))
        ratio = self.ours / self.other
        verdict = "" if self.reach is None else f"<= {self.reach:.2f} | " + ("yes" if ratio <= self.reach else "no")
        return (f"| {self.what} | {self.measure} | {self.ratio_to} | {ours} {unit} | {other} {unit} | "
                f"{ratio:.2f} | {verdict or ' | '} |")


def backward(out: torch.Tensor) -> None:
    out.sum().backward()


def count_flops(form: Callable) -> int:
    with (counter := flop_counter()):
        form()
    return counter.get_total_flops()


def bench_mole(s: Shape) -> list[Row]:
    """One MoLE layer, forward + backward, the FFN frozen as in stage 1."""
    student = Student(s.clip)
    ffn, D = student.net.blocks[0].mlp.requires_grad_(False), student.dim
    x = torch.randn(s.batch, student.num_tokens + 1, D, device=DEVICE, requires_grad=True)
    layers = {"ours": MoLE(ffn, D, 3, s.rank, 1.0, s.dropout), "loop": LoopMoLE(ffn, D, 3, s.rank, s.dropout),
              "fc1_fc2": LoopMoLE(ffn, D, 3, s.rank, s.dropout, "fc1_fc2"), "ffn": ffn}
    if s.dropout:
        layers["no dropout"] = MoLE(ffn, D, 3, s.rank, 1.0, 0.0)
    layers = {name: layer.to(DEVICE).train() for name, layer in layers.items()}
    t = seconds({name: lambda layer=layer: backward(layer(x)) for name, layer in layers.items()}, 10 * s.repeats)
    m = {name: saved_bytes(lambda layer=layer: layer(x)) for name, layer in layers.items()}
    flops = {name: count_flops(lambda layer=layer: backward(layer(x))) for name, layer in layers.items()}
    rows = []
    for name, what in (("ours", f"MoLE FFN{f' with LoRA dropout {s.dropout}' * bool(s.dropout)}, {s.name}"), ("no dropout", f"MoLE FFN, {s.name}")):
        if name in layers:
            rows += [Row(what, measure, "floor: frozen FFN", cost[name], cost["ffn"], reach)
                     for measure, cost, reach in (("time", t, 1.05), ("saved activations", m, 1.15))]
    return rows + [Row(rows[0].what, "FLOPs", "floor: frozen FFN", flops["ours"], flops["ffn"], None),
                   Row(rows[0].what, "time", "plain: loop over experts", t["ours"], t["loop"], None),
                   Row(rows[0].what, "time", "fc1 + fc2 with gather", t["ours"], t["fc1_fc2"], 0.85)]


@torch.no_grad()
def bench_clip(s: Shape) -> list[Row]:
    """The CLIP teacher's forward with its [CLS] row."""
    encoder, images = ClipEncoder(s.clip).to(DEVICE).eval(), uint8_images(s.batch, s.pixels)
    forms = {"ours": lambda: encoder(images), "plain": lambda: eager_blocks(encoder, images),
             "floor": lambda: encoder.net.forward_features(encoder.view(images))}
    t, m = seconds(forms, s.repeats), {name: peak_bytes(form) for name, form in forms.items()}
    what = f"CLIP teacher + [CLS] row, {s.name}"
    return [Row(what, "time", "floor: SDPA to that block", t["ours"], t["floor"], 1.03), Row(what, "time", "plain: all maps", t["ours"], t["plain"], None),
            Row(what, "peak memory", "floor: SDPA to that block", m["ours"], m["floor"], None),
            Row(what, "peak memory", "plain: all maps", m["ours"], m["plain"], 0.10)]


def kd_tensors(batch: int, n: int, d: int) -> tuple:
    student, *teachers = (torch.randn(batch, n, d, device=DEVICE, requires_grad=True) for _ in range(4))
    w = torch.rand(batch, n, device=DEVICE).softmax(dim=1), torch.full((batch, 3), 1 / 3, device=DEVICE)
    return student, dict(zip(("clip", "eva", "convnext"), teachers)), *w


def bench_kd(s: Shape) -> list[Row]:
    """L_kd of three teachers, forward + backward to the student and to the adapted tokens."""
    encoder = ClipEncoder(s.clip)
    student, teachers, w_tok, w_tea = kd_tensors(4 * s.batch, encoder.num_tokens, encoder.dim)
    forms = {"ours": lambda: kd_loss(dict.fromkeys(teachers, student), teachers, w_tok, w_tea)[0].backward(),
             "plain": lambda: stacked_kd_loss(student, teachers, w_tok, w_tea).backward(),
             "floor": lambda: [t.detach().sum() for t in (student, *teachers.values())]}
    t, m = seconds(forms, 5 * s.repeats), {name: peak_bytes(form) for name, form in forms.items()}
    what = f"KD loss, {s.name}"
    return [Row(what, "time", "plain: (B, n, d, m) stack", t["ours"], t["plain"], 0.35), Row(what, "peak memory", "plain: (B, n, d, m) stack", m["ours"], m["plain"], 0.60),
            Row(what, "time", "floor: one read", t["ours"], t["floor"], None)]


def our_views(images: torch.Tensor, sizes: tuple[int, ...], mean, std) -> list[torch.Tensor]:
    return [TF.normalize(TF.to_dtype(TF.resize(images, [size, size], TF.InterpolationMode.BICUBIC, antialias=True), torch.float32, scale=True), mean, std)
            for size in sizes]


def bench_views(s: Shape) -> list[Row]:
    """The loader's uint8 batch to every encoder's normalised input, as VisionEncoder.view does it."""
    images, encoder = uint8_images(4 * s.batch, s.pixels), ClipEncoder(train.TINY.clip)
    t = seconds({"ours": lambda: our_views(images, s.views, encoder.mean, encoder.std),
                 "plain": lambda: pil_views(images, s.views, encoder.mean, encoder.std)}, s.repeats)
    return [Row(f"teacher views, {s.name}", "time", "plain: PIL, image by image", t["ours"], t["plain"], 0.50)]


def bench_vision_step(s: Shape) -> list[Row]:
    """Views, student forward + backward, CLIP teacher, token weights, loss: all fast forms together against all plain ones. The floor is the two networks
    alone, without experts, [CLS] row, weights and L_kd. At ViT-L also with each block recomputed, as FULL runs."""
    images = uint8_images(s.batch, s.pixels)
    (ours, plain, floor, recomputed), clip = (Student(s.clip) for _ in range(4)), ClipEncoder(s.clip).to(DEVICE).eval()
    for student in (ours, plain, floor, recomputed):
        student.requires_grad_(False)
    for student in (ours, recomputed):
        student.add_experts(3, s.rank, 1.0, s.dropout)
    scale.recompute(recomputed.net.blocks)
    for block in plain.net.blocks:
        block.mlp = LoopMoLE(block.mlp, plain.dim, 3, s.rank, s.dropout)
    floor.net.blocks[0].mlp.fc2.bias.requires_grad_()  # so that backward goes as far as to the first block's LoRA
    for student in (ours, plain, floor, recomputed):
        student.to(DEVICE).train()
    _, others, _, w_tea = kd_tensors(s.batch, clip.num_tokens, clip.dim)

    def fast(student):
        with torch.no_grad():
            out = clip(images)
        visual, teachers = student(images), {**others, "clip": out.tokens}
        kd_loss(dict.fromkeys(teachers, visual), teachers, token_weights(out.cls_scores), w_tea)[0].backward()

    def slow():
        view = pil_views(images, s.views[:1], clip.mean, clip.std)[0]
        with torch.no_grad():
            x, maps = eager_blocks(clip, images)
        visual = plain.net.forward_features(view)[:, 1:]
        w_tok = maps[-1][:, :, 0, 1:].mean(dim=1)
        stacked_kd_loss(visual, {**others, "clip": x[:, 1:]}, w_tok, w_tea).backward()

    def networks():
        with torch.no_grad():
            clip.net.forward_features(clip.view(images))
        backward(floor(images))

    forms = {"ours": lambda: fast(ours), "plain": slow, "floor": networks}
    if s.batch == 1:
        forms["recomputed"] = lambda: fast(recomputed)
    t, m = seconds(forms, s.repeats), {name: peak_bytes(form) for name, form in forms.items()}
    rows = []
    for name, what in (("ours", f"whole vision step, {s.name}"), ("recomputed", f"the same with --recompute, {s.name}")):
        for measure, cost, reach in (("time", t, 0.6), ("peak memory", m, 0.4)) if name in forms else ():
            rows += [Row(what, measure, "plain forms together", cost[name], cost["plain"], reach if s.batch == 1 else None),
                     Row(what, measure, "floor: CLIP and student without extras", cost[name], cost["floor"], None)]
    return rows


@torch.no_grad()
def bench_inference(s: Shape) -> list[Row]:
    """What runs after training: the student with its experts, against CLIP alone."""
    images, clip = uint8_images(s.batch, s.pixels), Student(s.clip).to(DEVICE).eval()
    student = Student(s.clip).add_experts(3, s.rank, 1.0, s.dropout).to(DEVICE).eval()
    t = seconds({"ours": lambda: student(images), "clip": lambda: clip(images)}, 2 * s.repeats)
    rows = [Row(f"student at inference, {s.name}", "time", "CLIP alone", t["ours"], t["clip"], 1.05)]
    if s is SHAPES["tiny"]:
        teachers = train.build_teachers(train.TINY, {}).to(DEVICE)
        t = seconds({"ours": lambda: student(images), "all": lambda: teachers(images)}, 2 * s.repeats)
        rows.append(Row(f"student at inference, {s.name}", "time", "all teachers", t["ours"], t["all"], None))
    else:
        one, every = full_flops(s)
        rows.append(Row(f"student at inference, {s.name}", "FLOPs", "all teachers (EVA-02-L, ConvNeXt-XXL at 1024 px)", one, every, None))
    return rows


def full_flops(s: Shape) -> tuple[float, float]:
    """FLOPs per image of the student and of all three teachers at their true sizes, counted without computing (meta device)."""
    with torch.device("meta"):
        encoders = {name: ClipEncoder(spec) if name == "clip" else VisionEncoder(spec) for name, spec in
                    ((name, getattr(train.FULL, name)) for name in train.FULL.teachers)}
        student, flops = Student(s.clip).add_experts(3, s.rank, 1.0, s.dropout), []
        for encoder in (student, *encoders.values()):
            image = torch.empty(1, 3, encoder.image_size, encoder.image_size)
            flops.append(count_flops(lambda encoder=encoder, image=image: encoder.net.forward_features(image)))
    return flops[0], sum(flops[1:])


def bench_compile(s: Shape) -> list[Row]:
    """torch.compile of the student, forward + backward; measured only where it is meant for."""
    if DEVICE != "cuda":
        return []
    images, eager, compiled = uint8_images(s.batch, s.pixels), *(Student(s.clip).add_experts(3, s.rank, 1.0, s.dropout).to(DEVICE).train() for _ in range(2))
    compiled.compile()
    t = seconds({"ours": lambda: backward(compiled(images)), "eager": lambda: backward(eager(images))}, 3 * s.repeats)
    return [Row(f"student compiled, {s.name}", "time", "eager", t["ours"], t["eager"], None)]


# ---------------------------------------------------------------------------------------------------------------------
# The whole training step of train.py --tiny


def tiny_step(c: train.Config, batch_size: int | None = None) -> tuple:
    """(step, parts): one stage-2 step on a real batch, and the models inside it."""
    sets = train.load_sets(c)
    tokenizer = data.WordTokenizer.from_records(sets["pretrain"][0] + sets["train"][0])
    vlm, teachers = train.build_vlm(c, tokenizer).to(c.device), train.build_teachers(c, {}).to(c.device)
    if c.cache_teachers:
        train.fill_cache(c, teachers, sets)
    adapters = build_adapters(teachers, vlm.student.num_tokens, vlm.student.dim).to(c.device)
    train.set_trainable(2, train.parts(vlm, adapters, teachers))
    optimizer = torch.optim.AdamW([p for m in (vlm, adapters) for p in m.parameters()], lr=1e-4, fused=True)
    dataset = train.build_datasets(c, sets, tokenizer, vlm.student.num_tokens)[2]
    batch = data.collate([dataset[i] for i in range(batch_size or c.stage2_batch)], tokenizer.pad)
    batch = {k: v.to(c.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def step():
        loss, _ = train.loss_terms(c, vlm, teachers, adapters, batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in (vlm, adapters) for p in m.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, vlm, teachers, adapters, optimizer, batch


def bench_step() -> list[Row]:
    """The step against the sum of its parts' floors: CLIP without experts, LLM, teachers, optimizer, each alone."""
    c = dataclasses.replace(train.TINY, device=DEVICE, n_pretrain=64, n_train=64, n_described=0, cache_teachers="")
    step, vlm, teachers, adapters, optimizer, batch = tiny_step(c)
    clip = Student(c.clip).to(DEVICE).train()
    visual = torch.randn(len(batch["images"]), clip.num_tokens, clip.dim, device=DEVICE, requires_grad=True)

    def llm():
        text_loss(vlm(visual, batch["input_ids"], batch["attention_mask"]), batch["labels"]).backward()

    step()
    loss, _ = train.loss_terms(c, vlm, teachers, adapters, batch)
    loss.backward()  # gradients for the optimizer to use
    outputs = teachers(batch["images"])
    weight = torch.randn(len(visual), clip.num_tokens, clip.dim, device=DEVICE)

    def adapters_alone():
        sum((v * weight).sum() for name, v in adapt(outputs, adapters).items() if name != "clip").backward()

    floors = {"student without experts": lambda: (clip(batch["images"]) * weight).sum().backward(), "projector + LLM": llm,
              "teachers": lambda: [e.net.forward_features(e.view(batch["images"])) for e in teachers.encoders.values()],
              "adapters": adapters_alone, "optimizer": optimizer.step}
    floors["teachers"] = torch.no_grad()(floors["teachers"])
    t = seconds({"step": step, **floors}, 50)
    return [Row("training step, tiny", "time", "sum of its parts' floors", t.pop("step"), sum(t.values()), 1.15)]


def scaling() -> list[str]:
    """Step time and memory against size; the exponent is log(ratio of cost) / log(ratio of size)."""
    base = dataclasses.replace(train.TINY, device=DEVICE, n_pretrain=64, n_train=64, n_described=0, n_text=0, cache_teachers="")
    bigger = {  # what: (config, batch, ratio of size)
        "student tokens n 36 -> 64": (dataclasses.replace(base, clip=base.clip.replace("img_size=48", "img_size=64")), 16, 64 / 36),
        "experts 3 -> 6": (dataclasses.replace(base, mole_experts=6), 16, 2),
        "rank 8 -> 16": (dataclasses.replace(base, mole_rank=16), 16, 2),
        "teachers 2 -> 3": (base, 16, 3 / 2),
        "batch 16 -> 32": (base, 32, 2),
    }
    steps = {"base": tiny_step(base)[0], "two teachers": tiny_step(dataclasses.replace(base, teachers=("clip", "eva")))[0]}
    steps |= {what: tiny_step(c, batch)[0] for what, (c, batch, _) in bigger.items()}
    t, m = seconds(steps, 9), {name: peak_bytes(step) for name, step in steps.items()}
    lines = ["| training step, tiny | time | exponent | peak memory | exponent |", "|---|---|---|---|---|"]
    for what, (_, _, ratio) in bigger.items():
        start = "two teachers" if what.startswith("teachers") else "base"
        cells = [f"{new[what] / new[start]:.2f}x | {math.log(new[what] / new[start]) / math.log(ratio):.2f}" for new in (t, m)]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def profile_tiny(steps: int = 20) -> str:
    """What a stage-2 step spends its time on; and the share outside matrix products, attention and convolution, and the time of a step,
    for the two things that were found large: LoRA dropout and teachers recomputed."""
    base = dataclasses.replace(train.TINY, n_pretrain=64, n_train=64, n_described=0, cache_teachers="")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, c in {"with LoRA dropout 0.05": dataclasses.replace(base, mole_dropout=0.05), "teachers recomputed": base,
                        "teachers cached, as it is": dataclasses.replace(base, cache_teachers=folder)}.items():
            step = tiny_step(c)[0]
            ms = 1e3 * seconds({name: step}, steps)[name]
            with profile(activities=[ProfilerActivity.CPU]) as p:
                for _ in range(steps):
                    step()
            events = p.key_averages()
            total = sum(e.self_cpu_time_total for e in events)
            dense = sum(e.self_cpu_time_total for e in events if any(word in e.key for word in ("mm", "attention", "conv")))
            if c is base:
                lines += [f"{100 * e.self_cpu_time_total / total:5.1f} %  {e.key}" for e in sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]]
            lines.append(f"{name}: {100 * (1 - dense / total):.0f} % outside, {ms:.0f} ms a step")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What follows where paper and released code differ: the numbers of the README's table


def zipf_scores(n: int) -> torch.Tensor:
    """[CLS] scores whose softmax is 1/rank over n tokens, a head of it as strong as the first: (1, 1, 1 + n)."""
    return torch.cat([torch.ones(1), 1 / torch.arange(1, n + 1)]).log()[None, None]


def token_weight_numbers(scores: torch.Tensor) -> str:
    """n max W^tok and the entropy of W^tok / log n (1 = uniform), paper then released."""
    cells = []
    for form in ("paper", "released"):
        w = token_weights(scores, form)
        entropy = -(w * w.log()).sum(dim=1).mean() / math.log(w.shape[1])
        cells.append(f"n max {(w.amax(dim=1) * w.shape[1]).mean():.2f}, entropy / log n {entropy:.4f}")
    return " | ".join(cells)


def saturation(scale: float, d: int = 1024, draws: int = 4000) -> float:
    """Share of draws in which one of two teachers takes more than 0.8, V^cls of rms 1, mean tokens of rms 0.3."""
    cls, means = torch.randn(draws, d), 0.3 * torch.randn(draws, 2, d)
    w = ((means @ cls[:, :, None])[:, :, 0] * scale).softmax(dim=1)
    return (w.amax(dim=1) > 0.8).float().mean().item()


def at_the_jump(largest: float) -> float:
    """What the collapse branch makes of a largest weight."""
    cls, gap = torch.ones(1, 1), math.log(largest / (1 - largest))
    teachers = {"clip": torch.zeros(1, 1, 1), "eva": torch.full((1, 1, 1), gap), "convnext": torch.zeros(1, 1, 1)}
    return teacher_weights(cls, teachers, 0.0, "released", collapse=True)[0, 1].item()


@torch.no_grad()
def distance_at_start(spec: str, weights: Path | None, rank: int, images: torch.Tensor, **options) -> float:
    """|V^s - V^clip| / |V^clip| at step 0, with the released LoRA scale of 1/32."""
    torch.manual_seed(0)
    clip, student = Student(spec, weights).eval(), Student(spec, weights).eval()
    student.load_state_dict(clip.state_dict())
    student.add_experts(3, rank, rank / 32, 0.0, **options).eval()
    return ((student(images) - clip(images)).norm() / clip(images).norm()).item()


def router_gradients(c: train.Config, vlm, teachers, adapters, batch) -> str:
    """Norm of the routers' gradient from L_text, L_kd, L_balance."""
    norms = []
    for pick in ({"lambda_kd": 0.0, "balance_weight": 0.0}, {"lambda_kd": 1.0, "balance_weight": 0.0}, {"lambda_kd": 0.0, "balance_weight": 1.0}):
        def gradient(**weights):
            vlm.zero_grad()
            train.loss_terms(dataclasses.replace(c, **weights), vlm, teachers, adapters, batch)[0].backward()
            grads = [p.grad for layer in mole_layers(vlm.student) for p in layer.router.parameters()]
            return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in grads])
        text = gradient(lambda_kd=0.0, balance_weight=0.0)
        g = gradient(**pick)
        norms.append((g if pick["lambda_kd"] == pick["balance_weight"] == 0 else g - text).norm().item())
    return ", ".join(f"{name} {norm:.2g}" for name, norm in zip(("L_text", "L_kd", "L_balance"), norms))


def drift(teachers: Teachers, images: torch.Tensor, form: str, detach: bool, steps: int = 50) -> str:
    """The largest teacher weight (batch mean) before and after the adapters alone have followed L_kd for some steps."""
    torch.manual_seed(0)
    outputs = teachers(images)
    clip = outputs["clip"]
    adapters = build_adapters(teachers, clip.tokens.shape[1], clip.tokens.shape[2])
    optimizer, largest = torch.optim.Adam(adapters.parameters(), lr=1e-3), []
    for _ in range(steps):
        V_t = adapt(outputs, adapters)
        w = teacher_weights(clip.cls, V_t, 0.0, form, detach)
        largest.append(w[:, 1:].amax(dim=1).mean().item())
        kd_loss(dict.fromkeys(V_t, clip.tokens), V_t, token_weights(clip.cls_scores), w)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return f"{largest[0]:.2f} -> {largest[-1]:.2f}"


@torch.no_grad()
def rank_of_change(form: str) -> int:
    """Numerical rank of F*(x) - F(x) over 1,024 tokens of one expert, d = 1024, r = 32: singular values above 1 % of the largest."""
    torch.manual_seed(0)
    ffn = Student(SHAPES["ViT-L"].clip + " depth=2").net.blocks[0].mlp
    layer, x = MoLE(ffn, 1024, 1, 32, 32.0, 0.0, form=form, init="kaiming"), torch.randn(1, 1024, 1024)
    s = torch.linalg.svdvals((layer(x) - ffn(x))[0])
    return int((s > 0.01 * s[0]).sum())


def count(modules: list[nn.Module]) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def differences() -> str:
    c = dataclasses.replace(train.TINY, n_pretrain=64, n_train=64, n_described=0, cache_teachers="")
    sets = train.load_sets(train.TINY)
    weights, _ = stage0(c, sets["train"][0], data.WordTokenizer.from_records(sets["pretrain"][0] + sets["train"][0]))
    teachers = train.build_teachers(c, weights)
    images = data.render(data.sample_scenes("validation", 64))
    large = SHAPES["ViT-L"].clip
    rows = ["| row | what | paper | released code | here |", "|---|---|---|---|---|"]

    def add(row, what, paper, released, here):
        rows.append(f"| {row} | {what} | {paper} | {released} | {here} |")

    mlp = Student(large + " depth=2").net.blocks[0].mlp
    parameters = {form: count(MoLE(mlp, 1024, 3, 32, 1.0, 0.0, form=form).experts()[1:]) for form in ("ffn", "fc1_fc2")}
    add(1, "LoRA parameters per layer, d = 1024, r = 32, E = 3", f"{parameters['ffn']:,}", f"{parameters['fc1_fc2']:,}", "as paper")
    add(1, "rank of one expert's change of the FFN, r = 32", rank_of_change("ffn"), rank_of_change("fc1_fc2"), "as paper")
    for grad in ("none", "straight_through"):
        torch.manual_seed(0)
        config = dataclasses.replace(c, mole_router_grad=grad)
        _, vlm, tea, adapters, _, batch = tiny_step(config)
        for layer in mole_layers(vlm.student):
            nn.init.normal_(layer.lora.B.weight, std=0.05)
        norms = router_gradients(config, vlm.eval(), tea, adapters, batch)
        paper = norms if grad == "none" else paper
    add(2, "router gradient norm by source, tiny", paper, "as paper", norms)
    released = {"form": "fc1_fc2", "init": "kaiming"}
    tiny, vit_l = (c.clip, weights["clip"], 8, images), (large, None, 32, uint8_images(1, 336).cpu())
    add(3, "distance of the student from CLIP at step 0, tiny / ViT-L (random weights)", "0",
        " / ".join(f"{100 * distance_at_start(*s, **released):.1f} %" for s in (tiny, vit_l)),
        " / ".join(f"{100 * distance_at_start(*s):.0f} %" for s in (tiny, vit_l)))
    scores = teachers(images)["clip"].cls_scores
    add(4, "W^tok of the tiny CLIP, n = 36", *token_weight_numbers(scores).split(" | "), "as paper")
    add(4, "W^tok of a Zipf-like attention, n = 576", *token_weight_numbers(zipf_scores(576)).split(" | "), "as paper")
    torch.manual_seed(0)
    add(5, "P(one of two teachers > 0.8), d = 1024", f"{saturation(1024 ** -0.5):.3f}", f"{saturation(1.0):.3f}", "as paper")
    add(6, "largest teacher weight, adapters trained alone for 50 steps, tiny", "-", drift(teachers, images, "released", False),
        drift(teachers, images, "paper", True))
    add(7, "largest weight 0.7999 / 0.8001 becomes", "-", f"{at_the_jump(0.7999):.3f} / {at_the_jump(0.8001):.3f}", "unchanged")
    shares = [adapter.out.weight.numel() / count([adapter]) for adapter in (EncoderAdapter(4096, 1024, 576, 1024), EncoderAdapter(1024, 3072, 576, 1024))]
    per_token = count([EncoderAdapter(4096, 1024, 576, 1024, "per_token")])
    add(8, "token matrix, share of the adapter of EVA-L / ConvNeXt-XXL", "-", " / ".join(f"{100 * s:.0f} %" for s in shares),
        f"as released (`per_token`: {per_token:,} in place of {count([EncoderAdapter(4096, 1024, 576, 1024)]):,})")
    layers = nn.ModuleList(MoLE(nn.Linear(8, 8), 8, 3, 2, 1.0, 0.0) for _ in range(3))
    for e, layer in enumerate(layers):
        layer.probs = F.one_hot(torch.full((1, 6), e), 3).float()
    add(9, "balance loss when each of 3 layers collapses to another expert (its minimum / maximum)", "-",
        f"{balance_loss(layers, 'pooled'):.2f} (0.33 / 1)", f"{balance_loss(layers):.2f} (1 / 3)")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Why the direction of the adapters matters: the smallest case, no network but the adapter


def direction(teacher_to_student: bool, marks: tuple[int, ...] = (0, 30, 100, 300, 1000, 3000)) -> dict[int, float]:
    """How much of what only the teacher sees is linear in the student (R^2), after so many steps.

    512 images have a signal x that CLIP and the teacher see, and a signal y that the teacher alone sees. The student is a free vector an
    image, so nothing limits it; it starts as CLIP's and follows L_kd, as does the adapter, one Linear:

        teacher -> student   0.4 |s - clip|^2 + 0.6 |A(t) - s|^2        the paper's
        student -> teacher   0.4 |s - clip|^2 + 0.6 |A(s) - t|^2        AM-RADIO's

    In the first, y in s only costs: A could predict it, but the CLIP term pulls it out, and s without y is as easy to predict. It comes in
    while the adapter is still random and leaves as the adapter learns. In the second, the teacher's term cannot fall without it.
    """
    torch.manual_seed(0)
    x, y = torch.randn(512, 4), torch.randn(512, 4)
    clip, teacher = x @ torch.randn(4, 8), torch.cat([x, y], dim=1) @ torch.randn(8, 8)
    teacher = (teacher - teacher.mean(dim=0)) / teacher.std(dim=0)
    s, A, held = clip.clone().requires_grad_(), nn.Linear(8, 8), {}
    optimizer = torch.optim.Adam([s, *A.parameters()], lr=1e-2)
    for step in range(max(marks) + 1):
        if step in marks:
            z, centered = s.detach() - s.detach().mean(dim=0), y - y.mean(dim=0)
            left = centered - z @ torch.linalg.lstsq(z, centered).solution
            held[step] = 1 - (left.square().sum() / centered.square().sum()).item()
        error = A(teacher) - s if teacher_to_student else A(s) - teacher
        (0.4 * (s - clip).square().mean() + 0.6 * error.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return held


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--differences", action="store_true")
    parser.add_argument("--direction", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.differences:
        print(differences())
        return
    if args.profile:
        print(profile_tiny())
        return
    if args.direction:
        held = {"teacher -> student (the paper)": direction(True), "student -> teacher (AM-RADIO)": direction(False)}
        print(f"| R^2 of the teacher's own signal in the student, after steps | {' | '.join(map(str, held['teacher -> student (the paper)']))} |\n" + "|---" * 7 + "|")
        for name, row in held.items():
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
        return
    print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| what | measure | against | ours | theirs | ratio | reach | met |\n|---|---|---|---|---|---|---|---|")
    benches = [bench_mole, bench_clip, bench_kd, bench_views, bench_vision_step, bench_inference, bench_compile]
    for name in args.shapes:
        for bench in tqdm(benches, desc=name, leave=False):
            for row in bench(SHAPES[name]):
                tqdm.write(row.line())
    for row in bench_step():
        print(row.line())
    print("\n" + "\n".join(scaling()))


if __name__ == "__main__":
    data.run(main)
