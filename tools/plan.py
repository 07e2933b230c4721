"""Will it fit, and how long will it take?  Counted on the meta device: no GPU, no download.

    python -m tools.plan --full                                 # 8 GPUs of 80 GB (15 s)
    python -m tools.plan --full --gpus 4 --gpu-memory 40 --teachers clip eva
    python -m tools.plan --small --gpus 1 --gpu-memory 24       # any flag of train.py may follow

Letters: P parameters, G GPUs, b samples of a micro-batch, n tokens of the student.
"""

import math
from typing import NamedTuple

from model import MoVEKD
from plumbing.sets import count_steps
from plumbing.cli import Parser, run
from plumbing.config import Config
from plumbing.flags import parse_config
from teachers import Teachers
from tools.measuring import count
from tools.meta import activations, forward_flops, meta_models, step_flops
from tools.plan_memory import RULES, memory, memory_table

ROWS = {1: 558_128, 2: 665_298}             # LLaVA's captions and conversations
# tokens of text a sample, on average: an assumption, for time only; memory is that of --max-length
TEXT = {1: 30, 2: 200}
IMAGES = {1: 1.0, 2: 624_610 / 665_298}     # share of the samples that have one


class Gpus(NamedTuple):
    """The machine that is planned for."""

    number: int
    memory: float   # GB of each
    tflops: float   # of each, at best
    mfu: float      # share of them that is reached


def plan(c: Config, gpus: Gpus) -> str:
    """The whole text."""
    model, teachers = meta_models(c)
    forward = {}
    flops = {}
    for stage in (1, 2):
        tokens = model.vlm.student.num_tokens + TEXT[stage]
        forward[stage] = forward_flops(c, model, teachers, tokens)
        flops[stage] = batch_flops(c, stage, forward[stage], tokens)
    lines = [f"{gpus.number} GPU(s) of {gpus.memory:g} GB; time at {100 * gpus.mfu:g} % of "
             f"{gpus.tflops:g} TFLOP/s each", "",
             *models_table(model, teachers, forward[2], flops)]
    hours = 0.0
    for stage in (1, 2):
        stage_lines, stage_hours = stage_plan(c, stage, model, teachers, gpus,
                                              sum(flops[stage].values()) / 1e12)
        lines += ["", *stage_lines]
        hours += stage_hours
    lines += ["", "P parameters, G GPUs, b samples of a micro-batch; bytes:"]
    for name, rule in RULES.items():
        lines.append(f"  {name:12} {rule}")
    lines += ["", f"together {hours:.3g} hours, {hours * gpus.number:.3g} GPU hours"]
    return "\n".join(lines)


def batch_flops(c: Config, stage: int, forward: dict[str, float],
                tokens: int) -> dict[str, float]:
    """FLOPs of each model in a step with a whole batch."""
    samples = getattr(c, f"stage{stage}_batch")
    images = samples * (IMAGES[stage] if c.llm else 1)
    found = {name: images * flops for name, flops in step_flops(c, stage, forward).items()}
    # the samples without an image have their text alone
    found["LLM"] *= 1 + (samples / images - 1) * TEXT[stage] / tokens
    return found


def models_table(model: MoVEKD, teachers: Teachers, forward: dict[str, float],
                 flops: dict[int, dict[str, float]]) -> list[str]:
    """Parameters and FLOPs of each model."""
    vlm = model.vlm
    parts = {"student": vlm.student, "projector": vlm.projector, "LLM": vlm.llm}
    for name, adapter in model.adapters.items():
        parts[f"adapter {name}"] = adapter
    for name, encoder in teachers.encoders.items():
        parts[f"teacher {name}"] = encoder
    lines = ["| model | parameters | TFLOPs forward, one image (LLM: one sample of stage 2) | "
             "TFLOPs of a step, stage 1 | stage 2 |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        steps = [f"{flops[stage].get(name, 0) / 1e12:,.4g}" for stage in (1, 2)]
        lines.append(f"| {name} | {count(part.parameters()):,} | "
                     f"{forward.get(name, 0) / 1e12:.4g} | {' | '.join(steps)} |")
    return lines


def stage_plan(c: Config, stage: int, model: MoVEKD, teachers: Teachers, gpus: Gpus,
               tflops: float) -> tuple[list[str], float]:
    """Memory and time of a stage, whose step costs so many TFLOPs; and its hours."""
    model.set_stage(stage)
    tokens = c.max_length if c.llm else model.vlm.student.num_tokens + TEXT[stage]
    per_sample = activations(c, model, teachers, tokens)

    # How many samples at once? More than one micro-batch a step costs memory too.
    batch = getattr(c, f"stage{stage}_batch")
    here = math.ceil(batch / gpus.number)
    fits = memory(c, model, teachers, gpus.number, False, per_sample).fits(gpus.memory)
    if 0 < fits < here:
        fits = memory(c, model, teachers, gpus.number, True, per_sample).fits(gpus.memory)
    use = min(here, fits, c.micro_batch or fits)
    m = memory(c, model, teachers, gpus.number, 0 < use < here, per_sample)

    # How long?
    steps = count_steps(stage_rows(c, stage), batch, getattr(c, f"stage{stage}_epochs"))
    steps = min(steps, c.max_steps or steps)
    hours = steps * tflops / (gpus.number * gpus.tflops * gpus.mfu) / 3600

    trained = count(p for p in model.parameters() if p.requires_grad)
    lines = [f"stage {stage}: {trained:,} parameters trained; batch {batch}, {here} samples a GPU",
             "", *memory_table(m, max(use, 1)), ""]
    if fits > 0:
        lines.append(f"--micro-batch: {fits} fit; with {use} a step is {math.ceil(here / use)} of "
                     "them")
    else:
        lines.append(f"DOES NOT FIT: {m.fixed / 1e9:.1f} GB before the first sample; more GPUs (G "
                     "shares parameters, gradients, optimizer) or a smaller LLM")
    lines.append(f"{steps:,} steps of {tflops:,.4g} TFLOPs: {hours:.3g} hours")
    return lines, hours


def stage_rows(c: Config, stage: int) -> int:
    """Rows of a stage's set: the tiny world's or LLaVA's."""
    if c.llm or c.data_root:
        return ROWS[stage]
    return {1: c.n_pretrain, 2: c.n_train + c.n_described + c.n_text}[stage]


def main(argv: list[str] | None = None) -> None:
    """The machine's flags; all others are train.py's."""
    parser = Parser(__doc__)
    parser.add_argument("--gpus", type=int, default=8, help="default 8")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB, default 80")
    parser.add_argument("--gpu-tflops", type=float, default=312,
                        help="of bf16, dense; default 312, an A100's; an H100 has 989")
    parser.add_argument("--mfu", type=float, default=0.4,
                        help="share of it that is reached, default 0.4: an assumption")
    args, rest = parser.parse_known_args(argv)
    gpus = Gpus(args.gpus, args.gpu_memory, args.gpu_tflops, args.mfu)
    if gpus.number < 1 or gpus.memory <= 0 or gpus.tflops <= 0 or not 0 < gpus.mfu <= 1:
        parser.error("--gpus, --gpu-memory, --gpu-tflops and --mfu must be above 0, --mfu at "
                     "most 1")
    print(plan(parse_config(rest or ["--full"]), gpus))


if __name__ == "__main__":
    run(main)
