"""Mixture of LoRA experts (MoLE) in the student's feed-forward networks.  Paper, mixture of LoRA experts:

    F*(x) = F(x) + E_i(x),    i = argmax_e softmax(f(x))_e

x one token, F the original FFN of the block, f the router (one Linear), E_i the chosen expert, a LoRA.
The student has to learn from teachers that pull in different directions; experts let it put their knowledge in
different weights, while F keeps what CLIP knew.

Letters: B images, N tokens ([CLS] included), D width, H width inside the FFN, E experts, r rank of one expert, L layers.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

MoleForm = Literal["ffn", "fc1_fc2"]                 # where the LoRAs are; "fc1_fc2" is the released code's
MoleInit = Literal["zero", "kaiming"]                # of LoRA-B; "kaiming" is the released code's
RouterGrad = Literal["straight_through", "none"]     # "none" is the paper's formula and the released code's
BalanceForm = Literal["per_layer", "pooled"]         # "pooled" is the released code's


class ExpertLoRA(nn.Module):
    """E LoRAs from dim_in to dim_out, of which each token uses one.  x (B, N, dim_in), route (B, N, E) -> (B, N, dim_out)

        E_i(x) = alpha/r (B_i A_i x)                    with biases a, b:  alpha/r (B_i (A_i x + a_i) + b_i)

    They are ONE LoRA of rank E*r, whose bottleneck is multiplied by alpha/r times the route: the r columns of the chosen expert by alpha/r,
    the others by 0. The same numbers as a loop over experts, but with static shapes, no gather, and every expert always in
    the graph, so that data-parallel ranks agree on which gradients exist even when an expert gets no token.

    `init` says what E_i is at step 0. "zero", LoRA's convention, makes LoRA-B = 0, so that the student starts exactly as CLIP.
    "kaiming" (released) draws B as it draws A: the student starts some way from CLIP, 2.6 % at ViT-L shapes with random weights
    (`python -m tools.bench --differences`, as for every number in this file).
    """

    def __init__(self, dim_in: int, dim_out: int, num_experts: int, rank: int, alpha: float, dropout: float, init: MoleInit, bias: bool):
        super().__init__()
        self.rank, self.scale = rank, alpha / rank
        self.A = nn.Linear(dim_in, num_experts * rank, bias=bias)           # the E down projections, stacked
        self.B = nn.Linear(num_experts * rank, dim_out, bias=False)         # the E up projections, side by side
        self.bias = nn.Parameter(torch.zeros(num_experts, dim_out)) if bias else None
        self.dropout = nn.Dropout(dropout)
        if init == "zero":
            nn.init.zeros_(self.B.weight)
        else:  # nn.Linear's own draw for each of the E up projections of r inputs, not for one of E*r
            nn.init.uniform_(self.B.weight, -rank ** -0.5, rank ** -0.5)
            if bias:
                nn.init.uniform_(self.bias, -rank ** -0.5, rank ** -0.5)

    def forward(self, x: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        gate = route * self.scale  # alpha/r here, on the smallest tensor there is      # (B, N, E)
        h = self.A(self.dropout(x)).unflatten(-1, (-1, self.rank))                      # (B, N, E, r)
        x = self.B((h * gate[..., None]).flatten(-2))                                   # (B, N, dim_out)
        if self.bias is not None:
            x = x + gate @ self.bias                                                    # (B, N, dim_out)
        return x                                                                        # (B, N, dim_out)


class MoLE(nn.Module):
    """An FFN with a mixture of LoRA experts; stands where the FFN stood.  (B, N, D) -> (B, N, D)

    form: the paper adds one LoRA beside the whole FFN ("ffn", default), the released code puts one into each of its two Linears
    ("fc1_fc2", with biases), both chosen by one route: fc2'(act(fc1'(x))). The second is no parallel low-rank map, for a LoRA in fc1 goes
    through the activation: of rank 32, it changes the FFN by a map of rank 815, and it holds 998,592 parameters a layer in place of 196,608.

    router_grad: by the paper's formula, and in the released code, the router has no gradient from L_text or L_kd at all, for argmax
    is flat; only a balance loss trains it ("none"). "straight_through" (default) leaves every forward value as it is and sends
    the gradient through p = softmax(f(x)), as if the route had been p (at tiny size its norm is 0.13 from L_text and 0.16 from L_kd, in
    place of 0 and 0).
    """

    def __init__(self, ffn: nn.Module, dim: int, num_experts: int, rank: int, alpha: float, dropout: float,
                 router_grad: RouterGrad = "straight_through", form: MoleForm = "ffn", init: MoleInit = "zero"):
        super().__init__()
        self.ffn, self.num_experts, self.router_grad, self.form = ffn, num_experts, router_grad, form
        self.router = nn.Linear(dim, num_experts)
        if form == "ffn":
            self.lora = ExpertLoRA(dim, dim, num_experts, rank, alpha, dropout, init, bias=False)
        else:
            self.lora_fc1, self.lora_fc2 = (ExpertLoRA(fc.in_features, fc.out_features, num_experts, rank, alpha, dropout, init, bias=True)
                                            for fc in (ffn.fc1, ffn.fc2))
        self.probs = None  # p of the last forward (B, N, E), for balance_loss and the log

    def experts(self) -> list[nn.Module]:
        """All that MoLE adds to the FFN."""
        return [self.router, self.lora] if self.form == "ffn" else [self.router, self.lora_fc1, self.lora_fc2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.router(x).float().softmax(dim=-1)                                      # (B, N, E)
        route = F.one_hot(p.argmax(dim=-1), self.num_experts).to(p.dtype)               # (B, N, E)
        if self.router_grad == "straight_through":
            route = route + (p - p.detach())  # p - p is exactly 0: the value stays one-hot   (B, N, E)
        self.probs = p
        route = route.to(x.dtype)                                                       # (B, N, E)
        if self.form == "ffn":
            # F*(x) = F(x) + E_i(x)
            return self.ffn(x) + self.lora(x, route)                                    # (B, N, D)
        # F*(x) = fc2'(act(fc1'(x))),  fc'(x) = fc(x) + E_i(x)
        x = self.ffn.act(self.ffn.fc1(x) + self.lora_fc1(x, route))                     # (B, N, H)
        return self.ffn.fc2(x) + self.lora_fc2(x, route)                                # (B, N, D)


def add_mole(vit: nn.Module, num_experts: int, *args) -> None:
    """Put MoLE around the FFN (`block.mlp`) of every block of a timm ViT, in place; args as MoLE's. 0 experts: leave the ViT as it is."""
    for block in vit.blocks if num_experts else ():
        block.mlp = MoLE(block.mlp, vit.embed_dim, num_experts, *args)


