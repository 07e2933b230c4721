"""Activation checkpointing saves the memory that it is there for."""

import torch

from model import Student
from mole import mole_layers
from plumbing.sharding import recompute
from tests.common import MOLE
from tools.plan.memory import PeakMemory


def recomputed_student(blocks: int) -> Student:
    """Return a student of so many blocks, recomputed, whose experts alone are trained."""
    student = Student("vit_base_patch16_clip_quickgelu_224 img_size=48 patch_size=8 embed_dim=64 "
                      f"depth={blocks + 1} num_heads=4")
    student.requires_grad_(False)
    student.add_experts(form="ffn", **MOLE)
    recompute(student.net.blocks)
    return student


def test_a_recomputed_block_leaves_only_its_input():
    """A further block with experts takes its own input and its experts' gradients, nothing else.

    MoLE holds the probabilities of the first run afterwards, not those of a graph that never runs
    backward.
    """
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    peaks = []
    for blocks in (4, 8):
        student = recomputed_student(blocks)
        out = student(images)
        layers = mole_layers(student)
        probs = [layer.probs for layer in layers]
        out.sum().backward()
        assert all(layer.probs is p for layer, p in zip(layers, probs, strict=True))
        student.zero_grad()
        with PeakMemory() as memory:
            student(images).sum().backward()
        peaks.append(memory.peak)
    trained = [p.numel() for p in student.net.blocks[0].mlp.parameters() if p.requires_grad]
    assert (peaks[1] - peaks[0]) / 4 < 1.1 * 4 * (4 * 37 * 64 + sum(trained))
