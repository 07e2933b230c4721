"""The distillation loss of MoVE-KD: token weights, teacher weights, weighted MSE.

    L_kd = sum_i W^tea_i  sum_j (W^tok_j + 1/n)  MSE(V^t_ij, V^s_j)                  paper, KD loss

Pure functions on tensors. Where the paper and the released code differ there is a switch: "paper"
is the formula, "released" the arithmetic of their code, "uniform" the ablation.

Letters: B images, m teachers, n tokens and d width of the student, h heads of CLIP, n_i tokens and
d_i width of teacher i. V^s are the student's tokens, V^t_i those of teacher i behind its adapter.
"""

from typing import Literal

import torch
import torch.nn.functional as F

TokenWeight = Literal["paper", "released", "uniform"]
TeacherWeight = Literal["paper", "released", "uniform"]


def token_weights(cls_scores: torch.Tensor, form: TokenWeight) -> torch.Tensor:
    """Return W^tok, the weight of each visual token: how much frozen CLIP's [CLS] attends to it.

        W^tok = softmax_j( (V^cls W^Q) (V^res_j W^K)^T / sqrt(d/h) )             paper, token weight

    (B, h, 1 + n) -> (B, n), rows sum to 1. cls_scores are those scaled scores before the softmax,
    over all keys, [CLS] first.

    "paper"     softmax over the n visual tokens only, then the mean over the heads
    "released"  softmax over all 1 + n keys, mean over heads, [CLS] dropped, and softmax AGAIN over
                these probabilities. They lie in [0, 1], so the result is within a factor e of
                uniform for any attention, and L_kd close to that of "uniform".
    "uniform"   1/n, the ablation at the same total weight
    """
    if form == "uniform":
        n = cls_scores.shape[-1] - 1
        return cls_scores.new_full((len(cls_scores), n), 1 / n, dtype=torch.float32)        # (B, n)
    if form == "released":
        p = cls_scores.float().softmax(dim=-1).mean(dim=1)[:, 1:]                           # (B, n)
        return p.softmax(dim=-1)                                                            # (B, n)
    return cls_scores[..., 1:].float().softmax(dim=-1).mean(dim=1)                          # (B, n)


def teacher_weights(cls: torch.Tensor, teachers: dict[str, torch.Tensor], clip_share: float,
                    form: TeacherWeight, *, detach: bool, collapse: bool) -> torch.Tensor:
    """Return W^tea, the weight of each teacher in each image; CLIP's is fixed, clip_share.

        W^tea_clip = clip_share
        W^tea_i = (1 - clip_share) softmax_i( mean_j V^cls . V^t_ij / sqrt(d) )
                                                                               paper, teacher weight
    cls V^cls (B, d), teachers m x V^t_i (B, n, d) -> (B, m), rows sum to 1. The softmax runs over
    the teachers other than CLIP, which must come first (ValueError). CLIP's weight is high so that
    the student stays near CLIP.

    form      "released" leaves out the 1/sqrt(d): the softmax saturates. "uniform": equal weights
    detach    no gradient: an adapter must not lower the loss by moving weight to the teacher that
              is easy to imitate. The released code does not detach, and its adapters do that.
    collapse  apply `flatten_collapsed`, as the released code does
    """
    names = list(teachers)
    if names[0] != "clip":
        raise ValueError(f"the first teacher must be 'clip', not {names[0]!r}")
    others = names[1:]
    # CLIP's column, the same for every image
    share = clip_share if others else 1.0
    clip = cls.new_full((len(cls), 1), share, dtype=torch.float32)                          # (B, 1)
    if not others:
        return clip
    if form == "uniform":
        equal = (1 - clip) / len(others)                                                    # (B, 1)
        return torch.cat([clip, equal.expand(-1, len(others))], dim=1)                      # (B, m)

    # The other columns: how well each teacher's tokens agree with CLIP's [CLS].
    # mean_j V^cls . V^t_ij = V^cls . mean_j V^t_ij, so the mean comes first
    means = [teachers[name].float().mean(dim=1) for name in others]
    mean = torch.stack(means, dim=1)                                                 # (B, m - 1, d)
    if detach:
        mean = mean.detach()                                                         # (B, m - 1, d)
    scores = (mean @ cls.detach().float()[:, :, None])[:, :, 0]                      # (B, m - 1)
    if form == "paper":
        scores = scores / cls.shape[-1] ** 0.5                                       # (B, m - 1)
    w = scores.softmax(dim=-1)                                                       # (B, m - 1)
    if collapse:
        w = flatten_collapsed(w)                                                     # (B, m - 1)
    return torch.cat([clip, (1 - clip_share) * w], dim=1)                            # (B, m)


