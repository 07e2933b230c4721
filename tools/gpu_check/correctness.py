"""Checks of tools.gpu_check: does the device compute the same as the CPU, in the right precision?

Letters: B samples, n tokens and d width of the student.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from plumbing.build import build_encoder, build_student
from plumbing.config import Config
from plumbing.processes import Machine
from plumbing.sharding import recompute
from tools.gpu_check.common import Row, Setup, full_config, llama_shape, training, training_batch
from tools.plan.models import random_models


def check_group(setup: Setup) -> Iterator[Row]:
    """A process group of one process, as bf16 wants it, adds up scalars of CPU and device."""
    machine = Machine(full_config(setup))
    try:
        scalars = [torch.tensor(3.5, device=device) for device in ("cpu", setup.device)]
        for scalar in scalars:
            dist.all_reduce(scalar)
        sums = [scalar.item() for scalar in scalars]
        yield Row("a process group alone: totals of CPU and device", "[3.5, 3.5]", str(sums),
                  sums == [3.5, 3.5])
    finally:
        machine.leave()


def random_images(c: Config, setup: Setup) -> torch.Tensor:
    """Make pictures of noise, uint8 (2, 3, R, R)."""
    size = (2, 3, c.image_size, c.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=setup.device)


@torch.no_grad()
def check_bf16(setup: Setup) -> Iterator[Row]:
    """Each teacher in bf16 against itself in fp32."""
    c = full_config(setup)
    images = random_images(c, setup)                                                # (2, 3, R, R)
    for name in c.teachers:
        with torch.device(setup.device):
            encoder = build_encoder(c, name, {}).eval()
        for key, p in encoder.named_parameters():
            if key.endswith("gamma"):  # ConvNeXt's layer scale starts at 1e-6
                p.fill_(0.5)
        exact = encoder(images).tokens                                              # (2, n_i, d_i)
        rounded = encoder.bfloat16()(images).tokens.float()                         # (2, n_i, d_i)
        error = ((exact - rounded).norm() / exact.norm()).item()
        yield Row(f"{name} in bf16 against fp32", "< 2 %", f"{100 * error:.2f} %", error < 0.02)


@torch.no_grad()
def check_start(setup: Setup) -> Iterator[Row]:
    """The student starts as CLIP: its tokens are exactly the teacher's, in fp32 and in bf16."""
    c = full_config(setup)
    with torch.device(setup.device):
        torch.manual_seed(0)
        teacher = build_encoder(c, "clip", {}).eval()
        torch.manual_seed(0)  # so that the student's CLIP draws the same weights
        student = build_student(c, {}).train()
    images = random_images(c, setup)                                                # (2, 3, R, R)
    for dtype in (torch.float32, torch.bfloat16):
        V_s = student.to(dtype)(images)                                             # (2, n, d)
        difference = (V_s - teacher.to(dtype)(images).tokens).abs().max().item()
        yield Row(f"student at step 0 against CLIP in {dtype}", "0.0 apart", str(difference),
                  difference == 0)


def check_dtypes(setup: Setup) -> Iterator[Row]:
    """Stage 1, then stage 2: master weights in fp32, arithmetic in bf16."""
    c = full_config(setup, micro_batch=2, teachers=("clip",))
    with training(setup, c, layers=2, stage=1) as trainer:
        batch = training_batch(c, trainer.model, 2, trainer.model.vlm.student.num_tokens + 40)
        trainer.step(batch)
        trainer.start_stage(2)  # blocks that were frozen get gradients from here on
        outputs = []
        for block in trainer.model.vlm.blocks:
            block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
        terms = trainer.backward(batch)
        trainer.optimizer.step()
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        groups = {"parameters": (trainer.parameters, torch.float32),
                  "gradients": ([p.grad for p in trainer.parameters], torch.float32),
                  "moments": (moments, torch.float32),
                  "activations": (outputs, torch.bfloat16),
                  "teachers": (list(trainer.teachers.parameters()), torch.bfloat16),
                  "losses": ([terms["L_text"], terms["L_kd"]], torch.float32)}
        for name, (tensors, expected) in groups.items():
            got = {tensor.dtype for tensor in tensors}
            yield Row(f"dtype in stage 2: {name}", str(expected), ", ".join(map(str, got)),
                      got == {expected})


def check_recompute(setup: Setup) -> Iterator[Row]:
    """Recomputing the blocks leaves every gradient as it is, LoRA dropout's masks too."""
    c = full_config(setup, precision="fp32", recompute=False, teachers=("clip",))
    with training(setup, c, layers=1, stage=2) as trainer:
        batch = training_batch(c, trainer.model, 2, trainer.model.vlm.student.num_tokens + 40)
        straight = trainer.gradients(batch)                                     # (P,)
        recompute(trainer.model.vlm.blocks)
        recomputed = trainer.gradients(batch)                                   # (P,)
    error = ((straight - recomputed).norm() / straight.norm()).item()
    yield Row("gradients with and without --recompute", "<= 1e-5 apart", f"{error:.1e}",
              error <= 1e-5)


def attention_kernels(function: Callable) -> set[str]:
    """Return the kernels of scaled_dot_product_attention that ran, by torch's names: flash, ..."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    kernels = set()
    for event in recorded.key_averages():
        name = event.key.removeprefix("aten::_scaled_dot_product_")
        if name != event.key and "backward" not in name:
            kernels.add(name.removesuffix("_for_cpu"))
    return kernels


def check_attention(setup: Setup) -> Iterator[Row]:
    """No attention is taken apart; a training batch, padded on the right, needs no mask."""
    c = full_config(setup)
    model, teachers = random_models(c, setup.device, llama_shape(setup, 2))
    model.bfloat16()
    teachers.bfloat16()
    batch = training_batch(c, model, 2, model.vlm.student.num_tokens + 40)

    def train() -> None:
        model(batch, teachers)["L_text"].backward()

    @torch.no_grad()
    def answer() -> None:
        prompts = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
        model.vlm.generate(model.vlm.student(batch["images"]), **prompts, eos=0, max_new_tokens=2)

    fused = {"flash_attention", "cudnn_attention"}
    no_mask = "flash or cuDNN: no mask is passed"
    for name, function, expected, allowed in (
            ("a training step, teachers included", train, no_mask, fused),
            ("answers, padded on the left", answer, "a fused kernel, not math",
             {*fused, "efficient_attention"})):
        got = attention_kernels(function)
        yield Row(f"attention of {name}", expected, ", ".join(sorted(got)),
                  bool(got) and got <= allowed)
