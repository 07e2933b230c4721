"""What a person sees of a run while it trains: plain words, curves, time left, accuracy, warnings.

Nothing here changes what is computed: no random number is drawn, and log.jsonl is written by
run_log.RunLog alone.
"""

import dataclasses
import importlib.util
import time
from pathlib import Path

from data import Conversations, count_steps, read_json, write_json
from model import VLM
from plumbing.cli import InputError
from plumbing.config import EVALUATION, MACHINE, TINY, Config
from plumbing.encoder_weights import is_real
from plumbing.evaluate import accuracy_per_type, answer, questions_of
from plumbing.plots import plot_curves

EVERY = 10.0        # seconds between two drawings, at least
SHARE = 20          # and so many times what the last one took: 5 % of a run at most
QUESTIONS = 100     # held-out questions that are asked a few times in a stage
POINTS = 4          # so many times
WINDOW = 5          # logged lines whose mean is held against the band
BANDS = Path(__file__).with_name("tiny_bands.json")
HEADING = ("each line: losses, each teacher's own loss (kd_) and weight (w_), then `experts`: a "
           "group a layer, in it the % of the tokens that each of its experts took")


def is_lesson(c: Config) -> bool:
    """Whether a run is the whole method in the tiny world, in whatever recipe."""
    whole = c.student == "trained" and c.mole_experts and c.lambda_kd
    return bool(whole) and not (c.llm or c.data or c.data_root)


def is_reference(c: Config) -> bool:
    """Whether a run is `--tiny` as the bands know it, with any seed and on any machine."""
    free = {"out", "seed", "cache_teachers", "overwrite", *MACHINE, *EVALUATION} - {"log_every"}
    return all(getattr(c, field.name) == getattr(TINY, field.name)
               for field in dataclasses.fields(Config) if field.name not in free)


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


def check_tensorboard(c: Config) -> None:
    """Raise InputError if its events are wanted and it is not installed."""
    if c.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError(f"--tensorboard {c.tensorboard}: the package is not installed; pip "
                         "install tensorboard, or leave the flag out: curves.png has the same")


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
        self.bands = read_json(BANDS)["bands"] if is_reference(c) else {}
        self.recent = []
        self.warned = set()
        self.next_drawing = time.perf_counter() + EVERY
        self.writer = None
        if c.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter  # an optional package
            self.writer = SummaryWriter(c.tensorboard)

    def begin(self, stage: int) -> list[str]:
        """Lines to print before a stage."""
        self.recent = []
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
        said += self.outside_bands(values)
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

    def outside_bands(self, values: dict) -> list[str]:
        """One line a term and stage, when its mean of late is where no reference run was."""
        self.recent = [*self.recent[1 - WINDOW:], values]
        stage, step = values["stage"], values["step"]
        if len(self.recent) < WINDOW:
            return []
        said = []
        for name, blocks in self.bands.get(str(stage), {}).items():
            first, last, low, high = band_of(blocks, step)
            mean = sum(line.get(name, 0.0) for line in self.recent) / WINDOW
            if not first <= step < last or low <= mean <= high or (stage, name) in self.warned:
                continue
            self.warned.add((stage, name))
            said.append(f"note: {name} is {mean:.3g} at stage {stage}, step {step}; five seeds of "
                        f"--tiny were between {low:.3g} and {high:.3g}. docs/lesson.md, \"Is my "
                        "loss normal?\"")
        return said


def band_of(blocks: list[list[float]], step: int) -> list[float]:
    """[first step, last step, low, high] of the block that a step lies in, else of the last."""
    for block in blocks:
        if block[0] <= step < block[1]:
            return block
    return blocks[-1]


def stage_steps(c: Config, stage: int, dataset: Conversations) -> int:
    """The steps of a stage."""
    epochs = getattr(c, f"stage{stage}_epochs")
    if epochs == 0:
        return 0
    steps = count_steps(len(dataset), getattr(c, f"stage{stage}_batch"), epochs)
    return min(steps, c.max_steps or steps)
