"""tools.walk: the lines are the source's own, and the numbers those that they gave."""

import inspect
import re

import pytest

from kd_loss import token_errors
from tools import walk


@pytest.fixture
def output(capsys):
    walk.main([])
    return capsys.readouterr().out


def test_every_function_of_the_step_is_walked_through(output):
    """Each stop has its name, its own lines and what they made."""
    for function, words in walk.STOPS.items():
        assert f"=== {function.__qualname__} " in output
        assert words in output
    *_, last = inspect.getsource(token_errors).rstrip().splitlines()
    assert last in output
    assert "-> V_s = 2 x 36 x 96" in output


def test_the_numbers_are_those_of_the_step(output):
    """The terms of L_total = the same step's without a tracer; the routers learn nothing yet."""
    model, teachers, batch = walk.tiny_step()
    terms = model(batch, teachers)
    for name in ("L_text", "L_kd", "L_balance"):
        assert f"{name} {terms[name]:.4f}" in output
    assert f"-> L_text = a number: {terms['L_text']:.3g}\n" in output
    assert "gradient of L_text + lambda_kd * L_kd in the routers: 0\n" in output
    balance = re.search(r"gradient of L_balance in the routers: ([\d.e-]+)", output)
    assert float(balance[1]) > 0
