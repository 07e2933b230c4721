"""Mixture of LoRA experts (MoLE) in the student's feed-forward networks.

    F*(x) = F(x) + E_i(x),    i = argmax_e softmax(f(x))_e          paper, mixture of LoRA experts

x is one token, F the block's own FFN, f the router (one Linear), E_i the chosen expert (a LoRA).
The paper's idea: the teachers pull the student in different directions, and experts let it store
their lessons in different weights. F is frozen in stage 1; in stage 2 it learns, too.

Letters: B images, 1 + n student tokens ([CLS] first), d width,
d_ffn width inside the FFN, E experts, r rank of one expert, L layers.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

MoleForm = Literal["ffn", "fc1_fc2"]                # where the LoRAs are; "fc1_fc2": released code
MoleInit = Literal["zero", "kaiming"]               # of the up matrix; "kaiming": released code
RouterGrad = Literal["straight_through", "none"]    # "none": the paper's formula
BalanceForm = Literal["per_layer", "pooled"]        # "pooled": released code


class ExpertLoRA(nn.Module):
    """E LoRAs from dim_in to dim_out, of which each token uses one.

        E_i(x) = alpha/r up_i down_i x           with bias:  alpha/r (up_i (down_i x + a_i) + b_i)

    The baseline implementation is a loop over experts:

        for e in range(E):
            rows = chosen_expert == e
            out[rows] = alpha / r * up[e](down[e](x[rows]))

    The fused form gives the same numbers. The E LoRAs are ONE LoRA of rank E*r, whose bottleneck is
    multiplied by the route: the r columns of the chosen expert by alpha/r, the others by 0. Shapes
    are static, nothing is gathered, and every expert is always in the graph, so data-parallel
    processes agree on which gradients exist even when an expert gets no token.

    init: "zero", LoRA's convention, starts with E_i(x) = 0, so that the student starts as CLIP;
    "kaiming" (released code) draws both matrices of each expert from U(+-sqrt(6 / fan_in)), biases
    0 (PyTorch's kaiming_uniform_ for relu): the student starts away from CLIP.
    """

    def __init__(self, dim_in: int, dim_out: int, *, num_experts: int, rank: int, alpha: float,
                 dropout: float, init: MoleInit, bias: bool):
        super().__init__()
        self.rank = rank
        self.scale = alpha / rank
        self.down = nn.Linear(dim_in, num_experts * rank, bias=bias)    # E down matrices, stacked
        self.up = nn.Linear(num_experts * rank, dim_out, bias=False)    # E up matrices, in a row
        self.up_bias = nn.Parameter(torch.zeros(num_experts, dim_out)) if bias else None
        self.dropout = nn.Dropout(dropout)
        if init == "zero":
            nn.init.zeros_(self.up.weight)
        else:
            # fan_in is that of one expert: dim_in into down, r (not E*r) into up
            nn.init.uniform_(self.down.weight, -(6 / dim_in) ** 0.5, (6 / dim_in) ** 0.5)
            nn.init.uniform_(self.up.weight, -(6 / rank) ** 0.5, (6 / rank) ** 0.5)
            if bias:
                nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        """x (B, 1 + n, dim_in), route (B, 1 + n, E) -> (B, 1 + n, dim_out)"""
        # alpha/r goes on the gate, the smallest tensor here.
        gate = route * self.scale                                               # (B, 1+n, E)
        low = self.down(self.dropout(x)).unflatten(-1, (-1, self.rank))         # (B, 1+n, E, r)
        out = self.up((low * gate[..., None]).flatten(-2))                      # (B, 1+n, dim_out)
        if self.up_bias is not None:
            out = out + gate @ self.up_bias                                     # (B, 1+n, dim_out)
        return out                                                              # (B, 1+n, dim_out)


class RoutedFFN(nn.Module):
    """The base of both forms of MoLE: the FFN, the router, and the choice of one expert per token.

    router_grad: argmax has no gradient, so by the paper's MoLE formula (and in released code) the
    router learns nothing from L_text or L_kd; only a balance loss trains it ("none").
    "straight_through" changes no value and sends the gradient through p, as if the route were p.

    After each forward `probs` holds p = softmax(f(x)), (B, 1 + n, E). `router_probs` reads it as
    soon as the student has run: a timm block passes on the output of its FFN and nothing else.
    """

    def __init__(self, ffn: nn.Module, dim: int, *, num_experts: int, router_grad: RouterGrad):
        super().__init__()
        self.ffn = ffn
        self.router = nn.Linear(dim, num_experts)
        self.router_grad = router_grad
        self.probs = None

    def new_modules(self) -> list[nn.Module]:
        """Return the modules that MoLE adds to the FFN: the router and the experts."""
        return [module for name, module in self.named_children() if name != "ffn"]

    def route(self, x: torch.Tensor) -> torch.Tensor:
        """Choose an expert for each token, one-hot: (B, 1 + n, d) -> (B, 1 + n, E)"""
        # i = argmax_e softmax(f(x))_e
        p = self.router(x).float().softmax(dim=-1)                              # (B, 1+n, E)
        route = F.one_hot(p.argmax(dim=-1), p.shape[-1]).to(p.dtype)            # (B, 1+n, E)
        if self.router_grad == "straight_through":
            # p - p is exactly 0: the value stays one-hot, the gradient is that of p
            route = route + (p - p.detach())                                    # (B, 1+n, E)
        self.probs = p
        return route.to(x.dtype)                                                # (B, 1+n, E)


class MoLE(RoutedFFN):
    """The paper's MoLE, one LoRA beside the whole FFN.  (B, 1 + n, d) -> (B, 1 + n, d)"""

    def __init__(self, ffn: nn.Module, dim: int, *, num_experts: int, router_grad: RouterGrad,
                 **lora):
        super().__init__(ffn, dim, num_experts=num_experts, router_grad=router_grad)
        self.lora = ExpertLoRA(dim, dim, num_experts=num_experts, bias=False, **lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        route = self.route(x)                                                   # (B, 1+n, E)
        # F*(x) = F(x) + E_i(x)
        return self.ffn(x) + self.lora(x, route)                                # (B, 1+n, d)


class ReleasedMoLE(RoutedFFN):
    """The released code's form, a LoRA with biases in each of the FFN's two Linears, one route.

        F*(x) = fc2'(act(fc1'(x))),    fc'(x) = fc(x) + E_i(x)       (B, 1 + n, d) -> (B, 1 + n, d)

    This is not a parallel low-rank map: the LoRA in fc1 goes through the activation.
    """

    def __init__(self, ffn: nn.Module, dim: int, *, num_experts: int, router_grad: RouterGrad,
                 **lora):
        super().__init__(ffn, dim, num_experts=num_experts, router_grad=router_grad)
        d_ffn = ffn.fc1.out_features
        self.lora_fc1 = ExpertLoRA(dim, d_ffn, num_experts=num_experts, bias=True, **lora)
        self.lora_fc2 = ExpertLoRA(d_ffn, dim, num_experts=num_experts, bias=True, **lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        route = self.route(x)                                                   # (B, 1+n, E)
        # F*(x) = fc2'(act(fc1'(x)))
        x = self.ffn.act(self.ffn.fc1(x) + self.lora_fc1(x, route))             # (B, 1+n, d_ffn)
        return self.ffn.fc2(x) + self.lora_fc2(x, route)                        # (B, 1+n, d)


def add_mole(vit: nn.Module, form: MoleForm, **options) -> None:
    """Put MoLE around the FFN of every block of a timm ViT; the options are those of MoLE."""
    mole = {"ffn": MoLE, "fc1_fc2": ReleasedMoLE}[form]
    for block in vit.blocks:
        block.mlp = mole(block.mlp, vit.embed_dim, **options)


def mole_layers(model: nn.Module) -> list[RoutedFFN]:
    """Return the MoLE layers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, RoutedFFN)]


def router_probs(student: nn.Module) -> list[torch.Tensor]:
    """Return p of each MoLE layer from the student's last forward: L x (B, 1 + n, E)"""
    return [layer.probs for layer in mole_layers(student)]


def expert_fractions(p: torch.Tensor) -> torch.Tensor:
    """Return the fraction of the tokens that each expert got: (B, 1 + n, E) -> (E,), sums to 1"""
    chosen = F.one_hot(p.argmax(dim=-1), p.shape[-1])                           # (B, 1+n, E)
    return chosen.float().mean(dim=(0, 1))                                      # (E,)


def balance_loss(probs: list[torch.Tensor], form: BalanceForm) -> torch.Tensor:
    """Return L_balance, which keeps all experts in use: L x (B, 1 + n, E) -> ()

        per_layer             mean over layers of   E sum_e f_e mean_tokens(p_e)
        pooled (released)     mean over images of     sum_e f_e mean_tokens(p_e)
                              of the tokens of ALL layers together

    As in the Switch Transformer: f_e is the fraction of the tokens sent to expert e (no gradient),
    p_e its router probability. "per_layer" is 1 if the experts share the tokens equally, and E if
    one has all of them; "pooled" is 1/E and 1. The pooled loss does not notice if each layer
    collapses to another expert. The paper's total loss has no such term.
    """
    if form == "per_layer":
        losses = [p.shape[-1] * (expert_fractions(p) * p.mean(dim=(0, 1))).sum() for p in probs]
        return torch.stack(losses).mean()                                       # ()
    p = torch.cat(probs, dim=1)                                                 # (B, L*(1+n), E)
    f = F.one_hot(p.argmax(dim=-1), p.shape[-1]).float().mean(dim=1)            # (B, E)
    return (f * p.mean(dim=1)).sum(dim=-1).mean()                               # ()
