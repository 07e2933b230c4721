"""Train MoVE-KD: several frozen vision encoders distilled into the CLIP student of a VLM.

    python train.py --tiny                  # all of it on a laptop CPU, nothing downloaded (3 min)
    python train.py --tiny --lambda-kd 0 --out runs/no-kd      # without distillation (1 min)
    python -m tools.ask runs/tiny           # ask the result about held-out pictures (10 s)
    python -m tools.plan --full             # what the real run wants of your GPUs (30 s)
    python train.py --full --data-root D    # the real encoders, Vicuna-7B and LLaVA's data
    python train.py --resume runs/full      # go on from the last checkpoint
    python train.py --evaluate runs/tiny    # evaluate a run again, or on another --eval-data

Every field of Config (plumbing/config.py) is a flag. Two stages, as LLaVA's recipe has them: stage
1 aligns (captions; trains experts, adapters, projector), stage 2 finetunes (conversations; trains
all but the teachers). One loss in both, below in `train_stage`:

    L_total = L_text + lambda_kd * L_kd + balance_weight * L_balance

Longer than the loop alone: it holds the whole run, from the flags to the evaluation, in one order.
"""

from plumbing.signals import listen_while_loading

if __name__ == "__main__":
    listen_while_loading()  # the libraries below take seconds to load

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from data import Conversations, InputError
from model import VLM, MoVEKD
from plumbing.batches import loader_options, make_loader
from plumbing.build import build_llm, build_movekd, build_teachers, build_vlm, pretrained_weights
from plumbing.checkpoints import Progress
from plumbing.checks import check_mps, check_place, find_device
from plumbing.cli import Stopped, run
from plumbing.config import Config
from plumbing.evaluate import evaluate, print_accuracy, print_result
from plumbing.files import write_json
from plumbing.finished_run import export, load_run, load_vlm
from plumbing.flags import parse_flags
from plumbing.launcher import launch, wanted_processes
from plumbing.machine import Machine
from plumbing.plots import plot_curves, plot_samples
from plumbing.run_folder import check_data, open_run_folder, peak_rss_mb, start_run_folder
from plumbing.run_log import HeldOut, RunLog, Watch, next_commands, stage_steps, stage_words
from plumbing.sets import build_datasets, build_tokenizer, check_lengths, load_eval_set, load_sets
from plumbing.sharding import gather_full
from plumbing.teacher_outputs import cache_teachers, check_teachers, measure_targets
from real.released_checkpoint import load_released, released_config
from teachers import Teachers


def main(argv: list[str] | None = None) -> None:
    """A run from the command line, in this process or in as many as it asks for."""
    start = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    c, mode = parse_flags(argv, description=__doc__)
    c.device = find_device(c.device)
    check_place(c)
    if mode == "evaluate":
        evaluate_run(c)
        return
    check_mps(c)
    processes = wanted_processes(c)
    if processes > 1:
        sys.exit(launch(train_here, (c, mode == "resume", start), processes))
    train_here(c, mode == "resume", start)


def train_here(c: Config, resumed: bool, start: float) -> None:
    """Train in this process, which may be one of several."""
    machine = Machine(c)
    try:
        train(c, machine, resumed, start)
    finally:
        if machine.world == 1:  # several end with their process: leaving in disorder may hang
            machine.checkpoints.finish()
            machine.leave()


def train(c: Config, machine: Machine, resumed: bool, start: float) -> None:
    """The whole run: data, stage 0, models, stage 1, stage 2, export, evaluation."""
    machine.listen()
    with machine.first_alone():
        machine.lock, checkpoint, progress = open_run_folder(c, machine.first, resumed)
    machine.check_folder(Path(c.out))
    sets = load_sets(c)
    tokenizer = build_tokenizer(c, sets)
    if machine.first:
        check_data(c, sets, tokenizer, progress, resumed)

    # Stage 0 makes what the tiny preset has in place of downloads. The first process makes it.
    if machine.first and stage_words(c, 0):
        print(stage_words(c, 0), flush=True)
    stage0_start = time.perf_counter()
    with machine.first_alone():
        weights, stage0_tflops = pretrained_weights(c, sets["train"][0], tokenizer)
    stage0 = (time.perf_counter() - stage0_start, stage0_tflops)

    # Models: frozen teachers, and MoVEKD, all that is trained. The student starts as CLIP.
    model, teachers = build_models(c, machine, sets, tokenizer, weights, resumed)
    check_lengths(c, sets, tokenizer, model.vlm.student.num_tokens)
    datasets = build_datasets(c, sets, tokenizer, model.vlm.student.num_tokens)

    # Both stages, or what a resumed run has left of them.
    if machine.first:
        start_run_folder(c, tokenizer, resumed)
    held_out = None if machine.sharded else HeldOut(c, model.vlm, tokenizer, sets.get("eval"))
    log = RunLog(c, machine.first, resumed, progress, Watch(c, machine.first, datasets, held_out))
    train_stages(c, machine, model, teachers, datasets, tokenizer.pad, progress, checkpoint, log)
    log.close()

    # What the run leaves behind. A sharded model is read back from its files to be evaluated.
    export(c, machine.first, model, tokenizer)
    machine.trained(f"after training; to evaluate: python train.py --evaluate {c.out}")
    vlm = None if machine.sharded else model.vlm
    del model, teachers  # a GPU has no room for them and for what is loaded next
    if machine.first:
        report(c, sets, tokenizer, vlm, progress, start, stage0)
    machine.leave()


