"""The frozen teachers behind one signature, and the encoder adapters between them and the student.

    uint8 images (B, 3, R, R) -> TeacherOutput(tokens (B, n_i, d_i), cls, cls_scores)  every teacher
    adapter(tokens)           -> V^t_i (B, n, d)                           every teacher except CLIP

The student is CLIP with experts (model.py), so the class it shares with the CLIP teacher is here.

Letters: B images, R pixels of the loader's square image, R_i pixels of encoder i's view, n_i tokens
and d_i width of teacher i, n tokens and d width of the student (and of CLIP), h heads of CLIP.
"""

import ast
from typing import Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import functional as TF

AdapterForm = Literal["token_mixing", "per_token", "released", "interpolation"]
AdapterDirection = Literal["teacher_to_student", "student_to_teacher"]   # the paper's, AM-RADIO's
TargetNorm = Literal["layer", "channel"]            # of a teacher's tokens as targets of a head


class TeacherOutput(NamedTuple):
    tokens: torch.Tensor             # (B, n_i, d_i)
    cls: torch.Tensor | None         # (B, d), CLIP only: V^cls, of the layer that gives the tokens
    cls_scores: torch.Tensor | None  # (B, h, 1 + n), CLIP only: its scores before the softmax


# ------------------------------------------------------------------------------------------------
# Encoders


def parse_spec(spec: str) -> tuple[str, int, dict]:
    """Read "NAME img_size=48 depth=4 ...": timm's name, the input in px, timm's other arguments.

    Raises ValueError, KeyError or SyntaxError for a spec of another form.
    """
    name, *arguments = spec.split()
    options = {}
    for argument in arguments:
        key, value = argument.split("=", 1)
        options[key] = ast.literal_eval(value)
    return name, options.pop("img_size"), options


def create_net(spec: str, **more) -> nn.Module:
    """Create the timm model of a spec, without a classifier unless `more` asks for one."""
    name, image_size, options = parse_spec(spec)
    # Convolutions take images of any size, so timm's ConvNeXt has no such argument.
    if not name.startswith("convnext"):
        options["img_size"] = image_size
    options = {"num_classes": 0, **options, **more}
    return timm.create_model(name, **options)


