"""Other libraries' files of an encoder: Hugging Face's names, and OpenAI's TorchScript archive."""

import pickle
import zipfile
from pathlib import Path

import torch

LAYOUTS = {  # how a name ends that only this layout has: {part of a name: timm's}, in this order
    "pre_layrnorm.weight": {    # CLIP; q, k and v are joined
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj", "pre_layrnorm": "norm_pre",
        "post_layernorm": "norm", "encoder.layers.": "blocks.", "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj", "self_attn.q_proj": "attn.qkv"},
    "patch_embed.projection.weight": {  # SAM
        "patch_embed.projection": "patch_embed.proj", "layers.": "blocks.", "mlp.lin": "mlp.fc",
        "neck.conv1": "neck.0", "neck.layer_norm1": "neck.1", "neck.conv2": "neck.2",
        "neck.layer_norm2": "neck.3", "layer_norm": "norm"},
    "embeddings.patch_embeddings.weight": {  # ConvNeXt
        "embeddings.patch_embeddings": "stem.0", "embeddings.layernorm": "stem.1",
        "encoder.stages.": "stages.", "downsampling_layer.": "downsample.",
        ".layers.": ".blocks.", "layer_scale_parameter": "gamma", "dwconv": "conv_dw",
        "layernorm": "norm", "pwconv": "mlp.fc"},
}


def timm_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the encoder in a file of Hugging Face's CLIP, SAM or ConvNeXt under timm's names.

    What stands outside of the encoder's prefix, as CLIP's text model, is left out. Tensors of any
    other layout come back as they are.
    """
    for ending, names in LAYOUTS.items():
        for name in tensors:
            if name.endswith(ending):
                return rename(tensors, name.removesuffix(ending), names)
    return tensors


def rename(tensors: dict, prefix: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors behind a prefix under timm's names."""
    ours = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or name.endswith("position_ids"):
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue    # joined with q
        if ".q_proj." in name:
            others = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "kv"]
            tensor = torch.cat([tensor, *others])
        name = name.removeprefix(prefix)
        for theirs, timms in names.items():
            name = name.replace(theirs, timms)
        if name in ("cls_token", "pos_embed"):  # CLIP's (d,), (1 + n, d); SAM's has 4 dimensions
            tensor = tensor.reshape(1, -1, tensor.shape[-1]) if tensor.ndim < 3 else tensor
        ours[name] = tensor
    return ours


# --- TorchScript: a zip archive whose data.pkl holds the modules, as objects with attributes

DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64}


def is_torchscript(file: Path) -> bool:
    """Return whether a file is a TorchScript archive, which torch.load cannot read safely."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class Module:
    """Stands for every class and function that an archive names: it does nothing."""

    def __init__(self, *_):
        pass


class TensorsOnly(pickle.Unpickler):
    """Reads an archive's data.pkl. Nothing that it names is imported or called."""

    def __init__(self, archive: zipfile.ZipFile, pickled: str):
        super().__init__(archive.open(pickled))
        self.archive = archive
        self.folder = pickled.removesuffix("data.pkl") + "data"

    def find_class(self, module: str, name: str):
        def view(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_):
            return storage.as_strided(size, stride, offset)

        return view if name == "_rebuild_tensor_v2" else DTYPES.get(name, Module)

    def persistent_load(self, about: tuple) -> torch.Tensor:
        _, dtype, key, *_ = about
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/{key}")), dtype=dtype)


def read_torchscript(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive by name, and run nothing of it."""
    with zipfile.ZipFile(file) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        modules = {"": TensorsOnly(archive, pickled).load()}
    tensors = {}
    while modules:
        prefix, module = modules.popitem()
        for name, value in vars(module).items():
            if isinstance(value, Module):
                modules[f"{prefix}{name}."] = value
            elif torch.is_tensor(value):
                tensors[prefix + name] = value
    return tensors
