"""The tiny world: scenes, their pictures, their words; stage 0 on a set's own pictures."""

import random
import re
import shlex
import shutil
import subprocess

import pytest
import torch

from data import InputError
from plumbing.build import build_encoder, pretrained_weights
from plumbing.files import read_json, write_json
from plumbing.flags import parse_config
from plumbing.sets import build_tokenizer, load_sets
from real.image_files import DiskImages
from tests.common import HERE, SHORT, C, conversation, damage, images, run_script, save_png
from tiny import pretrain
from tiny.own_pictures import ANSWERS, IMAGES, OwnPictures, choices, patches
from tiny.pictures import _COLOURS, WORLD_SIZE, render
from tiny.scenes import ATTRIBUTES, QUESTIONS, SPLITS, sample_scenes, scene_geometry
from tiny.world import main, tiny_set
from tools.compare.runs import probe


def test_splits_share_no_scene():
    """No attribute tuple of one split is in another, whatever the seeds."""
    owners = {}
    for split in SPLITS:
        scenes = torch.cat([sample_scenes(split, 2000, seed) for seed in range(2)])
        for scene in scenes.tolist():
            assert owners.setdefault(tuple(scene), split) == split


def test_pictures_show_what_the_scene_says():
    """The centre of a plain, large, upright heart is at its place and has the named colour."""
    for place in range(9):
        for colour in range(6):
            scene = torch.tensor([[3, colour, 0, place, 2, 1, 0]])
            geometry = scene_geometry(scene)
            x, y = geometry["x"].item(), geometry["y"].item()
            assert (round(3 * x) + 1, round(3 * y) + 1) == (place % 3, place // 3)
            picture = render(scene)[0].float() / 255
            half = WORLD_SIZE / 2
            pixel = picture[:, int((y + 1) * half), int((x + 1) * half)]
            assert (_COLOURS - pixel).square().sum(1).argmin() == colour


def test_records_tell_what_the_scene_is():
    """The answers of a dialogue are the names of the scene's attributes; its picture is drawn."""
    scenes = sample_scenes("train", 20)
    drawn = render(scenes)
    records, get_image = tiny_set("train", 20)
    for i, record in enumerate(records):
        turns = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
        expected = {}
        for k, (name, words) in enumerate(ATTRIBUTES.items()):
            if name in QUESTIONS:
                expected[QUESTIONS[name]] = words[scenes[i, k]]
        assert dict(zip(turns[::2], turns[1::2], strict=True)) == expected
        assert torch.equal(get_image(record["image"]), drawn[i])


@pytest.mark.parametrize("flags", ["--n-train -1", "--n-eval 0", "--n-text many", "--n-tests 1"])
def test_a_wrong_number_is_one_line(tmp_path, capsys, flags):
    """`python -m tiny.world export`: what argparse refuses too, with status 2."""
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path), *flags.split()])
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(f"error: .*{flags.split()[0]}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("flags,made", [
    ("--recipe ours --seed 3", []), ("--lm-depth 2", ["llm"]), ("--n-text 9", ["llm"]),
    (f"--eva '{C.eva.replace('depth=3', 'depth=2')}'", ["eva"])])
def test_shipped_weights_are_taken_where_they_fit(tmp_path, monkeypatch, flags, made):
    """`--tiny` makes nothing; another encoder, LLM or text has its own made, and no other's."""
    monkeypatch.setattr(pretrain, "train_model", lambda *_: None)
    monkeypatch.setattr(pretrain.files, "read_tensors", lambda *_: {})
    c = parse_config(["--tiny", *shlex.split(flags), "--stage0", str(tmp_path / "stage0")])
    sets = load_sets(c)
    paths = pretrained_weights(c, sets["train"][0], build_tokenizer(c, sets))
    assert [name for name, path in paths.items() if path.parent != pretrain.SHIPPED] == made
    assert (tmp_path / "stage0").exists() == bool(made)


def test_shipped_weights_are_small_tracked_and_checked(tmp_path, monkeypatch):
    """At most 3 MB, none ignored by git; one that has changed is named."""
    files = list(pretrain.SHIPPED.iterdir())
    assert sum(file.stat().st_size for file in files) <= 3_000_000 and len(files) == 4
    assert subprocess.run(["git", "check-ignore", *files], cwd=HERE).returncode == 1
    monkeypatch.setattr(pretrain, "SHIPPED", shutil.copytree(pretrain.SHIPPED, tmp_path / "all"))
    damage(tmp_path / "all/eva.safetensors", "flipped")
    jobs = {"eva": (pretrain.MAKERS["eva"], (C.eva, 1.0))}
    with pytest.raises(InputError, match="eva.safetensors: damaged: .* has changed since"):
        pretrain.stage0(jobs, 1.0, tmp_path)


