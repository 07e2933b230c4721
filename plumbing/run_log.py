"""The log of a run, in log.jsonl and on the screen. It changes no result."""

import json
import os
import sys
import time
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from data import Conversations
from model import VLM
from plumbing import evaluate, files, sets
from plumbing.checkpoints import Progress
from plumbing.cli import command
from plumbing.config import STAGES, Config, is_real, references, stage_name

HEADING = ("each line: losses, each teacher's own loss (kd_) and weight (w_), then `experts`: one "
           "group per layer, in it the % of the tokens that each of its experts took")
QUESTIONS, POINTS = 100, 4      # held-out questions, and how often in a stage they are asked
DRAW_SECONDS = 10.0             # between two drawings of the curves, at least
DRAW_PAUSE = 60                 # and 60 times the time of one drawing: 2 % of a run at most
COLLAPSED, COLLAPSED_STEPS = 0.99, 100  # fraction of a layer's tokens, and how long it may last
SETTLED_STEPS, SHORTEST = 300, 100      # when a loss should have moved; in a shorter stage: its end
STILL = 0.02                    # relative change of a loss that has not moved


def is_lesson(c: Config) -> bool:
    """Return whether a run is the whole method in the tiny world, in whatever recipe."""
    method = c.student == "trained" and c.mole_experts and c.lambda_kd
    return bool(method) and not (c.llm or c.data or c.data_root)


def stand_in_words(c: Config) -> str:
    """Return which pictures the stand-ins have learnt from, if not the run's own."""
    if is_real(c.clip) or not c.data:
        return ""
    if c.stage0_pictures == "data":
        return (f"the stand-in encoders are trained on the pictures of {c.data} itself: CLIP on "
                "its questions and answers, the others without labels (once, a few minutes)")
    return ("the stand-in encoders know the drawn pictures of the tiny world, not those of "
            f"{c.data}; --stage0-pictures data trains them on its own first")


def next_commands(c: Config) -> str:
    """Return what to try after a first run of the tiny preset."""
    if not is_lesson(c):
        return ""
    return ("try next:\n"
            f"    {command('tools.explain')} {c.out}     # a look into this run\n"
            f"    {command('tools.ask')} {c.out}         # its answers about held-out pictures\n"
            f"    {command('train.py')} --tiny --recipe ours --out runs/ours   # a recipe that "
            "teaches more\n")


def count_stage_steps(c: Config, datasets: dict[int, Conversations]) -> dict[int, int]:
    """Return {stage: its steps}; a stage of 0 epochs has none."""
    counts = {}
    for stage, dataset in datasets.items():
        epochs = getattr(c, f"{STAGES[stage]}_epochs")
        steps = sets.count_steps(len(dataset), getattr(c, f"{STAGES[stage]}_batch"), epochs)
        counts[stage] = min(steps, c.max_steps or steps) if epochs else 0
    return counts


class HeldOut:
    """Held-out accuracy of a tiny LLM (a second's work) at a few points, in held_out.json."""

    def __init__(self, c: Config, vlm: VLM, tokenizer, held_out: tuple | None):
        self.c, self.vlm, self.tokenizer = c, vlm, tokenizer
        self.file = Path(c.out) / "held_out.json"
        records, self.get_image = held_out or ([], None)
        self.rows = [] if c.llm else evaluate.questions_of(records)[:QUESTIONS]

    def measure(self, stage: int, step: int, steps: int) -> None:
        """Ask, if a point was passed since the last line; `step` of `steps` are done in a stage."""
        earlier = max(0, step - self.c.log_every)
        if not self.rows or step * POINTS // steps == earlier * POINTS // steps:
            return
        records = [row["record"] for row in self.rows]
        answers = evaluate.answer(self.c, self.vlm, self.tokenizer, records, self.get_image)
        self.vlm.train()    # it goes on
        per_type = evaluate.accuracy_per_type(self.rows, answers)
        accuracy = sum(per_type.values()) / len(per_type)
        points = files.read_json(self.file) if self.file.exists() else []
        points = [point for point in points if (point["stage"], point["step"]) < (stage, step)]
        points.append({"stage": stage, "step": step, "accuracy": accuracy})
        files.write_json(self.file, points)
        tqdm.write(f"held-out accuracy of {len(records)} questions: {accuracy:.1f} %")


