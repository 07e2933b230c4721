"""The distilled encoder alone: needs torch and timm (and torchvision, which timm brings).

    from student import load_student, read_photo        # this file, beside student.pt and .json
    student = load_student("FOLDER")
    V_s = student(read_photo("photo.png", **student.config["photo"]))       # (1, n, d)
"""

import json
from pathlib import Path

import timm
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as TF


class LoRAs(nn.Module):
    """The LoRAs of all experts as one; `gate` (..., E) is alpha/r for the chosen one, else 0."""

    def __init__(self, d_in, d_out, experts, rank, bias):
        super().__init__()
        self.down = nn.Linear(d_in, experts * rank, bias=bias)
        self.up = nn.Linear(experts * rank, d_out, bias=False)
        self.up_bias = nn.Parameter(torch.zeros(experts, d_out)) if bias else None

    def forward(self, x, gate):
        low = self.down(x).unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]
        out = self.up(low.flatten(-2))
        return out if self.up_bias is None else out + gate @ self.up_bias


class MoLE(nn.Module):
    """The block's FFN with one expert a token: beside it ("ffn"), or in both its Linears."""

    def __init__(self, ffn, d, form, experts, rank, alpha):
        super().__init__()
        self.ffn, self.form, self.scale = ffn, form, alpha / rank
        self.router = nn.Linear(d, experts)
        if form == "ffn":
            self.lora = LoRAs(d, d, experts, rank, False)
        else:
            self.lora_fc1 = LoRAs(d, ffn.fc1.out_features, experts, rank, True)
            self.lora_fc2 = LoRAs(ffn.fc1.out_features, d, experts, rank, True)

    def forward(self, x):
        p = self.router(x)
        gate = nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(x.dtype) * self.scale
        if self.form == "ffn":
            return self.ffn(x) + self.lora(x, gate)
        x = self.ffn.act(self.ffn.fc1(x) + self.lora_fc1(x, gate))
        return self.ffn.fc2(x) + self.lora_fc2(x, gate)


class Student(nn.Module):
    """uint8 (B, 3, R, R) -> V^s (B, n, d), hidden layer -2 without [CLS]"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = timm.create_model(config["timm"], num_classes=0, **config["arguments"])
        self.net.blocks = self.net.blocks[:-1]
        self.net.norm = nn.Identity()
        for block in self.net.blocks if config["mole"] else ():
            block.mlp = MoLE(block.mlp, self.net.embed_dim, **config["mole"])

    def forward(self, images):
        size, how = self.config["size"], TF.InterpolationMode(self.config["interpolation"])
        x = TF.to_dtype(TF.resize(images, size, how, antialias=True), torch.float32, scale=True)
        x = TF.normalize(x, self.config["mean"], self.config["std"])
        return self.net.forward_features(x)[:, 1:]


def load_student(folder):
    student = Student(json.loads((Path(folder) / "student.json").read_text(encoding="utf-8")))
    student.load_state_dict(torch.load(Path(folder) / "student.pt", weights_only=True))
    return student.eval()


def read_photo(path, pixels, bicubic):
    """An image file, padded to a square with CLIP's mean colour: uint8 (1, 3, pixels, pixels)"""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side, (width, height) = max(picture.size), picture.size
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    if bicubic:
        square = square.resize((pixels, pixels), Image.Resampling.BICUBIC)
    return TF.resize(TF.pil_to_tensor(square), [pixels, pixels], antialias=True)[None]
