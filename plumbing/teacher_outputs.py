"""The teachers' outputs for a fixed set of images, computed once and kept on disk."""

import hashlib
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import InputError, stack_images, to_device
from plumbing.files import digest, read_json, temporary_name, write_json
from real.records import images_of
from teachers import ChannelNorm, TeacherOutput, Teachers, VisionEncoder


def weights_digest(module: nn.Module) -> str:
    """A hash of every tensor's name and bytes."""
    h = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().cpu().contiguous()
        h.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


class TeacherCache:
    """One teacher's outputs for all training images, in memory-mapped fp16 files.

    Several epochs, arms or seeds share them, and a batch reads only its own rows. The numbers are
    the uncached ones rounded to fp16.

    The file name is made of what was asked for: teacher, its spec with the resolution, its weights,
    the images' `source`, names and size. So runs whose teachers are trained otherwise have files of
    their own. Images that have changed under the same names (their `fingerprint`) make it stale,
    which is an InputError. The .json is written last: with it the cache is complete.
    """

    def __init__(self, folder: Path, name: str, encoder: VisionEncoder, images: list[str],
                 get_image: Callable, source: str, fingerprint: str, batch: int = 64):
        self.rows = {image: i for i, image in enumerate(images)}
        first = get_image(images[0])
        # a view from the original is another than one from the loader's image
        R = f"own {encoder.image_size}" if isinstance(first, dict) else first.shape[-1]
        weights = weights_digest(encoder)
        key = digest("rows", encoder.spec, weights, str(R), source, *images)[:12]
        made_of = {"teacher": encoder.spec, "pixels": R, "images": fingerprint, "weights": weights}
        meta = folder / f"{name}-{encoder.image_size}px-{key}.json"
        paths = {part: meta.with_suffix(f".{part}.npy")
                 for part in (*TeacherOutput._fields, "crc32")}
        remedy = f"delete {meta.with_suffix('')}.*, and it is made again"
        if meta.exists():
            found = read_json(meta)
            if not isinstance(found, dict) or found.keys() != {"made_of", "fields"}:
                raise InputError(f"{meta}: damaged; {remedy}")
            changed = [k for k in made_of if found["made_of"].get(k) != made_of[k]]
            if changed:
                raise InputError(f"{meta}: stale, its {changed[0]} have changed since it was made; "
                                 f"delete {meta.with_suffix('')}.* or give --cache-teachers "
                                 "another folder")
            fields = found["fields"]
        else:
            fields = write_outputs(paths, encoder, images, get_image, batch)
            write_json(meta, {"made_of": made_of, "fields": fields})
        self.arrays = {}
        for field in fields:
            self.arrays[field] = open_array(paths[field], len(images), np.float16, remedy)
        self.sums = open_array(paths["crc32"], len(images), np.uint32, remedy)
        self.name = name
        self.remedy = remedy

    def read(self, images: list[str | None], device: torch.device) -> TeacherOutput:
        """The outputs for images by name. A stand-in, None, gets any: it counts for nothing.

        Raises InputError for a row that is not as it was written.
        """
        rows = [self.rows[image] if image else 0 for image in images]
        found = {field: array[rows] for field, array in self.arrays.items()}
        for row, sums in zip(rows, row_checksums(found)):
            if sums != self.sums[row]:
                raise InputError(f"the cache of teacher {self.name}: row {row} has changed since "
                                 f"it was written; {self.remedy}")
        fields = dict.fromkeys(TeacherOutput._fields)
        for field, values in found.items():
            fields[field] = torch.from_numpy(values).to(device).float()
        return TeacherOutput(**fields)


def row_checksums(arrays: dict[str, np.ndarray]) -> list[int]:
    """CRC-32 of each row (an image's outputs), over all fields."""
    rows = len(next(iter(arrays.values())))
    sums = []
    for row in range(rows):
        crc = 0
        for name in sorted(arrays):
            crc = zlib.crc32(arrays[name][row], crc)
        sums.append(crc)
    return sums


def open_array(path: Path, rows: int, dtype: type, remedy: str) -> np.ndarray:
    """A memory-mapped .npy file. Raises InputError if it is not what was written."""
    if not path.is_file():
        raise InputError(f"{path}: is missing, or no regular file; {remedy}")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as e:
        raise InputError(f"{path}: damaged: {str(e).splitlines()[0]}; {remedy}") from None
    if len(array) != rows or array.dtype != dtype:
        raise InputError(f"{path}: damaged: holds {array.dtype} {array.shape}; {remedy}")
    return array


