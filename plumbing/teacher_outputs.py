"""The teachers' outputs for all training images: computed once, kept on disk, and measured.

One safetensors file per teacher has (images, ...) in fp16 for each field of its output. It is read
by memory mapping, but written from two copies in memory: large sets need --cache-teachers ''.
Letters: B images, R pixels of the loader's square image, n_i tokens and d_i width of teacher i.
"""

import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import InputError, stack_images, to_device
from plumbing.files import checksum, digest, read_about, read_tensors, write_tensors
from plumbing.sets import images_of
from teachers import ChannelNorm, TeacherOutput, Teachers, VisionEncoder

BATCH = 32              # images that a teacher sees at once: the maps of ConvNeXt stay in cache
SAMPLE = 4000           # images to measure, if the teachers must run; all of them if cached
LAST_USED = 4           # sets whose outputs stay in the folder
SMALLEST_STD = 1e-4     # a channel that never changes is not blown up


class CachedTeachers(Teachers):
    """Teachers that read their outputs by the images' names: their own, rounded to fp16."""

    def __init__(self, teachers: Teachers, rows: dict[str, int], outputs: dict[str, dict]):
        super().__init__(dict(teachers.encoders))
        self.rows = rows            # image name: its row
        self.outputs = outputs      # teacher: {field of TeacherOutput: (images, ...) in fp16}

    def forward(self, images: torch.Tensor | dict, names: list) -> dict[str, TeacherOutput]:
        """Return the outputs for the images of these names; their pixels are not used."""
        pixels = next(iter(images.values())) if isinstance(images, dict) else images
        # a stand-in image, whose name is None, counts for nothing: any row will do
        rows = [self.rows[name] if name else 0 for name in names]
        found = {}
        for teacher, tensors in self.outputs.items():
            fields = dict.fromkeys(TeacherOutput._fields)
            for field, tensor in tensors.items():
                fields[field] = tensor[rows].to(pixels.device).float()              # (B, ...)
            found[teacher] = TeacherOutput(**fields)
        return found


def cache_teachers(teachers: Teachers, folder: Path, sets: list[tuple]) -> CachedTeachers:
    """Return teachers whose outputs for all images of some (records, get_image) are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = images_of(sets)
    images = list(source)
    prints = []
    for get_image in dict.fromkeys(source.values()):
        prints.append(get_image.fingerprint([i for i in images if source[i] is get_image]))
    first = source[images[0]](images[0])
    paths = {}
    for name, encoder in teachers.encoders.items():
        # The file's name is a hash of all that it is made of: it is never out of date. A view that
        # is made from the original differs from one of the loader's image.
        R = f"own {encoder.image_size}" if isinstance(first, dict) else str(first.shape[-1])
        weights = [f"{key} {checksum(value)}" for key, value in encoder.state_dict().items()]
        key = digest(encoder.spec, digest(*weights), R, *sorted(prints), *images)[:12]
        paths[name] = folder / f"{name}-{encoder.image_size}px-{key}.safetensors"
    missing = [teachers.encoders[name] for name, path in paths.items() if not path.exists()]
    check_disk(folder, len(images), missing)
    outputs = {}
    for name, path in paths.items():
        try:
            outputs[name] = read_outputs(path, len(images))
        except InputError as e:
            if path.exists():
                print(f"note: the outputs of teacher {name} are made again: {e}", file=sys.stderr)
            if path.is_dir():
                path.rmdir()    # OSError, which names it, if anything is in it
            write_tensors(path, run_encoder(name, teachers.encoders[name], source))
            outputs[name] = read_outputs(path, len(images))
        path.touch()
        files = sorted(folder.glob(f"{name}-*px-*.safetensors"), key=os.path.getmtime)
        for old in files[:-LAST_USED]:
            old.unlink(missing_ok=True)
    return CachedTeachers(teachers, {image: row for row, image in enumerate(images)}, outputs)


def check_disk(folder: Path, count: int, missing: list[VisionEncoder]) -> None:
    """Raise InputError if the tokens of `count` images by some encoders do not fit the disk."""
    wanted = sum(2 * count * encoder.num_tokens * encoder.dim for encoder in missing) / 1e6  # fp16
    free = shutil.disk_usage(folder).free / 1e6
    if wanted > free:
        raise InputError(f"{folder}: the outputs of the teachers for {count:,} images take "
                         f"{wanted:,.0f} MB, and {free:,.0f} MB are free; name another folder with "
                         "--cache-teachers, or none: --cache-teachers ''")


def read_outputs(path: Path, count: int) -> dict[str, torch.Tensor]:
    """Return {field: (count, ...)} of a teacher's file. Raises InputError if it is damaged."""
    tensors = read_tensors(path, "it is replaced")
    known = read_about(path).get("crc32", {}).keys()
    if known != tensors.keys() or len(tensors["tokens"]) != count:
        raise InputError(f"{path}: damaged: its header has changed; it is replaced")
    return tensors


