"""tools.check_data: every bad row of a set."""

import pytest

from plumbing.cli import run
from plumbing.files import write_json
from tests.common import conversation, images, save_png
from tools import check_data

QUESTIONS = conversation("<image>\nwhat?", "that")
GOOD = {"image": "ok.png", "conversations": QUESTIONS}
BAD = {  # what is said of a row: the row
    "no such image file": {"image": "gone.png", "conversations": QUESTIONS},
    "not a readable image": {"image": "corrupt.png", "conversations": QUESTIONS},
    "question without an answer": {"image": "ok.png", "conversations": QUESTIONS[:1]},
    '"type" that is no text': {"type": 3, "conversations": conversation("what?", "that")},
    '"image" is not a file name': {"image": 3, "conversations": QUESTIONS},
    "lies outside the image folder": {"image": "../ok.png", "conversations": QUESTIONS},
    "0 <image> token": {"image": "ok.png", "conversations": conversation("what?", "that")},
    "must take turns": {"image": "ok.png", "conversations": [QUESTIONS[0], QUESTIONS[0]]},
    'no "conversations"': {},
    "not an object": 7,
    "an <image> in an answer":
        {"image": "ok.png", "conversations": conversation("<image>\nwhat?", "<image>\nwhat?")},
}


@pytest.fixture
def folder(tmp_path):
    save_png(tmp_path / "ok.png", images(1)[0])
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG\r\n not a picture")
    return tmp_path


def test_check_reports_every_bad_row(folder, capsys):
    """It names each bad row with its fault, and exits with 2."""
    write_json(folder / "set.json", [GOOD, *BAD.values()])
    with pytest.raises(SystemExit) as end:
        run(lambda: check_data.main([str(folder / "set.json"), str(folder)]))
    assert end.value.code == 2
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.endswith("12 rows, 11 bad")
    for row, fault in enumerate(BAD, start=1):
        line, = (line for line in lines if f"row {row} " in line)
        assert fault in line


def test_check_passes_a_good_set(folder, capsys):
    """It says so of a set without a bad row, and does not exit with 2."""
    write_json(folder / "set.json", [GOOD])
    check_data.main([str(folder / "set.json"), str(folder)])
    assert capsys.readouterr().out.endswith("1 rows, 0 bad\n")
