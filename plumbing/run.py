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
from plumbing import build, checks, run_folder, run_log, sets
from plumbing.checkpoints import Checkpoints, load_checkpoint
from plumbing.config import Config
from plumbing.evaluate import evaluate, print_accuracy, print_result
from plumbing.files import flop_counter, write_json
from plumbing.flags import parse_flags
from plumbing.processes import Machine, Step, launch, wanted_processes
from plumbing.sharding import place_models, refresh_trained, send_from_first
from plumbing.signals import Stopped
from teachers import Teachers


def start(argv: list[str] | None, train: Callable, description: str) -> None:
    """Read the flags and run `train(run)`, in as many processes as asked for; or --evaluate."""
    begin = time.perf_counter()
    c, mode = parse_flags(sys.argv[1:] if argv is None else argv, description)
    c.device = checks.find_device(c.device)
    checks.check_machine(c, trains=mode != "evaluate")
    if mode == "evaluate":
        evaluate_run(c)
        return
    arguments = (train, c, mode == "resume", begin)
    if wanted_processes(c) > 1:
        sys.exit(launch(run_here, arguments, wanted_processes(c)))
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
    """What a stage will do"""

    stage: int
    steps: int
    lr: float               # at its peak
    own: range              # which micro-batches of a step are this process's
    batches: Iterator[dict]


class Run:
    """One run in this process: its data, its models, and where it stands."""

    def __init__(self, c: Config, machine: Machine, resumed: bool, begin: float):
        self.c, self.machine, self.begin = c, machine, begin
        machine.listen()

        # The folder and the data: rank 0 checks them first.
        with machine.first_alone():
            opened = run_folder.open_run_folder(c, machine.first, resumed)
            machine.lock, self.checkpoint, self.progress = opened
        machine.check_folder(Path(c.out))
        self.sets = sets.load_sets(c)
        self.tokenizer = sets.build_tokenizer(c, self.sets)
        if machine.first:
            run_folder.check_data(c, self.sets, self.tokenizer, self.progress, resumed)

        # Stage 0 makes what the tiny preset has in place of downloads.
        words = run_log.stage_words(c, 0)
        if words and machine.first:
            print(words, flush=True)
        stage0_begin = time.perf_counter()
        with machine.first_alone():
            weights, tflops = build.pretrained_weights(c, self.sets["train"][0], self.tokenizer)
        self.stage0 = time.perf_counter() - stage0_begin, tflops

        # Models, then the datasets, whose prompts have as many image tokens as the student gives.
        self.model, self.teachers = self.build_models(weights, resumed)
        vlm = self.model.vlm
        if machine.first:
            checks.check_lengths(c, self.sets, self.tokenizer, vlm.student.num_tokens)
        self.datasets = sets.build_datasets(c, self.sets, self.tokenizer, vlm.student.num_tokens)
        for stage, dataset in self.datasets.items():
            checks.check_batch(c, stage, len(dataset), machine.micro_batches(stage)[0])

        # What is written while it trains. A sharded model cannot answer questions in between.
        if machine.first:
            run_folder.start_run_folder(c, self.tokenizer, resumed)
        held_out = None
        if not machine.sharded:
            held_out = run_log.HeldOut(c, vlm, self.tokenizer, self.sets.get("eval"))
        self.stage_steps = run_log.count_stage_steps(c, self.datasets)
        self.log = run_log.RunLog(c, machine.first, resumed, self.progress, self.stage_steps,
                                  held_out)
        self.checkpoints = Checkpoints(Path(c.out) / "checkpoints", c.keep, machine.rank,
                                       machine.world)

    def build_models(self, weights: dict, resumed: bool) -> tuple[MoVEKD, Teachers]:
        """Return the student's side and the teachers, on their devices.

        Only rank 0 reads weights: the others build without numbers, and get them from it.
        """
        c, first = self.c, self.machine.first
        weights = weights if first else {}
        released = None
        if c.init_from:
            from real.released_checkpoint import load_released, released_config
            released = released_config(Path(c.init_from))
        with nullcontext() if first else torch.device("meta"):
            llm = build.build_llm(c, released, first)
            vlm = build.build_vlm(c, self.tokenizer, weights, llm)
            teachers = build.build_teachers(c, weights)
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
        model = build.build_movekd(c, vlm, teachers)
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
        batch_size, epochs, lr = (getattr(c, f"stage{stage}_{name}")
                                  for name in ("batch", "epochs", "lr"))
        pieces, own = self.machine.micro_batches(stage)
        loader = sets.make_loader(
            self.datasets[stage], batch_size, epochs, c.seed + stage, self.tokenizer.pad,
            c.group_batches, pieces, own, self.progress.step, **sets.loader_options(c))
        return StagePlan(stage, self.stage_steps[stage], lr, own, iter(loader))

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
        self.log.write(progress, values, step.counts)
        # Every --save-every steps, after stage 1, and before the run stops.
        end_of_stage1 = plan.stage == 1 and progress.step == plan.steps
        if stop or c.save_every and (end_of_stage1 or progress.step % c.save_every == 0):
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
        c, machine = self.c, self.machine
        run_folder.export(c, machine.first, self.model, self.tokenizer)
        machine.end_training(f"after training; to evaluate: python train.py --evaluate {c.out}")
        vlm = None if machine.sharded else self.model.vlm
        del self.model, self.teachers, self.optimizer  # a GPU has no room for a second model
        if machine.first:
            self.report(vlm)
        machine.leave()

    def report(self, vlm: nn.Module | None) -> None:
        """Evaluate if there is a held-out set, draw, and write result.json."""
        from plumbing.plots import plot_curves  # matplotlib takes long to load
        out, progress = Path(self.c.out), self.progress
        plot_curves(out)
        result = {}
        if "eval" in self.sets:
            if vlm is None:
                from plumbing.finished_run import load_run
                vlm, *_ = load_run(out, self.c.device)
            result = evaluate_and_draw(self.c, vlm, self.tokenizer, self.sets["eval"])
        seconds_stage0, tflops_stage0 = self.stage0
        result.update({
            "seconds": round(time.perf_counter() - self.begin, 1),
            "seconds_stage0": round(seconds_stage0, 1),
            "tflops": round(sum(progress.flops.values()) / 1e12, 3),
            "tflops_stage0": round(tflops_stage0, 3),
            "peak_rss_mb": round(run_folder.peak_rss_mb()),
            "seed": self.c.seed, "skipped": progress.skipped, "cut": progress.cut})
        if self.c.device == "cuda":
            result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
        write_json(out / "result.json", result)
        print_result(result, out, run_log.next_commands(self.c))


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
    """Return the held-out accuracies of a VLM, and draw some of its answers."""
    from plumbing.plots import plot_samples
    result, rows, answers = evaluate(c, vlm, tokenizer, *held_out)
    plot_samples(Path(c.out) / "samples.png", rows, answers, held_out[1])
    return result


def evaluate_run(c: Config) -> None:
    """Evaluate a finished run: print its accuracies, and write them to its folder."""
    from plumbing.finished_run import load_run
    out = Path(c.out)
    vlm, tokenizer, _ = load_run(out, c.device)
    held_out = sets.load_eval_set(c)
    if held_out is None:
        raise InputError(f"{out}: has no held-out set; name one with --eval-data FILE "
                         "--image-folder DIR")
    checks.check_lengths(c, {"eval": held_out}, tokenizer, vlm.student.num_tokens)
    result = evaluate_and_draw(c, vlm, tokenizer, held_out)
    write_json(out / "evaluation.json", result)
    print_accuracy(result)
    print("result: " + json.dumps(result))
