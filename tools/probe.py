"""What does each encoder of the tiny world know?  A linear probe of its pooled tokens.

    python -m tools.probe                   # the table, % (30 s; 3 min more if stage 0 has to run)

Letters: N pictures, M of them to test on, n_i tokens and d_i width of encoder i.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.build import build_teachers, pretrained_weights
from plumbing.cli import Parser, run
from plumbing.config import TINY
from plumbing.sets import build_tokenizer, load_sets
from tiny.pictures import render
from tiny.scenes import ATTRIBUTES, sample_scenes

PROBE = {"train": 2000, "validation": 500}  # images to fit on, images to test on


@functools.cache
def probe_images(split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n pictures of a split (N, 3, R, R), and their scenes (N, 7)."""
    scenes = sample_scenes(split, n, seed=20)
    return render(scenes, seed=20), scenes


@torch.no_grad()
def pooled(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean and maximum of an encoder's tokens over each image: (N, 3, R, R) -> (N, 2 d_i)"""
    encoder.eval()
    device = next(encoder.parameters()).device
    parts = []
    for part in images.split(250):
        output = encoder(part.to(device))
        # a student gives its tokens alone
        parts.append(output if torch.is_tensor(output) else output.tokens)
    tokens = torch.cat(parts)                                                      # (N, n_i, d_i)
    both = torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1)              # (N, 2 d_i)
    return both.cpu().double()                                                     # (N, 2 d_i)


def ridge(x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor) -> torch.Tensor:
    """Linear prediction of y (N, k) from standardised x (N, f), for x_test (M, f) -> (M, k)"""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    gram = x.T @ x + 10.0 * torch.eye(x.shape[1], dtype=x.dtype)                   # (f, f)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)))                  # (f, k)
    return x_test @ weights + y.mean(dim=0)                                        # (M, k)


def probe(encoder: nn.Module) -> dict[str, float]:
    """Held-out accuracy (%) of a linear classifier per attribute on an encoder's pooled tokens.

    It is what a reader of token contents, without a map of their places, can tell. The scenes are
    those of the validation split.
    """
    images, scenes = probe_images("train", PROBE["train"])
    images_test, scenes_test = probe_images("validation", PROBE["validation"])
    x, x_test = pooled(encoder, images), pooled(encoder, images_test)
    accuracy = {}
    for i, (name, values) in enumerate(ATTRIBUTES.items()):
        target = F.one_hot(scenes[:, i], len(values)).double()                     # (N, k)
        choice = ridge(x, target, x_test).argmax(dim=1)                            # (M,)
        accuracy[name] = 100 * (choice == scenes_test[:, i]).double().mean().item()
    return accuracy


def explained(encoder: nn.Module, teacher: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share (%) of the variance of a teacher's pooled tokens that is linear in the encoder's own.

    `teacher` holds the teacher's pooled tokens of the probe's training and test images. It says
    whether the encoder holds what the teacher sees.
    """
    y, y_test = teacher
    mean, std = y.mean(dim=0), y.std(dim=0) + 1e-6
    y, y_test = (y - mean) / std, (y_test - mean) / std
    x, x_test = (pooled(encoder, probe_images(split, n)[0]) for split, n in PROBE.items())
    error = y_test - ridge(x, y, x_test)
    variance = (y_test - y_test.mean(dim=0)).square().mean()
    return 100 * (1 - error.square().mean() / variance).item()


def main(argv: list[str] | None = None) -> None:
    """Print the table of the teachers."""
    Parser(__doc__).parse_args(argv)
    sets = load_sets(TINY)
    tokenizer = build_tokenizer(TINY, sets)
    weights, _ = pretrained_weights(TINY, sets["train"][0], tokenizer)
    print(f"linear probe, %   {'  '.join(f'{name:>10}' for name in ATTRIBUTES)}")
    for name, encoder in build_teachers(TINY, weights).encoders.items():
        print(f"{name:17} {'  '.join(f'{value:10.0f}' for value in probe(encoder).values())}")


if __name__ == "__main__":
    run(main)
