"""Image files: the encoders get the picture that a viewer shows."""

import errno
import hashlib
import os
import stat
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from data import InputError, square_image, square_views
from plumbing.files import kind_of

Size = int | tuple[int, ...]  # of the loader's image; or of the views made of the original
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)  # no fault of the file


def load_image(path: Path, size: Size) -> torch.Tensor | dict:
    """Return an image file as uint8 (3, size, size), or its views. Raises InputError."""
    name = printable(path)
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):  # PIL would wait for a pipe to be written
            raise OSError(errno.EINVAL, "not a regular file")
        with Image.open(path) as file:
            return fit(as_seen(file), size)
    except FileNotFoundError:
        raise InputError(f"{name}: no such image file") from None
    except Image.DecompressionBombError as e:
        fault = f"a decompression bomb: {e}"
    except OSError as e:
        if e.errno in MACHINE_ERRORS:
            raise
        fault = f"not a readable image ({e.strerror or type(e).__name__})"
    except (ArithmeticError, EOFError, LookupError, SyntaxError, TypeError, ValueError,
            struct.error) as e:  # what PIL makes of a broken file
        fault = f"not a readable image ({type(e).__name__})"
    raise InputError(f"{name}: {kind_of(path) or fault}; replace the file or drop its row")


def printable(text) -> str:
    """Return anything as one short line: the name of an image may be a whole data URI."""
    line = str(text) if str(text).isprintable() else repr(str(text))[1:-1]
    return line if len(line) <= 255 else f"{line[:160]}...{line[-20:]}"


def fit(picture: Image.Image, size: Size) -> torch.Tensor | dict:
    """Return an RGB picture as a square of one size, or as a view for each of several."""
    make = square_views if isinstance(size, tuple) else square_image
    return make(picture, size)


def as_seen(picture: Image.Image) -> Image.Image:
    """Return a picture as a viewer shows it: RGB, upright, 8 bits, transparent places white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(eight_bits(np.asarray(picture)))
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        picture = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    if picture.mode == "La":  # premultiplied; PIL converts it to plain RGBA only
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Return grey values as uint8: 16 bits are scaled, floats and 32 bits stretched."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if low >= 0 and 255 < high <= 65535:
        return (values / 257).round().astype(np.uint8)
    if low >= 0 and 1 < high <= 255:
        return values.round().astype(np.uint8)
    return ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


class DiskImages:
    """get_image of records whose image names are relative to a folder on disk.

    It gives one image of `size` px, or with several sizes a view for each, from the original. A
    name that leads out of the folder, by .. or a link, is refused unless `allow_outside`.
    """

    def __init__(self, folder: Path, size: Size, allow_outside: bool = False):
        self.folder = Path(folder)
        self.size = size
        self.allow_outside = allow_outside
        self.source = str(self.folder.resolve())

    def __call__(self, name: str) -> torch.Tensor | dict[int, torch.Tensor]:
        return load_image(self.path(name), self.size)

    def path(self, name: str) -> Path:
        """Return where an image is. Raises InputError if that is outside the folder."""
        path = self.folder / name
        try:
            is_inside = path.resolve().is_relative_to(self.source)
        except (OSError, RuntimeError, ValueError):  # a link to itself, or a NUL in the name
            is_inside = True  # it cannot be opened: load_image gives the reason
        if not is_inside and not self.allow_outside:
            raise InputError(f"{printable(path)}: lies outside the image folder {self.folder}; "
                             "move it there, or give --allow-outside")
        return path

    def fingerprint(self, names: list[str]) -> str:
        """Return a hash of the files' contents. One that cannot be read counts as empty."""
        def hash_of(name: str) -> bytes:
            try:
                path = self.path(name)
                with open(path if path.is_file() else os.devnull, "rb") as file:
                    return hashlib.file_digest(file, "sha256").digest()
            except (InputError, OSError, ValueError):
                return b""  # training reports the fault at its row

        with ThreadPoolExecutor() as pool:
            return hashlib.sha256(b"".join(pool.map(hash_of, names))).hexdigest()
