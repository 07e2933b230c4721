"""The distilled encoder of a run: its weights, its config, and one file that loads them."""

import inspect
import re
from pathlib import Path

import mole
from data import LARGE_SIDE, MEAN_COLOUR, pad_to_square, square_image, square_views
from model import Student
from plumbing.files import write_json, write_tensors
from real.image_files import as_seen, eight_bits
from teachers import parse_spec

# what student.py needs of this repository, beside mole.py: its source goes into the file
PIXELS = (as_seen, eight_bits, pad_to_square, square_image, square_views)
HEAD = ("import numpy as np\nfrom PIL import ImageCms, ImageOps\n\n"
        f"MEAN_COLOUR = {MEAN_COLOUR}\nLARGE_SIDE = {LARGE_SIDE}\n")


def write_student(student: Student, folder: Path) -> None:
    """Write the encoder's config, weights and code, which need nothing of this repository."""
    name, size, options = parse_spec(student.spec)
    # timm's model without its last block and its final norm
    left = {"depth": len(student.net.blocks), "final_norm": False, "num_classes": 0}
    write_json(folder / "student.json", {
        "timm": {"model_name": name.split(".")[0], "img_size": size, **options, **left},
        "mole": getattr(student, "mole_options", None),
        "view": {"size": [size, size], "interpolation": student.interpolation.value},
        "colours": {"mean": student.mean, "std": student.std},
        "photo": student.loader_size,
    })
    write_tensors(folder / "student.safetensors", student.net.state_dict())
    write_source(folder / "student.py", "alone.py", HEAD, *map(inspect.getsource, PIXELS))


def write_source(path: Path, template: str, *more: str) -> None:
    """Write a file of this folder with mole.py, and more code, in place of imports from here."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    imports, rest = re.split(r"\nfrom (?:data|mole) import (?s:.*?)\n\n\n", text, maxsplit=1)
    source = "\n\n".join([imports, inspect.getsource(mole), *more, rest])
    path.write_text(source, encoding="utf-8")