def new_array(path: Path, dtype: type, shape: tuple) -> np.memmap:
    """A memory-mapped .npy file with room for all its rows.

    Its place on the disk is taken now: a mapped file for which there is none later ends the process
    without a word. Raises InputError if there is none.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
              "shape": shape}
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            file.flush()
            if hasattr(os, "posix_fallocate"):  # Linux
                os.posix_fallocate(file.fileno(), start, size)
            else:
                file.truncate(start + size)
    except OSError as e:
        raise InputError(f"{path.parent}: no room for the teachers' cache, {size:,} bytes: "
                         f"{e.strerror}; make room, or give --cache-teachers '' or another folder"
                         ) from None
    return np.load(path, mmap_mode="r+")


def write_outputs(paths: dict[str, Path], encoder: VisionEncoder, images: list[str],
                  get_image: Callable, batch: int) -> list[str]:
    """Run the encoder over all images; returns the fields it gives.

    Files appear under their names only when they are complete, and nothing of them stays if it
    fails. Raises InputError for an output that is no number in fp16, and for a full disk.
    """
    paths["tokens"].parent.mkdir(parents=True, exist_ok=True)
    temporary = {part: temporary_name(path) for part, path in paths.items()}
    try:
        parts = run_encoder(temporary, encoder, images, get_image, batch)
        for part in parts:
            temporary[part].replace(paths[part])
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
    return [part for part in parts if part != "crc32"]


def run_encoder(files: dict[str, Path], encoder: VisionEncoder, images: list[str],
                get_image: Callable, batch: int) -> list[str]:
    """Write the encoder's fields for all images, and each row's checksum; returns their names."""
    arrays = {"crc32": new_array(files["crc32"], np.uint32, (len(images),))}
    try:
        fill_arrays(arrays, files, encoder, images, get_image, batch)
        for array in arrays.values():
            array.flush()
        return list(arrays)
    finally:
        arrays.clear()  # Windows neither renames nor deletes a file that is still mapped


@torch.no_grad()
def fill_arrays(arrays: dict[str, np.memmap], files: dict[str, Path], encoder: VisionEncoder,
                images: list[str], get_image: Callable, batch: int) -> None:
    """Run the encoder over all images; what it gives is written to new mapped files."""
    device = next(encoder.parameters()).device
    name = files["tokens"].name.split(".")[0]
    for i in tqdm(range(0, len(images), batch), desc=f"cache {name}", leave=False):
        pixels = stack_images([get_image(image) for image in images[i:i + batch]])
        output = encoder(to_device(pixels, device))
        rows = {}
        for field, value in output._asdict().items():
            if value is not None:
                rows[field] = value.half().cpu().numpy()
        for field, values in rows.items():
            if not np.isfinite(values).all():
                raise InputError(f"teacher {name}: its {field} are nan or inf in one of the images "
                                 f"from {images[i]} on; its weights are damaged, or its numbers "
                                 "too large for fp16: then --cache-teachers ''")
            if field not in arrays:
                shape = (len(images), *values.shape[1:])
                arrays[field] = new_array(files[field], np.float16, shape)
            arrays[field][i:i + batch] = values
        arrays["crc32"][i:i + batch] = row_checksums(rows)


class CachedTeachers(Teachers):
    """Teachers that read their outputs in place of running, by the images' names."""

    def __init__(self, teachers: Teachers, caches: dict[str, TeacherCache]):
        super().__init__(dict(teachers.encoders))
        self.caches = caches

    def forward(self, images: torch.Tensor | dict[int, torch.Tensor],
                names: list[str | None]) -> dict[str, TeacherOutput]:
        """The cached outputs of the images called so; their pixels are not looked at."""
        pixels = next(iter(images.values())) if isinstance(images, dict) else images
        return {name: cache.read(names, pixels.device) for name, cache in self.caches.items()}