def flatten_collapsed(w: torch.Tensor) -> torch.Tensor:
    """Flatten the softmax weights of a batch in which one teacher has almost all of it.

    (B, m - 1) -> (B, m - 1). If the batch mean of any teacher's weight exceeds 0.8, the weights
    become softmax(w + 0.2). The 0.2 cancels and the second softmax flattens: the weights jump, and
    depend on the other images of the batch. Images that collapse to different teachers escape it.
    """
    collapsed = w.mean(dim=0).max() > 0.8                                                   # ()
    return (w + 0.2).softmax(dim=-1) if collapsed else w                             # (B, m - 1)


def kd_loss(student_tokens: dict[str, torch.Tensor], targets: dict[str, torch.Tensor],
            w_tok: torch.Tensor, w_tea: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Return L_kd, and each teacher's own loss before its W^tea: means over the images, in fp32.

    student_tokens  m x (B, n, d), compared with each teacher: V^s itself in the paper's direction,
                    H_i(V^s) (B, n_i, d_i) in AM-RADIO's
    targets         m x (B, n, d), V^t_i; (B, n_i, d_i) in AM-RADIO's direction
    w_tok           W^tok (B, n);    w_tea  W^tea (B, m)
    returns         L_kd (), and m x () by the teachers' names

    It streams over the teachers: one (B, n) map of errors at a time, never a (B, n, d, m) stack.
    """
    L_kd = w_tea.new_zeros(())                                                              # ()
    per_teacher = {}
    for i, (name, V_t) in enumerate(targets.items()):
        # W^tok_j + 1/n
        weight = on_grid(w_tok, V_t.shape[1]) + 1 / V_t.shape[1]                            # (B, n)
        mse = token_errors(student_tokens[name], V_t)                                       # (B, n)
        # sum_j (W^tok_j + 1/n) MSE_ij
        loss = (weight * mse).sum(dim=-1)                                                   # (B,)
        # sum_i W^tea_i ...
        L_kd = L_kd + (w_tea[:, i] * loss).mean()                                           # ()
        per_teacher[name] = loss.mean().detach()                                            # ()
    return L_kd, per_teacher


def token_errors(V_s: torch.Tensor, V_t: torch.Tensor) -> torch.Tensor:
    """Return MSE(V^t_ij, V^s_j) of each token, the mean over d: 2 x (B, n, d) -> (B, n) in fp32"""
    # mse_loss keeps no (B, n, d) difference for backward. sum() / d in place of mean(): backward
    # then expands a (B, n) gradient, and does not store a (B, n, d) one.
    mse = F.mse_loss(V_s.float(), V_t.float(), reduction="none")                         # (B, n, d)
    return mse.sum(dim=-1) / V_t.shape[-1]                                                  # (B, n)


def on_grid(w_tok: torch.Tensor, n: int) -> torch.Tensor:
    """Resize token weights from one square grid to another: (B, n_old) -> (B, n), rows sum to 1"""
    if w_tok.shape[1] == n:
        return w_tok                                                                        # (B, n)
    old, new = round(w_tok.shape[1] ** 0.5), round(n ** 0.5)
    grid = w_tok.unflatten(1, (1, old, old))                                     # (B, 1, old, old)
    w = F.interpolate(grid, (new, new), mode="bilinear", antialias=True).flatten(1)         # (B, n)
    return w / w.sum(dim=1, keepdim=True)                                                   # (B, n)
