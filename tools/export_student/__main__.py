"""Take the distilled encoder out of a run: its weights, its config, and one file that loads them.

    python -m tools.export_student runs/tiny runs/student       # (5 s)

The folder then needs nothing of this repository: student.py in it wants torch, timm and safetensors
only. Inside the repository the same is `plumbing.finished_run.load_student(RUN)`.
"""

import inspect
from pathlib import Path

from PIL import Image

import mole
from data import LARGE_SIDE, MEAN_COLOUR, InputError, pad_to_square, square_image, square_views
from model import Student
from plumbing.cli import Parser, run
from plumbing.files import write_json, write_tensors
from plumbing.finished_run import load_student
from real.image_files import as_seen, eight_bits
from teachers import parse_spec

IMPORTS = ("import numpy as np\nimport torch.nn.functional as F\n"
           "from PIL import ImageCms, ImageOps\n\n")
FILES = ("student.json", "student.safetensors", "student.py")
# all of this repository that student.py needs: its source goes into the file
SHARED = (mole.ExpertLoRA, mole.RoutedFFN, mole.MoLE, mole.ReleasedMoLE, mole.add_mole,
          as_seen, eight_bits, pad_to_square, square_image, square_views)


def main(argv: list[str] | None = None) -> None:
    """Write the three files."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or the authors' checkpoint")
    parser.add_argument("out", type=Path, help="a folder, made if it is not there")
    args = parser.parse_args(argv)
    student, _ = load_student(args.run)
    for name in FILES:
        if (args.out / name).exists():
            raise InputError(f"{args.out / name}: is there already; name another folder")
    write_student(student, args.out)
    count = sum(p.numel() for p in student.parameters())
    print(f"{args.out}: {', '.join(FILES)}; {count:,} parameters, {student.num_tokens} tokens of "
          f"width {student.dim}")


def write_student(student: Student, folder: Path) -> None:
    """Write the encoder's config, weights and code, which need nothing of this repository."""
    bicubic = not isinstance(student.loader_size, int)
    name, size, options = parse_spec(student.spec)
    # timm's model without its last block and its final norm
    left = {"depth": len(student.net.blocks), "final_norm": False, "num_classes": 0}
    pillow = Image.Resampling[student.interpolation.value.upper()]
    write_json(folder / "student.json", {
        "timm": {"model_name": name.split(".")[0], "img_size": size, **options, **left},
        "mole": mole_options(student),
        "view": {"size": [size, size], "interpolation": pillow.value},
        "colours": {"mean": student.mean, "std": student.std},
        "photo": {"size": size if bicubic else student.loader_size, "bicubic": bicubic},
    })
    write_tensors(folder / "student.safetensors", student.net.state_dict())
    (folder / "student.py").write_text(stand_alone_source(), encoding="utf-8")


def mole_options(student: Student) -> dict | None:
    """Return what add_mole needs to build the student's experts; None if it has none."""
    layers = mole.mole_layers(student)
    if not layers:
        return None
    form, lora = (("ffn", layers[0].lora) if isinstance(layers[0], mole.MoLE) else
                  ("fc1_fc2", layers[0].lora_fc1))
    return {"form": form, "num_experts": layers[0].router.out_features, "rank": lora.rank,
            "alpha": lora.scale * lora.rank, "dropout": 0.0, "init": "zero", "router_grad": "none"}


def stand_alone_source() -> str:
    """Return alone.py with the source of its imports from this repository."""
    text = Path(__file__).with_name("alone.py").read_text(encoding="utf-8")
    imports, _, rest = text.partition("\nfrom data import")
    _, _, student = rest.partition("\n\n\n")
    constants = f"MEAN_COLOUR = {MEAN_COLOUR}\nLARGE_SIDE = {LARGE_SIDE}\n"
    return imports + "\n\n".join([IMPORTS + constants, *map(inspect.getsource, SHARED), student])


if __name__ == "__main__":
    run(main)
