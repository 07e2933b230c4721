"""A run from its flags to its evaluation: everything around the loop in train.py."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model import VLM, MoVEKD
from plumbing import build, checks, evaluate, files, run_folder, run_log, sets, sharding, signals
from plumbing.checkpoints import Checkpoints, load_checkpoint
from plumbing.cli import command
from plumbing.config import STAGES, Config, references, stage_name
from plumbing.flags import parse_flags
from plumbing.processes import Machine, Step, launch, wanted_processes
from teachers import Teachers


def start(argv: list[str] | None, train: Callable, description: str) -> None:
    """Read the flags and run `train(run)`, in as many processes as asked for; or --evaluate."""
    begin = time.perf_counter()
    c, mode, run = parse_flags(sys.argv[1:] if argv is None else argv, description)
    c.device = checks.find_device(c.device)
    checks.check_machine(c, trains=mode != "evaluate")
    if mode == "evaluate":
        held_out = sets.load_eval_set(c)
        checks.refuse_if(held_out is None, f"{run}: has no held-out set; name one with --eval-data "
                                           "FILE --image-folder DIR")
        result, rows, answers = evaluate_run(c, held_out, run)
        evaluate.print_accuracy(result)
        print("result: " + json.dumps(result), flush=True)
        files.require_writable(Path(c.out), "--out")
        files.write_json(Path(c.out) / "evaluation.json", result)
        save_answers(Path(c.out), rows, answers, held_out[1])
        return
    arguments = (train, c, mode == "resume", begin)
    if wanted_processes(c) > 1:
        sys.exit(launch(run_here, arguments, wanted_processes(c)))
    run_here(*arguments)


def run_here(train: Callable, c: Config, resumed: bool, begin: float) -> None:
    """Run `train(run)` in this process."""
    machine = Machine(c)
    run = None
    try:
        run = Run(c, machine, resumed, begin)
        train(run)
    finally:
        if machine.world == 1:  # several end with their process: leaving in disorder may hang
            if run:  # an error must not cost a state that is still being written
                with suppress(Exception):  # the first error is the one to report
                    run.checkpoints.finish()
            machine.leave()


@dataclass
class StagePlan:
    """Steps, learning rate and batches of a stage"""

    stage: int
    steps: int
    lr: float               # at its peak
    own: range              # which micro-batches of a step are this process's
    batches: Iterator[dict]


class Run:
    """One run in this process: its data, its models and its progress"""

    def __init__(self, c: Config, machine: Machine, resumed: bool, begin: float):
        self.c, self.machine, self.begin = c, machine, begin
        machine.former_handlers = signals.listen(machine.on_signal)

        # The folder and the data: rank 0 checks them first.
        with machine.first_alone():
            opened = run_folder.open_run_folder(c, machine.first, resumed)
            machine.lock, self.checkpoint, self.progress = opened
        if machine.world > 1:
            machine.check_folder(Path(c.out))
        self.sets = sets.load_sets(c)
        self.tokenizer = sets.build_tokenizer(c, self.sets, resumed)
        if machine.first:
            checks.check_rows(c, self.sets, machine)
            run_folder.check_data(c, self.sets, self.progress)
            if c.llm and Path(c.llm) != Path(c.init_from):  # the authors' own needs no check
                from real.pretrained_llm import check_llm
                check_llm(c.llm, self.tokenizer, c.max_length, c.max_new_tokens)

        # Stage 0 makes the tiny preset's stand-ins for downloads.
        if machine.first and run_log.stand_in_words(c):
            print(run_log.stand_in_words(c), flush=True)
        with machine.first_alone():
            weights = build.pretrained_weights(c, self.sets["train"][0], self.tokenizer, resumed)

        # Models, then the datasets, whose prompts have as many image tokens as the student gives.
        self.model, self.teachers = self.build_models(weights, resumed)
        vlm = self.model.vlm
        if machine.first:
            checks.check_lengths(c, self.sets, self.tokenizer, vlm.student.num_tokens)
        self.datasets = sets.build_datasets(c, self.sets, self.tokenizer, vlm.student.num_tokens)

        # The files written while it trains. A sharded model cannot answer questions in between.
        if machine.first:
            run_folder.start_run_folder(c, self.tokenizer, weights, resumed)
        held_out = None
        if not machine.sharded:
            held_out = run_log.HeldOut(c, vlm, self.tokenizer, self.sets.get("eval"))
        self.stage_steps = steps = run_log.count_stage_steps(c, self.datasets)
        self.log = run_log.RunLog(c, machine.first, self.progress, steps, held_out)
        folder = Path(c.out) / "checkpoints"
        self.checkpoints = Checkpoints(folder, c.keep, machine.rank, machine.world)

    def build_models(self, weights: dict, resumed: bool) -> tuple[MoVEKD, Teachers]:
        """Return the student's side and the teachers, on their devices."""
        c, first = self.c, self.machine.first
        # Only rank 0 reads weights: the others build without numbers, and get them from it.
        weights = weights if first else {}
        released = None
        if c.init_from:
            from plumbing.finished_run import load_vlm
            from real.released_checkpoint import load_released, released_config
            released = released_config(Path(c.init_from))
        with nullcontext() if first else torch.device("meta"):
            llm = build.build_llm(c, released, first)
            vlm = build.build_vlm(c, self.tokenizer, weights, llm)
            teachers = build.build_teachers(c, weights)
        if first and c.init_from:
            load = load_released if released else load_vlm
            load(vlm, Path(c.init_from))
        if first and c.init_projector:
            from real.released_checkpoint import load_projector
            load_projector(vlm.projector, Path(c.init_projector))
        self.machine.wait()  # the first may load for long
        sharding.send_from_first(teachers, c.device)
        if c.lambda_kd:
            from plumbing.teacher_outputs import cache_teachers, measure_targets
            data = [self.sets["pretrain"], self.sets["train"]]
            if c.cache_teachers and sets.images_of(data):
                with self.machine.first_alone():
                    teachers = cache_teachers(teachers, Path(c.cache_teachers), data)
        model = build.build_movekd(c, vlm, teachers)
        if c.lambda_kd and not resumed:  # a checkpoint has them
            measure_targets(model.target_norms, teachers, data, first, c.device, c.skip_bad)
        sharding.place_models(model, teachers, c, self.machine.world)
        return model, teachers

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
        """Return a stage's steps, its learning rate and its batches."""
        c = self.c
        if self.machine.sharded:
            sharding.refresh_trained(self.model)
        size, epochs, lr = (getattr(c, f"{STAGES[stage]}_{x}") for x in ("batch", "epochs", "lr"))
        pieces, own = self.machine.micro_batches(stage)
        loader = sets.make_loader(
            self.datasets[stage], size, epochs, c.seed + stage, self.tokenizer.pad,
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
            # LoRA dropout: a resumed run draws the same masks as an uninterrupted one.
            seed = self.c.seed * 1_000_003 + plan.stage * 1_000_000 + number
            torch.manual_seed(seed * 1_009 + self.machine.rank)
            yield step

    @contextmanager
    def count_flops(self, plan: StagePlan):
        """Count a stage's FLOPs: those of its first step, over all processes, times the steps."""
        if str(plan.stage) in self.progress.flops:
            yield
            return
        with files.flop_counter() as counter:
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
        progress.step += 1
        progress.skipped += step.counts["skipped"]
        progress.cut += step.counts["cut"]
        self.log.write(progress, values, step.counts)
        # Every --save-every steps, after stage 1, and before the run stops.
        end_of_stage1 = plan.stage == 1 and progress.step == plan.steps
        if stop or c.save_every and (end_of_stage1 or progress.step % c.save_every == 0):
            progress.log = self.log.position()
            self.checkpoints.save(f"stage{plan.stage}-{progress.step:08}", self.model,
                                  self.optimizer, asdict(progress))
        if stop:
            self.checkpoints.finish()
            raise signals.Stopped(
                f"stopped by {self.machine.stop or 'a signal'} at {stage_name(plan.stage)}, step "
                f"{progress.step}; to go on: {command('train.py')} --resume {c.out}")

    def finish(self) -> None:
        """Write the model, evaluate it if there is a held-out set, draw, and write result.json."""
        c, machine, out = self.c, self.machine, Path(self.c.out)
        run_folder.export(c, machine.first, self.model, self.tokenizer)
        again = f"{command('train.py')} --evaluate {c.out}"
        machine.end_training(f"after training; to evaluate: {again}")
        vlm = None if machine.sharded else self.model.vlm  # a sharded one is read from its files
        del self.model, self.teachers, self.optimizer  # a GPU has no room for a second model
        if not machine.first:
            return
        from plumbing.plots import plot_curves  # matplotlib takes long to load
        plot_curves(out, references(c))
        result = {}
        if "eval" in self.sets:
            held_out = self.sets["eval"]
            result, rows, answers = evaluate_run(c, held_out, out, vlm, self.tokenizer)
            save_answers(out, rows, answers, held_out[1])
        result.update({
            "seconds": round(time.perf_counter() - self.begin, 1),
            "tflops": round(sum(self.progress.flops.values()) / 1e12, 3),
            "peak_rss_mb": round(run_folder.peak_rss_mb()),
            "seed": c.seed, "skipped": self.progress.skipped, "cut": self.progress.cut})
        if c.device == "cuda":
            result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
        files.write_json(out / "result.json", result)
        evaluate.print_result(result, out, references(c), run_log.next_commands(c))


def evaluate_run(c: Config, held_out: tuple, run: Path, vlm: VLM | None = None,
                 tokenizer=None) -> tuple[dict, list, list]:
    """Return the held-out accuracies of a VLM (None: the run's own), the questions, the answers."""
    if vlm is None:
        from plumbing.finished_run import load_run
        vlm, tokenizer, _ = load_run(run, c.device)
        checks.check_lengths(c, {"eval": held_out}, tokenizer, vlm.student.num_tokens)
    return evaluate.evaluate(c, vlm, tokenizer, *held_out)


def save_answers(out: Path, rows: list[dict], answers: list[str], get_image: Callable) -> None:
    """Write predictions.jsonl and draw samples.png."""
    from plumbing.plots import plot_samples
    evaluate.write_predictions(out / "predictions.jsonl", rows, answers)
    plot_samples(out / "samples.png", rows, answers, get_image)
