"""Will it fit, and how long will it take?  Counted on the meta device: no GPU, no download.

    python -m tools.plan --full                                 # 8 GPUs of 80 GB (30 s)
    python -m tools.plan --full --gpus 4 --gpu-memory 40 --teachers clip eva
    python -m tools.plan --small --gpus 1 --gpu-memory 24       # any flag of train.py may follow
"""

import argparse
import math

from model import MoVEKD
from plumbing.cli import Parser, run
from plumbing.config import STAGES, Config, stage_name
from plumbing.flags import parse_config
from plumbing.sets import count_steps
from teachers import Teachers
from tools.plan.memory import RULES, activations, memory, memory_table, samples_that_fit
from tools.plan.models import count, forward_flops, meta_models, trained

ROWS = (558_128, 558_128, 665_298)      # of distil and stage 1, LLaVA's captions; of stage 2
# tokens of text per sample, on average: an assumption, for time only; memory is for --max-length
TEXT = (30, 30, 200)
IMAGES = (1.0, 1.0, 624_610 / 665_298)  # fraction of the samples that have one


def plan(c: Config, machine: argparse.Namespace) -> str:
    """Return the plan as text; `machine` has the values of the flags in `main`."""
    model, teachers = meta_models(c)
    flops, memory_lines, fits = {}, {}, {}
    for stage in [stage for stage in range(3) if getattr(c, f"{STAGES[stage]}_epochs")]:
        tokens = model.vlm.student.num_tokens + TEXT[stage]
        forward = forward_flops(c, model, teachers, tokens)
        flops[stage] = step_flops(c, stage, forward, tokens)
        memory_lines[stage], fits[stage] = stage_memory(c, stage, model, teachers, machine)

    lines = [f"{machine.gpus} GPU(s) of {machine.gpu_memory:g} GB; time at "
             f"{100 * machine.mfu:g} % of {machine.gpu_tflops:g} TFLOP/s each", "",
             *models_table(model, teachers, forward, flops)]
    together = 0.0
    for stage in flops:
        steps = stage_steps(c, stage)
        tflops = sum(flops[stage].values()) / 1e12
        hours = steps * tflops / (machine.gpus * machine.gpu_tflops * machine.mfu) / 3600
        together += hours
        time = f": {hours:.3g} hours" if all(fits.values()) else ""
        lines += ["", *memory_lines[stage], f"{steps:,} steps of {tflops:,.4g} TFLOPs{time}"]
    lines += ["", RULES]
    if all(fits.values()):
        lines += ["", f"together {together:.3g} hours, {together * machine.gpus:.3g} GPU hours"]
    return "\n".join(lines)


def step_flops(c: Config, stage: int, forward: dict[str, float], tokens: int) -> dict[str, float]:
    """Return the FLOPs of each model in a training step with a whole batch.

    Forward once; backward to the inputs as much again (the student's inputs are the images, but in
    stage 1 the experts of its first block need the gradient); to the weights as much again where
    they are trained; blocks that are recomputed, once more.
    """
    times = {"teacher": 1, "adapter": 3, "projector": 3}
    for name, part in (("student", "student backbone"), ("LLM", "LLM")):
        times[name] = (2 if stage == 1 or part in c.freeze else 3) + c.recompute
    if stage == 0:
        times.update(projector=0, LLM=0)    # neither runs
    samples = getattr(c, f"{STAGES[stage]}_batch")
    images = samples * (IMAGES[stage] if c.llm else 1)
    flops = {}
    for name, once in forward.items():
        kind = name.split()[0]
        if c.lambda_kd or kind not in ("teacher", "adapter"):
            flops[name] = images * times[kind] * once
    # the samples without an image have their text alone
    flops["LLM"] *= 1 + (samples / images - 1) * TEXT[stage] / tokens
    return flops


def stage_steps(c: Config, stage: int) -> int:
    """Return the steps of a stage, on the tiny world's rows or LLaVA's."""
    rows = ROWS[stage]
    if not (c.llm or c.data_root):
        rows = c.n_train + c.n_described + c.n_text if stage == 2 else c.n_pretrain
    batch, epochs = (getattr(c, f"{STAGES[stage]}_{what}") for what in ("batch", "epochs"))
    steps = count_steps(rows, batch, epochs)
    return min(steps, c.max_steps or steps)


