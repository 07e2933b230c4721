"""The tensors of a finished run: read from its files, chosen by part, put into a module."""

from pathlib import Path

import torch
from torch import nn

from plumbing.cli import InputError
from tiny.tensor_files import read_tensors


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
