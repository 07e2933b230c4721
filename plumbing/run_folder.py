"""What a run leaves behind: its config, log, weights and result; and how they are read again."""

import dataclasses
import errno
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import torchvision
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from data import write_json
from model import VLM, MoVEKD
from plumbing.build import build_vlm, find_device, read_words
from plumbing.checkpoints import (Progress, check_parameters, crc_of_start, newest_checkpoint,
                                  saved_checkpoints)
from plumbing.cli import InputError
from plumbing.config import FULL, Config, recipe
from plumbing.flags import load_config
from plumbing.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from plumbing.records import images_of, rows_digest
from plumbing.released_checkpoint import load_released, released_config
from plumbing.run_weights import fill_module, read_run_tensors, tensors_below
from plumbing.sharding import cast_vlm, full_state
from plumbing.silent_faults import SilentFaults
from plumbing.teacher_cache import digest
from plumbing.watch import Watch
from tiny.llm import WordTokenizer
from tiny.tensor_files import write_tensors

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

FILES = ("config.json", "versions.json", "vocabulary.json", "log.jsonl", "curves.png",
         "samples.png", "held_out.json", "model.safetensors", "result.json",
         "evaluation.json")  # of a run


def open_run_folder(c: Config, first: bool, resumed: bool) -> tuple:
    """(a lock on the run folder, the checkpoint to go on from or None, where the run stands).

    The first process holds the lock for as long as it keeps it. Raises InputError.
    """
    lock = None
    if first:
        lock = lock_run_folder(c, resumed)
        try_places(c)
    checkpoint, progress = find_start(c, resumed)
    return lock, checkpoint, progress


def lock_run_folder(c: Config, resumed: bool):
    """An open file that no other run can hold at the same time.

    Raises InputError if another run is in it, or a finished one that is not to be overwritten.
    """
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "run.lock", "a+", encoding="utf-8")
    if fcntl:  # Windows has no such lock
        try:
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


def try_places(c: Config) -> None:
    """Raise InputError for a place where the run will not be able to write, before any work."""
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
    """The checkpoint to go on from, if any, and where the run stands.

    Raises InputError if there is none to resume from, or one that a new run would overwrite.
    """
    folder = Path(c.out) / "checkpoints"
    if resumed:
        path, meta = newest_checkpoint(folder, c.skip_damaged)
        return path, Progress(**meta)
    if saved_checkpoints(folder):
        if not c.overwrite:
            raise InputError(f"--out {c.out}: holds checkpoints of an earlier run; go on with "
                             f"`python train.py --resume {c.out}`, name another --out, or add "
                             "--overwrite")
        shutil.rmtree(folder)
    return None, Progress()


def check_data(c: Config, sets: dict, tokenizer, progress: Progress, resumed: bool) -> None:
    """Note a fingerprint of what the run is trained on, or compare it with a checkpoint's.

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


def start_run_folder(c: Config, tokenizer) -> None:
    """What a run folder says from its first minute on: config, versions, words."""
    out = Path(c.out)
    # what an earlier run left goes: its result, which says that a run is complete, and its weights
    (out / "result.json").unlink(missing_ok=True)
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


# ------------------------------------------------------------------------------------------------
# Final weights


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], **about: str) -> None:
    """folder/model.safetensors, or above 5 GB several files and their index, as on the hub.

    The old files go when the new ones are complete. Raises OSError.
    """
    temporary = folder / "weights.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parts = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB")
    for file, names in parts.filename_to_tensors.items():
        write_tensors(temporary / file, {name: tensors[name] for name in names}, **about)
    if parts.is_sharded:
        write_json(temporary / "model.safetensors.index.json",
                   {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename})
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in temporary.iterdir():
        file.rename(folder / file.name)
    temporary.rmdir()


def export(c: Config, first: bool, model: MoVEKD, tokenizer) -> None:
    """Save the final weights, with a real LLM's config and tokenizer: all that load_run reads.

    All processes gather them, the first one writes. What cannot be written to the run folder is
    written to a new folder for temporary files. Raises InputError, which names it.
    """
    check_parameters(model)
    state = full_state(model)
    if not first:
        return
    if c.precision == "bf16":
        for name, tensor in state.items():
            state[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    try:
        write_model(Path(c.out), c, state, model, tokenizer)
    except OSError as e:
        elsewhere = Path(tempfile.mkdtemp(prefix="movekd-"))
        write_model(elsewhere, c, state, model, tokenizer)
        raise InputError(f"{c.out}: the trained model cannot be written there ({e.strerror}); it "
                         f"is in {elsewhere}: move its files to {c.out}, then python train.py "
                         f"--evaluate {c.out}") from None


def write_model(folder: Path, c: Config, state: dict, model: MoVEKD, tokenizer) -> None:
    """The final weights, and a real LLM's config and tokenizer. Raises OSError."""
    if c.llm:
        save_weights(folder, state)
        model.vlm.llm.model.config.save_pretrained(folder / "llm")
        tokenizer.tokenizer.save_pretrained(folder / "llm")
    else:
        save_weights(folder, state, words=digest(*tokenizer.vocabulary))


def load_run(folder: Path, device: str = "auto") -> tuple[VLM, object, Config]:
    """The VLM of a finished run or of the authors' checkpoint, its tokenizer and its Config.

    Strict: every tensor of the file must find its place. Raises InputError.
    """
    device = find_device(device)
    released = released_config(folder)
    if released:
        fields, llm = released
        fields = {**recipe("released"), **fields}
        c = dataclasses.replace(FULL, llm=str(folder), **fields)
        tokenizer = PretrainedTokenizer(c.llm)
        vlm = build_vlm(c, tokenizer, {}, PretrainedLLM(c.llm, llm))
        load_released(vlm, folder)
    else:
        c = load_config(folder / "config.json")
        llm = None
        if c.llm:
            tokenizer = PretrainedTokenizer(str(folder / "llm"))
            llm = PretrainedLLM.without_weights(folder / "llm")
        else:
            tokenizer = WordTokenizer(read_words(folder))
        vlm = build_vlm(c, tokenizer, {}, llm)
        load_vlm(vlm, folder)
    c.device = device
    on_gpu_in_bf16 = c.precision == "bf16" and device == "cuda"
    cast_vlm(vlm, torch.bfloat16 if on_gpu_in_bf16 else torch.float32)
    return vlm.to(device).eval(), tokenizer, c


def load_vlm(vlm: VLM, folder: Path) -> None:
    """Fill student, projector and LLM from a finished run of ours. Raises InputError."""
    weights = tensors_below(read_run_tensors(folder), "vlm.")
    own = vlm.state_dict()
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        if name in weights and len(own.get(name, ())) > len(weights[name]):
            # words that the run did not know come after its own, as new
            weights[name] = torch.cat([weights[name], own[name][len(weights[name]):]])
    fill_module(vlm, weights, folder)


def peak_rss_mb() -> float:
    """Peak memory of the largest process of the run, this one or one of stage 0, in MB."""
    if resource is None:
        return 0.0
    peaks = [resource.getrusage(who).ru_maxrss
             for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    in_bytes = sys.platform == "darwin"
    return max(peaks) / (2 ** 20 if in_bytes else 1024)
