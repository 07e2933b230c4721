"""docs/messages.md, row by row: what is given, and the one line that comes back."""

import html
import re
import shlex
import zlib
from pathlib import Path

import pytest

from plumbing.files import write_json
from tests.common import HERE, conversation, error_of, images, save_png

PAGE = HERE / "docs/messages.md"


def rows_of(title: str) -> list[tuple[str, str]]:
    """Return (what is given, the line) of each row of the table below a title of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(.*)` \| `(.*)` \|$", section, flags=re.MULTILINE)
    return [(html.unescape(given), html.unescape(line)) for given, line in found]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a picture, damaged ones, a training set and a held-out set."""
    folder = tmp_path / "here"
    folder.mkdir()
    save_png(folder / "a.png", images(1)[0])
    whole = (folder / "a.png").read_bytes()
    save_png(tmp_path / "a.png", images(1)[0])
    (folder / "text.png").write_text("a picture of a heart", encoding="utf-8")
    (folder / "half.png").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    # a header that promises 100,000 x 100,000 pixels
    header = b"IHDR" + b"\0\1\x86\xa0" * 2 + whole[24:29]
    bomb = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    (folder / "bomb.png").write_bytes(bomb)
    row = {"image": "a.png", "conversations": conversation("<image>what?", "so")}
    write_json(folder / "train.json", [row])
    write_json(folder / "eval.json", [row])
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("given, line", rows_of("Flags"))
def test_flags(place, capsys, given, line):
    """`python train.py --tiny FLAGS`: exit status 2 and this line, before anything is trained."""
    argv = shlex.split(given)
    own_start = argv[0] in ("--config", "--resume", "--evaluate", "--full", "--small")
    assert error_of(argv if own_start else ["--tiny", *argv], capsys) == line
    assert not list(place.rglob("log.jsonl"))


@pytest.mark.parametrize("given, line", rows_of("Rows and images"))
def test_rows_and_images(place, capsys, given, line):
    """`--data train.json --eval-data eval.json`, where train.json holds this."""
    Path("train.json").write_text(given, encoding="utf-8")
    assert error_of("--tiny --data train.json --eval-data eval.json".split(), capsys) == line


@pytest.mark.parametrize("given, line", rows_of("config.json"))
def test_config_json(place, capsys, given, line):
    """`--config config.json`, where config.json holds this."""
    Path("config.json").write_text(given, encoding="utf-8")
    assert error_of(["--config", "config.json"], capsys) == line


def test_the_page_has_at_least_eighty_rows():
    """Each is one input that was tried, and is tried again by the tests above."""
    titles = ("Flags", "Rows and images", "config.json")
    assert sum(len(rows_of(title)) for title in titles) >= 80
