"""The runs of a comparison: training, the probe of the student, and the processes that do both.

The probe finds what an encoder's tokens hold, whatever an LLM makes of them. Its letters: N
pictures, M of them to test on, n_i tokens and d_i width of encoder i.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train
from data import blank_image
from model import Student
from plumbing.build import build_encoder
from plumbing.config import TINY
from plumbing.files import flop_counter, read_json, write_json
from plumbing.finished_run import load_run
from plumbing.flags import load_config, parse_config
from plumbing.signals import SIGNALS
from tiny.pictures import WORLD_SIZE, render
from tiny.scenes import ATTRIBUTES, sample_scenes

PICTURES = {"train": 2000, "validation": 500}  # of the probe: to fit on, and to test on


@functools.cache
def probe_pictures(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split's pictures (N, 3, R, R) and their scenes (N, 7)."""
    scenes = sample_scenes(split, PICTURES[split], seed=20)
    return render(scenes, seed=20), scenes


@torch.no_grad()
def pooled_tokens(encoder: nn.Module) -> list[torch.Tensor]:
    """Return mean and maximum of an encoder's tokens over each picture: (N, 2 d_i), (M, 2 d_i).

    Both are standardised with the mean and the standard deviation of the first.
    """
    encoder.eval()
    pooled = []
    for split in PICTURES:
        outputs = [encoder(batch) for batch in probe_pictures(split)[0].split(250)]
        # a student returns its tokens alone
        tokens = torch.cat([out if torch.is_tensor(out) else out.tokens for out in outputs])
        both = torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1)          # (N, 2 d_i)
        pooled.append(both.double())
    mean, std = pooled[0].mean(dim=0), pooled[0].std(dim=0) + 1e-6                 # (2 d_i,) each
    return [(both - mean) / std for both in pooled]


@functools.cache
def teacher_tokens(name: str, path: Path) -> list[torch.Tensor]:
    """Return a teacher's pooled tokens; they are computed once in each process."""
    return pooled_tokens(build_encoder(TINY, name, {name: path}))


def ridge(x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor) -> torch.Tensor:
    """Predict y (N, k) linearly from standardised x (N, f), for x_test (M, f) -> (M, k)."""
    gram = x.T @ x + 10.0 * torch.eye(x.shape[1], dtype=x.dtype)                   # (f, f)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)))                  # (f, k)
    return x_test @ weights + y.mean(dim=0)                                        # (M, k)


def probe(encoder: nn.Module, weights: dict[str, Path]) -> dict[str, float]:
    """Return how well an encoder's pooled tokens predict each attribute, and each teacher, in %.

    For an attribute it is the accuracy of a linear classifier on held-out pictures; for a teacher
    other than CLIP how much of the variance of its pooled tokens is linear in the encoder's.
    """
    x, x_test = pooled_tokens(encoder)
    scenes, scenes_test = probe_pictures("train")[1], probe_pictures("validation")[1]
    found = {}
    for i, (name, values) in enumerate(ATTRIBUTES.items()):
        target = F.one_hot(scenes[:, i], len(values)).double()                     # (N, k)
        choice = ridge(x, target, x_test).argmax(dim=1)                            # (M,)
        found[name] = 100 * (choice == scenes_test[:, i]).double().mean().item()
    for name in ("eva", "convnext"):
        y, y_test = teacher_tokens(name, weights[name])
        error = y_test - ridge(x, y, x_test)
        variance = (y_test - y_test.mean(dim=0)).square().mean()
        found[f"of {name}"] = 100 * (1 - error.square().mean() / variance).item()
    return found


@torch.no_grad()
def inference_cost(encoder: nn.Module) -> dict[str, int]:
    """Return FLOPs per image and parameters of what runs at inference: images in, tokens out."""
    with flop_counter() as counter:
        encoder.eval()(blank_image(WORLD_SIZE)[None])
    return {"FLOPs": counter.get_total_flops(),
            "parameters": sum(p.numel() for p in encoder.parameters())}


def train_and_probe(folder: Path, argv: list[str], weights: dict[str, Path]) -> None:
    """Run train.py, then write accuracy, cost and probe of its student, unless that is done.

    Its output goes to a file in the run's folder.
    """
    trained = ((folder / "result.json").exists()
               and load_config(folder / "config.json") == parse_config(argv))
    if trained and (folder / "numbers.json").exists():
        return
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "output.txt", "a", encoding="utf-8") as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)):
        if not trained:
            (folder / "numbers.json").unlink(missing_ok=True)  # of an earlier run in this folder
            train.main(argv)
        vlm, _, c = load_run(folder, "cpu")
        result = read_json(folder / "result.json")
        answers = {"macro": result["macro_accuracy"], **result["accuracy"]}
        clip = inference_cost(Student(c.clip))  # LLaVA's vision side
        for name, cost in inference_cost(vlm.student).items():
            answers[f"{name}, %"] = 100 * cost / clip[name]
        probed = {} if c.student == "ensemble" else probe(vlm.student, weights)
        write_json(folder / "numbers.json", {"answers": answers, "probe": probed})


def ignore_signals() -> None:
    """Leave signals to the process that started this one.

    Ctrl-C goes to both: the run would save a checkpoint, and later refuse to start over.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes; any exception, a signal's too, ends them at once."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), ignore_signals)
    try:
        yield pool
    except BaseException:
        # the pool itself would wait until all that it has begun is trained
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def train_all(runs: dict[Path, list[str]], weights: dict[str, Path]) -> None:
    """Train and probe the runs, {folder: flags}, one process with one thread for each core."""
    with (tqdm(total=len(runs), desc="runs") as bar,
          worker_processes(min(os.cpu_count(), len(runs))) as pool):
        jobs = [pool.submit(train_and_probe, out, argv, weights) for out, argv in runs.items()]
        for job in as_completed(jobs):
            job.result()
            bar.update()
