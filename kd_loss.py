"""The distillation loss of MoVE-KD: token weights, teacher weights, weighted MSE.  Pure functions; no model is seen here.

    L_kd = sum_i W^tea_i  sum_j (W^tok_j + 1/n)  MSE(V^t_ij, V^s_j)                                    paper, KD loss

Each place where the paper and the released code differ is a switch: "paper" is the formula, "released" their arithmetic,
"uniform" the ablation (same total weight, no preference).

Letters: B images, m teachers (CLIP first), n student tokens, d student width, h attention heads of CLIP, n_i, d_i of teacher i.
V^s (B, n, d) are the student's tokens, V^t_i (B, n, d) teacher i's tokens as its encoder adapter maps them.
"""

from typing import Literal

import torch
import torch.nn.functional as F

TokenWeight = Literal["paper", "released", "uniform"]
TeacherWeight = Literal["paper", "released", "uniform"]


def token_weights(cls_scores: torch.Tensor, form: TokenWeight = "paper") -> torch.Tensor:
    """W^tok: how much each visual token matters, by what the frozen CLIP's [CLS] token looks at.  (B, h, 1 + n) -> (B, n), rows sum to 1

        W^tok = softmax_j( (V^cls W^Q) (V^res_j W^K)^T / sqrt(d_head) )

    cls_scores are those scaled scores before the softmax, over all keys with [CLS] first. "paper": the softmax runs over the n
    visual tokens only; the heads are averaged after it, so that the weights are a distribution.
    "released": softmax over all 1 + n keys, mean over heads, [CLS] dropped, and softmax AGAIN over these probabilities. They lie in
    [0, 1], so the result is within a factor e of uniform whatever CLIP looks at, and in effect only doubles L_kd: of a Zipf-like
    attention over 576 tokens the largest weight is 83 times the mean by the paper, 1.13 times as released
    (`python -m tools.bench --differences`). "uniform": 1/n, the ablation at the same total weight.
    """
    if form == "uniform":
        n = cls_scores.shape[-1] - 1
        return cls_scores.new_full((len(cls_scores), n), 1 / n, dtype=torch.float32)    # (B, n)
    if form == "released":
        probabilities = cls_scores.float().softmax(dim=-1).mean(dim=1)[:, 1:]           # (B, n)
        return probabilities.softmax(dim=-1)                                            # (B, n)
    return cls_scores[..., 1:].float().softmax(dim=-1).mean(dim=1)                      # (B, n)


def teacher_weights(cls: torch.Tensor, teachers: dict[str, torch.Tensor], alpha: float, form: TeacherWeight = "paper",
                    detach: bool = True, collapse: bool = False) -> torch.Tensor:
    """W^tea: how much each teacher counts, per image.  cls (B, d), m x (B, n, d) -> (B, m), rows sum to 1

        W^tea_i = (1 - alpha) softmax_i( mean_j  V^cls . V^t_ij / sqrt(d) )   over the non-CLIP teachers;   W^tea_clip = alpha

    CLIP's share is fixed and high, for the LLM was trained on CLIP's tokens. The mean over j is taken first: the mean of the
    dot products is the dot product with the mean. Every number below: `python -m tools.bench --differences`.

    form      "released" leaves out the 1/sqrt(d): the softmax saturates. At d = 1024 one of two teachers takes more than 0.8 in 92 % of
              random draws, scaled in 0.1 %.
              "uniform": each 1/(m - 1), the ablation.
    detach    no gradient (default): an adapter must not lower the loss by moving weight to the teacher that is easy to imitate.
              Undetached and unscaled (released), the largest weight goes from 0.57 to 0.98 in 50 steps; detached and scaled, 0.51 to 0.59.
    collapse  the released code's remedy: if the batch mean of the largest softmax weight exceeds 0.8, the weights become softmax(w + 0.2).
              The 0.2 cancels and the second softmax flattens, so the weights jump (0.7999 stays, 0.8001 becomes 0.646), and an image's
              weights depend on its batch mates.
    """
    first, *others = teachers
    if first != "clip":
        raise ValueError(f"the first teacher must be 'clip', not {first!r}: the other weights are relative to it")
    clip = cls.new_full((len(cls), 1), alpha if others else 1.0, dtype=torch.float32)   # (B, 1)
    if not others:
        return clip
    if form == "uniform":
        return torch.cat([clip, ((1 - clip) / len(others)).expand(-1, len(others))], dim=1)          # (B, m)
    mean = torch.stack([teachers[name].float().mean(dim=1) for name in others], dim=1)  # (B, m-1, d)
    if detach:
        mean = mean.detach()                                                            # (B, m-1, d)
    scores = (mean @ cls.detach().float()[:, :, None])[:, :, 0]                         # (B, m-1)
    if form == "paper":
        scores = scores / cls.shape[-1] ** 0.5                                          # (B, m-1)
    w = scores.softmax(dim=-1)                                                          # (B, m-1)
    if collapse and w.amax(dim=-1).mean() > 0.8:
        w = (w + 0.2).softmax(dim=-1)                                                   # (B, m-1)
    return torch.cat([clip, (1 - alpha) * w], dim=1)                                    # (B, m)


def kd_loss(student: dict[str, torch.Tensor], teachers: dict[str, torch.Tensor], w_tok: torch.Tensor,
            w_tea: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_kd, and each teacher's own loss before its W^tea.  m x (B, n, d), m x (B, n, d), (B, n), (B, m) -> (), m x ()

    `student` holds what is compared with each teacher: V^s itself in the paper's direction, where the adapters bring the teachers to the
    student; H_i(V^s) (B, n_i, d_i) in the other one. Streams over the teachers: one (B, n) map of errors at a time, never a
    (B, n, d, m) stack. fp32 whatever comes in.
    Both results are means over the batch. Only images that exist may be passed: a text-only sample has no KD term.
    """
    total, per_teacher = w_tea.new_zeros(()), {}
    for i, (name, tokens) in enumerate(teachers.items()):
        weight = on_grid(w_tok, tokens.shape[1]) + 1 / tokens.shape[1]                  # (B, n)
        # MSE(V^t_ij, V^s_j), the mean over d. mse_loss keeps no difference for backward, and the gradient of a sum, unlike that of mean(),
        # is no (B, n, d) tensor of its own
        mse = F.mse_loss(student[name].float(), tokens.float(), reduction="none").sum(dim=-1) / tokens.shape[-1]    # (B, n)
        # sum_j (W^tok_j + 1/n) MSE_ij
        loss = (weight * mse).sum(dim=-1)                                               # (B,)
        total = total + (w_tea[:, i] * loss).mean()                                     # ()
        per_teacher[name] = loss.detach().mean()                                        # ()
    return total, per_teacher


def on_grid(w_tok: torch.Tensor, n: int) -> torch.Tensor:
    """Token weights of one square grid on another, rows still summing to 1: (B, n_old) -> (B, n)."""
    if w_tok.shape[1] == n:
        return w_tok                                                                    # (B, n)
    old, new = round(w_tok.shape[1] ** 0.5), round(n ** 0.5)
    w = F.interpolate(w_tok.unflatten(1, (1, old, old)), (new, new), mode="bilinear", antialias=True).flatten(1)    # (B, n)
    return w / w.sum(dim=1, keepdim=True)                                               # (B, n)