def mole_layers(model: nn.Module) -> list[MoLE]:
    return [module for module in model.modules() if isinstance(module, MoLE)]


def expert_shares(layer: MoLE) -> torch.Tensor:
    """Share of the last forward's tokens that each expert got: (E,), sums to 1."""
    return F.one_hot(layer.probs.argmax(dim=-1), layer.num_experts).float().mean(dim=(0, 1))      # (E,)


def balance_loss(model: nn.Module, form: BalanceForm = "per_layer") -> torch.Tensor:
    """Load balance over the experts (as in the Switch Transformer); the paper's L_total has no such term, the released code weighs it 0.01.

        per_layer (default)   mean over layers of   E sum_e share_e mean_tokens(p_e)           1 when balanced, E when collapsed
        pooled (released)     mean over images of     sum_e share_e mean_tokens(p_e)           1/E when balanced, 1 when collapsed,
                              tokens of ALL layers of the image together

    share_e = share of the tokens sent to expert e (no gradient), p_e = its router probability. Pooled, each layer may collapse
    to another expert and the loss does not see it: 0.33, its minimum, where per layer it is 3, the maximum.
    """
    layers = mole_layers(model)
    if form == "per_layer":
        losses = [m.num_experts * (expert_shares(m) * m.probs.mean(dim=(0, 1))).sum() for m in layers]
        return torch.stack(losses).mean()
    p = torch.cat([m.probs for m in layers], dim=1)                                     # (B, L*N, E)
    share = F.one_hot(p.argmax(dim=-1), p.shape[-1]).float().mean(dim=1)                # (B, E)
    return (share * p.mean(dim=1)).sum(dim=-1).mean()                                   # ()
