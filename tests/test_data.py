"""Loading data: pictures, batches, rows of a file; tools.check_data names every bad row."""

import json
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import data
from data import InputError, collate
from plumbing.cli import run
from plumbing.sets import batch_order, make_loader, rows_digest
from real.image_files import DiskImages
from real.records import RecordFile, find_rows, read_list, read_records
from teachers import VisionEncoder
from tests import common
from tests.common import conversation, images, noise, save_png, some_conversations
from tools import check_data


def llavas_pixels(picture: Image.Image, encoder: VisionEncoder) -> torch.Tensor:
    """Return LLaVA's preprocessing: padded with CLIP's mean colour, bicubic, normalised."""
    side, size = max(picture.size), encoder.image_size
    colour = tuple(int(255 * mean) for mean in timm.data.OPENAI_CLIP_MEAN)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    x = np.asarray(square, np.float32) / 255                                        # (R_i, R_i, 3)
    x = (x - np.float32(encoder.mean)) / np.float32(encoder.std)                    # (R_i, R_i, 3)
    return torch.from_numpy(x).permute(2, 0, 1)[None]                           # (1, 3, R_i, R_i)


@pytest.mark.parametrize("form", [(640, 480), (100, 250), (31, 400), (900, 47), (48, 48)])
def test_views_are_llavas_pixels(form):
    """square_views gives every encoder LLaVA's pixels at its size; one image for all does not."""
    picture = noise(*form)
    encoders = common.tiny_teachers().encoders.values()
    views = data.stack_images([data.square_views(picture, tuple(e.image_size for e in encoders))])
    one = data.stack_images([data.square_image(picture, 128)])
    for encoder in encoders:
        expected = llavas_pixels(picture, encoder)
        torch.testing.assert_close(encoder.view(views), expected, atol=1e-5, rtol=0)
        assert (encoder.view(one) - expected).abs().max() > 0.04


def test_batches_are_a_function_of_seed_and_epoch():
    """Each row is in one batch or left over; grouped, a batch has one kind and similar lengths."""
    dataset = some_conversations(40, 25)
    words = [count for _, count in dataset.sizes()]
    drawn = ((1, 0), (1, 1), (2, 0))    # seed and epoch
    longest = []    # words of the longest row of all batches: what padding costs
    for group in (1, 3):
        first, second, other = (batch_order(dataset, 4, *pair, group) for pair in drawn)
        loader = make_loader(dataset, 4, 2, 1, 0, group=group)
        assert list(loader.batch_sampler) == first + second
        assert first != second and first != other
        for batches in (first, second, other):
            assert {len(batch) for batch in batches} == {4}
            assert len(set(sum(batches, []))) == 64
        longest.append(sum(max(words[row] for row in batch) for batch in first))
    assert longest[1] < longest[0]
    kinds = [{"image" in dataset.records[row] for row in batch} for batch in first]
    assert {True} in kinds and {False} in kinds
    assert sum(len(kind) == 2 for kind in kinds) <= 1


def test_a_bad_row_is_named_or_skipped():
    """A bad image is a fault that names the row; with skip_bad the next good row replaces it."""
    def get_image(name: str) -> torch.Tensor:
        if name.endswith("/3.png"):
            raise InputError("3.png: not a readable image")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    dataset = some_conversations(n_text=0)
    dataset.get_image = get_image
    expected = "row 3 (counted from 0, id train-chat-3) has a bad image: 3.png: not a readable"
    batch = collate([dataset[2], dataset[3]], 0)
    assert set(batch) == {"fault"} and batch["fault"].startswith(expected)
    dataset.skip_bad = True
    batch = collate([dataset[2], dataset[3]], 0)
    assert batch["image_names"] == ["train-0/2.png", "train-0/4.png"]
    assert len(batch["skipped"]) == 1 and batch["skipped"][0].startswith(expected)


