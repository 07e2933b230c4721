"""docs/promises.md, line by line: bad input is one line, and nothing wrong goes on in silence."""

import dataclasses
import fcntl
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
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from data import InputError, conversation_ids
from plumbing import plots, sets
from plumbing.checkpoints import checksums, examine, saved_checkpoints
from plumbing.checks import check_machine, find_device
from plumbing.config import FIELDS, TINY, flag, plain_type
from plumbing.evaluate import questions_of
from plumbing.files import read_json, write_json
from plumbing.flags import load_config, parse_config
from plumbing.run_folder import read_log
from real.image_files import DiskImages, as_seen, load_image
from real.records import read_list
from tests import common
from tests.common import HERE, SHORT, assert_same_run, conversation, damage, images, run_here
from tiny.llm import WordTokenizer
from tiny.world import WorldImages, world_records

# ------------------------------------------------------------------------------------------------
# Flags and config.json


def is_valid(name: str, value) -> bool:
    """Return whether a value has the type and lies in the range that stand beside the field."""
    kind = plain_type(FIELDS[name])
    if kind is typing.Literal:
        return value in typing.get_args(FIELDS[name].type)
    if kind is tuple:
        full = value or not FIELDS[name].default
        return isinstance(value, tuple) and bool(full) and {*map(type, value)} <= {str}
    if type(value) is not kind and not (kind is float and type(value) is int):
        return False
    if typing.get_origin(FIELDS[name].type) is typing.Annotated:
        low, high = FIELDS[name].type.__metadata__[0]
        return low <= value <= high
    return True


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_it_cannot_be(name, tmp_path):
    """Each odd value is accepted, valid, or gets one line: that names the flag, or file and key."""
    for value in ("-1", "0", "nan", "inf", "1000000000000", "", "word"):
        try:
            c = parse_config(["--tiny", f"{flag(name)}={value}"])
        except InputError as e:
            assert flag(name) in str(e) or name in ("init_from", "data", "teachers"), e
            assert "\n" not in str(e)
        else:
            assert is_valid(name, getattr(c, name))
    file = tmp_path / "config.json"
    for value in (-1, 0, 0.5, 2, 7, 10 ** 12, "", "1e-3", None, True, {"a": 1}, (), ("a",), (1,)):
        write_json(file, {name: value})
        if is_valid(name, value):
            assert load_config(file) == dataclasses.replace(TINY, **{name: value})
        else:
            with pytest.raises(InputError, match=f"config.json: {name} .*: must be "):
                load_config(file)


# ------------------------------------------------------------------------------------------------
# Pictures


def test_a_picture_stands_as_a_viewer_shows_it(tmp_path):
    """EXIF orientations 1 to 8 in JPEG, PNG, TIFF and WebP: the same upright picture each time."""
    upright = Image.new("RGB", (32, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 0, 255), (16, 0, 32, 16))
    expected = np.asarray(upright).astype(int)
    T = Image.Transpose
    undo = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
            6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    for ending in ("jpg", "png", "tiff", "webp"):
        for orientation in range(1, 9):
            turn = undo.get(orientation)
            stored = upright if turn is None else upright.transpose(turn)
            exif = Image.Exif()
            exif[0x0112] = orientation
            path = tmp_path / f"{orientation}.{ending}"
            stored.save(path, exif=exif, quality=95)
            seen = load_image(path, 32).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(seen - expected).mean() < 4, path     # a wrong quarter adds over 40


def grey(mode: str) -> Image.Image:
    """Return a picture in a mode of PIL: the left half dark (1/5), the right light (4/5)."""
    eight = np.full((8, 8), 51, np.uint8)
    eight[:, 4:] = 204
    factors = {"I;16": np.uint16(257), "I": np.int32(257), "F": np.float32(1)}
    if mode in factors:
        return Image.fromarray(eight * factors[mode])
    picture = Image.fromarray(eight)
    if mode in ("La", "RGBa"):      # premultiplied; PIL makes them of LA and RGBA only
        return picture.convert(mode.upper()).convert(mode)
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


