"""Files: atomic writes, JSON, tensors with checksums; and torch's FLOP counter."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from data import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; when the block ends, it replaces `path`.

    A reader sees the old file or the new one, never half of one. If the block fails, the old file
    stays. Raises OSError that names `path`: a full disk names no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a name that only this process uses, so that two runs may write a file at once.

    Deletes what ended processes of this machine left under such names.
    """
    stem = f"{path.name}.{platform.node()}-"
    for leftover in path.parent.glob(f"{glob.escape(stem)}*.tmp"):
        process = leftover.name.removeprefix(stem).removesuffix(".tmp")
        if process.isdigit() and not is_alive(int(process)):
            leftover.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}.tmp")


def is_alive(process: int) -> bool:
    """Return whether a process exists; on Windows, where asking would end it, True."""
    try:
        if os.name != "nt":
            os.kill(process, 0)
    except OSError as e:
        return isinstance(e, PermissionError)  # another user's process
    return True


def require_file(path: Path, remedy: str = "") -> None:
    """Raise InputError unless a path is a regular file: reading a pipe would wait forever."""
    if not path.is_file():
        fault = "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {fault}{remedy}")


# --- JSON: UTF-8 whatever the locale

def read_json(path: Path):
    """Return the value of a JSON file, or a list of the values of a JSON Lines file.

    It may begin with a byte order mark. Raises InputError if it is missing or not JSON.
    """
    path = Path(path)
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text)
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not valid JSON: not UTF-8: {e}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid JSON: nested too deep") from None
    except json.JSONDecodeError as e:
        fault = e
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{path}: not valid JSON: {fault}") from None


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically. Raises OSError."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(*texts: str) -> str:
    """Return a hash of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# --- tensors: each one's checksum stands in the header of its file, and is copied with it

def checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **about: str | float) -> None:
    """Write a safetensors file atomically, with `about` in its header. Raises OSError."""
    copies = {}
    for name, tensor in tensors.items():  # tied weights share memory, which no file can hold
        copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    about["crc32"] = {name: checksum(tensor) for name, tensor in copies.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # any other file's: safetensors makes its own private
        try:  # one text, because safetensors keeps no order of several
            save_file(copies, temporary, metadata={"about": json.dumps(about)})
        except SafetensorError as e:
            raise OSError(0, f"cannot be written: {e}") from None
        temporary.chmod(mode)


def read_about(path: Path) -> dict:
    """Return what write_tensors was told about a file; {} if it has no such header."""
    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])
    except (SafetensorError, ValueError, OSError, TypeError, KeyError):
        return {}


def read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file.

    Raises InputError, which ends with the remedy, if it is missing, is cut, has changed since it
    was written, or holds a value that is NaN or infinite.
    """
    require_file(path, f"; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, OSError) as e:
        raise InputError(f"{path}: damaged: {str(e).splitlines()[0]}; {remedy}") from None
    sums = read_about(path).get("crc32", {})
    for name, tensor in tensors.items():
        if name in sums and checksum(tensor) != sums[name]:
            raise InputError(f"{path}: damaged: {name} has changed since it was written; {remedy}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds nan or inf; {remedy}")
    return tensors


# --- FLOPs: torch's counter takes the CPU's fused attention for 0, and before torch 2.14 it fails
# if keys have fewer heads than queries. Shapes: (B, h, T, d), of keys and values (B, h', T', d).

def _forward(q, k, v, *_, **__) -> int:
    """Return the FLOPs of q k^T and of its product with v."""
    B, h, T, d = q
    return 2 * B * h * T * k[2] * (d + v[3])


def _backward(grad, q, k, v, *_, **__) -> int:
    """Return the FLOPs of q k^T again, of its gradient, and of those of q, k and v."""
    B, h, T, d = q
    return 2 * B * h * T * k[2] * (3 * d + 2 * v[3])


def flop_counter() -> FlopCounterMode:
    """Return a context that counts what runs inside it: `counter.get_total_flops()`."""
    mapping = {}
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention",
                 "cudnn_attention"):
        name = f"_scaled_dot_product_{kind}"
        mapping[getattr(torch.ops.aten, name)] = _forward
        mapping[getattr(torch.ops.aten, f"{name}_backward")] = _backward
    return FlopCounterMode(display=False, custom_mapping=mapping)
