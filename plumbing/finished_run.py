"""The model of a finished run, read to be used, explained or trained further."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from data import InputError, stack_images
from model import VLM, Ensemble, MoVEKD, Student
from plumbing import build
from plumbing.checks import find_device
from plumbing.config import FULL, Config, recipe
from plumbing.files import read_tensors
from plumbing.flags import load_config
from plumbing.sets import load_sets, read_words, student_size
from plumbing.sharding import cast_vlm
from real.image_files import load_image
from real.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from real.released_checkpoint import load_released, read_released, released_config
from teachers import Teachers
from tiny.llm import WordTokenizer


def load_run(folder: Path, device: str = "auto") -> tuple[VLM, object, Config]:
    """Return the VLM of a run or of the authors' checkpoint, its tokenizer and its Config.

    Strict: every tensor of the file must find its place. Raises InputError.
    """
    device = find_device(device)
    released = released_config(folder)
    if released:
        fields, llm_config = released
        c = dataclasses.replace(FULL, llm=str(folder), **{**recipe("released"), **fields})
        tokenizer = PretrainedTokenizer(c.llm)
        vlm = build.build_vlm(c, tokenizer, {}, PretrainedLLM(c.llm, llm_config))
        load_released(vlm, folder)
    else:
        c = load_config(folder / "config.json")
        if c.llm:
            tokenizer = PretrainedTokenizer(str(folder / "llm"))
            vlm = build.build_vlm(c, tokenizer, {}, PretrainedLLM.without_weights(folder / "llm"))
        else:
            tokenizer = WordTokenizer(read_words(folder))
            vlm = build.build_vlm(c, tokenizer, {})
        load_vlm(vlm, folder)
    c.device = device
    bf16 = c.precision == "bf16" and device == "cuda"
    cast_vlm(vlm, torch.bfloat16 if bf16 else torch.float32)
    return vlm.to(device).eval(), tokenizer, c


def load_vlm(vlm: VLM, folder: Path) -> None:
    """Fill student, projector and LLM from a run of ours. Raises InputError."""
    weights = tensors_below(read_run_tensors(folder), "vlm.")
    own = vlm.state_dict()
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        if name in weights and len(own.get(name, ())) > len(weights[name]):
            # the words that the run did not know come after its own, with new weights
            weights[name] = torch.cat([weights[name], own[name][len(weights[name]):]])
    fill_module(vlm, weights, folder)


def load_student(run: str | Path) -> tuple[Student, Callable]:
    """Return the distilled encoder of a run or of the authors' checkpoint, and a reader of photos.

        student, read_photo = load_student("runs/tiny")
        V_s = student(read_photo("photo.png"))              # (1, n, d)

    read_photo(path) gives what the student was trained on, as a batch of one. Raises InputError.
    """
    run = Path(run)
    released = released_config(run)
    if released:
        c = dataclasses.replace(FULL, mole_form="fc1_fc2", **released[0])
    else:
        c = load_config(run / "config.json")
    student = build.build_student(c, {})
    if isinstance(student, Ensemble):
        raise InputError(f"{run}: is the baseline that sees with all encoders, not one student")
    tensors = read_released(student, run) if released else read_run_tensors(run)
    prefix = "student." if released else "vlm.student."
    fill_module(student, tensors_below(tensors, prefix), run)
    student.loader_size = student_size(c)

    def read_photo(path: str | Path) -> torch.Tensor | dict:
        return stack_images([load_image(Path(path), student.loader_size)])

    return student.float().eval(), read_photo


def read_run_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a run. Raises InputError."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no model.safetensors; the run has not finished")
    tensors = {}
    for file in files:
        tensors.update(read_tensors(file, "copy it again, or train again"))
    return tensors


def tensors_below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with the prefix, by the rest of their names."""
    chosen = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            chosen[name.removeprefix(prefix)] = tensor
    return chosen


def fill_module(module: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Load weights strictly. Raises InputError, which names the folder, if they do not fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:
        fault = str(e).splitlines()[1].strip()[:200]
        raise InputError(f"{folder}: its weights do not fit its config.json: {fault}") from None


class WholeRun(NamedTuple):
    """A run as it was trained, and as it was before."""

    c: Config
    tokenizer: object
    model: MoVEKD               # trained
    start: MoVEKD | None        # at step 0, with new adapters; None for the authors' checkpoint
    teachers: Teachers | None   # likewise; without distillation CLIP alone


def load_whole_run(folder: Path, device: str = "auto", weights: str = "") -> WholeRun:
    """Return a run with its adapters, its teachers and its start.

    `weights`: a folder of the encoders' files, used in place of the run's own. Stage 0 makes its
    models again if they are gone. Raises InputError.
    """
    vlm, tokenizer, c = load_run(folder, device)
    if isinstance(vlm.student, Ensemble):
        raise InputError(f"{folder}: is the baseline that sees with all encoders; it has no "
                         "student to look into")
    if released_config(folder):
        c.lambda_kd = 0.0
        model = build.build_movekd(c, vlm, Teachers({}))
        return WholeRun(c, tokenizer, model.to(c.device).eval(), None, None)
    names = c.teachers if c.lambda_kd else ("clip",)
    c = dataclasses.replace(c, teachers=names, weights=weights or c.weights)
    records = [] if c.llm else load_sets(c)["train"][0]
    sources, _ = build.pretrained_weights(c, records, tokenizer)
    teachers = build.build_teachers(c, sources).to(c.device)
    model = build.build_movekd(c, vlm, teachers)
    load_adapters(model, folder)
    start = build.build_movekd(c, start_vlm(c, tokenizer, sources, vlm), teachers)
    start.target_norms.load_state_dict(model.target_norms.state_dict())
    return WholeRun(c, tokenizer, model.to(c.device).eval(), start.to(c.device).eval(), teachers)


def load_adapters(model: MoVEKD, folder: Path) -> None:
    """Fill the encoder adapters, and the statistics of their targets, from a run of ours."""
    tensors = read_run_tensors(folder)
    for prefix, module in (("adapters.", model.adapters), ("target_norms.", model.target_norms)):
        weights = {}
        for name, tensor in tensors_below(tensors, prefix).items():
            if name.split(".")[0] in module:
                weights[name] = tensor
        fill_module(module, weights, folder)


def start_vlm(c: Config, tokenizer, sources: dict, trained: VLM) -> VLM:
    """Return the VLM at step 0: the pretrained weights, or the run that it was started from.

    A real LLM is not loaded twice: the trained one stands in its place.
    """
    vlm = build.build_vlm(c, tokenizer, sources, trained.llm if c.llm else None)
    if c.init_from and not c.llm:
        load_vlm(vlm, Path(c.init_from))
    elif c.init_from:
        vlm.student = load_student(c.init_from)[0]
    return vlm