@pytest.mark.slow
def test_long_thin_pictures_take_memory_near_their_own(tmp_path):
    """They are shrunk first and padded then: under 200 MB, and in the middle of the square."""
    names = []
    for width, height in ((20_000, 10), (60_000, 4), (1080, 16_000)):
        names.append(str(tmp_path / f"{width}.png"))
        Image.new("RGB", (width, height), (200, 10, 10)).save(names[-1])
    code = ("import resource, sys; from pathlib import Path; "
            "from real.image_files import load_image; "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
            "images = [load_image(Path(name), 96) for name in sys.argv[1:]]; "
            "print(peak() - before, *(int(image[0, 47:49, 47:49].max()) for image in images))")
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=HERE, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr
    used, *middles = map(int, done.stdout.split())
    assert used < 200_000  # kB: the pixels of the largest are 52 MB
    assert middles == [200] * 3


def test_only_what_pil_says_of_a_file_is_its_fault(photo, monkeypatch):
    """Too few file descriptors are the machine's fault, and no row is called bad for it."""
    def no_descriptor(path):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Image, "open", no_descriptor)
    with pytest.raises(OSError, match="Too many open files"):
        load_image(photo, 8)


def test_images_outside_their_folder_are_refused(tmp_path):
    """.., an absolute name and a link that leads out; --allow-outside allows them."""
    common.save_png(tmp_path / "secret.png", images(1)[0])
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(InputError, match="lies outside the image folder"):
            DiskImages(folder, 8)(name)
        assert DiskImages(folder, 8, allow_outside=True)(name).shape == (3, 8, 8)


def test_json_as_people_write_it(tmp_path):
    """An empty "image" is none, and half an emoji is read, as a list and as JSON Lines."""
    row = {"conversations": conversation("what?", "nice \ud83d")}
    lines = [json.dumps({**row, "image": image}) for image in (None, "", [])]
    for text in ("\n".join(lines), f"[{','.join(lines)}]"):
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        for record in read_list(tmp_path / "rows.json"):
            assert "image" not in record
            assert record["conversations"][1]["value"].endswith("\ufffd")


def test_words_of_a_text_are_never_control_tokens():
    """</s>, <s>, <image>, USER: typed inside a text are words; only the template's are control."""
    typed = "type </s> or <s> or <pad> or <image>, not USER: or ASSISTANT:"
    record = {"conversations": conversation(typed, typed)}
    tokenizer = WordTokenizer.from_records([record])
    ids, labels = conversation_ids(record, "v1", tokenizer, n=3)
    special = [tokenizer.vocabulary[i] for i in ids if i < len(WordTokenizer.SPECIAL)]
    assert special == ["<s>", "USER:", "ASSISTANT:", "</s>"]
    assert tokenizer.unk not in ids
    assert labels[-1] == tokenizer.eos


@pytest.mark.slow
def test_started_from_a_run_words_keep_their_numbers(workplace):
    """--init-from a run on data with other words: the run's keep their numbers, new ones follow."""
    common.world_on_disk(workplace / "renamed", "heart", "zebra")      # as many words, one renamed
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


CHANGES = {
    "added": lambda rows: [*rows, rows[0]],
    "removed": lambda rows: rows[:-1],
    "reordered": lambda rows: rows[::-1],
    "a word": lambda rows: json.loads(json.dumps(rows).replace("heart", "zebra")),
}


