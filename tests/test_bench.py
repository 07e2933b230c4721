"""tools.bench: it measures what it says, and its baselines compute the same numbers as ours."""

import torch

from kd_loss import kd_loss
from mole import mole_layers
from teachers import ClipEncoder
from tests.common import images
from tools import bench

close = torch.testing.assert_close


def test_baselines_compute_what_ours_do():
    """Each baseline gives our numbers; PIL rounds a view to whole steps of its uint8 image."""
    x = images(2)
    layer = mole_layers(bench.student_with_experts(bench.SHAPES["tiny"], 0.0).cpu())[0]
    torch.nn.init.normal_(layer.lora.up.weight)
    tokens = torch.randn(2, 5, 96)
    close(bench.LoopMoLE(layer)(tokens), layer(tokens))
    clip = ClipEncoder(bench.SHAPES["tiny"].clip)
    output = clip(x)
    all_tokens, maps = bench.all_attention_maps(clip, x)
    close(all_tokens[:, 1:], output.tokens)
    close(maps[-1][:, :, 0], output.cls_scores.softmax(-1))
    V_t = {name: torch.randn(2, 36, 96) for name in ("clip", "eva")}
    weights = torch.rand(2, 36), torch.rand(2, 2)
    ours, _ = kd_loss(dict.fromkeys(V_t, output.tokens), V_t, *weights)
    close(bench.stacked_kd_loss(output.tokens, V_t, *weights), ours)
    close(bench.pil_view(clip, x), clip.view(x), atol=1.5 / 255 / min(clip.std), rtol=0)
