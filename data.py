"""The data: LLaVA-format records, their prompts and label masks, their images, and batches.

A record is what LLaVA's JSON files hold, one conversation about one image or none:

    {"id": "7", "image": "train/7.png",
     "conversations": [{"from": "human", "value": "<image>\\nwhat shape?"},
                       {"from": "gpt", "value": "heart"}, ...]}

`conversation_ids` makes token ids and labels of it; `get_image(name)` gives its image as a uint8
tensor (3, R, R). Both the tiny world (tiny/world.py) and files on disk come as records and
get_image, and take the same path from there on.

Letters: B samples, B_img of them with an image, T text tokens, R pixels of the square image.
"""

import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

IGNORE = -100  # a label that the loss skips (torch's cross_entropy default)


class DataError(ValueError):
    """A file, record or image that cannot be used; its text names it and the remedy."""


# ------------------------------------------------------------------------------------------------
# From a record to token ids and labels


def conversation_ids(record: dict, template: str, tokenizer, n: int) -> tuple[list, list]:
    r"""Token ids and labels (T,) of a record; ^ marks what the loss sees:

        "plain" (captions)       <s><image>a red heart on grass</s>
                                           ^^^^^^^^^^^^^^^^^^^^^^^^
        "v1" (conversations)     <s>USER: <image>\nwhat shape? ASSISTANT: heart</s>
                                                                         ^^^^^^^^^
                                 USER: what colour? ASSISTANT: red</s>
                                                              ^^^^^^^
    LLaVA's prompts, built piece by piece so that the mask is exact by construction. `<image>`
    becomes n copies of the image token: the places of the student's tokens. "plain" drops the
    human's words: the image alone must explain the caption. A real LLM has Vicuna's instruction
    before the first USER: and a space before each answer. A record that ends with a question ends
    after "ASSISTANT:".
    """
    ids = [tokenizer.bos]
    labels = [IGNORE]
    for i, turn in enumerate(record["conversations"]):
        if turn["from"] == "gpt":
            space = tokenizer.space if template == "v1" else ""
            answer = tokenizer.encode(space + turn["value"]) + [tokenizer.eos]
            ids += answer
            labels += answer
            continue
        images = turn["value"].count("<image>")
        if template == "plain":
            prompt = "<image>" * images
        else:
            # the image first, wherever the question has it, as LLaVA does
            system = tokenizer.system if i == 0 else ""
            picture = "<image>" * images + "\n" if images else ""
            question = turn["value"].replace("<image>", "").strip()
            prompt = f"{system}USER: {picture}{question} ASSISTANT:"
        asked = encode_with_images(prompt, tokenizer, n)
        ids += asked
        labels += [IGNORE] * len(asked)
    return ids, labels


def encode_with_images(prompt: str, tokenizer, n: int) -> list[int]:
    """Token ids of a prompt, with n image tokens in place of each <image>."""
    before, *after = prompt.split("<image>")
    ids = tokenizer.encode(before)
    for text in after:
        ids += [tokenizer.image] * n + tokenizer.encode(text)
    return ids


# ------------------------------------------------------------------------------------------------
# JSON files


def read_json(path: Path):
    """The value of a JSON file. Raises DataError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not valid JSON: {e}") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from None


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    temporary.rename(path)


# ------------------------------------------------------------------------------------------------
# Images


def blank_image(size: int) -> torch.Tensor:
    """A picture of nothing, uint8 (3, size, size): CLIP's mean colour, 0 after normalisation."""
    colour = torch.tensor([122, 116, 104], dtype=torch.uint8)
    return colour[:, None, None].repeat(1, size, size)


def load_image(path: Path, size: int) -> torch.Tensor:
    """An image file as uint8 (3, size, size). Raises DataError if it is missing or unreadable."""
    try:
        with Image.open(path) as file:
            return square_image(file.convert("RGB"), size)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{path}: not a readable image ({type(e).__name__}); replace the file or "
                        "drop its row") from None


