"""Pretrained weights of the encoders: a file in timm's or another known layout, or timm's hub."""

import functools
import os
import pickle
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import timm
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn

from data import InputError
from teachers import create_net, parse_spec

HUB = "hub"  # in place of a file: the weights that timm's hub has under the name
ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def find_weights(spec: str, folder: str) -> Path | str:
    """Return where a spec's weights are: a file of `folder` named like the model, else HUB."""
    name, *_ = parse_spec(spec)
    for ending in ENDINGS if folder else ():
        file = Path(folder) / (name + ending)
        if file.exists():
            return file
    return HUB


def load_net(spec: str, source: Path | str | None) -> nn.Module:
    """Return the timm model of a spec with the weights of a file or of the HUB; None: random ones.

    Raises InputError if they cannot be had.
    """
    if source != HUB:
        net = create_net(spec)
        if source is not None:
            fill_net(net, source)
        return net
    ask_hub()
    try:
        return create_net(spec, pretrained=True)
    except (OSError, RuntimeError, ValueError) as e:
        name, *_ = parse_spec(spec)
        repository = timm.get_pretrained_cfg(name).hf_hub_id or "timm"
        raise InputError(f"{name}: the hub gives no weights ({type(e).__name__}); save "
                         f"model.safetensors of https://huggingface.co/{repository} as "
                         f"{name}.safetensors in a folder and name it with --weights") from None


def fill_net(net: nn.Module, file: Path) -> None:
    """Fill a timm model from a file, in timm's layout or one that timm converts (OpenAI's, ...).

    Position tables and patch embeddings are resized to the model. It is strict, because timm itself
    only warns when a file fits nowhere. Raises InputError.
    """
    try:
        state = timm.models.load_state_dict(str(file), weights_only=True)
        module = sys.modules[type(net).__module__]
        if hasattr(module, "checkpoint_filter_fn"):
            state = module.checkpoint_filter_fn(state, net)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError,
            pickle.UnpicklingError) as e:
        raise InputError(f"{file}: not readable as weights of {type(net).__name__} "
                         f"({type(e).__name__})") from None

    # the file's classifier is of no use here
    heads = net.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    prefixes = tuple(head + "." for head in heads)
    own = net.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(prefixes)}
    load_strictly(net, state, f"{file}: does not fit {net.pretrained_cfg.get('architecture')}")


def load_strictly(module: nn.Module, state: dict, fault: str) -> None:
    """Fill a module. Raises InputError, `fault` and the first tensor that does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        raise InputError(f"{fault}: {str(e).splitlines()[1].strip()[:200]}") from None


@functools.cache
def ask_hub() -> None:
    """Let the hub's tools look in their cache only if the hub cannot be reached.

    Otherwise they would try for minutes. Behind a proxy (HTTPS_PROXY, ALL_PROXY, without NO_PROXY)
    the hub's name need not resolve on this machine.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    proxies = getproxies()
    if ("https" in proxies or "all" in proxies) and not proxy_bypass(host):
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
