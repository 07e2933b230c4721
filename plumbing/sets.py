"""From a Config to the data of a run: records and images of each set, their words, the datasets."""

import itertools
from pathlib import Path

from data import Conversations, InputError, conversation_ids
from plumbing.config import Config
from plumbing.files import digest, read_about, read_json
from real.image_files import DiskImages, Size
from real.pretrained_llm import PretrainedTokenizer
from real.records import place_of, read_records, select_rows
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
    """(JSON file, image folder) of LLaVA's 558k captions and 665k conversations under `root`.

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
    """(records, get_image) of "pretrain", "train" and "eval": the one place that knows which."""
    if c.data_root:
        sets = {}
        for name, (file, folder) in llava_layout(Path(c.data_root)).items():
            # too many images to open them all beforehand
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
    """Where the images of --data are."""
    return Path(c.image_folder or Path(c.data).parent)


def load_eval_set(c: Config) -> tuple | None:
    """(records, get_image) of the held-out questions, if there are any."""
    if c.eval_data:
        folder = c.image_folder or Path(c.data or c.eval_data).parent
        return checked_set(c, Path(c.eval_data), Path(folder), student_size(c))
    return None if c.data_root else tiny_set(c.eval_split, c.n_eval)


def checked_set(c: Config, file: Path, folder: Path, size: Size) -> tuple:
    """(records, get_image) of a file whose rows and images are all looked at beforehand."""
    records = read_records(file, folder, c.skip_bad, DiskImages(folder, 16, c.allow_outside))
    return records, DiskImages(folder, size, c.allow_outside)


def build_tokenizer(c: Config, sets: dict[str, tuple]) -> WordTokenizer | PretrainedTokenizer:
    """The LLM's own tokenizer, or for the tiny one a word a token, the words those of the data.

    The words of a run to start from keep their numbers, and new words come after them.
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
    """The words of a run's vocabulary.json, in the order of their numbers.

    Raises InputError if it is no such list, or not the one that the run's weights know.
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
    """{stage: its Conversations}, n image tokens each.

    Stage 1 has captions, prompt "plain", or for want of captions conversations; text alone has
    nothing to align. Stage 2 has conversations, prompt "v1".
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


def check_lengths(c: Config, sets: dict[str, tuple], tokenizer, n: int) -> None:
    """Raise InputError for a prompt that leaves no room for an answer, before anything is trained.

    Of the training rows their first question, of the held-out ones every question.
    """
    files = {"train": c.data or c.data_root, "eval": c.eval_data}
    for name in ("train", "eval"):
        records, _ = sets.get(name, ([], None))
        for row, record in enumerate(records):
            turns = record["conversations"]
            turns = turns[:1] if name == "train" else turns[:-1]
            # a token has at least one character: most rows need not be tokenised
            if sum(len(turn["value"]) for turn in turns) + n + 300 < c.max_length:
                continue
            ids, _ = conversation_ids({**record, "conversations": turns}, "v1", tokenizer, n)
            if len(ids) >= c.max_length and not (name == "train" and c.skip_bad):
                place = f"{files[name] or 'the tiny world'}: {place_of(row, record)}"
                raise InputError(f"{place} has a prompt of {len(ids)} tokens, and --max-length is "
                                 f"{c.max_length}: shorten it or raise the flag")


# ------------------------------------------------------------------------------------------------
# Sizes of the loader's image


def student_size(c: Config) -> Size:
    """What the loader makes of a picture that only the student sees."""
    return loader_size(c, c.teachers if c.student == "ensemble" else ("clip",))


def training_size(c: Config) -> Size:
    """What the loader makes of a picture that is trained on; without L_kd no teacher sees it."""
    if c.lambda_kd or c.student == "ensemble":
        return loader_size(c, ("clip", *c.teachers))
    return loader_size(c, ("clip",))


def loader_size(c: Config, encoders: tuple[str, ...]) -> Size:
    """The size of the loader's image, or the sizes that some encoders want from the original."""
    if c.image_views == "one":
        return c.image_size
    return tuple(sorted({parse_spec(getattr(c, name))[1] for name in encoders}))


def image_bytes(size: Size) -> int:
    """What the loader's image takes, or all of its views."""
    sizes = size if isinstance(size, tuple) else (size,)
    return sum(3 * pixels ** 2 for pixels in sizes)