def test_a_long_conversation_is_cut_and_counted():
    """A conversation is cut at max_length; without an answer left it is a bad row."""
    dataset = some_conversations(n_text=0)
    length = len(dataset.sample(4)["input_ids"])
    assert not dataset.sample(4)["cut"]
    dataset.max_length = length - 4
    sample = dataset.sample(4)
    assert sample["cut"]
    assert len(sample["input_ids"]) == len(sample["labels"]) == length - 4
    assert collate([sample, sample], 0)["cut"] == 2
    dataset.max_length = 40
    with pytest.raises(InputError, match="row 4 .* has no answer within --max-length 40 tokens"):
        dataset.sample(4)


ODD = [{"id": 1, "text": 'a "]}, {" b \\ é😀\u2028\x85\xa0\x7f'}, [], 12, "a, b]", None,
       {"deep": [[{}]]}, -1.5e-3, {"long": "x" * 3000}, "\ud83d", "\ufeff", 0]


def as_text(value, **options) -> str:
    """Return JSON with its characters as they are, but for the one that no file can hold."""
    return json.dumps(value, ensure_ascii=False, **options).replace("\ud83d", r"\ud83d")


FORMS = {
    "dense": as_text(ODD, separators=(",", ":")),
    "wide": " \n" + as_text(ODD, indent=2) + "\r\n\t",
    "escaped": json.dumps(ODD),
    "byte order mark": "\ufeff" + as_text(ODD),
    "lines": "\n" + "\n \n".join(as_text(row) for row in ODD) + "\n\n",
    "lines of Windows": "\ufeff" + "\r\n".join(as_text(row) for row in ODD),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_file_are_those_of_the_list(tmp_path, form):
    """Each row, the hash and a pickled copy are the list's; a file that has changed is named."""
    file = tmp_path / "rows.json"
    file.write_bytes(FORMS[form].encode())
    rows = read_list(file)
    assert isinstance(rows, RecordFile)
    assert list(rows) == ODD
    assert [rows[i] for i in range(-len(ODD), len(ODD))] == ODD + ODD
    assert list(rows.select([5, 2])) == [ODD[5], ODD[2]]
    assert list(rows[1:4]) == ODD[1:4]
    with pytest.raises(IndexError):
        rows[len(ODD)]
    assert rows_digest(rows) == rows_digest(ODD) != rows_digest(ODD[1:])
    assert list(pickle.loads(pickle.dumps(rows))) == ODD
    file.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(InputError, match="has changed while it was read"):
        rows[0]


@pytest.mark.parametrize("text", [
    "", "[", "[]", "[1, 2", "[1 2]", "[1,]", "[1,,2]", "[1] 2", '{"a": 1}', "1", "1 2", "[1, nul]",
    '["a', '["\n"]', "[1,\x0c2]", "[1]\xa0", "[" * 100_000, b"[1, \"\xff\"]", b'["\xed\xa0\xbd"]',
    b"[1]\n\xe9"])
def test_what_is_no_list_of_rows_is_one_line(tmp_path, text):
    """It names the file. So does what is not UTF-8, or a control character inside a text."""
    file = tmp_path / "rows.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert find_rows(file) is None
    with pytest.raises(InputError, match="rows.json: (not valid JSON|must be a JSON list)") as e:
        read_list(file)
    assert "\n" not in str(e.value)


QUESTIONS = conversation("<image>\nwhat?", "that")
GOOD = [
    {"image": "ok.png", "conversations": QUESTIONS},
    {"image": None, "conversations": conversation("the tag <image>\nin a text", "<image>")},
]
BAD = {  # what is said of a row: the row. (docs/messages.md has more of them.)
    "a\\x00b.png: not a readable image": {"image": "a\0b.png", "conversations": QUESTIONS},
    "\\ud83d.png: not a readable image": {"image": "\ud83d.png", "conversations": QUESTIONS},
    "Too many levels of symbolic links": {"image": "loop.png", "conversations": QUESTIONS},
    "not a regular file": {"image": "pipe.png", "conversations": QUESTIONS},
    "File name too long":
        {"image": "data:image/png;base64," + "A" * 30_000, "conversations": QUESTIONS},
    "has an <image> line in a question": {"conversations": QUESTIONS},
    'an <image> line in a question but no "image" file':
        {"image": None, "conversations": conversation("a?", "b", "what?\r\n <image> \n", "that")},
}


@pytest.fixture
def folder(tmp_path):
    save_png(tmp_path / "ok.png", images(1)[0])
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    rows = [GOOD[0], *BAD.values(), GOOD[1]]
    (tmp_path / "set.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def test_check_reports_every_bad_row(folder, capsys):
    """It names each bad row with its fault, on one line of a readable length; exit status 2."""
    with pytest.raises(SystemExit) as end:
        run(lambda: check_data.main([str(folder / "set.json"), str(folder)]))
    assert end.value.code == 2
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.endswith(f"{len(BAD) + 2} rows, {len(BAD)} bad")
    for line, (row, fault) in zip(lines, enumerate(BAD, start=1), strict=True):
        assert f"row {row} (counted from 0)" in line
        assert fault in line
        assert len(line) < 600
    (folder / "set.json").write_text(json.dumps(GOOD), encoding="utf-8")
    check_data.main([str(folder / "set.json"), str(folder)])  # does not exit
    assert capsys.readouterr().out.endswith("2 rows, 0 bad\n")


def test_training_names_the_first_bad_row_or_skips_all(folder, capsys):
    """--skip-bad leaves the good rows, with a line for each other one."""
    file, get_image = folder / "set.json", DiskImages(folder, 16)
    with pytest.raises(InputError, match="row 1 .*not a readable image.* lists every bad row"):
        read_records(file, folder, False, get_image)
    assert len(read_records(file, folder, True, get_image)) == len(GOOD)
    assert capsys.readouterr().err.count("skipped: ") == len(BAD)


def test_keys_that_nothing_reads_are_named_once(folder, capsys):
    """Pictures, films and answers under other keys, with the count of rows; other keys are not."""
    odd = {"Image": "a.png", "images": ["b.png"], "video": "c.mp4", "files": [{"path": "d.JPG"}],
           "answers": ["so"], "model": "", "source": "drawn", "image_path": None, "width": 3}
    rows = [{**row, **odd} for row in GOOD] + [{**GOOD[0], "video": "e"}]
    (folder / "odd.json").write_text(json.dumps(rows), encoding="utf-8")
    counts = {"Image": 2, "images": 2, "video": 3, "files": 2, "answers": 2}
    for held_out in (False, True):
        flags = ["--held-out"] if held_out else []
        check_data.main([str(folder / "odd.json"), str(folder), *flags])
        notes = capsys.readouterr().err.splitlines()
        expected = [f'note: {folder}/odd.json: "{key}" is in {count} rows, and nothing reads it; '
                    for key, count in counts.items()]
        assert [note.split("the picture")[0] for note in notes if "note" in note] == expected
        counts.pop("answers", None)     # a held-out set may have them


@pytest.mark.parametrize("answers, turns", [("so", 1), ([], 1), ([3], 1), ([" "], 1), ([{}], 1),
                                            (["so"], 2)])
def test_answers_of_a_held_out_row_are_texts(folder, capsys, answers, turns):
    """Several answers belong to one question; of a training set nothing reads them."""
    row = {"answers": answers, "conversations": conversation(*["what?", "that"] * turns)}
    (folder / "set.json").write_text(json.dumps([row]), encoding="utf-8")
    assert len(read_records(folder / "set.json", folder, False)) == 1
    with pytest.raises(InputError, match='row 0 .* "answers" is not a .* --held-out` lists'):
        read_records(folder / "set.json", folder, False, held_out=True)
