"""The model of a finished run: written when training ends, and read again to be used."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from data import write_json
from model import VLM, MoVEKD
from plumbing.build import build_vlm, find_device, read_words
from plumbing.checkpoints import check_parameters
from plumbing.cli import InputError
from plumbing.config import FULL, Config, recipe
from plumbing.flags import load_config
from plumbing.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from plumbing.released_checkpoint import load_released, released_config
from plumbing.run_weights import fill_module, read_run_tensors, tensors_below
from plumbing.sharding import cast_vlm, full_state
from plumbing.teacher_cache import digest
from tiny.llm import WordTokenizer
from tiny.tensor_files import write_tensors


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
