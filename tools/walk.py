"""One training step of the tiny preset as a lesson: the code's own lines beside what they gave.

    python -m tools.walk                # (10 s; no training, no stage 0: the weights are random)
    python -m tools.walk --all-lines    # every line of the functions, those too that made no tensor

The lines are read from the source as it is now, and each is followed by the names, shapes and first
numbers of the tensors that it made. Nothing is computed for the lesson: one step of MoVEKD.forward
runs, and a tracer looks on.
"""

import inspect
import linecache
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import kd_loss
import model as method
import mole
import teachers as encoders
from data import Conversations, collate
from model import VLM, Student
from plumbing.build import build_movekd, llm_shape
from plumbing.cli import Parser, run
from plumbing.config import TINY
from teachers import ClipEncoder, Teachers, VisionEncoder
from tiny.llm import TinyLLM, WordTokenizer
from tiny.world import WorldImages, world_records

# in the order in which a step comes to them: a function, and the words before its lines
STOPS = (
    (method.MoVEKD.forward, "The whole method, one forward. It calls all the others below."),
    (method.Student.forward, "The student: CLIP with experts, up to hidden layer -2."),
    (mole.RoutedFFN.route, "In each block, the router sends each token to one expert."),
    (mole.MoLE.forward, "The frozen FFN, and the chosen expert beside it."),
    (mole.ExpertLoRA.forward, "All E LoRAs as one: the gate leaves the chosen one's columns."),
    (method.VLM.splice, "The visual tokens take the places of <image> among the words."),
    (method.text_loss, "L_text looks at answer tokens only."),
    (mole.balance_loss, "L_balance: is every expert in use?"),
    (encoders.ClipEncoder.forward, "The CLIP teacher: tokens, [CLS], and the row of its scores."),
    (encoders.cls_scores, "What [CLS] looks at: one row of one block's attention."),
    (encoders.EncoderAdapter.forward, "An encoder adapter brings EVA's tokens to the student's."),
    (kd_loss.teacher_weights, "W^tea: how much each teacher counts."),
    (kd_loss.token_weights, "W^tok: how much each token counts."),
    (kd_loss.token_errors, "The squared error of each token."),
    (kd_loss.kd_loss, "L_kd: both weights and the errors."),
)


class Tracer:
    """Notes, line by line, what a function's first call made; `sys.settrace` calls it."""

    def __init__(self, functions: list[Callable]):
        self.codes = {function.__code__: function for function in functions}
        self.made = {}      # code: {line: {name: what it was}}
        self.open = {}      # frame: (the line that ran last, the locals before it)

    def __call__(self, frame, event, arg):
        if event != "call" or frame.f_code not in self.codes or frame.f_code in self.made:
            return None
        self.made[frame.f_code] = {}
        self.open[frame] = (frame.f_lineno, described(frame.f_locals))
        return self.step

    def step(self, frame, event, arg):
        """Called before each line, and at the return: what has the last line changed?"""
        line, before = self.open[frame]
        now = described(frame.f_locals)
        new = {name: text for name, text in now.items() if before.get(name) != text}
        if event == "return" and not isinstance(arg, dict):  # a dict's items were shown
            new["returns"] = describe(arg)
        self.made[frame.f_code].setdefault(line, {}).update(
            {name: text for name, text in new.items() if text})
        self.open[frame] = (frame.f_lineno, now)
        return self.step


def described(values: dict) -> dict[str, str]:
    """The locals of a function as words; a dict's items one by one."""
    words = {}
    for name, value in values.items():
        if isinstance(value, dict):
            words.update({f"{name}[{key!r}]": describe(item) for key, item in value.items()})
        elif name != "_":
            words[name] = describe(value)
    return words


def describe(value) -> str:
    """A tensor's shape and first numbers; of a list of tensors its first; else nothing."""
    if torch.is_tensor(value):
        size = " x ".join(map(str, value.shape)) or "a number"
        first = value.detach().flatten()[:3].tolist()
        numbers = " ".join(f"{x:.3g}" for x in first)
        return f"{size}: {numbers}{' ...' if value.numel() > 3 else ''}"
    if isinstance(value, list) and value and torch.is_tensor(value[0]):
        return f"{len(value)} of {describe(value[0])}"
    return ""