class VisionEncoder(nn.Module):
    """A timm encoder that makes its own view of the loader's image: its resolution, mean and std.

    The views are made in a batch on the device, or by the loader from the original. All have one
    geometry, so that token (i, j) of two encoders is about the same place of the picture.
    `net` is the spec's timm model with its weights; None: random ones.
    """

    def __init__(self, spec: str, net: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        _, self.image_size, _ = parse_spec(spec)
        self.net = create_net(spec) if net is None else net
        # timm records each model's preprocessing: CLIP's mean and std, or ImageNet's, ...
        preprocessing = resolve_model_data_config(self.net)
        self.interpolation = TF.InterpolationMode(preprocessing["interpolation"])
        self.mean = preprocessing["mean"]
        self.std = preprocessing["std"]

    @property
    def num_tokens(self) -> int:
        """n_i"""
        if hasattr(self.net, "patch_embed"):
            return self.net.patch_embed.num_patches
        stride = self.net.feature_info[-1]["reduction"]
        return (self.image_size // stride) ** 2

    @property
    def dim(self) -> int:
        """d_i"""
        return self.net.num_features

    def view(self, images: torch.Tensor | dict[int, torch.Tensor]) -> torch.Tensor:
        """Resize and normalise: uint8 (B, 3, R, R), or {R_i: ...} -> (B, 3, R_i, R_i)"""
        if isinstance(images, dict):
            # The loader has resized the original picture to this encoder's size.
            x = images[self.image_size]                                           # (B, 3, R_i, R_i)
        else:
            size = [self.image_size, self.image_size]
            x = TF.resize(images, size, self.interpolation, antialias=True)       # (B, 3, R_i, R_i)
        x = TF.to_dtype(x, torch.float32, scale=True)                             # (B, 3, R_i, R_i)
        x = TF.normalize(x, self.mean, self.std)                                  # (B, 3, R_i, R_i)
        return x.to(next(self.net.parameters()).dtype)                            # (B, 3, R_i, R_i)

    def forward(self, images: torch.Tensor) -> TeacherOutput:
        x = self.net.forward_features(self.view(images))    # (B, prefix + n_i, d_i) or a map
        if x.ndim == 4:
            # A convolution gives a map (B, d_i, rows, columns); its cells are tokens, row by row.
            x = x.flatten(2).transpose(1, 2)                                         # (B, n_i, d_i)
        else:
            # A transformer gives tokens already, behind [CLS] or registers.
            x = x[:, self.net.num_prefix_tokens:]                                    # (B, n_i, d_i)
        return TeacherOutput(x, None, None)


class ClipEncoder(VisionEncoder):
    """CLIP up to hidden layer -2 (the last-but-one block, no final norm), as in LLaVA-1.5.

    The last block is removed: 1/24 of the work, and nothing reads its result.
    """

    def __init__(self, spec: str, net: nn.Module | None = None):
        super().__init__(spec, net)
        self.net.blocks = self.net.blocks[:-1]
        self.net.norm = nn.Identity()

    def forward(self, images: torch.Tensor) -> TeacherOutput:
        net = self.net
        x = net.patch_embed(self.view(images))                                         # (B, n, d)
        x = net.norm_pre(net._pos_embed(x))                                        # (B, 1 + n, d)
        # The last block that is left gives the tokens, and its [CLS] row the token weights.
        for block in net.blocks[:-1]:
            x = block(x)                                                           # (B, 1 + n, d)
        scores = cls_scores(net.blocks[-1], x)                                     # (B, h, 1 + n)
        x = net.blocks[-1](x)                                                      # (B, 1 + n, d)
        return TeacherOutput(x[:, 1:], x[:, 0], scores)


def cls_scores(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the [CLS] row of a block's attention scores: (B, 1 + n, d) -> (B, h, 1 + n)

        (V^cls W^Q) (V^res_j W^K)^T / sqrt(d/h)                                  paper, token weight

    Before the softmax. One query, so no (1 + n) x (1 + n) map ever exists, and the block keeps its
    fused attention. x is the block's input: `attentions[-2]` of the released code is the attention
    of the block that produces `hidden_states[-2]`.
    """
    attention = block.attn
    heads = attention.num_heads
    # timm keeps the three projections in one matrix, and normalises before them.
    x = block.norm1(x)                                                             # (B, 1 + n, d)
    w_q, w_k, _ = attention.qkv.weight.chunk(3)                                    # (d, d) each
    b_q, b_k, _ = attention.qkv.bias.chunk(3)                                      # (d,) each
    q = F.linear(x[:, :1], w_q, b_q)                                               # (B, 1, d)
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2).float()                       # (B, h, 1, d/h)
    k = F.linear(x, w_k, b_k)                                                      # (B, 1 + n, d)
    k = k.unflatten(-1, (heads, -1)).transpose(1, 2).float()                   # (B, h, 1 + n, d/h)
    return (q @ k.transpose(-2, -1))[:, :, 0] * attention.scale                    # (B, h, 1 + n)


class Teachers(nn.Module):
    """All teachers, CLIP first. They are frozen, always in eval mode, and without gradients."""

    def __init__(self, encoders: dict[str, VisionEncoder]):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teachers":
        """Stay in eval mode, whatever the caller trains."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor, names: list[str]) -> dict[str, TeacherOutput]:
        """Return each teacher's output. Only a cache of outputs needs the images' names."""
        return {name: encoder(images) for name, encoder in self.encoders.items()}


# ------------------------------------------------------------------------------------------------
# Encoder adapters


class EncoderAdapter(nn.Module):
    """A two-layer MLP from one encoder's space to another's: (B, n_in, d_in) -> (B, n_out, d_out)

        V^t_i = W_2 GELU(W_1 V_i)                                             paper, encoder adapter

    Trained by L_kd only. In the paper's direction it maps a teacher's tokens (n_i, d_i) to the
    student's space (n, d); in AM-RADIO's it is a head H_i from the student's to the teacher's.

    form  "token_mixing" is the released code's, behind a parameter-free norm of ours, because
          teachers' raw features differ in scale: W_1 mixes channels, W_2 mixes tokens. It bridges
          unequal widths and token counts; every output token sees all tokens; one resolution only.
          "released" is the same without the norm.
          "per_token" resizes the map to the other grid, then W_1 and W_2 mix the channels of each
          token alone: place stays place.
          "interpolation" has no parameters: the map and the channels are resized (an ablation).
    """

    def __init__(self, n_in: int, d_in: int, n_out: int, d_out: int, form: AdapterForm):
        super().__init__()
        self.form = form
        self.side_in = round(n_in ** 0.5)
        self.side_out = round(n_out ** 0.5)
        self.d_out = d_out
        norm = nn.LayerNorm(d_in, elementwise_affine=False)
        self.norm = nn.Identity() if form == "released" else norm
        if form == "interpolation":
            return
        # W_1 mixes channels in every form; W_2 mixes channels, or tokens.
        self.channels = nn.Linear(d_in, d_out)                                         # W_1
        second = (d_out, d_out) if form == "per_token" else (n_in, n_out)
        self.out = nn.Linear(*second)                                                  # W_2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "interpolation":
            x = self.on_output_grid(self.norm(x.float()))                        # (B, n_out, d_in)
            return F.interpolate(x, self.d_out, mode="linear")                   # (B, n_out, d_out)
        # V^t_i = W_2 GELU(W_1 V_i)
        x = self.norm(x.to(self.channels.weight.dtype))                          # (B, n_in, d_in)
        if self.form == "per_token":
            x = self.on_output_grid(x)                                           # (B, n_out, d_in)
            return self.out(F.gelu(self.channels(x)))                            # (B, n_out, d_out)
        x = F.gelu(self.channels(x))                                             # (B, n_in, d_out)
        return self.out(x.transpose(1, 2)).transpose(1, 2)                       # (B, n_out, d_out)

    def on_output_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Resize the map of tokens to the output's grid: (B, n_in, d_in) -> (B, n_out, d_in)"""
        x = x.transpose(1, 2).unflatten(2, (self.side_in, self.side_in))         # (B, d_in, ., .)
        size = (self.side_out, self.side_out)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)              # (B, d_in, ., .)
        return x.flatten(2).transpose(1, 2)                                      # (B, n_out, d_in)


def build_adapters(teachers: Teachers, n: int, d: int, form: AdapterForm,
                   direction: AdapterDirection) -> nn.ModuleDict:
    """Make one adapter for each teacher except CLIP."""
    adapters = nn.ModuleDict()
    for name, teacher in teachers.encoders.items():
        # CLIP's tokens are in the student's space already: the student started as CLIP.
        if name == "clip":
            continue
        if direction == "teacher_to_student":
            adapters[name] = EncoderAdapter(teacher.num_tokens, teacher.dim, n, d, form)
        else:
            adapters[name] = EncoderAdapter(n, d, teacher.num_tokens, teacher.dim, form)
    return adapters


def adapt(outputs: dict[str, TeacherOutput], adapters: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """Return V^t_i of every teacher, CLIP's own tokens first: m x (B, n, d)  (paper's direction)"""
    V_t = {}
    for name, output in outputs.items():
        V_t[name] = adapters[name](output.tokens) if name in adapters else output.tokens
    return V_t


class ChannelNorm(nn.Module):
    """Standardises a teacher's tokens per channel, with fixed statistics of the training images.

        (x - mean_c) / std_c                              (B, n_i, d_i) -> (B, n_i, d_i)

    Every channel then weighs alike, and the target of one image does not depend on the others.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.mean) / self.std                                    # (B, n_i, d_i)


def build_target_norms(teachers: Teachers, norm: TargetNorm) -> nn.ModuleDict:
    """Make the norm that brings each teacher's targets to one scale, per token or per channel."""
    norms = nn.ModuleDict()
    for name, teacher in teachers.encoders.items():
        if name == "clip":
            continue
        # "layer": each token by itself. "channel": plumbing/teacher_outputs.py fills mean and std.
        if norm == "layer":
            norms[name] = nn.LayerNorm(teacher.dim, elementwise_affine=False)
        else:
            norms[name] = ChannelNorm(teacher.dim)
    return norms


def adapt_student(V_s: torch.Tensor, outputs: dict[str, TeacherOutput], heads: nn.ModuleDict,
                  norms: nn.ModuleDict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return H_i(V^s) and the teachers' normalised tokens: m x (B, n_i, d_i)  (AM-RADIO)"""
    student = {}
    targets = {}
    for name, output in outputs.items():
        if name in heads:
            student[name] = heads[name](V_s)                                         # (B, n_i, d_i)
            targets[name] = norms[name](output.tokens)                               # (B, n_i, d_i)
        else:
            # CLIP's tokens are in the student's space: they are compared with V^s itself.
            student[name] = V_s                                                      # (B, n, d)
            targets[name] = output.tokens                                            # (B, n, d)
    return student, targets
