"""Batches of an epoch, in an order that does not depend on the processes; who loads their images.

Letters: none but README's.
"""

import atexit
import functools
import gc
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from data import Conversations, collate
from plumbing.config import Config
from plumbing.signals import SIGNALS

# a forked worker shares the records with its parent, a spawned one gets a pickled copy; but macOS's
# own libraries may fail in a fork, and Windows has none
START = "fork" if sys.platform == "linux" else "spawn"
PREFETCH = 2  # batches that a worker makes beforehand, torch's default


def loader_options(c: Config) -> dict:
    """Arguments of torch's DataLoader."""
    options = {"num_workers": c.workers, "pin_memory": c.device == "cuda"}
    if c.workers:
        atexit.register(end_workers)
        options["worker_init_fn"] = begin_worker
        options["multiprocessing_context"] = START
    return options


def begin_worker(worker: int) -> None:
    """What a worker does first: leave signals to the run, and what it shares with it as it is.

    torchrun and batch systems signal every process; the run then finishes its step and saves: a
    signal must not take its loader away. A collection of garbage writes into every object that it
    looks at, and so would make a copy of the run's.
    """
    gc.freeze()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At exit, before Python waits for them: they do not listen to the signal that it sends."""
    for worker in multiprocessing.active_children():
        worker.kill()


def batch_order(dataset: Conversations, batch_size: int, seed: int, epoch: int,
                group: int = 1) -> list[list[int]]:
    """The rows of each batch of an epoch, a function of its arguments alone.

    A last, smaller batch is dropped, unless it is the only one. group > 1: samples with and without
    an image apart, and each shuffled run of `group` batches sorted by length before it is cut into
    batches, so that little is padding; then the batches are shuffled. What is left over of both
    kinds makes the mixed batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if group == 1:
        count = max(1, len(dataset) // batch_size)
        return [order[k * batch_size:(k + 1) * batch_size] for k in range(count)]
    sizes = dataset.sizes()
    batches = []
    left_over = []
    for pictured in (True, False):
        rows = [i for i in order if sizes[i][0] == pictured]
        for k in range(0, len(rows), batch_size * group):
            run = sorted(rows[k:k + batch_size * group], key=lambda i: sizes[i][1])
            cut = len(run) - len(run) % batch_size
            batches += [run[j:j + batch_size] for j in range(0, cut, batch_size)]
            left_over += run[cut:]
    batches += [left_over[j:j + batch_size] for j in range(0, len(left_over), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def count_steps(rows: int, batch_size: int, epochs: float) -> int:
    """Steps of a stage."""
    return max(1, round(epochs * max(1, rows // batch_size)))


def make_loader(dataset: Conversations, batch_size: int, epochs: float, seed: int, pad: int,
                group: int = 1, pieces: int = 1, own_pieces: range = range(1), start: int = 0,
                **options) -> DataLoader:
    """Shuffled batches from step `start` on; `options` are torch's own, num_workers and so on.

    Each is dealt out into `pieces` micro-batches, of which this process gets those in `own_pieces`,
    one after the other.
    """
    rows = MicroBatches(dataset, batch_size, epochs, seed, group, pieces, own_pieces, start)
    return DataLoader(dataset, batch_sampler=rows, collate_fn=functools.partial(collate, pad=pad),
                      **options)


class MicroBatches:
    """The rows of this process's micro-batches, one after the other, made as they are asked for."""

    def __init__(self, dataset: Conversations, batch_size: int, epochs: float, seed: int,
                 group: int, pieces: int, own_pieces: range, start: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self.steps = count_steps(len(dataset), batch_size, epochs)
        self.seed = seed
        self.group = group
        self.pieces = pieces
        self.own_pieces = own_pieces
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        for epoch in itertools.count():
            for batch in batch_order(self.dataset, self.batch_size, self.seed, epoch, self.group):
                if step >= self.steps:
                    return
                if step >= self.start:
                    for k in self.own_pieces:
                        yield batch[k::self.pieces]
                step += 1
