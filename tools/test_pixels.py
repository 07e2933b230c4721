"""LLaVA's pixels: each encoder gets one bicubic resize of the padded original."""

import dataclasses

import pytest
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from data import collate, square_image, square_views, stack_images
from plumbing.config import ENCODERS, FULL, SMALL, TINY
from plumbing.evaluate import answer
from plumbing.image_files import DiskImages, student_size, training_size
from plumbing.plots import plot_samples
from teachers import ClipEncoder, create_net
from tests_common import C, conversation, small_vlm, tiny_teachers
from tiny.llm import WordTokenizer
from tools import pixels

SIZES = [(640, 480), (100, 250), (336, 336), (31, 400), (900, 47), (48, 48)]


@pytest.mark.parametrize("size", SIZES)
def test_clips_pixels_are_those_of_llavas_processor(size):
    """Padded to a square, CLIP's view is bit for bit that of transformers' CLIPImageProcessor.

    And the plain form that tools/pixels.py measures with is the same.
    """
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    picture = pixels.natural_noise(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in pixels.CLIP_MEAN))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    processor = clip.CLIPImageProcessorPil(size={"shortest_edge": 48},
                                           crop_size={"height": 48, "width": 48})
    expected = processor(square, return_tensors="pt")["pixel_values"]
    encoder = ClipEncoder(C.clip)
    plain = pixels.llava_pixels(picture, 48, encoder.mean, encoder.std)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    ours = encoder.view(stack_images([square_views(picture, (48, 64))]))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_every_encoder_gets_its_size_from_the_original():
    """The views of one sample are made of the original each, and are LLaVA's at every size.

    One image for all, resized again, is another thing: it has lost detail.
    """
    picture = pixels.natural_noise(60, 45)
    teachers = tiny_teachers()
    sizes = tuple({encoder.image_size for encoder in teachers.encoders.values()})
    views = stack_images([square_views(picture, sizes)])
    one = stack_images([square_image(picture, 128)])
    for encoder in teachers.encoders.values():
        expected = pixels.llava_pixels(picture, encoder.image_size, encoder.mean, encoder.std)
        torch.testing.assert_close(encoder.view(views), expected, atol=1e-5, rtol=0)
        assert (encoder.view(one) - expected).abs().max() > 0.05
        assert pixels.detail(encoder.view(one)) < 0.95 * pixels.detail(expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_wants_bicubic_for_every_encoder_of_the_presets(name):
    """So one interpolation serves them all."""
    for c in (TINY, SMALL, FULL):
        with torch.device("meta"):
            net = create_net(getattr(c, name))
        assert resolve_model_data_config(net)["interpolation"] == "bicubic"


def test_the_loader_makes_the_sizes_that_are_looked_at(tmp_path):
    """In training those of student and teachers, without L_kd and at inference the student's."""
    each = dataclasses.replace(C, image_views="each")
    assert (training_size(C), student_size(C)) == (128, 128)
    assert training_size(each) == (48, 64, 128)
    assert training_size(dataclasses.replace(each, lambda_kd=0)) == (48,)
    assert student_size(each) == (48,)
    assert student_size(dataclasses.replace(each, student="ensemble")) == (48, 64, 128)
    assert training_size(FULL) == (336, 1024)
    for name in "ab":
        pixels.natural_noise(90, 60).save(tmp_path / f"{name}.png")
    get_image = DiskImages(tmp_path, training_size(each))
    samples = []
    for name in "ab":
        samples.append({"input_ids": [1], "labels": [1], "image": get_image(f"{name}.png"),
                        "name": name, "cut": False})
    images = collate(samples, 0)["images"]
    assert {size: image.shape for size, image in images.items()} == {
        size: (2, 3, size, size) for size in (48, 64, 128)}
    assert all(image.dtype == torch.uint8 for image in images.values())


def test_a_question_is_answered_from_a_file_with_views(tmp_path):
    """Answers and sample pictures come from views as from one image."""
    pixels.natural_noise(90, 60).save(tmp_path / "a.png")
    record = {"image": "a.png", "conversations": conversation("<image>\nwhat?")}
    tokenizer = WordTokenizer.from_records([record])
    get_image = DiskImages(tmp_path, (48,))
    said = answer(C, small_vlm(len(tokenizer.vocabulary)), tokenizer, [record], get_image)
    assert len(said) == 1
    rows = [{"record": record, "question": "what?", "answer": "x"}]
    plot_samples(tmp_path / "samples.png", rows, said, get_image)
    assert (tmp_path / "samples.png").exists()


def test_the_tables_of_the_docs_are_made(monkeypatch, capsys):
    """`python -m tools.pixels` finds no difference from LLaVA's pixels with `each`."""
    monkeypatch.setattr(pixels, "ENCODERS", ("clip",))
    monkeypatch.setattr(pixels, "photographs",
                        lambda: {"noise": pixels.natural_noise(64, 48)})
    monkeypatch.setattr(pixels, "cpu_seconds", lambda form: 0.001)
    pixels.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("| 0.00 % | 1.00 |")
    assert "0.00" not in lines[2].split("|")[3]
