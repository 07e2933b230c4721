"""The numbers behind the answers to the exercises of docs/lesson.md.

    python -m tools.lesson router runs/tiny     # 1 which tokens the routers send to which expert
    python -m tools.lesson uniform runs/tiny    # 2 L_kd under each form of the token weights
    python -m tools.lesson bound                # 3 a softmax of probabilities is nearly uniform
    python -m tools.lesson direction            # 5 why the direction of the adapters matters
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
from plumbing.finished_run import load_student
from plumbing.sets import load_eval_set
from teachers import EncoderAdapter, VisionEncoder
from tiny.pretrain import cells
from tiny.scenes import ATTRIBUTES, sample_scenes, scene_geometry
from tiny.world import WorldImages
from tools.explain.whole_run import load_whole_run

PICTURES = 500  # of the tiny world's test split
STEPS = (0, 30, 100, 300, 1000, 3000)  # after which `direction` measures the student


@torch.no_grad()
def router_choices(folder: Path) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return p (PICTURES, 1 + n, E) of each layer, and the object's tokens (PICTURES, 1 + n)."""
    student, _ = load_student(folder)
    if not mole_layers(student):
        raise InputError(f"{folder}: its student has no experts; name another run")
    student(WorldImages("test", PICTURES).images)
    geometry = scene_geometry(sample_scenes("test", PICTURES))
    # by the patches' centres; 0.8 of the radius: within it a shape is mostly filled
    on_object = torch.hypot(*cells(student, geometry)) < 0.8 * geometry["radius"][:, None]
    return router_probs(student), torch.nn.functional.pad(on_object, (1, 0))  # [CLS] is not


def percentages(p: torch.Tensor, kinds: dict[str, torch.Tensor]) -> str:
    """Return which % of each kind of tokens, a mask (PICTURES, 1 + n), went to each expert."""
    columns = []
    for kind, mask in kinds.items():
        counts = torch.bincount(p.argmax(dim=-1)[mask], minlength=p.shape[-1])
        columns.append(f"{kind} " + " / ".join(f"{100 * x:4.1f}" for x in counts / counts.sum()))
    return "   ".join(columns)


def router(folder: Path) -> None:
    """Print the experts of [CLS], the object and the background."""
    probs, on_object = router_choices(folder)
    cls = torch.zeros_like(on_object)
    cls[:, 0] = True
    kinds = {"all": torch.ones_like(cls), "[CLS]": cls, "object": on_object,
             "elsewhere": ~on_object & ~cls}
    print(f"{PICTURES} test pictures; % of the tokens that went to expert 1 / 2 / 3")
    for layer, p in enumerate(probs, start=1):
        print(f"layer {layer}  {percentages(p, kinds)}   mean largest p {p.amax(-1).mean():.2f}")


def fish(folder: Path) -> None:
    """Print the experts of the patches that each shape covers."""
    probs, on_object = router_choices(folder)
    shapes = sample_scenes("test", PICTURES)[:, list(ATTRIBUTES).index("shape")]
    kinds = {name: on_object & (shapes == k)[:, None] for k, name in enumerate(ATTRIBUTES["shape"])}
    print(f"{PICTURES} test pictures; % of the patches on the object that went to expert 1 / 2 / 3")
    for layer, p in enumerate(probs, start=1):
        print(f"layer {layer}  {percentages(p, kinds)}")


def uniform(folder: Path) -> None:
    """Print L_kd of the first held-out picture with each form of W^tok."""
    trained = load_whole_run(folder)
    held_out = load_eval_set(trained.c)
    if held_out is None or len(trained.model.adapters) == 0:
        raise InputError(f"{folder}: has no held-out picture, or no teachers; name a run of --tiny")
    records, get_image = held_out
    name = records[0]["image"]
    images = get_image(name)[None].to(trained.c.device)
    outputs = trained.teachers(images, [name])
    student, targets, w_tea = trained.model.match_tokens(trained.model.vlm.student(images), outputs)
    for form in ("paper", "released", "uniform"):
        w_tok = token_weights(outputs["clip"].cls_scores, form)
        L_kd, per_teacher = kd_loss(student, targets, w_tok, w_tea)
        losses = ", ".join(f"{teacher} {loss:.4f}" for teacher, loss in per_teacher.items())
        print(f"{form:9} L_kd {L_kd:.4f}   ({losses})")
    print("1/n alone: half of the uniform one")


def bound(_: Path) -> None:
    """Print the worst case of the second softmax, all attention on one token."""
    for n in (36, 196, 576):
        scores = torch.zeros(1, 1, 1 + n)
        scores[0, 0, 1] = 1e4
        w = token_weights(scores, "released")[0]
        entropy = torch.special.entr(w).sum() / math.log(n)
        print(f"n {n}: n x largest {n * w.max():.4f}, formula {n * math.e / (n - 1 + math.e):.4f}, "
              f"entropy / log n {entropy:.5f}; the paper's form: n x largest "
              f"{n * token_weights(scores, 'paper').max():.0f}")


