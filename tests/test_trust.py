"""docs/trust.md, line by line: bad input is one line, and nothing wrong goes on in silence."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from data import InputError, conversation_ids
from plumbing.checkpoints import checksums, examine, newest_checkpoint, saved_checkpoints
from plumbing.cli import Stopped, run
from plumbing.config import TINY, Config
from plumbing.files import read_json, write_json
from plumbing.flags import flag, load_config, parse_config
from plumbing.run_folder import read_log
from plumbing.teacher_outputs import check_teachers
from real.image_files import DiskImages, as_seen, load_image
from real.records import read_list
from tests.common import (HERE, SHORT, assert_same_run, conversation, damage, images, run_here,
                          save_png, tiny_teachers)
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records

FIELDS = {field.name: field for field in dataclasses.fields(Config)}

# ------------------------------------------------------------------------------------------------
# Flags and config.json


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_it_cannot_be(name):
    """Of -1, 0, nan, inf, 10^12, "" and a word each is accepted, or one line that names the flag.

    Accepted numbers lie in the range that stands beside the field.
    """
    for value in ("-1", "0", "nan", "inf", "1000000000000", "", "word"):
        argv = ["--tiny", f"{flag(name)}={value}"]
        try:
            c = parse_config(argv)
        except InputError as e:
            assert flag(name) in str(e) or name in ("init_from", "data", "teachers"), e
            assert "\n" not in str(e)
            continue
        if typing.get_origin(FIELDS[name].type) is typing.Annotated:
            low, high = FIELDS[name].type.__metadata__[0]
            assert low <= getattr(c, name) <= high


WRONG = {  # a key of config.json: values of the wrong type, or that it does not know
    "mole_form": ["fnn", 1, None, ["ffn"]],
    "balance_form": ["per-layer", 0],
    "mole_router_grad": ["straight-through", True],
    "mole_init": ["zeros"],
    "adapter_direction": ["student-to-teacher"],
    "adapter_form": ["per-token"],
    "target_norm": ["channels"],
    "kd_token_weight": ["Paper"],
    "kd_collapse": [False],
    "student": ["Trained"],
    "precision": ["fp16", 32],
    "lambda_kd": ["1", None, -1, True, [1.0]],
    "clip_share": [1.5, "0.4"],
    "seed": [0.5, -1, "0", True],
    "stage1_batch": [0, 1.5, "64"],
    "stage2_lr": ["1e-3", -1e-3],
    "mole_dropout": [1, -0.1],
    "recompute": ["yes", 1],
    "teachers": ["clip", [], [1], {"clip": 1}],
    "clip": [3, None],
    "image_size": [0, 7, 96.5],
    "lm_dim": [0, None],
    "warmup": [2, -1],
    "max_steps": [-1, 2.5],
}


@pytest.mark.parametrize("key", WRONG)
def test_config_json_is_checked_as_flags_are(key, tmp_path):
    """A value that the field cannot have is one line with the file and the key, in whatever way."""
    for value in WRONG[key]:
        write_json(tmp_path / "config.json", {key: value})
        with pytest.raises(InputError, match=f"config.json: {key} "):
            load_config(tmp_path / "config.json")


ENCODER_FAULTS = {
    "--clip=vit_base_patch16_siglip_224 img_size=224": "has no .CLS. token",
    "--clip=resnet50 img_size=64": "cannot be built",
    "--eva=eva02_tiny_patch14_224 img_size=63 patch_size=8 embed_dim=80 depth=3 num_heads=4":
        "img_size 63 is no multiple of 8",
    "--eva=eva02_tiny_patch14_224 img_size=64 patch_size=8 embed_dim=81 depth=3 num_heads=4":
        "cannot be built",
    "--eva=eva02_tiny_patch14_224 img_size=64 nonsense=3": "cannot be built",
    "--eva=eva02_tiny_patch14_224 img_size=(64,32) patch_size=8": "cannot be built",
    "--convnext=convnext_atto img_size=100": "img_size 100 is no multiple of 32",
    "--lm-heads=5": "must be a multiple of twice the heads",
    "--student=experts --mole-experts=0": "at least 1",
    "--stage1-epochs=0 --stage2-epochs=0": "one of the stages must be run",
}


@pytest.mark.parametrize("flags", ENCODER_FAULTS)
def test_what_cannot_serve_is_known_at_once(flags):
    """Encoders are built without numbers before any work; so are other combinations looked at."""
    argv = [f"--{part.strip()}" for part in flags.split("--")[1:]]
    with pytest.raises(InputError, match=ENCODER_FAULTS[flags]):
        parse_config(["--tiny", *argv])


def test_a_stage_can_be_left_out_and_clipping_too(workplace):
    """--stage1-epochs 0 leaves stage 1 out; --grad-clip 0 clips nothing, and training learns."""
    run_here(workplace, *SHORT, "--out", "runs/one-stage", "--stage1-epochs", "0", "--grad-clip",
             "0")
    log = read_log(workplace / "runs/one-stage")
    assert [line["stage"] for line in log] == [2] * 4
    assert log[-1]["L_total"] < log[0]["L_total"]


# ------------------------------------------------------------------------------------------------
# Pictures


def test_a_picture_stands_as_a_viewer_shows_it(tmp_path):
    """EXIF orientations 1 to 8 in JPEG, PNG, TIFF and WebP: the same upright picture each time."""
    upright = Image.new("RGB", (32, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 0, 255), (16, 0, 32, 16))
    expected = np.asarray(upright).astype(int)
    T = Image.Transpose
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
            6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    for ending in ("jpg", "png", "tiff", "webp"):
        for orientation, turn in undo.items():
            stored = upright if turn is None else upright.transpose(turn)
            exif = Image.Exif()
            exif[0x0112] = orientation
            path = tmp_path / f"{orientation}.{ending}"
            stored.save(path, exif=exif, **({"quality": 95} if ending != "png" else {}))
            seen = load_image(path, 32).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(seen[4:12, 4:12] - expected[4:12, 4:12]).max() < 40, path
            assert np.abs(seen[4:12, 20:28] - expected[4:12, 20:28]).max() < 40, path
            assert np.abs(seen[20:28, 4:12] - expected[20:28, 4:12]).max() < 40, path


def grey(mode: str) -> Image.Image:
    """A picture of the left half dark (1/5), the right half light (4/5), in a mode of PIL."""
    eight = np.full((8, 8), 51, np.uint8)
    eight[:, 4:] = 204
    if mode == "I;16":
        return Image.fromarray(eight.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(eight.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(eight.astype(np.float32))
    picture = Image.fromarray(eight)
    if mode in ("La", "RGBa"):  # premultiplied; PIL makes them of the plain ones only
        return picture.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "LAB":
        lab = np.zeros((8, 8, 3), np.uint8)
        lab[:, :4, 0], lab[:, 4:, 0], lab[..., 1:] = 54, 210, 0
        return Image.fromarray(lab, "LAB")
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "YCbCr", "HSV", "I;16",
                                  "I", "F", "PA", "RGBX", "La", "RGBa", "LAB"])
def test_every_mode_of_pil_keeps_its_brightness(mode):
    """Dark stays dark and light stays light, whatever the mode; 16 bits are scaled, not cut."""
    seen = np.asarray(as_seen(grey(mode))).astype(int)
    assert seen.shape == (8, 8, 3)
    assert np.abs(seen[:, :4] - 51).max() < 12, mode
    assert np.abs(seen[:, 4:] - 204).max() < 12, mode


def test_transparent_places_are_white(tmp_path):
    """A viewer shows what lies behind, white: in RGBA, LA, and a palette's transparent index."""
    for mode in ("RGBA", "LA"):
        clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
        assert np.asarray(as_seen(clear)).min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "p.png", transparency=0)
    assert load_image(tmp_path / "p.png", 8).min() == 255


