"""The claims about the method, in the paper's order, each against the slow obvious form.

    python -m pytest -q test_movekd.py          # these alone (20 s)
    python -m pytest -q                         # all tests, those of the folders too (4 min)
"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, InputError, collate, conversation_ids
from kd_loss import kd_loss, on_grid, teacher_weights, token_weights
from model import Student, next_tokens, text_loss
from mole import MoLE, ReleasedMoLE, balance_loss, expert_fractions, mole_layers, router_probs
from plumbing.build import build_movekd
from teachers import ClipEncoder, EncoderAdapter, TeacherOutput, VisionEncoder, adapt, adapt_student
from tests import common
from tests.common import MOLE, REAL, C
from tiny.llm import WordTokenizer
from train import stage_table

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------
# Mixture of LoRA experts


def test_masked_mole_is_a_loop_over_tokens():
    """One masked LoRA of rank E*r gives each token F(x) + alpha/r up_i down_i x, i its expert."""
    layer, x = common.random_mole(), torch.randn(2, 5, 8)
    slow = torch.empty_like(x)
    for b in range(2):
        for j in range(5):
            i = int(layer.router(x[b, j]).softmax(-1).argmax())
            down = layer.lora.down.weight[2 * i:2 * i + 2]
            up = layer.lora.up.weight[:, 2 * i:2 * i + 2]
            slow[b, j] = layer.ffn(x[b, j]) + 4.0 / 2 * up @ (down @ x[b, j])
    chosen = layer.router(x).argmax(-1)
    assert len(set(chosen.flatten().tolist())) == 3  # all experts are in play
    close(layer(x), slow)


def test_mole_starts_as_the_plain_ffn():
    """With up = 0, as it is built, MoLE equals the FFN bit for bit, dropout or not."""
    ffn, x = nn.Linear(8, 8), torch.randn(2, 5, 8)
    layer = MoLE(ffn, 8, **{**MOLE, "dropout": 0.5})
    assert torch.equal(layer(x), ffn(x))


def test_straight_through_changes_no_value_and_reaches_the_router():
    """router_grad "none" leaves the router without gradient, as the paper's formula does.

    "straight_through" gives it one, and the outputs are equal bit for bit.
    """
    plain, through = common.random_mole("none"), common.random_mole("straight_through")
    x = torch.randn(2, 5, 8)
    through.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), through(x))
    plain(x).square().sum().backward()
    through(x).square().sum().backward()
    assert plain.router.weight.grad is None
    assert through.router.weight.grad.abs().max() > 0


def test_straight_through_gradient_is_that_of_a_soft_mixture():
    """The router's gradient is the one of a layer whose experts are all weighted by p."""
    layer, x, upstream = common.random_mole(), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    layer(x).backward(upstream)
    got = layer.router.weight.grad.clone()
    p = layer.router(x).softmax(-1)
    soft = torch.zeros_like(x)
    for i in range(3):
        down = layer.lora.down.weight[2 * i:2 * i + 2]
        up = layer.lora.up.weight[:, 2 * i:2 * i + 2]
        soft = soft + p[..., i:i + 1] * (x @ down.T @ up.T * 4.0 / 2)
    expected, = torch.autograd.grad((soft * upstream).sum(), layer.router.weight)
    close(got, expected)


def test_an_expert_without_tokens_still_has_a_gradient():
    """An expert that got no token has gradient 0, not None: processes stay in step."""
    layer = common.random_mole("none")
    nn.init.zeros_(layer.router.weight)
    layer.router.bias.data = torch.tensor([1.0, 0.0, 0.0])
    layer(torch.randn(2, 5, 8)).sum().backward()
    grad = layer.lora.up.weight.grad
    assert grad[:, :2].abs().max() > 0
    assert torch.equal(grad[:, 2:], torch.zeros(8, 4))


def two_layers() -> tuple[nn.ModuleList, list]:
    """Two MoLE layers that have run on (2, 5, 8), and their probabilities 2 x (2, 5, 3)."""
    layers, x = nn.ModuleList([common.random_mole(), common.random_mole()]), torch.randn(2, 5, 8)
    for layer in layers:
        layer(x)
    return layers, router_probs(layers)