@pytest.mark.parametrize("kind", [*CHANGES, "an image"])
def test_resume_notices_other_data(kept, kind, monkeypatch):
    """Rows added, removed, reordered, a word or an image replaced: refused, and the file named."""
    monkeypatch.chdir(kept)
    rows, picture = Path("kept/train.json"), Path("kept/3.png")
    saved = rows.read_bytes(), picture.read_bytes()
    try:
        if kind == "an image":
            common.save_png(picture, torch.zeros(3, 50, 50, dtype=torch.uint8))
        else:
            write_json(rows, CHANGES[kind](json.loads(saved[0])))
        with pytest.raises(InputError, match="kept.*changed since the checkpoint"):
            train.main(["--resume", "runs/kept"])
    finally:
        rows.write_bytes(saved[0])
        picture.write_bytes(saved[1])


def test_content_decides_whether_data_have_changed(kept, tmp_path, monkeypatch, capsys):
    """Moved with the run, and written anew, they are the same; others need --allow-new-data."""
    for name in ("kept", "runs/kept"):
        shutil.copytree(kept / name, tmp_path / name, copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "runs/kept"])
    assert_same_run(Path("runs/kept"), kept / "runs/kept")

    rows = json.loads(Path("kept/train.json").read_text(encoding="utf-8"))
    write_json(Path("other.json"), CHANGES["a word"](rows))
    argv = ["--resume", "runs/kept", "--data", "other.json", "--image-folder", "kept"]
    with pytest.raises(InputError, match="^other.json: its pretrain rows have changed since .* "
                                         "add --allow-new-data"):
        train.main(argv)
    train.main([*argv, "--allow-new-data"])
    assert "note: other.json: its train rows have changed" in capsys.readouterr().err
    assert read_json("runs/kept/vocabulary.json") == read_json(kept / "runs/kept/vocabulary.json")