def build_models(c: Config, machine: Machine, sets: dict, tokenizer, weights: dict,
                 resumed: bool) -> tuple[MoVEKD, Teachers]:
    """The student's side and the teachers, on their devices."""
    # Only the first process reads weights: the others get theirs from it, part by part.
    released = released_config(Path(c.init_from)) if c.init_from else None
    with machine.building():
        llm = build_llm(c, released, machine.first)
        vlm = build_vlm(c, tokenizer, weights if machine.first else {}, llm)
        teachers = build_teachers(c, weights if machine.first else {})
    if machine.first and released:
        load_released(vlm, Path(c.init_from))
    elif machine.first and c.init_from:
        load_vlm(vlm, Path(c.init_from))
    machine.send(teachers)
    training_sets = [sets["pretrain"], sets["train"]]
    if c.cache_teachers and c.lambda_kd:
        with machine.first_alone():
            teachers = cache_teachers(teachers, Path(c.cache_teachers), training_sets)
    model = build_movekd(c, vlm, teachers)
    if c.lambda_kd:
        check_teachers(teachers, training_sets, c.device)
    if c.lambda_kd and not resumed:  # a checkpoint has them
        measure_targets(model.target_norms, teachers, training_sets, machine.first, c.device,
                        c.skip_bad)
    machine.place(model, teachers)
    return model, teachers


def stage_table(stage: int, model: MoVEKD, teachers: Teachers) -> str:
    """What a stage trains: a line for each part of the method."""
    groups = model.parameter_groups()
    for name, teacher in teachers.encoders.items():
        groups[f"teacher {name}"] = list(teacher.parameters())
    rows = [f"stage {stage} {'':22}  parameters"]
    for name, parameters in groups.items():
        count = sum(p.numel() for p in parameters)
        trained = any(p.requires_grad for p in parameters)
        rows.append(f"  {name:28} {count:12,}  {'trained' if trained else 'frozen'}")
    return "\n".join(rows)


def train_stages(c: Config, machine: Machine, model: MoVEKD, teachers: Teachers,
                 datasets: dict[int, Conversations], pad: int, progress: Progress,
                 checkpoint: Path | None, log: RunLog) -> None:
    """Train from where progress stands to the end. Raises Stopped if a signal ended it."""
    for stage in (1, 2):
        check_batch(c, machine, datasets[stage], stage)
    machine.training = True
    for stage in range(progress.stage, 3):
        if stage > progress.stage:
            progress.stage, progress.step, checkpoint = stage, 0, None
        if getattr(c, f"stage{stage}_epochs") == 0:
            continue  # left out
        model.set_stage(stage)
        machine.begin_stage(model)
        log.say(stage_table(stage, model, teachers))
        done = train_stage(c, machine, model, teachers, datasets[stage], pad, progress, checkpoint,
                           log)
        if not done:
            machine.checkpoints.finish()
            raise Stopped(f"stopped by {machine.stop or 'a signal'} at stage {progress.stage}, "
                          f"step {progress.step}; to go on: python train.py --resume {c.out}")
    machine.checkpoints.finish()


def check_batch(c: Config, machine: Machine, dataset: Conversations, stage: int) -> None:
    """Raise InputError if a stage's batch cannot be dealt out to all processes."""
    batch_size = getattr(c, f"stage{stage}_batch")
    pieces, _ = machine.micro_batches(batch_size)
    if pieces > min(batch_size, len(dataset)):
        raise InputError(f"--stage{stage}-batch {batch_size}: has no sample for each of {pieces} "
                         "micro-batches; raise it or use fewer --processes")


class StagePlan(NamedTuple):
    """What a stage will do."""

    steps: int
    lr: float               # at its peak
    own: range              # which micro-batches of a step are this process's
    batches: Iterator[dict]


def plan_stage(c: Config, machine: Machine, dataset: Conversations, pad: int,
               progress: Progress) -> StagePlan:
    """The steps of progress.stage from progress.step on, and their batches."""
    stage = progress.stage
    batch_size = getattr(c, f"stage{stage}_batch")
    epochs = getattr(c, f"stage{stage}_epochs")
    pieces, own = machine.micro_batches(batch_size)
    loader = make_loader(dataset, batch_size, epochs, c.seed + stage, pad, c.group_batches, pieces,
                         own, progress.step, **loader_options(c))
    steps = stage_steps(c, stage, dataset)
    return StagePlan(steps, getattr(c, f"stage{stage}_lr"), own, iter(loader))


