"""tools.export: encoder and VLM give the run's own numbers, without this repository."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from data import InputError, conversation_ids, stack_images
from model import Student
from plumbing.config import TINY
from plumbing.evaluate import answer
from plumbing.files import read_tensors, write_tensors
from plumbing.finished_run import load_run, load_student
from plumbing.sets import student_size
from real.image_files import fit
from tests.common import SHORT, conversation, images, noise, run_here
from tools.export.__main__ import main
from tools.export.alone import Student as Alone
from tools.export.student import write_student

ALONE = """
import pathlib, sys, torch
from student import Student
student = Student(".").eval()
photos = {path.name: student.read_photo(path) for path in pathlib.Path("../photos").iterdir()}
with torch.no_grad():
    torch.save((photos, student(photos["photo.png"])), "seen.pt")
assert not {"data", "model", "mole", "teachers", "real", "plumbing"} & set(sys.modules)
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of pictures, none a square: RGB, long and thin, turned, and the odd modes of PIL."""
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = noise(60, 45)
    picture.save(folder / "photo.png")
    picture.resize((5000, 9)).save(folder / "thin.png")
    picture.convert("CMYK").save(folder / "CMYK.jpg")
    picture.convert("P").save(folder / "palette.png", transparency=7)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    for kind in ("uint16", "int32", "float32"):
        grey = np.asarray(picture.convert("L")).astype(kind)
        Image.fromarray(7 * grey).save(folder / f"{kind}.tiff")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    for mode in ("RGBA", "LA", "L", "1"):
        picture.convert(mode).save(folder / f"{mode}.png")
    return folder


@pytest.mark.parametrize("kind", [
    "ours", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("released", "full"))])
def test_the_same_tokens_without_the_repository(kind, workplace, released_folder, full_run, photos):
    """student.py's pixels and tokens are load_student's and the run's, in both forms of MoLE.

    Pixels are equal whatever the mode of the picture, tokens to 1e-6. The student of the run of
    --full sees a view of the original, not of the loader's square.
    """
    run = {"ours": workplace / "runs/tiny", "released": released_folder, "full": full_run}[kind]
    student, read_photo = load_student(run)
    out = photos.parent / "out"
    main([str(run), str(out), "--to", "student"])
    # a process that has never heard of this repository
    subprocess.run([sys.executable, "-c", ALONE], cwd=out, check=True)
    pixels, V_s_alone = torch.load(out / "seen.pt")
    for path in photos.iterdir():
        seen = read_photo(path)
        expected = seen if torch.is_tensor(seen) else seen[student.image_size]
        assert torch.equal(pixels[path.name], expected), path.name
    photo = read_photo(photos / "photo.png")
    with torch.no_grad():
        assert student(photo).equal(load_run(run, "cpu")[0].student(photo))
        assert V_s_alone.allclose(student(photo), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="is there already"):
        main([str(run), str(out), "--to", "student"])


def test_a_batch_of_the_loader_and_no_experts(tmp_path):
    """uint8 images (B, 3, R, R) as in training; a student without MoLE is timm's model alone."""
    student = Student(TINY.clip)
    student.loader_size = 128
    write_student(student, tmp_path)
    alone = Alone(tmp_path)
    assert alone(images(3)).allclose(student(images(3)), atol=1e-6, rtol=0)
    assert not [name for name, _ in alone.named_parameters() if "router" in name]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        seen = alone.to(dtype)(images(3))
        assert seen.dtype == dtype
        assert seen.allclose(student(images(3)).to(dtype), atol=0.1, rtol=0.1)


# the model card's lines, the last of them for each picture and question
CARD = """
import sys, torch
load, use = sys.argv[1].split("picture = ")
exec(load)
given, answers, image = torch.load("given.pt", weights_only=False)
for (photo, text, pixels, ids, logits), expected in zip(given, answers, strict=True):
    photo.save("photo.png")
    exec("picture = " + use.replace("what colour?", text))
    assert inputs["input_ids"][0].tolist() == [
        model.config.image_token_id if i == image else i for i in ids]
    assert inputs["pixel_values"].allclose(pixels, atol=1e-6, rtol=0)
    there = model(input_ids=inputs["input_ids"], pixel_values=pixels).logits[0]
    assert there[:, :logits.shape[-1]].allclose(logits, atol=1e-5, rtol=1e-5)
    said = processor.decode(answer[answer != model.generation_config.eos_token_id]).strip()
    assert said == expected
assert not {"data", "model", "mole", "teachers", "real", "plumbing"} & set(sys.modules)
"""


@pytest.fixture(params=["experts", *[pytest.param(name, marks=pytest.mark.slow)
                                     for name in ("plain", "full_run", "released_folder")]])
def run(request, workplace, tmp_path) -> Path:
    """A run with experts or without, one on a real LLM, or the authors' checkpoint."""
    pytest.importorskip("transformers")
    if request.param in ("full_run", "released_folder"):
        return request.getfixturevalue(request.param)
    experts = "3" if request.param == "experts" else "0"
    run_here(workplace, *SHORT, "--mole-experts", experts, "--out", str(tmp_path / "run"))
    # random weights, so that experts, pictures and words differ widely
    file = tmp_path / "run/model.safetensors"
    tensors = read_tensors(file, "")
    for name, tensor in tensors.items():
        if "lora" in name or "projector" in name or name.endswith("lm_head.weight"):
            torch.nn.init.normal_(tensor, std=0.3)
    write_tensors(file, tensors)
    return tmp_path / "run"


def test_transformers_gives_the_same_answers(run, tmp_path):
    """By the card's lines: equal ids, logits to 1e-5 on the same pixels, 20 equal answers."""
    vlm, tokenizer, c = load_run(run, "cpu")
    size, out = student_size(c), tmp_path / "out"
    given, records, seen = [], [], {}
    for i, image in enumerate(images(20)):
        # views are made of the original, of any form; else it is as large as the loader's image
        picture = to_pil_image(image if isinstance(size, int) else image[:, :90 + i])
        text = ["what colour?", "what's the U.S. pattern, 1/2 or x\xb2, e\u0301t\xe9?"][i % 2]
        records.append({"image": str(i), "conversations": conversation(f"<image>\n{text}")})
        seen[str(i)] = fit(picture, size)
        view = stack_images([seen[str(i)]])
        ids, _ = conversation_ids(records[i], "v1", tokenizer, vlm.student.num_tokens)
        logits = vlm(vlm.student(view), torch.tensor([ids]), None)[0].detach()
        given.append((picture, text, vlm.student.view(view), ids, logits))
    answers = answer(c, vlm, tokenizer, records, seen.get)
    assert len(set(answers)) > 1
    main([str(run), str(out), "--to", "transformers"])
    torch.save((given, answers, tokenizer.image), out / "given.pt")
    code = re.search("```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.DOTALL)[1]
    assert ("trust_remote_code" in code) == bool(list(out.glob("*.py"))) == bool(c.mole_experts)
    subprocess.run([sys.executable, "-c", CARD, code], cwd=out, check=True)
