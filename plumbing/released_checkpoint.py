"""The authors' released weights: a LLaVA checkpoint whose vision tower carries the experts."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data import read_json
from model import VLM
from mole import ReleasedMoLE
from plumbing.cli import InputError
from plumbing.pretrained_llm import require_transformers

TOWER = "model.vision_tower.vision_tower.vision_model."  # their prefix of the student
BLOCK = {  # in a block: their name, ours
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.router": "mlp.router",
    "mlp.original_module.fc1": "mlp.ffn.fc1",
    "mlp.original_module.fc2": "mlp.ffn.fc2",
}


def released_files(folder: Path) -> list[Path]:
    """The files with weights. Raises InputError if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no *.safetensors; convert its pytorch_model*.bin with "
                         "safetensors first")
    return files


def released_config(folder: Path):
    """What the authors' checkpoint says of itself: (fields of our Config, its LLM's config).

    None if the folder holds no such checkpoint. Raises InputError.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "moe" not in config:
        return None
    moe = config["moe"]
    if moe.get("dense"):
        raise InputError(f"{folder / 'config.json'}: moe.dense is true: every token goes through "
                         "all experts; only argmax routing is built here")
    fields = {
        "clip": tower_spec(folder),
        "mole_rank": moe["moe_encoder_lora_rank"],
        "mole_alpha": float(moe["lora_alpha"]),
        "mole_experts": moe["num_experts"],
    }
    LlamaConfig = require_transformers().LlamaConfig
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures"}
    llm = LlamaConfig(**{key: value for key, value in config.items() if key in known})
    return fields, llm


def tower_spec(folder: Path) -> str:
    """The spec of the checkpoint's CLIP, read off its tensors' shapes."""
    shapes = {}
    for path in released_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.startswith(TOWER):
                    shapes[name.removeprefix(TOWER)] = file.get_slice(name).get_shape()
    tokens, d = shapes["embeddings.position_embedding.weight"]
    patch = shapes["embeddings.patch_embedding.weight"][-1]
    layers = [int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")]
    pixels = round((tokens - 1) ** 0.5) * patch
    heads = d // 64  # CLIP's heads are 64 wide
    return (f"vit_large_patch14_clip_quickgelu_336 img_size={pixels} patch_size={patch} "
            f"embed_dim={d} depth={1 + max(layers)} num_heads={heads}")


def load_released(vlm: VLM, folder: Path) -> None:
    """Fill student (mole_form "fc1_fc2"), projector and LLM from the authors' checkpoint.

    Strict both ways: every tensor of ours is filled, every tensor of theirs is used, or belongs to
    what is never run (the last block, the final norm, the position ids). Raises InputError.
    """
    theirs = {}
    for file in released_files(folder):
        theirs.update(load_file(file))
    try:
        ours = convert(theirs, vlm)
    except KeyError as missing:
        raise InputError(f"{folder}: has no tensor {missing.args[0]!r}; the authors' checkpoints "
                         "have") from None
    expected = vlm.state_dict()
    for name, tensor in ours.items():
        if name not in expected:
            raise InputError(f"{folder}: the tensor {name.removeprefix('llm.model.')!r} has no "
                             "place in the model")
        if expected[name].shape != tensor.shape:
            raise InputError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not "
                             f"{tuple(expected[name].shape)}")
    unfilled = [name for name in expected if name not in ours]
    if unfilled:
        raise InputError(f"{folder}: has nothing for {unfilled[0]}")
    vlm.load_state_dict(ours)


def convert(theirs: dict, vlm: VLM) -> dict[str, torch.Tensor]:
    """The tensors under our names, taken out of `theirs`. Raises KeyError for a missing one."""
    take = theirs.pop
    ours = {
        "student.net.cls_token": take(f"{TOWER}embeddings.class_embedding")[None, None],
        "student.net.pos_embed": take(f"{TOWER}embeddings.position_embedding.weight")[None],
        "student.net.patch_embed.proj.weight": take(f"{TOWER}embeddings.patch_embedding.weight"),
    }
    for kind in ("weight", "bias"):
        ours[f"student.net.norm_pre.{kind}"] = take(f"{TOWER}pre_layrnorm.{kind}")
        for i in (0, 2):
            ours[f"projector.{i}.{kind}"] = take(f"model.mm_projector.{i}.{kind}")
    blocks = vlm.student.net.blocks
    for i, block in enumerate(blocks):
        for name, tensor in convert_block(theirs, f"{TOWER}encoder.layers.{i}.", block.mlp).items():
            ours[f"student.net.blocks.{i}.{name}"] = tensor
    never_run = (f"{TOWER}encoder.layers.{len(blocks)}.", f"{TOWER}post_layernorm.",
                 f"{TOWER}embeddings.position_ids")
    for name, tensor in theirs.items():
        if not name.startswith(never_run):
            ours[f"llm.model.{name}"] = tensor
    return ours


def convert_block(theirs: dict, prefix: str, mole: ReleasedMoLE) -> dict[str, torch.Tensor]:
    """One block's tensors: q, k, v joined, the experts' LoRAs stacked."""
    take = theirs.pop
    ours = {}
    for kind in ("weight", "bias"):
        qkv = [take(f"{prefix}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
        ours[f"attn.qkv.{kind}"] = torch.cat(qkv)
        for name, our_name in BLOCK.items():
            ours[f"{our_name}.{kind}"] = take(f"{prefix}{name}.{kind}")
    experts = range(mole.router.out_features)
    for part in ("moe_down", "moe_up"):
        stem = f"{prefix}mlp.{part}"
        A = [take(f"{stem}.{e}.lora_A.weight") for e in experts]
        A_bias = [take(f"{stem}.{e}.lora_A.bias") for e in experts]
        B = [take(f"{stem}.{e}.lora_B.weight") for e in experts]
        B_bias = [take(f"{stem}.{e}.lora_B.bias") for e in experts]
        # the shapes tell which Linear the LoRA belongs to
        lora = "lora_fc1" if A[0].shape[1] == mole.ffn.fc1.in_features else "lora_fc2"
        ours[f"mlp.{lora}.down.weight"] = torch.cat(A)
        ours[f"mlp.{lora}.down.bias"] = torch.cat(A_bias)
        ours[f"mlp.{lora}.up.weight"] = torch.cat(B, dim=1)
        ours[f"mlp.{lora}.up_bias"] = torch.stack(B_bias)
    return ours
