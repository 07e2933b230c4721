"""tools.drawn_shapes: easy-VQA's files become LLaVA's, with a stand-in for the package."""

import json
import sys

import pytest

from data import read_json
from plumbing.records import read_records
from tests_common import images, save_png
from tools import drawn_shapes

QUESTIONS = [["what color is the shape?", "blue", 0], ["is no red shape present?", "yes", 0],
             ["what is the blue shape?", "circle", 0], ["is there a circle?", "yes", 1]]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the name and the layout of easy-VQA."""
    root = tmp_path / "easy_vqa"
    for split in ("train", "test"):
        pictures = root / "data" / split / "images"
        pictures.mkdir(parents=True)
        (pictures.parent / "questions.json").write_text(json.dumps(QUESTIONS), encoding="utf-8")
        for i, picture in enumerate(images(2)):
            save_png(pictures / f"{i}.png", picture)
    (root / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    return tmp_path


def test_one_dialogue_a_training_picture_one_record_a_test_question(package, tmp_path, capsys):
    """No question is lost, each answer stays with its question, the types are by answer or words.

    "is no red shape present?" names a colour: the word shape is none of the three shapes.
    """
    out = tmp_path / "D"
    drawn_shapes.main([str(out)])
    train = read_records(out / "train.json", out, skip_bad=False)
    assert [record["image"] for record in train] == ["train/0.png", "train/1.png"]
    turns = train[0]["conversations"]
    said = [turn["value"].removeprefix("<image>\n") for turn in turns]
    asked = {(q, a) for q, a, picture in QUESTIONS if picture == 0}
    assert set(zip(said[0::2], said[1::2])) == asked
    assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + 5 * [False]
    test = read_json(out / "test.json")
    assert [row["type"] for row in test] == ["colour", "has colour", "shape", "has shape"]
    assert all(len(row["conversations"]) == 2 for row in test)
    assert "train.json: 2 records, 2 pictures" in capsys.readouterr().out


def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch):
    """And nothing is written."""
    monkeypatch.setattr(drawn_shapes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(drawn_shapes.InputError, match="pip install easy-vqa"):
        drawn_shapes.main([str(tmp_path / "D")])
    assert not (tmp_path / "D").exists()
