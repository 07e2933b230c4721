"""Speed and memory of each fast form beside its plain form and its floor, in one run.

    python -m tools.bench                   # at tiny and at ViT-L/14-336 shapes; cost against size
    python -m tools.bench --shapes tiny     # without the large ones (1 min)
    python -m tools.bench --differences     # what follows where paper and released code differ
    python -m tools.bench --direction       # why the direction of the adapters matters
    python -m tools.bench --profile         # where a step of train.py --tiny spends its time

Times are medians of interleaved repeats, forward and backward where something is trained; compare
ratios, not milliseconds. Memory is the peak of what the code itself allocates, weights and inputs
not counted. The plain forms are in tools/plain_forms.py.
"""

import functools

import torch
from tqdm import tqdm

from kd_loss import kd_loss
from model import Student
from mole import MoLE
from plumbing.cli import Parser, run
from plumbing.config import TINY
from teachers import ClipEncoder
from tools.differences import differences
from tools.lesson import direction
from tools.measuring import (DEVICE, SHAPES, Row, Shape, backward, count_flops, kd_tensors,
                             peak_bytes, saved_bytes, seconds, uint8_images)
from tools.plain_forms import (LoopMoLE, LoopReleasedMoLE, eager_blocks, pil_views, stacked_kd_loss,
                               tensor_views)
from tools.tiny_step import bench_step, profile_tiny, scaling
from tools.vision import bench_compile, bench_inference, bench_vision_step, expert_options


def bench_mole(s: Shape) -> list[Row]:
    """One MoLE layer, forward + backward, the FFN frozen as in stage 1."""
    student = Student(s.clip)
    ffn, d = student.net.blocks[0].mlp.requires_grad_(False), student.dim
    shape = (s.batch, 1 + student.num_tokens, d)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)                   # (B, 1 + n, d)
    layers = {
        "ours": MoLE(ffn, d, **expert_options(s, s.dropout)),
        "loop": LoopMoLE(ffn, d, 3, s.rank, s.dropout),
        "fc1_fc2": LoopReleasedMoLE(ffn, d, 3, s.rank, s.dropout),
        "ffn": ffn,
    }
    if s.dropout:
        layers["no dropout"] = MoLE(ffn, d, **expert_options(s, 0.0))
    forwards, both = {}, {}
    for name, layer in layers.items():
        layer.to(DEVICE).train()
        forwards[name] = functools.partial(layer, x)
        both[name] = lambda layer=layer: backward(layer(x))
    time = seconds(both, 10 * s.repeats)
    saved = {name: saved_bytes(forward) for name, forward in forwards.items()}
    flops = {name: count_flops(form) for name, form in both.items()}

    dropout = f" with LoRA dropout {s.dropout}" if s.dropout else ""
    what = {"ours": f"MoLE FFN{dropout}, {s.name}", "no dropout": f"MoLE FFN, {s.name}"}
    floor = "floor: frozen FFN"
    rows = []
    for name in ("ours", "no dropout"):
        if name in layers:
            rows.append(Row(what[name], "time", floor, time[name], time["ffn"], 1.05))
            rows.append(Row(what[name], "saved activations", floor, saved[name], saved["ffn"],
                            1.15))
    ours = what["ours"]
    return [*rows,
            Row(ours, "FLOPs", floor, flops["ours"], flops["ffn"], None),
            Row(ours, "time", "plain: loop over experts", time["ours"], time["loop"], None),
            Row(ours, "time", "fc1 + fc2 with gather", time["ours"], time["fc1_fc2"], 0.85)]


@torch.no_grad()
def bench_clip(s: Shape) -> list[Row]:
    """The CLIP teacher's forward with its [CLS] row."""
    encoder = ClipEncoder(s.clip).to(DEVICE).eval()
    images = uint8_images(s.batch, s.pixels)
    forms = {"ours": lambda: encoder(images),
             "plain": lambda: eager_blocks(encoder, images),
             "floor": lambda: encoder.net.forward_features(encoder.view(images))}
    time = seconds(forms, s.repeats)
    memory = {name: peak_bytes(form) for name, form in forms.items()}
    what, plain, floor = (f"CLIP teacher + [CLS] row, {s.name}", "plain: all maps",
                          "floor: SDPA to that block")
    return [Row(what, "time", floor, time["ours"], time["floor"], 1.03),
            Row(what, "time", plain, time["ours"], time["plain"], None),
            Row(what, "peak memory", floor, memory["ours"], memory["floor"], None),
            Row(what, "peak memory", plain, memory["ours"], memory["plain"], 0.10)]


def bench_kd(s: Shape) -> list[Row]:
    """L_kd of three teachers, forward + backward to the student and to the adapted tokens."""
    encoder = ClipEncoder(s.clip)
    V_s, V_t, w_tok, w_tea = kd_tensors(4 * s.batch, encoder.num_tokens, encoder.dim)
    student = dict.fromkeys(V_t, V_s)
    forms = {"ours": lambda: kd_loss(student, V_t, w_tok, w_tea)[0].backward(),
             "plain": lambda: stacked_kd_loss(V_s, V_t, w_tok, w_tea).backward(),
             "floor": lambda: [t.detach().sum() for t in (V_s, *V_t.values())]}
    time = seconds(forms, 5 * s.repeats)
    memory = {name: peak_bytes(form) for name, form in forms.items()}
    what, plain = f"KD loss, {s.name}", "plain: (B, n, d, m) stack"
    return [Row(what, "time", plain, time["ours"], time["plain"], 0.35),
            Row(what, "peak memory", plain, memory["ours"], memory["plain"], 0.60),
            Row(what, "time", "floor: one read", time["ours"], time["floor"], None)]


def bench_views(s: Shape) -> list[Row]:
    """From the loader's uint8 batch to every encoder's normalised input."""
    images = uint8_images(4 * s.batch, s.pixels)
    clip = ClipEncoder(TINY.clip)
    forms = {"ours": lambda: tensor_views(images, s.views, clip.mean, clip.std),
             "plain": lambda: pil_views(images, s.views, clip.mean, clip.std)}
    time = seconds(forms, s.repeats)
    return [Row(f"teacher views, {s.name}", "time", "plain: PIL, image by image", time["ours"],
                time["plain"], 0.50)]


# ------------------------------------------------------------------------------------------------


def print_table(names: list[str]) -> None:
    """The whole table, each row as soon as it is measured."""
    print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| what | measure | against | ours | theirs | ratio | reach | met |")
    print("|---|---|---|---|---|---|---|---|")
    benches = [bench_mole, bench_clip, bench_kd, bench_views, bench_vision_step, bench_inference,
               bench_compile]
    for name in names:
        for bench in tqdm(benches, desc=name, leave=False):
            for row in bench(SHAPES[name]):
                tqdm.write(row.line())
    for row in bench_step():
        print(row.line())
    print("\n" + "\n".join(scaling()))


def main(argv: list[str] | None = None) -> None:
    """One of the four programs."""
    parser = Parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--differences", action="store_true")
    parser.add_argument("--direction", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.differences:
        print(differences())
    elif args.profile:
        print(profile_tiny())
    elif args.direction:
        direction()
    else:
        print_table(args.shapes)


if __name__ == "__main__":
    run(main)