def train_stage(c: Config, machine: Machine, model: MoVEKD, teachers: Teachers,
                dataset: Conversations, pad: int, progress: Progress, checkpoint: Path | None,
                log: RunLog) -> bool:
    """Train progress.stage from progress.step on; False if a signal ended it."""
    plan = plan_stage(c, machine, dataset, pad, progress)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=0.0, fused=True)
    machine.resume(checkpoint, model, optimizer)
    model.train()
    for step in log.bar(progress, plan.steps):
        # This process's micro-batches of the step, each with its share of the whole batch.
        work, counts = machine.share_work([next(plan.batches) for _ in plan.own])
        machine.seed_step(progress)

        # Forward and backward. All terms are means over a micro-batch: its share weighs them.
        sums = {}
        with machine.count_flops(progress, plan.steps):
            for i, (batch, share) in enumerate(work):
                machine.sync_gradients(model, on=i == len(work) - 1)
                terms = share.weigh(model(batch, teachers))
                L_text, L_kd, L_balance = terms["L_text"], terms["L_kd"], terms["L_balance"]    # ()
                L_total = L_text + c.lambda_kd * L_kd + c.balance_weight * L_balance            # ()
                machine.backward(L_total)
                add(sums, {**terms, "L_total": L_total})

        # The update: AdamW without weight decay; warm-up, then cosine.
        grad_norm = clip_gradients(parameters, c.grad_clip)
        optimizer.param_groups[0]["lr"] = plan.lr * lr_share(step, plan.steps, c.warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # The step's numbers over all processes. A loss that is no number ends the run.
        values = {**machine.total_terms(sums, counts), "grad_norm": grad_norm}
        check_finite(values, progress, plan.lr)

        # Count, log, and keep a state to resume from.
        values["lr"] = optimizer.param_groups[0]["lr"]
        progress.advance(counts)
        log.write(progress, values, counts, last=progress.step == plan.steps)
        if machine.save_due(progress, plan.steps, counts):
            progress.log = log.position()
            machine.save(model, optimizer, progress)
        if counts["stop"]:
            return False
    return True


def add(sums: dict[str, torch.Tensor], terms: dict[str, torch.Tensor]) -> None:
    """Add terms to sums, without their graph."""
    for name, term in terms.items():
        sums[name] = sums[name] + term.detach() if name in sums else term.detach()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a norm of max_norm (0: leave them); returns the norm they had."""
    return gather_full(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def check_finite(values: dict[str, torch.Tensor], progress: Progress, lr: float) -> None:
    """Raise InputError, with the term's name, if a loss or the gradient is no number."""
    for name, value in values.items():
        if not value.isfinite().all():
            bad = value[~value.isfinite()].flatten()[0].item()
            remedy = f"lower --stage{progress.stage}-lr {lr}"
            if name.startswith("kd_"):
                teacher = name.removeprefix("kd_")
                remedy += f", if teacher {teacher}'s tokens of these images are finite"
            raise InputError(f"{name} is {bad} at stage {progress.stage}, step {progress.step}: "
                             f"{remedy}")


def lr_share(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def report(c: Config, sets: dict, tokenizer, vlm: VLM | None, progress: Progress, start: float,
           stage0: tuple[float, float]) -> None:
    """Pictures, evaluation if there is a held-out set, and result.json: the end of a run."""
    out = Path(c.out)
    plot_curves(out)
    result = {}
    if "eval" in sets:
        if vlm is None:
            vlm, *_ = load_run(out, c.device)
        result, rows, answers = evaluate(c, vlm, tokenizer, *sets["eval"])
        plot_samples(out / "samples.png", rows, answers, sets["eval"][1])
    stage0_seconds, stage0_tflops = stage0
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["seconds_stage0"] = round(stage0_seconds, 1)
    result["tflops"] = round(sum(progress.flops.values()) / 1e12, 3)
    result["tflops_stage0"] = round(stage0_tflops, 3)
    result["peak_rss_mb"] = round(peak_rss_mb())
    result["seed"] = c.seed
    result["skipped"] = progress.skipped
    result["cut"] = progress.cut
    if c.device == "cuda":
        result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
    write_json(out / "result.json", result)
    print_result(result, out, next_commands(c))


def evaluate_run(c: Config) -> None:
    """Evaluate a run that has been trained: its accuracies are printed, and kept beside it."""
    out = Path(c.out)
    vlm, tokenizer, _ = load_run(out, c.device)
    held_out = load_eval_set(c)
    if held_out is None:
        raise InputError(f"{out}: has no held-out set; name one with --eval-data FILE "
                         "--image-folder DIR")
    check_lengths(c, {"eval": held_out}, tokenizer, vlm.student.num_tokens)
    result, rows, answers = evaluate(c, vlm, tokenizer, *held_out)
    plot_samples(out / "samples.png", rows, answers, held_out[1])
    write_json(out / "evaluation.json", result)
    print_accuracy(result)
    print("result: " + json.dumps(result))


if __name__ == "__main__":
    run(main)
