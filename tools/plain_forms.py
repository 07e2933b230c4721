"""The plain forms, as one would write them first: what the fast forms are measured against.

Letters: B images, n tokens and d width of the student, d_ffn width inside the FFN, E experts, r
rank of one expert, h heads, m teachers; B*N tokens of a batch in one row, N_e of them expert e's.
"""

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

from teachers import ClipEncoder


class LoopFFN(nn.Module):
    """What both plain forms of MoLE share: a LoRA an expert, tokens gathered and scattered."""

    def __init__(self, ffn: nn.Module, dim: int, num_experts: int, rank: int, dropout: float):
        super().__init__()
        self.ffn = ffn
        self.router = nn.Linear(dim, num_experts)
        self.dropout = nn.Dropout(dropout)
        self.num_experts = num_experts
        self.rank = rank

    def loras(self, dim_in: int, dim_out: int, bias: bool) -> nn.ModuleList:
        """One LoRA for each expert."""
        experts = nn.ModuleList()
        for _ in range(self.num_experts):
            down = nn.Linear(dim_in, self.rank, bias)
            up = nn.Linear(self.rank, dim_out, bias)
            experts.append(nn.Sequential(down, up))
        return experts

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """The expert of each token: (B*N, d) -> (B*N,)"""
        return self.router(x).softmax(dim=-1).argmax(dim=-1)                            # (B*N,)

    def add(self, y: torch.Tensor, x: torch.Tensor, loras: nn.ModuleList,
            choice: torch.Tensor) -> torch.Tensor:
        """y + E_i(x), expert by expert."""
        for e, lora in enumerate(loras):
            rows = (choice == e).nonzero()[:, 0]                                        # (N_e,)
            y = y.index_add(0, rows, lora(self.dropout(x[rows])))                       # (B*N, .)
        return y


class LoopMoLE(LoopFFN):
    """The paper's form.  (B, 1 + n, d) -> (B, 1 + n, d)"""

    def __init__(self, ffn: nn.Module, dim: int, num_experts: int, rank: int, dropout: float):
        super().__init__(ffn, dim, num_experts, rank, dropout)
        self.lora = self.loras(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)                                                          # (B*N, d)
        choice = self.choose(flat)                                                      # (B*N,)
        return self.add(self.ffn(flat), flat, self.lora, choice).view_as(x)        # (B, 1 + n, d)


class LoopReleasedMoLE(LoopFFN):
    """The released code's form.  (B, 1 + n, d) -> (B, 1 + n, d)"""

    def __init__(self, ffn: nn.Module, dim: int, num_experts: int, rank: int, dropout: float):
        super().__init__(ffn, dim, num_experts, rank, dropout)
        d_ffn = ffn.fc1.out_features
        self.lora_fc1 = self.loras(dim, d_ffn, bias=True)
        self.lora_fc2 = self.loras(d_ffn, dim, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)                                                          # (B*N, d)
        choice = self.choose(flat)                                                      # (B*N,)
        hidden = self.add(self.ffn.fc1(flat), flat, self.lora_fc1, choice)          # (B*N, d_ffn)
        hidden = self.ffn.act(hidden)                                               # (B*N, d_ffn)
        out = self.add(self.ffn.fc2(hidden), hidden, self.lora_fc2, choice)             # (B*N, d)
        return out.view_as(x)                                                      # (B, 1 + n, d)


def eager_blocks(encoder: ClipEncoder,
                 images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """CLIP with every attention map of every block kept, for one row of one of them."""
    net = encoder.net
    maps = []                                                             # L x (B, h, 1 + n, 1 + n)
    x = net.norm_pre(net._pos_embed(net.patch_embed(encoder.view(images))))        # (B, 1 + n, d)
    for block in net.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x))                                       # (B, 1 + n, 3 d)
        qkv = qkv.unflatten(-1, (3, attention.num_heads, -1))                # (B, 1 + n, 3, h, d/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # (B, h, 1 + n, d/h) each
        # no name for what comes between: it would be held longer than it is needed
        maps.append((q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1))
        x = x + attention.proj((maps[-1] @ v).transpose(1, 2).flatten(2))          # (B, 1 + n, d)
        x = x + block.mlp(block.norm2(x))                                          # (B, 1 + n, d)
    return x, maps


def stacked_kd_loss(student: torch.Tensor, teachers: dict[str, torch.Tensor], w_tok: torch.Tensor,
                    w_tea: torch.Tensor) -> torch.Tensor:
    """L_kd from a (B, n, d, m) stack of squared errors."""
    targets = torch.stack(list(teachers.values()), dim=-1)                          # (B, n, d, m)
    error = (targets - student[..., None]).square()                                 # (B, n, d, m)
    weight = (w_tok + 1 / student.shape[1])[:, :, None, None]                       # (B, n, 1, 1)
    weighed = weight * error * w_tea[:, None, None, :]                              # (B, n, d, m)
    return weighed.mean(dim=2).sum(dim=(1, 2)).mean()                               # ()


def pil_views(images: torch.Tensor, sizes: tuple[int, ...], mean, std) -> list[torch.Tensor]:
    """Each encoder's view through PIL, image by image, as an image processor makes it."""
    views = []
    for size in sizes:
        view = []
        for image in images.cpu():
            picture = TF.to_pil_image(image).resize((size, size), Image.Resampling.BICUBIC)
            pixels = TF.to_dtype(TF.pil_to_tensor(picture), torch.float32, scale=True)
            view.append(TF.normalize(pixels, mean, std))                            # (3, R_i, R_i)
        views.append(torch.stack(view).to(images.device))                       # (B, 3, R_i, R_i)
    return views


def tensor_views(images: torch.Tensor, sizes: tuple[int, ...], mean, std) -> list[torch.Tensor]:
    """The same as VisionEncoder.view makes it: the whole batch, on its device."""
    views = []
    for size in sizes:
        x = TF.resize(images, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
        x = TF.to_dtype(x, torch.float32, scale=True)                           # (B, 3, R_i, R_i)
        views.append(TF.normalize(x, mean, std))                                # (B, 3, R_i, R_i)
    return views
