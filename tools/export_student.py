"""Take the distilled encoder out of a run: its weights, its config, and one file that loads them.

    python -m tools.export_student runs/tiny runs/student       # (5 s)

The folder then needs nothing of this repository: student.py in it (a copy of
tools/student_alone.py) wants torch and timm only. Inside the repository the same is
`plumbing.build.load_student(RUN)`.
"""

import os
from pathlib import Path

import torch

from data import write_json
from mole import MoLE, mole_layers
from plumbing.build import load_student
from plumbing.cli import InputError, Parser, run
from teachers import parse_spec

FILES = ("student.json", "student.pt", "student.py")


def main(argv: list[str] | None = None) -> None:
    """Write the three files."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path,
                        help="a run folder of train.py, or a checkpoint of the authors' layout")
    parser.add_argument("out", type=Path, help="a folder, made if it is not there")
    args = parser.parse_args(argv)
    student, _ = load_student(args.run)
    for name in FILES:
        if (args.out / name).exists():
            raise InputError(f"{args.out / name}: is there already; name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "student.json", student_config(student, args.run))
    temporary = args.out / f"student.{os.getpid()}.tmp"
    torch.save(student.state_dict(), temporary)
    temporary.rename(args.out / "student.pt")
    source = Path(__file__).with_name("student_alone.py").read_text(encoding="utf-8")
    (args.out / "student.py").write_text(source, encoding="utf-8")
    count = sum(p.numel() for p in student.parameters())
    print(f"{args.out}: {', '.join(FILES)}; {count:,} parameters, {student.num_tokens} tokens of "
          f"width {student.dim}")


def student_config(student, run_folder: Path) -> dict:
    """All that student.py must know to build it, and to read a photo as the loader does."""
    loader = student.loader_size
    one_view = isinstance(loader, int)
    name, size, options = parse_spec(student.spec)
    mole = {}
    layers = mole_layers(student)
    if layers:
        first = layers[0]
        lora = first.lora if isinstance(first, MoLE) else first.lora_fc1
        mole = {"form": "ffn" if isinstance(first, MoLE) else "fc1_fc2",
                "experts": first.router.out_features, "rank": lora.rank,
                "alpha": lora.scale * lora.rank}
    return {"timm": name.split(".")[0], "arguments": {"img_size": size, **options}, "mole": mole,
            "size": [size, size], "from": str(run_folder),
            "interpolation": student.interpolation.value, "mean": student.mean,
            "std": student.std,
            "photo": {"pixels": loader if one_view else size, "bicubic": not one_view}}


if __name__ == "__main__":
    run(main)
