"""Image files: what a viewer shows is what the encoders get."""

import errno
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from data import InputError, square_image, square_views

Size = int | tuple[int, ...]  # of the loader's image; or of the views made of the original
# what the machine lacks, not the file: such an error is passed on as it is
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


def load_image(path: Path, size: Size) -> torch.Tensor | dict:
    """An image file as uint8 (3, size, size), or a view for each of several sizes.

    Raises InputError if it is missing or unreadable.
    """
    remedy = "replace the file or drop its row"
    try:
        with Image.open(path) as file:
            return fit(as_seen(file), size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except Image.DecompressionBombError as e:
        raise InputError(f"{path}: a decompression bomb: {e}; {remedy}") from None
    except OSError as e:
        if e.errno in MACHINE_ERRORS:
            raise
        fault = e.strerror or type(e).__name__
    except (UnidentifiedImageError, SyntaxError, ValueError, TypeError, KeyError, IndexError,
            EOFError, OverflowError, struct.error) as e:  # what PIL makes of a broken file
        fault = type(e).__name__
    raise InputError(f"{path}: not a readable image ({fault}); {remedy}")


def fit(picture: Image.Image, size: Size) -> torch.Tensor | dict:
    """An RGB picture as a square of one size, or as a view for each of several."""
    if isinstance(size, tuple):
        return square_views(picture, size)
    return square_image(picture, size)


def as_seen(picture: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, RGB: upright, transparent places white, 8 bits a channel."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(eight_bits(np.asarray(picture)))
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        picture = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    if picture.mode == "La":  # premultiplied; PIL converts it to its plain form only
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of another range as uint8: 16 bits are scaled, floats and 32 bits stretched."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if low >= 0 and 255 < high <= 65535:
        return (values / 257).round().astype(np.uint8)
    if low >= 0 and 1 < high <= 255:
        return values.round().astype(np.uint8)
    return ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


class DiskImages:
    """get_image for records of a file on disk, whose image names are relative to `folder`.

    It gives one image of `size` px, or with several sizes a view for each, from the original.
    A name that leads out of the folder, by .. or a link, is refused unless it may.
    """

    def __init__(self, folder: Path, size: Size, allow_outside: bool = False):
        self.folder = Path(folder)
        self.size = size
        self.allow_outside = allow_outside
        self.source = str(self.folder.resolve())

    def __call__(self, name: str) -> torch.Tensor | dict[int, torch.Tensor]:
        return load_image(self.path(name), self.size)

    def path(self, name: str) -> Path:
        """Where an image is. Raises InputError if that is outside the folder."""
        path = self.folder / name
        if not self.allow_outside and not path.resolve().is_relative_to(self.source):
            raise InputError(f"{path}: lies outside the image folder {self.folder}; move it there, "
                            "or give --allow-outside")
        return path

    def fingerprint(self, names: list[str]) -> str:
        """Changes when a file's size or time does: half a million files are too many to read."""
        stats = [os.stat(self.folder / name) for name in names]
        seen = [(s.st_size, s.st_mtime_ns) for s in stats]
        return hashlib.sha256(repr(seen).encode()).hexdigest()
