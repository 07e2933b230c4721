"""The distillation loss of MoVE-KD: token weights, teacher weights, weighted MSE.  Pure functions; no model is seen here.

    L_kd = sum_i W^tea_i  sum_j (W^tok_j + 1/n)  MSE(V^t_ij, V^s_j)                                    paper, KD loss

Letters: B images, m teachers (CLIP first), n student tokens, d student width, h attention heads of CLIP.
V^s (B, n, d) are the student's tokens, V^t_i (B, n, d) teacher i's tokens as its encoder adapter maps them.
"""

import torch


def token_weights(cls_scores: torch.Tensor) -> torch.Tensor:
    """W^tok: how much each visual token matters, by what the frozen CLIP's [CLS] token looks at.  (B, h, 1 + n) -> (B, n)

        W^tok = softmax_j( (V^cls W^Q) (V^res_j W^K)^T / sqrt(d_head) )

    cls_scores are those scaled scores before the softmax, over all keys with [CLS] first. The softmax runs over the n visual
    tokens only; the heads are averaged after it, so that the weights are a distribution: they sum to 1.
    """
    return cls_scores[..., 1:].float().softmax(dim=-1).mean(dim=1)                      # (B, n)


def teacher_weights(cls: torch.Tensor, teachers: dict[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """W^tea: how much each teacher counts, per image.  cls (B, d), m x (B, n, d) -> (B, m), rows sum to 1

        W^tea_i = (1 - alpha) softmax_i( mean_j  V^cls . V^t_ij / sqrt(d) )   over the non-CLIP teachers;   W^tea_clip = alpha

    CLIP's share is fixed and high, for the LLM was trained on CLIP's tokens. The mean over j is taken first: the mean of the
    dot products is the dot product with the mean. No gradient: an adapter must not lower the loss by moving weight to the
    teacher that is easy to imitate.
    """
    first, *others = teachers
    if first != "clip":
        raise ValueError(f"the first teacher must be 'clip', not {first!r}: the other weights are relative to it")
    clip = cls.new_full((len(cls), 1), alpha if others else 1.0, dtype=torch.float32)   # (B, 1)
    if not others:
        return clip
    mean = torch.stack([teachers[name].detach().float().mean(dim=1) for name in others], dim=1)   # (B, m-1, d)
    scores = (mean @ cls.detach().float()[:, :, None])[:, :, 0] / cls.shape[-1] ** 0.5  # (B, m-1)
    return torch.cat([clip, (1 - alpha) * scores.softmax(dim=-1)], dim=1)               # (B, m)


def kd_loss(student: torch.Tensor, teachers: dict[str, torch.Tensor], w_tok: torch.Tensor,
            w_tea: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_kd, and each teacher's own loss before its W^tea.  (B, n, d), m x (B, n, d), (B, n), (B, m) -> (), m x ()

    Streams over the teachers: one (B, n) map of errors at a time, never a (B, n, d, m) stack. fp32 whatever comes in.
    Both are means over the batch. Only images that exist may be passed: a text-only sample has no KD term.
    """
    weight = w_tok + 1 / student.shape[1]                                               # (B, n)
    total, per_teacher = student.new_zeros((), dtype=torch.float32), {}
    for i, (name, tokens) in enumerate(teachers.items()):
        # MSE(V^t_ij, V^s_j), the mean over d
        mse = (tokens.float() - student.float()).square().mean(dim=-1)                  # (B, n)
        # sum_j (W^tok_j + 1/n) MSE_ij
        loss = (weight * mse).sum(dim=-1)                                               # (B,)
        total = total + (w_tea[:, i] * loss).mean()                                     # ()
        per_teacher[name] = loss.detach().mean()                                        # ()
    return total, per_teacher
