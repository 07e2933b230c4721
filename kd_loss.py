"""The distillation loss of MoVE-KD: token weights, teacher weights, weighted MSE.

    L_kd = sum_i W^tea_i  sum_j (W^tok_j + 1/n)  MSE(V^t_ij, V^s_j)                  paper, KD loss

Pure functions on tensors; no model is seen here. Each place where the paper and the released code
differ is a switch: "paper" is the formula, "released" their arithmetic, "uniform" the ablation.

Letters: B images, m teachers (CLIP first), n tokens and d width of the student, h heads of CLIP,
n_i tokens and d_i width of teacher i. V^s (B, n, d) are the student's tokens, V^t_i (B, n, d) the
tokens of teacher i as its encoder adapter maps them.
"""

from typing import Literal

import torch
import torch.nn.functional as F

TokenWeight = Literal["paper", "released", "uniform"]
TeacherWeight = Literal["paper", "released", "uniform"]


def token_weights(cls_scores: torch.Tensor, form: TokenWeight) -> torch.Tensor:
    """W^tok says how much each visual token matters: what the frozen CLIP's [CLS] looks at.

        W^tok = softmax_j( (V^cls W^Q) (V^res_j W^K)^T / sqrt(d/h) )             paper, token weight

    (B, h, 1 + n) -> (B, n), rows sum to 1. cls_scores are those scaled scores before the softmax,
    over all keys, [CLS] first.

    "paper": the softmax runs over the n visual tokens only; the heads are averaged after it, so
    that the weights are a distribution.
    "released": softmax over all 1 + n keys, mean over heads, [CLS] dropped, and softmax AGAIN over
    these probabilities. They lie in [0, 1], so the result is within a factor e of uniform whatever
    CLIP looks at: in effect it only doubles L_kd.
    "uniform": 1/n, the ablation at the same total weight.
    """
    if form == "uniform":
        n = cls_scores.shape[-1] - 1
        return cls_scores.new_full((len(cls_scores), n), 1 / n, dtype=torch.float32)        # (B, n)
    if form == "released":
        p = cls_scores.float().softmax(dim=-1).mean(dim=1)[:, 1:]                           # (B, n)
        return p.softmax(dim=-1)                                                            # (B, n)
    return cls_scores[..., 1:].float().softmax(dim=-1).mean(dim=1)                          # (B, n)


def teacher_weights(cls: torch.Tensor, teachers: dict[str, torch.Tensor], clip_share: float,
                    form: TeacherWeight, detach: bool, collapse: bool) -> torch.Tensor:
    """W^tea says how much each teacher counts in each image: CLIP has a fixed share.

        W^tea_clip = clip_share
        W^tea_i = (1 - clip_share) softmax_i( mean_j V^cls . V^t_ij / sqrt(d) )
                                                                               paper, teacher weight
    cls V^cls (B, d), teachers m x V^t_i (B, n, d) -> (B, m), rows sum to 1. The softmax runs over
    the teachers other than CLIP, whose share is high, for the LLM was trained on CLIP's tokens.

    form      "released" leaves out the 1/sqrt(d): the softmax saturates. "uniform": equal shares.
    detach    no gradient: an adapter must not lower the loss by moving weight to the teacher that
              is easy to imitate. The released code does not detach, and its adapters do.
    collapse  the released code's remedy: the batch mean of EACH teacher's softmax weight; if the
              largest of these means exceeds 0.8, the weights become softmax(w + 0.2). The 0.2
              cancels and the second softmax flattens, so the weights jump, and an image's weights
              depend on its batch mates. Images that collapse to different teachers escape it.

    Raises ValueError if CLIP is not the first teacher.
    """
    names = list(teachers)
    if names[0] != "clip":
        raise ValueError(f"the first teacher must be 'clip', not {names[0]!r}")
    others = names[1:]
    share = clip_share if others else 1.0
    clip = cls.new_full((len(cls), 1), share, dtype=torch.float32)                          # (B, 1)
    if not others:
        return clip
    if form == "uniform":
        equal = (1 - clip) / len(others)                                                    # (B, 1)
        return torch.cat([clip, equal.expand(-1, len(others))], dim=1)                      # (B, m)

    # mean_j V^cls . V^t_ij = V^cls . mean_j V^t_ij, so the mean comes first
    means = [teachers[name].float().mean(dim=1) for name in others]
    mean = torch.stack(means, dim=1)                                                 # (B, m - 1, d)
    if detach:
        mean = mean.detach()                                                         # (B, m - 1, d)
    scores = (mean @ cls.detach().float()[:, :, None])[:, :, 0]                      # (B, m - 1)
    if form == "paper":
        scores = scores / cls.shape[-1] ** 0.5                                       # (B, m - 1)
    w = scores.softmax(dim=-1)                                                       # (B, m - 1)
    if collapse and w.mean(dim=0).max() > 0.8:
        w = (w + 0.2).softmax(dim=-1)                                                # (B, m - 1)
    return torch.cat([clip, (1 - clip_share) * w], dim=1)                            # (B, m)


