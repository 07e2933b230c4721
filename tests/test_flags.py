"""From flags or a config.json to a Config; bad input is one clear line."""

import dataclasses
import shlex

import pytest

import train
from plumbing.build import build_movekd, build_teachers
from plumbing.config import ENCODERS, FIELDS, PRESETS, Config, encoder, flag, recipe
from plumbing.flags import parse_config
from tests.common import SHORT, error_of, images, small_vlm, whole_method


def test_a_recipe_sets_the_whole_method():
    """--recipe sets every field of the table; one's own flag wins; the default is paper."""
    for preset, config in PRESETS.items():
        assert parse_config([f"--{preset}", "--recipe", "paper"]) == config
    for name in ("paper", "released", "ours"):
        c = parse_config(["--tiny", "--recipe", name])
        for field, value in recipe(name, PRESETS["tiny"]).items():
            assert getattr(c, field) == value
    c = parse_config("--tiny --recipe released --kd-token-weight paper".split())
    assert c.kd_token_weight == "paper"
    assert c.kd_teacher_weight == "released"
    full = parse_config("--full --recipe released --data-root .".split())
    assert full.convnext.split()[0] == "convnext_xxlarge.clip_laion2b_soup_ft_in1k"


def test_help_is_short_and_names_every_field(capsys):
    """At most 130 lines of at most 100 columns; a field's comment, flag and values are in one."""
    with pytest.raises(SystemExit):
        parse_config(["--help"], train.__doc__)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 100
    for name in FIELDS:
        row, = [line for line in lines if line.startswith(f"  {flag(name)} ")]
        assert not row.split()[1].startswith("["), name
    assert any(line.endswith("[0 | 8 | 16] R") for line in lines)


def test_adding_a_teacher_is_one_entry_in_the_config():
    """One more field made by encoder(spec), DINOv2 in miniature, is a teacher that distils."""
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


BAD = {
    "--max-length 20": "--max-length is 20",
    "--eva 'no_such_model img_size=64'": "--eva no_such_model: timm has no such model",
    "--eva 'eva02_tiny_patch14_224 img_size=64 patch_size=8 embed_dim=81 depth=3 num_heads=4'":
        "num_heads=4': cannot teach: it needs a ViT or a ConvNeXt of timm",
    "--eva 'eva02_tiny_patch14_224 img_size=(64,32)'": "img_size=(64,32)': must read 'TIMM_NAME",
    "--eva 'eva02_tiny_patch14_224.mine img_size=64'": "(Invalid pretrained tag (mine) for",
    "--clip 'eva02_tiny_patch14_224 img_size=56'": "img_size=56': cannot be the student: it needs",
    "--clip 'vit_small_patch14_reg4_dinov2 img_size=56'": "and no registers",
    "--clip 'vit_tiny_patch16_224 img_size=64 qk_norm=True'": "name a CLIP ViT of timm",
    "--clip 'vit_tiny_patch16_224 img_size=64 qkv_bias=False'": "attn.qkv with a bias",
    "--clip 'vit_tiny_patch16_224 img_size=64 pretrained=True'": "takes no num_classes, pretrained",
    "--teachers clip sam --sam 'samvit_base_patch16 img_size=64'":
        "--sam samvit_base_patch16 img_size=64: stage 0 makes no such model",
    "--resume runs/tiny": "not allowed with argument --tiny",
    "--stage2-lr 1e6 --grad-clip 0": "is nan at stage 2",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_clear_line(flags, workplace, monkeypatch, capsys):
    """Exit status 2 and one line that names the flag, also of what shows only in training."""
    monkeypatch.chdir(workplace)
    argv = [*SHORT, "--out", "runs/bad", *shlex.split(flags)]
    assert BAD[flags] in error_of(argv, capsys)
