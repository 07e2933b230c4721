"""The frozen teachers behind one signature, and the encoder adapters that bring their tokens to the student.

    uint8 images (B, 3, R, R)  ->  TeacherOutput(tokens (B, n_i, d_i), cls, cls_scores)        every teacher; the last two only CLIP
    adapter(tokens)            ->  V^t_i (B, n, d)                                             every teacher but CLIP

The student is CLIP with experts added (model.py), so the class it shares with the CLIP teacher lives here.

Letters: B images, R pixels of the loader's square image, n_i, d_i tokens and width of teacher i, n, d those of the student,
D width of CLIP, h its heads.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import functional as TF


class TeacherOutput(NamedTuple):
    tokens: torch.Tensor             # (B, n_i, d_i)
    cls: torch.Tensor | None         # (B, D), CLIP only: V^cls, the [CLS] token of the layer that gives the tokens
    cls_scores: torch.Tensor | None  # (B, h, 1 + n), CLIP only: its scaled attention scores before the softmax, [CLS] key first


def parse_spec(spec: str) -> tuple[str, int, dict]:
    """"NAME img_size=48 depth=4 ..." -> timm name, input resolution in px, further arguments of timm.create_model."""
    name, *pairs = spec.split()
    options = {key: ast.literal_eval(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    return name, options.pop("img_size"), options


class VisionEncoder(nn.Module):
    """A timm encoder that takes the loader's uint8 image and makes its own view of it: its resolution, mean and std.

    One image, many views, in a batch on the device; and one geometry, so that token (i, j) of two encoders looks at one place.
    """

    def __init__(self, spec: str, weights: Path | None = None, **head):
        super().__init__()
        name, self.image_size, options = parse_spec(spec)
        if not name.startswith("convnext"):  # convolutions take any size and have no such argument
            options["img_size"] = self.image_size
        self.net = timm.create_model(name, **{"num_classes": 0, **options, **head})
        data = resolve_model_data_config(self.net)
        self.interpolation = TF.InterpolationMode(data["interpolation"])
        self.mean, self.std = data["mean"], data["std"]
        if weights:
            self.net.load_state_dict(load_file(weights))  # strict: a missing or left-over tensor is an error

    @property
    def num_tokens(self) -> int:
        if hasattr(self.net, "patch_embed"):
            return self.net.patch_embed.num_patches
        return (self.image_size // self.net.feature_info[-1]["reduction"]) ** 2

    @property
    def dim(self) -> int:
        return self.net.num_features

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, R, R) -> this encoder's normalised input (B, 3, image_size, image_size)."""
        size = [self.image_size, self.image_size]
        x = TF.resize(images, size, self.interpolation, antialias=True)                 # (B, 3, s, s)
        return TF.normalize(TF.to_dtype(x, torch.float32, scale=True), self.mean, self.std)   # (B, 3, s, s)

    def forward(self, images: torch.Tensor) -> TeacherOutput:
        x = self.net.forward_features(self.view(images))     # (B, prefix + n_i, d_i), or (B, d_i, H, W) from a convolution
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)                 # place by place, row by row    (B, n_i, d_i)
        else:
            x = x[:, self.net.num_prefix_tokens:]                                       # (B, n_i, d_i)
        return TeacherOutput(x, None, None)


class ClipEncoder(VisionEncoder):
    """CLIP up to hidden layer -2 (the output of the last-but-one block, no final norm), as in LLaVA-1.5.

    The last block is taken off once its weights are loaded: it would be 1/24 of the work for a result nobody reads.
    """

    def __init__(self, spec: str, weights: Path | None = None):
        super().__init__(spec, weights)
        self.net.blocks = self.net.blocks[:-1]
        self.net.norm = nn.Identity()

    def forward(self, images: torch.Tensor) -> TeacherOutput:
        net = self.net
        x = net.norm_pre(net._pos_embed(net.patch_embed(self.view(images))))            # (B, 1 + n, D)
        for block in net.blocks[:-1]:
            x = block(x)                                                                # (B, 1 + n, D)
        scores = cls_scores(net.blocks[-1], x)                                          # (B, h, 1 + n)
        x = net.blocks[-1](x)                                                           # (B, 1 + n, D)
        return TeacherOutput(x[:, 1:], x[:, 0], scores)


def cls_scores(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The [CLS] row of one block's attention before the softmax, all that W^tok needs.  (B, 1 + n, D) -> (B, h, 1 + n)

        (V^cls W^Q) (V^res_j W^K)^T / sqrt(d_head)                                                      paper, token weight

    One query, so no (1 + n) x (1 + n) map ever exists, and the block itself keeps its fused attention.
    x is the block's input: `attentions[-2]` of the released code is the attention of the block that produces `hidden_states[-2]`.
    """
    attention, D = block.attn, x.shape[-1]
    x = block.norm1(x)                                                                  # (B, 1 + n, D)
    w_q, w_k, _ = attention.qkv.weight.chunk(3)                                         # (D, D) each
    b_q, b_k, _ = attention.qkv.bias.chunk(3)                                           # (D,) each
    q = F.linear(x[:, :1], w_q, b_q).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)   # (B, h, 1, D/h)
    k = F.linear(x, w_k, b_k).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, h, 1 + n, D/h)
    return (q @ k.transpose(-2, -1))[:, :, 0] * attention.scale                         # (B, h, 1 + n)


class Teachers(nn.Module):
    """All teachers. The one place that decides: frozen, always in eval mode, no gradient."""

    def __init__(self, encoders: dict[str, VisionEncoder]):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teachers":
        return self  # stays in eval mode whatever the caller trains

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, TeacherOutput]:
        return {name: encoder(images) for name, encoder in self.encoders.items()}


class EncoderAdapter(nn.Module):
    """A two-layer MLP from a teacher's space to the student's: (B, n_i, d_i) -> (B, n, d).    paper, encoder adapter

        V^t_i = W_2 GELU(W_1 V_i)      W_1 mixes channels d_i -> d, W_2 mixes tokens n_i -> n (as the released code does)

    so that unequal widths and unequal token counts are both met. Trained by L_kd only, thrown away after training.
    The parameter-free norm in front is ours: teachers' raw features differ in scale.
    """

    def __init__(self, tokens_in: int, dim_in: int, tokens_out: int, dim_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim_in, elementwise_affine=False)
        self.channels = nn.Linear(dim_in, dim_out)
        self.tokens = nn.Linear(tokens_in, tokens_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.channels(self.norm(x)))                                         # (B, n_i, d)
        return self.tokens(x.transpose(1, 2)).transpose(1, 2)                           # (B, n, d)


def build_adapters(teachers: Teachers, tokens_out: int, dim_out: int) -> nn.ModuleDict:
    """One adapter for each teacher but CLIP, whose tokens are in the student's space already."""
    return nn.ModuleDict({name: EncoderAdapter(t.num_tokens, t.dim, tokens_out, dim_out)
                          for name, t in teachers.encoders.items() if name != "clip"})


def adapt(outputs: dict[str, TeacherOutput], adapters: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """V^t_i of every teacher, CLIP's own tokens first: m x (B, n, d)."""
    return {name: adapters[name](out.tokens) if name in adapters else out.tokens for name, out in outputs.items()}
