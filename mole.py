"""Mixture of LoRA experts (MoLE) in the student's feed-forward networks.  Paper, mixture of LoRA experts:

    F*(x) = F(x) + E_i(x),    i = argmax_e softmax(f(x))_e

x one token, F the original FFN of the block, f the router (one Linear), E_i the chosen expert, a LoRA.
The student has to learn from teachers that pull in different directions; experts let it put their knowledge in
different weights, while F keeps what CLIP knew.

Letters: B images, N tokens ([CLS] included), D width, E experts, r rank of one expert.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

RouterGrad = Literal["straight_through", "none"]


class MoLE(nn.Module):
    """An FFN with a mixture of LoRA experts beside it; stands where the FFN stood.  (B, N, D) -> (B, N, D)

    All E experts are ONE LoRA of rank E*r, whose bottleneck is multiplied by the route: the r columns of the chosen expert by 1,
    the others by 0. The same numbers as a loop over experts, but with static shapes, no gather, and every expert always in
    the graph, so that data-parallel ranks agree on which gradients exist even when an expert gets no token.

    router_grad: by the paper's formula the router has no gradient from L_text or L_kd at all, for argmax is flat; only a
    balance loss would train it. "none" is that. "straight_through" (default) leaves every forward value as it is and sends the
    gradient through p = softmax(f(x)), as if the route had been p.
    """

    def __init__(self, ffn: nn.Module, dim: int, num_experts: int, rank: int, alpha: float, dropout: float,
                 router_grad: RouterGrad = "straight_through"):
        super().__init__()
        self.ffn = ffn
        self.num_experts, self.rank, self.scale, self.router_grad = num_experts, rank, alpha / rank, router_grad
        self.router = nn.Linear(dim, num_experts)
        self.lora_A = nn.Linear(dim, num_experts * rank, bias=False)  # the E down projections, stacked
        self.lora_B = nn.Linear(num_experts * rank, dim, bias=False)  # the E up projections, side by side
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.lora_B.weight)  # LoRA's convention: E_i = 0 at step 0, so that the student starts exactly as CLIP
        self.probs = None  # p of the last forward (B, N, E), for balance_loss and the log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.router(x).float().softmax(dim=-1)                                      # (B, N, E)
        route = F.one_hot(p.argmax(dim=-1), self.num_experts).to(p.dtype)               # (B, N, E)
        if self.router_grad == "straight_through":
            route = route + (p - p.detach())  # p - p is exactly 0: the value stays one-hot   (B, N, E)
        self.probs = p
        gate = route.to(x.dtype).repeat_interleave(self.rank, dim=-1)                   # (B, N, E*r)
        # E_i(x) = alpha/r B_i A_i x, for the chosen i
        delta = self.lora_B(self.lora_A(self.dropout(x)) * gate) * self.scale           # (B, N, D)
        # F*(x) = F(x) + E_i(x)
        return self.ffn(x) + delta                                                      # (B, N, D)


def add_mole(vit: nn.Module, num_experts: int, rank: int, alpha: float, dropout: float,
             router_grad: RouterGrad = "straight_through") -> None:
    """Put MoLE around the FFN (`block.mlp`) of every block of a timm ViT, in place."""
    for block in vit.blocks:
        block.mlp = MoLE(block.mlp, vit.embed_dim, num_experts, rank, alpha, dropout, router_grad)


def mole_layers(model: nn.Module) -> list[MoLE]:
    return [module for module in model.modules() if isinstance(module, MoLE)]


def expert_shares(layer: MoLE) -> torch.Tensor:
    """Share of the last forward's tokens that each expert got: (E,), sums to 1."""
    return F.one_hot(layer.probs.argmax(dim=-1), layer.num_experts).float().mean(dim=(0, 1))      # (E,)


def balance_loss(model: nn.Module) -> torch.Tensor:
    """Load balance over the experts (as in the Switch Transformer), the mean over layers of

        L_balance = E * sum_e share_e * mean_tokens(p_e)

    share_e = share of the tokens sent to expert e (no gradient), p_e = its router probability. 1 when all experts get the same,
    E when one gets all. Per layer: pooled over layers, every layer could collapse to a different expert and look balanced.
    The paper's L_total has no such term; the released code weighs it 0.01, and so do we.
    """
    layers = mole_layers(model)
    losses = [m.num_experts * (expert_shares(m) * m.probs.mean(dim=(0, 1))).sum() for m in layers]
    return torch.stack(losses).mean()
