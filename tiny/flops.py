"""torch's FLOP counter, taught the fused attentions that it counts as 0, or cannot count.

The CPU's is 0 to it, and before torch 2.14 it fails where keys have fewer heads than queries.
"""

import torch
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)

FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def _as_many_heads(shape, q) -> tuple:
    """The shape of keys or values, (B, heads, T, width), with the heads of the queries."""
    return shape[0], q[1], *shape[2:]


def _forward(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q, _as_many_heads(k, q), _as_many_heads(v, q))


def _backward(grad, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, _as_many_heads(k, q), _as_many_heads(v, q))


def flop_counter() -> FlopCounterMode:
    """A context that counts the FLOPs of what runs inside it: `counter.get_total_flops()`."""
    aten = torch.ops.aten
    mapping = {}
    for name in FUSED:
        mapping[getattr(aten, f"_scaled_dot_product_{name}")] = _forward
        mapping[getattr(aten, f"_scaled_dot_product_{name}_backward")] = _backward
    mapping[aten._scaled_dot_product_attention_math_for_mps] = _forward  # Apple's, without backward
    return FlopCounterMode(display=False, custom_mapping=mapping)