def cache_teachers(teachers: Teachers, folder: Path, sets: list[tuple]) -> CachedTeachers:
    """Teachers with the outputs for all images of some (records, get_image), in `folder`."""
    source = images_of(sets)
    images = list(source)
    prints = []
    for get_image in dict.fromkeys(source.values()):
        own = [image for image in images if source[image] is get_image]
        prints.append(get_image.fingerprint(own))
    places = " ".join(sorted({get_image.source for get_image in source.values()}))
    caches = {}
    for name, encoder in teachers.encoders.items():
        caches[name] = TeacherCache(folder, name, encoder, images, lambda i: source[i](i), places,
                                    digest(*prints))
    return CachedTeachers(teachers, caches)


SAMPLE = 4000   # images, if the teachers must run for it; all of them if their outputs are cached
BATCH = 64
SMALLEST_STD = 1e-4  # a channel that never changes is not blown up


@torch.no_grad()
def measure_targets(norms: nn.ModuleDict, teachers: Teachers, sets: list[tuple], first: bool,
                    device: str, skip_bad: bool) -> None:
    """Fill every ChannelNorm with its teacher's mean and std per channel, over images and places.

    `sets` are (records, get_image). The first process measures and sends what it found, so that any
    number of processes has the same numbers. Raises InputError for an image that cannot be read,
    unless such are skipped.
    """
    channel_norms = {name: norm for name, norm in norms.items() if isinstance(norm, ChannelNorm)}
    if not channel_norms:
        return
    if first:
        fill(channel_norms, teachers, sets, device, skip_bad)
    if dist.is_initialized():
        for norm in channel_norms.values():
            dist.broadcast(norm.mean, src=0)
            dist.broadcast(norm.std, src=0)


def fill(norms: dict[str, ChannelNorm], teachers: Teachers, sets: list[tuple], device: str,
         skip_bad: bool) -> None:
    """Measure in this process."""
    source = images_of(sets)
    names = list(source)
    cached = isinstance(teachers, CachedTeachers)
    if not cached:
        names = names[::max(1, len(names) // SAMPLE)]
    sums = {name: torch.zeros(2, len(norm.mean), dtype=torch.float64)
            for name, norm in norms.items()}
    places = dict.fromkeys(norms, 0)
    for i in tqdm(range(0, len(names), BATCH), desc="statistics of the teachers", leave=False):
        batch = names[i:i + BATCH]
        pixels = torch.empty(0)  # a cache does not look at them
        if not cached:
            readable = read_images(batch, source, skip_bad)
            if not readable:
                continue
            pixels = stack_images(readable)                                         # (B, 3, R, R)
        outputs = teachers(to_device(pixels, device), batch)
        for name in norms:
            # Apple's GPU has no float64: to the CPU first
            tokens = outputs[name].tokens.flatten(0, 1).cpu().double()              # (B * n_i, d_i)
            sums[name] += torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)])
            places[name] += len(tokens)
    for name, norm in norms.items():
        mean, square = sums[name] / places[name]                                    # (d_i,) each
        std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=SMALLEST_STD)  # (d_i,)
        norm.mean.copy_(mean)
        norm.std.copy_(std)


def read_images(names: list[str], source: dict, skip_bad: bool) -> list:
    """The images by name, as get_image gives them; with skip_bad without the unreadable ones."""
    images = []
    for name in names:
        try:
            images.append(source[name](name))
        except InputError:
            if not skip_bad:
                raise
    return images


@torch.no_grad()
def check_teachers(teachers: Teachers, sets: list[tuple], device: str) -> None:
    """Raise InputError for a teacher whose tokens are no numbers, or the same everywhere.

    Its weights are damaged, or not those of its model. A few training images are shown to it.
    """
    names, pixels = [], []
    for records, get_image in sets:
        for record in records:
            if len(names) == 4:
                break
            if "image" not in record:
                continue
            try:
                pixels.append(get_image(record["image"]))
                names.append(record["image"])
            except InputError:
                continue  # its row is reported when it is trained on
    if not names:
        return
    for name, output in teachers(to_device(stack_images(pixels), device), names).items():
        tokens = output.tokens.float()                                              # (B, n_i, d_i)
        if not tokens.isfinite().all():
            raise InputError(f"teacher {name}: its tokens are nan or inf; its weights are damaged")
        if tokens.flatten(0, 1).std(dim=0).max() <= 1e-6 * tokens.abs().max():
            raise InputError(f"teacher {name}: its tokens are the same everywhere; its weights are "
                             "damaged, or not those of this model")