class RunLog:
    """The log of a run, of its first process: in the others it neither writes nor prints."""

    def __init__(self, c: Config, first: bool, progress: Progress, steps: dict[int, int],
                 held_out: HeldOut | None):
        self.c, self.first, self.held_out, self.steps = c, first, held_out, steps
        self.collapsed_steps = {}       # layer: for how many steps one expert has had its tokens
        self.losses = {}                # (stage, teacher): its loss in each of the first steps
        self.next_drawing = time.perf_counter() + DRAW_SECONDS
        self.file = Path(c.out) / "log.jsonl"   # no clock in it: one seed makes one log
        if first:
            self.begin_file(*progress.log)
        self.tensorboard = None
        if first and c.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an optional package
            self.tensorboard = SummaryWriter(c.tensorboard)

    def begin_file(self, size: int, crc: int) -> None:
        """Cut the log where the run resumes; start anew if it differs from the checkpoint's."""
        lines = self.file.read_bytes()[:size] if self.file.is_file() else b""
        if zlib.crc32(lines) != crc:
            print(f"note: {self.file}: is missing, or has changed since the checkpoint was made; "
                  "the log starts anew", file=sys.stderr)
            lines = b""
        self.file.write_bytes(lines)

    def position(self) -> list[int]:
        """Return the bytes written so far, and their CRC-32."""
        content = self.file.read_bytes() if self.first else b""
        return [len(content), zlib.crc32(content)]

    def say(self, text: str) -> None:
        if self.first and text:
            print(text, flush=True)

    def bar(self, progress: Progress) -> tqdm:
        """Return the steps that a stage has left, with a progress bar; its clocks start."""
        self.say(HEADING if self.c.mole_experts else "")
        self.clock, self.tokens = time.perf_counter(), 0
        steps = self.steps[progress.stage]
        return tqdm(range(progress.step, steps), stage_name(progress.stage), steps,
                    initial=progress.step, mininterval=1, disable=not self.first)

    def write(self, progress: Progress, terms: dict, counts: dict) -> None:
        """Note a step; every --log-every steps, and at the last of a stage, log and show it."""
        if not self.first:
            return
        self.tokens += counts["tokens"]
        stage, step = progress.stage, progress.step - 1
        last = progress.step == self.steps[stage]
        self.warn(stage, terms, last)
        if step % self.c.log_every and not last:
            return
        values = {"stage": stage, "step": step}
        for name in sorted(terms, key=lambda name: not name.startswith("L_")):  # losses first
            value = terms[name]
            values[name] = value.tolist() if torch.is_tensor(value) else value
        for name in ("skipped", "cut"):
            if getattr(progress, name):
                values[name] = getattr(progress, name)
        self.append(json.dumps(values) + "\n")
        self.show(values)

    def append(self, line: str) -> None:
        """Append a line to log.jsonl, or no half of it if the disk refuses. Raises OSError."""
        size = self.file.stat().st_size
        try:
            with open(self.file, "ab") as file:
                file.write(line.encode())
        except OSError as e:
            os.truncate(self.file, size)
            raise OSError(e.errno, e.strerror, str(self.file)) from None

    def show(self, values: dict) -> None:
        """Show a line of the log: in words, with the accuracy, in TensorBoard, in the curves."""
        stage, step = values["stage"], values["step"]
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        words = [f"{stage_name(stage)} step {step}"]
        words += [f"{name} {value:.3g}" for name, value in numbers.items()]
        if "experts" in values:
            layers = ["/".join(f"{100 * x:.0f}" for x in layer) for layer in values["experts"]]
            words.append("experts " + " ".join(layers))
        words.append(f"{self.tokens / (time.perf_counter() - self.clock):.0f} tokens/s")
        tqdm.write("  ".join(words))
        if self.held_out:
            self.held_out.measure(stage, step + 1, self.steps[stage])
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(f"{stage_name(stage)}/{name}", value, step)
        start = time.perf_counter()
        if start >= self.next_drawing:
            from plumbing.plots import plot_curves  # matplotlib takes long to load
            plot_curves(self.file.parent, references(self.c))
            now = time.perf_counter()
            self.next_drawing = now + max(DRAW_SECONDS, DRAW_PAUSE * (now - start))

    def warn(self, stage: int, terms: dict, last: bool) -> None:
        """Warn, once for each, of a collapsed router and of a teacher whose loss does not move."""
        experts = terms["experts"].tolist() if "experts" in terms else []
        for layer, fractions in enumerate(experts):
            largest = max(fractions)
            steps = self.collapsed_steps.get(layer, 0) + 1 if largest > COLLAPSED else 0
            self.collapsed_steps[layer] = steps
            if len(fractions) > 1 and steps == COLLAPSED_STEPS:
                tqdm.write(f"warning: layer {layer}: expert {fractions.index(largest)} has "
                           f"{100 * largest:.1f} % of the tokens, for {steps} steps now; a higher "
                           "--balance-weight keeps the others in use", file=sys.stderr)
        for name, value in terms.items():
            # CLIP's own loss starts near 0, because the student starts as CLIP: it may stay there
            if not name.startswith("kd_") or name == "kd_clip":
                continue
            losses = self.losses.setdefault((stage, name), [])
            if len(losses) == SETTLED_STEPS:
                continue    # judged already
            losses.append(value.item())
            start = torch.tensor(losses[:20]).mean().item()
            now = torch.tensor(losses[-20:]).mean().item()
            settled = len(losses) == SETTLED_STEPS or (last and len(losses) >= SHORTEST)
            if settled and abs(now - start) <= STILL * start:
                tqdm.write(f"warning: teacher {name.removeprefix('kd_')}: its loss has hardly "
                           f"moved in {len(losses)} steps of {stage_name(stage)}: {start:.3g}, now "
                           f"{now:.3g}; the student learns nothing from it", file=sys.stderr)
