"""Pretrained weights of the encoders: a file in timm's or another known layout, or timm's hub."""

import functools
import os
import re
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import timm
import torch
from huggingface_hub import constants
from torch import nn

from data import InputError
from plumbing.files import kind_of, library_errors, load_strictly
from teachers import create_net, parse_spec

HUB = "hub"  # in place of a file: the weights that timm's hub has under the name
ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
LAYOUTS = {  # how a name ends that only this layout has: {part of a name: timm's}, in this order
    "pre_layrnorm.weight": {    # CLIP; q, k and v are joined
        "embeddings.position_embedding.weight": "pos_embed", "pre_layrnorm": "norm_pre",
        "embeddings.patch_embedding": "patch_embed.proj", "self_attn.out_proj": "attn.proj",
        "embeddings.class_embedding": "cls_token", "self_attn.q_proj": "attn.qkv",
        "post_layernorm": "norm", "encoder.layers.": "blocks.", "layer_norm": "norm"},
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


def find_weights(spec: str, folder: str) -> Path | str:
    """Return a spec's file in `folder`, named like the model; HUB for "". Raises InputError."""
    if not folder:
        return HUB
    name, *_ = parse_spec(spec)
    for ending in ENDINGS:
        file = Path(folder) / (name + ending)
        if file.exists():
            return file
    fault = "has no" if Path(folder).is_dir() else "no such folder; it must have"
    raise InputError(f"--weights {folder}: {fault} {name}.safetensors (or .pth, .pt, .bin); "
                     f"{timms_file(name)}")


def timms_file(name: str) -> str:
    """Return what to do for want of an encoder's file. The models of stage 0 have no tag."""
    if "." not in name:
        return "delete it, and it is made again"
    repository = timm.get_pretrained_cfg(name).hf_hub_id or "timm"
    return (f"save model.safetensors of https://huggingface.co/{repository} as {name}.safetensors "
            "in a folder and name it with --weights")


def load_net(spec: str, source: Path | str | None) -> nn.Module:
    """Build a spec's timm model, with weights of a file or the HUB if named. Raises InputError."""
    name, *_ = parse_spec(spec)
    if source != HUB:
        net = create_net(spec)
        if source is not None:
            fill_net(net, source, timms_file(name))
        return net
    ask_hub()
    with library_errors(lambda e: f"{name}: the hub gives no weights ({e}); {timms_file(name)}"):
        return create_net(spec, pretrained=True)


def unreadable(file: Path, reason: str) -> str:
    """Return the error for a file that does not hold weights, without its remedy."""
    if "TorchScript" in reason:     # OpenAI's CLIP; it holds code
        return (f"{file}: not readable: a TorchScript archive; if you trust it: python -c \"import "
                f"torch; torch.save(torch.jit.load('{file}', 'cpu').state_dict(), "
                f"'{file.with_suffix('.pth')}')\"")
    return f"{file}: not readable as weights: {kind_of(file) or reason}"


def timm_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Hugging Face's CLIP, SAM or ConvNeXt under timm's names, without a text model.

    Tensors of any other layout come back as they are.
    """
    for ending, names in LAYOUTS.items():
        for name in tensors:
            if name.endswith(ending):
                return rename(tensors, name.removesuffix(ending), names)
    return tensors


def rename(tensors: dict, prefix: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors behind a prefix under timm's names, q, k and v joined."""
    ours = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or re.search(r"\.([kv]_proj\.|position_ids)", name):
            continue
        if ".q_proj." in name:
            others = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "kv"]
            tensor = torch.cat([tensor, *others])
        name = name.removeprefix(prefix)
        for theirs, timms in names.items():
            name = name.replace(theirs, timms)
        if name in ("cls_token", "pos_embed") and tensor.ndim < 3:  # CLIP's: (d,), (1 + n, d)
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        ours[name] = tensor
    return ours


def fill_net(net: nn.Module, file: Path, remedy: str) -> None:
    """Fill a timm model from a file, in timm's layout or Hugging Face's, or one that timm converts.

    Position tables and patch embeddings are resized to the model. It is strict, because timm itself
    only warns when a file fits nowhere. Raises InputError with the remedy.
    """
    with library_errors(lambda e: f"{unreadable(file, e)}; {remedy}"):
        state = timm.models.load_state_dict(str(file), weights_only=True)
    fault = (f"{file}: does not fit {net.pretrained_cfg.get('architecture')} of timm; its first "
             f"tensor is {next(iter(state), 'missing')!r}")
    with library_errors(lambda e: f"{fault}: {e}; {remedy}"):
        state = timm_tensors(state)
        module = sys.modules[type(net).__module__]
        if hasattr(module, "checkpoint_filter_fn"):
            state = module.checkpoint_filter_fn(state, net)

    # the file's classifier is of no use here
    heads = net.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    prefixes = tuple(head + "." for head in heads)
    own = net.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(prefixes)}
    load_strictly(net, state, fault, f"; {remedy}")


@functools.cache
def ask_hub() -> None:
    """Let the hub's tools use their cache alone if it is out of reach: they retry for minutes."""
    host = urlsplit(constants.ENDPOINT).hostname
    # behind a proxy (HTTPS_PROXY, ALL_PROXY, without NO_PROXY) its name need not resolve here
    proxies = getproxies()
    if ("https" in proxies or "all" in proxies) and not proxy_bypass(host):
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
