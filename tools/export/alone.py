"""The distilled encoder alone: needs torch, timm and safetensors, and what these bring.

    from student import Student             # this file, beside student.json and student.safetensors
    student = Student("FOLDER").eval()
    V_s = student(student.read_photo("photo.png"))      # (1, n, d)
"""

import json
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as TF

from data import square_image, square_views
from mole import add_mole
from real.image_files import as_seen


class Student(nn.Module):
    """uint8 (B, 3, R, R) -> V^s (B, n, d), hidden layer -2 without [CLS]: the LLM's input."""

    def __init__(self, folder):
        super().__init__()
        self.config = json.loads(Path(folder, "student.json").read_text(encoding="utf-8"))
        self.net = timm.create_model(**self.config["timm"])
        if self.config["mole"]:
            add_mole(self.net, **self.config["mole"])
        self.net.load_state_dict(load_file(Path(folder, "student.safetensors")))

    def forward(self, images):
        mode = TF.InterpolationMode(self.config["view"]["interpolation"])
        x = TF.resize(images, self.config["view"]["size"], mode)                # (B, 3, R_i, R_i)
        x = TF.to_dtype(x, torch.float32, scale=True)                           # (B, 3, R_i, R_i)
        x = TF.normalize(x, **self.config["colours"])                           # (B, 3, R_i, R_i)
        x = x.to(next(self.net.parameters()).dtype)                             # (B, 3, R_i, R_i)
        return self.net.forward_features(x)[:, 1:]                              # (B, n, d)

    def read_photo(self, path):
        """Return an image file as the run reads it, padded to a square: uint8 (1, 3, R, R)"""
        size = self.config["photo"]
        with Image.open(path) as file:
            if isinstance(size, list):      # as LLaVA: the view is made of the original
                return square_views(as_seen(file), size)[size[0]][None]
            return square_image(as_seen(file), size)[None]