def balance_by_hand(rows: list[list[float]]) -> float:
    """sum_e share_e mean(p_e) over rows of probabilities."""
    total = 0.0
    for e in range(len(rows[0])):
        share = sum(row.index(max(row)) == e for row in rows) / len(rows)
        total += share * sum(row[e] for row in rows) / len(rows)
    return total


def test_balance_loss_is_its_formula_per_layer():
    """Mean over layers of E sum_e share_e mean(p_e); 1 when balanced, E when one gets all."""
    layers, probs = two_layers()
    for layer, p in zip(layers, probs, strict=True):
        assert p is layer.probs
    slow = sum(3 * balance_by_hand(p.reshape(-1, 3).tolist()) for p in probs) / 2
    close(balance_loss(probs, "per_layer").item(), slow)
    # each layer collapsed, to another expert
    collapsed = [F.one_hot(torch.full((1, 6), e), 3).float() for e in (0, 2)]
    assert balance_loss(collapsed, "per_layer") == 3
    balanced = torch.eye(3).repeat(1, 2, 1)
    assert balance_loss([balanced, balanced], "per_layer").item() == pytest.approx(1)
    assert expert_fractions(balanced).tolist() == pytest.approx([1 / 3] * 3)


def test_balance_loss_of_the_released_code_pools_the_layers():
    """"pooled": per image, the tokens of all layers together, no factor E.

    Two layers that collapse to different experts look balanced to it (its minimum 1/2 at E = 2),
    while "per_layer" is at its maximum E.
    """
    _, probs = two_layers()
    slow = 0.0
    for b in range(2):
        slow += balance_by_hand([row for p in probs for row in p[b].tolist()]) / 2
    close(balance_loss(probs, "pooled").item(), slow)
    collapsed = [F.one_hot(torch.full((1, 6), e), 2).float() for e in (0, 1)]
    assert balance_loss(collapsed, "pooled").item() == 0.5
    assert balance_loss(collapsed, "per_layer").item() == 2


@pytest.mark.parametrize("form", [MoLE, ReleasedMoLE])
def test_mole_init(form):
    """"zero" leaves either form at the plain FFN, bit for bit.

    "kaiming" draws both matrices of each expert as PyTorch's kaiming_uniform_ for relu, bound
    sqrt(6 / fan_in) of that one expert, biases 0, and so moves the FFN.
    """
    ffn, x = timm.layers.Mlp(64, 64), torch.randn(2, 5, 64)
    options = {**MOLE, "rank": 4}
    assert torch.equal(form(ffn, 64, **options)(x), ffn(x))
    drawn = form(ffn, 64, **{**options, "init": "kaiming"})
    assert not torch.allclose(drawn(x), ffn(x), atol=1e-2)
    for lora in drawn.new_modules()[1:]:
        for matrix, fan_in in ((lora.down.weight, 64), (lora.up.weight, 4)):
            theirs = nn.init.kaiming_uniform_(torch.empty(64, fan_in), nonlinearity="relu")
            bound = (6 / fan_in) ** 0.5
            assert theirs.abs().max() <= bound
            assert 0.9 * bound < matrix.abs().max() <= bound
        if form is ReleasedMoLE:
            assert lora.up_bias.abs().max() == lora.down.bias.abs().max() == 0


def test_mole_parameters_at_vit_l():
    """Per layer at d = 1024, r = 32, E = 3: 196,608 for one LoRA, 998,592 for two with biases."""
    ffn = timm.layers.Mlp(1024, 4096)
    for form, count in ((MoLE, 196_608), (ReleasedMoLE, 998_592)):
        router, *loras = form(ffn, 1024, **{**MOLE, "rank": 32}).new_modules()
        assert router.weight.shape == (3, 1024)
        assert sum(p.numel() for lora in loras for p in lora.parameters()) == count


