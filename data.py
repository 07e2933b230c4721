"""The data: LLaVA-format records, their prompts and label masks, their images, and batches.

A record is what LLaVA's JSON files hold, one conversation about one image or none:

    {"id": "7", "image": "train/7.png",
     "conversations": [{"from": "human", "value": "<image>\\nwhat shape?"},
                       {"from": "gpt", "value": "heart"}, ...]}

`conversation_ids` turns it into token ids and labels; `get_image(name)` returns its image as a
uint8 tensor (3, R, R), or as {R_i: (3, R_i, R_i)}, one for each size that an encoder sees. Both the
tiny world (tiny/world.py) and files on disk (real/) come as records and get_image, and take the
same path from there on.

Letters: B samples, B_img of them with an image, T text tokens, R pixels of the square image, R_i
pixels of encoder i's view.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

IGNORE = -100  # a label that the loss skips (torch's cross_entropy default)
MEAN_COLOUR = (122, 116, 104)  # CLIP's
LARGE_SIDE = 4096  # px; a square of it takes 50 MB
CaptionEnd = Literal["eos", "newline"]  # what ends a caption of stage 1: </s>, or as in LLaVA


class InputError(ValueError):
    """Bad input; its text, one line, names the file, row or flag and the remedy."""


def row_name(row: int, record) -> str:
    """Return the name of a row in errors: its number, and its id. A bad row may be anything."""
    if isinstance(record, dict) and "id" in record:
        return f"row {row} (counted from 0, id {record['id']})"
    return f"row {row} (counted from 0)"


# ------------------------------------------------------------------------------------------------
# From a record to token ids and labels


def conversation_ids(record: dict, template: str, tokenizer, n: int,
                     caption_end: CaptionEnd = "eos") -> tuple[list, list]:
    r"""Return token ids and labels (T,) of a record. In these prompts ^ marks what the loss sees:

        "plain" (captions)       <s><image>a red heart on grass</s>
                                           ^^^^^^^^^^^^^^^^^^^^^^^^
        "v1" (conversations)     <s>USER: <image>\nwhat shape? ASSISTANT: heart</s>
                                                                         ^^^^^^^^^
                                 USER: what colour? ASSISTANT: red</s>
                                                              ^^^^^^^
    They are LLaVA's prompts and LLaVA's ids. `<image>` becomes n copies of the image token, which
    VLM.splice replaces by the student's tokens. "plain" drops the human's words: the image alone
    must explain the caption, which ends with </s> or, as in LLaVA, with a "newline". A real LLM has
    Vicuna's instruction before the first USER:. A record that ends with a question ends after
    "ASSISTANT:". "chat" is a real LLM's own chat template, under the same rule: answers and their
    ends are learnt. Words of a text are never control tokens, even if it reads </s> or USER:.
    """
    if template == "plain":
        pieces = caption_pieces(record, tokenizer, n, caption_end)
    elif template == "chat":
        pieces = tokenizer.chat_pieces(record, n)
    else:
        pieces = dialogue_pieces(record, tokenizer, n)
    # The labels are the ids themselves where the model answers: model.next_tokens shifts them.
    ids = [] if template == "chat" else [tokenizer.bos]
    labels = [IGNORE] * len(ids)
    for tokens, learnt in pieces:
        ids += tokens
        labels += tokens if learnt else [IGNORE] * len(tokens)
    return ids, labels


def caption_pieces(record: dict, tokenizer, n: int, end: CaptionEnd) -> Iterator[tuple[list, bool]]:
    """Yield the prompt "plain" in pieces: (tokens, whether they are learnt)."""
    for turn in record["conversations"]:
        text = tokenizer.plain(turn["value"])
        if turn["from"] == "human":
            # Of the human's turn only the image is left.
            if "image" in record and "<image>" in turn["value"]:
                yield [tokenizer.image] * n, False
        elif end == "newline":
            yield tokenizer.encode(f"{text}\n"), True
        else:
            yield tokenizer.encode(text) + [tokenizer.eos], True


def dialogue_pieces(record: dict, tokenizer, n: int) -> Iterator[tuple[list, bool]]:
    """Yield the prompt "v1" in pieces: (tokens, whether they are learnt).

    As in LLaVA, the text between two control tokens (an image, </s>) is tokenised as a whole, with
    its spaces as they are.
    """
    encode = tokenizer.encode
    text = tokenizer.system  # all text since the last control token
    for turn in record["conversations"]:
        value = turn["value"]
        if turn["from"] == "gpt":
            # A token may straddle prompt and answer. The answer begins with the first token that
            # the prompt alone does not have.
            tokens = encode(f"{text} {tokenizer.plain(value)}")
            prompt_length = common_length(tokens, encode(text))
            yield tokens[:prompt_length], False
            yield tokens[prompt_length:] + [tokenizer.eos], True
            text = ""
            encode = tokenizer.encode_after_end
            continue
        text += "USER: "
        # Without an "image" in the record <image> is a word like any other.
        if "image" in record and "<image>" in value:
            # The image comes first, wherever the question has it; spaces around the question go.
            yield encode(text) + [tokenizer.image] * n, False
            question = value.replace("<image>", "").strip()
            text = f"\n{tokenizer.plain(question)}" if question else ""
            encode = tokenizer.encode
        else:
            text += tokenizer.plain(value)
        text += " ASSISTANT:"
    yield encode(text), False


def common_length(a: list[int], b: list[int]) -> int:
    """Return how many tokens at the start of a and b are the same."""
    for k, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return k
    return min(len(a), len(b))


# ------------------------------------------------------------------------------------------------
# Images


def blank_image(size: int) -> torch.Tensor:
    """Make an empty picture, uint8 (3, size, size): CLIP's mean colour, 0 after normalisation."""
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)
    return colour[:, None, None].repeat(1, size, size)


