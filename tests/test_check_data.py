"""tools.check_data and training: every bad row of a set is one line, and the good ones stay."""

import json
import os

import pytest

from data import InputError
from plumbing.cli import run
from real.image_files import DiskImages
from real.records import read_records
from tests.common import conversation, images, save_png
from tools import check_data

QUESTIONS = conversation("<image>\nwhat?", "that")
GOOD = [
    {"image": "ok.png", "conversations": QUESTIONS},
    {"image": None, "conversations": conversation("the tag <image>\nin a text", "<image>")},
]
BAD = {  # what is said of a row: the row. (docs/messages.md has more of them.)
    "not a readable image": {"image": "corrupt.png", "conversations": QUESTIONS},
    "a\\x00b.png: not a readable image": {"image": "a\0b.png", "conversations": QUESTIONS},
    "\\ud83d.png: not a readable image": {"image": "\ud83d.png", "conversations": QUESTIONS},
    "Too many levels of symbolic links": {"image": "loop.png", "conversations": QUESTIONS},
    "not a regular file": {"image": "pipe.png", "conversations": QUESTIONS},
    "File name too long":
        {"image": "data:image/png;base64," + "A" * 30_000, "conversations": QUESTIONS},
    '"image" is not a file name': {"image": 3, "conversations": QUESTIONS},
    "lies outside the image folder": {"image": "../ok.png", "conversations": QUESTIONS},
    "0 <image> token": {"image": "ok.png", "conversations": conversation("what?", "that")},
    "not an object": 7,
    "has an <image> line in a question": {"conversations": QUESTIONS},
    'an <image> line in a question but no "image" file':
        {"image": None, "conversations": conversation("a?", "b", "what?\r\n <image> \n", "that")},
}


@pytest.fixture
def folder(tmp_path):
    save_png(tmp_path / "ok.png", images(1)[0])
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG\r\n not a picture")
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
