"""`--recipe released` gives the numbers and gradients of the authors' formulas, written naively.

Then what `--recipe ours` is made of, and what follows where paper and released code differ.
"""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from kd_loss import kd_loss, teacher_weights, token_weights
from model import Ensemble
from mole import MoLE, ReleasedMoLE, balance_loss, router_probs
from plumbing.teacher_outputs import measure_targets
from teachers import EncoderAdapter, build_target_norms
from tests.common import MOLE, tiny_teachers
from tiny.world import WorldImages, world_records

B, n, d, h = 3, 16, 24, 2
TEACHERS = {"eva": (49, 20), "convnext": (9, 28)}  # n_i, d_i
CLIP_SHARE = 0.8
close = torch.testing.assert_close


def inputs(signs: tuple[float, ...]) -> dict:
    """Return random tensors. signs[b] says to which teacher image b's weights collapse."""
    adapters = nn.ModuleDict()
    tokens = {"clip": torch.randn(B, n, d)}
    for name, (n_i, d_i) in TEACHERS.items():
        adapters[name] = EncoderAdapter(n_i, d_i, n, d, "released")
        tokens[name] = torch.randn(B, n_i, d_i)
    adapted = {name: adapters[name](tokens[name]).detach() for name in TEACHERS}
    gap = adapted["eva"].mean(1) - adapted["convnext"].mean(1)                              # (B, d)
    cls = 4 * torch.tensor(signs)[:, None] * gap / gap.square().sum(1, keepdim=True)        # (B, d)
    return {"V_s": torch.randn(B, n, d, requires_grad=True), "tokens": tokens,
            "adapters": adapters, "cls": cls, "scores": 3 * torch.randn(B, h, 1 + n)}


def their_kd(x: dict) -> tuple[torch.Tensor, bool]:
    """Return the loss of the released code, and whether its collapse guard fired."""
    attention = x["scores"].softmax(dim=-1).mean(dim=1)                             # (B, 1 + n)
    token_weight = attention[:, 1:].softmax(dim=-1)                                 # (B, n)
    losses, products = [], []
    for name, tokens in x["tokens"].items():
        if name != "clip":
            adapter = x["adapters"][name]
            hidden = F.gelu(adapter.channels(tokens).permute(0, 2, 1))              # (B, d, n_i)
            tokens = adapter.out(hidden).permute(0, 2, 1)                           # (B, n, d)
            product = x["cls"][:, None, :] @ tokens.transpose(1, 2)                 # (B, 1, n)
            products.append(product.mean(dim=(1, 2)))                               # (B,)
        losses.append(F.mse_loss(x["V_s"], tokens, reduction="none"))               # (B, n, d)
    others = torch.stack(products, dim=-1).softmax(dim=-1)                          # (B, m - 1)
    fired = bool(others.mean(0).max() > 0.8)
    if fired:
        others = (others + 0.2).softmax(dim=-1)                                     # (B, m - 1)
    clip = torch.full((B, 1), CLIP_SHARE)                                           # (B, 1)
    weight = torch.cat([clip, others * (1 - CLIP_SHARE)], dim=1)                    # (B, m)
    loss = torch.stack(losses, dim=-1).mean(dim=2)                                  # (B, n, m)
    weighted = (loss * token_weight[..., None]).sum(dim=1)                          # (B, m)
    return (weight * (loss.mean(dim=1) + weighted)).sum(dim=-1).mean(), fired


def our_kd(x: dict) -> torch.Tensor:
    targets = dict(x["tokens"])
    for name in TEACHERS:
        targets[name] = x["adapters"][name](targets[name])
    w_tok = token_weights(x["scores"], "released")
    w_tea = teacher_weights(x["cls"], targets, CLIP_SHARE, "released", detach=False, collapse=True)
    return kd_loss(dict.fromkeys(targets, x["V_s"]), targets, w_tok, w_tea)[0]


@pytest.mark.parametrize("signs,fires", [((1, -1, 1), False), ((1, 1, 1), True),
                                         ((-1, -1, -1), True), ((0.1, 0.2, -0.1), False)])