@pytest.mark.parametrize("size", [(20_000, 10), (60_000, 4), (1080, 16_000)])
def test_long_thin_pictures_take_memory_near_their_own(tmp_path, size):
    """They are shrunk first and padded then: under 1 GB of address space for data, and in place."""
    Image.new("RGB", size, (200, 10, 10)).save(tmp_path / "thin.png")
    code = ("import resource, sys; from pathlib import Path; "
            "from real.image_files import load_image; "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
            "image = load_image(Path(sys.argv[1]), 96); "
            "print(peak() - before, int(image[0, 47:49, 47:49].max()))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "thin.png")], cwd=HERE,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    used, middle = map(int, done.stdout.split())
    assert used < 200_000  # kB: the pixels of the largest are 52 MB
    assert middle == 200


def test_only_what_pil_says_of_a_file_is_its_fault(tmp_path, monkeypatch):
    """Too few file descriptors are the machine's fault, and no row is called bad for it."""
    save_png(tmp_path / "ok.png", images(1)[0])

    def no_descriptor(path):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Image, "open", no_descriptor)
    with pytest.raises(OSError, match="Too many open files"):
        load_image(tmp_path / "ok.png", 8)


def test_images_outside_their_folder_are_refused(tmp_path):
    """.., an absolute name and a link that leads out; --allow-outside allows them."""
    save_png(tmp_path / "secret.png", images(1)[0])
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(InputError, match="lies outside the image folder"):
            DiskImages(folder, 8)(name)
        assert DiskImages(folder, 8, allow_outside=True)(name).shape == (3, 8, 8)


