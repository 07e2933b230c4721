"""LLaVA-1.5, in its own layout or Hugging Face's, and the authors' MoVE-KD: LLaVA with experts."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from data import InputError
from model import VLM, Student
from plumbing.files import library_errors, load_strictly, read_json
from real.encoder_weights import timm_tensors, unreadable
from real.pretrained_llm import require_transformers

PREFIXES = {  # theirs, in this order: ours; all else is the LLM's
    "model.vision_tower.vision_tower.vision_model.": "tower.",
    "vision_tower.vision_model.": "tower.", "vision_tower.": "tower.",
    "model.mm_projector.": "projector.",
    "multi_modal_projector.linear_1.": "projector.0.",
    "multi_modal_projector.linear_2.": "projector.2.",
    "language_model.": "llm.model.",
}
BUILT = {  # of a config.json, if it has them; all else is refused
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu", "moe_encoder": True, "moe_encoder_dense": False,
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu", "vision_hidden_act": "quick_gelu"}
# of no use here: the authors' encoder adapters, and tables that an old transformers saved
UNUSED = re.compile(r"llm\.model\.([a-z0-9]+_adapter_[12]\.|.*\.rotary_emb\.inv_freq)")


def read_file(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin or .safetensors file, renamed by PREFIXES. Raises InputError."""
    with library_errors(lambda e: unreadable(file, e)):
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    ours = {}
    for name, tensor in tensors.items():
        theirs = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        ours[PREFIXES.get(theirs, "llm.model.") + name.removeprefix(theirs)] = tensor
    return ours


def read_folder(folder: Path) -> tuple[dict, dict]:
    """Return CLIP's tensors, if any, under timm's names, and all others. Raises InputError."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder}: holds no *.safetensors and no pytorch_model*.bin")
    tower, others = {}, {}
    for file in files:
        for name, tensor in read_file(file).items():
            if name.startswith("tower."):
                tower[name] = tensor
            elif not UNUSED.match(name):
                others[name] = tensor
    with library_errors(lambda e: f"{folder}: CLIP's tensors are not all there ({e})"):
        return timm_tensors(tower), others


def released_config(folder: Path):
    """Return (fields of Config, the LLM's config) if a folder has such a checkpoint, else None."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or (
            "moe" not in config and config.get("model_type") not in ("llava", "llava_llama")):
        return None
    mole = {}
    with library_errors(lambda e: f"{path}: its \"moe\" is not as in the authors' ({e})"):
        values = {**config, **config.get("moe", {})}
        if "moe" in config:
            mole = {"mole_form": "fc1_fc2", "mole_rank": values["moe_encoder_lora_rank"],
                    "mole_alpha": float(values["moe_encoder_lora_alpha"]),
                    "mole_experts": values["moe_encoder_num_experts"]}
    values["vision_hidden_act"] = config.get("vision_config", {}).get("hidden_act", "quick_gelu")
    for key, expected in BUILT.items():
        if values.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {json.dumps(values[key])}; only "
                             f"{json.dumps(expected)} is built here")
    tower, _ = read_folder(folder)
    return {**tower_fields(tower), **mole}, llm_config(folder, config)


def llm_config(folder: Path, config: dict):
    """Return transformers' config of the LLM in a checkpoint."""
    dtype = config.get("torch_dtype", config.get("dtype", "float32"))
    if "text_config" in config:     # Hugging Face's layout
        llm = require_transformers().AutoConfig.from_pretrained(folder).text_config
        llm.dtype = getattr(torch, dtype)
        return llm
    LlamaConfig = require_transformers().LlamaConfig
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures"}
    llama = {key: value for key, value in config.items() if key in known}
    return LlamaConfig(**{**llama, "dtype": dtype})


def tower_fields(tower: dict) -> dict:
    """Return {"clip": the spec of CLIP}, whose heads are 64 wide; {} without it."""
    if not tower:
        return {}
    _, tokens, d = tower["pos_embed"].shape
    patch = tower["patch_embed.proj.weight"].shape[-1]
    layers = [int(name.split(".")[1]) for name in tower if name.startswith("blocks.")]
    pixels = round((tokens - 1) ** 0.5) * patch
    return {"clip": f"vit_large_patch14_clip_quickgelu_336 img_size={pixels} patch_size={patch} "
                    f"embed_dim={d} depth={1 + max(layers)} num_heads={d // 64}"}


def load_released(vlm: VLM, folder: Path) -> None:
    """Fill student, projector and LLM; CLIP, or experts, that a checkpoint lacks stay as they are.

    Else it is strict: every tensor of ours is filled, every one of theirs is used, or belongs to
    what does not run here (the last block, the final norm, UNUSED). Raises InputError.
    """
    fault = f"{folder}: does not fit the model with --clip {vlm.student.spec!r}"
    load_strictly(vlm, read_released(vlm.student, folder), fault)


def read_released(student: Student, folder: Path) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors under the VLM's names. Raises InputError."""
    tower, ours = read_folder(folder)
    routers = [name for name in tower if name.endswith(".mlp.router.weight")]
    with library_errors(lambda e: f"{folder}: its experts are not all there ({e})"):
        for router in routers:
            mlp = router.removesuffix(".router.weight")
            stack_experts(tower, f"{mlp}.moe_down", f"{mlp}.lora_fc1", len(tower[router]))
            stack_experts(tower, f"{mlp}.moe_up", f"{mlp}.lora_fc2", len(tower[router]))
    own = student.net.state_dict()
    for name, tensor in own.items():
        is_expert = ".router." in name or ".lora" in name
        if not tower or (is_expert and not routers):
            ours[f"student.net.{name}"] = tensor
    for name, tensor in tower.items():
        if name.startswith((f"blocks.{len(student.net.blocks)}.", "norm.")):
            continue    # they never run
        name = name.replace(".mlp.original_module.", ".mlp.ffn.")
        if name not in own:     # the experts are new
            name = name.replace(".mlp.fc", ".mlp.ffn.fc")
        ours[f"student.net.{name}"] = tensor
    return ours


def stack_experts(tower: dict, stem: str, lora: str, count: int) -> None:
    """Replace the LoRAs of all experts in one Linear by one that holds them, as ReleasedMoLE's."""
    def take(name: str) -> list[torch.Tensor]:
        return [tower.pop(f"{stem}.{e}.lora_{name}") for e in range(count)]

    tower[f"{lora}.down.weight"] = torch.cat(take("A.weight"))
    tower[f"{lora}.down.bias"] = torch.cat(take("A.bias"))
    tower[f"{lora}.up.weight"] = torch.cat(take("B.weight"), dim=1)
    tower[f"{lora}.up_bias"] = torch.stack(take("B.bias"))


def load_projector(projector: nn.Module, file: Path) -> None:
    """Fill the projector from LLaVA's mm_projector.bin, strictly. Raises InputError."""
    tensors = {name.removeprefix("projector."): tensor for name, tensor in read_file(file).items()}
    load_strictly(projector, tensors, f"{file}: does not fit the projector")
