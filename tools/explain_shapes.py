"""Names, letters and sizes of the tensors of one step, for tools/explain.py."""

import torch

from model import MoVEKD
from teachers import TeacherOutput


def text_shapes(model: MoVEKD, batch: dict, V_s: torch.Tensor, logits: torch.Tensor,
                probs: list[torch.Tensor]) -> list[tuple[str, str, tuple]]:
    """Names, letters and sizes on the way from the image to the text's logits."""
    projected = model.vlm.projector(V_s)
    shapes = [
        ("images, uint8", "(B, 3, R, R)", batch["images"].shape),
        ("student.view(images)", "(B, 3, R_s, R_s)", model.vlm.student.view(batch["images"]).shape),
        ("router p, each of L layers", "(B, 1 + n, E)", probs[0].shape if probs else ()),
        ("V^s", "(B, n, d)", V_s.shape),
        ("projected", "(B, n, D)", projected.shape),
        ("input_ids, labels", "(B, T)", batch["input_ids"].shape),
        ("logits", "(B, T, V)", logits.shape)]
    return [row for row in shapes if row[2]]


def teacher_shapes(outputs: dict[str, TeacherOutput], student: dict, targets: dict,
                   w_tok: torch.Tensor, w_tea: torch.Tensor) -> list[tuple[str, str, tuple]]:
    """Names, letters and sizes of the distillation."""
    clip = outputs["clip"]
    shapes = [("CLIP's V^cls", "(B, d)", clip.cls.shape),
              ("[CLS] row before the softmax", "(B, h, 1 + n)", clip.cls_scores.shape),
              ("W^tok", "(B, n)", w_tok.shape)]
    for name, output in outputs.items():
        shapes.append((f"teacher {name}'s tokens", "(B, n_i, d_i)", output.tokens.shape))
        shapes.append((f"compared: student's side, {name}", "(B, n, d)", student[name].shape))
        shapes.append((f"compared: V^t of {name}", "(B, n, d)", targets[name].shape))
    return shapes + [("W^tea", "(B, m)", w_tea.shape), ("L_text, L_kd, L_balance", "()", (1,))]
