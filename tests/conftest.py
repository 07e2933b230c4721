"""Fixtures of all tests. A run is made once per session; tests only add to its folder."""

import contextlib

import pytest

pytest.register_assert_rewrite("tests.common")

import torch

import tests.common as common  # before what imports timm: it keeps the model hubs out
from plumbing import checks
from plumbing.config import ENCODERS
from plumbing.files import write_json
from plumbing.sets import LLAVA_IMAGES
from tiny.world import world_records


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def encoders_checked_once():
    """Remember which encoders are sound: the check of a Config builds each, and takes 0.2 s."""
    check, sound = checks.check_encoder, set()
    fields = [name for name in vars(common.C) if name.startswith("mole_")]
    fields += [*ENCODERS, "teachers", "student"]

    def check_once(c, name):
        key = (name, *(getattr(c, field) for field in fields))
        if key not in sound:
            check(c, name)
            sound.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "check_encoder", check_once)
        yield


@pytest.fixture
def photo(tmp_path):
    common.save_png(tmp_path / "one.png", common.images(1)[0])
    return tmp_path / "one.png"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with one short run, runs/tiny, and what it printed, output.txt.

    Tests add runs under other names, and share its stage 0 and teachers' cache.
    """
    folder = tmp_path_factory.mktemp("work")
    with open(folder / "output.txt", "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        common.run_here(folder, *common.SHORT)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A small random Llama and its tokenizer, of Llama's kind, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    vocabulary, merges = common.llama_pieces()
    transformers.LlamaTokenizer(vocabulary, merges).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory, llama_folder):
    """A checkpoint in the authors' layout, random weights: CLIP of width 128 and depth 3."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
        image_size=48, patch_size=8)
    vision = transformers.CLIPVisionModel(config)
    llama = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    folder = tmp_path_factory.mktemp("released")
    common.write_released(folder, llama_folder, llama, vision)
    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """Encoder files and LLaVA's data layout with a few pictures; coco's 5.png is broken."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    for name in common.REAL:
        common.random_file(name, folder)
    for part in LLAVA_IMAGES:
        (folder / part).mkdir(parents=True)
    captions = world_records("train", "caption", 12)
    chats = world_records("train", "chat", 12) + world_records("train", "text", 4)
    for i, image in enumerate(common.images(12)):
        common.save_png(folder / f"LLaVA-Pretrain/images/{i}.png", image)
        common.save_png(folder / f"coco/train2017/{i}.png", image)
        captions[i]["image"] = f"{i}.png"
        chats[i]["image"] = f"coco/train2017/{i}.png"
    (folder / "coco/train2017/5.png").write_bytes(b"\x89PNG not a picture")
    # ShareGPT's dialogues may begin with an answer
    chats[-1]["conversations"].insert(0, {"from": "gpt", "value": "as I said"})
    write_json(folder / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", captions)
    write_json(folder / "llava_v1_5_mix665k.json", chats)
    return folder


@pytest.fixture(scope="session")
def full_run(real_folder, llama_folder):
    """`--full` on files in place of downloads, four teachers, the broken picture skipped."""
    flags = [*common.full_flags(real_folder, llama_folder), "--out", "runs/full", "--skip-bad"]
    common.run_here(real_folder, *flags)
    return real_folder / "runs/full"


@pytest.fixture(scope="session")
def two_processes(workplace):
    """The workplace with runs/two, made by two processes, and runs/one, with their checkpoints."""
    done = common.run_script(workplace, *common.SHORT, *common.SHARED, "--out", "runs/two",
                             "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    common.run_here(workplace, *common.SHORT, *common.SHARED, "--out", "runs/one",
                    "--micro-batch", "1")
    return workplace


@pytest.fixture(scope="session")
def kept(workplace):
    """A run on files, with checkpoints in both stages."""
    common.world_on_disk(workplace / "kept")
    common.run_here(workplace, *common.SHORT, "--out", "runs/kept", "--data", "kept/train.json",
                    "--eval-data", "kept/train.json", "--save-every", "2", "--keep", "9",
                    "--cache-teachers", "")
    return workplace
