"""What a person sees of a run while it trains: plain words, curves, time left, accuracy, warnings.

Nothing here changes what is computed: no random number is drawn, and log.jsonl is written by
run_log.RunLog alone.
"""

import errno
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import Conversations
from model import VLM
from plumbing.sets import count_steps
from plumbing.checkpoints import Progress, crc_of_start
from plumbing.config import Config
from plumbing.evaluate import accuracy_per_type, answer, questions_of
from plumbing.files import read_json, write_json
from plumbing.plots import plot_curves
from plumbing.config import is_real

EVERY = 10.0        # seconds between two drawings, at least
SHARE = 20          # and so many times what the last one took: 5 % of a run at most
QUESTIONS = 100     # held-out questions that are asked a few times in a stage
POINTS = 4          # so many times
HEADING = ("each line: losses, each teacher's own loss (kd_) and weight (w_), then `experts`: a "
           "group a layer, in it the % of the tokens that each of its experts took")


def is_lesson(c: Config) -> bool:
    """Whether a run is the whole method in the tiny world, in whatever recipe."""
    whole = c.student == "trained" and c.mole_experts and c.lambda_kd
    return bool(whole) and not (c.llm or c.data or c.data_root)


def stage_words(c: Config, stage: int) -> str:
    """For a first-time reader: what a stage of the tiny preset trains, on what, and why."""
    if stage == 0 and c.data and not is_real(c.clip):
        return own_words(c)
    if not is_lesson(c):
        return ""
    return {
        0: "stage 0 stands for the downloads of the real method: a small CLIP, EVA, ConvNeXt and "
           "LLM, each trained by itself on drawn pictures or on text (once, a minute or two)",
        1: f"stage 1 aligns: experts, adapters and projector learn from {c.n_pretrain:,} captioned "
           "pictures, so that the LLM can read the student's tokens; student and LLM stay frozen",
        2: f"stage 2 finetunes: all but the teachers learns from "
           f"{c.n_train + c.n_described + c.n_text:,} conversations, so that questions are "
           "answered from what the student sees",
    }[stage]


def own_words(c: Config) -> str:
    """What the toy encoders know of pictures that are not the tiny world's."""
    if c.stage0_pictures == "data":
        return (f"stage 0 trains the toy encoders on the pictures of {c.data} itself: CLIP on its "
                "questions and answers, the others without labels (once, a few minutes)")
    return (f"the toy encoders know the drawn pictures of the tiny world, not those of {c.data}; "
            "--stage0-pictures data trains them on its own first")


def next_commands(c: Config) -> str:
    """What to try after a first run of the tiny preset."""
    if not is_lesson(c):
        return ""
    lines = (f"try next:\n    python -m tools.explain {c.out}     # this run looked into: open "
             f"{c.out}/explain.html\n    python -m tools.ask {c.out}         # its answers about "
             "held-out pictures\n")
    if c.adapter_direction == "teacher_to_student":
        return lines + ("    python train.py --tiny --recipe ours --out runs/ours   # the recipe "
                        "that teaches more\n")
    return lines + (f"    python -m tools.export_student {c.out} runs/student   # the distilled "
                    "encoder alone, for timm\n")


class HeldOut:
    """Held-out accuracy at a few points of a stage, of a tiny LLM, for which it costs a second.

    A real LLM is asked at the end only. The points are kept in held_out.json.
    """

    def __init__(self, c: Config, vlm: VLM, tokenizer, held_out: tuple | None):
        self.file = Path(c.out) / "held_out.json"
        self.c = c
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.rows = []
        if held_out and not c.llm:
            self.rows = questions_of(held_out[0])[:QUESTIONS]
            self.get_image = held_out[1]

    def measure(self, stage: int, step: int, steps: int) -> float | None:
        """The accuracy in % if a point to ask at has been passed since the last line, else None."""
        earlier = max(0, step - self.c.log_every)
        passed = step * POINTS // steps > earlier * POINTS // steps
        if not self.rows or not passed:
            return None
        training = self.vlm.training
        given = answer(self.c, self.vlm, self.tokenizer, [row["record"] for row in self.rows],
                       self.get_image)
        self.vlm.train(training)
        each = accuracy_per_type(self.rows, given)
        accuracy = sum(each.values()) / len(each)
        kept = read_json(self.file) if self.file.exists() else []
        kept = [point for point in kept if (point["stage"], point["step"]) < (stage, step)]
        write_json(self.file, [*kept, {"stage": stage, "step": step, "accuracy": accuracy}])
        return accuracy


