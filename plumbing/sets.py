"""The data of a run: records and images of each set, the words, the datasets, and their batches."""

import atexit
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import multiprocessing
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from data import Conversations, InputError, collate
from plumbing.config import Config
from plumbing.files import digest, read_about, read_json
from plumbing.signals import listen
from teachers import parse_spec
from tiny.llm import WordTokenizer

# set: (JSON file, folder of its images), both below --data-root
LLAVA_FILES = {"pretrain": ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"),
               "train": ("llava_v1_5_mix665k.json", ".")}
LLAVA_IMAGES = ("LLaVA-Pretrain/images", "coco/train2017", "gqa/images", "ocr_vqa/images",
                "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


def llava_layout(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return (JSON file, image folder) of LLaVA's two sets under `root`. Raises InputError."""
    files = [file for file, _ in LLAVA_FILES.values()]
    for part in (*files, *LLAVA_IMAGES):
        if not (root / part).exists():
            raise InputError(f"--data-root {root}: has no {part}; LLaVA's layout (its docs/Data.md "
                             f"says where to get each) is {', '.join(files)} and the image folders "
                             f"{', '.join(LLAVA_IMAGES)}")
    return {name: (root / file, root / folder) for name, (file, folder) in LLAVA_FILES.items()}


def load_sets(c: Config) -> dict[str, tuple]:
    """Return (records, get_image) of "pretrain", "train" and, if there is one, "eval"."""
    sets = {}
    if c.data_root:
        for name, (file, folder) in llava_layout(Path(c.data_root)).items():
            # There are too many images to open them all beforehand.
            sets[name] = file_set(c, file, folder, training_size(c), open_images=False)
    elif c.data:
        sets["train"] = file_set(c, Path(c.data), image_folder(c), training_size(c))
        sets["pretrain"] = sets["train"]
        if c.pretrain_data:
            sets["pretrain"] = file_set(c, Path(c.pretrain_data), image_folder(c), training_size(c))
    else:
        from tiny.world import tiny_set
        sets["pretrain"] = tiny_set("pretrain", c.n_pretrain)
        sets["train"] = tiny_set("train", c.n_train, c.n_described, c.n_text)
    held_out = load_eval_set(c)
    if held_out:
        sets["eval"] = held_out
    return sets


def image_folder(c: Config) -> Path:
    """Return the folder of the images of --data and --eval-data."""
    return Path(c.image_folder or Path(c.data or c.eval_data).parent)


def load_eval_set(c: Config) -> tuple | None:
    """Return (records, get_image) of the held-out questions, or None if there are none."""
    if c.eval_data:
        return file_set(c, Path(c.eval_data), image_folder(c), student_size(c), held_out=True)
    if c.data_root:
        return None
    from tiny.world import tiny_set
    return tiny_set(c.eval_split, c.n_eval)


def file_set(c: Config, file: Path, folder: Path, size: int | tuple[int, ...],
             open_images: bool = True, held_out: bool = False) -> tuple:
    """Return (records, get_image) of a file whose rows, and images if asked, have been checked."""
    from real.image_files import DiskImages
    from real.records import read_records
    smallest = DiskImages(folder, 16, c.allow_outside) if open_images else None
    records = read_records(file, folder, c.skip_bad, smallest, held_out)
    return records, DiskImages(folder, size, c.allow_outside)


def build_tokenizer(c: Config, sets: dict[str, tuple], resumed: bool = False):
    """Return the LLM's own tokenizer; for the tiny LLM one of whole words, those of the data."""
    if c.llm:
        from real.pretrained_llm import PretrainedTokenizer
        return PretrainedTokenizer(c.llm, c.prompt)
    if resumed and c.allow_new_data:
        return WordTokenizer(read_words(Path(c.out)))   # the LLM has no place for new words
    tokenizer = WordTokenizer.from_records(itertools.chain(sets["pretrain"][0], sets["train"][0]))
    if c.init_from:
        known = read_words(Path(c.init_from))  # they keep their ids
        new = [word for word in tokenizer.vocabulary if word not in set(known)]
        tokenizer = WordTokenizer(known + new)
    return tokenizer


def read_words(run: Path) -> list[str]:
    """Return the words of a run, in the order of their ids. Raises InputError if they changed."""
    file = run / "vocabulary.json"
    words = read_json(file)
    well_formed = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not well_formed or words[:len(WordTokenizer.SPECIAL)] != WordTokenizer.SPECIAL:
        raise InputError(f"{file}: is no list of words as a run leaves it; copy it again")
    for weights in run.glob("model*.safetensors"):
        known = read_about(weights).get("words")
        if known and known != digest(*words):
            raise InputError(f"{file}: has changed since {weights} was written; copy it again")
    return words


def build_datasets(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> dict:
    """Return {stage: its Conversations}, with n image tokens for each image."""
    # Stage 1 has captions, if there are any, and no row without an image: it has nothing to align.
    records, get_image = sets["pretrain"]
    rows = [row for row, record in enumerate(records) if "image" in record]
    if isinstance(records, list):
        pictured = [records[row] for row in rows]
    else:
        pictured = records.select(rows)     # they are read when they are used
    template = "plain" if c.pretrain_data or not c.data else c.prompt
    captions = Conversations(pictured, get_image, tokenizer, template, n, c.max_length, c.skip_bad,
                             c.caption_end)
    return {0: captions, 1: captions,
            2: Conversations(*sets["train"], tokenizer, c.prompt, n, c.max_length, c.skip_bad)}


def rows_digest(records) -> str:
    """Return a hash of all rows, of each one's JSON."""
    h = hashlib.sha256()
    for record in records:
        h.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return h.hexdigest()


def images_of(sets: list[tuple]) -> dict:
    """Return {image name: its get_image} of all images of some sets, sorted by name."""
    source = {}
    for records, get_image in sets:
        source.update({record["image"]: get_image for record in records if "image" in record})
    return dict(sorted(source.items()))


def student_size(c: Config) -> int | tuple[int, ...]:
    """Return the size of the loader's image, or of its views, if only the student sees it."""
    return training_size(dataclasses.replace(c, lambda_kd=0.0))


def training_size(c: Config) -> int | tuple[int, ...]:
    """Return the size of a training image, or of its views; without L_kd no teacher sees them."""
    if c.image_views == "one":
        return c.image_size
    teachers = c.teachers if c.lambda_kd or c.student == "ensemble" else ()
    return tuple(sorted({parse_spec(getattr(c, name))[1] for name in ("clip", *teachers)}))


def batch_order(dataset: Conversations, batch_size: int, seed: int, epoch: int,
                group: int = 1) -> list[list[int]]:
    """Return the rows of each batch of an epoch; a last, smaller one only if it is the only one."""
    generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if group == 1:
        count = max(1, len(dataset) // batch_size)
        return [order[k * batch_size:(k + 1) * batch_size] for k in range(count)]
    # To save padding, sort runs of `group` batches by length, with and without an image apart.
    sizes = dataset.sizes()
    batches, left_over = [], []
    for has_image in (True, False):
        rows = [i for i in order if sizes[i][0] == has_image]
        for k in range(0, len(rows), batch_size * group):
            run = sorted(rows[k:k + batch_size * group], key=lambda i: sizes[i][1])
            whole = len(run) - len(run) % batch_size
            batches += [run[j:j + batch_size] for j in range(0, whole, batch_size)]
            left_over += run[whole:]
    batches += [left_over[j:j + batch_size] for j in range(0, len(left_over), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    # Sorted runs would make long and short batches alternate: shuffle them.
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def count_steps(rows: int, batch_size: int, epochs: float) -> int:
    return max(1, round(epochs * max(1, rows // batch_size)))


def make_loader(dataset: Conversations, batch_size: int, epochs: float, seed: int, pad: int,
                group: int = 1, pieces: int = 1, own_pieces: range = range(1), start: int = 0,
                **options) -> DataLoader:
    """Load the micro-batches of this process, from step `start` on; `options` are torch's."""
    steps = count_steps(len(dataset), batch_size, epochs)
    # Lazy, epoch after epoch: an order is drawn when its epoch begins.
    orders = (batch_order(dataset, batch_size, seed, epoch, group) for epoch in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(orders), start, steps)
    # Each batch is divided into `pieces` micro-batches; this process gets `own_pieces`.
    rows = (batch[k::pieces] for batch in batches for k in own_pieces)
    return DataLoader(dataset, batch_sampler=rows, collate_fn=functools.partial(collate, pad=pad),
                      **options)


# A forked worker shares the records with its parent, a spawned one gets a pickled copy. But macOS's
# own libraries may fail after a fork, and Windows has none.
START = "fork" if sys.platform == "linux" else "spawn"
PREFETCH = 2  # batches that a worker makes in advance, torch's default


def loader_options(c: Config) -> dict:
    """Return the arguments of torch's DataLoader that a Config decides."""
    options = {"num_workers": c.workers, "pin_memory": c.device == "cuda"}

    def kill_workers() -> None:     # they ignore the signal that Python sends and then waits for
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # else torch calls their end an error
        for worker in multiprocessing.active_children():
            worker.kill()

    if c.workers:
        atexit.register(kill_workers)
        options.update(worker_init_fn=begin_worker, multiprocessing_context=START)
    return options


def begin_worker(worker: int) -> None:
    """Leave signals to the run, which needs its loader to finish a step: all processes get them."""
    gc.freeze()  # a collection writes into every object, and would copy the memory they share
    listen(signal.SIG_IGN)