def square_image(picture: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture padded to a square, then resized: uint8 (3, size, size).

    So nothing is cut off and all encoders see one geometry. The padding is CLIP's mean colour, as
    in LLaVA.
    """
    image = TF.pil_to_tensor(picture)                                       # (3, height, width)
    _, height, width = image.shape
    if height != width:
        side = max(height, width)
        left = (side - width) // 2
        top = (side - height) // 2
        canvas = blank_image(side)
        canvas[:, top:top + height, left:left + width] = image
        image = canvas                                                      # (3, side, side)
    return TF.resize(image, [size, size], antialias=True)                   # (3, size, size)


class DiskImages:
    """get_image for records of a file on disk, whose image names are relative to `folder`."""

    def __init__(self, folder: Path, size: int):
        self.folder = Path(folder)
        self.size = size
        self.source = str(self.folder.resolve())

    def __call__(self, name: str) -> torch.Tensor:
        return load_image(self.folder / name, self.size)

    def fingerprint(self, names: list[str]) -> str:
        """Changes when a file's size or time does: half a million files are too many to read."""
        stats = [os.stat(self.folder / name) for name in names]
        seen = [(s.st_size, s.st_mtime_ns) for s in stats]
        return hashlib.sha256(repr(seen).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Samples and batches


class Conversations(Dataset):
    """Records and images as samples {input_ids (T,), labels (T,), image uint8 (3, R, R), ...}.

    A sample is made when it is asked for. A conversation longer than max_length, its image's tokens
    counted, is cut there, as in LLaVA. What cannot be used (an unreadable image, no answer within
    max_length, a prompt that is too long) is a DataError in `sample`. In dataset[i], which worker
    processes call, it is returned as {"fault": text}; or, with skip_bad, the next usable row comes
    in its place, with a list of what was skipped.
    """

    def __init__(self, records: list[dict], get_image: Callable, tokenizer, template: str, n: int,
                 max_length: int, skip_bad: bool = False):
        self.records = records
        self.get_image = get_image
        self.tokenizer = tokenizer
        self.template = template
        self.n = n
        self.max_length = max_length
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        skipped = []
        for row in itertools.chain(range(i, len(self)), range(i)):
            try:
                sample = self.sample(row)
                sample["skipped"] = skipped
                return sample
            except DataError as e:
                if not self.skip_bad:
                    return {"fault": str(e)}
                skipped.append(str(e))
        return {"fault": f"no row can be used; the first: {skipped[0]}"}

    def sample(self, row: int) -> dict:
        """The sample of one row. Raises DataError."""
        record = self.records[row]
        place = f"row {row} (counted from 0, id {record.get('id')})"
        ids, labels = conversation_ids(record, self.template, self.tokenizer, self.n)
        cut = len(ids) > self.max_length
        if cut:
            limit = f"--max-length {self.max_length}"
            if record["conversations"][-1]["from"] == "human":
                raise DataError(f"{place} has {len(ids)} tokens, more than {limit}: shorten it or "
                                "raise the flag")
            image_tokens = ids.count(self.tokenizer.image)
            ids = ids[:self.max_length]
            labels = labels[:self.max_length]
            nothing_learnt = all(label == IGNORE for label in labels)
            if ids.count(self.tokenizer.image) < image_tokens or nothing_learnt:
                raise DataError(f"{place} has no answer within {limit} tokens: shorten it or raise "
                                "the flag")
        image = None
        if "image" in record:
            try:
                image = self.get_image(record["image"])                     # (3, R, R)
            except DataError as e:
                raise DataError(f"{place} has a bad image: {e}; `python -m tools.check_data` finds "
                                "all such rows beforehand") from None
        return {"input_ids": ids, "labels": labels, "image": image, "name": record.get("image"),
                "cut": cut}

    def sizes(self) -> list[tuple[bool, int]]:
        """(has an image, words of text) of each row: what batches are grouped by."""
        sizes = []
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            sizes.append(("image" in record, words))
        return sizes


def collate(samples: list[dict], pad: int, side: str = "right") -> dict:
    """A batch of samples, padded on the right to train and on the left to generate.

    input_ids, labels, attention_mask (B, T); images uint8 (B_img, 3, R, R) of the samples that have
    one, in order, None if none has; image_names, theirs; and what was skipped and cut. A fault
    among the samples is passed on alone.
    """
    for sample in samples:
        if "fault" in sample:
            return {"fault": sample["fault"]}
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        full = []
        for row in rows:
            fill = [value] * (longest - len(row))
            full.append(fill + row if side == "left" else row + fill)
        return torch.tensor(full)                                           # (B, T)

    pictured = [sample for sample in samples if sample["image"] is not None]
    images = torch.stack([sample["image"] for sample in pictured]) if pictured else None
    skipped = []
    for sample in samples:
        skipped += sample.get("skipped", [])
    return {
        "input_ids": padded([sample["input_ids"] for sample in samples], pad),
        "labels": padded([sample["labels"] for sample in samples], IGNORE),
        "attention_mask": padded([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "images": images,
        "image_names": [sample["name"] for sample in pictured],
        "skipped": skipped,
        "cut": sum(sample["cut"] for sample in samples),
    }


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
                workers: int = 0) -> DataLoader:
    """Shuffled batches from step `start` on.

    Each is dealt out into `pieces` micro-batches, of which this process gets those in `own_pieces`,
    one after the other.
    """
    steps = count_steps(len(dataset), batch_size, epochs)
    batches = []
    for epoch in range(math.ceil(epochs)):
        batches += batch_order(dataset, batch_size, seed, epoch, group)
    micro_batches = [batch[k::pieces] for batch in batches[start:steps] for k in own_pieces]
    return DataLoader(dataset, batch_sampler=micro_batches, num_workers=workers,
                      collate_fn=functools.partial(collate, pad=pad))
