"""The numbers behind the answers to the exercises of docs/lesson.md.

    python -m tools.lesson router runs/tiny     # 1 whom the routers send where
    python -m tools.lesson uniform runs/tiny    # 2 L_kd under each form of the token weights
    python -m tools.lesson bound                # 3 a softmax of probabilities is nearly uniform
    python -m tools.lesson dinov2               # 6 what another teacher adds
    python -m tools.lesson fish runs/tiny       # 7 the experts of the fish
    python -m tools.lesson one-token            # 8 what 1/n is for
"""

import math
from pathlib import Path

import torch

from data import InputError
from kd_loss import kd_loss, token_weights
from model import Student
from mole import mole_layers, router_probs
from plumbing.cli import Parser, run
from plumbing.config import FULL
from plumbing.finished_run import load_student, load_whole_run
from plumbing.sets import load_eval_set
from teachers import Teachers, VisionEncoder, build_adapters
from tiny.pretrain import cells
from tiny.scenes import ATTRIBUTES, sample_scenes, scene_geometry
from tiny.world import WorldImages

PICTURES = 500  # of the tiny world's test split


@torch.no_grad()
def chosen_experts(run_folder: Path) -> tuple[Student, list[torch.Tensor], list[torch.Tensor]]:
    """The student; expert (PICTURES, 1 + n) and p (PICTURES, 1 + n, E) of each layer."""
    student, _ = load_student(run_folder)
    if not mole_layers(student):
        raise InputError(f"{run_folder}: its student has no experts; name another run")
    student(WorldImages("test", PICTURES).images)
    probs = router_probs(student)
    return student, [p.argmax(dim=-1) for p in probs], probs


def shares(experts: torch.Tensor, count: int) -> str:
    """The share of each expert in %, as words."""
    counted = torch.bincount(experts.flatten(), minlength=count) / experts.numel()
    return " / ".join(f"{100 * share:4.1f}" for share in counted)


def on_object(student: Student) -> torch.Tensor:
    """Which patches the object covers, by their centres: (PICTURES, n), bool."""
    geometry = scene_geometry(sample_scenes("test", PICTURES))
    # 0.8 of the radius: within it a shape is mostly filled
    return torch.hypot(*cells(student, geometry)) < 0.8 * geometry["radius"][:, None]


def router(args) -> None:
    """Exercise 1."""
    student, experts, probs = chosen_experts(args.run)
    print(f"{PICTURES} test pictures; % of the tokens that went to expert 1 / 2 / 3")
    here = on_object(student)
    for layer, (chosen, p) in enumerate(zip(experts, probs), start=1):
        count = p.shape[-1]
        sure = p.max(dim=-1).values.mean()
        print(f"layer {layer}  all {shares(chosen, count)}   [CLS] {shares(chosen[:, 0], count)}   "
              f"object {shares(chosen[:, 1:][here], count)}   "
              f"elsewhere {shares(chosen[:, 1:][~here], count)}   mean largest p {sure:.2f}")


@torch.no_grad()
def uniform(args) -> None:
    """Exercise 2, on the first held-out picture."""
    whole = load_whole_run(args.run)
    held_out = load_eval_set(whole.c)
    if held_out is None or len(whole.model.adapters) == 0:
        raise InputError(f"{args.run}: has no held-out picture, or no teachers; name a run of "
                         "--tiny")
    records, get_image = held_out
    name = records[0]["image"]
    images = get_image(name)[None].to(whole.c.device)
    outputs = whole.teachers(images, [name])
    student, targets, w_tea = whole.model.match_tokens(whole.model.vlm.student(images), outputs)
    for form in ("paper", "released", "uniform"):
        w_tok = token_weights(outputs["clip"].cls_scores, form)
        L_kd, each = kd_loss(student, targets, w_tok, w_tea)
        words = ", ".join(f"{teacher} {loss:.4f}" for teacher, loss in each.items())
        print(f"{form:9} L_kd {L_kd:.4f}   ({words})")
    print("1/n alone: half of the uniform one")


def bound(args) -> None:
    """Exercise 3: all attention on one token is the worst that the second softmax can meet."""
    for n in (36, 196, 576):
        scores = torch.zeros(1, 1, 1 + n)
        scores[0, 0, 1] = 1e4
        w = token_weights(scores, "released")[0]
        entropy = torch.special.entr(w).sum() / math.log(n)
        print(f"n {n}: n x largest {n * w.max():.4f}, formula {n * math.e / (n - 1 + math.e):.4f}, "
              f"entropy / log n {entropy:.5f}; the paper's form: n x largest "
              f"{n * token_weights(scores, 'paper').max():.0f}")


def dinov2(args) -> None:
    """Exercise 6: tokens, width and adapter of the teacher that README adds; nothing is loaded."""
    spec = "vit_large_patch14_dinov2.lvd142m img_size=518"
    with torch.device("meta"):
        dino = VisionEncoder(spec)
        student = Student(FULL.clip)
        n, d = student.num_tokens, student.dim
        adapters = build_adapters(Teachers({"dinov2": dino}), n, d, FULL.adapter_form,
                                  FULL.adapter_direction)
    count = sum(p.numel() for p in adapters.parameters())
    print(f"{dino.num_tokens} tokens x {dino.dim}; its adapter to {n} x {d}: {count:,} parameters, "
          f"{dino.dim} * {d} + {d} + {dino.num_tokens} * {n} + {n} = "
          f"{dino.dim * d + d + dino.num_tokens * n + n:,}")


def fish(args) -> None:
    """Exercise 7: the experts of the patches that each shape covers."""
    student, experts, probs = chosen_experts(args.run)
    shape = sample_scenes("test", PICTURES)[:, list(ATTRIBUTES).index("shape")]
    here = on_object(student)
    print(f"{PICTURES} test pictures; % of the patches on the object that went to expert 1 / 2 / 3")
    for layer, chosen in enumerate(experts, start=1):
        words = []
        for k, name in enumerate(ATTRIBUTES["shape"]):
            rows = shape == k
            words.append(f"{name} {shares(chosen[:, 1:][rows][here[rows]], probs[0].shape[-1])}")
        print(f"layer {layer}  {'   '.join(words)}")


def one_token(args) -> None:
    """Exercise 8: all attention on token 0, which the student has right; the others it has not."""
    n, d = 36, 96
    scores = torch.zeros(1, 1, 1 + n)
    scores[0, 0, 1] = 1e4
    w_tok = token_weights(scores, "paper")
    V_t = torch.ones(1, n, d)
    V_t[0, 0] = 0.0
    V_s = torch.zeros(1, n, d)
    L_kd, _ = kd_loss({"clip": V_s}, {"clip": V_t}, w_tok, torch.ones(1, 1))
    alone = (w_tok[0] * (V_t[0] ** 2).mean(dim=-1)).sum()
    print(f"with 1/n: L_kd {L_kd:.4f} = (n - 1)/n; W^tok alone: {alone:.4f}. The one token has "
          f"{1 + 1 / n:.4f} of a total of 2, all others together {(n - 1) / n:.4f}")


EXERCISES = {"router": router, "uniform": uniform, "bound": bound, "dinov2": dinov2, "fish": fish,
             "one-token": one_token}


def main(argv: list[str] | None = None) -> None:
    """The numbers of one exercise."""
    parser = Parser(__doc__)
    parser.add_argument("exercise", choices=EXERCISES)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/tiny"),
                        help="a run of the tiny world (default runs/tiny)")
    args = parser.parse_args(argv)
    EXERCISES[args.exercise](args)


if __name__ == "__main__":
    run(main)
