"""Checks of tools.gpu_check: does the device compute what the CPU does, in the right precision?

Letters: B samples, n tokens of the student.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from kd_loss import kd_loss, teacher_weights, token_weights
from model import Student
from plumbing.build import build_encoder
from plumbing.machine import Machine
from plumbing.sharding import recompute
from teachers import ClipEncoder, VisionEncoder, create_net
from tools.gpu_checks_common import Place, Row, build, full_config, random_batch, training
from tools.measuring import SHAPES
from tools.tiny_step import FEW, TinyStep
from tools.vision import expert_options

TORCH = (2, 11)     # the oldest that these checks are written for


def check_versions(place: Place) -> Iterator[Row]:
    """torch, CUDA, and the card."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    expected = f"torch >= {'.'.join(map(str, TORCH))}, bf16"
    if not place.cuda:
        yield Row("versions and card", expected, f"torch {torch.__version__}, a CPU, "
                  f"{torch.get_num_threads()} threads of {os.cpu_count()} cores", version >= TORCH)
        return
    card = torch.cuda.get_device_properties(0)
    got = (f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN "
           f"{torch.backends.cudnn.version()}, {card.name}, {card.total_memory / 1e9:.1f} GB, "
           f"compute capability {card.major}.{card.minor}")
    yield Row("versions and card", expected, got,
              version >= TORCH and torch.cuda.is_bf16_supported())


def check_group(place: Place) -> Iterator[Row]:
    """A process group of one process, as bf16 wants it, adds up scalars of CPU and device."""
    machine = Machine(full_config(place))
    try:
        sums = []
        for device in ("cpu", place.device):
            scalar = torch.tensor(3.5, device=device)                               # ()
            dist.all_reduce(scalar)
            sums.append(scalar.item())
        yield Row("a process group alone: totals of CPU and device", "3.5, 3.5",
                  ", ".join(map(str, sums)), sums == [3.5, 3.5])
    finally:
        machine.disconnect()


def check_dtypes(place: Place) -> Iterator[Row]:
    """Stage 1, then stage 2: master weights in fp32, arithmetic in bf16."""
    c = full_config(place, micro_batch=2, teachers=("clip",))
    with training(place, c, layers=2, stage=1) as step:
        batch = random_batch(c, step.model, 2, step.model.vlm.student.num_tokens + 40)
        step(batch)
        step.start_stage(2)  # blocks that were frozen get gradients from here on
        outputs = []
        for block in step.model.vlm.blocks:
            block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
        terms = step.backward(batch)
        step.optimizer.step()
        moments = [state["exp_avg"] for state in step.optimizer.state.values()]
        groups = {"parameters": (step.trained, torch.float32),
                  "gradients": ([p.grad for p in step.trained], torch.float32),
                  "moments": (moments, torch.float32),
                  "activations": (outputs, torch.bfloat16),
                  "teachers": (list(step.teachers.parameters()), torch.bfloat16),
                  "losses": ([terms["L_text"], terms["L_kd"]], torch.float32)}
        for name, (tensors, expected) in groups.items():
            got = {tensor.dtype for tensor in tensors}
            yield Row(f"dtype in stage 2: {name}", str(expected), ", ".join(map(str, got)),
                      got == {expected})


