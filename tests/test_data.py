"""Loading data: pictures, batches, bad rows, LLaVA's layout, the teachers' cache."""

import hashlib
import json
import pickle

import pytest
import torch

from data import Conversations, InputError, blank_image, collate
from plumbing.batches import batch_order, make_loader
from plumbing.sets import llava_layout
from plumbing.teacher_outputs import CachedTeachers, TeacherCache

from real.image_files import load_image
from real.records import RecordFile, find_rows
from real.records import read_list, rows_digest
from teachers import Teachers
from tests.common import save_png, some_conversations, tiny_teachers
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records


def test_padding_to_square_keeps_the_whole_image(tmp_path):
    """A wide image is padded above and below with CLIP's mean colour, never cropped."""
    wide = torch.full((3, 24, 96), 200, dtype=torch.uint8)
    save_png(tmp_path / "wide.png", wide)
    square = load_image(tmp_path / "wide.png", 96)
    assert torch.equal(square[:, 36:60], wide)
    assert torch.equal(square[:, :36], blank_image(96)[:, :36])
    assert torch.equal(square[:, 60:], blank_image(96)[:, 60:])


# ------------------------------------------------------------------------------------------------
# Batches


def test_batches_are_a_function_of_seed_and_epoch():
    """The same seed gives the same order, another seed or epoch another.

    An epoch visits each sample once.
    """
    tokenizer = WordTokenizer(WordTokenizer.SPECIAL)
    dataset = Conversations(world_records("train", "text", 8), None, tokenizer, "v1", 0, 99)
    orders = []
    for seed in (0, 0, 1):
        orders.append(list(make_loader(dataset, 2, 2, seed, 0).batch_sampler))
    assert orders[0] == orders[1] != orders[2]
    first, second = sum(orders[0][:4], []), sum(orders[0][4:], [])
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def padding(dataset: Conversations, batches: list[list[int]]) -> int:
    """Words of padding in some batches."""
    sizes = dataset.sizes()
    total = 0
    for batch in batches:
        words = [sizes[row][1] for row in batch]
        total += max(words) * len(batch) - sum(words)
    return total


def test_grouped_batches_hold_every_row_once():
    """Grouped batches are all rows but the left-over, each once; other epochs, other order.

    They are of one kind and of like lengths, but for the mixed ones.
    """
    dataset = some_conversations(40, 25)
    batches = batch_order(dataset, 4, seed=1, epoch=0, group=3)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 64
    assert all(len(batch) == 4 for batch in batches)
    assert batches == batch_order(dataset, 4, 1, 0, 3) != batch_order(dataset, 4, 1, 1, 3)
    kinds = [{"image" in dataset.records[row] for row in batch} for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds) <= 1
    assert {True} in kinds
    assert {False} in kinds
    assert padding(dataset, batches) < padding(dataset, batch_order(dataset, 4, 1, 0))


def test_micro_batches_and_workers_change_nothing():
    """What two processes get of a batch, in two micro-batches each, is together the batch.

    Worker processes and a later start give the same batches.
    """
    dataset = some_conversations()
    batches = list(make_loader(dataset, 8, 2, 5, 0))
    parts = []
    for own, workers in ((range(2), 0), (range(2, 4), 1)):
        loader = make_loader(dataset, 8, 2, 5, 0, pieces=4, own_pieces=own,
                             num_workers=workers)
        parts.append(list(loader))
    for step, batch in enumerate(batches):
        names = []
        for part in parts:
            for micro in part[2 * step:2 * step + 2]:
                names += micro["image_names"]
        assert sorted(names) == sorted(batch["image_names"])
    later = list(make_loader(dataset, 8, 2, 5, 0, start=3))
    assert len(later) == len(batches) - 3
    for a, b in zip(later, batches[3:]):
        assert a["input_ids"].tolist() == b["input_ids"].tolist()


# ------------------------------------------------------------------------------------------------
# Rows that cannot be used


def conversations_with_a_broken_image() -> Conversations:
    """12 dialogues; the image of row 3 cannot be read."""
    def get_image(name: str) -> torch.Tensor:
        if name.endswith("/3.png"):
            raise InputError("3.png: not a readable image")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    dataset = some_conversations(n_text=0)
    dataset.get_image = get_image
    return dataset


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_named(workers):
    """A bad image is a fault that names the row, even from a worker process."""
    loader = make_loader(conversations_with_a_broken_image(), 4, 1, 0, 0, num_workers=workers)
    faults = [batch["fault"] for batch in loader if "fault" in batch]
    expected = "row 3 (counted from 0, id train-chat-3) has a bad image: 3.png: not a readable"
    assert len(faults) == 1
    assert faults[0].startswith(expected)


def test_a_bad_row_is_skipped_and_counted():
    """With skip_bad the next good row comes in its place, and a line is kept."""
    dataset = conversations_with_a_broken_image()
    dataset.skip_bad = True
    batches = list(make_loader(dataset, 4, 1, 0, 0, num_workers=1))
    names = [name for batch in batches for name in batch["image_names"]]
    assert sum(len(batch["skipped"]) for batch in batches) == 1
    assert "train-0/3.png" not in names
    assert names.count("train-0/4.png") == 2


def test_a_long_conversation_is_cut_and_counted():
    """What is longer than max_length is cut; without an answer left it is a bad row."""
    dataset = some_conversations(n_text=0)
    length = len(dataset.sample(4)["input_ids"])
    assert not dataset.sample(4)["cut"]
    dataset.max_length = length - 4
    sample = dataset.sample(4)
    assert sample["cut"]
    assert len(sample["input_ids"]) == len(sample["labels"]) == length - 4
    assert collate([sample, sample], 0)["cut"] == 2
    dataset.max_length = 40
    fault = "row 4 .* has no answer within --max-length 40 tokens"
    with pytest.raises(InputError, match=fault):
        dataset.sample(4)


