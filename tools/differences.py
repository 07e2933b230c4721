"""What follows where paper and released code differ: the numbers of the table in the README.

A function for each row; `python -m tools.bench --differences` prints them.

Letters: n tokens and d width of the student, n_i d_i of teacher i, E experts, r rank, h heads.
"""

import math

import torch
import torch.nn.functional as F

from kd_loss import kd_loss, teacher_weights, token_weights
from mole import balance_loss
from plumbing.build import build_teachers, pretrained_weights
from plumbing.config import TINY
from plumbing.sets import build_tokenizer, load_sets
from teachers import EncoderAdapter, Teachers, adapt, build_adapters
from tiny.pictures import render
from tiny.scenes import sample_scenes
from tools.expert_differences import parameters_row, rank_row, router_row, start_row
from tools.measuring import count, table_line

HEAD = ["| row | what | paper | released code | here |", "|---|---|---|---|---|"]


def differences() -> str:
    """The table in Markdown."""
    sets = load_sets(TINY)
    weights, _ = pretrained_weights(TINY, sets["train"][0], build_tokenizer(TINY, sets))
    teachers = build_teachers(TINY, weights)
    images = render(sample_scenes("validation", 64))
    scores = teachers(images, [])["clip"].cls_scores
    rows = [
        parameters_row(),
        rank_row(),
        router_row(),
        start_row(TINY.clip, weights["clip"], images),
        token_weight_row("W^tok of the tiny CLIP, n = 36", scores),
        token_weight_row("W^tok of a Zipf-like attention, n = 576", zipf_scores(576)),
        teacher_weight_row(),
        drift_row(teachers, images),
        jump_row(),
        adapter_row(),
        balance_row(),
    ]
    return "\n".join([*HEAD, *rows])


# ------------------------------------------------------------------------------------------------
# Rows 4-7: token weights and teacher weights


def zipf_scores(n: int) -> torch.Tensor:
    """[CLS] scores whose softmax is 1/rank over n tokens, a head of it as strong as the first."""
    attention = torch.cat([torch.ones(1), 1 / torch.arange(1, n + 1)])              # (1 + n,)
    return attention.log()[None, None]                                              # (1, 1, 1 + n)


def token_weight_row(what: str, scores: torch.Tensor) -> str:
    """Row 4, n max W^tok and the entropy of W^tok / log n (1 is uniform)."""
    cells = []
    for form in ("paper", "released"):
        w = token_weights(scores, form)                                             # (B, n)
        n = w.shape[1]
        largest = (w.amax(dim=1) * n).mean()
        entropy = -(w * w.log()).sum(dim=1).mean() / math.log(n)
        cells.append(f"n max {largest:.2f}, entropy / log n {entropy:.4f}")
    return table_line(4, what, *cells, "as paper")


def teacher_weight_row() -> str:
    """Row 5, how often the softmax over the teachers saturates."""
    torch.manual_seed(0)
    paper, released = saturation(1024 ** -0.5), saturation(1.0)
    return table_line(5, "P(one of two teachers > 0.8), d = 1024", f"{paper:.3f}",
                      f"{released:.3f}", "as paper")


def saturation(scale: float, d: int = 1024, draws: int = 4000) -> float:
    """The share of draws in which one of two teachers takes more than 0.8.

    V^cls has rms 1, the teachers' mean tokens have rms 0.3.
    """
    cls = torch.randn(draws, d)
    means = 0.3 * torch.randn(draws, 2, d)
    w = ((means @ cls[:, :, None])[:, :, 0] * scale).softmax(dim=1)                 # (draws, 2)
    return (w.amax(dim=1) > 0.8).float().mean().item()


def drift_row(teachers: Teachers, images: torch.Tensor) -> str:
    """Row 6, what the adapters do to the teacher weights."""
    return table_line(6, "largest teacher weight, adapters trained alone for 50 steps, tiny", "-",
                      drift(teachers, images, "released", detach=False),
                      drift(teachers, images, "paper", detach=True))


def drift(teachers: Teachers, images: torch.Tensor, form: str, detach: bool) -> str:
    """The largest teacher weight (batch mean) before and after the adapters followed L_kd."""
    torch.manual_seed(0)
    outputs = teachers(images, [])
    clip = outputs["clip"]
    _, n, d = clip.tokens.shape
    adapters = build_adapters(teachers, n, d, "token_mixing", "teacher_to_student")
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-3)
    w_tok = token_weights(clip.cls_scores, "paper")                                 # (B, n)
    largest = []
    for _ in range(50):
        V_t = adapt(outputs, adapters)                                              # m x (B, n, d)
        w_tea = teacher_weights(clip.cls, V_t, 0.0, form, detach, collapse=False)   # (B, m)
        largest.append(w_tea[:, 1:].amax(dim=1).mean().item())
        kd_loss(dict.fromkeys(V_t, clip.tokens), V_t, w_tok, w_tea)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return f"{largest[0]:.2f} -> {largest[-1]:.2f}"


def jump_row() -> str:
    """Row 7, the jump of the collapse branch."""
    return table_line(7, "largest weight 0.7999 / 0.8001 becomes", "-",
                      f"{at_the_jump(0.7999):.3f} / {at_the_jump(0.8001):.3f}", "unchanged")


def at_the_jump(largest: float) -> float:
    """What the collapse branch makes of a largest weight."""
    gap = math.log(largest / (1 - largest))
    teachers = {"clip": torch.zeros(1, 1, 1), "eva": torch.full((1, 1, 1), gap),
                "convnext": torch.zeros(1, 1, 1)}
    w_tea = teacher_weights(torch.ones(1, 1), teachers, 0.0, "released", detach=True,
                            collapse=True)                                          # (1, 3)
    return w_tea[0, 1].item()


# ------------------------------------------------------------------------------------------------
# Rows 8-9: adapters, balance


def adapter_row() -> str:
    """Row 8, where an adapter's parameters are."""
    eva = EncoderAdapter(4096, 1024, 576, 1024, "token_mixing")
    convnext = EncoderAdapter(1024, 3072, 576, 1024, "token_mixing")
    shares = []
    for adapter in (eva, convnext):
        shares.append(adapter.out.weight.numel() / count(adapter.parameters()))
    per_token = count(EncoderAdapter(4096, 1024, 576, 1024, "per_token").parameters())
    return table_line(8, "token matrix, share of the adapter of EVA-L / ConvNeXt-XXL", "-",
                      " / ".join(f"{100 * share:.0f} %" for share in shares),
                      f"as released (`per_token`: {per_token:,} in place of "
                      f"{count(eva.parameters()):,})")


def balance_row() -> str:
    """Row 9, what the balance loss sees of layers that collapse to an expert each."""
    probs = []
    for e in range(3):
        chosen = torch.full((1, 6), e)
        probs.append(F.one_hot(chosen, 3).float())                                  # (1, 6, 3)
    pooled, per_layer = balance_loss(probs, "pooled"), balance_loss(probs, "per_layer")
    return table_line(9, "balance loss when each of 3 layers collapses to another expert (its "
                      "minimum / maximum)", "-", f"{pooled:.2f} (0.33 / 1)",
                      f"{per_layer:.2f} (1 / 3)")