# ------------------------------------------------------------------------------------------------
# Token weights


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def test_token_weights_are_the_softmax_over_visual_tokens():
    """W^tok: per head a softmax over the n visual tokens, without [CLS], then the mean over heads.

    It sums to 1.
    """
    scores = torch.randn(2, 3, 5)
    w = token_weights(scores, "paper")
    for b in range(2):
        heads = [softmax(scores[b, h, 1:].tolist()) for h in range(3)]
        for j in range(4):
            slow = sum(head[j] for head in heads) / 3
            assert w[b, j].item() == pytest.approx(slow, rel=1e-5)
    close(w.sum(1), torch.ones(2))


def test_released_token_weights_are_a_softmax_of_a_softmax():
    """"released": softmax over all keys, mean over heads, [CLS] dropped, softmax again.

    It is within a factor e of uniform even for an attention that looks at one token only.
    "uniform" is 1/n, with the same sum 1.
    """
    scores = torch.randn(2, 3, 5)
    scores[0, :, 2] += 50
    w = token_weights(scores, "released")
    for b in range(2):
        heads = [softmax(scores[b, h].tolist()) for h in range(3)]
        p = [sum(head[j] for head in heads) / 3 for j in range(1, 5)]
        assert w[b].tolist() == pytest.approx(softmax(p), rel=1e-5)
    assert w[0].max() / w[0].min() < math.e + 1e-5
    assert token_weights(scores, "paper")[0].max() > 0.999
    assert token_weights(scores, "uniform").tolist() == [[0.25] * 4] * 2


# ------------------------------------------------------------------------------------------------
# Teacher weights


def random_tokens(requires_grad: bool = False) -> dict[str, torch.Tensor]:
    names = ("clip", "eva", "convnext")
    return {name: torch.randn(2, 4, 8, requires_grad=requires_grad) for name in names}


def mean_products(cls: torch.Tensor, teachers: dict, b: int) -> list[float]:
    """mean_j V^cls . V^t_ij for EVA and ConvNeXt, each product written out."""
    means = []
    for name in ("eva", "convnext"):
        V_t = teachers[name].detach()
        means.append(sum(float(cls[b] @ V_t[b, j]) for j in range(4)) / 4)
    return means


def test_teacher_weights_are_the_mean_cross_attention():
    """W^tea: CLIP fixed, for the others (1 - clip_share) softmax mean_j V^cls . V^t_ij / sqrt(d).

    No gradient flows back to the adapters; CLIP alone has weight 1; without CLIP it is an error.
    """
    cls, teachers = torch.randn(2, 8), random_tokens(requires_grad=True)
    options = {"clip_share": 0.8, "form": "paper", "detach": True, "collapse": False}
    w = teacher_weights(cls, teachers, **options)
    for b in range(2):
        scores = [product / math.sqrt(8) for product in mean_products(cls, teachers, b)]
        expected = [0.8] + [0.2 * share for share in softmax(scores)]
        assert w[b].tolist() == pytest.approx(expected, rel=1e-5)
    assert not w.requires_grad
    alone = {"clip": teachers["clip"]}
    assert teacher_weights(cls, alone, **options).tolist() == [[1.0], [1.0]]
    with pytest.raises(ValueError, match="the first teacher must be 'clip', not 'eva'"):
        teacher_weights(cls, {"eva": teachers["eva"]}, **options)


def weights_at_gap(gap: float, detach: bool, collapse: bool) -> tuple[torch.Tensor, dict]:
    """Released weights when V^cls . V^t is `gap` for EVA and 0 for ConvNeXt; the tokens."""
    teachers = {"clip": torch.zeros(2, 4, 2)}
    for name, value in (("eva", gap), ("convnext", 0.0)):
        teachers[name] = torch.tensor([value, 7.0]).repeat(2, 4, 1).requires_grad_()
    cls = torch.tensor([[1.0, 0.0]] * 2)
    w = teacher_weights(cls, teachers, 0.5, "released", detach=detach, collapse=collapse)
    return w, teachers


