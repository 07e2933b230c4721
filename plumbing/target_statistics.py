"""A first look at the teachers' tokens: do they say anything, and what are their statistics?"""

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import DataError, stack_images, to_device
from plumbing.cli import InputError
from plumbing.records import images_of
from plumbing.teacher_cache import CachedTeachers
from teachers import ChannelNorm, Teachers

SAMPLE = 4000   # images, if the teachers must run for it; all of them if their outputs are cached
BATCH = 64
SMALLEST_STD = 1e-4  # a channel that never changes is not blown up


@torch.no_grad()
def measure_targets(norms: nn.ModuleDict, teachers: Teachers, sets: list[tuple], first: bool,
                    device: str, skip_bad: bool) -> None:
    """Fill every ChannelNorm with its teacher's mean and std per channel, over images and places.

    `sets` are (records, get_image). The first process measures and sends what it found, so that any
    number of processes has the same numbers. Raises DataError for an image that cannot be read,
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
        except DataError:
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
            except DataError:
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