# ------------------------------------------------------------------------------------------------
# Records and words


def test_json_as_people_write_it(tmp_path):
    """Read: a byte order mark, JSON Lines, half an emoji, an empty "image". Too deep: one line."""
    row = {"conversations": conversation("what?", "nice \ud83d")}
    rows = [{**row, "image": image} for image in (None, "", [])]
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    for name in ("bom.json", "lines.json"):
        for record in read_list(tmp_path / name):
            assert "image" not in record
            assert record["conversations"][1]["value"].endswith("\ufffd")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match="nested too deep"):
        read_json(tmp_path / "deep.json")


def test_words_of_a_text_are_never_control_tokens():
    """</s>, <s>, <image>, USER: typed inside a text are words, in questions and answers.

    A text-only record that mentions <image> is trained as text; the only control tokens are those
    of the template.
    """
    typed = "type </s> or <s> or <pad> or <image>, not USER: or ASSISTANT:"
    record = {"conversations": conversation(typed, typed)}
    tokenizer = WordTokenizer.from_records([record])
    ids, labels = conversation_ids(record, "v1", tokenizer, n=3)
    special = [tokenizer.vocabulary[i] for i in ids if i < len(WordTokenizer.SPECIAL)]
    assert special == ["<s>", "USER:", "ASSISTANT:", "</s>"]
    assert tokenizer.unk not in ids
    assert labels[-1] == tokenizer.eos


def test_started_from_a_run_words_keep_their_numbers(workplace):
    """--init-from a run on data with other words: the run's keep their numbers, new ones follow.

    As many words, one renamed: what the run knew is where it was.
    """
    own = workplace / "renamed"
    own.mkdir()
    records = world_records("train", "chat", 16)
    text = json.dumps(records).replace("heart", "zebra")
    pictures = WorldImages("train", 16)
    for i in range(16):
        save_png(own / f"{i}.png", pictures.images[i])
    records = json.loads(text.replace("train-0/", ""))
    write_json(own / "train.json", records)
    run_here(workplace, *SHORT, "--out", "runs/zebra", "--init-from", "runs/tiny", "--data",
             "renamed/train.json", "--eval-data", "renamed/train.json", "--stage1-lr", "0",
             "--stage2-lr", "0")
    before = read_json(workplace / "runs/tiny/vocabulary.json")
    after = read_json(workplace / "runs/zebra/vocabulary.json")
    assert after[:len(before)] == before
    assert after[len(before):] == ["zebra"]
    name = "vlm.llm.embed_tokens.weight"
    old = load_file(workplace / "runs/tiny/model.safetensors")[name]
    new = load_file(workplace / "runs/zebra/model.safetensors")[name]
    assert torch.equal(new[:len(old)], old) and len(new) == len(old) + 1


# ------------------------------------------------------------------------------------------------
# Runs that meet other runs, other data, damage


