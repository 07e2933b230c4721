"""The folder of a run: one run at a time in it, what is written there, where to go on from."""

import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torchvision
from huggingface_hub import split_torch_state_dict_into_shards

from data import InputError
from model import MoVEKD
from plumbing import checkpoints
from plumbing.checkpoints import Progress
from plumbing.config import Config
from plumbing.files import digest, write_json, write_tensors
from plumbing.sets import images_of, rows_digest
from plumbing.sharding import full_state

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither file locks nor resource usage
    fcntl = resource = None

RESULTS = ("result.json", "evaluation.json")    # written when training is over
FILES = ("config.json", "versions.json", "vocabulary.json", "log.jsonl", "curves.png",
         "samples.png", "held_out.json", "model.safetensors", *RESULTS)


def open_run_folder(c: Config, first: bool, resumed: bool) -> tuple:
    """Return the lock of the run folder, the checkpoint to go on from or None, and the Progress.

    The lock is the first process's; another run is let in when it is closed. Raises InputError.
    """
    lock = None
    if first:
        lock = lock_run_folder(c, resumed)
        check_writable(c)
    checkpoint, progress = find_start(c, resumed)
    return lock, checkpoint, progress


def lock_run_folder(c: Config, resumed: bool):
    """Return an open file that no other run can hold at the same time.

    Raises InputError if another run is in the folder, or a finished one is not to be overwritten.
    """
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115, it holds the lock
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"--out {out}: a run is in it, {file.read().strip()}; wait for it, or "
                         "name another --out") from None
    if (out / "result.json").exists() and not resumed and not c.overwrite:
        raise InputError(f"--out {out}: holds a finished run; name another --out, or add "
                         "--overwrite")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    for left in (*out.glob("*.tmp"), *out.glob("checkpoints/*.tmp")):  # of a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return file


def check_writable(c: Config) -> None:
    """Raise InputError, before any work, for a place where the run will not be able to write."""
    out = Path(c.out)
    for name in FILES:
        path = out / name
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file, and the run writes one of that name; "
                             "move it away, or name another --out")
    folders = [out]
    if c.cache_teachers and c.lambda_kd:
        folders.append(Path(c.cache_teachers))
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as e:
            raise InputError(f"{folder}: cannot be written: {e.strerror}") from None


def find_start(c: Config, resumed: bool) -> tuple[Path | None, Progress]:
    """Return the checkpoint to go on from, if any, and the Progress of the run.

    Raises InputError if there is none to resume from, or one that a new run would overwrite.
    """
    folder = Path(c.out) / "checkpoints"
    if resumed:
        path, progress = checkpoints.newest_checkpoint(folder, c.skip_damaged)
        return path, Progress(**progress)
    if checkpoints.saved_checkpoints(folder):
        if not c.overwrite:
            raise InputError(f"--out {c.out}: holds checkpoints of an earlier run; go on with "
                             f"`python train.py --resume {c.out}`, name another --out, or add "
                             "--overwrite")
        shutil.rmtree(folder)
    return None, Progress()


def check_data(c: Config, sets: dict, tokenizer, progress: Progress, resumed: bool) -> None:
    """Note a fingerprint of the data in a new run's progress, or compare it with a checkpoint's.

    Raises InputError, which names the file, if rows, words or images have changed since.
    """
    files = {"pretrain": c.pretrain_data or c.data or c.data_root, "train": c.data or c.data_root}
    found = {}
    for name, file in files.items():
        records, get_image = sets[name]
        found[f"{file or 'the tiny world'} ({name} rows)"] = rows_digest(records)
        if not c.data_root:  # half a million files are too many to look at
            images = list(images_of([sets[name]]))
            found[f"{get_image.source} ({name} images)"] = get_image.fingerprint(images)
    if not c.llm:
        found["the words of the data"] = digest(*tokenizer.vocabulary)
    if not resumed:
        progress.data = found
        return
    for name, fingerprint in progress.data.items():
        if found.get(name) != fingerprint:
            raise InputError(f"{name}: changed since the checkpoint in {c.out} was made; put the "
                             "old back, or start a new run")


def start_run_folder(c: Config, tokenizer, resumed: bool) -> None:
    """Write config, versions and words, which the folder holds from the first minute on.

    Delete what an earlier run left; of a resumed run, only its results and weights.
    """
    out = Path(c.out)
    for name in RESULTS if resumed else FILES:
        (out / name).unlink(missing_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    write_json(out / "config.json", dataclasses.asdict(c))
    versions = {"python": platform.python_version()}
    for library in (torch, torchvision, timm):
        versions[library.__name__] = library.__version__
    if c.llm:
        versions["transformers"] = sys.modules["transformers"].__version__
    else:
        write_json(out / "vocabulary.json", tokenizer.vocabulary)
    write_json(out / "versions.json", versions)


def export(c: Config, first: bool, model: MoVEKD, tokenizer) -> None:
    """Save the final weights, with a real LLM's config and tokenizer: all that load_run reads.

    All processes gather them, the first one writes. Raises InputError for NaN or infinite weights,
    and OSError for a folder that refuses them; --resume then starts from the last checkpoint.
    """
    checkpoints.check_parameters(model)
    state = full_state(model)
    if not first:
        return
    if c.precision == "bf16":
        for name, tensor in state.items():
            state[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    out = Path(c.out)
    if c.llm:
        save_weights(out, state)
        model.vlm.llm.model.config.save_pretrained(out / "llm")
        tokenizer.tokenizer.save_pretrained(out / "llm")
    else:
        save_weights(out, state, words=digest(*tokenizer.vocabulary))


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], **about: str) -> None:
    """Write model.safetensors, or above 5 GB several files and their index. Raises OSError."""
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB")
    for file, names in shards.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, **about)
    if shards.is_sharded:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def read_log(folder: Path) -> list[dict]:
    """Return the lines of a run's log.jsonl."""
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def peak_rss_mb() -> float:
    """Return the peak memory in MB of this process or one of stage 0; 0 if it is unknown."""
    if resource is None:
        return 0.0
    peaks = [resource.getrusage(who).ru_maxrss
             for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    in_bytes = sys.platform == "darwin"
    return max(peaks) / (2 ** 20 if in_bytes else 1024)
