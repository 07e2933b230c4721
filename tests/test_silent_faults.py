"""Warnings of what goes wrong in silence: each once, with its number, and none of a sound run."""

import torch

from plumbing.run_log import SilentFaults


def watched(experts: list[list[float]], kd_eva, steps: int = 300) -> list[str]:
    """The warnings of a stage in which each step has these shares, and kd_eva(step)."""
    said = []
    faults = SilentFaults(said.append)
    for step in range(steps):
        values = {"experts": torch.tensor(experts), "kd_clip": torch.tensor(0.0),
                  "kd_eva": torch.tensor(float(kd_eva(step)))}
        faults.look(2, step, values, last=step == steps - 1)
    return said


def falling(step: int) -> float:
    return 2.0 - step / 300


def test_a_collapsed_router_is_said_once():
    """Layer 1's second expert has all tokens for 100 steps: one line, with layer and share."""
    said = watched([[0.5, 0.5], [0.002, 0.998]], falling)
    assert len(said) == 1
    assert "layer 1: expert 1 has 99.8 % of the tokens, for 100 steps" in said[0]
    assert not watched([[0.5, 0.5], [0.1, 0.9]], falling)
    assert not watched([[1.0]], falling), "one expert has all tokens by design"


def test_a_teacher_that_teaches_nothing_is_said_once():
    """Its loss is 2 at the start and 2 after 300 steps, or at the end of a shorter stage."""
    for steps in (100, 300, 900):
        said = watched([[0.5, 0.5]], lambda step: 2 + 0.1 * (-1) ** step, steps)
        assert len(said) == 1 and "teacher eva" in said[0] and f"{min(steps, 300)} steps" in said[0]
    assert not watched([[0.5, 0.5]], falling)
    assert not watched([[0.5, 0.5]], lambda step: 2, 99), "too short to tell"
