"""tools.plan: its counts are timm's and transformers', its predictions those of a measured step."""

import dataclasses
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import Student
from plumbing.config import TINY
from plumbing.files import flop_counter
from plumbing.flags import parse_config
from plumbing.sets import image_bytes, training_size
from teachers import VisionEncoder, parse_spec
from tests.common import MOLE
from tiny.llm import TinyLLM
from tools import plan
from tools.measuring import PeakMemory, count, saved_bytes
from tools.meta import (activations, forward_flops, fused_attention, llm_config, meta_models,
                        meta_step, step_flops)
from tools.tiny_step import TinyStep


@pytest.fixture(scope="module")
def full_meta():
    """The config of --full and its models without their numbers."""
    pytest.importorskip("transformers")
    c = parse_config(["--full"])
    return c, *meta_models(c)


def test_plan_counts_encoders_as_timm_does(full_meta):
    """Every teacher of --full has the parameters of timm's own model; CLIP less what is not run."""
    c, _, teachers = full_meta
    for name, encoder in teachers.encoders.items():
        model, size, options = parse_spec(getattr(c, name))
        if name != "convnext":
            options["img_size"] = size
        with torch.device("meta"):
            own = timm.create_model(model, num_classes=0, **options)
        expected = count(own.parameters())
        if name == "clip":
            expected -= count(own.blocks[-1].parameters()) + count(own.norm.parameters())
        assert count(encoder.parameters()) == expected


def test_plan_counts_llms_as_transformers_does(full_meta):
    """Vicuna-7B and SmolLM2-135M have the parameters of their real checkpoints."""
    transformers = pytest.importorskip("transformers")
    _, model, _ = full_meta
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
        config = llm_config("HuggingFaceTB/SmolLM2-135M-Instruct")
        smollm = transformers.LlamaForCausalLM(config)
    assert count(model.vlm.llm.parameters()) == count(llama.parameters()) == 6_738_415_616
    assert count(smollm.parameters()) == 134_515_008


def test_plan_counts_experts_and_flops_by_hand(full_meta):
    """The student is CLIP and its experts; FLOPs are those of the formulas."""
    c, model, teachers = full_meta
    experts = 23 * (3 * 2 * 1024 * 32 + 3 * 1025)
    clip = count(teachers.encoders["clip"].parameters())
    assert count(model.vlm.student.parameters()) == clip + experts
    forward = forward_flops(c, model, teachers, 676)
    tokens, D, H, V = 676, 4096, 11008, 32000
    layer = 2 * tokens * (4 * D * D + 3 * D * H) + 4 * tokens * tokens * D
    assert forward["LLM"] == pytest.approx(32 * layer + 2 * tokens * D * V, rel=1e-6)
    assert 0.36e12 < forward["teacher clip"] < 0.38e12
    assert 4.0e12 < forward["teacher eva"] < 4.2e12
    assert 6.2e12 < forward["teacher convnext"] < 6.4e12


def measured_step(step: TinyStep) -> tuple[int, float]:
    """FLOPs of a step, and its peak memory beside weights: bytes."""
    step()
    with flop_counter() as counter:
        step()
    step.optimizer.state.clear()
    with PeakMemory() as measured:
        step()
        step()  # only the second has the optimizer's state from the start
    return counter.get_total_flops(), measured.peak


def test_plan_predicts_a_measured_step():
    """FLOPs and memory of the plan against a real step of stage 2 on this machine.

    FLOPs within 5 %; memory within 15 % of weights and optimizer as allocated and the measured peak
    of everything made during the step.
    """
    # small, but large enough that its tensors are more than crumbs
    c = parse_config("--tiny --cache-teachers= --n-pretrain 64 --n-train 64 --n-described 0 "
                     "--n-text 0 --stage2-batch 8".split())
    step = TinyStep(c)
    flops, peak = measured_step(step)
    model, teachers = meta_models(c)
    with torch.device("meta"):
        # the same words: the meta models' vocabulary is a stand-in
        words = len(step.model.vlm.llm.embed_tokens.weight)
        model.vlm.llm = TinyLLM(words, c.lm_dim, c.lm_depth, c.lm_heads, c.lm_hidden)
    model.set_stage(2)
    tokens = step.batch["input_ids"].shape[1]
    per_step = step_flops(c, 2, forward_flops(c, model, teachers, tokens))
    assert 8 * sum(per_step.values()) == pytest.approx(flops, rel=0.05)
    per_sample = activations(c, model, teachers, tokens)
    m = plan.memory(c, model, teachers, 1, False, per_sample)
    weights = 4 * (count(step.model.parameters()) + count(step.teachers.parameters()))
    assert m.fixed + 8 * per_sample == pytest.approx(weights + peak, rel=0.15)