def changed_rows(kind: str, records: list[dict]) -> list[dict]:
    """The records, changed in a way that a resumed run must notice."""
    if kind == "added":
        return [*records, records[0]]
    if kind == "removed":
        return records[:-1]
    if kind == "reordered":
        return records[::-1]
    return json.loads(json.dumps(records).replace("heart", "zebra"))  # a word


@pytest.mark.parametrize("kind", ["added", "removed", "reordered", "a word", "an image"])
def test_resume_notices_other_data(kept, kind, monkeypatch):
    """Rows added, removed, reordered, a word or an image replaced: refused, and the file named."""
    monkeypatch.chdir(kept)
    rows, picture = Path("kept/train.json"), Path("kept/3.png")
    saved = rows.read_bytes(), picture.read_bytes(), picture.stat()
    try:
        if kind == "an image":
            save_png(picture, torch.zeros(3, 50, 50, dtype=torch.uint8))
        else:
            write_json(rows, changed_rows(kind, json.loads(saved[0])))
        with pytest.raises(InputError, match="kept.*changed since the checkpoint"):
            train.main(["--resume", "runs/kept"])
    finally:
        rows.write_bytes(saved[0])
        picture.write_bytes(saved[1])
        os.utime(picture, ns=(saved[2].st_atime_ns, saved[2].st_mtime_ns))


def test_two_runs_do_not_share_a_folder(kept, monkeypatch):
    """A second run is refused while the first holds its folder; a finished one is not overwritten.

    """
    monkeypatch.chdir(kept)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open('runs/kept/run.lock', 'a+'); "
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE, encoding="utf-8")
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(InputError, match="--out runs/kept: a run is in it, process "):
            train.main(["--resume", "runs/kept"])
    finally:
        holder.kill()
        holder.wait()
    with pytest.raises(InputError, match="--out runs/kept: holds a finished run; .* --overwrite"):
        train.main([*SHORT, "--out", "runs/kept"])


def test_an_overwritten_run_leaves_nothing_of_the_earlier_one(kept):
    """No accuracy, picture or weights of a model that is gone; a resumed run keeps its own log."""
    old = kept / "runs/kept"
    run = kept / "runs/written_over"
    shutil.copytree(old, run)
    points = [{"stage": 1, "step": 0, "accuracy": 33.0}]
    for name in ("evaluation.json", "held_out.json", "model-00001-of-00002.safetensors"):
        write_json(run / name, points)
    run_here(kept, "--resume", "runs/written_over")
    assert not (run / "evaluation.json").exists()
    assert read_json(run / "held_out.json")[0] == points[0]
    assert_same_run(run, old, "vocabulary.json")

    write_json(run / "evaluation.json", points)
    run_here(kept, *SHORT, "--max-steps", "1", "--cache-teachers", "", "--out",
             "runs/written_over", "--overwrite")
    assert {path.name for path in run.iterdir()} == {
        "config.json", "versions.json", "vocabulary.json", "log.jsonl", "curves.png",
        "samples.png", "held_out.json", "model.safetensors", "result.json", "run.lock"}
    assert points[0] not in read_json(run / "held_out.json")


TENSORS = "shard-00001-model-00003-of-00008.safetensors"    # a file of a checkpoint


@pytest.mark.parametrize("how", ["flipped", "halved", "empty", "missing"])
@pytest.mark.parametrize("file", [TENSORS, "progress.json", "../../log.jsonl"])
def test_a_damaged_checkpoint_is_named(kept, tmp_path, file, how):
    """A bit flipped, a file halved, empty or missing: named, before anything is loaded."""
    run = tmp_path / "run"
    shutil.copytree(kept / "runs/kept", run)
    newest = saved_checkpoints(run / "checkpoints")[-1]
    assert examine(newest)[0] is None
    damage(newest / file, how)
    assert Path(file).name in examine(newest)[0]


