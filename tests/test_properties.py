"""Properties of mole.py and kd_loss.py that hold for any shape and any finite values."""

import pytest
import torch
from torch import nn

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from kd_loss import kd_loss, teacher_weights
from mole import MoLE, balance_loss, expert_fractions, router_probs
from tests.common import MOLE

settings.register_profile("house", max_examples=30, deadline=None)
settings.load_profile("house")

SIZES = st.integers(1, 3)
SCALES = st.sampled_from([0.0, 1e-3, 1.0, 1e4])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2 ** 16)


@given(B=SIZES, side=SIZES, d=st.integers(1, 9), E=SIZES, r=SIZES, scale=SCALES, dtype=DTYPES,
       seed=SEEDS)
def test_mole_is_finite_for_any_shape(B, side, d, E, r, scale, dtype, seed):
    """One token or many, one expert or many: finite output and gradient, shares that sum to 1."""
    torch.manual_seed(seed)
    layer = MoLE(nn.Linear(d, d), d, **{**MOLE, "num_experts": E, "rank": r}).to(dtype)
    nn.init.normal_(layer.lora.up.weight)
    x = (scale * torch.randn(B, 1 + side ** 2, d)).to(dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype and out.shape == x.shape
    (p,) = router_probs(layer)
    loss = out.float().square().mean() + balance_loss([p], "per_layer")
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert expert_fractions(p).sum().item() == pytest.approx(1, abs=1e-6)
    assert 1 - 1e-3 <= balance_loss([p], "per_layer").item() * E <= E * E + 1e-3


@given(B=SIZES, n=st.sampled_from([1, 4]), d=st.integers(1, 9), m=st.integers(1, 4), scale=SCALES,
       dtype=DTYPES, seed=SEEDS, collapse=st.booleans(),
       form=st.sampled_from(["paper", "released", "uniform"]))
def test_the_order_of_teachers_changes_nothing(B, n, d, m, scale, dtype, seed, collapse, form):
    """Teacher weights sum to 1, L_kd is finite, and the teachers but CLIP may come in any order."""
    torch.manual_seed(seed)
    names = ["clip", *(f"teacher{i}" for i in range(1, m))]
    teachers = {name: (scale * torch.randn(B, n, d)).to(dtype) for name in names}
    cls, V_s = (scale * torch.randn(B, d)).to(dtype), (scale * torch.randn(B, n, d)).to(dtype)
    w_tok = torch.full((B, n), 1 / n)
    losses = []
    for order in (names, ["clip", *names[:0:-1]]):
        some = {name: teachers[name] for name in order}
        w_tea = teacher_weights(cls, some, 0.4, form, detach=True, collapse=collapse)
        torch.testing.assert_close(w_tea.sum(1), torch.ones(B), atol=1e-4, rtol=1e-4)
        loss, _ = kd_loss(dict.fromkeys(some, V_s), some, w_tok, w_tea)
        assert loss.isfinite() and loss >= 0
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-3)
