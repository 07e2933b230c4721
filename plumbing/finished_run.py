"""The model of a finished run: written when training ends, and read again to be used."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from data import InputError, stack_images
from model import VLM, Ensemble, MoVEKD, Student
from plumbing.build import (build_movekd, build_student, build_teachers, build_vlm,
                            pretrained_weights)
from plumbing.checkpoints import check_parameters
from plumbing.checks import find_device
from plumbing.config import FULL, Config, recipe
from plumbing.files import digest, read_tensors, write_json, write_tensors
from plumbing.flags import load_config
from plumbing.sets import load_sets, read_words, student_size
from plumbing.sharding import cast_vlm, full_state
from real.image_files import load_image
from real.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from real.released_checkpoint import load_released, read_released, released_config
from teachers import Teachers
from tiny.llm import WordTokenizer


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], **about: str) -> None:
    """folder/model.safetensors, or above 5 GB several files and their index, as on the hub.

    The old files go when the new ones are complete. Raises OSError.
    """
    temporary = folder / "weights.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parts = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB")
    for file, names in parts.filename_to_tensors.items():
        write_tensors(temporary / file, {name: tensors[name] for name in names}, **about)
    if parts.is_sharded:
        write_json(temporary / "model.safetensors.index.json",
                   {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename})
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in temporary.iterdir():
        file.replace(folder / file.name)
    temporary.rmdir()


def export(c: Config, first: bool, model: MoVEKD, tokenizer) -> None:
    """Save the final weights, with a real LLM's config and tokenizer: all that load_run reads.

    All processes gather them, the first one writes. What cannot be written to the run folder is
    written to a new folder for temporary files. Raises InputError, which names it.
    """
    check_parameters(model)
    state = full_state(model)
    if not first:
        return
    if c.precision == "bf16":
        for name, tensor in state.items():
            state[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    try:
        write_model(Path(c.out), c, state, model, tokenizer)
    except OSError as e:
        elsewhere = Path(tempfile.mkdtemp(prefix="movekd-"))
        write_model(elsewhere, c, state, model, tokenizer)
        raise InputError(f"{c.out}: the trained model cannot be written there ({e.strerror}); it "
                         f"is in {elsewhere}: move its files to {c.out}, then python train.py "
                         f"--evaluate {c.out}") from None


def write_model(folder: Path, c: Config, state: dict, model: MoVEKD, tokenizer) -> None:
    """The final weights, and a real LLM's config and tokenizer. Raises OSError."""
    if c.llm:
        save_weights(folder, state)
        model.vlm.llm.model.config.save_pretrained(folder / "llm")
        tokenizer.tokenizer.save_pretrained(folder / "llm")
    else:
        save_weights(folder, state, words=digest(*tokenizer.vocabulary))


def load_run(folder: Path, device: str = "auto") -> tuple[VLM, object, Config]:
    """The VLM of a finished run or of the authors' checkpoint, its tokenizer and its Config.

    Strict: every tensor of the file must find its place. Raises InputError.
    """
    device = find_device(device)
    released = released_config(folder)
    if released:
        fields, llm = released
        fields = {**recipe("released"), **fields}
        c = dataclasses.replace(FULL, llm=str(folder), **fields)
        tokenizer = PretrainedTokenizer(c.llm)
        vlm = build_vlm(c, tokenizer, {}, PretrainedLLM(c.llm, llm))
        load_released(vlm, folder)
    else:
        c = load_config(folder / "config.json")
        llm = None
        if c.llm:
            tokenizer = PretrainedTokenizer(str(folder / "llm"))
            llm = PretrainedLLM.without_weights(folder / "llm")
        else:
            tokenizer = WordTokenizer(read_words(folder))
        vlm = build_vlm(c, tokenizer, {}, llm)
        load_vlm(vlm, folder)
    c.device = device
    on_gpu_in_bf16 = c.precision == "bf16" and device == "cuda"
    cast_vlm(vlm, torch.bfloat16 if on_gpu_in_bf16 else torch.float32)
    return vlm.to(device).eval(), tokenizer, c