def tiny_step():
    """Model, teachers and a batch of two samples of the tiny preset, with random weights."""
    torch.manual_seed(TINY.seed)
    records = world_records("train", "chat", 2)
    tokenizer = WordTokenizer.from_records(records)
    teachers = Teachers({"clip": ClipEncoder(TINY.clip), "eva": VisionEncoder(TINY.eva),
                         "convnext": VisionEncoder(TINY.convnext)})
    student = Student(TINY.clip)
    student.net.load_state_dict(teachers.encoders["clip"].net.state_dict())  # it starts as CLIP
    student.add_experts(form=TINY.mole_form, num_experts=TINY.mole_experts, rank=TINY.mole_rank,
                        alpha=TINY.mole_alpha, dropout=TINY.mole_dropout,
                        router_grad=TINY.mole_router_grad, init=TINY.mole_init)
    vlm = VLM(student, TinyLLM(*llm_shape(TINY, tokenizer)), tokenizer.image)
    rows = Conversations(records, WorldImages("train", 2), tokenizer, "v1", student.num_tokens,
                         TINY.max_length)
    batch = collate([rows.sample(i) for i in range(2)], tokenizer.pad)
    return build_movekd(TINY, vlm, teachers), teachers, batch


def print_function(function: Callable, words: str, made: dict[int, dict], whole: bool) -> None:
    """A function's lines; behind each, what it made."""
    file = inspect.getsourcefile(function)
    lines, first = inspect.getsourcelines(function)
    print(f"\n=== {function.__qualname__}   ({Path(file).name}, line {first})\n    {words}")
    for line in sorted(made) if not whole else range(first, first + len(lines)):
        source = linecache.getline(file, line).rstrip()
        print(f"{line:5} {source}")
        for name, text in made.get(line, {}).items():
            print(f"{'':12}-> {name} = {text}" if name != "returns" else f"{'':12}=> {text}")


def main(argv: list[str] | None = None) -> None:
    """Run one step under the tracer and print what it saw."""
    parser = Parser(__doc__)
    parser.add_argument("--all-lines", action="store_true",
                        help="print every line of the functions")
    args = parser.parse_args(argv)
    model, teachers, batch = tiny_step()
    tracer = Tracer([function for function, _ in STOPS])
    sys.settrace(tracer)
    try:
        terms = model(batch, teachers)
    finally:
        sys.settrace(None)
    print("One step of --tiny on two pictures: B = 2, B_img = 2. Letters: README.md.")
    for function, words in STOPS:
        print_function(function, words, tracer.made[function.__code__], args.all_lines)
    print_loop(model, terms)


def print_loop(model: method.MoVEKD, terms: dict[str, torch.Tensor]) -> None:
    """What the loop of train.py makes of the terms: L_total, and whom it teaches."""
    learnt = terms["L_text"] + TINY.lambda_kd * terms["L_kd"]
    L_total = learnt + TINY.balance_weight * terms["L_balance"]
    print(f"\n=== the loop of train.py\n    L_total = L_text {terms['L_text']:.4f} + lambda_kd "
          f"{TINY.lambda_kd:g} * L_kd {terms['L_kd']:.4f} + balance_weight "
          f"{TINY.balance_weight:g} * L_balance {terms['L_balance']:.4f} = {L_total:.4f}")
    routers = [layer.router.weight for layer in mole.mole_layers(model.vlm.student)]
    for name, term in (("L_text + lambda_kd * L_kd", learnt), ("L_balance", terms["L_balance"])):
        grads = torch.autograd.grad(term, routers, retain_graph=True)
        print(f"    gradient of {name} in the routers: {norm_of(grads):.4g}")
    print("    The first is 0 because every up matrix is 0: no choice of an expert changes "
          "anything yet.\n    L_total.backward() leaves these gradients (their norms):")
    L_total.backward()
    for name, parameters in model.parameter_groups().items():
        grads = [p.grad for p in parameters if p.grad is not None]
        print(f"    {name:18} {norm_of(grads):.4g}")


def norm_of(tensors) -> float:
    """The norm of several tensors together."""
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


if __name__ == "__main__":
    run(main)
