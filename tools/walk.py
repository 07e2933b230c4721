"""One training step of the tiny preset as a lesson: the code's own lines beside what they gave.

    python -m tools.walk                # the first step of `train.py --tiny` (10 s)
    python -m tools.walk runs/tiny      # a step on the weights of a finished run
    python -m tools.walk --all-lines    # also the lines that made no tensor

The lines are read from the source. Each is followed by the names, shapes and first numbers of the
tensors that it made, which a tracer notes while one step of MoVEKD.forward runs.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import kd_loss
import model as method
import mole
import teachers as encoders
from data import Conversations, InputError, collate
from plumbing.build import build_movekd, build_teachers, build_vlm, pretrained_weights
from plumbing.cli import Parser, run
from plumbing.config import TINY, Config
from plumbing.run_log import is_lesson
from plumbing.sets import build_tokenizer, load_sets
from tiny.world import WorldImages, world_records
from tools.explain.whole_run import load_whole_run
from train import total_loss

# in the order in which a step comes to them: a function, and the words before its lines
STOPS = {
    method.MoVEKD.forward: "The whole method, one forward. It calls all the others below.",
    method.Student.forward: "The student: CLIP with experts, up to hidden layer -2.",
    mole.RoutedFFN.route: "In each block, the router sends each token to one expert.",
    mole.MoLE.forward: "The FFN, and the chosen expert beside it.",
    mole.ExpertLoRA.forward: "All E LoRAs as one: the gate leaves the chosen one's columns.",
    method.VLM.splice: "The visual tokens replace <image> among the words.",
    method.text_loss: "L_text looks at answer tokens only.",
    mole.balance_loss: "L_balance: is every expert in use?",
    encoders.ClipEncoder.forward: "The CLIP teacher: tokens, [CLS], and the row of its scores.",
    encoders.cls_scores: "What [CLS] looks at: one row of one block's attention.",
    encoders.EncoderAdapter.forward: "The encoder adapter between EVA's tokens and the student's.",
    kd_loss.teacher_weights: "W^tea: how much each teacher counts.",
    kd_loss.token_weights: "W^tok: how much each token counts.",
    kd_loss.token_errors: "The squared error of each token.",
    kd_loss.kd_loss: "L_kd: both weights and the errors.",
}


class Tracer:
    """Notes the tensors that each line of a function made in its first call; for `sys.settrace`."""

    def __init__(self, functions: Iterable[Callable]):
        self.codes = {function.__code__ for function in functions}
        self.found = {}     # code: {line: {name: its description}}
        self.running = {}   # frame: (the line that ran last, the locals before it)

    def __call__(self, frame, event, arg):
        code = frame.f_code  # it is called at a call, before each line and at the return
        if event == "call":
            if code not in self.codes or code in self.found:
                return None
            self.found[code] = {}
        now = describe_all(frame.f_locals)
        line, before = self.running.get(frame, (frame.f_lineno, now))
        if event == "return" and not isinstance(arg, dict):  # a dict's items stand there already
            now["returns"] = describe(arg)
        new = {name: text for name, text in now.items() if text and before.get(name) != text}
        self.found[code].setdefault(line, {}).update(new)
        self.running[frame] = (frame.f_lineno, now)
        return self


def describe_all(values: dict) -> dict[str, str]:
    """Describe the locals of a function; a dict's items one by one."""
    words = {}
    for name, value in values.items():
        if isinstance(value, dict):
            words.update({f"{name}[{key!r}]": describe(item) for key, item in value.items()})
        elif name != "_":
            words[name] = describe(value)
    return words


def describe(value) -> str:
    """Describe a tensor by its shape and first numbers, a list of tensors by its first; else ""."""
    if torch.is_tensor(value):
        size = " x ".join(map(str, value.shape)) or "a number"
        numbers = " ".join(f"{x:.3g}" for x in value.detach().flatten()[:3].tolist())
        return f"{size}: {numbers}{' ...' if value.numel() > 3 else ''}"
    if isinstance(value, list) and value and torch.is_tensor(value[0]):
        return f"{len(value)} of {describe(value[0])}"
    return ""


