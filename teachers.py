"""The frozen teachers behind one signature, and the encoder adapters that bring their tokens to the student.

    uint8 images (B, 3, R, R)  ->  TeacherOutput(tokens (B, n_i, d_i), cls, cls_scores)        every teacher; the last two only CLIP
    adapter(tokens)            ->  V^t_i (B, n, d)                                             every teacher but CLIP

The student is CLIP with experts added (model.py), so the class it shares with the CLIP teacher lives here.

Letters: B images, R pixels of the loader's square image, n_i, d_i tokens and width of teacher i, n, d those of the student,
D width of CLIP, h its heads.
"""

import ast
import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from data import InputError, ask_hub, read_json, write_json

AdapterForm = Literal["token_mixing", "per_token", "released"]
AdapterDirection = Literal["teacher_to_student", "student_to_teacher"]     # the paper's, AM-RADIO's


class TeacherOutput(NamedTuple):
    tokens: torch.Tensor             # (B, n_i, d_i)
    cls: torch.Tensor | None         # (B, D), CLIP only: V^cls, the [CLS] token of the layer that gives the tokens
    cls_scores: torch.Tensor | None  # (B, h, 1 + n), CLIP only: its scaled attention scores before the softmax, [CLS] key first


def parse_spec(spec: str) -> tuple[str, int, dict]:
    """"NAME img_size=48 depth=4 ..." -> timm name, input resolution in px, further arguments of timm.create_model."""
    name, *pairs = spec.split()
    options = {key: ast.literal_eval(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    return name, options.pop("img_size"), options


HUB = "hub"  # in place of a file: the weights that timm's hub has under the name


def is_real(spec: str) -> bool:
    """Whether a spec asks for pretrained weights: its timm name has a tag, after the dot, that says of which training."""
    return "." in parse_spec(spec)[0]


def find_weights(spec: str, folder: str) -> Path | str:
    """Where the pretrained weights of a real spec are: in a file of `folder` named like the timm model, else on the hub."""
    name, *_ = parse_spec(spec)
    files = [Path(folder) / (name + ending) for ending in (".safetensors", ".pth", ".pt", ".bin")] if folder else []
    return next((file for file in files if file.exists()), HUB)


def load_encoder(net: nn.Module, file: Path) -> None:
    """Fill a timm model from a file, in timm's layout or in one that timm converts (OpenAI's, open_clip's, ...); tables of positions and the patch
    embedding are resized to the model. Strict: timm itself only warns when a file fits nowhere. Raises InputError."""
    try:
        state = timm.models.load_state_dict(str(file))
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", lambda state, net: state)
        state = convert(state, net)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError, pickle.UnpicklingError) as e:
        raise InputError(f"{file}: not readable as weights of {type(net).__name__} ({type(e).__name__})") from None
    heads = net.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    state = {k: v for k, v in state.items() if not k.startswith(tuple(h + "." for h in heads)) or k in net.state_dict()}
    try:
        net.load_state_dict(state)
    except RuntimeError as e:
        raise InputError(f"{file}: does not fit {net.pretrained_cfg.get('architecture')}: {str(e).splitlines()[1].strip()[:200]}") from None


class VisionEncoder(nn.Module):
    """A timm encoder that takes the loader's uint8 image and makes its own view of it: its resolution, mean and std.

    One image, many views, in a batch on the device; and one geometry, so that token (i, j) of two encoders looks at one place.
    weights: a file, HUB, or None for random ones.
    """

    def __init__(self, spec: str, weights: Path | str | None = None, **head):
        super().__init__()
        self.spec = spec
        name, self.image_size, options = parse_spec(spec)
        if not name.startswith("convnext"):  # convolutions take any size and have no such argument
            options["img_size"] = self.image_size
        if weights == HUB:
            ask_hub()
        try:
            self.net = timm.create_model(name, pretrained=weights == HUB, **{"num_classes": 0, **options, **head})
        except (OSError, RuntimeError, ValueError) as e:
            if weights != HUB:
                raise
            cfg = timm.get_pretrained_cfg(name)
            raise InputError(f"{name}: the hub gives no weights ({type(e).__name__}); save model.safetensors of https://huggingface.co/"
                             f"{cfg.hf_hub_id or 'timm'} as {name}.safetensors in a folder and name it with --weights") from None
        data = resolve_model_data_config(self.net)
        self.interpolation = TF.InterpolationMode(data["interpolation"])
        self.mean, self.std = data["mean"], data["std"]
        if weights not in (None, HUB):
            load_encoder(self.net, weights)

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
        x = TF.normalize(TF.to_dtype(x, torch.float32, scale=True), self.mean, self.std)      # (B, 3, s, s)
        return x.to(next(self.net.parameters()).dtype)                                  # (B, 3, s, s)

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

    def __init__(self, spec: str, weights: Path | str | None = None):
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
    return (q.float() @ k.float().transpose(-2, -1))[:, :, 0] * attention.scale         # (B, h, 1 + n)


class Teachers(nn.Module):
    """All teachers. The one place that decides: frozen, always in eval mode, no gradient."""

    def __init__(self, encoders: dict[str, VisionEncoder]):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()
        self.cache: dict[str, TeacherCache] = {}

    def train(self, mode: bool = True) -> "Teachers":
        return self  # stays in eval mode whatever the caller trains

    @torch.no_grad()
    def forward(self, images: torch.Tensor, names: list[str] | None = None) -> dict[str, TeacherOutput]:
        """`names` of the images are needed only with a cache, which is then read in place of running the encoders."""
        if self.cache:
            return {name: cache.read(names, images.device) for name, cache in self.cache.items()}
        return {name: encoder(images) for name, encoder in self.encoders.items()}


class TeacherCache:
    """One teacher's outputs for a fixed set of images, `where` they are from, computed once and kept on disk: memory-mapped fp16, so that several epochs,
    arms or seeds share them and a batch reads only its own rows. The numbers are the uncached ones rounded to fp16.

    The file name is made of what was asked for (teacher, its spec with the resolution, the images' place, names and size); weights or images that
    have changed under the same names make it stale, which is an InputError. The .json is written last: with it the cache is whole.
    """

    def __init__(self, folder: Path, name: str, encoder: VisionEncoder, images: list[str], get_image, where: str, stamp: str, batch: int = 64):
        self.rows = {image: i for i, image in enumerate(images)}
        R = get_image(images[0]).shape[-1]
        key = digest(encoder.spec, str(R), where, *images)[:12]
        made_of = {"teacher": encoder.spec, "pixels": R, "images": stamp, "weights": weights_digest(encoder)}
        meta = folder / f"{name}-{encoder.image_size}px-{key}.json"
        paths = {field: meta.with_suffix(f".{field}.npy") for field in TeacherOutput._fields}
        if meta.exists():
            found = read_json(meta)
            if changed := [k for k in made_of if found["made_of"][k] != made_of[k]]:
                raise InputError(f"{meta}: stale, its {changed[0]} have changed since it was made; delete {meta.with_suffix('')}.* "
                                 "or give --cache-teachers another folder")
            fields = found["fields"]
        else:
            fields = self.write(paths, encoder, images, get_image, batch)
            write_json(meta, {"made_of": made_of, "fields": fields})
        self.arrays = {field: np.load(paths[field], mmap_mode="r") for field in fields}

    @staticmethod
    @torch.no_grad()
    def write(paths: dict[str, Path], encoder: VisionEncoder, images: list[str], get_image, batch: int) -> list[str]:
        """Run the encoder over all images; returns the fields it gives. Files appear under their names only when whole."""
        arrays, device = {}, next(encoder.parameters()).device
        temporary = {field: path.with_name(f"{path.name}.{os.getpid()}.tmp") for field, path in paths.items()}
        for i in tqdm(range(0, len(images), batch), desc=f"cache {paths['tokens'].name.split('.')[0]}", leave=False):
            out = encoder(torch.stack([get_image(name) for name in images[i:i + batch]]).to(device))
            for field, value in out._asdict().items():
                if value is not None:
                    if i == 0:
                        paths[field].parent.mkdir(parents=True, exist_ok=True)
                        arrays[field] = np.lib.format.open_memmap(temporary[field], "w+", np.float16, (len(images), *value.shape[1:]))
                    arrays[field][i:i + batch] = value.half().cpu().numpy()
        for field, array in arrays.items():
            array.flush()
            temporary[field].rename(paths[field])
        return list(arrays)

    def read(self, images: list[str], device: torch.device) -> TeacherOutput:
        rows = [self.rows[image] if image else 0 for image in images]  # in place of no image any will do: it counts for nothing
        fields = {field: torch.from_numpy(array[rows]).to(device).float() for field, array in self.arrays.items()}
        return TeacherOutput(**{field: fields.get(field) for field in TeacherOutput._fields})


def digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Of every tensor's name and bytes."""
    h = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        h.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


class EncoderAdapter(nn.Module):
    """A two-layer MLP from a teacher's space to the student's: (B, n_i, d_i) -> (B, n, d).    paper, encoder adapter

        V^t_i = W_2 GELU(W_1 V_i)      W_1 mixes channels d_i -> d, W_2 mixes tokens n_i -> n

    Trained by L_kd only, thrown away after training. `form`:
    "token_mixing" (default) is the released code's, so that unequal widths and token counts are both met, behind a parameter-free norm
    of ours, for teachers' raw features differ in scale. Every output token sees all teacher tokens, and the adapter is tied to one
    resolution; W_2 is 69 % of the parameters for EVA-02-L's 4,096 tokens (`python -m tools.bench --differences`).
    "released" is the same without the norm.
    "per_token" resizes the teacher's map to the student's grid, then an MLP (W_1, GELU, W_2 of channels) on each token: place stays place.

    The other direction, AM-RADIO's, is the same module with the two spaces exchanged: H_i(V^s) (B, n, d) -> (B, n_i, d_i).
    """

    def __init__(self, tokens_in: int, dim_in: int, tokens_out: int, dim_out: int, form: AdapterForm = "token_mixing"):
        super().__init__()
        self.form, self.sides = form, (round(tokens_in ** 0.5), round(tokens_out ** 0.5))
        self.norm = nn.Identity() if form == "released" else nn.LayerNorm(dim_in, elementwise_affine=False)
        self.channels = nn.Linear(dim_in, dim_out)
        self.out = nn.Linear(dim_out, dim_out) if form == "per_token" else nn.Linear(tokens_in, tokens_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.to(self.channels.weight.dtype))                                 # (B, n_i, d_i)
        if self.form == "per_token":
            old, new = self.sides
            x = F.interpolate(x.transpose(1, 2).unflatten(2, (old, old)), (new, new), mode="bilinear", antialias=True)  # (B, d_i, ., .)
            return self.out(F.gelu(self.channels(x.flatten(2).transpose(1, 2))))        # (B, n, d)
        x = F.gelu(self.channels(x))                                                    # (B, n_i, d)
        return self.out(x.transpose(1, 2)).transpose(1, 2)                              # (B, n, d)


def build_adapters(teachers: Teachers, tokens: int, dim: int, form: AdapterForm = "token_mixing",
                   direction: AdapterDirection = "teacher_to_student") -> nn.ModuleDict:
    """One adapter for each teacher but CLIP, whose tokens are in the student's space already. tokens, dim: the student's."""
    return nn.ModuleDict({name: EncoderAdapter(t.num_tokens, t.dim, tokens, dim, form) if direction == "teacher_to_student" else
                          EncoderAdapter(tokens, dim, t.num_tokens, t.dim, form)
                          for name, t in teachers.encoders.items() if name != "clip"})


def adapt(outputs: dict[str, TeacherOutput], adapters: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """V^t_i of every teacher, CLIP's own tokens first: m x (B, n, d)."""
    return {name: adapters[name](out.tokens) if name in adapters else out.tokens for name, out in outputs.items()}


def adapt_student(visual: torch.Tensor, outputs: dict[str, TeacherOutput],
                  heads: nn.ModuleDict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The other direction: H_i(V^s) and the teacher's own normalised tokens V_i, each m x (B, n_i, d_i); CLIP's in the student's space."""
    student = {name: heads[name](visual) if name in heads else visual for name in outputs}
    target = {name: F.layer_norm(out.tokens, out.tokens.shape[-1:]) if name in heads else out.tokens for name, out in outputs.items()}
    return student, target