def test_released_teacher_weights():
    """"released": the raw dot product. "uniform": equal shares.

    Undetached, the adapters get a gradient through it.
    """
    cls, teachers = torch.randn(2, 8), random_tokens()
    w = teacher_weights(cls, teachers, 0.8, "released", detach=True, collapse=False)
    for b in range(2):
        shares = softmax(mean_products(cls, teachers, b))
        assert w[b].tolist() == pytest.approx([0.8] + [0.2 * s for s in shares], rel=1e-5)
    uniform = teacher_weights(cls, teachers, 0.8, "uniform", detach=True, collapse=False)
    assert uniform.tolist() == [pytest.approx([0.8, 0.1, 0.1])] * 2
    w, near = weights_at_gap(1.0, detach=False, collapse=False)
    w[:, 1].sum().backward()
    assert near["eva"].grad.abs().max() > 0
    w, _ = weights_at_gap(1.0, detach=True, collapse=False)
    assert not w.requires_grad


def test_the_collapse_branch_jumps_at_0_8():
    """collapse: softmax(w + 0.2) if the largest batch mean of a teacher exceeds 0.8, else w.

    The mean is each teacher's: images that collapse to different teachers escape it.
    """
    teachers = {"clip": torch.zeros(2, 4, 1), "eva": torch.ones(2, 4, 1),
                "convnext": torch.zeros(2, 4, 1)}
    opposite = torch.tensor([[3.0], [-3.0]])  # rows (0.95, 0.05) and (0.05, 0.95)
    options = {"clip_share": 0.0, "form": "released", "detach": True, "collapse": True}
    w = teacher_weights(opposite, teachers, **options)
    assert w[:, 1].tolist() == pytest.approx([softmax([3, 0])[0], softmax([-3, 0])[0]], rel=1e-4)
    alike = teacher_weights(opposite.abs(), teachers, **options)
    assert alike[0, 1].item() == pytest.approx(softmax(softmax([3, 0]))[0], rel=1e-4)

    below = math.log(0.7999 / 0.2001)
    w, _ = weights_at_gap(below, detach=True, collapse=True)
    assert w[0].tolist() == pytest.approx([0.5, 0.5 * 0.7999, 0.5 * 0.2001], rel=1e-4)
    above = math.log(0.8001 / 0.1999)
    w, _ = weights_at_gap(above, detach=True, collapse=True)
    first, second = softmax([0.8001 + 0.2, 0.1999 + 0.2])
    assert w[0].tolist() == pytest.approx([0.5, 0.5 * first, 0.5 * second], rel=1e-4)


# ------------------------------------------------------------------------------------------------
# L_kd


def test_kd_loss_is_the_double_sum():
    """L_kd = mean over images of sum_i W^tea_i sum_j (W^tok_j + 1/n) mean_d (V^t_ij - V^s_j)^2."""
    student, w_tok, w_tea = torch.randn(2, 4, 8), torch.rand(2, 4), torch.rand(2, 3)
    teachers = random_tokens()
    total, per_teacher = kd_loss(dict.fromkeys(teachers, student), teachers, w_tok, w_tea)
    slow = 0.0
    slow_per = dict.fromkeys(teachers, 0.0)
    for i, (name, V_t) in enumerate(teachers.items()):
        for b in range(2):
            for j in range(4):
                mse = ((V_t[b, j] - student[b, j]) ** 2).mean()
                term = (w_tok[b, j] + 1 / 4) * mse
                slow += float(w_tea[b, i] * term) / 2
                slow_per[name] += float(term) / 2
    assert total.item() == pytest.approx(slow, rel=1e-5)
    values = {name: value.item() for name, value in per_teacher.items()}
    assert values == pytest.approx(slow_per, rel=1e-5)


def test_uniform_weights_are_plain_mse():
    """With W^tok uniform and one teacher, L_kd is 2 MSE: W^tok and the 1/n each sum to 1."""
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    uniform = torch.full((2, 4), 1 / 4)
    total, _ = kd_loss({"clip": student}, {"clip": teacher}, uniform, torch.ones(2, 1))
    close(total, 2 * F.mse_loss(teacher, student))


def test_released_kd_loss_is_our_double_sum():
    """The released code adds the mean over tokens and the weighted sum over tokens: the same."""
    student, tokens = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    w_tok, w_tea = torch.rand(2, 4), torch.rand(2, 1)
    mse = (tokens - student).square().mean(-1)
    slow = (w_tea[:, 0] * (mse.mean(1) + (w_tok * mse).sum(1))).mean()
    close(kd_loss({"clip": student}, {"clip": tokens}, w_tok, w_tea)[0], slow)