def tiny_step(folder: Path | None = None) -> tuple:
    """Return Config, model, teachers and a batch of two samples, of a run or of --tiny's start."""
    if folder:
        c, tokenizer, model, _, teachers = load_whole_run(folder, "cpu")
        if not is_lesson(c):
            raise InputError(f"{folder}: is not the whole method in the tiny world; name a run of "
                             "--tiny")
    else:
        c = TINY
        sets = load_sets(c)
        tokenizer = build_tokenizer(c, sets)
        weights = pretrained_weights(c, sets["train"][0], tokenizer)
        teachers = build_teachers(c, weights)
        model = build_movekd(c, build_vlm(c, tokenizer, weights), teachers)
    rows = Conversations(world_records("train", "chat", 2), WorldImages("train", 2), tokenizer,
                         "v1", model.vlm.student.num_tokens, c.max_length)
    return c, model, teachers, collate([rows.sample(i) for i in range(2)], tokenizer.pad)


def print_loss(c: Config, model: method.MoVEKD, terms: dict[str, torch.Tensor]) -> None:
    """Print L_total, as train.py's loop adds it up, and the norms of its gradients."""
    learnt = terms["L_text"] + c.lambda_kd * terms["L_kd"]
    L_total = total_loss(c, terms)
    print(f"\n=== total_loss   (train.py)\n    L_total = L_text {terms['L_text']:.4f} + lambda_kd "
          f"{c.lambda_kd:g} * L_kd {terms['L_kd']:.4f} + balance_weight "
          f"{c.balance_weight:g} * L_balance {terms['L_balance']:.4f} = {L_total:.4f}")
    layers = mole.mole_layers(model.vlm.student)
    routers = [layer.router.weight for layer in layers]
    for name, term in (("L_text + lambda_kd * L_kd", learnt), ("L_balance", terms["L_balance"])):
        grads = torch.autograd.grad(term, routers, retain_graph=True)
        print(f"    gradient of {name} in the routers: {torch.nn.utils.get_total_norm(grads):.4g}")
    if not any(p.any() for layer in layers for p in layer.new_modules()[1].up.parameters()):
        print("    The first is 0 because every up matrix is 0: no choice of an expert changes "
              "anything yet.")
    print("    L_total.backward() leaves these gradients (their norms):")
    L_total.backward()
    for name, parameters in model.parameter_groups().items():
        grads = [p.grad for p in parameters if p.grad is not None]
        print(f"    {name:18} {torch.nn.utils.get_total_norm(grads):.4g}")


def main(argv: list[str] | None = None) -> None:
    """Run one step under the tracer and print its notes."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="a run of --tiny")
    parser.add_argument("--all-lines", action="store_true", help="print all lines of the functions")
    args = parser.parse_args(argv)
    c, model, teachers, batch = tiny_step(args.run)
    tracer = Tracer(STOPS)
    sys.settrace(tracer)
    try:
        terms = model(batch, teachers)
    finally:
        sys.settrace(None)
    print("One step of --tiny on two pictures: B = 2, B_img = 2. Letters: model.py.")
    for function, words in STOPS.items():
        found = tracer.found.get(function.__code__)
        if found is None:   # of another form of the method
            continue
        lines, first = inspect.getsourcelines(function)
        print(f"\n=== {function.__qualname__}   ({function.__module__}.py, line {first})")
        print(f"    {words}")
        for i, source in enumerate(lines, start=first):
            if i in found or args.all_lines:
                print(f"{i:5} {source.rstrip()}")
            for name, text in found.get(i, {}).items():
                print(f"{'':12}=> {text}" if name == "returns" else f"{'':12}-> {name} = {text}")
    print_loss(c, model, terms)


if __name__ == "__main__":
    run(main)
