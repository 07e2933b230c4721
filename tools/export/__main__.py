"""Write a finished run in a form that others load without this repository.

    python -m tools.export runs/tiny runs/student --to student     # the encoder, for timm (5 s)
    python -m tools.export runs/tiny runs/hf --to transformers     # the whole VLM, a LLaVA (10 s)

student.py in the first folder wants torch, timm and safetensors only; README.md in the second, a
model card, says how to load and upload it.
"""

import tempfile
from pathlib import Path

from data import InputError
from plumbing.cli import Parser, run
from plumbing.finished_run import load_run, load_student
from real.pretrained_llm import require_transformers
from tools.export.student import write_student


def main(argv: list[str] | None = None) -> None:
    """Write the folder in the form that --to names; after an error there is none."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or the authors' checkpoint")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--to", choices=("student", "transformers"), required=True)
    args = parser.parse_args(argv)
    if args.out.exists():
        raise InputError(f"{args.out}: is there already; name another folder")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        folder = Path(scratch, args.out.name)
        if args.to == "student":
            student, _ = load_student(args.run)
            write_student(student, folder)
        else:
            require_transformers()
            from tools.export.hugging_face import write_llava
            write_llava(args.run, *load_run(args.run, "cpu"), folder)
        folder.rename(args.out)
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    run(main)