def test_a_file_that_a_checkpoint_does_not_list_is_named(kept, tmp_path):
    """DCP would read the tensors in it, in place of the checkpoint's or beside them."""
    run = tmp_path / "run"
    shutil.copytree(kept / "runs/kept", run)
    newest = saved_checkpoints(run / "checkpoints")[-1]
    shutil.copy(newest / TENSORS, newest / "extra.safetensors")
    with pytest.raises(InputError, match="damaged: extra.safetensors "):
        newest_checkpoint(run / "checkpoints", skip_damaged=False)


def test_an_older_checkpoint_is_taken_if_asked_for(kept, monkeypatch):
    """--resume names the damaged one and the flag; with --skip-damaged it ends as the straight run.

    """
    monkeypatch.chdir(kept)
    shutil.copytree("runs/kept", "runs/damaged")
    damage(Path("runs/damaged/checkpoints/stage2-00000004", TENSORS), "flipped")
    with pytest.raises(InputError, match="stage2-00000004: damaged: .* --skip-damaged"):
        train.main(["--resume", "runs/damaged"])
    train.main(["--resume", "runs/damaged", "--skip-damaged"])
    for name in ("log.jsonl", "model.safetensors"):
        assert Path("runs/damaged", name).read_bytes() == Path("runs/kept", name).read_bytes()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_crafted_checkpoint_runs_nothing(kept, monkeypatch, tmp_path):
    """Pickled code in place of tensors, with checksums to match: one line, and it does not run."""
    shutil.copytree(kept / "runs/kept", tmp_path / "runs/crafted")
    shutil.copytree(kept / "runs/stage0", tmp_path / "runs/stage0")
    shutil.copytree(kept / "kept", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    newest = saved_checkpoints(Path("runs/crafted/checkpoints"))[-1]
    for name in (TENSORS, ".metadata"):
        (newest / name).write_bytes(pickle.dumps(Evil()))
    content = read_json(newest / "progress.json")
    content["files"] = checksums(newest)
    content["progress"]["data"] = {}  # the copies have other times
    del content["crc32"]
    content["crc32"] = zlib.crc32(json.dumps(content).encode())
    write_json(newest / "progress.json", content)
    with pytest.raises(InputError, match="crafted/checkpoints/stage2-00000004: cannot be read: "):
        train.main(["--resume", "runs/crafted"])
    assert not list(tmp_path.rglob("pwned"))


def test_weights_have_the_mode_of_any_file(kept):
    """model.safetensors can be read by whom the umask lets."""
    umask = os.umask(0)
    os.umask(umask)
    mode = (kept / "runs/kept/model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~umask


def test_a_dead_teacher_is_named():
    """Weights all 0, or nan: known before the first step, with the teacher's name."""
    sets = [(world_records("train", "caption", 4), WorldImages("train", 4))]
    for value, said in ((0.0, "the same everywhere"), (float("nan"), "nan or inf")):
        teachers = tiny_teachers()
        check_teachers(teachers, sets, "cpu")
        for p in teachers.encoders["eva"].parameters():
            p.data.fill_(value)
        with pytest.raises(InputError, match=f"teacher eva: its tokens are {said}"):
            check_teachers(teachers, sets, "cpu")


# ------------------------------------------------------------------------------------------------
# Signals, places, and what the machine refuses


def start(folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *SHORT, *flags], cwd=folder,
                            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_every_signal_ends_a_run_in_order(workplace, name):
    """Ctrl-C and a closed terminal save as SIGTERM does; exit status 3, one line, no traceback."""
    process = start(workplace, "--out", f"runs/{name}", "--stage1-epochs", "9", "--max-steps", "0")
    for line in process.stdout:
        if line.startswith("stage 1 step 3 "):
            process.send_signal(getattr(signal, name))
            break
    _, errors = process.communicate()
    assert process.returncode == 3
    assert f"stopped by {name} at stage 1, step " in errors and "--resume" in errors
    assert "Traceback" not in errors
    assert len(saved_checkpoints(workplace / f"runs/{name}/checkpoints")) == 1


LOADING = [*itertools.product(["train.py --tiny", "-m tools.ask runs/tiny"],
                              ["SIGTERM", "SIGINT", "SIGHUP"])]


@pytest.mark.parametrize("program, name", LOADING)
def test_a_signal_while_the_libraries_load_is_one_line(tmp_path, program, name):
    """Half a second after its start a program is still loading torch: status 3, no traceback."""
    process = subprocess.Popen([sys.executable, *program.split()], cwd=HERE, encoding="utf-8",
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(0.5)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    line = f"stopped by {name} before the first step: nothing is lost\n"
    assert (process.returncode, errors) == (3, line)


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path):
    """A closed terminal does not end what was started under nohup."""
    process = subprocess.Popen(["nohup", sys.executable, "train.py", "--tiny"], cwd=HERE,
                               encoding="utf-8", stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    time.sleep(0.5)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and "stopped by SIGTERM" in errors


@pytest.mark.parametrize("moment", ["stage 0: training", pytest.param(
    "stage 0: convnext:", marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_says_that_nothing_is_lost(workplace, moment):
    """It ends at once, with stage 0's processes, which a batch system signals too: one line."""
    process = start(workplace, "--out", "runs/early", "--stage0-scale", "0.5")
    for line in process.stderr:
        if line.startswith(moment):
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    lines = [line for line in errors.splitlines() if line and not line.startswith("stage 0:")]
    assert lines == ["stopped by SIGTERM before the first step: nothing is lost"]


def test_what_the_disk_refuses_is_one_line(workplace, tmp_path):
    """--out that is a file, below a file: one line with the place and the reason, exit status 2."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out in ("file", "file/below"):
        done = subprocess.run([sys.executable, str(HERE / "train.py"), *SHORT, "--out", out],
                              cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "file" in errors[0]
        assert "Traceback" not in done.stderr


def test_a_run_can_be_evaluated_again(kept, monkeypatch, capsys):
    """train.py --evaluate RUN: the accuracies of the run itself, and of another set."""
    monkeypatch.chdir(kept)
    train.main(["--evaluate", "runs/kept"])
    line = capsys.readouterr().out.splitlines()[-1]
    result = read_json(Path("runs/kept/result.json"))
    assert json.loads(line.removeprefix("result: "))["accuracy"] == result["accuracy"]
    write_json(Path("kept/two.json"), read_json(Path("kept/train.json"))[:2])
    train.main(["--evaluate", "runs/kept", "--eval-data", "kept/two.json"])
    on_files = capsys.readouterr().out
    with pytest.raises(InputError, match="--stage1-lr: with --evaluate a run keeps"):
        train.main(["--evaluate", "runs/kept", "--stage1-lr", "1"])

    # so can one of the tiny world, which was trained on no file
    train.main(["--evaluate", "runs/tiny", "--eval-data", "kept/two.json"])
    for out in (on_files, capsys.readouterr().out):
        told = json.loads(out.splitlines()[-1].removeprefix("result: "))
        assert 0 <= told["macro_accuracy"] <= 100 and "seconds" not in told


def test_long_prompts_are_known_before_training(kept, monkeypatch):
    """A held-out question beyond --max-length, an evaluation fault, is found before the first step.

    """
    monkeypatch.chdir(kept)
    long = [{"id": "long", "conversations": conversation("why? " * 3000, "so")}]
    write_json(Path("kept/long.json"), long)
    with pytest.raises(InputError, match="long.json: row 0 .* --max-length is 2048"):
        train.main([*SHORT, "--out", "runs/long", "--data", "kept/train.json", "--eval-data",
                    "kept/long.json", "--cache-teachers", ""])
    assert not Path("runs/long/log.jsonl").exists()


def test_stopped_and_bad_input_have_their_exit_status(capsys):
    """0 done, 2 bad input or what the machine refuses, 3 stopped by a signal; each one line."""
    def end(error):
        def program():
            raise error
        with pytest.raises(SystemExit) as status:
            run(program)
        return status.value.code, capsys.readouterr().err

    assert end(InputError("--x: no")) == (2, "error: --x: no\n")
    assert end(OSError(28, "No space left on device", "runs/log.jsonl")) == (
        2, "error: runs/log.jsonl: No space left on device\n")
    assert end(Stopped("stopped by SIGINT")) == (3, "stopped by SIGINT\n")
    assert TINY.grad_clip == 1.0