def test_token_weights_on_another_grid():
    """Resized to a teacher's grid, W^tok still sums to 1, and the heavy quarter stays heavy."""
    w_tok = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2)
    weight = on_grid(w_tok, 16)
    close(weight.sum(1), torch.ones(2))
    assert weight[0].unflatten(0, (4, 4))[:2, :2].sum() > 0.5
    assert on_grid(w_tok, 4) is w_tok


# ------------------------------------------------------------------------------------------------
# CLIP


def test_cls_row_is_the_row_of_the_full_attention():
    """Softmax of our [CLS] scores = row 0 of the attention matrix of the block of layer -2."""
    clip = ClipEncoder(C.clip).eval()
    out, attention = clip(common.images(2)), clip.net.blocks[-1].attn
    seen = {}
    hook = attention.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    clip(common.images(2))
    hook.remove()
    qkv = attention.qkv(seen["x"]).reshape(2, 37, 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    full = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)          # (B, h, 1 + n, 1 + n)
    close(out.cls_scores.softmax(-1), full[:, :, 0], atol=1e-6, rtol=1e-5)


def test_clip_tokens_are_hidden_layer_minus_2():
    """Without its last block, the encoder gives timm's last-but-one intermediate of the whole."""
    whole = VisionEncoder(C.clip).eval()
    clip = ClipEncoder(C.clip).eval()
    state = whole.net.state_dict()
    left = {key: v for key, v in state.items() if not key.startswith(("blocks.3.", "norm."))}
    clip.net.load_state_dict(left)
    (tokens, prefix), = whole.net.forward_intermediates(
        whole.view(common.images(2)), indices=[-2], return_prefix_tokens=True, norm=False,
        output_fmt="NLC", intermediates_only=True)
    out = clip(common.images(2))
    assert torch.equal(out.tokens, tokens)
    assert torch.equal(out.cls, prefix[:, 0])


# ------------------------------------------------------------------------------------------------
# Teachers and encoder adapters


def test_teachers_differ_and_adapters_bring_them_together():
    """Teachers differ in width, token count and resolution; an adapter's output is the student's.

    The declared sizes are the real ones; CLIP's tokens have no adapter.
    """
    teachers = common.tiny_teachers()
    outputs = teachers(common.images(2), [])
    shapes = {name: tuple(out.tokens.shape[1:]) for name, out in outputs.items()}
    assert len({n for n, _ in shapes.values()}) == 3
    assert len({d for _, d in shapes.values()}) == 3
    assert len({encoder.image_size for encoder in teachers.encoders.values()}) == 3
    for name, encoder in teachers.encoders.items():
        assert shapes[name] == (encoder.num_tokens, encoder.dim)
    adapters = build_movekd(C, common.small_vlm(), teachers).adapters
    adapted = adapt(outputs, adapters)
    assert [tuple(V.shape) for V in adapted.values()] == [(2, *shapes["clip"])] * 3
    assert adapted["clip"] is outputs["clip"].tokens


def test_teachers_are_frozen_whatever_the_caller_does():
    """No parameter wants a gradient, no output carries one, train() leaves them in eval mode."""
    teachers = nn.ModuleList([common.tiny_teachers()]).train()[0]
    assert not any(p.requires_grad for p in teachers.parameters())
    assert not any(m.training for m in teachers.encoders.modules())
    assert not any(out.tokens.requires_grad for out in teachers(common.images(1), []).values())