@pytest.mark.slow
def test_shipped_weights_can_be_made_anew(tmp_path, monkeypatch):
    """`python -m tiny.pretrain` makes encoders that hold what the shipped ones do, +- 3 points."""
    shipped = {name: pretrain.SHIPPED / f"{name}.safetensors" for name in pretrain.tiny.ENCODERS}
    monkeypatch.setattr(pretrain, "SHIPPED", tmp_path)
    pretrain.main()
    for name, path in shipped.items():
        anew = tmp_path / path.name
        figures = [probe(build_encoder(C, name, {name: file}), shipped) for file in (path, anew)]
        for attribute in ATTRIBUTES:
            assert abs(figures[0][attribute] - figures[1][attribute]) <= 3, (name, attribute)


def test_a_sentence_is_compared_with_other_answers_to_its_question():
    """The right one first, others drawn anew; with any question's only if its own has no other."""
    chance = random.Random(0)
    # never with another question's: "red? no" is true of most pictures
    assert choices(2, [0, 2], 5, chance) == [2, 0] and choices(1, [1, 3], 5, chance) == [1, 3]
    first, second = (choices(7, list(range(50)), 60, chance) for _ in range(2))
    assert first != second
    for drawn in (first, second):
        assert drawn[0] == 7 and len(set(drawn)) == len(drawn) == ANSWERS and max(drawn) < 50
    for _ in range(20):
        right, *others = choices(4, [4], 5, chance)
        assert right == 4 and others and len(set(others)) == len(others)
        assert set(others) <= {0, 1, 2, 3}


def test_a_token_rebuilds_the_pixels_of_its_own_cell():
    """patches() cuts the shrunk picture into 4 x 4 cells, row by row as tokens are."""
    pictures = images(2).float()
    small = torch.nn.functional.interpolate(pictures, 32, mode="bilinear", antialias=True)
    rows = small.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5)        # (N, 4, 4, 3, 8, 8)
    assert torch.equal(patches(pictures, side=4), rows.reshape(2, 16, 3 * 8 * 8))


@pytest.fixture
def shapes(tmp_path):
    """Eight pictures and two questions and answers about each, on disk."""
    records = []
    for i, picture in enumerate(images(8)):
        save_png(tmp_path / f"{i}.png", picture)
        turns = conversation("<image>\nwhat is it?", f"a {'fish' if i % 2 else 'house'}", "red?",
                             "yes" if i % 3 else "no")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    records.append({"id": "text", "conversations": conversation("hello", "you")})
    write_json(tmp_path / "train.json", records)
    return tmp_path


def test_records_of_one_picture_are_put_together(shapes, monkeypatch):
    """Names, all turns about each, no text alone; the fingerprint follows pictures and answers."""
    records = read_json(shapes / "train.json")
    get_image = DiskImages(shapes, 32)
    before = OwnPictures(records, get_image)
    # a dialogue may begin with an answer, as ShareGPT's do
    more = [{"from": "gpt", "value": "as I said"}, *conversation("<image> big?", "no", "why?")]
    records.append({"image": "3.png", "conversations": more})
    pictures = OwnPictures(records, get_image)
    assert pictures.names == [f"{i}.png" for i in range(8)]
    assert pictures.turns[3] == [("what is it?", "a fish"), ("red?", "no"), ("big?", "no")]
    assert pictures.load().shape == (8, 3, 32, 32)
    shutil.copy(shapes / "0.png", shapes / "3.png")
    changed = OwnPictures(records, get_image)
    larger = OwnPictures(records, DiskImages(shapes, 48))
    assert len({some.fingerprint for some in (before, pictures, changed, larger)}) == 4
    monkeypatch.setattr("tiny.own_pictures.IMAGES", 5)
    few = OwnPictures(records, get_image)
    assert IMAGES > len(few.names) == len(few.turns) == 5 and set(few.names) < set(pictures.names)


@pytest.mark.slow
def test_encoders_learn_the_sets_own_pictures(shapes, monkeypatch):
    """As a user runs it: a line says so, and a second run finds the encoders of the first."""
    own = [*SHORT, "--data", "train.json", "--eval-data", "train.json", "--max-steps", "1",
           "--stage0-pictures", "data"]
    monkeypatch.chdir(shapes)
    done = run_script(shapes, *own, "--out", "runs/own")
    assert done.returncode == 0, done.stderr[-3000:]
    line = "the stand-in encoders are trained on the pictures of train.json itself: CLIP on its "
    assert done.stdout.startswith(line)
    assert read_json(shapes / "runs/own/config.json")["stage0_pictures"] == "data"
    files = {path: path.stat().st_mtime_ns for path in shapes.glob("runs/stage0/*")}
    assert sorted(path.name.split("-")[0] for path in files) == ["clip", "convnext", "eva", "llm"]
    c = parse_config(own)
    records = read_json(shapes / "train.json")
    pretrained_weights(c, records, build_tokenizer(c, load_sets(c)))
    assert {path: path.stat().st_mtime_ns for path in shapes.glob("runs/stage0/*")} == files
