"""The tiny world: scenes, their pictures, their words."""

import re
import shlex
import shutil
import subprocess

import pytest
import torch

from data import InputError
from plumbing.build import build_encoder, pretrained_weights
from plumbing.flags import parse_config
from plumbing.sets import build_tokenizer, load_sets
from tests.common import HERE, C, damage
from tiny import pretrain
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


def test_every_object_lies_inside_its_picture(monkeypatch):
    """No object is cut off: with a blank background, the border of every picture is blank.

    All shapes, places, sizes and turns are drawn.
    """
    monkeypatch.setattr("tiny.pictures._BACKGROUNDS", torch.ones(4, 2, 3))
    monkeypatch.setattr("tiny.pictures._GRAIN", torch.zeros(4))
    sizes = [6, 1, 1, 9, 3, 3, 1]  # of the attributes; colours, patterns, backgrounds do not matter
    scenes = torch.cartesian_prod(*[torch.arange(size) for size in sizes])
    pictures = render(scenes)
    for edge in (pictures[:, :, 0], pictures[:, :, -1], pictures[..., 0], pictures[..., -1]):
        assert edge.min() == 255
    assert pictures.amin(dim=(1, 2, 3)).max() < 255  # and there is an object in each


@pytest.mark.parametrize("flags,made", [
    ("--recipe ours --seed 3", []), ("--lm-depth 2", ["llm"]), ("--n-text 9", ["llm"]),
    (f"--eva '{C.eva.replace('depth=3', 'depth=2')}'", ["eva"])])
def test_shipped_weights_are_taken_where_they_fit(tmp_path, monkeypatch, flags, made):
    """`--tiny` makes nothing; another encoder, LLM or text has its own made, and no other's."""
    monkeypatch.setattr(pretrain, "train_side_by_side", lambda jobs: jobs.clear())
    monkeypatch.setattr(pretrain.files, "read_tensors", lambda *_: {})
    c = parse_config(["--tiny", *shlex.split(flags), "--stage0", str(tmp_path / "stage0")])
    sets = load_sets(c)
    paths, _ = pretrained_weights(c, sets["train"][0], build_tokenizer(c, sets))
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
