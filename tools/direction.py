"""Why the direction of the adapters matters: the smallest case, no network but the adapter."""

import torch
from torch import nn

MARKS = (0, 30, 100, 300, 1000, 3000)  # the steps after which the student is looked at


def direction(teacher_to_student: bool) -> dict[int, float]:
    """How much of the teacher's own signal is linear in the student (R^2), after so many steps.

    512 images have a signal x that CLIP and the teacher see, and a signal y that the teacher alone
    sees. The student is a free vector an image, so nothing limits it; it starts as CLIP's and
    follows L_kd, as does the adapter, one Linear:

        teacher -> student   0.4 |s - clip|^2 + 0.6 |A(t) - s|^2        the paper's
        student -> teacher   0.4 |s - clip|^2 + 0.6 |A(s) - t|^2        AM-RADIO's

    In the first, y in s only costs: A could predict it, but the CLIP term pulls it out, and s
    without y is as easy to predict. It comes in while the adapter is still random and leaves as the
    adapter learns. In the second, the teacher's term cannot fall without it.
    """
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    y = torch.randn(512, 4)
    clip = x @ torch.randn(4, 8)                                                        # (512, 8)
    teacher = torch.cat([x, y], dim=1) @ torch.randn(8, 8)                              # (512, 8)
    teacher = (teacher - teacher.mean(dim=0)) / teacher.std(dim=0)                      # (512, 8)
    s = clip.clone().requires_grad_()                                                   # (512, 8)
    A = nn.Linear(8, 8)
    optimizer = torch.optim.Adam([s, *A.parameters()], lr=1e-2)
    held = {}
    for step in range(max(MARKS) + 1):
        if step in MARKS:
            held[step] = linear_share(s.detach(), y)
        error = A(teacher) - s if teacher_to_student else A(s) - teacher                # (512, 8)
        loss = 0.4 * (s - clip).square().mean() + 0.6 * error.square().mean()           # ()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return held


def linear_share(s: torch.Tensor, y: torch.Tensor) -> float:
    """The share of y's variance that is linear in s (R^2)."""
    z = s - s.mean(dim=0)
    centered = y - y.mean(dim=0)
    left = centered - z @ torch.linalg.lstsq(z, centered).solution
    return 1 - (left.square().sum() / centered.square().sum()).item()


def direction_table() -> str:
    """Both directions, in Markdown."""
    lines = ["| R^2 of the teacher's own signal in the student, after steps | "
             f"{' | '.join(map(str, MARKS))} |",
             "|---" * (1 + len(MARKS)) + "|"]
    for name, teacher_to_student in (("teacher -> student (the paper)", True),
                                     ("student -> teacher (AM-RADIO)", False)):
        held = direction(teacher_to_student)
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in held.values())} |")
    return "\n".join(lines)
