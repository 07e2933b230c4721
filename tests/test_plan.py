"""tools.plan: its counts are timm's and transformers', its predictions those of a measured step."""

import dataclasses
import re
from argparse import Namespace

import pytest
import timm
import torch

from data import InputError, collate
from plumbing.config import TINY
from plumbing.files import flop_counter
from plumbing.flags import parse_config
from plumbing.processes import Step
from plumbing.sets import build_datasets, build_tokenizer, load_sets
from teachers import parse_spec
from tools.plan import __main__ as program
from tools.plan.memory import PeakMemory, activations, memory
from tools.plan.models import count, forward_flops, meta_models, random_models
from train import forward_backward


@pytest.fixture(scope="module")
def full_meta():
    """The config of --full and its models on the meta device."""
    pytest.importorskip("transformers")
    c = parse_config(["--full"])
    return c, *meta_models(c)


def test_plan_counts_what_the_libraries_count(full_meta):
    """Teachers are timm's models, CLIP less what is not run; LLMs the real ones; FLOPs by hand."""
    c, model, teachers = full_meta
    for name, encoder in teachers.encoders.items():
        timm_name, size, options = parse_spec(getattr(c, name))
        if name != "convnext":
            options["img_size"] = size
        with torch.device("meta"):
            own = timm.create_model(timm_name, num_classes=0, **options)
        expected = count(own.parameters())
        if name == "clip":
            expected -= count(own.blocks[-1].parameters()) + count(own.norm.parameters())
        assert count(encoder.parameters()) == expected
    small, _ = meta_models(parse_config(["--small"]))
    assert count(model.vlm.llm.parameters()) == 6_738_415_616       # Vicuna-7B
    assert count(small.vlm.llm.parameters()) == 134_515_008         # SmolLM2-135M
    experts = 23 * (3 * 2 * 1024 * 32 + 3 * 1025)
    clip = count(teachers.encoders["clip"].parameters())
    assert count(model.vlm.student.parameters()) == clip + experts
    forward = forward_flops(c, model, teachers, 676)
    tokens, D, H, V = 676, 4096, 11008, 32000
    layer = 2 * tokens * (4 * D * D + 3 * D * H) + 4 * tokens * tokens * D
    assert forward["LLM"] == pytest.approx(32 * layer + 2 * tokens * D * V, rel=1e-6)
    for name, flops in (("clip", 0.37e12), ("eva", 4.1e12), ("convnext", 6.3e12)):
        assert forward[f"teacher {name}"] == pytest.approx(flops, rel=0.015)


@pytest.mark.parametrize("stage", [0, 2])
def test_plan_predicts_a_measured_step(stage):
    """FLOPs to 5 %, memory to 15 %, of a real step on this machine, with the LLM or without."""
    c = dataclasses.replace(TINY, n_pretrain=64, n_train=64, n_described=0, n_text=0,
                            stage2_batch=8, distil_batch=8)
    sets = load_sets(c)
    tokenizer = build_tokenizer(c, sets)
    dataset = build_datasets(c, sets, tokenizer, 36)[2]
    batch = collate([dataset[i] for i in range(8)], tokenizer.pad)
    model, teachers = random_models(c, "cpu")
    model.set_stage(stage)
    optimizer = torch.optim.AdamW(model.parameters())
    with flop_counter() as counter, PeakMemory() as measured:
        for _ in range(2):  # only the second has the optimizer's state from the start
            forward_backward(c, model, teachers, Step.of(batch))
            optimizer.step()
            optimizer.zero_grad()
    weights = 4 * (count(model.parameters()) + count(teachers.parameters()))

    model, teachers = meta_models(c)
    model.set_stage(stage)
    tokens = batch["input_ids"].shape[1]
    flops = program.step_flops(c, stage, forward_flops(c, model, teachers, tokens), tokens)
    assert 2 * sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)
    fixed = memory(c, model, teachers, gpus=1, accumulate=False)
    planned = sum(fixed.values()) - fixed["CUDA's context"]
    planned += 8 * activations(c, model, teachers, tokens)
    assert planned == pytest.approx(weights + measured.peak, rel=0.15)


@pytest.mark.slow
def test_plan_names_what_it_assumes(full_meta):
    """Stage 2 of --full on 8 GPUs: 40 GB counted, 6 to 9 GB around them, by name; fits or not."""
    def stage2(micro_batch, gb):
        c = dataclasses.replace(full_meta[0], micro_batch=micro_batch)
        return program.stage_memory(c, 2, *full_meta[1:], Namespace(gpus=8, gpu_memory=gb))
    lines, fits = stage2(16, 80.0)
    rows = dict(re.findall(r"^\| (.+) \| ([\d.]+) \|$", "\n".join(lines), re.M))
    assert fits and 37 <= float(rows["together"]) <= 41
    named = ("buffers of gather and reduce", "fragments", "CUDA's context", "NCCL")
    assert 6 <= sum(float(rows[name]) for name in named) <= 9
    assert stage2(8, 80.0)[0][:-1] == stage2(8, 40.0)[0][:-1]  # the need, whether it fits or not


@pytest.mark.slow
def test_plan_says_what_does_not_fit_and_counts_the_real_words(capsys):
    """It promises hours only if both stages fit. Its tiny LLM has the words of the tiny world."""
    program.main(["--tiny", "--gpus", "1", "--gpu-memory", "0.815"])
    text = capsys.readouterr().out
    stage1, stage2 = text.split("\nstage ")[1:]
    assert "DOES NOT FIT" not in stage1 and "DOES NOT FIT" in stage2
    assert "more GPUs" in stage2 and "780 steps" in stage2 and "hours" not in text
    program.main(["--tiny", "--recipe", "ours"])
    text = capsys.readouterr().out
    assert "DOES NOT FIT" not in text and text.count("hours") == 5 and "372 steps" in text
    model, _ = random_models(TINY, "cpu")
    assert f"| LLM | {count(model.vlm.llm.parameters()):,} |" in text


@pytest.mark.parametrize("flags", ["--gpus 0", "--gpu-memory nan", "--gpu-memory inf", "--mfu 2",
                                   "--gpu-memory -3", "--gpu-tflops nan"])
def test_plan_refuses_a_machine_that_cannot_be(flags):
    """By an InputError, which is one line."""
    with pytest.raises(InputError, match="must be finite and above 0"):
        program.main(["--tiny", *flags.split()])
