"""tools.export_student: the encoder alone gives the run's tokens, without this repository."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import InputError
from model import Student
from plumbing.config import TINY
from plumbing.finished_run import load_run, load_student
from tests.common import images, natural_noise
from tools.export_student.__main__ import main, write_student
from tools.export_student.alone import Student as Alone

ALONE = """
import pathlib, sys, torch
from student import Student
student = Student(".").eval()
photos = {path.name: student.read_photo(path) for path in pathlib.Path("photos").iterdir()}
with torch.no_grad():
    torch.save((photos, student(photos["photo.png"])), "seen.pt")
assert not {"data", "model", "mole", "teachers", "real", "plumbing"} & set(sys.modules)
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of pictures, none a square: RGB, long and thin, turned, and the odd modes of PIL."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = natural_noise(60, 45)
    noise.save(folder / "photo.png")
    noise.resize((5000, 9)).save(folder / "thin.png")
    noise.convert("CMYK").save(folder / "CMYK.jpg")
    noise.convert("P").save(folder / "palette.png", transparency=7)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    for kind in ("uint16", "int32", "float32"):
        grey = np.asarray(noise.convert("L")).astype(kind)
        Image.fromarray(7 * grey).save(folder / f"{kind}.tiff")
    noise.putalpha(Image.linear_gradient("L").resize(noise.size))
    for mode in ("RGBA", "LA", "L", "1"):
        noise.convert(mode).save(folder / f"{mode}.png")
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
    out = photos.parent
    main([str(run), str(out)])
    # a process that has never heard of this repository
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
        main([str(run), str(out)])


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