def check_recompute(place: Place) -> Iterator[Row]:
    """Recomputing the blocks leaves every gradient as it is, LoRA dropout's masks too."""
    c = dataclasses.replace(FEW, device=place.device, mole_dropout=0.05)
    step = TinyStep(c, 8)
    step.model.train()
    gradients = []
    for again in (False, True):
        if again:
            recompute(step.model.vlm.blocks)
        torch.manual_seed(0)
        step.optimizer.zero_grad(set_to_none=True)
        step.loss().backward()
        grads = [p.grad.flatten() for p in step.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    plain, recomputed = gradients
    error = ((plain - recomputed).norm() / plain.norm()).item()
    yield Row("gradients with and without --recompute", "<= 1e-5 apart", f"{error:.1e}",
              error <= 1e-5)


# ------------------------------------------------------------------------------------------------
# Encoders


def check_views(place: Place) -> Iterator[Row]:
    """What each encoder gets to see: the device's resize against the CPU's."""
    c = full_config(place)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    shape = [c.image_size, c.image_size]
    images = torch.nn.functional.interpolate(pixels.float(), shape, mode="bilinear").byte()
    for name in (*c.teachers, "sam") if place.cuda else c.teachers:
        with torch.device("meta"):
            encoder = build_encoder(c, name, {})
        std = torch.tensor(encoder.std)[:, None, None]                              # (3, 1, 1)
        ours, theirs = encoder.view(images.to(place.device)).cpu(), encoder.view(images)
        levels = ((ours - theirs).abs() * std * 255).max().item()
        yield Row(f"view of {name}: device against CPU", "<= 1 level of 255", f"{levels:.2f}",
                  levels <= 1.01)


def random_encoder(spec: str, kind: type, device: str) -> VisionEncoder:
    """An encoder with random weights that all matter."""
    with torch.device(device):
        encoder = kind(spec).eval()
    for name, p in encoder.named_parameters():
        if name.endswith("gamma"):  # ConvNeXt's layer scale starts at 1e-6
            p.data.fill_(0.5)
    return encoder


@torch.no_grad()
def check_bf16(place: Place) -> Iterator[Row]:
    """Each teacher in bf16 against itself in fp32."""
    c = full_config(place)
    images = torch.randint(0, 256, (1, 3, c.image_size, c.image_size), dtype=torch.uint8)
    images = images.to(place.device)
    for name in c.teachers:
        encoder = random_encoder(getattr(c, name), ClipEncoder if name == "clip" else VisionEncoder,
                                 place.device)
        exact = encoder(images).tokens                                              # (1, n_i, d_i)
        rounded = encoder.bfloat16()(images).tokens.float()                         # (1, n_i, d_i)
        error = ((exact - rounded).norm() / exact.norm()).item()
        yield Row(f"{name} in bf16 against fp32", "< 2 %", f"{100 * error:.2f} %", error < 0.02)


def check_start(place: Place) -> Iterator[Row]:
    """The student starts as CLIP: its own term of L_kd is exactly 0, in fp32 and in bf16."""
    c = full_config(place)
    experts = expert_options(SHAPES["ViT-L"], dropout=0.05)
    with torch.device(place.device):
        net = create_net(c.clip)
        teacher = ClipEncoder(c.clip, copy.deepcopy(net)).eval().requires_grad_(False)
        student = Student(c.clip, net).add_experts(form="ffn", **experts).train()
    images = torch.randint(0, 256, (2, 3, c.image_size, c.image_size), dtype=torch.uint8)
    images = images.to(place.device)
    for dtype in (torch.float32, torch.bfloat16):
        teacher.to(dtype)
        V_s = student.to(dtype)(images)                                             # (B, n, d)
        with torch.no_grad():
            output = teacher(images)
        targets = {"clip": output.tokens}
        w_tok = token_weights(output.cls_scores, "paper")                           # (B, n)
        w_tea = teacher_weights(output.cls, targets, 1.0, "paper", True, False)     # (B, 1)
        loss = kd_loss({"clip": V_s}, targets, w_tok, w_tea)[1]["clip"].item()
        yield Row(f"kd_clip at step 0 in {dtype}", "0.0", str(loss), loss == 0)


# ------------------------------------------------------------------------------------------------
# Attention


def attention_kernels(form: Callable) -> set[str]:
    """The kernels of scaled_dot_product_attention that ran, by torch's names: flash, math, ..."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        form()
    found = set()
    for event in recorded.key_averages():
        name = event.key.removeprefix("aten::_scaled_dot_product_")
        if name != event.key and "backward" not in name:
            found.add(name.removesuffix("_for_cpu"))
    return found


def check_attention(place: Place) -> Iterator[Row]:
    """No attention is taken apart; a training batch, padded on the right, needs no mask."""
    c = full_config(place, lambda_kd=0.5)
    model, teachers = build(place, c, 2, place.device)
    model.bfloat16()
    teachers.bfloat16()
    batch = random_batch(c, model, 2, model.vlm.student.num_tokens + 40)
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def answer() -> None:
        model.vlm.generate(model.vlm.student(batch["images"]), left["input_ids"],
                           left["attention_mask"], eos=0, max_new_tokens=2)

    forms = {
        "teachers": lambda: teachers(batch["images"], [None] * 2),
        "a training step": lambda: model(batch, teachers)["L_text"].backward(),
        "answers, padded on the left": answer,
    }
    for name, form in forms.items():
        allowed = {"flash_attention", "cudnn_attention"}
        expected = "flash or cuDNN: no mask is passed"
        if form is answer:
            allowed.add("efficient_attention")
            expected = "a fused kernel, not math"
        got = attention_kernels(form)
        yield Row(f"attention of {name}", expected, ", ".join(sorted(got)),
                  bool(got) and got <= allowed)
