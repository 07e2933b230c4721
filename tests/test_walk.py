"""tools.walk: the lines are the source's own, and the numbers those that they gave."""

import inspect
import re

import pytest
import torch

from kd_loss import token_errors
from tools import walk


@pytest.fixture(scope="module")
def lesson():
    """What tools.walk prints."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(words)))
        walk.main([])
    return "\n".join(lines)


def test_every_function_of_the_step_is_walked_through(lesson):
    """Each stop has its name, its own lines and what they made."""
    for function, words in walk.STOPS:
        assert f"=== {function.__qualname__} " in lesson
        assert words in lesson
    *_, last = inspect.getsource(token_errors).rstrip().splitlines()
    assert last in lesson
    assert "-> V_s = 2 x 36 x 96" in lesson


def test_the_numbers_are_those_of_the_step(lesson):
    """L_total and its terms = the same step without a tracer; the routers learn nothing yet."""
    model, teachers, batch = walk.tiny_step()
    terms = model(batch, teachers)
    for name in ("L_text", "L_kd", "L_balance"):
        assert f"{name} {terms[name]:.4f}" in lesson
    assert "gradient of L_text + lambda_kd * L_kd in the routers: 0\n" in lesson
    balance = re.search(r"gradient of L_balance in the routers: ([\d.e-]+)", lesson)
    assert float(balance[1]) > 0


def test_describe():
    assert walk.describe(torch.arange(6.0).reshape(2, 3)) == "2 x 3: 0 1 2 ..."
    assert walk.describe(torch.tensor(2.5)) == "a number: 2.5"
    assert walk.describe("words") == ""