def test_plan_carries_the_views_that_the_loader_makes(full_meta, monkeypatch):
    """In a step of --full 336 and 1024 px of each sample, without L_kd 336; of --tiny one image.

    They are the bytes that the workers' shared memory is checked for.
    """
    c, *_ = full_meta
    seen = []
    monkeypatch.setattr(VisionEncoder, "view", lambda encoder, images: seen.append(images))
    for config, sizes in ((c, (336, 1024)), (dataclasses.replace(c, lambda_kd=0.0), (336,)),
                          (TINY, 128)):
        step = meta_models(config)
        with pytest.raises(AttributeError):  # what sees no picture cannot go on
            meta_step(config, *step, 3, 700)
        images = seen.pop()
        if isinstance(sizes, int):
            assert images.shape == (3, 3, sizes, sizes)
        else:
            assert {size: view.shape for size, view in images.items()} == {
                size: (3, 3, size, size) for size in sizes}
        views = images.values() if isinstance(images, dict) else [images]
        assert sum(view.numel() for view in views) == 3 * image_bytes(training_size(config))


def test_plan_says_what_does_not_fit(full_meta, capsys):
    """7B does not fit one card of 24 GB, eight of 80 GB hold it.

    The plan says so, and what would help.
    """
    c, model, teachers = full_meta
    model.set_stage(2)
    one, eight = (plan.memory(c, model, teachers, gpus, False, 0.0).fixed for gpus in (1, 8))
    assert one > 100e9
    assert eight < 25e9
    plan.main("--tiny --gpus 1 --gpu-memory 0.01".split())
    stage2 = capsys.readouterr().out.split("\nstage 2: ")[1]
    assert "DOES NOT FIT" in stage2
    assert "more GPUs" in stage2
    assert "780 steps" in stage2
    plan.main("--tiny --gpus 1".split())
    assert "DOES NOT FIT" not in capsys.readouterr().out


def small_modules() -> dict[str, tuple]:
    """Modules with attention, each with its input: student with experts, EVA, the tiny LLM."""
    student = Student(TINY.clip).add_experts(form="ffn", **MOLE)
    eva = VisionEncoder(TINY.eva)
    llm = TinyLLM(40, dim=32, depth=2, heads=4, hidden=48)
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"student": (student, pixels), "eva": (eva.net.forward_features, eva.view(pixels)),
            "llm": (llm, torch.zeros(2, 9, 32), mask)}


@pytest.mark.parametrize("name", ["student", "eva", "llm"])
def test_the_meta_device_keeps_what_the_fused_kernel_keeps(name):
    """Bytes that autograd saves, counted on the meta device: those of the real fused kernel.

    Attention without a mask (student, EVA) and with one (the tiny LLM); as the meta device takes
    attention apart by itself it would keep more.
    """
    form, *inputs = small_modules()[name]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # it or an error
        real = saved_bytes(lambda: form(*inputs))
    with torch.device("meta"):
        form, *inputs = small_modules()[name]
        unfused = saved_bytes(lambda: form(*inputs))
        with fused_attention():
            counted = saved_bytes(lambda: form(*inputs))
    assert counted == real < unfused


def test_fused_attention_keeps_five_tensors():
    """q, k, v and the output, 4 B h T D/h, and the logsumexp, B h T numbers in fp32.

    In bf16 and with grouped keys too: with a quarter of the heads k and v are a quarter.
    """
    B, h, T, size = 2, 4, 50, 16
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        for groups in (1, 4):
            shapes = [(B, h, T, size), (B, h // groups, T, size), (B, h // groups, T, size)]
            q, k, v = [torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
                       for shape in shapes]
            with fused_attention():
                saved = saved_bytes(lambda: F.scaled_dot_product_attention(
                    q.clone(), k.clone(), v.clone(), is_causal=True, enable_gqa=groups > 1))
            assert saved == B * h * T * (size * width * (2 + 2 / groups) + 4)


def test_plan_names_what_it_assumes(full_meta):
    """Stage 2 of --full on 8 GPUs of 80 GB: 39 GB counted, 6 to 9 GB around them, by name."""
    lines, _ = plan.stage_plan(full_meta[0], 2, *full_meta[1:], plan.Gpus(8, 80, 312, 0.4), 1.0)
    rows = dict(re.findall(r"^\| (.+) \| ([\d.]+) \|$", "\n".join(lines), re.M))
    assert 37 <= float(rows["together"]) <= 41
    named = ("buffers of gather and reduce", "fragments", "CUDA's context", "NCCL")
    assert 6 <= sum(float(rows[name]) for name in named) <= 9
