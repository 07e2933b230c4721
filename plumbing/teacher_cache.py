"""The teachers' outputs for a fixed set of images, computed once and kept on disk."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import read_json, write_json
from plumbing.cli import InputError
from plumbing.records import images_of
from teachers import TeacherOutput, Teachers, VisionEncoder


def digest(*texts: str) -> str:
    """A hash of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


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

    The file name is made of what was asked for: teacher, its spec with the resolution, the images'
    `source`, names and size. Weights or images (their `fingerprint`) that have changed under the
    same names make it stale, which is an InputError. The .json is written last: with it the cache
    is complete.
    """

    def __init__(self, folder: Path, name: str, encoder: VisionEncoder, images: list[str],
                 get_image: Callable, source: str, fingerprint: str, batch: int = 64):
        self.rows = {image: i for i, image in enumerate(images)}
        R = get_image(images[0]).shape[-1]
        key = digest(encoder.spec, str(R), source, *images)[:12]
        made_of = {"teacher": encoder.spec, "pixels": R, "images": fingerprint,
                   "weights": weights_digest(encoder)}
        meta = folder / f"{name}-{encoder.image_size}px-{key}.json"
        paths = {field: meta.with_suffix(f".{field}.npy") for field in TeacherOutput._fields}
        if meta.exists():
            found = read_json(meta)
            changed = [k for k in made_of if found["made_of"][k] != made_of[k]]
            if changed:
                raise InputError(f"{meta}: stale, its {changed[0]} have changed since it was made; "
                                 f"delete {meta.with_suffix('')}.* or give --cache-teachers "
                                 "another folder")
            fields = found["fields"]
        else:
            fields = write_outputs(paths, encoder, images, get_image, batch)
            write_json(meta, {"made_of": made_of, "fields": fields})
        self.arrays = {field: np.load(paths[field], mmap_mode="r") for field in fields}

    def read(self, images: list[str | None], device: torch.device) -> TeacherOutput:
        """The outputs for images by name. A stand-in, None, gets any: it counts for nothing."""
        rows = [self.rows[image] if image else 0 for image in images]
        fields = dict.fromkeys(TeacherOutput._fields)
        for field, array in self.arrays.items():
            fields[field] = torch.from_numpy(array[rows]).to(device).float()
        return TeacherOutput(**fields)


@torch.no_grad()
def write_outputs(paths: dict[str, Path], encoder: VisionEncoder, images: list[str],
                  get_image: Callable, batch: int) -> list[str]:
    """Run the encoder over all images; returns the fields it gives.

    Files appear under their names only when they are complete.
    """
    device = next(encoder.parameters()).device
    arrays = {}
    temporary = {}
    for field, path in paths.items():
        temporary[field] = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
    name = paths["tokens"].name.split(".")[0]
    for i in tqdm(range(0, len(images), batch), desc=f"cache {name}", leave=False):
        pixels = torch.stack([get_image(image) for image in images[i:i + batch]])
        output = encoder(pixels.to(device))
        for field, value in output._asdict().items():
            if value is None:
                continue
            if field not in arrays:
                shape = (len(images), *value.shape[1:])
                arrays[field] = np.lib.format.open_memmap(temporary[field], "w+", np.float16, shape)
            arrays[field][i:i + batch] = value.half().cpu().numpy()
    for field, array in arrays.items():
        array.flush()
        temporary[field].rename(paths[field])
    return list(arrays)


class CachedTeachers(Teachers):
    """Teachers that read their outputs in place of running, by the images' names."""

    def __init__(self, teachers: Teachers, caches: dict[str, TeacherCache]):
        super().__init__(dict(teachers.encoders))
        self.caches = caches

    def forward(self, images: torch.Tensor, names: list[str | None]) -> dict[str, TeacherOutput]:
        """The cached outputs of the images called so; their pixels are not looked at."""
        return {name: cache.read(names, images.device) for name, cache in self.caches.items()}


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