def test_views_are_one_geometry():
    """Each encoder's view is the whole square image at its own size: a corner stays that corner.

    Its mean and std are its own: SAM's are ImageNet's.
    """
    picture = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    picture[:, :, :24, 72:] = 255
    for encoder in common.tiny_teachers().encoders.values():
        view = encoder.view(picture)[0, 0]
        side = encoder.image_size
        assert view.shape == (side, side)
        assert view[side // 8, -side // 8] > view[-side // 8, side // 8] + 1
    assert VisionEncoder(REAL["sam"]).mean != ClipEncoder(C.clip).mean


@pytest.mark.parametrize("spec", [C.convnext, REAL["sam"]])
def test_tokens_of_a_map_go_row_by_row(spec):
    """Token 4 i + j of ConvNeXt's and of SAM's map (B, d, 4, 4) is all of place (i, j).

    (The released code mixes the axes of SAM's.)
    """
    encoder = VisionEncoder(spec).eval()
    features = encoder.net.forward_features(encoder.view(common.images(2)))
    tokens = encoder(common.images(2)).tokens
    assert tokens.shape == (2, encoder.num_tokens, encoder.dim) == (2, 16, features.shape[1])
    close(tokens[1, 1 * 4 + 2], features[1, :, 1, 2])


def test_adapter_is_its_formula():
    """V^t_kj = sum_i W2_ki GELU(W1 norm(x_i))_j + b2_k: channels first, then tokens."""
    adapter, x = EncoderAdapter(5, 6, 4, 8, "token_mixing"), torch.randn(2, 5, 6)
    z = F.gelu(adapter.channels(F.layer_norm(x, (6,))))
    slow = torch.empty(2, 4, 8)
    for k in range(4):
        mixed = sum(adapter.out.weight[k, i] * z[:, i] for i in range(5))
        slow[:, k] = mixed + adapter.out.bias[k]
    close(adapter(x), slow)


def test_other_adapter_forms():
    """"released": channels, GELU, tokens on the raw features, no norm.

    "per_token": the map averaged to the student's grid, then W2 GELU(W1 x) of each token alone.
    """
    x = torch.randn(2, 16, 6)
    released = EncoderAdapter(16, 6, 4, 8, "released")
    z = F.gelu(x @ released.channels.weight.T + released.channels.bias)
    slow = torch.einsum("ki,bic->bkc", released.out.weight, z) + released.out.bias[:, None]
    close(released(x), slow)
    per_token = EncoderAdapter(16, 6, 4, 8, "per_token")
    assert per_token(x).shape == (2, 4, 8)
    same = EncoderAdapter(16, 6, 16, 8, "per_token")
    alone = same.out(F.gelu(same.channels(F.layer_norm(x[:, 3], (6,)))))
    close(same(x)[:, 3], alone)


def test_student_to_teacher_is_the_other_direction():
    """AM-RADIO's direction: each teacher's own normalised tokens against a head of V^s.

    CLIP's are against V^s itself; the token weights are taken to the teacher's grid.
    """
    V_s = torch.randn(2, 4, 8)
    outputs = {"clip": TeacherOutput(torch.randn(2, 4, 8), None, None),
               "eva": TeacherOutput(torch.randn(2, 16, 6), None, None)}
    heads = nn.ModuleDict({"eva": EncoderAdapter(4, 8, 16, 6, C.adapter_form)})
    norms = nn.ModuleDict({"eva": nn.LayerNorm(6, elementwise_affine=False)})
    student, target = adapt_student(V_s, outputs, heads, norms)
    assert student["clip"] is V_s
    assert target["clip"] is outputs["clip"].tokens
    close(student["eva"], heads["eva"](V_s))
    close(target["eva"], F.layer_norm(outputs["eva"].tokens, (6,)))
    w_tok = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2)
    total, _ = kd_loss(student, target, w_tok, torch.tensor([[0.4, 0.6]] * 2))
    slow = 0.0
    for name, share, n in (("clip", 0.4, 4), ("eva", 0.6, 16)):
        mse = (target[name] - student[name]).square().mean(-1)
        slow = slow + share * ((on_grid(w_tok, n) + 1 / n) * mse).sum(1).mean()
    close(total, slow)


# ------------------------------------------------------------------------------------------------
# Student and VLM


def test_student_starts_as_clip():
    """At step 0 the student's tokens are CLIP's, bit for bit: the VLM is exactly LLaVA-1.5."""
    clip = ClipEncoder(C.clip).eval()
    student = Student(C.clip).eval()
    student.load_state_dict(clip.state_dict())
    student.add_experts(form="ffn", **{**MOLE, "rank": 8, "dropout": 0.05}).eval()
    assert len(mole_layers(student)) == len(clip.net.blocks) == 3
    assert torch.equal(student(common.images(2)), clip(common.images(2)).tokens)


