"""The pixels that each encoder gets, beside those of LLaVA's own preprocessing.

    python -m tools.pixels      # the tables of docs/differences.md (1 min)

For each way of `--image-views`: the difference from LLaVA's pixels, as a share of their spread, and
the detail (the strength of the Laplacian) as a share of LLaVA's. Then the time that the loader
takes to make an image of a JPEG file.

Letters: R_i pixels of encoder i's view.
"""

import io

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image

from data import square_image, square_views
from plumbing.cli import Parser, run
from plumbing.config import FULL
from plumbing.image_files import as_seen, student_size, training_size
from teachers import VisionEncoder
from tools.measuring import seconds, table_line

ENCODERS = ("clip", "eva", "convnext", "sam")
CLIP_MEAN = timm.data.OPENAI_CLIP_MEAN  # the padding's colour, whatever the encoder's own mean


def natural_noise(width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls as 1 / frequency, as in photographs."""
    draw = np.random.default_rng(0)
    fx = np.fft.fftfreq(width)[None, :]
    fy = np.fft.fftfreq(height)[:, None]
    falloff = 1 / np.maximum(np.hypot(fx, fy), 1 / max(width, height))          # (height, width)
    channels = []
    for _ in range(3):
        white = np.fft.fft2(draw.standard_normal((height, width)))
        noise = np.fft.ifft2(white * falloff).real
        channels.append(128 + 50 * noise / noise.std())
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def photographs() -> dict[str, Image.Image]:
    """A photograph that comes with matplotlib, and noise at the sizes that LLaVA's sets have."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        portrait = file.convert("RGB")
    return {
        f"a portrait, {portrait.width}x{portrait.height}": portrait,
        "the same, 336x336": portrait.crop((90, 40, 426, 376)),
        "1/f noise, 640x480": natural_noise(640, 480),
        "1/f noise, 336x336": natural_noise(336, 336),
    }


def llava_pixels(picture: Image.Image, size: int, mean: tuple, std: tuple) -> torch.Tensor:
    """LLaVA's preprocessing, step by step: (1, 3, R_i, R_i)

    The square of the mean colour around the picture; the shorter edge brought to R_i, bicubically;
    the centre; 0 to 1; normalised.
    """
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in CLIP_MEAN))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    short = min(square.size)
    scaled = [int(pixels * size / short) for pixels in square.size]
    square = square.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (square.width - size) // 2, (square.height - size) // 2
    square = square.crop((left, top, left + size, top + size))
    x = np.asarray(square, np.float32) / 255                                        # (R_i, R_i, 3)
    x = (x - np.array(mean, np.float32)) / np.array(std, np.float32)                # (R_i, R_i, 3)
    return torch.from_numpy(x).permute(2, 0, 1)[None]                           # (1, 3, R_i, R_i)


def detail(x: torch.Tensor) -> float:
    """The root mean square of the Laplacian."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = F.conv2d(x.transpose(0, 1), kernel[None, None])               # (3, 1, R_i-2, R_i-2)
    return laplacian.square().mean().sqrt().item()


def both_views(encoder: VisionEncoder, picture: Image.Image) -> dict[str, torch.Tensor]:
    """The encoder's view in each way of --image-views: (1, 3, R_i, R_i)"""
    size = encoder.image_size
    return {"one": encoder.view(square_image(picture, FULL.image_size)[None]),
            "each": encoder.view({size: square_views(picture, (size,))[size][None]})}


def pixel_table() -> str:
    """How far each encoder's view is from LLaVA's."""
    lines = ["| photograph | encoder | `one`: difference | detail | `each`: difference | detail |",
             "|---|---|---|---|---|---|"]
    for name in ENCODERS:
        with torch.device("meta"):
            encoder = VisionEncoder(getattr(FULL, name))
        for what, picture in photographs().items():
            expected = llava_pixels(picture, encoder.image_size, encoder.mean, encoder.std)
            cells = []
            for view in both_views(encoder, picture).values():
                away = (view - expected).square().mean().sqrt() / expected.std()
                cells += [f"{100 * away:.2f} %", f"{detail(view) / detail(expected):.2f}"]
            lines.append(table_line(what, f"{name}, {encoder.image_size} px", *cells))
    return "\n".join(lines)


def time_table() -> str:
    """How long the loader takes from a JPEG file to the image, or the views, of --full."""
    lines = ["| photograph | `one` | `each`, training | `each`, the student's alone |",
             "|---|---|---|---|"]
    for what, picture in photographs().items():
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)

        def opened() -> Image.Image:
            return as_seen(Image.open(io.BytesIO(file.getvalue())))

        times = seconds({
            "one": lambda: square_image(opened(), FULL.image_size),
            "each": lambda: square_views(opened(), training_size(FULL)),
            "student": lambda: square_views(opened(), student_size(FULL)),
        }, 15)
        lines.append(table_line(what, *(f"{1000 * t:.1f} ms" for t in times.values())))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the two tables."""
    Parser(__doc__).parse_args(argv)
    print(pixel_table())
    print()
    print(time_table())


if __name__ == "__main__":
    run(main)
