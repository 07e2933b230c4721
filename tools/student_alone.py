"""The distilled encoder alone: needs torch and timm (and torchvision, which timm brings).

    from student import Student                         # this file, beside student.pt and .json
    student = Student("FOLDER").eval()
    V_s = student(student.read_photo("photo.png"))      # (1, n, d)
"""

import json
from pathlib import Path

import timm
import torch
from PIL import Image, ImageOps
from torch.nn import Module, ParameterList, functional as F
from torchvision.transforms.v2 import functional as TF


class MoLE(Module):
    """A block's FFN with one expert a token: beside it (4 tensors), or in both its Linears (8)."""
    def __init__(self, ffn, router, loras):
        super().__init__()
        self.ffn, self.router, self.loras = ffn, ParameterList(router), ParameterList(loras)

    def forward(self, x):
        route = F.one_hot(F.linear(x, *self.router).argmax(-1), len(self.router[1])).to(x.dtype)
        if len(self.loras) == 4:
            return self.ffn(x) + self.expert(x, route, *self.loras)
        x = self.ffn.act(self.ffn.fc1(x) + self.expert(x, route, *self.loras[:4]))
        return self.ffn.fc2(x) + self.expert(x, route, *self.loras[4:])

    def expert(self, x, route, down, a, up, b):
        """All E LoRAs as one of rank E*r (up and b hold alpha/r): route leaves the chosen one's."""
        low = F.linear(x, down, a).unflatten(-1, (route.shape[-1], -1)) * route[..., None]
        return F.linear(low.flatten(-2), up) + route @ b


class Student(Module):
    """uint8 (B, 3, R, R) -> V^s (B, n, d), hidden layer -2 without [CLS]: what the LLM was shown"""
    def __init__(self, folder):
        super().__init__()
        self.config = json.loads(Path(folder, "student.json").read_text(encoding="utf-8"))
        weights = torch.load(Path(folder, "student.pt"), weights_only=True)
        self.net = timm.create_model(**self.config["timm"])
        self.net.load_state_dict(weights["net"])
        for block, experts in zip(self.net.blocks, weights["experts"]):
            block.mlp = MoLE(block.mlp, *experts)

    def forward(self, images):
        x = TF.to_dtype(TF.resize(images, **self.config["view"]), torch.float32, scale=True)
        return self.net.forward_features(TF.normalize(x, **self.config["colours"]))[:, 1:]

    def read_photo(self, path):
        """An image file, padded to a square with CLIP's mean colour: uint8 (1, 3, R, R)"""
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        side, size = max(picture.size), self.config["photo"]["size"]
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        if self.config["photo"]["bicubic"]:  # as LLaVA: the view is made of the original
            square = square.resize(size, Image.Resampling.BICUBIC)
        return TF.resize(TF.pil_to_tensor(square), size)[None]