def test_llava_layout_says_what_is_missing(real_folder, tmp_path):
    """--data-root with a part missing is one line with that part and the whole layout."""
    assert set(llava_layout(real_folder)) == {"pretrain", "train"}
    fault = ("has no LLaVA-Pretrain/blip_laion_cc_sbu_558k.json; LLaVA's layout .* gqa/images")
    with pytest.raises(InputError, match=fault):
        llava_layout(tmp_path)


# ------------------------------------------------------------------------------------------------
# Rows that stay in their file


ODD = [{"id": 1, "text": 'a "]}, {" b \\ \u00e9\U0001f600'}, [], 12, "a, b]", None,
       {"deep": [[{}]]}, -1.5e-3, {"long": "x" * 3000}]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["dense", "wide", "escaped", "bom", "lines", "crlf"])
def test_rows_of_a_file_are_those_of_the_list(tmp_path, monkeypatch, form, block):
    """Row by row a file says what json.loads says of it, whatever its form and read in any blocks.

    One row, some, from the end, in order; and the hash is that of the whole list's JSON.
    """
    monkeypatch.setattr(record_file, "BLOCK", block)
    texts = {
        "dense": json.dumps(ODD, ensure_ascii=False, separators=(",", ":")),
        "wide": " \n" + json.dumps(ODD, ensure_ascii=False, indent=2) + "\n\n",
        "escaped": json.dumps(ODD),
        "bom": "\ufeff" + json.dumps(ODD, ensure_ascii=False),
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in ODD) + "\n\n",
        "crlf": "\ufeff" + "\r\n".join(json.dumps(row) for row in ODD),
    }
    file = tmp_path / "rows.json"
    file.write_bytes(texts[form].encode())
    rows = read_list(file)
    assert isinstance(rows, RecordFile)
    assert list(rows) == ODD == rows[:]
    assert [rows[i] for i in range(-len(ODD), len(ODD))] == ODD + ODD
    assert rows[1:4] == ODD[1:4]
    assert list(rows.select([5, 2])) == [ODD[5], ODD[2]]
    with pytest.raises(IndexError):
        rows[len(ODD)]
    assert rows_digest(rows) == rows_digest(ODD)
    assert rows_digest(ODD) == hashlib.sha256(json.dumps(ODD, sort_keys=True).encode()).hexdigest()
    assert list(pickle.loads(pickle.dumps(rows))) == ODD


@pytest.mark.parametrize("text", ["", "[", "[]", "[1, 2", "[1 2]", "[1,]", "[1] 2", '{"a": 1}', "1",
                                  "[1, nul]", '["a', "[" * 100_000, b"[1, \"\xff\"]"])
def test_what_is_no_list_of_rows_is_left_to_the_json_reader(tmp_path, text):
    """Then its error lines are the old ones."""
    file = tmp_path / "rows.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert find_rows(file) is None
    with pytest.raises(InputError, match="not valid JSON|must be a JSON list"):
        read_list(file)


def test_a_file_that_changes_under_the_run_is_named(tmp_path):
    """A row that is no longer where it was is an error, not another row's half."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ODD), encoding="utf-8")
    rows = read_list(file)
    file.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(InputError, match="has changed while it was read"):
        rows[0]


# ------------------------------------------------------------------------------------------------
# The teachers' cache


NAMES = [f"train-0/{i}.png" for i in range(5)]


def make_caches(teachers: Teachers, pictures: WorldImages, folder) -> dict[str, TeacherCache]:
    caches = {}
    for name, encoder in teachers.encoders.items():
        caches[name] = TeacherCache(folder, name, encoder, NAMES, pictures, "here",
                                    pictures.fingerprint(NAMES), batch=2)
    return caches


def test_cached_teachers_are_the_teachers_in_fp16(tmp_path):
    """From --cache-teachers come the teachers' own outputs, rounded to fp16, without running them.

    For any images in any order; made once.
    """
    teachers, pictures = tiny_teachers(), WorldImages("train", 5)
    plain = teachers(torch.stack([pictures(NAMES[i]) for i in (3, 0)]), [])
    make_caches(teachers, pictures, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cached = CachedTeachers(teachers, make_caches(teachers, pictures, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert not list(tmp_path.glob("*.tmp"))
    outputs = cached(torch.zeros(2, 3, 96, 96), [NAMES[3], NAMES[0]])
    for name, output in plain.items():
        for field, value in output._asdict().items():
            read = getattr(outputs[name], field)
            if value is None:
                assert read is None
            else:
                torch.testing.assert_close(read, value, rtol=2 ** -10, atol=1e-3)


def test_a_stale_cache_is_refused(tmp_path):
    """Images that have changed under the same names are an error; other weights, another cache."""
    teachers, pictures = tiny_teachers(), WorldImages("train", 5)
    make_caches(teachers, pictures, tmp_path)
    pictures.images[0] += 1
    with pytest.raises(InputError, match="images have changed"):
        make_caches(teachers, pictures, tmp_path)
    pictures.images[0] -= 1
    before = set(tmp_path.iterdir())
    next(teachers.encoders["eva"].parameters()).data += 1
    changed = make_caches(teachers, pictures, tmp_path)
    added = set(tmp_path.iterdir()) - before
    assert added and all(path.name.startswith("eva-") for path in added)
    tokens = changed["eva"].read(NAMES[:1], torch.device("cpu")).tokens
    own = teachers.encoders["eva"](pictures(NAMES[0])[None]).tokens
    torch.testing.assert_close(tokens, own, rtol=2 ** -10, atol=1e-3)
