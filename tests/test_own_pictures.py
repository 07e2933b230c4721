"""Stage 0 on a set's own pictures: its sentences, its patches, the run that a user makes of it."""

import json
import random
import shutil

import pytest
import torch

import train
from plumbing.build import pretrained_weights
from plumbing.files import read_json
from plumbing.flags import parse_config
from plumbing.sets import build_tokenizer, load_sets
from tests.common import SHORT, conversation, images, run_script, save_png
from tiny.own_pictures import ANSWERS, IMAGES, Sentences, own_pictures, patches

TURNS = [[("what?", "cat"), ("red?", "no")], [("what?", "dog"), ("red?", "yes")],
         [("what?", "cat"), ("how many legs?", "four")]]


def test_a_sentence_is_held_against_other_answers_to_its_question():
    """Never against another question's: "red? no" is true of the dog's neighbours too.

    A question that only one answer is known to is held against sentences of anything, not its own.
    """
    sentences = Sentences(TURNS)
    assert list(sentences.number) == [("what?", "cat"), ("red?", "no"), ("what?", "dog"),
                                      ("red?", "yes"), ("how many legs?", "four")]
    chance = random.Random(0)
    assert sentences.choices(("what?", "dog"), chance) == [2, 0]
    assert sentences.choices(("red?", "no"), chance) == [1, 3]
    for _ in range(20):
        own, *others = sentences.choices(("how many legs?", "four"), chance)
        assert own == 4 and others and 4 not in others and len(set(others)) == len(others)


def test_of_many_answers_some_are_drawn():
    """A caption is held against 15 others, drawn anew each time, its own once and first."""
    turns = [[("describe.", f"caption {i}")] for i in range(50)]
    sentences = Sentences(turns)
    chance = random.Random(0)
    first, second = (sentences.choices(("describe.", "caption 7"), chance) for _ in range(2))
    for choices in (first, second):
        assert choices[0] == 7 and len(set(choices)) == len(choices) == ANSWERS
    assert first != second


def test_a_token_rebuilds_the_pixels_of_its_own_cell():
    """patches() = cutting the shrunk picture by hand, row by row as tokens are."""
    pictures = images(2).float()
    found = patches(pictures, side=4)
    small = torch.nn.functional.interpolate(pictures, 32, mode="bilinear", antialias=True)
    for i in range(16):
        row, column = 8 * (i // 4), 8 * (i % 4)
        cell = small[:, :, row:row + 8, column:column + 8]
        assert torch.equal(found[:, i], cell.flatten(1))


@pytest.fixture
def shapes(tmp_path):
    """Eight pictures and what is said of them, on disk."""
    records = []
    for i, picture in enumerate(images(8)):
        save_png(tmp_path / f"{i}.png", picture)
        turns = conversation("<image>\nwhat is it?", f"a {'fish' if i % 2 else 'house'}", "red?",
                             "yes" if i % 3 else "no")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    records.append({"id": "text", "conversations": conversation("hello", "you")})
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def test_records_of_one_picture_are_put_together(shapes, monkeypatch):
    """Pictures by name, all that is said of each, <image> left out; text alone has none.

    A dialogue may begin with an answer, as ShareGPT's do: pairs stay pairs.
    What is made of them is known by the files: a changed picture is another set.
    """
    records = read_json(shapes / "train.json")
    more = [{"from": "gpt", "value": "as I said"}, *conversation("<image> big?", "no", "why?")]
    records.append({"image": "3.png", "conversations": more})
    pictures = own_pictures(records, shapes, 32)
    assert pictures.names == [f"{i}.png" for i in range(8)]
    assert pictures.turns[3] == [("what is it?", "a fish"), ("red?", "no"), ("big?", "no")]
    assert pictures.load().shape == (8, 3, 32, 32)
    assert own_pictures(records, shapes, 32) == pictures
    shutil.copy(shapes / "0.png", shapes / "3.png")
    assert own_pictures(records, shapes, 32).made_of != pictures.made_of
    monkeypatch.setattr("tiny.own_pictures.IMAGES", 5)
    few = own_pictures(records, shapes, 32)
    assert IMAGES > len(few.names) == len(few.turns) == 5 and set(few.names) < set(pictures.names)


def test_encoders_learn_the_sets_own_pictures(shapes, monkeypatch):
    """As a user runs it: one line says so, the encoders are others than the tiny world's.

    Asked for again they are found.
    """
    flags = [*SHORT, "--data", "train.json", "--eval-data", "train.json", "--max-steps", "1"]
    own = [*flags, "--stage0-pictures", "data"]
    monkeypatch.chdir(shapes)
    done = run_script(shapes, *own, "--out", "runs/own")
    assert done.returncode == 0, done.stderr[-3000:]
    line = "stage 0 trains the toy encoders on the pictures of train.json itself: CLIP on its "
    assert done.stdout.startswith(line)
    assert read_json(shapes / "runs/own/config.json")["stage0_pictures"] == "data"
    made = {path.name: path.stat().st_mtime_ns for path in shapes.glob("runs/stage0/*")}
    assert sorted(name.split("-")[0] for name in made) == ["clip", "convnext", "eva", "llm"]
    records = read_json(shapes / "train.json")
    c = parse_config(own)
    pretrained_weights(c, records, build_tokenizer(c, load_sets(c)))
    assert {p.name: p.stat().st_mtime_ns for p in shapes.glob("runs/stage0/*")} == made


def test_a_run_on_other_pictures_says_what_the_encoders_know(shapes, monkeypatch, capsys):
    """One line, before anything is trained."""
    monkeypatch.chdir(shapes)
    monkeypatch.setattr(train, "pretrained_weights", lambda *_: exit(0))
    with pytest.raises(SystemExit):
        train.main([*SHORT, "--data", "train.json", "--eval-data", "train.json"])
    assert ("the toy encoders know the drawn pictures of the tiny world, not those of train.json; "
            "--stage0-pictures data trains them on its own first\n") in capsys.readouterr().out
