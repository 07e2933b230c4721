"""The model of a finished run, read to be used or trained further."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data import InputError, stack_images
from model import VLM, Ensemble, Student
from plumbing import build, checks, files, flags, sets, sharding
from plumbing.config import Config
from real.image_files import load_image
from real.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from real.released_checkpoint import load_released, read_released
from tiny.llm import WordTokenizer


def load_run(folder: Path, device: str = "auto") -> tuple[VLM, object, Config]:
    """Return VLM, tokenizer and Config of a run or a LLaVA checkpoint. Raises InputError."""
    device = checks.find_device(device)
    c, released = read_config(folder)
    if c.llm:
        name = c.llm if released else str(folder / "llm")
        tokenizer = PretrainedTokenizer(name, c.prompt)
        llm = PretrainedLLM(name, released[1]) if released else PretrainedLLM.without_weights(name)
    else:
        tokenizer, llm = WordTokenizer(sets.read_words(folder)), None
    vlm = build.build_vlm(c, tokenizer, build.real_weights(c) if released else {}, llm)
    load = load_released if released else load_vlm
    load(vlm, folder)
    c.device = device
    bf16 = c.precision == "bf16" and device == "cuda"
    sharding.cast_vlm(vlm, torch.bfloat16 if bf16 else torch.float32)
    return vlm.to(device).eval(), tokenizer, c


def read_config(folder: Path) -> tuple[Config, tuple | None]:
    """Return what `config_to_use` does. Raises InputError, as for --evaluate."""
    c, released = flags.config_to_use(folder)
    try:
        checks.check_config(c, trains=False)
    except InputError as e:
        raise InputError(f"{folder / 'config.json'}: {e}") from None
    return c, released


def load_vlm(vlm: VLM, folder: Path) -> None:
    """Fill student, projector and LLM from a run of ours. Raises InputError."""
    tensors = read_run_tensors(folder)
    own = vlm.state_dict()
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        known = tensors.get(f"vlm.{name}", ())
        rows = own.get(name, ())
        if 0 < len(known) < len(rows):
            # words that are new to the run come after its own, with new weights
            tensors[f"vlm.{name}"] = torch.cat([known, rows[len(known):]])
    fill_module(vlm, tensors, "vlm.", folder)


def load_student(run: str | Path) -> tuple[Student, Callable]:
    """Return the student of a run or the authors' checkpoint, and read_photo(path), its input."""
    run = Path(run)
    c, released = read_config(run)
    student = build.build_student(c, build.real_weights(c) if released else {})
    if isinstance(student, Ensemble):
        raise InputError(f"{run}: is the baseline that sees with all encoders, not one student")
    tensors = read_released(student, run) if released else read_run_tensors(run)
    fill_module(student, tensors, "student." if released else "vlm.student.", run)
    student.loader_size = sets.student_size(c)

    def read_photo(path: str | Path) -> torch.Tensor | dict:
        return stack_images([load_image(Path(path), student.loader_size)])

    return student.float().eval(), read_photo


def read_run_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a run. Raises InputError."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(files.read_tensors(path, "copy it again, or train again"))
    if not tensors:
        raise InputError(f"{folder}: holds no model.safetensors; the run has not finished")
    return tensors


def fill_module(module: nn.Module, tensors: dict, prefix: str, folder: Path) -> None:
    """Load the tensors whose names begin with the prefix, strictly. Raises InputError."""
    names = [name for name in tensors if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): tensors[name] for name in names}
    files.load_strictly(module, tensors, f"{folder}: its weights do not fit its config.json")
