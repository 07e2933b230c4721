"""Tensors on disk: written whole, and read only if they are as they were written.

Every tensor's checksum stands in the file's own header, so it moves and is copied with the file.
"""

import glob
import json
import os
import platform
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import DataError


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

    Raises DataError, which ends with the remedy, if it is no regular file, is cut, is not what was
    written (a file of an older version has no checksums to tell), or holds nan or inf.
    """
    if not path.is_file():
        fault = "is no regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {fault}; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as e:
        raise DataError(f"{path}: damaged: {str(e).splitlines()[0]}; {remedy}") from None
    sums = read_about(path).get("crc32", {})
    for name, tensor in tensors.items():
        if name in sums and checksum(tensor) != sums[name]:
            raise DataError(f"{path}: damaged: {name} has changed since it was written; {remedy}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{path}: {name} holds nan or inf; {remedy}")
    return tensors
