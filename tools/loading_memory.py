"""The memory of loading: models are held once a machine, records not at all.

    python -m tools.loading_memory              # the two tables of docs/gpus.md (3 min)

Models: train.py --tiny with a random Llama in the tiny LLM's place, alone and as two processes, up
to the first stage; what it takes with nine layers, less what it takes with one. Records: a file of
dialogues, as training reads it and as a list of Python's objects, in a process and in two workers
that have read every row. Proportional, as in tools/host_memory.py. For Linux, on the CPU.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data import read_json
from plumbing.cli import InputError, Parser, run
from plumbing.pretrained_llm import SPACE, require_transformers
from plumbing.records import read_list
from plumbing.workers import begin_worker
from tiny.world import world_records
from tools.host_memory import Forward, proportional_kb, require_proportions, tree
from tools.measuring import table_line

TRAIN = Path(__file__).parent.parent / "train.py"
# stage 0 in miniature; a token a letter wants room
FLAGS = ("--tiny --device cpu --stage0-scale 0.01 --n-pretrain 64 --n-train 32 --n-described 16 "
         "--n-text 16 --n-eval 12 --max-length 4096 --cache-teachers").split() + [""]
LAYERS = (1, 9)

# ------------------------------------------------------------------------------------------------
# Models


def write_llama(folder: Path, layers: int) -> int:
    """A random Llama of 1,024 channels and a tokenizer of single letters; its size in bytes."""
    transformers = require_transformers()
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.LlamaTokenizer(vocabulary, []).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16)
    llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in llama.parameters())


def peaks_of_loading(place: Path, llm: Path, processes: int) -> list[int]:
    """kB of each process of a run, at the worst moment of all together before the first stage.

    What is mapped from a file does not count: the system holds it once, and may take it back.
    """
    flags = [*FLAGS, "--llm", str(llm), "--processes", str(processes), "--out", f"runs/{llm.name}"]
    # what is freed goes back to the system at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    child = subprocess.Popen([sys.executable, str(TRAIN), *flags, "--overwrite"], cwd=place,
                             stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    forward = Forward(child.stdout, show=False)
    forward.start()
    peaks = [0]
    while child.poll() is None and not forward.training:
        sizes = [proportional_kb(process)[1] for process in tree(child.pid)]
        peaks = max(peaks, sizes, key=sum)
        time.sleep(0.01)
    for process in reversed(tree(child.pid)):
        end(process)
    child.wait()
    forward.join()
    if not forward.training:
        raise InputError(f"train.py ended with status {child.returncode} before it trained")
    return peaks[-processes:]  # without the one that only starts the others


def end(process: int) -> None:
    """End a process at once: what it would save is of no use. (Windows has no such signal.)"""
    if hasattr(signal, "SIGKILL"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, signal.SIGKILL)


def model_table() -> str:
    """What a large LLM adds to each process while it is loaded, beside a small one."""
    lines = ["| processes | weights | memory that they take | in each process |",
             "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sizes = [write_llama(place / f"llm{layers}", layers) for layers in LAYERS]
        weights = (sizes[1] - sizes[0]) / 2 ** 20
        peaks_of_loading(place, place / "llm1", 1)  # makes stage 0's files
        for processes in (1, 2):
            small, large = (peaks_of_loading(place, place / f"llm{layers}", processes)
                            for layers in LAYERS)
            added = [(b - a) / 1024 for a, b in zip(small, large)]
            each = " + ".join(f"{size:,.0f}" for size in added)
            lines.append(table_line(processes, f"{weights:,.0f} MB", f"{sum(added):,.0f} MB", each))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Records


def write_rows(path: Path, count: int) -> None:
    """So many dialogues of the tiny world, one like the other."""
    rows = world_records("train", "chat", 200)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(count):
            record = {**rows[row % len(rows)], "id": str(row)}
            file.write(("[\n" if row == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")


def memory_of_records(read: Callable[[], Sequence], workers: int) -> tuple[int, int]:
    """What rows add to a process's memory, in kB; and to it and its workers, all rows read there.

    Each is forked, as the loader's workers are.
    """
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    process = fork.Process(target=hold_records, args=(read, workers, answers))
    process.start()
    answer = answers.get()
    process.join()
    return answer


def hold_records(read: Callable[[], Sequence], workers: int, answers) -> None:
    """In a process of its own: read, count, and count again with workers."""
    gc.freeze()  # what was there before stays shared
    family = [os.getppid(), os.getpid()]
    before = held_by(family)
    records = read()
    alone = held_by(family) - before
    fork = multiprocessing.get_context("fork")
    read_all, end = fork.Semaphore(0), fork.Event()
    started = [fork.Process(target=look_at_all, args=(records, read_all, end))
               for _ in range(workers)]
    for worker in started:
        worker.start()
        family.append(worker.pid)
    for _ in started:
        read_all.acquire()
    together = held_by(family) - before
    end.set()
    for worker in started:
        worker.join()
    answers.put((alone, together))


def held_by(family: list[int]) -> int:
    """kB of processes that share with each other, what is mapped from files left out."""
    return sum(proportional_kb(process)[1] for process in family)


def look_at_all(records: Sequence, read_all, end) -> None:
    """A worker of the loader: read every row, say so, and stay."""
    begin_worker(0)
    letters = 0
    for record in records:
        letters += sum(len(turn["value"]) for turn in record["conversations"])
    read_all.release()
    end.wait()


def record_table(rows: int) -> str:
    """What the rows of a file take, as training holds them and as a list."""
    lines = ["| rows | file | held as | one process | with 2 workers |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.json"
        write_rows(path, rows)
        forms = {"places in the file": lambda: read_list(path), "a list": lambda: read_json(path)}
        for form, read in forms.items():
            sizes = memory_of_records(read, workers=2)
            lines.append(table_line(f"{rows:,}", f"{path.stat().st_size / 2 ** 20:,.0f} MB", form,
                                    *(f"{size / 1024:,.0f} MB" for size in sizes)))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the two tables."""
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="dialogues in the file")
    args = parser.parse_args(argv)
    require_proportions()
    torch.set_num_threads(1)
    print(model_table())
    print()
    print(record_table(args.rows))


if __name__ == "__main__":
    run(main)