def one_token(_: Path) -> None:
    """Print L_kd with all attention on one token, if the student has that one alone right."""
    n, d = 36, 96
    scores = torch.zeros(1, 1, 1 + n)
    scores[0, 0, 1] = 1e4
    w_tok = token_weights(scores, "paper")
    V_t = torch.ones(1, n, d)
    V_t[0, 0] = 0.0
    L_kd, _ = kd_loss({"clip": torch.zeros(1, n, d)}, {"clip": V_t}, w_tok, torch.ones(1, 1))
    alone = (w_tok[0] * (V_t[0] ** 2).mean(dim=-1)).sum()
    print(f"with 1/n: L_kd {L_kd:.4f} = (n - 1)/n; W^tok alone: {alone:.4f}. The one token has "
          f"{1 + 1 / n:.4f} of a total of 2, all others together {(n - 1) / n:.4f}")


def dinov2(_: Path) -> None:
    """Print tokens, width and adapter of the teacher that README adds; loads nothing."""
    with torch.device("meta"):
        teacher = VisionEncoder("vit_large_patch14_dinov2.lvd142m img_size=518")
        student = Student(FULL.clip)
        n, d, n_i, d_i = student.num_tokens, student.dim, teacher.num_tokens, teacher.dim
        adapter = EncoderAdapter(n_i, d_i, n, d, FULL.adapter_form)
    count = sum(p.numel() for p in adapter.parameters())
    print(f"{n_i} tokens x {d_i}; its adapter to {n} x {d}: {count:,} parameters, "
          f"{d_i} * {d} + {d} + {n_i} * {n} + {n} = {d_i * d + d + n_i * n + n:,}")


def direction(_: Path | None = None) -> None:
    """Print `teacher_signal` in both directions of the adapter, as a table in Markdown."""
    print(f"| adapter, CLIP's weight: R^2 after steps | {' | '.join(map(str, STEPS))} | "
          f"largest part of the variance |\n{'|---' * (2 + len(STEPS))}|")
    for share in (0.8, 0.1):
        for name, to_student in (("teacher -> student", True), ("student -> teacher", False)):
            found = teacher_signal(to_student, share).values()
            values = [f"{r2:.2f}" for r2, _ in found] + [f"{max(part for _, part in found):.1%}"]
            print(f"| {name}, {share} | {' | '.join(values)} |")


def teacher_signal(to_student: bool, share: float = 0.8) -> dict[int, tuple[float, float]]:
    """Return R^2 of the teacher's own signal in the student, and the signal's part of its variance.

    CLIP sees a signal x in 512 images, the teacher x and y. The student is one free vector per
    image; it starts as CLIP's and follows L_kd, as does the adapter, one Linear (docs/results.md).
    {steps done: (R^2, part)} for STEPS; share is CLIP's weight:

        teacher -> student   share |s - clip|^2 + (1 - share) |A(t) - s|^2        the paper's
        student -> teacher   share |s - clip|^2 + (1 - share) |A(s) - t|^2        AM-RADIO's
    """
    torch.manual_seed(0)
    x, y = torch.randn(512, 4), torch.randn(512, 4)
    clip = x @ torch.randn(4, 8)                                                        # (512, 8)
    y = y - y.mean(dim=0)                                                               # (512, 4)
    y = y - linear(x - x.mean(dim=0), y)    # less what x predicts by chance            # (512, 4)
    teacher = torch.cat([x, y], dim=1) @ torch.randn(8, 8)                              # (512, 8)
    teacher = (teacher - teacher.mean(dim=0)) / teacher.std(dim=0)                      # (512, 8)
    s = clip.clone().requires_grad_()                                                   # (512, 8)
    A = torch.nn.Linear(8, 8)
    optimizer = torch.optim.Adam([s, *A.parameters()], lr=1e-2)
    found = {}
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            z = s.detach() - s.detach().mean(dim=0)                                     # (512, 8)
            found[step] = tuple((linear(a, b).square().sum() / b.square().sum()).item()
                                for a, b in ((z, y), (y, z)))       # s -> signal, signal -> s
        error = A(teacher) - s if to_student else A(s) - teacher                        # (512, 8)
        loss = share * (s - clip).square().mean() + (1 - share) * error.square().mean() # ()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def linear(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return what linear regression from a, (512, .), predicts of b, (512, .). Both are centred."""
    return a @ torch.linalg.lstsq(a, b).solution                                        # (512, .)


EXERCISES = {"router": router, "uniform": uniform, "bound": bound, "direction": direction,
             "dinov2": dinov2, "fish": fish, "one-token": one_token}


def main(argv: list[str] | None = None) -> None:
    """Print the numbers of one exercise."""
    parser = Parser(__doc__)
    parser.add_argument("exercise", choices=EXERCISES)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/tiny"),
                        help="a run of the tiny world (default runs/tiny)")
    args = parser.parse_args(argv)
    EXERCISES[args.exercise](args.run)


if __name__ == "__main__":
    run(main)