def test_two_runs_do_not_share_a_folder(kept, monkeypatch):
    """A run is refused while another holds its folder; a finished one is not overwritten."""
    monkeypatch.chdir(kept)
    with open("runs/kept/run.lock", "a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="--out runs/kept: a run is in it, process "):
            train.main(["--resume", "runs/kept"])
    with pytest.raises(InputError, match="--out runs/kept: holds a finished run; .* --overwrite"):
        train.main([*SHORT, "--out", "runs/kept"])


def test_an_overwritten_run_leaves_nothing_of_the_earlier_one(kept):
    """No accuracy, picture or weights of a model that is gone; a resumed run keeps its log."""
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
    left = {*common.FILES, "held_out.json", "run.lock", "stage0"}
    assert {path.name for path in run.iterdir()} == left
    assert points[0] not in read_json(run / "held_out.json")


TENSORS = "shard-00001-model-00003-of-00008.safetensors"    # a file of a checkpoint
DAMAGE = [*itertools.product([TENSORS, "progress.json"], ["flipped", "halved", "empty", "missing"]),
          ("extra.safetensors", "put there")]   # DCP would read its tensors


@pytest.mark.parametrize("file, how", DAMAGE)
def test_a_damaged_checkpoint_is_named(kept, tmp_path, file, how):
    """A bit flipped, a file halved, empty, missing or not listed: named before anything loads."""
    run = shutil.copytree(kept / "runs/kept", tmp_path / "run")
    newest = saved_checkpoints(run / "checkpoints")[-1]
    assert examine(newest)[0] is None
    if how == "put there":
        shutil.copy(newest / TENSORS, newest / file)
    else:
        damage(newest / file, how)
    assert Path(file).name in examine(newest)[0]


def test_an_older_checkpoint_is_taken_if_asked_for(kept, monkeypatch):
    """--resume names damage and flag; with --skip-damaged it ends as the straight run."""
    monkeypatch.chdir(kept)
    shutil.copytree("runs/kept", "runs/damaged")
    damage(Path("runs/damaged/checkpoints/stage2-00000004", TENSORS), "flipped")
    with pytest.raises(InputError, match="stage2-00000004: damaged: .* --skip-damaged"):
        train.main(["--resume", "runs/damaged"])
    train.main(["--resume", "runs/damaged", "--skip-damaged"])
    assert_same_run(Path("runs/damaged"), Path("runs/kept"))


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_lost_log_is_no_damaged_checkpoint(kept, monkeypatch, capsys, how):
    """--resume says so and goes on to the same weights; the log has the steps from there on."""
    monkeypatch.chdir(kept)
    run = Path(shutil.copytree("runs/kept", f"runs/log-{how}"))
    shutil.rmtree(run / "checkpoints/stage2-00000004")
    damage(run / "log.jsonl", how)
    train.main(["--resume", str(run)])
    assert f"note: {run}/log.jsonl: is missing, or has changed" in capsys.readouterr().err
    name = "model.safetensors"
    assert (run / name).read_bytes() == Path("runs/kept", name).read_bytes()
    assert [(line["stage"], line["step"]) for line in read_log(run)] == [(2, 2), (2, 3)]


@pytest.mark.parametrize("field, value", [("lm_depth", 2), ("seed", 1), ("stage2_batch", 4),
                                          ("lambda_kd", 0.3), ("teachers", ["clip", "eva"]),
                                          ("max_length", 99)])
def test_resume_keeps_what_it_was_trained_with(kept, tmp_path, field, value):
    """A field of config.json that was edited since the checkpoint is refused by name."""
    run = shutil.copytree(kept / "runs/kept", tmp_path / "run")
    write_json(run / "config.json", {**read_json(run / "config.json"), field: value})
    line = f"config.json: {field} is .*, and the checkpoint was trained with"
    with pytest.raises(InputError, match=line):
        train.main(["--resume", str(run)])


def test_a_lower_learning_rate_is_allowed(kept, tmp_path, monkeypatch, capsys):
    """As a run that diverged is told: --resume RUN --stage2-lr LOWER; a note says it."""
    monkeypatch.chdir(kept)
    run = Path(shutil.copytree("runs/kept", tmp_path / "run"))
    shutil.rmtree(run / "checkpoints/stage2-00000004")
    train.main(["--resume", str(run), "--stage2-lr", "1e-5", "--keep", "3"])
    assert "note: --stage2-lr 1e-05 from here on; it was 0.001\n" in capsys.readouterr().err
    before, after = read_log(Path("runs/kept")), read_log(run)
    assert after[:-2] == before[:-2]
    assert after[-1]["lr"] == pytest.approx(before[-1]["lr"] / 100)


def test_a_crafted_checkpoint_runs_nothing(kept, monkeypatch):
    """Pickled code in place of tensors, with checksums to match: one line, and it does not run."""
    monkeypatch.chdir(kept)
    shutil.copytree("runs/kept", "runs/crafted")
    newest = saved_checkpoints(Path("runs/crafted/checkpoints"))[-1]
    for name in (TENSORS, ".metadata"):
        (newest / name).write_bytes(pickle.dumps(common.RunsCode()))
    content = read_json(newest / "progress.json")
    content["files"] = checksums(newest)
    del content["crc32"]
    content["crc32"] = zlib.crc32(json.dumps(content).encode())
    write_json(newest / "progress.json", content)
    with pytest.raises(InputError, match="crafted/checkpoints/stage2-00000004: cannot be read: "):
        train.main(["--resume", "runs/crafted"])
    assert not list(kept.rglob("pwned"))


# ------------------------------------------------------------------------------------------------
# Signals, places, and what the machine refuses


def test_every_signal_ends_a_run_in_order(workplace):
    """Sent to all of a run's processes, those that load images too: saved, status 3, one line."""
    flags = "--stage1-epochs 500 --max-steps 0 --workers 2".split()
    processes = {name: common.start(workplace, "--out", f"runs/{name}", *flags)
                 for name in ("SIGTERM", "SIGINT", "SIGHUP")}
    for name, process in processes.items():
        errors = common.stop(process, name)
        assert "--resume" in errors and "Traceback" not in errors
        assert len(saved_checkpoints(workplace / f"runs/{name}/checkpoints")) == 1


def end_while_loading(name: str, *program: str) -> tuple[int, str]:
    """Send a program a signal while it loads torch; return its status and its last words."""
    process = subprocess.Popen(program, cwd=HERE, encoding="utf-8", stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    time.sleep(0.5)
    if program[0] == "nohup":
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("program", ["train.py --tiny", "-m tools.ask runs/tiny"])
def test_a_signal_while_the_libraries_load_is_one_line(program, name):
    """Half a second after its start a program is still loading torch: status 3, no traceback."""
    line = f"stopped by {name} before the first step: nothing is lost\n"
    assert end_while_loading(name, sys.executable, *program.split()) == (3, line)


def test_a_signal_that_nohup_ignores_stays_ignored():
    """A closed terminal does not end what was started under nohup."""
    program = ["nohup", sys.executable, "train.py", "--tiny"]
    status, errors = end_while_loading("SIGTERM", *program)
    assert status == 3 and "stopped by SIGTERM" in errors


@pytest.mark.parametrize("moment", ["stage 0: training", pytest.param(
    "stage 0: convnext:", marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_says_that_nothing_is_lost(workplace, moment):
    """It ends at once, with stage 0's processes, which are signalled too: one line."""
    process = common.start(workplace, "--out", "runs/early", "--stage0-scale", "0.5")
    for line in process.stderr:
        if line.startswith(moment):
            os.killpg(process.pid, signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    lines = [line for line in errors.splitlines() if line and not line.startswith("stage 0:")]
    assert lines == ["stopped by SIGTERM before the first step: nothing is lost"]


def test_a_run_can_be_evaluated_again(kept, monkeypatch, capsys):
    """train.py --evaluate RUN: the accuracies of the run itself, and of another set."""
    monkeypatch.chdir(kept)
    def evaluate(run: str, *flags: str) -> dict:
        train.main(["--evaluate", run, *flags])
        line = capsys.readouterr().out.splitlines()[-1]
        return json.loads(line.removeprefix("result: "))

    result = read_json(Path("runs/kept/result.json"))
    assert evaluate("runs/kept")["accuracy"] == result["accuracy"]
    predictions = read_json(Path("runs/kept/predictions.jsonl"))
    for kind, accuracy in result["accuracy"].items():
        correct = [line["correct"] for line in predictions if line["type"] == kind]
        assert 100 * sum(correct) / len(correct) == pytest.approx(accuracy)
    write_json(Path("kept/two.json"), read_json(Path("kept/train.json"))[:2])
    for run in ("runs/kept", "runs/tiny"):      # runs/tiny was trained on no file
        other = evaluate(run, "--eval-data", "kept/two.json")
        assert 0 <= other["macro_accuracy"] <= 100 and "seconds" not in other
    with pytest.raises(InputError, match="--stage1-lr: with --evaluate a run keeps"):
        evaluate("runs/kept", "--stage1-lr", "1")


def test_an_evaluation_prints_first_and_writes_elsewhere(kept, monkeypatch, capsys):
    """A run that cannot be written is printed, then a line names --out; there the files go."""
    monkeypatch.chdir(kept)
    shutil.copytree("runs/tiny", "runs/shut", ignore=shutil.ignore_patterns("evaluation.json"))
    write_json(Path("runs/shut/evaluation.json/full"), [])      # root too cannot replace a folder
    answers = [["red"], ["crimson"], ["?!", "red"], ["red " * 20, "blue " * 30]]
    rows = [{"id": n, "conversations": conversation("what colour?", texts[0]), "answers": texts}
            for n, texts in enumerate(answers)]
    del rows[0]["answers"]
    write_json(Path("said.json"), rows)
    argv = ["--evaluate", "runs/shut", "--eval-data", "said.json"]
    line = "error: runs/shut/evaluation.json: Is a directory"
    assert common.error_of(argv, capsys) == line
    train.main([*argv, "--out", "new/folder"])
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1].removeprefix("result: "))
    assert read_json(Path("new/folder/evaluation.json")) == result
    predictions = read_json(Path("new/folder/predictions.jsonl"))
    assert [line["answers"] for line in predictions] == answers
    assert set(predictions[0]) == {"id", "type", "question", "answers", "prediction", "correct"}
    assert Path("new/folder/samples.png").exists()
    assert [line for line in printed.err.splitlines() if line.startswith("note: ")] == [
        "note: said.json: 1 of 4 answers cannot be said: they have words that training never "
        'shows, as "crimson" in row 1 (counted from 0, id 1)',
        "note: said.json: 1 of 4 answers are longer than --max-new-tokens 16: the longest has 21 "
        "tokens, in row 3 (counted from 0, id 3): raise the flag"]


def test_long_prompts_are_known_before_training(kept, monkeypatch):
    """A held-out question beyond --max-length is found before the first step."""
    monkeypatch.chdir(kept)
    long = [{"id": "long", "conversations": conversation("why? " * 3000, "so")}]
    write_json(Path("kept/long.json"), long)
    with pytest.raises(InputError, match="long.json: row 0 .* --max-length is 2048"):
        train.main([*SHORT, "--out", "runs/long", "--data", "kept/train.json", "--eval-data",
                    "kept/long.json", "--cache-teachers", ""])
    assert not Path("runs/long/log.jsonl").exists()


@pytest.mark.slow
def test_text_is_utf8_whatever_the_locale(workplace):
    """A run in plain ASCII's locale: its files are UTF-8, its console shows \\u... ."""
    common.save_png(workplace / "a.png", images(1)[0])
    turns = conversation("<image>\nчто это?", "größe 图")
    write_json(workplace / "russian.json", [{"image": "a.png", "conversations": turns}] * 12)
    flags = ["--out", "runs/russian", "--data", "russian.json", "--eval-data", "russian.json"]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *SHORT, *flags], cwd=workplace,
                          env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "что это?".encode("ascii", "backslashreplace") in done.stdout
    assert {"что", "größe", "图"} <= set(read_json(workplace / "runs/russian/vocabulary.json"))


def test_answers_in_any_script_are_drawn_without_a_warning(tmp_path):
    """An untrained LLM answers anything: a box stands for what the font has no glyph for."""
    records = world_records("test", "question", 3)
    answers = ["图里 🦊\u0000\u200f", "a\tb\nc", "$x_1$ \ue000", "\U0010fffd红"] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_samples(tmp_path / "samples.png", questions_of(records), answers,
                           WorldImages("test", 3))
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_a_spawned_worker_gives_the_same_samples(monkeypatch):
    """Its pickled copy of a data set, at work in another process, gives the batches of this one."""
    monkeypatch.setattr(sets, "START", "spawn")
    dataset = common.some_conversations(4, 4)
    loaded = []
    for workers in (0, 1):
        options = sets.loader_options(dataclasses.replace(TINY, workers=workers))
        loaded.append(list(sets.make_loader(dataset, 2, 1, 0, 0, **options)))
    for ours, theirs in zip(*loaded, strict=True):
        assert ours["input_ids"].equal(theirs["input_ids"])
        assert ours["image_names"] == theirs["image_names"]
        assert ours["images"] is None or ours["images"].equal(theirs["images"])


def test_the_device_is_checked(monkeypatch):
    """"auto" is a device that is here; what Apple's cannot train is an error."""
    check_machine(dataclasses.replace(TINY, device=find_device("auto")), trains=True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    for fields, line in (({"precision": "bf16"}, "--precision fp32"),
                         ({"processes": 2}, "one process")):
        with pytest.raises(InputError, match=f"--device mps: .*{line}"):
            check_machine(dataclasses.replace(TINY, device="mps", **fields), trains=True)