class Watch:
    """One for a run; of the first process only, for the others it says nothing."""

    def __init__(self, c: Config, first: bool, datasets: dict[int, Conversations],
                 held_out: HeldOut | None):
        self.c = c
        self.held_out = held_out
        self.steps = {stage: stage_steps(c, stage, rows) for stage, rows in datasets.items()}
        self.next_drawing = time.perf_counter() + EVERY
        self.writer = None
        if c.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter  # an optional package
            self.writer = SummaryWriter(c.tensorboard)

    def begin(self, stage: int) -> list[str]:
        """Lines to print before a stage."""
        self.started = None
        words = [stage_words(self.c, stage), HEADING if self.c.mole_experts else ""]
        return [line for line in words if line]

    def after_step(self, stage: int, step: int) -> str:
        """After each step (the first is 1): the time that both stages still take, in words."""
        now = time.perf_counter()
        if self.started is None:  # the first step is slow and not counted
            self.started = (now, step)
            return ""
        seconds = (now - self.started[0]) / (step - self.started[1])
        left = seconds * (self.steps[stage] - step)
        if stage == 1:  # a sample of stage 2 is taken to cost as much
            left += seconds * self.steps[2] * self.c.stage2_batch / self.c.stage1_batch
        return f"{int(left) // 60}:{int(left) % 60:02} left of the run"

    def after_line(self, values: dict) -> list[str]:
        """After each line of the log; returns lines to print."""
        stage, step = values["stage"], values["step"]
        said = []
        score = None
        if self.held_out:
            score = self.held_out.measure(stage, step + 1, self.steps[stage])
        if score is not None:
            said.append(f"held-out accuracy of {len(self.held_out.rows)} questions: {score:.1f} %")
        if self.writer:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"stage {stage}/{name}", value, step)
        now = time.perf_counter()
        if now >= self.next_drawing:
            plot_curves(Path(self.c.out))
            took = time.perf_counter() - now
            self.next_drawing = now + max(EVERY, SHARE * took)
        return said


def stage_steps(c: Config, stage: int, dataset: Conversations) -> int:
    """The steps of a stage."""
    epochs = getattr(c, f"stage{stage}_epochs")
    if epochs == 0:
        return 0
    steps = count_steps(len(dataset), getattr(c, f"stage{stage}_batch"), epochs)
    return min(steps, c.max_steps or steps)


COLLAPSED = 0.99    # share of a layer's tokens that one expert has
COLLAPSED_FOR = 100     # steps
SETTLED = 300       # steps after which a teacher's loss should have moved, or the end of a stage
SHORTEST = 100      # a stage of fewer steps is too short to tell
STILL = 0.02        # change, relative to the start


class SilentFaults:
    """Looks at every step of a run; `warn` gets a line, of each kind and place one."""

    def __init__(self, warn):
        self.warn = warn
        self.collapsed_for = {}     # layer: for how many steps in a row
        self.losses = {}            # (stage, teacher): its loss in each step

    def look(self, stage: int, step: int, values: dict, last: bool) -> None:
        """A step's values; `last` is that of a stage."""
        if "experts" in values:
            for layer, shares in enumerate(values["experts"].tolist()):
                self.look_at_router(stage, step, layer, shares)
        for name, value in values.items():
            # CLIP's own loss starts near 0, where the student starts: it may stay there
            if name.startswith("kd_") and name != "kd_clip":
                self.look_at_teacher(stage, step, name.removeprefix("kd_"), value.item(), last)

    def look_at_router(self, stage: int, step: int, layer: int, shares: list[float]) -> None:
        """Warn if one expert has had all tokens of a layer for long."""
        so_far = self.collapsed_for.get(layer, 0)
        self.collapsed_for[layer] = so_far + 1 if max(shares) > COLLAPSED else 0
        if len(shares) > 1 and self.collapsed_for[layer] == COLLAPSED_FOR:
            expert = shares.index(max(shares))
            self.warn(f"warning: layer {layer}: expert {expert} has {100 * max(shares):.1f} % of "
                      f"the tokens, for {COLLAPSED_FOR} steps now (stage {stage}, step {step}); a "
                      "higher --balance-weight keeps the others in use")

    def look_at_teacher(self, stage: int, step: int, teacher: str, loss: float, last: bool) -> None:
        """Warn if a teacher's loss is where it was when the stage began."""
        losses = self.losses.setdefault((stage, teacher), [])
        if len(losses) == SETTLED:
            return  # it has been looked at
        losses.append(loss)
        if len(losses) != SETTLED and not (last and SHORTEST <= len(losses) < SETTLED):
            return
        start = torch.tensor(losses[:20]).mean().item()
        now = torch.tensor(losses[-20:]).mean().item()
        if abs(now - start) <= STILL * start:
            self.warn(f"warning: teacher {teacher}: L_kd's part of it has hardly moved in "
                      f"{len(losses)} steps of stage {stage}: {start:.3g}, now {now:.3g}; nothing "
                      "is learnt from it")


