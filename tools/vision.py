"""The vision side of the bench: the student with all that belongs to it, trained and at inference.

Letters: B images, n tokens and d width of the student, m teachers.
"""

from collections.abc import Callable

import torch

from kd_loss import kd_loss, token_weights
from model import Student
from plumbing.build import build_encoder, build_teachers
from plumbing.config import FULL, TINY
from plumbing.sharding import recompute
from teachers import ClipEncoder
from tools.measuring import (DEVICE, SHAPES, Row, Shape, backward, count_flops, kd_tensors,
                             peak_bytes, seconds, uint8_images)
from tools.plain_forms import LoopMoLE, eager_blocks, pil_views, stacked_kd_loss


def expert_options(s: Shape, dropout: float) -> dict:
    """MoLE's options at a shape."""
    return dict(num_experts=3, rank=s.rank, alpha=1.0, dropout=dropout,
                router_grad="straight_through", init="zero")


def student_with_experts(s: Shape) -> Student:
    """A student at a shape, on the device."""
    student = Student(s.clip).add_experts(form="ffn", **expert_options(s, s.dropout))
    return student.to(DEVICE)


# ------------------------------------------------------------------------------------------------
# The whole vision step


def plain_student(s: Shape) -> Student:
    """A student whose FFNs have the plain MoLE, as in stage 1."""
    student = Student(s.clip).requires_grad_(False)
    for block in student.net.blocks:
        block.mlp = LoopMoLE(block.mlp, student.dim, 3, s.rank, s.dropout)
    return student.to(DEVICE)


def fast_student(s: Shape) -> Student:
    """A student of ours, as in stage 1."""
    student = student_with_experts(s).requires_grad_(False)
    for block in student.net.blocks:
        for module in block.mlp.new_modules():
            module.requires_grad_(True)
    return student


def vision_forms(s: Shape) -> dict[str, Callable]:
    """Views, student forward + backward, CLIP teacher, token weights and loss, in each form."""
    images = uint8_images(s.batch, s.pixels)
    clip = ClipEncoder(s.clip).to(DEVICE).eval()
    ours, recomputed, plain = fast_student(s).train(), fast_student(s).train(), plain_student(s)
    recompute(recomputed.net.blocks)
    plain.train()
    floor = Student(s.clip).requires_grad_(False).to(DEVICE).train()
    # so that backward goes as far as to the first block's LoRA
    floor.net.blocks[0].mlp.fc2.bias.requires_grad_()
    _, others, _, w_tea = kd_tensors(s.batch, clip.num_tokens, clip.dim)

    def fast(student: Student) -> None:
        with torch.no_grad():
            output = clip(images)
        V_s = student(images)                                                   # (B, n, d)
        V_t = {**others, "clip": output.tokens}                                 # m x (B, n, d)
        w_tok = token_weights(output.cls_scores, "paper")                       # (B, n)
        kd_loss(dict.fromkeys(V_t, V_s), V_t, w_tok, w_tea)[0].backward()

    def slow() -> None:
        view = pil_views(images, s.views[:1], clip.mean, clip.std)[0]
        with torch.no_grad():
            x, maps = eager_blocks(clip, images)
        V_s = plain.net.forward_features(view)[:, 1:]                           # (B, n, d)
        w_tok = maps[-1][:, :, 0, 1:].mean(dim=1)                               # (B, n)
        stacked_kd_loss(V_s, {**others, "clip": x[:, 1:]}, w_tok, w_tea).backward()

    def networks() -> None:
        with torch.no_grad():
            clip.net.forward_features(clip.view(images))
        backward(floor(images))

    return {"ours": lambda: fast(ours), "plain": slow, "floor": networks,
            "recomputed": lambda: fast(recomputed)}


def bench_vision_step(s: Shape) -> list[Row]:
    """All fast forms together against all plain ones.

    The floor is the two networks alone, without experts, [CLS] row, weights and L_kd. At ViT-L also
    with each block recomputed, as FULL runs.
    """
    forms = vision_forms(s)
    large = s is SHAPES["ViT-L"]
    what = {"ours": f"whole vision step, {s.name}"}
    if large:
        what["recomputed"] = f"the same with --recompute, {s.name}"
    else:
        del forms["recomputed"]
    time = seconds(forms, s.repeats)
    memory = {name: peak_bytes(form) for name, form in forms.items()}
    floor = "floor: CLIP and student without extras"
    rows = []
    for name, title in what.items():
        for measure, cost, reach in (("time", time, 0.6), ("peak memory", memory, 0.4)):
            rows.append(Row(title, measure, "plain forms together", cost[name], cost["plain"],
                            reach if large else None))
            rows.append(Row(title, measure, floor, cost[name], cost["floor"], None))
    return rows


# ------------------------------------------------------------------------------------------------
# At inference, and compiled


@torch.no_grad()
def bench_inference(s: Shape) -> list[Row]:
    """What runs after training: the student with its experts, against CLIP alone."""
    images = uint8_images(s.batch, s.pixels)
    clip = Student(s.clip).to(DEVICE).eval()
    student = student_with_experts(s).eval()
    time = seconds({"ours": lambda: student(images), "clip": lambda: clip(images)}, 2 * s.repeats)
    what = f"student at inference, {s.name}"
    rows = [Row(what, "time", "CLIP alone", time["ours"], time["clip"], 1.05)]
    if s is SHAPES["tiny"]:
        teachers = build_teachers(TINY, {}).to(DEVICE)
        forms = {"ours": lambda: student(images), "all": lambda: teachers(images, [])}
        time = seconds(forms, 2 * s.repeats)
        rows.append(Row(what, "time", "all teachers", time["ours"], time["all"], None))
    else:
        one, all_teachers = full_flops(s)
        rows.append(Row(what, "FLOPs", "all teachers (EVA-02-L, ConvNeXt-XXL at 1024 px)", one,
                        all_teachers, None))
    return rows


def full_flops(s: Shape) -> tuple[float, float]:
    """FLOPs per image of the student, and of all three teachers, at their true sizes.

    They are counted without computing, on the meta device.
    """
    flops = []
    with torch.device("meta"):
        student = Student(s.clip).add_experts(form="ffn", **expert_options(s, s.dropout))
        for encoder in (student, *(build_encoder(FULL, name, {}) for name in FULL.teachers)):
            image = torch.empty(1, 3, encoder.image_size, encoder.image_size)
            flops.append(count_flops(lambda: encoder.net.forward_features(image)))
    return flops[0], sum(flops[1:])


def bench_compile(s: Shape) -> list[Row]:
    """torch.compile of the student, forward + backward; only on CUDA, which it is meant for."""
    if DEVICE != "cuda":
        return []
    images = uint8_images(s.batch, s.pixels)
    eager = student_with_experts(s).train()
    compiled = student_with_experts(s).train()
    compiled.compile()
    forms = {"ours": lambda: backward(compiled(images)), "eager": lambda: backward(eager(images))}
    time = seconds(forms, 3 * s.repeats)
    return [Row(f"student compiled, {s.name}", "time", "eager", time["ours"], time["eager"], None)]
