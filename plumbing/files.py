"""Files: JSON, tensors with checksums, names for what is not whole yet; and torch's FLOP counter.

The lowest floor of the folders: tiny/, real/ and the rest of plumbing/ stand on it.
"""

import glob
import hashlib
import json
import os
import platform
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data import InputError

# ------------------------------------------------------------------------------------------------
# JSON


def read_json(path: Path):
    """The value of a JSON file, or the list of the values of a JSON Lines file.

    It is UTF-8 whatever the locale, with a byte order mark or without. Raises InputError if it is
    missing, unreadable or not JSON.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        fault = "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {fault}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not valid JSON: not UTF-8: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{path}: not valid JSON: nested too deep") from None
    except json.JSONDecodeError as e:
        fault = e
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        return [json.loads(line) for line in lines]
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{path}: not valid JSON: {fault}") from None


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from None  # a full disk names no file
    temporary.replace(path)


def digest(*texts: str) -> str:
    """A hash of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Tensors on disk: written whole, and read only if they are as they were written. Every tensor's
# checksum stands in the file's own header, so it moves and is copied with the file.


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy())


def temporary_name(path: Path) -> Path:
    """A name of this process's own for a file that is not whole yet: two runs may write it at once.

    What a process of this machine has left under such a name, and is dead, is deleted.
    """
    stem = f"{path.name}.{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(stem)}*.tmp"):
        process = left.name.removeprefix(stem).removesuffix(".tmp")
        if process.isdigit() and not is_alive(int(process)):
            left.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}.tmp")


def is_alive(process: int) -> bool:
    """Whether there is such a process; on Windows, where asking would end it, yes."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **about: str | float) -> None:
    """A safetensors file, which appears under its name when it is whole. Raises OSError.

    `about`, what is to be known of it, stands in its header beside the checksums: one text, for
    safetensors keeps no order of several.
    """
    copies = {}
    for name, tensor in tensors.items():  # tied weights share memory, which no file can hold
        copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    about["crc32"] = {name: checksum(tensor) for name, tensor in copies.items()}
    temporary = temporary_name(path)
    try:
        save_file(copies, temporary, metadata={"about": json.dumps(about)})
    except SafetensorError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(0, f"cannot be written: {e}", str(path)) from None
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # as any other file: the library makes it private
    temporary.replace(path)


def read_about(path: Path) -> dict:
    """What the header of a file says of it; nothing if there is none to read."""
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, ValueError, OSError):
        return {}


def read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a file.

    Raises InputError, which ends with the remedy, if it is no regular file, is cut, is not what was
    written (a file of an older version has no checksums to tell), or holds nan or inf.
    """
    if not path.is_file():
        fault = "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {fault}; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as e:
        raise InputError(f"{path}: damaged: {str(e).splitlines()[0]}; {remedy}") from None
    sums = read_about(path).get("crc32", {})
    for name, tensor in tensors.items():
        if name in sums and checksum(tensor) != sums[name]:
            raise InputError(f"{path}: damaged: {name} has changed since it was written; {remedy}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds nan or inf; {remedy}")
    return tensors


# ------------------------------------------------------------------------------------------------
# FLOPs: torch's counter takes the CPU's fused attention for 0, and before torch 2.14 it fails where
# keys have fewer heads than queries.

FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def _as_many_heads(shape, q) -> tuple:
    """The shape of keys or values, (B, heads, T, width), with the heads of the queries."""
    return shape[0], q[1], *shape[2:]


def _forward(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q, _as_many_heads(k, q), _as_many_heads(v, q))


def _backward(grad, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, _as_many_heads(k, q), _as_many_heads(v, q))


def flop_counter() -> FlopCounterMode:
    """A context that counts the FLOPs of what runs inside it: `counter.get_total_flops()`."""
    aten = torch.ops.aten
    mapping = {}
    for name in FUSED:
        mapping[getattr(aten, f"_scaled_dot_product_{name}")] = _forward
        mapping[getattr(aten, f"_scaled_dot_product_{name}_backward")] = _backward
    mapping[aten._scaled_dot_product_attention_math_for_mps] = _forward  # Apple's, without backward
    return FlopCounterMode(display=False, custom_mapping=mapping)
