"""The pictures of the page: arrays in, PNG bytes out.

They hold no words, so that they are legible on a light page and on a dark one: words and numbers
stand beside them in the page.

Letters: n tokens on a square grid of side x side, R pixels of an image.
"""

import io

import matplotlib
import numpy as np
import torch
from PIL import Image

from teachers import VisionEncoder
from tools.explain.numbers import ExplainedImage

SIZE = 288  # px of a picture: sharp on a phone, small in the page
# Okabe and Ito's colours, which colour-blind people can distinguish
EXPERTS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66),
           (0, 114, 178), (213, 94, 0))
HEAT = "inferno"    # of attention and weights
ERROR = "viridis"   # of errors


def draw(explained: ExplainedImage) -> dict[str, bytes]:
    """Draw every picture of the page; returns the bytes of each by its name."""
    image, weights = explained.image, explained.attention.weights
    highest = weights["paper"].max().item()
    pictures = {"image": to_png(photograph(image)),
                "attention": heat_picture(weights["paper"], image, highest),
                "scale-attention": scale_picture(HEAT)}
    for name, encoder in explained.encoders().items():
        pictures[f"view-{name}"] = view_picture(encoder, image[None].to(explained.run.c.device))
    for form in ("paper", "released"):
        pictures[f"wtok-{form}"] = heat_picture(weights[form], image, highest)
    for moment, numbers in explained.moments.items():
        for layer, experts in enumerate(numbers.experts, start=1):
            pictures[file_name("experts", str(layer), moment)] = expert_picture(experts[1:], image)
        for name, errors in numbers.errors.items():
            highest = explained.highest_error(name)
            pictures[file_name("error", name, moment)] = heat_picture(errors, image, highest, ERROR)
            pictures["scale-error"] = scale_picture(ERROR)
    for tokens in explained.token_maps:
        name = file_name("tokens", tokens.title, tokens.moment)
        pictures[name] = colour_picture(tokens.colours)
    return pictures


def file_name(panel: str, content: str, moment: str) -> str:
    """Return the name of a picture: "tokens-Vt-eva-before"."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in content.replace("^", ""))
    return f"{panel}-{plain}-{moment}".removesuffix("-")


def to_png(pixels: np.ndarray) -> bytes:
    """Return uint8 (height, width, 3) as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def as_grid(values: torch.Tensor) -> np.ndarray:
    """Lay tokens out on their grid: (n, ...) -> (side, side, ...)"""
    side = round(len(values) ** 0.5)
    return values.reshape(side, side, *values.shape[1:]).numpy()


def enlarge(pixels: np.ndarray, sharp: bool = True) -> np.ndarray:
    """Resize uint8 (height, width, 3) to (SIZE, SIZE, 3); sharp: a token stays a square."""
    how = Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), how))


def photograph(image: torch.Tensor) -> np.ndarray:
    """Resize an image, uint8 (3, R, R), to (SIZE, SIZE, 3)."""
    return enlarge(image.permute(1, 2, 0).cpu().numpy(), sharp=False)


def grey(image: torch.Tensor) -> np.ndarray:
    """Return the same without colour, below a heat map: floats in 0..1."""
    tone = photograph(image).astype(np.float32).mean(axis=2, keepdims=True) / 255
    return np.repeat(tone, 3, axis=2)


def lines_between(pixels: np.ndarray, side: int) -> np.ndarray:
    """Draw thin lines between the tokens of a grid."""
    drawn = pixels.copy()
    for k in range(1, side):
        at = round(k * SIZE / side)
        for strip in (drawn[at - 1:at + 1], drawn[:, at - 1:at + 1]):
            strip[:] = strip // 2 + 96
    return drawn


def view_picture(encoder: VisionEncoder, images: torch.Tensor) -> bytes:
    """Draw an encoder's input at its own resolution, with the grid of its tokens."""
    view = encoder.view(images)[0].float().cpu()                            # (3, R_i, R_i)
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    pixels = (view * std[:, None, None] + mean[:, None, None]).clamp(0, 1)  # (3, R_i, R_i)
    pixels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return to_png(lines_between(enlarge(pixels), round(encoder.num_tokens ** 0.5)))


def heat_picture(values: torch.Tensor, image: torch.Tensor, highest: float,
                 colours: str = HEAT) -> bytes:
    """Draw values (n,) from 0 to `highest` as a heat map on the image (3, R, R)."""
    shade = (as_grid(values) / max(highest, 1e-12)).clip(0, 1)              # (side, side)
    heat = matplotlib.colormaps[colours](shade)[..., :3]                    # (side, side, 3)
    heat = enlarge((heat * 255).astype(np.uint8)).astype(np.float32) / 255
    mixed = heat * (0.6 + 0.4 * grey(image))                                # the image as a relief
    return to_png((mixed * 255).astype(np.uint8))


def scale_picture(colours: str) -> bytes:
    """Draw the colours of a heat map from 0 to the highest, left to right."""
    shade = np.linspace(0, 1, SIZE)[None].repeat(12, axis=0)
    return to_png((matplotlib.colormaps[colours](shade)[..., :3] * 255).astype(np.uint8))


def expert_picture(experts: torch.Tensor, image: torch.Tensor) -> bytes:
    """Draw the expert of each patch (n,) as a coloured square, the image as a relief in them."""
    palette = np.array(EXPERTS, dtype=np.uint8)
    squares = palette[as_grid(experts) % len(EXPERTS)]                      # (side, side, 3)
    squares = enlarge(squares).astype(np.float32)
    mixed = squares * (0.45 + 0.55 * grey(image))
    return to_png(lines_between(mixed.astype(np.uint8), round(len(experts) ** 0.5)))


def colour_picture(colours: torch.Tensor) -> bytes:
    """Draw tokens as colours (n, 3) in 0..1."""
    return to_png(enlarge((as_grid(colours) * 255).round().astype(np.uint8)))
