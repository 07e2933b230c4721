"""The teachers' cache: the teachers' own outputs in fp16, and made again whenever it is not."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import InputError
from plumbing.files import read_about, write_tensors
from plumbing.teacher_outputs import CachedTeachers, cache_teachers
from teachers import Teachers
from tests.common import damage, tiny_teachers
from tiny.world import WorldImages, world_records

NAMES = [f"train-0/{i}.png" for i in range(5)]


@pytest.fixture
def pictures():
    return WorldImages("train", 5)


@pytest.fixture
def eva():
    """One teacher alone."""
    return Teachers({"eva": tiny_teachers().encoders["eva"]})


@pytest.fixture
def file(tmp_path, eva, pictures):
    """The cache's file of EVA's outputs."""
    cache(eva, pictures, tmp_path)
    return next(tmp_path.iterdir())


def cache(teachers: Teachers, pictures: WorldImages, folder) -> CachedTeachers:
    return cache_teachers(teachers, folder, [(world_records("train", "caption", 5), pictures)])


def assert_outputs(cached: CachedTeachers, teachers: Teachers, pictures: WorldImages) -> None:
    """Check that the cache gives the teachers' own outputs, rounded to fp16, in any order."""
    plain = teachers(torch.stack([pictures(NAMES[i]) for i in (3, 0)]), [])
    outputs = cached(torch.zeros(2, 3, 96, 96), [NAMES[3], NAMES[0]])
    torch.testing.assert_close(outputs, plain, rtol=2 ** -10, atol=1e-3)


def test_cached_teachers_are_the_teachers_in_fp16(tmp_path, pictures, capsys):
    """--cache-teachers gives the teachers' outputs; one file each, made once."""
    teachers = tiny_teachers()
    cache(teachers, pictures, tmp_path)
    files = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    assert sorted(path.name.split("-")[0] for path in files) == ["clip", "convnext", "eva"]
    cached = cache(teachers, pictures, tmp_path)
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == files
    assert_outputs(cached, teachers, pictures)
    assert "made again" not in capsys.readouterr().err


def test_changed_images_have_outputs_of_their_own(tmp_path, file, eva, pictures, capsys):
    """The same names with other pixels, or other weights; those last used stay, four at most."""
    before = file.read_bytes()
    for used in range(1, 6):
        if used == 1:
            next(eva.parameters()).data += 1
        else:
            pictures.images[0] //= 2
        assert_outputs(cache(eva, pictures, tmp_path), eva, pictures)
        assert len(list(tmp_path.iterdir())) == min(used + 1, 4)
        assert file.exists() == (used < 4)
        assert used >= 4 or file.read_bytes() == before
    assert "made again" not in capsys.readouterr().err


def test_outputs_that_do_not_fit_the_disk(tmp_path, eva, pictures, monkeypatch):
    """Known, with the size of what would be written, before any is made."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    size = 5 * 64 * 80 * 2 / 1e6    # images, tokens, width, bytes of fp16
    with pytest.raises(InputError, match=f"5 images take {size:.0f} MB, and 0 MB are free; name"):
        cache(eva, pictures, tmp_path)
    assert not list(tmp_path.iterdir())


def spoil(path, how: str) -> None:
    """Damage a cache file as `damage` does, or in one of the ways below."""
    tokens = load_file(path)["tokens"]
    if how == "zeroed":
        save_file({"tokens": 0 * tokens}, path, {"about": json.dumps(read_about(path))})
    elif how == "fewer rows":
        write_tensors(path, {"tokens": tokens[:2]})
    elif how == "crc32":    # a letter of the header
        path.write_bytes(path.read_bytes().replace(b"crc32", b"crc33"))
    else:
        damage(path, how)


@pytest.mark.parametrize("how", ["flipped", "halved", "empty", "a folder", "a pipe", "zeroed",
                                 "fewer rows", "crc32"])
def test_a_damaged_cache_is_made_again(tmp_path, file, eva, pictures, capsys, how):
    """One line names the file and says so; the outputs are those of the teacher."""
    before = file.read_bytes()
    spoil(file, how)
    assert_outputs(cache(eva, pictures, tmp_path), eva, pictures)
    assert file.read_bytes() == before
    line, = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert "the outputs of teacher eva are made again: " in line and str(file) in line


def test_what_fp16_cannot_hold_is_named(tmp_path, eva, pictures):
    """Outputs beyond 65,504 are an error that names the teacher; no file is left."""
    next(eva.encoders["eva"].parameters()).data.fill_(float("inf"))
    with pytest.raises(InputError, match="teacher eva: its tokens are NaN or infinite"):
        cache(eva, pictures, tmp_path)
    assert not list(tmp_path.iterdir())