class RunLog:
    """log.jsonl and the lines on the screen; of the first process only, for the others nothing.

    log.jsonl has no clock in it, so that one seed makes one log.
    """

    def __init__(self, c: Config, first: bool, resumed: bool, progress: Progress, watch: Watch):
        self.every = c.log_every
        self.watch = watch
        self.first = first
        self.faults = SilentFaults(lambda line: tqdm.write(line, file=sys.stderr))
        self.file = None
        if first:
            # without a buffer: no half line waits in one when the disk is full
            self.file = open(Path(c.out) / "log.jsonl", "r+b" if resumed else "wb", buffering=0)
            self.file.truncate(progress.log[0])
            self.file.seek(0, 2)

    def position(self) -> list[int]:
        """Bytes written so far, and their CRC-32."""
        if not self.file:
            return [0, 0]
        size = self.file.tell()
        return [size, crc_of_start(Path(self.file.name), size)]

    def close(self) -> None:
        if self.file:
            self.file.close()

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def append(self, line: str) -> None:
        """Write a line, or if the disk refuses leave no half of it. Raises OSError."""
        before = self.file.tell()
        data = line.encode()
        if self.file.write(data) < len(data):
            self.file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)

    def bar(self, progress: Progress, steps: int) -> tqdm:
        """The steps of a stage that are left, with a bar; the clock of tokens/s starts."""
        self.clock = time.perf_counter()
        self.tokens = 0
        for line in self.watch.begin(progress.stage):
            self.say(line)
        self.shown = tqdm(range(progress.step, steps), total=steps, initial=progress.step,
                          desc=f"stage {progress.stage}", mininterval=1, disable=not self.first)
        return self.shown

    def write(self, progress: Progress, terms: dict, counts: dict, last: bool) -> None:
        """Every --log-every steps and at the last: a line for programs, and one to read."""
        self.tokens += counts["tokens"]
        step = progress.step - 1
        if not self.file:
            return
        self.faults.look(progress.stage, step, terms, last)
        left = self.watch.after_step(progress.stage, progress.step)
        self.shown.set_postfix_str(left, refresh=False)
        if step % self.every and not last:
            return
        values = {"stage": progress.stage, "step": step}
        for name in sorted(terms, key=lambda name: not name.startswith("L_")):  # losses first
            value = terms[name]
            values[name] = value.tolist() if torch.is_tensor(value) else value
        for name in ("skipped", "cut"):
            if getattr(progress, name):
                values[name] = getattr(progress, name)
        self.append(json.dumps(values) + "\n")
        words = [f"stage {values['stage']} step {values['step']}"]
        words += [f"{name} {v:.3g}" for name, v in values.items() if isinstance(v, float)]
        if "experts" in values:
            layers = ["/".join(f"{100 * s:.0f}" for s in shares) for shares in values["experts"]]
            words.append("experts " + " ".join(layers))
        words.append(f"{self.tokens / (time.perf_counter() - self.clock):.0f} tokens/s")
        tqdm.write("  ".join(words))
        for line in self.watch.after_line(values):
            tqdm.write(line)
