"""The whole training step of train.py --tiny: against its parts, against size, and in profile."""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from data import collate
from model import Student, next_tokens, text_loss
from plumbing.build import build_movekd, build_teachers, build_vlm
from plumbing.config import TINY, Config
from plumbing.sets import build_datasets, build_tokenizer, load_sets
from plumbing.teacher_outputs import cache_teachers
from teachers import adapt, build_adapters
from tools.measuring import DEVICE, Row, peak_bytes, seconds, table_line

# few samples: a step needs one batch
FEW = dataclasses.replace(TINY, n_pretrain=64, n_train=64, n_described=0, cache_teachers="")


class TinyStep:
    """One stage-2 step of a config, on a real batch and random weights, as often as it is called.

    Its models, optimizer and batch are there to be looked at.
    """

    def __init__(self, c: Config, batch_size: int | None = None):
        self.c = c
        sets = load_sets(c)
        tokenizer = build_tokenizer(c, sets)
        vlm = build_vlm(c, tokenizer, {}).to(c.device)
        self.teachers = build_teachers(c, {}).to(c.device)
        if c.cache_teachers:
            shown = [sets["pretrain"], sets["train"]]
            self.teachers = cache_teachers(self.teachers, Path(c.cache_teachers), shown)
        with torch.random.fork_rng():
            self.model = build_movekd(c, vlm, self.teachers)
        # build_movekd seeds, so its adapters begin with the draws of the random student: new ones
        n, d = vlm.student.num_tokens, vlm.student.dim
        self.model.adapters = build_adapters(self.teachers, n, d, c.adapter_form,
                                             c.adapter_direction)
        self.model.to(c.device)
        self.model.set_stage(2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

        # a batch as the loader makes it, on the device
        dataset = build_datasets(c, sets, tokenizer, n)[2]
        samples = [dataset[i] for i in range(batch_size or c.stage2_batch)]
        self.batch = {}
        for name, value in collate(samples, tokenizer.pad).items():
            self.batch[name] = value.to(c.device) if torch.is_tensor(value) else value

    def loss(self) -> torch.Tensor:
        """L_total, ()"""
        terms = self.model(self.batch, self.teachers)
        return (terms["L_text"] + self.c.lambda_kd * terms["L_kd"]
                + self.c.balance_weight * terms["L_balance"])                               # ()

    def __call__(self) -> None:
        """Forward, backward, update."""
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------
# Against its parts


def bench_step() -> list[Row]:
    """The step against the sum of its parts' floors, each alone.

    They are CLIP without experts, the LLM, the teachers, the adapters and the optimizer.
    """
    step = TinyStep(dataclasses.replace(FEW, device=DEVICE))
    forms = {"step": step, **floors(step)}
    t = seconds(forms, 50)
    ours = t.pop("step")
    floor = sum(t.values())
    return [Row("training step, tiny", "time", "sum of its parts' floors", ours, floor, 1.15)]


def floors(step: TinyStep) -> dict[str, Callable]:
    """Each part of the step alone."""
    vlm, batch, images = step.model.vlm, step.batch, step.batch["images"]
    clip = Student(step.c.clip).to(DEVICE).train()
    shape = (len(images), clip.num_tokens, clip.dim)
    V_s = torch.randn(shape, device=DEVICE, requires_grad=True)                     # (B, n, d)
    weight = torch.randn(shape, device=DEVICE)                                      # (B, n, d)

    step()
    step.loss().backward()  # gradients for the optimizer to use
    outputs = step.teachers(images, batch["image_names"])

    def student() -> None:
        (clip(images) * weight).sum().backward()

    def llm() -> None:
        logits = vlm(V_s, batch["input_ids"], batch["attention_mask"])              # (B, T, V)
        text_loss(logits, next_tokens(batch["labels"])).backward()

    @torch.no_grad()
    def teachers() -> None:
        for encoder in step.teachers.encoders.values():
            encoder.net.forward_features(encoder.view(images))

    def adapters() -> None:
        V_t = adapt(outputs, step.model.adapters)                                   # m x (B, n, d)
        sum((V_t[name] * weight).sum() for name in step.model.adapters).backward()

    return {"student without experts": student, "projector + LLM": llm, "teachers": teachers,
            "adapters": adapters, "optimizer": step.optimizer.step}


# ------------------------------------------------------------------------------------------------
# Against size


def scaling() -> list[str]:
    """Step time and memory against size; the exponent is log(ratio of cost) / log(of size)."""
    base = dataclasses.replace(FEW, device=DEVICE, n_text=0)
    more_tokens = base.clip.replace("img_size=48", "img_size=64")
    bigger = {  # what: (config, batch, ratio of size)
        "student tokens n 36 -> 64": (dataclasses.replace(base, clip=more_tokens), 16, 64 / 36),
        "experts 3 -> 6": (dataclasses.replace(base, mole_experts=6), 16, 2),
        "rank 8 -> 16": (dataclasses.replace(base, mole_rank=16), 16, 2),
        "teachers 2 -> 3": (base, 16, 3 / 2),
        "batch 16 -> 32": (base, 32, 2),
    }
    two_teachers = dataclasses.replace(base, teachers=("clip", "eva"))
    steps = {"base": TinyStep(base), "two teachers": TinyStep(two_teachers)}
    for what, (c, batch, _) in bigger.items():
        steps[what] = TinyStep(c, batch)
    time = seconds(steps, 9)
    memory = {name: peak_bytes(step) for name, step in steps.items()}

    lines = ["| training step, tiny | time | exponent | peak memory | exponent |",
             "|---|---|---|---|---|"]
    for what, (_, _, ratio) in bigger.items():
        start = "two teachers" if what.startswith("teachers") else "base"
        cells = [what]
        for cost in (time, memory):
            growth = cost[what] / cost[start]
            cells += [f"{growth:.2f}x", f"{math.log(growth) / math.log(ratio):.2f}"]
        lines.append(table_line(*cells))
    return lines


# ------------------------------------------------------------------------------------------------
# In profile


def profile_tiny(steps: int = 20) -> str:
    """What a stage-2 step spends its time on, and the share outside the dense operations.

    Dense are matrix products, attention and convolution. The share and the time of a step are also
    those of two things that were found large: LoRA dropout, and teachers recomputed.
    """
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        dropout = dataclasses.replace(FEW, mole_dropout=0.05)
        cached = dataclasses.replace(FEW, cache_teachers=folder)
        lines += profile_config("with LoRA dropout 0.05", dropout, steps, operations=0)
        lines += profile_config("teachers recomputed", FEW, steps, operations=12)
        lines += profile_config("teachers cached, as it is", cached, steps, operations=0)
    return "\n".join(lines)


def profile_config(name: str, c: Config, steps: int, operations: int) -> list[str]:
    """The most expensive operations of a config's step, so many of them, then its shares."""
    step = TinyStep(c)
    ms = 1e3 * seconds({name: step}, steps)[name]
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    own_time = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    total = sum(own_time.values())
    dense = 0.0
    for operation, t in own_time.items():
        if any(word in operation for word in ("mm", "attention", "conv")):
            dense += t
    lines = []
    for operation in sorted(own_time, key=own_time.get, reverse=True)[:operations]:
        lines.append(f"{100 * own_time[operation] / total:5.1f} %  {operation}")
    outside = 100 * (1 - dense / total)
    return [*lines, f"{name}: {outside:.0f} % outside, {ms:.0f} ms a step"]
