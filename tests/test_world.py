"""The tiny world: scenes, their pictures, their words."""

import torch

from tiny.pictures import WORLD_SIZE, _COLOURS, render
from tiny.scenes import ATTRIBUTES, QUESTIONS, SPLITS, sample_scenes, scene_geometry
from tiny.world import tiny_set, world_records


def test_splits_share_no_scene():
    """No attribute tuple of one split is in another, whatever the seeds."""
    seen = []
    for split in SPLITS:
        scenes = set()
        for seed in range(2):
            scenes.update(tuple(scene) for scene in sample_scenes(split, 2000, seed).tolist())
        seen.append(scenes)
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def plain_large_heart(colour: int, place: int) -> torch.Tensor:
    """A scene, upright."""
    values = {"shape": 3, "colour": colour, "place": place, "size": 2, "turn": 1}
    return torch.tensor([[values.get(name, 0) for name in ATTRIBUTES]])


def test_pictures_show_what_the_scene_says():
    """The centre of a plain, large heart is where its place says, and has the named colour."""
    for place in range(9):
        for colour in range(6):
            scene = plain_large_heart(colour, place)
            geometry = scene_geometry(scene)
            x, y = geometry["x"].item(), geometry["y"].item()
            assert (round(3 * x) + 1, round(3 * y) + 1) == (place % 3, place // 3)
            picture = render(scene)[0].float() / 255
            half = WORLD_SIZE / 2
            pixel = picture[:, int((y + 1) * half), int((x + 1) * half)]
            assert (_COLOURS - pixel).square().sum(1).argmin() == colour


def test_records_tell_what_the_scene_is():
    """The answers of a dialogue are the names of the scene's attributes; its picture is drawn."""
    names = list(ATTRIBUTES)
    scenes = sample_scenes("train", 20).tolist()
    _, get_image = tiny_set("train", 20)
    for i, record in enumerate(world_records("train", "chat", 20)):
        turns = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
        said = dict(zip(turns[::2], turns[1::2]))
        for attribute, question in QUESTIONS.items():
            index = scenes[i][names.index(attribute)]
            assert said.pop(question) == ATTRIBUTES[attribute][index]
        assert not said
        drawn = render(sample_scenes("train", 20))[i]
        assert torch.equal(get_image(record["image"]), drawn)


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
