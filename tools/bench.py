"""Time and peak memory of our implementation beside a slow, obvious baseline implementation.

    python -m tools.bench                   # at tiny and at ViT-L/14-336 sizes (5 min on a CPU)
    python -m tools.bench --shapes tiny     # without the large ones (1 min)

It runs on a GPU if there is one. Times are medians of interleaved repeats, forward and backward
where something is trained; compare ratios, not milliseconds. Memory is the peak of what the code
itself allocates: weights and inputs do not count.

Letters: B images, n tokens and d width of the student, E experts, r rank of one expert, h heads, L
layers, m teachers; B*N tokens of a batch in one row, N_e of them expert e's.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from kd_loss import kd_loss, token_weights
from model import Student
from mole import MoLE, mole_layers
from plumbing.cli import Parser, run
from plumbing.config import TINY
from plumbing.sharding import recompute
from teachers import ClipEncoder, VisionEncoder
from tools.plan.memory import PeakMemory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Shape:
    """The sizes at which everything is measured."""

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


@dataclass
class Case:
    """One row: its name, ours and the baseline, and how often they run."""

    what: str
    baseline: str
    ours: Callable
    theirs: Callable
    repeats: int


# ------------------------------------------------------------------------------------------------
# Measuring


def median_seconds(forms: list[Callable], repeats: int) -> list[float]:
    """Return the median time of each form, over interleaved repeats.

    Interleaved, so that a slow moment of the machine meets all forms. Each round has another order,
    because a form that always ran behind the same large one would always find cold caches.
    """
    times = [[] for _ in forms]
    order = random.Random(0)
    gc.collect()
    gc.disable()
    for i in range(repeats + 1):
        for k in order.sample(range(len(forms)), len(forms)):
            start = time.perf_counter()
            forms[k]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                times[k].append(time.perf_counter() - start)
    gc.enable()
    return [statistics.median(seconds) for seconds in times]


def peak_bytes(form: Callable) -> int:
    """Return the peak memory that a form itself allocates."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        form()
    return memory.peak


def backward(out: torch.Tensor) -> None:
    """Run backward from the sum of any output."""
    out.sum().backward()


# ------------------------------------------------------------------------------------------------
# Baseline implementations, as one would write them first


