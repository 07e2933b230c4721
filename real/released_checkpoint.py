"""The authors' released weights: a LLaVA checkpoint whose vision tower carries the experts."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from data import InputError
from model import VLM, Student
from mole import ReleasedMoLE
from plumbing.files import library_errors, load_strictly, read_json
from real.encoder_weights import unreadable
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
DEFAULTS = {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
BUILT = {**DEFAULTS, "moe_encoder": True, "moe_encoder_dense": False}  # all else is refused
# their encoder adapters lie in the checkpoint too; the VLM has no use for them
ADAPTER = re.compile(r"[a-z0-9]+_adapter_[12]\.")


class ReleasedTensors(dict):
    """The tensors of all shards of a folder, memory-mapped. Raises InputError if one is missing."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise InputError(f"{folder}: holds no *.safetensors and no pytorch_model*.bin")
        for file in files:
            with library_errors(lambda e, file=file: unreadable(file, e)):
                if file.suffix == ".bin":
                    self.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
                else:
                    self.update(load_file(file))

    def __missing__(self, name: str):
        raise InputError(f"{self.folder}: has no tensor {name!r}; the authors' checkpoints have")

    def take(self, name: str) -> torch.Tensor:
        """Remove a tensor and return it."""
        tensor = self[name]
        del self[name]
        return tensor


def released_config(folder: Path):
    """Return (fields of Config, the LLM's config) if a folder has the authors' checkpoint."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or "moe" not in config:
        return None
    try:
        values = {**DEFAULTS, **config, **config["moe"]}
        for key, expected in BUILT.items():
            if values[key] != expected:
                raise InputError(f"{path}: {key} is {json.dumps(values[key])}; only "
                                 f"{json.dumps(expected)} is built here")
        fields = {
            "clip": tower_spec(folder),
            "mole_rank": values["moe_encoder_lora_rank"],
            "mole_alpha": float(values["moe_encoder_lora_alpha"]),
            "mole_experts": values["moe_encoder_num_experts"],
        }
    except (KeyError, TypeError) as missing:
        raise InputError(f"{path}: its \"moe\" lacks {missing}; the authors' checkpoints have "
                         "moe_encoder, moe_encoder_dense, moe_encoder_lora_rank, "
                         "moe_encoder_lora_alpha and moe_encoder_num_experts") from None
    LlamaConfig = require_transformers().LlamaConfig
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures"}
    llama = {key: value for key, value in config.items() if key in known}
    llama["dtype"] = config.get("torch_dtype", config.get("dtype", "float32"))
    return fields, LlamaConfig(**llama)


def tower_spec(folder: Path) -> str:
    """Return the spec of the checkpoint's CLIP, read off its tensors' shapes. Raises InputError."""
    tensors = ReleasedTensors(folder)
    tokens, d = tensors[f"{TOWER}embeddings.position_embedding.weight"].shape
    patch = tensors[f"{TOWER}embeddings.patch_embedding.weight"].shape[-1]
    layers = [int(name.removeprefix(TOWER).split(".")[2]) for name in tensors
              if name.startswith(f"{TOWER}encoder.layers.")]
    pixels = round((tokens - 1) ** 0.5) * patch
    heads = d // 64  # CLIP's heads are 64 wide
    return (f"vit_large_patch14_clip_quickgelu_336 img_size={pixels} patch_size={patch} "
            f"embed_dim={d} depth={1 + max(layers)} num_heads={heads}")


def load_released(vlm: VLM, folder: Path) -> None:
    """Fill student (mole_form "fc1_fc2"), projector and LLM from the authors' checkpoint.

    Strict: every tensor of ours is filled, every one of theirs is used, or belongs to what does not
    run here (the last block, the final norm, the position ids, their adapters). Raises InputError.
    """
    load_strictly(vlm, read_released(vlm.student, folder), f"{folder}: does not fit the model")


def read_released(student: Student, folder: Path) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors under the VLM's names. Raises InputError."""
    theirs = ReleasedTensors(folder)
    take = theirs.take
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
        for name, tensor in block_tensors(theirs, i, block.mlp).items():
            ours[f"student.net.blocks.{i}.{name}"] = tensor
    never_run = (f"{TOWER}encoder.layers.{len(blocks)}.", f"{TOWER}post_layernorm.",
                 f"{TOWER}embeddings.position_ids")
    for name, tensor in theirs.items():
        if not name.startswith(never_run) and not ADAPTER.match(name):
            ours[f"llm.model.{name}"] = tensor
    return ours


def block_tensors(theirs: ReleasedTensors, i: int, mole: ReleasedMoLE) -> dict[str, torch.Tensor]:
    """Take block i's tensors: q, k, v are joined, the experts' LoRAs stacked."""
    prefix = f"{TOWER}encoder.layers.{i}."
    take = theirs.take
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