def kd_loss(student: dict[str, torch.Tensor], teachers: dict[str, torch.Tensor],
            w_tok: torch.Tensor, w_tea: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """L_kd, and each teacher's own loss before its W^tea; both are means over the images, in fp32.

    student   m x (B, n, d), what is compared with each teacher: V^s itself in the paper's
              direction, H_i(V^s) (B, n_i, d_i) in AM-RADIO's
    teachers  m x (B, n, d), V^t_i; (B, n_i, d_i) in AM-RADIO's direction
    w_tok     W^tok (B, n);    w_tea  W^tea (B, m)
    returns   L_kd (), and m x () by the teachers' names

    It streams over the teachers: one (B, n) map of errors at a time, never a (B, n, d, m) stack.
    Pass only images that exist: a text-only sample has no KD term.
    """
    L_kd = w_tea.new_zeros(())                                                              # ()
    per_teacher = {}
    for i, (name, V_t) in enumerate(teachers.items()):
        # W^tok_j + 1/n
        weight = on_grid(w_tok, V_t.shape[1]) + 1 / V_t.shape[1]                            # (B, n)
        mse = token_errors(student[name], V_t)                                              # (B, n)
        # sum_j (W^tok_j + 1/n) MSE_ij
        loss = (weight * mse).sum(dim=-1)                                                   # (B,)
        # sum_i W^tea_i ...
        L_kd = L_kd + (w_tea[:, i] * loss).mean()                                           # ()
        per_teacher[name] = loss.mean().detach()                                            # ()
    return L_kd, per_teacher


def token_errors(V_s: torch.Tensor, V_t: torch.Tensor) -> torch.Tensor:
    """MSE(V^t_ij, V^s_j) of each token, the mean over d, in fp32: 2 x (B, n, d) -> (B, n)"""
    # A sum and a division, not mean(): the gradient of a sum is no (B, n, d) tensor of its own.
    # mse_loss keeps no difference for backward.
    mse = F.mse_loss(V_s.float(), V_t.float(), reduction="none")                         # (B, n, d)
    return mse.sum(dim=-1) / V_t.shape[-1]                                                  # (B, n)


def on_grid(w_tok: torch.Tensor, n: int) -> torch.Tensor:
    """Token weights of one square grid on another: (B, n_old) -> (B, n), rows still sum to 1."""
    if w_tok.shape[1] == n:
        return w_tok                                                                        # (B, n)
    old, new = round(w_tok.shape[1] ** 0.5), round(n ** 0.5)
    grid = w_tok.unflatten(1, (1, old, old))                                     # (B, 1, old, old)
    w = F.interpolate(grid, (new, new), mode="bilinear", antialias=True).flatten(1)         # (B, n)
    return w / w.sum(dim=1, keepdim=True)                                                   # (B, n)
