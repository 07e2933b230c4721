"""torch's FLOP counter, taught the fused attention of the CPU, which it counts as 0."""

import torch
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)


def _forward(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def flop_counter() -> FlopCounterMode:
    """A context that counts the FLOPs of what runs inside it: `counter.get_total_flops()`."""
    aten = torch.ops.aten
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: _forward,
               aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)
