"""The authors' released weights: a LLaVA checkpoint whose vision tower carries the experts."""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import InputError
from model import VLM, Student
from mole import ReleasedMoLE
from plumbing.files import read_json
from real.pretrained_llm import require_transformers

TOWER = "model.vision_tower.vision_tower.vision_model."  # their prefix of the student
BLOCK = {  # in a block: their name, ours
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.router": "mlp.router",
    "mlp.original_module.fc1": "mlp.ffn.fc1",
    "mlp.original_module.fc2": "mlp.ffn.fc2",
}


# their encoder adapters lie in the checkpoint too; the VLM has no use for them
ADAPTER = re.compile(r"[a-z0-9]+_adapter_[12]\.")


def weight_files(folder: Path) -> list[Path]:
    """The shards: *.safetensors, or pytorch_model*.bin. Raises InputError if there are none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder}: holds no *.safetensors and no pytorch_model*.bin")
    return files


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one shard, memory-mapped. Raises InputError if it cannot be read."""
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with safe_open(file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        raise InputError(f"{file}: not readable as weights ({type(e).__name__})") from None


def released_config(folder: Path):
    """What the authors' checkpoint says of itself: (fields of our Config, its LLM's config).

    None if the folder holds no such checkpoint. Raises InputError.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or "moe" not in config:
        return None
    moe = config["moe"]
    try:
        if moe["moe_encoder_dense"]:
            raise InputError(f"{path}: moe_encoder_dense is true: every token goes through all "
                             "experts; only argmax routing is built here")
        if not moe["moe_encoder"]:
            raise InputError(f"{path}: moe_encoder is false: the checkpoint has no experts")
        fields = {
            "clip": tower_spec(folder),
            "mole_rank": moe["moe_encoder_lora_rank"],
            "mole_alpha": float(moe["moe_encoder_lora_alpha"]),
            "mole_experts": moe["moe_encoder_num_experts"],
        }
    except (KeyError, TypeError) as missing:
        raise InputError(f"{path}: its \"moe\" lacks {missing}; the authors' checkpoints have "
                         "moe_encoder, moe_encoder_dense, moe_encoder_lora_rank, "
                         "moe_encoder_lora_alpha and moe_encoder_num_experts") from None
    for key, expected in (("mm_vision_select_layer", -2), ("mm_projector_type", "mlp2x_gelu")):
        if config.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {config[key]!r}; only {expected!r} is built here")
    LlamaConfig = require_transformers().LlamaConfig
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures"}
    llama = {key: value for key, value in config.items() if key in known}
    llama["dtype"] = config.get("torch_dtype", config.get("dtype", "float32"))
    return fields, LlamaConfig(**llama)


def tower_spec(folder: Path) -> str:
    """The spec of the checkpoint's CLIP, read off its tensors' shapes. Raises InputError."""
    shapes = {}
    for file in weight_files(folder):
        for name, tensor in read_shard(file).items():
            if name.startswith(TOWER):
                shapes[name.removeprefix(TOWER)] = tensor.shape
    for name in ("embeddings.position_embedding.weight", "embeddings.patch_embedding.weight"):
        if name not in shapes:
            raise InputError(f"{folder}: has no tensor {TOWER + name!r}; the authors' checkpoints "
                             "have")
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
    what is not run here (the last block, the final norm, the position ids, their adapters). Raises
    InputError.
    """
    ours = read_released(vlm.student, folder)
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


def read_released(student: Student, folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the VLM's names. Raises InputError for a missing one."""
    theirs = {}
    for file in weight_files(folder):
        theirs.update(read_shard(file))
    try:
        return convert(theirs, student)
    except KeyError as missing:
        raise InputError(f"{folder}: has no tensor {missing.args[0]!r}; the authors' checkpoints "
                         "have") from None


def convert(theirs: dict, student: Student) -> dict[str, torch.Tensor]:
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
    blocks = student.net.blocks
    for i, block in enumerate(blocks):
        for name, tensor in convert_block(theirs, f"{TOWER}encoder.layers.{i}.", block.mlp).items():
            ours[f"student.net.blocks.{i}.{name}"] = tensor
    never_run = (f"{TOWER}encoder.layers.{len(blocks)}.", f"{TOWER}post_layernorm.",
                 f"{TOWER}embeddings.position_ids")
    for name, tensor in theirs.items():
        if not name.startswith(never_run) and not ADAPTER.match(name):
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
    for part, lora in (("moe_down", "lora_fc1"), ("moe_up", "lora_fc2")):
        stem = f"{prefix}mlp.{part}"
        A = [take(f"{stem}.{e}.lora_A.weight") for e in experts]
        A_bias = [take(f"{stem}.{e}.lora_A.bias") for e in experts]
        B = [take(f"{stem}.{e}.lora_B.weight") for e in experts]
        B_bias = [take(f"{stem}.{e}.lora_B.bias") for e in experts]
        ours[f"mlp.{lora}.down.weight"] = torch.cat(A)
        ours[f"mlp.{lora}.down.bias"] = torch.cat(A_bias)
        ours[f"mlp.{lora}.up.weight"] = torch.cat(B, dim=1)
        ours[f"mlp.{lora}.up_bias"] = torch.stack(B_bias)
    return ours