def pad_to_square(picture: Image.Image, size: int, shrink: Image.Resampling) -> Image.Image:
    """Pad an RGB picture to a square, so that nothing is cut off and all encoders see the same.

    The padding is CLIP's mean colour, as in LLaVA.
    """
    # The square of a large, long and thin picture would take far more memory than the picture, so
    # such a picture is shrunk to `size` first.
    long, short = max(picture.size), min(picture.size)
    if long > 4 * short and long > max(size, LARGE_SIDE):
        shrunk = [max(1, round(pixels * size / long)) for pixels in picture.size]
        picture = picture.resize(shrunk, shrink)
    width, height = picture.size
    if height == width:
        return picture
    side = max(height, width)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def square_image(picture: Image.Image, size: int) -> torch.Tensor:
    """Pad an RGB picture to a square and resize it: uint8 (3, size, size)."""
    square = pad_to_square(picture, size, Image.Resampling.BILINEAR)
    image = TF.pil_to_tensor(square)                                            # (3, side, side)
    return TF.resize(image, [size, size], antialias=True)                       # (3, size, size)


def square_views(picture: Image.Image, sizes: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Pad an RGB picture to a square and resize it once to each size: {R_i: (3, R_i, R_i)}.

    Bicubic, by PIL: LLaVA's own pixels.
    """
    views = {}
    for size in sizes:
        square = pad_to_square(picture, size, Image.Resampling.BICUBIC)
        view = square.resize((size, size), Image.Resampling.BICUBIC)
        views[size] = TF.pil_to_tensor(view)                                    # (3, R_i, R_i)
    return views


def stack_images(images: list) -> torch.Tensor | dict[int, torch.Tensor]:
    """Stack images (3, R, R) to (B, 3, R, R), or views {R_i: ...} to {R_i: (B, 3, R_i, R_i)}."""
    if isinstance(images[0], dict):
        return {size: torch.stack([image[size] for image in images]) for size in images[0]}
    return torch.stack(images)                                                  # (B, 3, R, R)


def to_device(value, device: str | torch.device):
    """Move a tensor, or each value of a dict, to a device; return anything else as it is."""
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if not torch.is_tensor(value):
        return value
    # Copies from pinned memory to a CUDA GPU can be asynchronous; to Apple's they must not.
    return value.to(device, non_blocking=torch.device(device).type == "cuda")


# ------------------------------------------------------------------------------------------------
# Samples and batches


class Conversations(Dataset):
    """Records and images as samples {input_ids (T,), labels (T,), image uint8 (3, R, R), ...}.

    The image is what get_image returns, or None. A conversation longer than max_length, its image's
    tokens included, is cut there, as in LLaVA. A row that cannot be used (an unreadable image, no
    answer within max_length, a prompt that is too long) is an InputError in `sample`. dataset[i],
    which worker processes call, returns its text as {"fault": text}; or, with skip_bad, the next
    usable row in its place, with a list of the skipped ones.
    """

    def __init__(self, records: list[dict], get_image: Callable, tokenizer, template: str, n: int,
                 max_length: int, skip_bad: bool = False, caption_end: CaptionEnd = "eos"):
        self.records = records
        self.get_image = get_image
        self.tokenizer = tokenizer
        self.template = template
        self.n = n
        self.max_length = max_length
        self.skip_bad = skip_bad
        self.caption_end = caption_end

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        # Row i, or with skip_bad the first usable row after it.
        skipped = []
        for row in itertools.chain(range(i, len(self)), range(i)):
            try:
                sample = self.sample(row)
                sample["skipped"] = skipped
                return sample
            except InputError as e:
                if not self.skip_bad:
                    return {"fault": str(e)}
                skipped.append(str(e))
        return {"fault": f"no row can be used; the first: {skipped[0]}"}

    def sample(self, row: int) -> dict:
        """Make the sample of one row. Raises InputError, which names the row."""
        record = self.records[row]
        name = row_name(row, record)
        ids, labels = conversation_ids(record, self.template, self.tokenizer, self.n,
                                       self.caption_end)
        cut = len(ids) > self.max_length
        if cut:
            limit = f"--max-length {self.max_length}"
            # A question that is to be answered must not lose its end.
            if record["conversations"][-1]["from"] == "human":
                raise InputError(f"{name} has {len(ids)} tokens, more than {limit}: shorten it "
                                 "or raise the flag")
            # The rest must hold the whole image and something to learn.
            image_tokens = ids.count(self.tokenizer.image)
            ids = ids[:self.max_length]
            labels = labels[:self.max_length]
            nothing_learnt = all(label == IGNORE for label in labels)
            if ids.count(self.tokenizer.image) < image_tokens or nothing_learnt:
                raise InputError(f"{name} has no answer within {limit} tokens: shorten it or "
                                 "raise the flag")
        image = None
        if "image" in record:
            try:
                image = self.get_image(record["image"])       # (3, R, R), or {R_i: (3, R_i, R_i)}
            except InputError as e:
                raise InputError(f"{name} has a bad image: {e}; `python -m tools.check_data` "
                                 "finds all such rows beforehand") from None
        return {"input_ids": ids, "labels": labels, "image": image, "name": record.get("image"),
                "cut": cut}

    def sizes(self) -> list[tuple[bool, int]]:
        """Return (has an image, words of text) of each row: batches can be grouped by it."""
        sizes = []
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            sizes.append(("image" in record, words))
        return sizes


def collate(samples: list[dict], pad: int, side: str = "right") -> dict:
    """Make a batch of samples, padded on the right to train and on the left to generate.

    input_ids, labels, attention_mask (B, T); images uint8 (B_img, 3, R, R) or {R_i: (B_img, 3, R_i,
    R_i)} of the samples that have one, in order (None if none has), and their image_names; the rows
    that were skipped, and how many were cut.
    """
    # An unusable row ends the run: its text is passed on alone.
    for sample in samples:
        if "fault" in sample:
            return {"fault": sample["fault"]}
    longest = max(len(sample["input_ids"]) for sample in samples)

    def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
        full = []
        for row in rows:
            fill = [value] * (longest - len(row))
            full.append(fill + row if side == "left" else row + fill)
        return torch.tensor(full)                                           # (B, T)

    # Text-only samples have no image: B_img may be smaller than B.
    pictured = [sample for sample in samples if sample["image"] is not None]
    images = stack_images([sample["image"] for sample in pictured]) if pictured else None
    skipped = []
    for sample in samples:
        skipped += sample.get("skipped", [])
    return {
        "input_ids": pad_rows([sample["input_ids"] for sample in samples], pad),
        "labels": pad_rows([sample["labels"] for sample in samples], IGNORE),
        "attention_mask": pad_rows([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "images": images,
        "image_names": [sample["name"] for sample in pictured],
        "skipped": skipped,
        "cut": sum(sample["cut"] for sample in samples),
    }