def prompts() -> tuple[list[dict], dict]:
    """Three prompts of unequal length, two with an image; and their left-padded batch."""
    rows = [[2] + [4] * 36 + [9, 10, 11], [2, 12, 13], [2, 14] + [4] * 36 + [15]]
    samples = []
    for i, ids in enumerate(rows):
        image = common.images(3)[i] if 4 in ids else None
        samples.append({"input_ids": ids, "labels": ids, "image": image, "name": str(i),
                        "cut": False})
    return samples, collate(samples, 0, side="left")


def test_splice_puts_tokens_where_image_stands():
    """The k-th image's projected tokens stand in the k-th sample that has <image>, in order.

    All other places hold word embeddings; another number of images is an error.
    """
    vlm, (_, batch) = common.small_vlm(), prompts()
    visual = vlm.student(batch["images"])
    x = vlm.splice(batch["input_ids"], visual)
    k = 0
    for b, row in enumerate(batch["input_ids"].tolist()):
        j = 0
        for t, token in enumerate(row):
            if token == 4:
                close(x[b, t], vlm.projector(visual[k, j]))
                j += 1
            else:
                close(x[b, t], vlm.llm.embed_tokens.weight[token])
        k += j > 0
    with pytest.raises(InputError, match="72 image tokens in the text, but 36 visual"):
        vlm.splice(batch["input_ids"], visual[:1])


def test_batched_cached_generation_is_single_uncached_generation():
    """Greedy answers of a left-padded batch with a KV cache = each prompt alone, uncached."""
    vlm, (samples, batch) = common.small_vlm(), prompts()
    for parameter in vlm.llm.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast = vlm.generate(vlm.student(batch["images"]), batch["input_ids"],
                        batch["attention_mask"], eos=3, max_new_tokens=6)
    for row, sample in zip(fast, samples, strict=True):
        one = collate([sample], 0)
        visual = None if one["images"] is None else vlm.student(one["images"])
        ids = one["input_ids"]
        for expected in row.tolist():
            token = vlm(visual, ids, torch.ones_like(ids))[0, -1].argmax().item()
            assert token == expected
            if token == 3:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


# ------------------------------------------------------------------------------------------------
# L_text: prompts, label masks, loss


def test_text_loss_is_on_answer_tokens_only():
    """L_text = mean of -log p(token t+1 | tokens <= t) over the labelled tokens, one by one."""
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE], [IGNORE, 1, IGNORE, IGNORE, 2]])
    terms = []
    for b in range(2):
        for t in range(1, 5):
            if labels[b, t] != IGNORE:
                terms.append(-logits[b, t - 1].log_softmax(-1)[labels[b, t]])
    close(text_loss(logits, next_tokens(labels)), torch.stack(terms).mean())


def test_labels_are_the_answers_and_nothing_else():
    """v1: the loss sees each answer and its </s>, never role names, questions or image tokens.

    plain: the caption and its </s>, and the human's words are gone.
    """
    turns = common.conversation("<image>\nwhat shape?", "heart", "what colour?", "dark red")
    record = {"image": "a.png", "conversations": turns}
    tokenizer = WordTokenizer.from_records([record])
    ids, labels = conversation_ids(record, "v1", tokenizer, n=2)
    expected = ("<s> USER: <image> <image> what shape ? ASSISTANT: heart </s> "
                "USER: what colour ? ASSISTANT: dark red </s>")
    assert [tokenizer.vocabulary[i] for i in ids] == expected.split()
    assert [i for i, label in enumerate(labels) if label != IGNORE] == [8, 9, 15, 16, 17]
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    record["conversations"] = turns[:2]
    ids, labels = conversation_ids(record, "plain", tokenizer, n=2)
    assert [tokenizer.vocabulary[i] for i in ids] == "<s> <image> <image> heart </s>".split()
    assert labels == [IGNORE] * 3 + ids[3:]


