"""From a Config to the data of a run: records and images of each set, their words, the datasets."""

import itertools
from pathlib import Path

from data import Conversations, InputError
from plumbing.config import Config
from plumbing.files import digest, read_about, read_json
from real.image_files import DiskImages, Size
from real.pretrained_llm import PretrainedTokenizer
from real.records import read_records, select_rows
from teachers import parse_spec
from tiny.llm import WordTokenizer
from tiny.world import tiny_set

LLAVA_FILES = {  # set: (JSON file, folder of its images), both below --data-root
    "pretrain": ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"),
    "train": ("llava_v1_5_mix665k.json", "."),
}
LLAVA_IMAGES = ("LLaVA-Pretrain/images", "coco/train2017", "gqa/images", "ocr_vqa/images",
                "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


def llava_layout(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return (JSON file, image folder) of LLaVA's captions and conversations under `root`.

    They are laid out as LLaVA's docs/Data.md says. Raises InputError, with the layout, if a part
    is missing.
    """
    files = [file for file, _ in LLAVA_FILES.values()]
    for part in (*files, *LLAVA_IMAGES):
        if not (root / part).exists():
            raise InputError(f"--data-root {root}: has no {part}; LLaVA's layout (its docs/Data.md "
                             f"says where to get each) is {', '.join(files)} and the image folders "
                             f"{', '.join(LLAVA_IMAGES)}")
    return {name: (root / file, root / folder) for name, (file, folder) in LLAVA_FILES.items()}


def load_sets(c: Config) -> dict[str, tuple]:
    """Return (records, get_image) of "pretrain", "train" and, if there is one, "eval"."""
    if c.data_root:
        sets = {}
        for name, (file, folder) in llava_layout(Path(c.data_root)).items():
            # There are too many images to open them all beforehand.
            records = read_records(file, folder, c.skip_bad)
            sets[name] = (records, DiskImages(folder, training_size(c), c.allow_outside))
    elif c.data:
        folder = image_folder(c)
        size = training_size(c)
        sets = {"pretrain": checked_set(c, Path(c.pretrain_data or c.data), folder, size),
                "train": checked_set(c, Path(c.data), folder, size)}
    else:
        sets = {"pretrain": tiny_set("pretrain", c.n_pretrain),
                "train": tiny_set("train", c.n_train, c.n_described, c.n_text)}
    held_out = load_eval_set(c)
    if held_out:
        sets["eval"] = held_out
    return sets


def image_folder(c: Config) -> Path:
    """Return the folder of the images of --data."""
    return Path(c.image_folder or Path(c.data).parent)


def load_eval_set(c: Config) -> tuple | None:
    """Return (records, get_image) of the held-out questions, or None if there are none."""
    if c.eval_data:
        folder = c.image_folder or Path(c.data or c.eval_data).parent
        return checked_set(c, Path(c.eval_data), Path(folder), student_size(c))
    return None if c.data_root else tiny_set(c.eval_split, c.n_eval)


def checked_set(c: Config, file: Path, folder: Path, size: Size) -> tuple:
    """Return (records, get_image) of a file, all of whose rows and images are checked first."""
    records = read_records(file, folder, c.skip_bad, DiskImages(folder, 16, c.allow_outside))
    return records, DiskImages(folder, size, c.allow_outside)


def build_tokenizer(c: Config, sets: dict[str, tuple]) -> WordTokenizer | PretrainedTokenizer:
    """Return the LLM's own tokenizer; for the tiny LLM one of whole words, those of the data.

    The words of a run to start from keep their ids, and new words come after them.
    """
    if c.llm:
        return PretrainedTokenizer(c.llm)
    tokenizer = WordTokenizer.from_records(itertools.chain(sets["pretrain"][0], sets["train"][0]))
    if c.init_from:
        known = read_words(Path(c.init_from))
        new = [word for word in tokenizer.vocabulary if word not in set(known)]
        tokenizer = WordTokenizer(known + new)
    return tokenizer


def read_words(run: Path) -> list[str]:
    """Return the words of a run's vocabulary.json, in the order of their ids.

    Raises InputError if it is not such a list, or not the one that the run was trained with.
    """
    file = run / "vocabulary.json"
    words = read_json(file)
    well_formed = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not well_formed or words[:len(WordTokenizer.SPECIAL)] != WordTokenizer.SPECIAL:
        raise InputError(f"{file}: is no list of words as a run leaves it; copy it again")
    for weights in run.glob("model*.safetensors"):
        known = read_about(weights).get("words")
        if known and known != digest(*words):
            raise InputError(f"{file}: has changed since {weights} was written, so its numbers "
                             "mean other words; copy it again")
    return words


def build_datasets(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> dict:
    """Return {stage: its Conversations}, with n image tokens for each image.

    Stage 1 has captions, prompt "plain", or conversations if there are no captions; its rows all
    have an image, because text alone has nothing to align. Stage 2 has conversations, prompt "v1".
    """
    records, get_image = sets["pretrain"]
    rows = [row for row, record in enumerate(records) if "image" in record]
    pictured = select_rows(records, rows)
    if not pictured:
        raise InputError(f"{c.pretrain_data or c.data}: no record has an image, so stage 1 has "
                         "nothing to align")
    captions = not c.data or c.pretrain_data
    template = "plain" if captions else "v1"
    return {1: Conversations(pictured, get_image, tokenizer, template, n, c.max_length, c.skip_bad,
                             c.caption_end),
            2: Conversations(*sets["train"], tokenizer, "v1", n, c.max_length, c.skip_bad)}


# ------------------------------------------------------------------------------------------------
# Sizes of the loader's image


def student_size(c: Config) -> Size:
    """Return the size of the loader's image if only the student sees it."""
    return loader_size(c, c.teachers if c.student == "ensemble" else ("clip",))


def training_size(c: Config) -> Size:
    """Return the size of the loader's training images; without L_kd no teacher sees them."""
    if c.lambda_kd or c.student == "ensemble":
        return loader_size(c, ("clip", *c.teachers))
    return loader_size(c, ("clip",))


def loader_size(c: Config, encoders: tuple[str, ...]) -> Size:
    """Return the size of the loader's image, or the sizes that these encoders need."""
    if c.image_views == "one":
        return c.image_size
    return tuple(sorted({parse_spec(getattr(c, name))[1] for name in encoders}))


def image_bytes(size: Size) -> int:
    """Return the bytes of the loader's image, or of all of its views."""
    sizes = size if isinstance(size, tuple) else (size,)
    return sum(3 * pixels ** 2 for pixels in sizes)
