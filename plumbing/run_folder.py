"""The folder of a run: its lock, its files, and the checkpoint to resume from."""

import dataclasses
import os
import platform
import shutil
import sys
from pathlib import Path

import timm
import torch
import torchvision
from huggingface_hub import split_torch_state_dict_into_shards

from data import InputError
from model import MoVEKD
from plumbing import build, checkpoints, config, files, sets, sharding
from plumbing.checkpoints import Progress
from plumbing.config import Config

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither file locks nor resource usage
    fcntl = resource = None

RESULTS = ("result.json", "evaluation.json", "predictions.jsonl")   # when training is over
FILES = ("config.json", "versions.json", "vocabulary.json", "log.jsonl", "curves.png",
         "samples.png", "held_out.json", "model.safetensors", *RESULTS)


def open_run_folder(c: Config, first: bool, resumed: bool) -> tuple:
    """Return the lock (rank 0's), the checkpoint to resume or None, and the run's Progress."""
    out = Path(c.out)
    lock = None     # closed, it lets another run in
    if first:
        lock = lock_run_folder(c, resumed)
        # a folder that cannot be written ends the run now, before any work
        files.require_writable(out, "--out")
        if c.cache_teachers and c.lambda_kd:
            files.require_writable(Path(c.cache_teachers), "--cache-teachers")
    folder = out / "checkpoints"
    if resumed:
        path, progress = checkpoints.newest_checkpoint(folder, c.skip_damaged)
        progress = Progress(**progress)
        check_config_is_kept(c, progress.config, first)
        progress.config = dataclasses.asdict(c)
        return lock, path, progress
    if checkpoints.saved_checkpoints(folder):
        if not c.overwrite:
            raise InputError(f"--out {c.out}: holds checkpoints of an earlier run; go on with "
                             f"`python train.py --resume {c.out}`, name another --out, or add "
                             "--overwrite")
        shutil.rmtree(folder)
    return lock, None, Progress(config=dataclasses.asdict(c))


def lock_run_folder(c: Config, resumed: bool):
    """Return an open file that only one run can hold. Raises InputError if the folder is taken."""
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
    for left in (*out.glob("*.tmp"), *out.glob("*/*.tmp")):     # of a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return file


def check_config_is_kept(c: Config, trained: dict, first: bool) -> None:
    """Raise InputError if a resumed run changes a field that it must keep."""
    for name, old in trained.items():
        new = getattr(c, name)
        new = list(new) if isinstance(new, tuple) else new  # JSON has lists only
        if new == old or name in ("out", "overwrite"):
            continue
        if name not in config.RESUME:
            raise InputError(f"{c.out}/config.json: {name} is {new!r}, and the checkpoint was "
                             f"trained with {old!r}; put that back, or start a new run")
        if first and name in config.LEARNING:
            print(f"note: {config.flag(name)} {new} from here on; it was {old}", file=sys.stderr)


def check_data(c: Config, data: dict, progress: Progress) -> None:
    """Note the fingerprint of a run's data. Raises InputError if a resumed run's has changed."""
    sources = {"pretrain": c.pretrain_data or c.data or c.data_root, "train": c.data or c.data_root}
    found, place = {}, {}
    for name, file in sources.items():
        records, get_image = data[name]
        found[f"{name} rows"] = sets.rows_digest(records)
        place[f"{name} rows"] = file or get_image.source
        if not c.data_root:  # half a million files are too many to read
            images = list(sets.images_of([data[name]]))
            found[f"{name} images"] = get_image.fingerprint(images)
            place[f"{name} images"] = get_image.source
    for name, fingerprint in progress.data.items():
        if found.get(name) == fingerprint:
            continue
        changed = f"{place.get(name, c.out)}: its {name} have changed since the checkpoint was made"
        if not c.allow_new_data:
            raise InputError(f"{changed}; put the old ones back, or add --allow-new-data to go on "
                             "with the new ones")
        print(f"note: {changed}", file=sys.stderr)
    progress.data = found


def start_run_folder(c: Config, tokenizer, weights: dict, resumed: bool) -> None:
    """Clear an earlier run, or results; write config, versions, words and stage 0's models."""
    out = Path(c.out)
    for name in RESULTS if resumed else FILES:
        (out / name).unlink(missing_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    files.write_json(out / "config.json", dataclasses.asdict(c))
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "timm": timm.__version__}
    if c.llm:
        versions["transformers"] = sys.modules["transformers"].__version__
    else:
        files.write_json(out / "vocabulary.json", tokenizer.vocabulary)
    files.write_json(out / "versions.json", versions)
    for name in [] if resumed else build.stage0_models(c):  # to be used from its folder alone
        with files.replacing(out / "stage0" / f"{name}.safetensors") as temporary:
            shutil.copyfile(weights[name], temporary)


def export(c: Config, first: bool, model: MoVEKD, tokenizer) -> None:
    """Save the final weights, with a real LLM's config and tokenizer: all that load_run reads."""
    checkpoints.check_parameters(model)
    state = sharding.full_state(model)      # all processes gather, the first one writes
    if not first:
        return
    once = dict(model.named_parameters())
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in once:    # tied to another, which is stored
            del state[name]
    if c.precision == "bf16":
        for name, tensor in state.items():
            state[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    out = Path(c.out)
    about = {} if c.llm else {"words": files.digest(*tokenizer.vocabulary)}
    # one file; above 5 GB several, and their index
    shards = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
    for file, names in shards.filename_to_tensors.items():
        files.write_tensors(out / file, {name: state[name] for name in names}, **about)
    if shards.is_sharded:
        files.write_json(out / "model.safetensors.index.json",
                         {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    if c.llm:
        model.vlm.llm.model.config.save_pretrained(out / "llm")
        tokenizer.tokenizer.save_pretrained(out / "llm")


def read_log(folder: Path) -> list[dict]:
    """Return the lines of a run's log.jsonl."""
    lines = files.read_json(folder / "log.jsonl")
    return lines if isinstance(lines, list) else [lines]    # one line alone is a JSON file


def peak_rss_mb() -> float:
    """Return the peak memory in MB of this process or one of stage 0; 0 if it is unknown."""
    if resource is None:
        return 0.0
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(who).ru_maxrss for who in processes)
    return peak / (2 ** 20 if sys.platform == "darwin" else 1024)   # bytes on macOS, else KB