def models_table(model: MoVEKD, teachers: Teachers, forward: dict[str, float],
                 flops: dict[int, dict[str, float]]) -> list[str]:
    """Return a Markdown table of each model's parameters and FLOPs."""
    modules = {"student": model.vlm.student, "projector": model.vlm.projector, "LLM": model.vlm.llm}
    modules.update({f"adapter {name}": adapter for name, adapter in model.adapters.items()})
    modules.update({f"teacher {name}": encoder for name, encoder in teachers.encoders.items()})
    stages = " | ".join(map(stage_name, flops))
    lines = ["| model | parameters | TFLOPs forward, one image (LLM: one sample of stage 2) | "
             f"TFLOPs of a step, {stages} |", "|---" * (3 + len(flops)) + "|"]
    for name, module in modules.items():
        steps = [f"{flops[stage].get(name, 0) / 1e12:,.4g}" for stage in flops]
        lines.append(f"| {name} | {count(module.parameters()):,} | "
                     f"{forward.get(name, 0) / 1e12:.4g} | {' | '.join(steps)} |")
    return lines


def stage_memory(c: Config, stage: int, model: MoVEKD, teachers: Teachers,
                 machine: argparse.Namespace) -> tuple[list[str], bool]:
    """Return the lines about a stage's memory, and whether it fits."""
    model.set_stage(stage)
    tokens = c.max_length if c.llm else model.vlm.student.num_tokens + TEXT[stage]
    per_sample = activations(c, model, teachers, tokens)

    # How many samples at once? More than one micro-batch per step costs memory too.
    batch = getattr(c, f"{STAGES[stage]}_batch")
    own = math.ceil(batch / machine.gpus)
    use = min(own, c.micro_batch or own)
    fixed = memory(c, model, teachers, machine.gpus, accumulate=False)
    fit = samples_that_fit(fixed, per_sample, machine.gpu_memory)
    if 0 < fit < own or use < own:  # several micro-batches: the whole gradient is kept
        fixed = memory(c, model, teachers, machine.gpus, accumulate=True)
        fit = samples_that_fit(fixed, per_sample, machine.gpu_memory)
    if fit > 0:
        use = min(use, fit)

    lines = [f"{stage_name(stage)}: {count(trained(model)):,} parameters trained; batch {batch}, "
             f"{own} samples per GPU", "", *memory_table(fixed, per_sample, use), ""]
    if fit > 0:
        lines.append(f"--micro-batch: {fit} fit; a step is {math.ceil(own / use)} of "
                     f"{use} per GPU")
    else:
        tensors = sum(fixed.values()) - fixed["CUDA's context"] - fixed["NCCL"]
        lines.append(f"DOES NOT FIT: {tensors / 1e9:.1f} GB before the first sample; more GPUs (G "
                     "shards parameters, gradients, optimizer) or a smaller LLM")
    return lines, fit > 0


def main(argv: list[str] | None = None) -> None:
    """Print the plan; the machine's flags are read here, all others by train.py's parser."""
    parser = Parser(__doc__)
    parser.prog = "python -m tools.plan"
    parser.add_argument("--gpus", type=int, default=8, help="default 8")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB, default 80")
    parser.add_argument("--gpu-tflops", type=float, default=312,
                        help="of bf16, dense; default 312, an A100's; an H100 has 989")
    parser.add_argument("--mfu", type=float, default=0.4,
                        help="achieved fraction of it, default 0.4: an assumption")
    machine, rest = parser.parse_known_args(argv)
    numbers = vars(machine).values()
    if not all(0 < number < math.inf for number in numbers) or machine.mfu > 1:
        parser.error("--gpus, --gpu-memory, --gpu-tflops and --mfu must be finite and above 0, "
                     "--mfu at most 1")
    print(plan(parse_config(rest or ["--full"]), machine))


if __name__ == "__main__":
    run(main)