def test_released_kd_is_their_formula(signs, fires):
    """L_kd and its gradients in V^s and in every adapter, with the guard and without."""
    x = inputs(tuple(map(float, signs)))
    parameters = [x["V_s"], *x["adapters"].parameters()]
    theirs, fired = their_kd(x)
    assert fired == fires
    close(our_kd(x), theirs, atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad(theirs, parameters)
    close(torch.autograd.grad(our_kd(x), parameters), expected, atol=1e-4, rtol=1e-4)


def their_mole(layer: ReleasedMoLE, x: torch.Tensor) -> torch.Tensor:
    """Return fc2'(act(fc1'(x))), fc'(x) = fc(x) + alpha/r (up_i (down_i x + a_i) + b_i)."""
    index = layer.router(x).softmax(dim=-1).max(dim=-1)[1]                          # (B, 1 + n)
    for fc, lora, act in ((layer.ffn.fc1, layer.lora_fc1, layer.ffn.act),
                          (layer.ffn.fc2, layer.lora_fc2, nn.Identity())):
        out = torch.zeros_like(fc(x))
        for e in range(3):
            rows = torch.where(index == e)
            rank = slice(lora.rank * e, lora.rank * (e + 1))
            down = F.linear(x[rows], lora.down.weight[rank], lora.down.bias[rank])
            out[rows] = lora.scale * F.linear(down, lora.up.weight[:, rank], lora.up_bias[e])
        x = act(fc(x) + out)
    return x


def their_balance(probs: list[torch.Tensor]) -> torch.Tensor:
    """Return the balance loss image by image, the tokens of all layers together."""
    total = 0.0
    for b in range(len(probs[0])):
        p = torch.cat([layer[b] for layer in probs])                            # (L * (1 + n), E)
        choice = F.one_hot(p.argmax(dim=-1), 3).float()
        total = total + (p.mean(0) * choice.mean(0)).sum()
    return total / len(probs[0])


def test_released_mole_and_balance_are_their_formulas():
    """Outputs, balance loss, gradients of two layers; only balance reaches the router."""
    options = {**MOLE, "router_grad": "none", "init": "kaiming"}
    layers = nn.ModuleList(ReleasedMoLE(timm.layers.Mlp(d, 2 * d), d, **options) for _ in range(2))
    for name, p in layers.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    layers.double()
    x = torch.randn(B, 1 + n, d).double()
    parameters = list(layers.parameters())

    theirs, ours, probs = x, x, []
    for layer in layers:
        probs.append(layer.router(theirs).softmax(dim=-1))
        theirs, ours = their_mole(layer, theirs), layer(ours)
    close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert all(len(p.argmax(-1).unique()) == 3 for p in probs)
    upstream = torch.randn_like(ours)
    text = [(out * upstream).sum() for out in (ours, theirs)]
    balance = [balance_loss(router_probs(layers), "pooled").double(), their_balance(probs)]
    close(*balance, atol=1e-6, rtol=1e-6)
    for pair in (text, balance):
        got, expected = (torch.autograd.grad(loss, parameters, retain_graph=True,
                                             materialize_grads=True) for loss in pair)
        close(got, expected, atol=1e-4, rtol=1e-4)


def test_channel_targets_are_standardised_over_images_and_tokens():
    """target_norm "channel": mean 0 and std 1 of every channel over all images, each once."""
    teachers, images = tiny_teachers(), WorldImages("train", 70)
    records = world_records("train", "caption", 70)
    norms = build_target_norms(teachers, "channel")
    measure_targets(norms, teachers, [(records, images), (records[:9], images)], True, "cpu", False)
    outputs = teachers(images.images, [])
    for name, norm in norms.items():
        tokens = outputs[name].tokens.flatten(0, 1)
        close(norm.mean, tokens.mean(0), atol=1e-4, rtol=1e-4)
        close(norm.std, tokens.std(0, unbiased=False), atol=1e-4, rtol=1e-3)
        plain = (tokens - tokens.mean(0)) / tokens.std(0, unbiased=False)
        close(norm(tokens), plain, atol=1e-3, rtol=1e-3)


def test_interpolation_has_no_parameters():
    """adapter_form "interpolation" resizes tokens and channels, and nothing of it is trained."""
    adapter = EncoderAdapter(16, 6, 4, 12, "interpolation")
    assert not list(adapter.parameters())
    x = torch.randn(2, 16, 6)
    out = adapter(x)
    assert out.shape == (2, 4, 12)
    normed = F.layer_norm(x, (6,))
    corner = F.interpolate(normed.transpose(1, 2).unflatten(2, (4, 4)), (2, 2), mode="bilinear",
                           antialias=True)[:, :, 0, 0]                                      # (2, 6)
    close(out[:, 0], F.interpolate(corner[:, None], 12, mode="linear")[:, 0])


def test_one_expert_changes_the_ffn_by_its_rank_or_more():
    """Row 1: beside the FFN an expert's change has LoRA's rank; inside it passes the activation."""
    x = torch.randn(1, 64, 32).double()
    ranks = []
    for form in (MoLE, ReleasedMoLE):
        options = {**MOLE, "num_experts": 1, "init": "kaiming"}
        layer = form(timm.layers.Mlp(32, 128), 32, **options).double()
        ranks.append(torch.linalg.matrix_rank((layer(x) - layer.ffn(x))[0], rtol=1e-6).item())
    assert ranks[0] == MOLE["rank"] == 2
    assert ranks[1] > 10


@pytest.mark.parametrize("router_grad", ["none", "straight_through"])
def test_experts_that_are_zero_give_the_router_no_gradient(router_grad):
    """Row 2: at step 0 only the balance loss trains the router, with either switch."""
    layer = MoLE(nn.Linear(8, 8), 8, **{**MOLE, "router_grad": router_grad})
    layer(torch.randn(2, 5, 8)).square().sum().backward(retain_graph=True)
    assert layer.router.weight.grad is None or not layer.router.weight.grad.any()
    balance_loss([layer.probs], "per_layer").backward()
    assert layer.router.weight.grad.any()


def test_raw_dot_products_saturate_at_the_real_width():
    """Row 5: d = 1024, V^cls of rms 1, mean tokens of rms 0.3: one teacher takes nearly all."""
    cls = torch.randn(2000, 1024)
    targets = {name: 0.3 * torch.randn(2000, 1, 1024) for name in ("clip", "eva", "convnext")}
    saturated = {}
    for form in ("paper", "released"):
        w = teacher_weights(cls, targets, 0.0, form, detach=True, collapse=False)   # (2000, 3)
        saturated[form] = (w.amax(dim=1) > 0.8).float().mean().item()
    assert saturated["paper"] < 0.01
    assert saturated["released"] > 0.8


def test_an_attached_weight_moves_to_the_teacher_that_is_easy():
    """Row 6: downhill, an adapter with a large error turns from V^cls, and so loses its weight."""
    V_s, cls, w_tok = torch.randn(B, n, d), torch.randn(B, d), torch.full((B, n), 1 / n)
    hard = torch.randn(B, n, d, requires_grad=True)
    V_t = {"clip": V_s, "eva": V_s + 0.1, "convnext": hard}
    fixed = {name: tokens.detach() for name, tokens in V_t.items()}
    losses = []
    for detach in (True, False):
        w_tea = teacher_weights(cls, V_t, 0.0, "released", detach=detach, collapse=False)
        losses.append(kd_loss(dict.fromkeys(V_t, V_s), fixed, w_tok, w_tea)[0])
    assert not losses[0].requires_grad
    gradient, = torch.autograd.grad(losses[1], hard)
    assert ((gradient.sum(dim=1) * cls).sum(dim=1) > 0).all()


def test_sizes_of_the_real_adapters():
    """Row 8: 69 % of EVA-L's adapter is its token matrix, 16 % of ConvNeXt-XXL's."""
    counts, fractions = [], []
    for n_i, d_i, form in ((4096, 1024, "token_mixing"), (1024, 3072, "token_mixing"),
                           (4096, 1024, "per_token")):
        adapter = EncoderAdapter(n_i, d_i, 576, 1024, form)
        counts.append(sum(p.numel() for p in adapter.parameters()))
        fractions.append(adapter.out.weight.numel() / counts[-1])
    assert counts[0] == 3_409_472 and counts[2] == 2_099_200
    assert fractions[:2] == pytest.approx([0.69, 0.16], abs=0.005)


def test_ensemble_joins_all_encoders_by_channel():
    """The multi-encoder VLM's token (i, j) is every encoder's token there, on CLIP's grid."""
    teachers, images = tiny_teachers(), WorldImages("train", 2).images
    ensemble = Ensemble(teachers)
    tokens = ensemble(images)
    assert tokens.shape == (2, ensemble.num_tokens, ensemble.dim) == (2, 36, 96 + 80 + 128)
    outputs = teachers(images, [])
    close(tokens[..., :96], F.layer_norm(outputs["clip"].tokens, (96,)))
    # bilinear from 4 x 4 to 6 x 6: the corner stays the corner
    close(tokens[:, 0, 176:], F.layer_norm(outputs["convnext"].tokens[:, 0], (128,)))


def test_weights_and_loss_stand_any_scale_and_order():
    """From 0 to 10,000, fp32 and bf16: weights sum to 1, and L_kd is finite, in either order."""
    names, ones = ("clip", *TEACHERS), torch.ones(B)
    scales, types = (0.0, 1e-3, 1.0, 1e4), (torch.float32, torch.bfloat16)
    for scale, dtype, form in itertools.product(scales, types, ("paper", "released", "uniform")):
        tokens = {name: (scale * torch.randn(B, n, d)).to(dtype) for name in names}
        V_s, cls = (scale * torch.randn(B, n, d)).to(dtype), (scale * torch.randn(B, d)).to(dtype)
        w_tok = token_weights((scale * torch.randn(B, h, 1 + n)).to(dtype), form)
        losses = []
        for order in (names, names[:1] + names[:0:-1]):
            some = {name: tokens[name] for name in order}
            w_tea = teacher_weights(cls, some, 0.4, form, detach=True, collapse=True)
            losses.append(kd_loss(dict.fromkeys(some, V_s), some, w_tok, w_tea)[0])
            for weights in (w_tok, w_tea):
                close(weights.sum(1), ones, atol=1e-4, rtol=1e-4, check_dtype=False)
        assert losses[0].isfinite()
        close(*losses, atol=1e-4, rtol=1e-3)
