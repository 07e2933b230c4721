"""From flags or a config.json to a Config; bad input is one clear line."""

import dataclasses
import shlex

import pytest

import train
from data import InputError
from plumbing.build import build_movekd, build_teachers
from plumbing.cli import run
from plumbing.config import ENCODERS, RECIPES, Config, encoder, recipe
from plumbing.files import write_json
from plumbing.flags import load_config, parse_config
from tests.common import C, SHORT, conversation, images, small_vlm, whole_method


def test_unknown_key_in_a_config_is_an_error(tmp_path):
    """A config.json with a key that Config lacks is refused by name."""
    write_json(tmp_path / "config.json", {"lambda_kdd": 1})
    with pytest.raises(InputError, match="lambda_kdd"):
        load_config(tmp_path / "config.json")


def test_a_config_is_read_as_it_was_written(tmp_path):
    """Each field of Config comes back from JSON, a missing key by default."""
    c = dataclasses.replace(C, teachers=("clip", "eva"), lambda_kd=0.5, clip_share=0.7)
    write_json(tmp_path / "config.json", dataclasses.asdict(c))
    assert load_config(tmp_path / "config.json") == c
    write_json(tmp_path / "short.json", {"clip_share": 0.7})
    assert load_config(tmp_path / "short.json") == dataclasses.replace(C, clip_share=0.7)


def test_recipe_sets_rows_1_to_9():
    """--recipe sets every switch of the table, and a flag of one's own still wins."""
    for name in ("paper", "released", "ours"):
        c = parse_config(["--tiny", "--recipe", name])
        left = set(RECIPES) - set(recipe(name))  # numbers, which a recipe may leave as they are
        assert left == (set() if name == "ours" else {"target_norm", "clip_share"})
        for field, value in recipe(name).items():
            assert getattr(c, field) == value
    c = parse_config("--tiny --recipe released --kd-token-weight paper".split())
    assert c.kd_token_weight == "paper"
    assert c.kd_teacher_weight == "released"


def test_the_config_of_a_run_records_every_switch(workplace):
    """config.json of a run holds each field of Config, the rows of the recipes among them."""
    c = load_config(workplace / "runs/tiny/config.json")
    assert c == parse_config([*SHORT])
    text = (workplace / "runs/tiny/config.json").read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(RECIPES) < fields
    assert all(f'"{name}":' in text for name in fields)


def test_adding_a_teacher_is_one_entry_in_the_config():
    """A Config with one more field, made by encoder(spec), has a teacher that distils.

    DINOv2 in miniature: no subclass, no other line. (ENCODERS lists the fields so made.)
    """
    spec = "vit_small_patch14_dinov2 img_size=56 embed_dim=48 depth=2 num_heads=4"
    More = dataclasses.make_dataclass("More", [("dino", str, encoder(spec))], bases=(Config,))
    listed = [f.name for f in dataclasses.fields(More) if f.metadata.get("encoder")]
    assert listed == [*ENCODERS, "dino"]
    c = More(teachers=("clip", "dino"))
    _, _, batch = whole_method()
    teachers = build_teachers(c, {})
    model = build_movekd(c, small_vlm(vocabulary=200), teachers)
    terms = model(batch, teachers)
    assert teachers(images(2), [])["dino"].tokens.shape == (2, 16, 48)
    assert terms["w_dino"] > 0
    assert terms["kd_dino"] > 0
    terms["L_kd"].backward()
    assert all(p.grad is not None for p in model.adapters["dino"].parameters())


# ------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "--lamda-kd 0": "--lamda-kd",
    "--lambda-kd much": "--lambda-kd",
    "--teachers eva clip": "--teachers",
    "--data gone.json --eval-data gone.json": "gone.json: no such file",
    "--data broken.json --eval-data broken.json": "broken.json: not valid JSON",
    "--data train.json": "--eval-data",
    "--data answerless.json --eval-data answerless.json":
        "row 0 (counted from 0) has a question without an answer",
    "--data missing.json --eval-data missing.json": "gone.png: no such image file",
    "--data corrupt.json --eval-data corrupt.json": "corrupt.png: not a readable image",
    "--max-length 20": "--max-length",
    "--clip-share 1.5": "--clip-share",
    "--eva 'no_such_model img_size=64'": "--eva no_such_model: timm has no such model",
    "--eva eva02_tiny_patch14_224": "--eva",
    "--data-root nowhere":
        "--data-root nowhere: has no LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "--device cuda": "--device cuda: torch finds no GPU here",
    "--clip 'vit_base_patch16_clip_quickgelu_224.openai img_size=48'":
        "a real CLIP and no data: name --data-root",
    "--teachers clip sam --sam 'samvit_base_patch16 img_size=64'":
        "--sam samvit_base_patch16 img_size=64: stage 0 makes no such model",
    "--resume runs/tiny": "not allowed with argument --tiny",
    "--init-from nowhere": "nowhere/config.json: no such file",
    "--stage1-batch 300 --micro-batch 1":
        "--stage1-batch 300: has no sample for each of 300 micro-batches",
    "--recipe mine": "--recipe",
    "--llm nowhere": "--llm nowhere",
    "--student frozen": "--lambda-kd 0 --mole-experts 0",
    "--stage2-lr 1e6 --grad-clip 0": "is nan at stage 2",
}


@pytest.fixture(scope="module")
def bad_files(workplace):
    """The workplace with files that cannot be used."""
    turns = conversation("<image>\nwhat?", "that")
    (workplace / "broken.json").write_text('[{"id": 1,', encoding="utf-8")
    (workplace / "corrupt.png").write_bytes(b"\x89PNG\r\n not a picture")
    answerless = {"conversations": turns[:1], "image": "corrupt.png"}
    write_json(workplace / "answerless.json", [answerless])
    write_json(workplace / "missing.json", [{"conversations": turns, "image": "gone.png"}])
    write_json(workplace / "corrupt.json", [{"conversations": turns, "image": "corrupt.png"}])
    return workplace


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_clear_line(flags, bad_files, monkeypatch, capsys):
    """Exit status 2 and one line that names the file, row or flag; no traceback."""
    if "--llm" in flags:
        pytest.importorskip("transformers")
    monkeypatch.chdir(bad_files)
    with pytest.raises(SystemExit) as end:
        run(lambda: train.main([*SHORT, "--out", "runs/bad", *shlex.split(flags)]))
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(errors) == 1
    assert BAD[flags] in errors[0]
