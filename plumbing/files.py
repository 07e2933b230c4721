"""Files: atomic writes, JSON, tensors with checksums, kinds of files; and torch's FLOP counter."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import InputError
from plumbing.signals import Stopped


@contextlib.contextmanager
def library_errors(line: Callable[[str], str]) -> Iterator[None]:
    """Raise InputError, the `line` of its reason, for any error that a library raises inside."""
    try:
        yield
    except (InputError, Stopped, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # which ones a library raises differs from version to version
        texts = [text.strip() for text in str(e).splitlines() if text.strip()]
        reason = " ".join(texts[:2] if texts and texts[0].endswith(":") else texts[:1])[:200]
        if " " not in reason:   # the key of a KeyError
            reason = f"{type(e).__name__}: {reason}".removesuffix(": ")
        raise InputError(line(reason)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as e:    # a full disk names no file
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a name of this process's own; delete files that processes now dead have left."""
    stem = f"{path.name}.{platform.node()}-"
    for leftover in path.parent.glob(f"{glob.escape(stem)}*.tmp"):
        process = leftover.name.removeprefix(stem).removesuffix(".tmp")
        if Path("/proc/self").exists() and not Path("/proc", process).exists():    # on Linux
            leftover.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}.tmp")


def require_writable(folder: Path, flag: str) -> None:
    """Make a folder. Raises InputError, which names the flag, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as e:
        raise InputError(f"{folder}: cannot be written: {e.strerror}; name another folder with "
                         f"{flag}") from None


def require_file(path: Path, remedy: str = "") -> None:
    """Raise InputError unless a path is a regular file: reading a pipe would wait forever."""
    if not path.is_file():
        fault = "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {fault}{remedy}")


def read_json(path: Path):
    """Return the value of a JSON file, or a list of those of JSON Lines. Raises InputError."""
    path = Path(path)
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")     # it may begin with a byte order mark
        return json.loads(text)
    except UnicodeDecodeError as e:
        fault = f"not UTF-8: {e}"
    except RecursionError:
        fault = "nested too deep"
    except json.JSONDecodeError as e:
        fault = str(e)
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    raise InputError(f"{path}: {kind_of(path) or f'not valid JSON: {fault}'}")


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically. Raises OSError."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# --- kinds of files that cannot be read here

PANDAS = ("python -c \"import pandas; "
          "pandas.read_{}('FILE').to_json('FILE.json', orient='records')\"")
KINDS = {  # the first bytes of a file, in latin-1, or the end of its name: its kind, and the remedy
    "version https://git-lfs": ("a git-lfs pointer, not the file itself", "git lfs pull"),
    "<!doctype html": ("a web page, perhaps of a login", "download the file itself"),
    "<html": ("a web page, perhaps of a login", "download the file itself"),
    "par1": ("parquet", PANDAS.format("parquet")),
    "arrow1": ("arrow", PANDAS.format("feather")),
    "\xff\xff\xff\xff": ("arrow", "python -c \"import datasets; "
                         "datasets.Dataset.from_file('FILE').to_json('FILE.json')\""),
    "\xff\xfe": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.json"),
    "\xfe\xff": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.json"),
    "\x1f\x8b": ("compressed", "gunzip FILE"),
    ".csv": ("a table", PANDAS.format("csv")),
    ".tsv": ("a table", PANDAS.format("table")),
    ".xlsx": ("a table", PANDAS.format("excel")),
    ".yaml": ("YAML", "python -c \"import json, yaml; "
                      "json.dump(yaml.safe_load(open('FILE')), open('FILE.json', 'w'))\""),
    "pk\3\4": ("a zip archive", "unzip FILE"),    # after .xlsx, which is one
}


def kind_of(path: Path) -> str:
    """Return "is KIND: REMEDY" for a file of a known kind that we do not read, else ""."""
    try:
        require_file(path)      # reading a pipe would wait
        with open(path, "rb") as file:
            head = file.read(256).decode("latin-1").lstrip("\xef\xbb\xbf \r\n").lower()
    except (OSError, ValueError, InputError):
        return ""
    name = path.name.lower().replace(".yml", ".yaml")
    for sign, (kind, remedy) in KINDS.items():
        is_it = name.endswith(sign) if sign[0] == "." else head.startswith(sign)
        if is_it and "/data.pkl" not in head:   # a zip archive of torch's own
            return f"is {kind}: {remedy.replace('FILE', str(path))}"
    return ""


# --- tensors: each one's checksum stands in the header of its file, and is copied with it

def checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **about: str | float) -> None:
    """Write a safetensors file atomically, with `about` in its header. Raises OSError."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
    """Return the `about` that write_tensors put in a file's header; {} if there is none."""
    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])
    except (SafetensorError, ValueError, OSError, TypeError, KeyError):
        return {}


def read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """Return a file's tensors. Raises InputError, with the remedy, if it is damaged or has NaN."""
    require_file(path, f"; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError, OSError) as e:
        raise InputError(f"{path}: damaged: {str(e).splitlines()[0]}; {remedy}") from None
    sums = read_about(path).get("crc32", {})
    for name, tensor in tensors.items():
        if name in sums and checksum(tensor) != sums[name]:
            raise InputError(f"{path}: damaged: {name} has changed since it was written; {remedy}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds nan or inf; {remedy}")
    return tensors


def load_strictly(module: nn.Module, tensors: dict, fault: str, remedy: str = "") -> None:
    """Fill a module; of tied tensors one name is enough. Raises InputError: fault and remedy."""
    names = list(module.named_parameters(remove_duplicate=False))
    stored = {p: tensors[name] for name, p in reversed(names) if name in tensors}
    tied = {name: stored[p] for name, p in names if p in stored}
    try:
        module.load_state_dict({**tied, **tensors})
    except RuntimeError as e:
        raise InputError(f"{fault}: {str(e).splitlines()[1].strip()[:200]}{remedy}") from None


# --- FLOPs: torch's counter takes the CPU's fused attention for 0, and before torch 2.14 it fails
# if keys have fewer heads than queries. Shapes: (B, h, T, d), of keys and values (B, h', T', d).

def flop_counter() -> FlopCounterMode:
    """Return a context that counts what runs inside it: `counter.get_total_flops()`."""
    def forward(q, k, v, *_, **__) -> int:          # q k^T, and its product with v
        B, h, T, d = q
        return 2 * B * h * T * k[2] * (d + v[3])

    def backward(grad, q, k, v, *_, **__) -> int:   # q k^T again, its gradient, those of q, k, v
        B, h, T, d = q
        return 2 * B * h * T * k[2] * (3 * d + 2 * v[3])

    mapping = {}
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention",
                 "cudnn_attention"):
        name = f"_scaled_dot_product_{kind}"
        mapping[getattr(torch.ops.aten, name)] = forward
        mapping[getattr(torch.ops.aten, f"{name}_backward")] = backward
    return FlopCounterMode(display=False, custom_mapping=mapping)
