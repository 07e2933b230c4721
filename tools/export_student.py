"""Take the distilled encoder out of a run: its weights, its config, and one file that loads them.

    python -m tools.export_student runs/tiny runs/student       # (5 s)

The folder then needs nothing of this repository: student.py in it (a copy of
tools/student_alone.py) wants torch and timm only. Inside the repository the same is
`plumbing.build.load_student(RUN)`.
"""

import os
from pathlib import Path

import torch
from PIL import Image

from data import InputError
from model import Student
from mole import MoLE, RoutedFFN, mole_layers
from plumbing.cli import Parser, run
from plumbing.files import write_json
from plumbing.finished_run import load_student
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
    torch.save(plain_weights(student), temporary)
    temporary.replace(args.out / "student.pt")
    source = Path(__file__).with_name("student_alone.py").read_text(encoding="utf-8")
    (args.out / "student.py").write_text(source, encoding="utf-8")
    count = sum(p.numel() for p in student.parameters())
    print(f"{args.out}: {', '.join(FILES)}; {count:,} parameters, {student.num_tokens} tokens of "
          f"width {student.dim}")


def student_config(student: Student, run_folder: Path) -> dict:
    """All that student.py must know to build it, and to read a photo as the loader does."""
    loader = student.loader_size
    one_view = isinstance(loader, int)
    name, size, options = parse_spec(student.spec)
    photo = loader if one_view else size
    # of timm's model what is left in the student: no last block, no final norm
    left = {"depth": len(student.net.blocks), "final_norm": False, "num_classes": 0}
    pillow = Image.Resampling[student.interpolation.value.upper()]
    return {"from": str(run_folder),
            "timm": {"model_name": name.split(".")[0], "img_size": size, **options, **left},
            "view": {"size": [size, size], "interpolation": pillow.value},
            "colours": {"mean": student.mean, "std": student.std},
            "photo": {"size": [photo, photo], "bicubic": not one_view}}


def plain_weights(student: Student) -> dict:
    """timm's own tensors under timm's names, and those of each block's experts."""
    net = {}
    for name, tensor in student.net.state_dict().items():
        if ".mlp.router." not in name and ".mlp.lora" not in name:
            net[name.replace(".mlp.ffn.", ".mlp.")] = tensor
    return {"net": net, "experts": [expert_tensors(layer) for layer in mole_layers(student)]}


@torch.no_grad()
def expert_tensors(layer: RoutedFFN) -> tuple[list, list]:
    """The router's weight and bias; down, a, up, b of each LoRA (mole.py: ExpertLoRA).

    alpha/r goes into up and b, and a bias that the form has not is 0: one formula serves both.
    """
    loras = [layer.lora] if isinstance(layer, MoLE) else [layer.lora_fc1, layer.lora_fc2]
    tensors = []
    for lora in loras:
        down, a, up, b = lora.down.weight, lora.down.bias, lora.up.weight, lora.up_bias
        if b is None:
            a, b = torch.zeros(len(down)), torch.zeros(layer.router.out_features, len(up))
        tensors += [down.detach(), a.detach(), lora.scale * up, lora.scale * b]
    return [layer.router.weight.detach(), layer.router.bias.detach()], tensors


if __name__ == "__main__":
    run(main)