class LoopMoLE(nn.Module):
    """MoLE as a loop over experts that gathers and scatters tokens, with the weights of a layer."""

    def __init__(self, mole: MoLE):
        super().__init__()
        self.ffn, self.router = mole.ffn, mole.router
        self.dropout, self.scale = mole.lora.dropout, mole.lora.scale
        r = mole.lora.rank
        self.down = nn.ParameterList(w.clone() for w in mole.lora.down.weight.detach().split(r))
        self.up = nn.ParameterList(w.clone() for w in mole.lora.up.weight.detach().split(r, dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)                                                          # (B*N, d)
        choice = self.router(flat).softmax(dim=-1).argmax(dim=-1)                       # (B*N,)
        y = self.ffn(flat)                                                              # (B*N, d)
        for e, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            rows = (choice == e).nonzero()[:, 0]                                        # (N_e,)
            low = self.dropout(flat[rows]) @ down.T                                     # (N_e, r)
            y = y.index_add(0, rows, self.scale * low @ up.T)                           # (B*N, d)
        return y.view_as(x)                                                        # (B, 1 + n, d)


def all_attention_maps(encoder: ClipEncoder,
                       images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run CLIP and keep every attention map of every block, for one row of one of them."""
    net = encoder.net
    maps = []                                                             # L x (B, h, 1 + n, 1 + n)
    x = net.norm_pre(net._pos_embed(net.patch_embed(encoder.view(images))))        # (B, 1 + n, d)
    for block in net.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x))                                       # (B, 1 + n, 3 d)
        qkv = qkv.unflatten(-1, (3, attention.num_heads, -1))                # (B, 1 + n, 3, h, d/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # (B, h, 1 + n, d/h) each
        # no name for what comes between: it would be held longer than it is needed
        maps.append((q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1))
        x = x + attention.proj((maps[-1] @ v).transpose(1, 2).flatten(2))          # (B, 1 + n, d)
        x = x + block.mlp(block.norm2(x))                                          # (B, 1 + n, d)
    return x, maps


def stacked_kd_loss(V_s: torch.Tensor, V_t: dict[str, torch.Tensor], w_tok: torch.Tensor,
                    w_tea: torch.Tensor) -> torch.Tensor:
    """Return L_kd from a (B, n, d, m) stack of squared errors."""
    targets = torch.stack(list(V_t.values()), dim=-1)                               # (B, n, d, m)
    error = (targets - V_s[..., None]).square()                                     # (B, n, d, m)
    weight = (w_tok + 1 / V_s.shape[1])[:, :, None, None]                           # (B, n, 1, 1)
    weighted = weight * error * w_tea[:, None, None, :]                             # (B, n, d, m)
    return weighted.mean(dim=2).sum(dim=(1, 2)).mean()                              # ()


def pil_view(encoder: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    """Return an encoder's view made by PIL, image by image, as an image processor does."""
    size = (encoder.image_size, encoder.image_size)
    views = []
    for image in images.cpu():
        picture = TF.to_pil_image(image).resize(size, Image.Resampling.BICUBIC)
        pixels = TF.to_dtype(TF.pil_to_tensor(picture), torch.float32, scale=True)
        views.append(TF.normalize(pixels, encoder.mean, encoder.std))               # (3, R_i, R_i)
    return torch.stack(views).to(images.device)                                 # (B, 3, R_i, R_i)


# ------------------------------------------------------------------------------------------------
# Rows


def random_images(s: Shape, batch: int) -> torch.Tensor:
    """Return random pictures, uint8 (B, 3, R, R)."""
    shape = (batch, 3, s.pixels, s.pixels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def random_tokens(batch: int, encoder: ClipEncoder) -> torch.Tensor:
    """Return random tokens of CLIP's shape, with a gradient: (B, n, d)."""
    shape = (batch, encoder.num_tokens, encoder.dim)
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def student_with_experts(s: Shape, dropout: float) -> Student:
    """Return a student as in stage 1: only its experts and routers are trained."""
    student = Student(s.clip).requires_grad_(False)
    student.add_experts(form="ffn", num_experts=3, rank=s.rank, alpha=1.0, dropout=dropout,
                        router_grad="straight_through", init="zero")
    return student.to(DEVICE).train()


def student_with_loops(s: Shape) -> Student:
    """Return the same student with the baseline's MoLE."""
    student = student_with_experts(s, s.dropout)
    for block in student.net.blocks:
        block.mlp = LoopMoLE(block.mlp)
    return student


def mole_cases(s: Shape) -> Iterator[Case]:
    """Yield one MoLE layer, forward and backward, the FFN frozen as in stage 1."""
    x = random_tokens(s.batch, Student(s.clip))                                         # (B, n, d)
    for dropout in sorted({s.dropout, 0.0}):
        layer = mole_layers(student_with_experts(s, dropout))[0]
        loop = LoopMoLE(layer)
        what = f"MoLE with LoRA dropout {dropout}" if dropout else "MoLE"
        for baseline, module in (("loop over experts", loop), ("FFN without experts", layer.ffn)):
            yield Case(what, baseline, lambda layer=layer: backward(layer(x)),
                       lambda module=module: backward(module(x)), 10 * s.repeats)


def clip_cases(s: Shape) -> Iterator[Case]:
    """Yield the CLIP teacher's forward with its [CLS] row."""
    encoder = ClipEncoder(s.clip).to(DEVICE).eval().requires_grad_(False)
    images = random_images(s, s.batch)
    yield Case("CLIP teacher with its [CLS] row", "all attention maps", lambda: encoder(images),
               lambda: all_attention_maps(encoder, images), s.repeats)


def kd_cases(s: Shape) -> Iterator[Case]:
    """Yield L_kd of three teachers, forward and backward to student and adapted tokens."""
    batch, encoder = 4 * s.batch, ClipEncoder(s.clip)
    V_s = random_tokens(batch, encoder)                                                 # (B, n, d)
    V_t = {name: random_tokens(batch, encoder) for name in TINY.teachers}           # m x (B, n, d)
    w_tok = torch.rand(batch, encoder.num_tokens, device=DEVICE).softmax(dim=1)         # (B, n)
    w_tea = torch.full((batch, 3), 1 / 3, device=DEVICE)                                # (B, m)
    yield Case("KD loss", "(B, n, d, m) stack",
               lambda: kd_loss(dict.fromkeys(V_t, V_s), V_t, w_tok, w_tea)[0].backward(),
               lambda: stacked_kd_loss(V_s, V_t, w_tok, w_tea).backward(), 5 * s.repeats)


def view_cases(s: Shape) -> Iterator[Case]:
    """Yield the way from the loader's uint8 batch to every encoder's normalised input."""
    images = random_images(s, 4 * s.batch)
    encoders = []
    for pixels in s.views:
        encoder = ClipEncoder(TINY.clip).to(DEVICE)
        encoder.image_size = pixels
        encoders.append(encoder)
    yield Case("teachers' views", "PIL, image by image",
               lambda: [encoder.view(images) for encoder in encoders],
               lambda: [pil_view(encoder, images) for encoder in encoders], s.repeats)


def step_cases(s: Shape) -> Iterator[Case]:
    """Yield the whole vision step: views, CLIP, student forward and backward, weights and L_kd."""
    images = random_images(s, s.batch)
    clip = ClipEncoder(s.clip).to(DEVICE).eval().requires_grad_(False)
    others = {name: random_tokens(s.batch, clip) for name in TINY.teachers[1:]}     # m x (B, n, d)
    w_tea = torch.full((s.batch, 3), 1 / 3, device=DEVICE)                              # (B, m)

    def ours(student: Student) -> None:
        output = clip(images)
        V_s = student(images)                                                           # (B, n, d)
        V_t = {"clip": output.tokens, **others}                                     # m x (B, n, d)
        w_tok = token_weights(output.cls_scores, "paper")                               # (B, n)
        kd_loss(dict.fromkeys(V_t, V_s), V_t, w_tok, w_tea)[0].backward()

    def theirs(student: Student) -> None:
        x, maps = all_attention_maps(clip, images)
        V_s = student.net.forward_features(pil_view(student, images))[:, 1:]            # (B, n, d)
        attention = maps[-1][:, :, 0, 1:]                                               # (B, h, n)
        w_tok = (attention / attention.sum(dim=-1, keepdim=True)).mean(dim=1)           # (B, n)
        stacked_kd_loss(V_s, {"clip": x[:, 1:], **others}, w_tok, w_tea).backward()

    plain = "a plain implementation"
    for what, baseline in (("whole vision step", plain),
                           ("the same with --recompute", f"{plain} that recomputes, too")):
        student, loops = student_with_experts(s, s.dropout), student_with_loops(s)
        if baseline != plain:
            recompute([*student.net.blocks, *loops.net.blocks])
        yield Case(what, baseline, lambda student=student: ours(student),
                   lambda loops=loops: theirs(loops), s.repeats)


def student_cases(s: Shape) -> Iterator[Case]:
    """Yield what runs after training: the student with its experts."""
    images = random_images(s, s.batch)
    clip = Student(s.clip).to(DEVICE).eval().requires_grad_(False)
    student = student_with_experts(s, s.dropout).eval().requires_grad_(False)
    yield Case("student at inference", "CLIP without experts", lambda: student(images),
               lambda: clip(images), 2 * s.repeats)


def row(case: Case, s: Shape) -> str:
    """Measure a case and return its line of the table."""
    seconds = median_seconds([case.ours, case.theirs], case.repeats)
    memory = [peak_bytes(case.ours), peak_bytes(case.theirs)]
    cells = [f"{case.what}, {s.name}", case.baseline]
    for (ours, theirs), factor, unit in ((seconds, 1e3, "ms"), (memory, 1e-6, "MB")):
        for value in (ours, theirs):
            cells.append(f"{three_digits(value * factor)} {unit}")
        cells.append(f"{ours / theirs:.2f}")
    return f"| {' | '.join(cells)} |"


def three_digits(x: float) -> str:
    """Return three digits of a number, or all that stand before the point."""
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def main(argv: list[str] | None = None) -> None:
    """Print the table, each row as soon as it is measured."""
    parser = Parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| what | baseline | time | baseline | ratio | peak memory | baseline | ratio |")
    print("|---" * 8 + "|")
    kinds = [mole_cases, clip_cases, kd_cases, view_cases, step_cases, student_cases]
    for name in args.shapes:
        for cases in tqdm(kinds, desc=name, leave=False):
            for case in cases(SHAPES[name]):
                tqdm.write(row(case, SHAPES[name]))


if __name__ == "__main__":
    run(main)
