"""The log of a run: log.jsonl for programs, lines for a reader, and what is said beside them."""

import errno
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoints import Progress, crc_of_start
from plumbing.config import Config
from plumbing.silent_faults import SilentFaults
from plumbing.watch import Watch


class RunLog:
    """log.jsonl and the lines on the screen; of the first process only, for the others nothing.

    log.jsonl has no clock in it, so that one seed makes one log.
    """

    def __init__(self, c: Config, first: bool, resumed: bool, progress: Progress, watch: Watch):
        self.every = c.log_every
        self.watch = watch
        self.first = first
        self.faults = SilentFaults(lambda line: tqdm.write(line, file=sys.stderr))
        self.file = None
        if first:
            # without a buffer: no half line waits in one when the disk is full
            self.file = open(Path(c.out) / "log.jsonl", "r+b" if resumed else "wb", buffering=0)
            self.file.truncate(progress.log[0])
            self.file.seek(0, 2)

    def position(self) -> list[int]:
        """Bytes written so far, and their CRC-32."""
        if not self.file:
            return [0, 0]
        size = self.file.tell()
        return [size, crc_of_start(Path(self.file.name), size)]

    def close(self) -> None:
        if self.file:
            self.file.close()

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def append(self, line: str) -> None:
        """Write a line, or if the disk refuses leave no half of it. Raises OSError."""
        before = self.file.tell()
        data = line.encode()
        if self.file.write(data) < len(data):
            self.file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)

    def bar(self, progress: Progress, steps: int) -> tqdm:
        """The steps of a stage that are left, with a bar; the clock of tokens/s starts."""
        self.clock = time.perf_counter()
        self.tokens = 0
        for line in self.watch.begin(progress.stage):
            self.say(line)
        self.shown = tqdm(range(progress.step, steps), total=steps, initial=progress.step,
                          desc=f"stage {progress.stage}", mininterval=1, disable=not self.first)
        return self.shown

    def write(self, progress: Progress, terms: dict, counts: dict, last: bool) -> None:
        """Every --log-every steps and at the last: a line for programs, and one to read."""
        self.tokens += counts["tokens"]
        step = progress.step - 1
        if not self.file:
            return
        self.faults.look(progress.stage, step, terms, last)
        left = self.watch.after_step(progress.stage, progress.step)
        self.shown.set_postfix_str(left, refresh=False)
        if step % self.every and not last:
            return
        values = {"stage": progress.stage, "step": step}
        for name in sorted(terms, key=lambda name: not name.startswith("L_")):  # losses first
            value = terms[name]
            values[name] = value.tolist() if torch.is_tensor(value) else value
        for name in ("skipped", "cut"):
            if getattr(progress, name):
                values[name] = getattr(progress, name)
        self.append(json.dumps(values) + "\n")
        words = [f"stage {values['stage']} step {values['step']}"]
        words += [f"{name} {v:.3g}" for name, v in values.items() if isinstance(v, float)]
        if "experts" in values:
            layers = ["/".join(f"{100 * s:.0f}" for s in shares) for shares in values["experts"]]
            words.append("experts " + " ".join(layers))
        words.append(f"{self.tokens / (time.perf_counter() - self.clock):.0f} tokens/s")
        tqdm.write("  ".join(words))
        for line in self.watch.after_line(values):
            tqdm.write(line)