# ------------------------------------------------------------------------------------------------
# The whole method


def rows_of(batch: dict, rows: slice) -> dict:
    """The text of some samples of a batch."""
    return {key: batch[key][rows] for key in ("input_ids", "labels", "attention_mask")}


def test_forward_is_its_parts():
    """MoVEKD.forward is L_text, L_kd and L_balance of its own parts, called one by one."""
    model, teachers, batch = common.whole_method()
    terms = model(batch, teachers)
    V_s = model.vlm.student(batch["images"])
    logits = model.vlm(V_s, batch["input_ids"], batch["attention_mask"])
    close(terms["L_text"], text_loss(logits, next_tokens(batch["labels"])))
    outputs = teachers(batch["images"], [])
    targets = adapt(outputs, model.adapters)
    w_tok = token_weights(outputs["clip"].cls_scores, "paper")
    w_tea = teacher_weights(outputs["clip"].cls, targets, C.clip_share, "paper", detach=True,
                            collapse=False)
    L_kd, per_teacher = kd_loss(dict.fromkeys(targets, V_s), targets, w_tok, w_tea)
    close(terms["L_kd"], L_kd)
    probs = router_probs(model.vlm.student)
    close(terms["L_balance"], balance_loss(probs, "per_layer"))
    close(terms["experts"], torch.stack([expert_fractions(p) for p in probs]))
    for i, name in enumerate(targets):
        close(terms[f"kd_{name}"], per_teacher[name])
        close(terms[f"w_{name}"], w_tea[:, i].mean())


def test_text_only_samples_have_no_kd_term():
    """A text-only sample in the batch changes neither L_kd nor L_balance.

    A batch of them alone has neither.
    """
    model, teachers, batch = common.whole_method(n_text=1)
    mixed = model(batch, teachers)
    pictured = model({**batch, **rows_of(batch, slice(0, 2))}, teachers)
    assert mixed["L_kd"] == pictured["L_kd"]
    assert mixed["L_balance"] == pictured["L_balance"]
    assert mixed["L_text"] != pictured["L_text"]
    alone = model({**rows_of(batch, slice(2, None)), "images": None}, teachers)
    assert alone["L_kd"] == alone["L_balance"] == 0
    assert alone["L_text"] > 0


def test_total_loss_and_where_its_gradient_goes():
    """L_total reaches every parameter but the teachers'; the adapters learn from L_kd alone.

    Without distillation the teachers do not even run. (That the loop adds the terms so is tested
    on the log of a run, in tests/test_runs.py.)
    """
    model, teachers, batch = common.whole_method()
    terms = model(batch, teachers)
    (terms["L_text"] + terms["L_balance"]).backward(retain_graph=True)
    assert all(p.grad is None for p in model.adapters.parameters())
    model.zero_grad()
    common.total_loss(terms).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for p in teachers.parameters())
    model.options.distil = False
    without = model(batch, None)
    assert without["L_kd"] == 0
    assert without["L_text"] == terms["L_text"]


def test_each_stage_trains_what_the_recipe_says():
    """Stage 1 trains experts, adapters, projector; stage 2 all but the teachers.

    The printed table says so. No parameter is left out of it, none is in it twice.
    """
    teachers = common.tiny_teachers()
    model = build_movekd(C, common.small_vlm(), teachers)
    groups = model.parameter_groups()
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    for name, teacher in teachers.encoders.items():
        groups[f"teacher {name}"] = list(teacher.parameters())
    new = {"student MoLE", "projector", "adapter eva", "adapter convnext"}
    moved = {1: new, 2: new | {"student backbone", "LLM"}}
    for stage in (1, 2):
        model.set_stage(stage)
        table = stage_table(stage, model, teachers).splitlines()
        assert len(table) == 2 + len(groups)
        for name, parameters in groups.items():
            trained = name in moved[stage]
            assert all(p.requires_grad == trained for p in parameters)
            row, = (line for line in table if line.startswith(f"  {name} "))
            assert row.endswith("trained" if trained else "frozen")
            assert f"{sum(p.numel() for p in parameters):,}" in row