def load_vlm(vlm: VLM, folder: Path) -> None:
    """Fill student, projector and LLM from a finished run of ours. Raises InputError."""
    weights = tensors_below(read_run_tensors(folder), "vlm.")
    own = vlm.state_dict()
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        if name in weights and len(own.get(name, ())) > len(weights[name]):
            # words that the run did not know come after its own, as new
            weights[name] = torch.cat([weights[name], own[name][len(weights[name]):]])
    fill_module(vlm, weights, folder)


def load_student(run: str | Path) -> tuple[Student, Callable]:
    """The distilled encoder alone, of a run or of the authors' checkpoint; and what reads a photo.

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
    student = build_student(c, {})
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
    """Every tensor of a run, under its name of today. Raises InputError."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no model.safetensors; the run has not finished")
    found = {}
    for file in files:
        tensors = read_tensors(file, "copy it again, or train again")
        for name, tensor in tensors.items():
            found[current_name(name)] = tensor
    return found


def current_name(name: str) -> str:
    """A tensor's name today; older runs called LoRA's matrices A and B."""
    if ".mlp.lora" not in name:
        return name
    for old, new in ((".A.", ".down."), (".B.", ".up.")):
        name = name.replace(old, new)
    stem, _, last = name.rpartition(".")
    is_old_up_bias = last == "bias" and not stem.endswith((".down", ".up"))
    return f"{stem}.up_bias" if is_old_up_bias else name


def tensors_below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
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
    """A run as it was trained, and as it was before.

    The authors' checkpoint holds neither teachers nor what it started from: both are None then. A
    run without distillation has CLIP as its only teacher.
    """

    c: Config
    tokenizer: object
    model: MoVEKD               # trained
    start: MoVEKD | None        # as training found it: CLIP, and adapters that are new
    teachers: Teachers | None


def load_whole_run(folder: Path, device: str = "auto", weights: str = "") -> WholeRun:
    """A run with its adapters. `weights`: a folder of the encoders' files, in place of the run's.

    Stage 0 makes its models again if they are gone. Raises InputError.
    """
    vlm, tokenizer, c = load_run(folder, device)
    if isinstance(vlm.student, Ensemble):
        raise InputError(f"{folder}: is the baseline that sees with all encoders; it has no "
                         "student to look into")
    if released_config(folder):
        c.lambda_kd = 0.0
        model = build_movekd(c, vlm, Teachers({}))
        return WholeRun(c, tokenizer, model.to(c.device).eval(), None, None)
    names = c.teachers if c.lambda_kd else ("clip",)
    c = dataclasses.replace(c, teachers=names, weights=weights or c.weights)
    records = [] if c.llm else load_sets(c)["train"][0]
    sources, _ = pretrained_weights(c, records, tokenizer)
    teachers = build_teachers(c, sources).to(c.device)
    model = load_adapters(build_movekd(c, vlm, teachers), folder)
    start = build_movekd(c, start_vlm(c, tokenizer, sources, vlm), teachers)
    start.target_norms.load_state_dict(model.target_norms.state_dict())
    return WholeRun(c, tokenizer, model.to(c.device).eval(), start.to(c.device).eval(), teachers)


def load_adapters(model: MoVEKD, folder: Path) -> MoVEKD:
    """Fill the encoder adapters, and the statistics of their targets, from a run of ours."""
    tensors = read_run_tensors(folder)
    for part in ("adapters", "target_norms"):
        module = getattr(model, part)
        weights = {}
        for name in module:
            for key, tensor in tensors_below(tensors, f"{part}.{name}.").items():
                weights[f"{name}.{key}"] = tensor
        fill_module(module, weights, folder)
    return model


def start_vlm(c: Config, tokenizer, sources: dict, trained: VLM) -> VLM:
    """The VLM at step 0: the pretrained weights, or the run that it was started from.

    A real LLM is not loaded twice: the trained one stands in its place.
    """
    llm = trained.llm if c.llm else None
    vlm = build_vlm(c, tokenizer, sources, llm)
    if c.init_from and not c.llm:
        load_vlm(vlm, Path(c.init_from))
    elif c.init_from:
        vlm.student = load_student(c.init_from)[0]
    return vlm
