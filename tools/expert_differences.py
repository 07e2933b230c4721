"""Rows 1-3 of the table "paper and released code differ" (tools/differences.py): the experts.

Letters: n tokens and d width of the student, E experts, r rank.
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from model import MoVEKD, Student
from mole import MoLE, MoleForm, MoleInit, ReleasedMoLE, RoutedFFN, mole_layers
from real.encoder_weights import load_net
from teachers import Teachers
from tools.measuring import SHAPES, count, table_line, uint8_images
from tools.tiny_step import FEW, TinyStep

VIT_L = SHAPES["ViT-L"].clip


def vit_l_mole(form: MoleForm, num_experts: int, alpha: float, init: MoleInit) -> RoutedFFN:
    """One MoLE layer at ViT-L's sizes, r = 32."""
    ffn = Student(VIT_L + " depth=2").net.blocks[0].mlp
    mole = {"ffn": MoLE, "fc1_fc2": ReleasedMoLE}[form]
    return mole(ffn, 1024, num_experts=num_experts, rank=32, alpha=alpha, dropout=0.0,
                router_grad="straight_through", init=init)


def parameters_row() -> str:
    """Row 1, the size of the experts; the router does not count."""
    sizes = []
    for form in ("ffn", "fc1_fc2"):
        _, *experts = vit_l_mole(form, 3, 1.0, "zero").new_modules()
        sizes.append(sum(count(expert.parameters()) for expert in experts))
    paper, released = sizes
    return table_line(1, "LoRA parameters per layer, d = 1024, r = 32, E = 3", f"{paper:,}",
                      f"{released:,}", "as paper")


def rank_row() -> str:
    """Row 1, what one expert can change."""
    return table_line(1, "rank of one expert's change of the FFN, r = 32", rank_of_change("ffn"),
                      rank_of_change("fc1_fc2"), "as paper")


@torch.no_grad()
def rank_of_change(form: MoleForm) -> int:
    """The numerical rank of F*(x) - F(x) over 1,024 tokens of one expert.

    It is the number of singular values above 1 % of the largest; d = 1024, r = 32.
    """
    torch.manual_seed(0)
    layer = vit_l_mole(form, 1, 32.0, "kaiming")
    x = torch.randn(1, 1024, 1024)
    s = torch.linalg.svdvals((layer(x) - layer.ffn(x))[0])
    return int((s > 0.01 * s[0]).sum())


def router_row() -> str:
    """Row 2, what trains the router."""
    norms = {}
    for form in ("none", "straight_through"):
        torch.manual_seed(0)
        step = TinyStep(dataclasses.replace(FEW, mole_router_grad=form))
        for layer in mole_layers(step.model):
            nn.init.normal_(layer.lora.up.weight, std=0.05)
        norms[form] = router_gradients(step.model.eval(), step.teachers, step.batch)
    return table_line(2, "router gradient norm by source, tiny", norms["none"], "as paper",
                      norms["straight_through"])


def router_gradients(model: MoVEKD, teachers: Teachers, batch: dict) -> str:
    """The norm of the routers' gradient from L_text, L_kd, L_balance."""
    routers = []
    for layer in mole_layers(model):
        routers += layer.router.parameters()
    terms = model(batch, teachers)
    norms = []
    for name in ("L_text", "L_kd", "L_balance"):
        found = torch.autograd.grad(terms[name], routers, retain_graph=True, allow_unused=True)
        used = [gradient.flatten() for gradient in found if gradient is not None]
        norm = torch.cat([torch.zeros(1), *used]).norm().item()
        norms.append(f"{name} {norm:.2g}")
    return ", ".join(norms)


def start_row(clip: str, weights: Path, images: torch.Tensor) -> str:
    """Row 3, how far from CLIP the student starts."""
    vit_l_images = uint8_images(1, 336).cpu()
    cells = []
    for form, init, digits in (("fc1_fc2", "kaiming", 1), ("ffn", "zero", 0)):
        tiny = distance_at_start(clip, weights, 8, images, form, init)
        vit_l = distance_at_start(VIT_L, None, 32, vit_l_images, form, init)
        cells.append(f"{100 * tiny:.{digits}f} % / {100 * vit_l:.{digits}f} %")
    return table_line(3, "distance of the student from CLIP at step 0, tiny / ViT-L (random "
                      "weights)", "0", *cells)


@torch.no_grad()
def distance_at_start(spec: str, weights: Path | None, rank: int, images: torch.Tensor,
                      form: MoleForm, init: MoleInit) -> float:
    """|V^s - V^clip| / |V^clip| at step 0, with the released LoRA scale of 1/32."""
    torch.manual_seed(0)
    clip = Student(spec, load_net(spec, weights)).eval()
    student = Student(spec, load_net(spec, weights)).eval()
    student.load_state_dict(clip.state_dict())
    student.add_experts(form=form, num_experts=3, rank=rank, alpha=rank / 32, dropout=0.0,
                        router_grad="straight_through", init=init).eval()
    V_clip = clip(images)                                                           # (B, n, d)
    return ((student(images) - V_clip).norm() / V_clip.norm()).item()
