"""A run from its flags to its evaluation: all that stands around the loop in train.py."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from data import InputError
from model import MoVEKD
from plumbing.build import (
    build_llm,
    build_movekd,
    build_teachers,
    build_vlm,
    pretrained_weights,
)
from plumbing.checkpoints import Checkpoints, load_checkpoint
from plumbing.checks import check_batch, check_lengths, check_machine, find_device
from plumbing.cli import Stopped
from plumbing.config import Config
from plumbing.evaluate import evaluate, print_accuracy, print_result
from plumbing.files import flop_counter, write_json
from plumbing.flags import parse_flags
from plumbing.launcher import launch, wanted_processes
from plumbing.machine import Machine, Step
from plumbing.run_folder import check_data, open_run_folder, peak_rss_mb, start_run_folder
from plumbing.run_log import HeldOut, RunLog, next_commands, stage_steps, stage_words
from plumbing.sets import (
    build_datasets,
    build_tokenizer,
    load_eval_set,
    load_sets,
    loader_options,
    make_loader,
)
from plumbing.sharding import place_models, refresh_trained, send_from_first
from teachers import Teachers


def start(argv: list[str] | None, train: Callable, description: str) -> None:
    """Read the flags, check them, and run `train(run)` here or in as many processes as asked for.

    With --evaluate a finished run is evaluated instead.
    """
    begin = time.perf_counter()
    c, mode = parse_flags(sys.argv[1:] if argv is None else argv, description)
    c.device = find_device(c.device)
    check_machine(c, trains=mode != "evaluate")
    if mode == "evaluate":
        evaluate_run(c)
        return
    arguments = (train, c, mode == "resume", begin)
    processes = wanted_processes(c)
    if processes > 1:
        sys.exit(launch(sys.argv[0], sys.argv[1:] if argv is None else argv, processes))
    run_here(*arguments)


def run_here(train: Callable, c: Config, resumed: bool, begin: float) -> None:
    """Run `train(run)` in this process."""
    machine = Machine(c)
    try:
        train(Run(c, machine, resumed, begin))
    finally:
        if machine.world == 1:  # several end with their process: leaving in disorder may hang
            machine.leave()


@dataclass
class StagePlan:
    """What a stage will do."""

    stage: int
    steps: int
    lr: float               # at its peak
    own: range              # which micro-batches of a step are this process's
    batches: Iterator[dict]


class Run:
    """One run in this process: its data, its models, and where it stands."""

    def __init__(self, c: Config, machine: Machine, resumed: bool, begin: float):
        self.c = c
        self.machine = machine
        self.begin = begin
        machine.listen()

        # The folder and the data. Rank 0 looks at them first; what is wrong ends the run here.
        with machine.first_alone():
            folder = open_run_folder(c, machine.first, resumed)
            machine.lock, self.checkpoint, self.progress = folder
        machine.check_folder(Path(c.out))
        self.sets = load_sets(c)
        self.tokenizer = build_tokenizer(c, self.sets)
        if machine.first:
            check_data(c, self.sets, self.tokenizer, self.progress, resumed)

        # Stage 0 makes what the tiny preset has in place of downloads.
        words = stage_words(c, 0)
        if words and machine.first:
            print(words, flush=True)
        stage0_begin = time.perf_counter()
        with machine.first_alone():
            weights, tflops = pretrained_weights(c, self.sets["train"][0], self.tokenizer)
        self.stage0 = time.perf_counter() - stage0_begin, tflops

        # Models, then the datasets, whose prompts have as many image tokens as the student gives.
        self.model, self.teachers = self.build_models(weights, resumed)
        n = self.model.vlm.student.num_tokens
        if machine.first:
            check_lengths(c, self.sets, self.tokenizer, n)
        self.datasets = build_datasets(c, self.sets, self.tokenizer, n)
        for stage in (1, 2):
            pieces, _ = machine.micro_batches(getattr(c, f"stage{stage}_batch"))
            check_batch(c, stage, len(self.datasets[stage]), pieces)

        # What is written while it trains. A sharded model cannot answer questions in between.
        if machine.first:
            start_run_folder(c, self.tokenizer, resumed)
        held_out = None
        if not machine.sharded:
            held_out = HeldOut(c, self.model.vlm, self.tokenizer, self.sets.get("eval"))
        self.stage_steps = {stage: stage_steps(c, stage, self.datasets[stage]) for stage in (1, 2)}
        self.log = RunLog(c, machine.first, resumed, self.progress, self.stage_steps, held_out)
        self.checkpoints = Checkpoints(Path(c.out) / "checkpoints", c.keep, machine.rank,
                                       machine.world)

    def build_models(self, weights: dict, resumed: bool) -> tuple[MoVEKD, Teachers]:
        """Return the student's side and the teachers, on their devices.

        Only rank 0 reads weights: the others build without numbers, and get them from it.
        """
        c, first = self.c, self.machine.first
        released = None
        if c.init_from:
            from real.released_checkpoint import load_released, released_config
            released = released_config(Path(c.init_from))
        with nullcontext() if first else torch.device("meta"):
            llm = build_llm(c, released, first)
            vlm = build_vlm(c, self.tokenizer, weights if first else {}, llm)
            teachers = build_teachers(c, weights if first else {})
        if first and released:
            load_released(vlm, Path(c.init_from))
        elif first and c.init_from:
            from plumbing.finished_run import load_vlm
            load_vlm(vlm, Path(c.init_from))
        self.machine.wait()  # the first may load for long
        send_from_first(teachers, c.device)
        if c.lambda_kd:
            from plumbing import teacher_outputs
            training_sets = [self.sets["pretrain"], self.sets["train"]]
            if c.cache_teachers:
                with self.machine.first_alone():
                    teachers = teacher_outputs.cache_teachers(teachers, Path(c.cache_teachers),
                                                              training_sets)
            teacher_outputs.check_teachers(teachers, training_sets, c.device)
        model = build_movekd(c, vlm, teachers)
        if c.lambda_kd and not resumed:  # a checkpoint has them
            teacher_outputs.measure_targets(model.target_norms, teachers, training_sets, first,
                                            c.device, c.skip_bad)
        place_models(model, teachers, c, self.machine.world)
        return model, teachers

    # --- stages and steps

    def stages_left(self) -> Iterator[int]:
        """Yield the stages that are left, from the one in which a resumed run stands."""
        self.machine.training = True
        for stage in range(self.progress.stage, 3):
            if stage > self.progress.stage:
                self.progress.stage, self.progress.step, self.checkpoint = stage, 0, None
            if self.stage_steps[stage]:
                yield stage
        self.checkpoints.finish()

    def begin_stage(self, stage: int) -> StagePlan:
        """Print what the stage trains, and return its steps, its learning rate and its batches."""
        c = self.c
        if self.machine.sharded:
            refresh_trained(self.model)
        self.log.say(stage_table(stage, self.model, self.teachers))
        batch_size = getattr(c, f"stage{stage}_batch")
        epochs = getattr(c, f"stage{stage}_epochs")
        pieces, own = self.machine.micro_batches(batch_size)
        loader = make_loader(self.datasets[stage], batch_size, epochs, c.seed + stage,
                             self.tokenizer.pad, c.group_batches, pieces, own, self.progress.step,
                             **loader_options(c))
        return StagePlan(stage, self.stage_steps[stage], getattr(c, f"stage{stage}_lr"), own,
                         iter(loader))

    def steps(self, plan: StagePlan, optimizer: torch.optim.Optimizer) -> Iterator[Step]:
        """Yield the steps of a stage that are left. A resumed run fills its optimizer first."""
        self.optimizer = optimizer
        if self.checkpoint:
            load_checkpoint(self.checkpoint, self.model, optimizer, self.machine.world)
        self.model.train()
        for number in self.log.bar(self.progress):
            batches = [next(plan.batches) for _ in plan.own]
            step = self.machine.make_step(number, batches, self.model.vlm,
                                          self.checkpoints.written())
            if step.counts["written"] == self.machine.world:
                self.checkpoints.finish()  # every process has written its files of the last one
            # LoRA dropout: a resumed run draws what the straight one drew.
            seed = self.c.seed * 1_000_003 + plan.stage * 1_000_000 + number
            torch.manual_seed(seed * 1_009 + self.machine.rank)
            yield step

    @contextmanager
    def count_flops(self, plan: StagePlan):
        """Count a stage's FLOPs: those of its first step, over all processes, times the steps."""
        if str(plan.stage) in self.progress.flops:
            yield
            return
        with flop_counter() as counter:
            yield
        count = torch.tensor(float(counter.get_total_flops()), dtype=torch.float64)
        total = self.machine.total({"": count})[""].item()
        self.progress.flops[str(plan.stage)] = plan.steps * total

    def total(self, step: Step, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a step's terms over all processes; without an image only the losses count."""
        values = self.machine.total(sums)
        if not step.counts["images"]:
            values = {name: value for name, value in values.items() if name.startswith("L_")}
        return values

    def finish_step(self, plan: StagePlan, step: Step, values: dict) -> None:
        """Count and log a step, and save a state if one is due. Raises Stopped on a signal."""
        c, progress, stop = self.c, self.progress, step.counts["stop"]
        progress.advance(step.counts)
        last = progress.step == plan.steps
        self.log.write(progress, values, step.counts)
        # Every --save-every steps, after stage 1, and before the run stops.
        due = c.save_every and (progress.step % c.save_every == 0 or (last and plan.stage == 1))
        if due or stop:
            progress.log = self.log.position()
            self.checkpoints.save(f"stage{plan.stage}-{progress.step:08}", self.model,
                                  self.optimizer, asdict(progress))
        if stop:
            self.checkpoints.finish()
            raise Stopped(f"stopped by {self.machine.stop or 'a signal'} at stage {plan.stage}, "
                          f"step {progress.step}; to go on: python train.py --resume {c.out}")

    # --- the end

    def finish(self) -> None:
        """Write the model, then evaluate it. A sharded one is read back from its files."""
        from plumbing.finished_run import export
        c, machine = self.c, self.machine
        export(c, machine.first, self.model, self.tokenizer)
        machine.end_training(f"after training; to evaluate: python train.py --evaluate {c.out}")
        vlm = None if machine.sharded else self.model.vlm
        del self.model, self.teachers, self.optimizer  # a GPU has no room for a second model
        if machine.first:
            self.report(vlm)
        machine.leave()

    def report(self, vlm: nn.Module | None) -> None:
        """Draw, evaluate if there is a held-out set, and write result.json."""
        from plumbing.plots import plot_curves  # matplotlib takes long to load

        c, out, progress = self.c, Path(self.c.out), self.progress
        plot_curves(out)
        result = {}
        if "eval" in self.sets:
            if vlm is None:
                from plumbing.finished_run import load_run
                vlm, *_ = load_run(out, c.device)
            result = evaluate_and_draw(c, vlm, self.tokenizer, self.sets["eval"])
        seconds_stage0, tflops_stage0 = self.stage0
        result |= {
            "seconds": round(time.perf_counter() - self.begin, 1),
            "seconds_stage0": round(seconds_stage0, 1),
            "tflops": round(sum(progress.flops.values()) / 1e12, 3),
            "tflops_stage0": round(tflops_stage0, 3),
            "peak_rss_mb": round(peak_rss_mb()),
            "seed": c.seed,
            "skipped": progress.skipped,
            "cut": progress.cut,
        }
        if c.device == "cuda":
            result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
        write_json(out / "result.json", result)
        print_result(result, out, next_commands(c))


def stage_table(stage: int, model: MoVEKD, teachers: Teachers) -> str:
    """Return what a stage trains, one line for each part of the method."""
    groups = model.parameter_groups()
    for name, teacher in teachers.encoders.items():
        groups[f"teacher {name}"] = list(teacher.parameters())
    rows = [f"stage {stage} {'':22}  parameters"]
    for name, parameters in groups.items():
        count = sum(p.numel() for p in parameters)
        trained = any(p.requires_grad for p in parameters)
        rows.append(f"  {name:28} {count:12,}  {'trained' if trained else 'frozen'}")
    return "\n".join(rows)


def evaluate_and_draw(c: Config, vlm: nn.Module, tokenizer, held_out: tuple) -> dict:
    """Return the held-out accuracies, and draw some answers into the run folder."""
    from plumbing.plots import plot_samples  # matplotlib takes long to load

    result, rows, answers = evaluate(c, vlm, tokenizer, *held_out)
    plot_samples(Path(c.out) / "samples.png", rows, answers, held_out[1])
    return result


def evaluate_run(c: Config) -> None:
    """Evaluate a finished run: print its accuracies, and write them to its folder."""
    from plumbing.finished_run import load_run
    out = Path(c.out)
    vlm, tokenizer, _ = load_run(out, c.device)
    held_out = load_eval_set(c)
    if held_out is None:
        raise InputError(f"{out}: has no held-out set; name one with --eval-data FILE "
                         "--image-folder DIR")
    check_lengths(c, {"eval": held_out}, tokenizer, vlm.student.num_tokens)
    result = evaluate_and_draw(c, vlm, tokenizer, held_out)
    write_json(out / "evaluation.json", result)
    print_accuracy(result)
    print("result: " + json.dumps(result))