def run_encoder(name: str, encoder: VisionEncoder, source: dict) -> dict[str, torch.Tensor]:
    """Return {field: (images, ...) in fp16} for {image: its get_image}. Raises InputError."""
    device = next(encoder.parameters()).device
    pieces = defaultdict(list)
    for images, outputs in run_teachers(Teachers({name: encoder}), list(source), source, device):
        for field, value in outputs[name]._asdict().items():
            if value is None:
                continue
            value = value.half().cpu()                                              # (B, ...)
            if not value.isfinite().all():
                raise InputError(f"teacher {name}: its {field} are NaN or infinite in one of the "
                                 f"images from {images[0]} on; its weights are damaged, or its "
                                 "numbers too large for fp16: then --cache-teachers ''")
            pieces[field].append(value)
    return {field: torch.cat(values) for field, values in pieces.items()}


def run_teachers(teachers: Teachers, names: list[str], source: dict, device: str | torch.device,
                 skip_bad: bool = False) -> Iterator[tuple[list[str], dict[str, TeacherOutput]]]:
    """Yield (names, their outputs) of each batch of images; `source` has each name's get_image."""
    title = f"teachers {' '.join(teachers.encoders)}"
    for i in tqdm(range(0, len(names), BATCH), title, leave=False, disable=len(names) <= BATCH):
        batch = names[i:i + BATCH]
        if isinstance(teachers, CachedTeachers):    # no need to read the images
            yield batch, teachers(torch.empty(0), batch)
            continue
        images = {}
        for name in batch:
            try:
                images[name] = source[name](name)
            except InputError:
                if not skip_bad:
                    raise
        if images:
            pixels = to_device(stack_images(list(images.values())), device)         # (B, 3, R, R)
            yield list(images), teachers(pixels, list(images))


@torch.no_grad()
def measure_targets(norms: nn.ModuleDict, teachers: Teachers, sets: list[tuple], first: bool,
                    device: str, skip_bad: bool) -> None:
    """Fill each ChannelNorm with its teacher's mean and std per channel, over images and tokens."""
    channel_norms = {name: norm for name, norm in norms.items() if isinstance(norm, ChannelNorm)}
    source = images_of(sets) if first and channel_norms else {}
    names = list(source)
    if not isinstance(teachers, CachedTeachers):
        names = names[::max(1, len(names) // SAMPLE)]
    sums, count = defaultdict(int), Counter()
    for _, outputs in run_teachers(teachers, names, source, device, skip_bad):
        for name in channel_norms:
            # Apple's GPU has no float64: to the CPU first
            x = outputs[name].tokens.flatten(0, 1).cpu().double()                   # (B * n_i, d_i)
            sums[name] += torch.stack([x.sum(dim=0), x.square().sum(dim=0)])        # (2, d_i)
            count[name] += len(x)
    # the first process sends its numbers to the others, so that all have the same
    for name, norm in channel_norms.items():
        if first and count[name]:   # a set without images has nothing to measure
            mean, square = sums[name] / count[name]                                 # (d_i,) each
            variance = (square - mean.square()).clamp(min=SMALLEST_STD ** 2)        # (d_i,)
            norm.mean.copy_(mean)
            norm.std.copy_(variance.sqrt())
        if dist.is_initialized():
            dist.broadcast(norm.mean, src=0)
            dist.broadcast(norm.std, src=0)
