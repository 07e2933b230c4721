"""Train MoVE-KD: several frozen vision encoders distilled into the CLIP student of a VLM.

    python train.py --tiny                  # all of it on a laptop CPU, nothing downloaded (1 min)
    python train.py --tiny --lambda-kd 0 --out runs/no-kd      # without distillation (1 min)
    python -m tools.ask runs/tiny           # ask the result about held-out pictures (10 s)
    python -m tools.plan --full             # memory and time of the real run on your GPUs (30 s)
    python train.py --full --data-root D    # the real encoders, Vicuna-7B and LLaVA's data
    python train.py --small --data train.json --eval-data held_out.json --out runs/mine  # your own
"""
# What stands around this loop (processes, data, models, log, checkpoints) is plumbing/run.py: Run.
# Every field of Config (plumbing/config.py) is a flag.

from plumbing.signals import begin_program

if __name__ == "__main__":
    begin_program()  # the libraries below take seconds to load

import math

import torch
from torch import nn

from data import InputError
from model import MoVEKD
from plumbing import cli
from plumbing.config import STAGES, Config, stage_name
from plumbing.run import Run, StagePlan, Step, start
from plumbing.sharding import backward, gather_full
from teachers import Teachers


def main(argv: list[str] | None = None) -> None:
    """Train with the given flags; or with --evaluate, evaluate a finished run."""
    start(argv, train, __doc__)


def train(run: Run) -> None:
    """Train both stages of LLaVA's recipe, or the rest of them in a resumed run.

    Stage 1 aligns: from captions, it trains the experts, the adapters and the projector. Stage 2
    finetunes: from conversations, it trains everything except the teachers. The loss is the same.
    Our recipe has a distillation-only phase before them.
    """
    for stage in run.stages_left():
        run.model.set_stage(stage)
        train_stage(run, stage)
    run.finish()  # writes the model, evaluates it, prints the result


def train_stage(run: Run, stage: int) -> None:
    """Train one stage to its end. Raises Stopped if a signal ended it, after saving its state."""
    c, model = run.c, run.model

    # How many steps, at which learning rate, on which batches.
    plan = run.begin_stage(stage)
    run.log.say(stage_table(stage, model, run.teachers))

    # AdamW without weight decay, as LLaVA. A stage has an optimizer of its own, because the
    # parameters that it trains are its own.
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = optimizer_groups(c, model, stage)
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, weight_decay=0.0, fused=True)

    # A resumed run fills model and optimizer from its checkpoint before its first step here.
    for step in run.steps(plan, optimizer):
        # Forward and backward: the losses of this step, and their gradients.
        with run.count_flops(plan):
            sums = forward_backward(c, model, run.teachers, step)

        # One odd batch must not throw the weights far off: limit the length of the gradient.
        grad_norm = clip_gradients(parameters, c.grad_clip)

        # Set the learning rate: a short warm-up, because Adam's averages are still rough at the
        # start, then half a cosine down to 0.
        lr = plan.lr * lr_factor(step.number, plan.steps, c.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        # Update the weights. Gradients are freed, not set to 0: the next forward needs the memory.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Collect the step's numbers over all processes. A loss that is NaN or infinite ends the
        # run now: no later step can mend it.
        values = run.total(step, sums)
        values["grad_norm"] = grad_norm
        check_finite(values, plan, step.number)

        # Log the step; save a checkpoint if one is due or a signal has come.
        values["lr"] = lr
        run.finish_step(plan, step, values)


PURPOSE = {
    0: "distil, which is not in the paper: the student learns the teachers' tokens; no LLM runs",
    1: "stage 1 aligns: the new modules learn from captioned pictures, so that the LLM can read "
       "the student's tokens",
    2: "stage 2 finetunes: everything but the teachers learns from conversations, so that the LLM "
       "answers questions from the student's tokens",
}


def stage_table(stage: int, model: MoVEKD, teachers: Teachers) -> str:
    """Return the purpose of a stage, and one line per part of the method: trained or frozen."""
    groups = model.parameter_groups()
    for name, teacher in teachers.encoders.items():
        groups[f"teacher {name}"] = list(teacher.parameters())
    rows = [PURPOSE[stage], f"{stage_name(stage):30}  parameters"]
    for name, parameters in groups.items():
        count = sum(p.numel() for p in parameters)
        trained = any(p.requires_grad for p in parameters)
        rows.append(f"  {name:28} {count:12,}  {'trained' if trained else 'frozen'}")
    return "\n".join(rows)


def optimizer_groups(c: Config, model: MoVEKD, stage: int) -> list[dict]:
    """Return AdamW's parameter groups: each part that is trained, and --lr-scale's factor of it."""
    scales = dict(item.split("=") for item in c.lr_scale)
    groups = []
    learning = []
    for name, parameters in model.parameter_groups().items():
        trained = [p for p in parameters if p.requires_grad]
        if trained:
            groups.append({"params": trained, "scale": float(scales.get(name, 1))})
        # Without L_kd no loss reaches the adapters.
        if trained and (c.lambda_kd or not name.startswith("adapter ")):
            learning.append(name)
    if not learning:
        raise InputError(f"--freeze {' '.join(c.freeze)}: nothing is left to learn in "
                         f"{stage_name(stage)}")
    return groups


def forward_backward(c: Config, model: MoVEKD, teachers: Teachers,
                     step: Step) -> dict[str, torch.Tensor]:
    """Run forward and backward on a step's micro-batches; return the sums of their loss terms.

    Gradients add up in the parameters. `step` is one of run.steps, or Step.of(batch) in a script.
    """
    sums = {}
    for i, (batch, weights) in enumerate(step.micro_batches):
        # Every term is a mean over the micro-batch. Weighted by the micro-batch's part of the
        # step's answer tokens and images, the terms add up to the means over the whole batch.
        terms = weights.apply(model(batch, teachers))
        terms["L_total"] = total_loss(c, terms)
        last = i == len(step.micro_batches) - 1
        backward(model, terms["L_total"], last)
        # Without detach() the sums would hold the graph of every micro-batch.
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
    return sums


def total_loss(c: Config, terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return L_total (paper, total loss). L_balance is the released code's: the paper has none."""
    L_text, L_kd, L_balance = terms["L_text"], terms["L_kd"], terms["L_balance"]            # ()
    # L_total = L_text + lambda L_kd
    L_total = L_text + c.lambda_kd * L_kd + c.balance_weight * L_balance                    # ()
    return L_total


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a norm of max_norm (0: leave them); return the norm they had."""
    return gather_full(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Return the fraction of the peak learning rate for a step; steps are counted from 0.

    A linear warm-up over the fraction `warmup` of the steps, then half a cosine down to 0.
    """
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def check_finite(values: dict[str, torch.Tensor], plan: StagePlan, step: int) -> None:
    """Raise InputError, with the term's name, if a loss or the gradient is NaN or infinite."""
    for name, value in values.items():
        if value.isfinite().all():
            continue
        bad = value[~value.isfinite()].flatten()[0].item()
        remedy = f"lower --{STAGES[plan.stage]}-lr {plan.lr}"
        if name.startswith("kd_"):
            teacher = name.removeprefix("kd_")
            remedy += f", if teacher {teacher}'s tokens of these images are finite"
        raise InputError(f"{name} is {bad} at {stage_name(plan.stage)}, step {step}: {remedy}")


if __name__ == "__main__":
    cli.run(main)
