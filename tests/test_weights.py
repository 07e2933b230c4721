"""Weights that others made: encoder files, the hub, pretrained LLMs, the authors' checkpoint."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from data import InputError
from model import VLM, Projector, Student, next_tokens, text_loss
from plumbing.build import build_movekd, build_teachers, build_vlm
from plumbing.config import ENCODERS, FULL, SMALL, TINY, Config, is_real
from plumbing.files import read_json, read_tensors, write_json, write_tensors
from plumbing.finished_run import load_run
from plumbing.run_folder import export
from real.encoder_weights import HUB, find_weights, load_net
from real.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from real.released_checkpoint import load_projector, released_config
from teachers import ClipEncoder, VisionEncoder, create_net, parse_spec
from tests.common import REAL, SHORT, C, RunsCode, images, random_file, run_here, world_on_disk
from tools.export.__main__ import main as write_out

close = torch.testing.assert_close
OPENAI = {  # transformers' name of a part of CLIP: OpenAI's
    "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.q_proj.": "attn.in_proj_", "vision_model.": ""}


def openai_names(source: dict) -> dict[str, torch.Tensor]:
    """Return the tensors of a transformers CLIP under OpenAI's names, q, k and v joined."""
    target = {}
    for name, tensor in source.items():
        if "q_proj" in name:
            others = [source[name.replace("q_proj", f"{letter}_proj")] for letter in "kv"]
            tensor = torch.cat([tensor, *others])
        for theirs, openai in OPENAI.items():
            name = name.replace(theirs, openai)
        if not name.endswith("position_ids") and ".k_proj" not in name and ".v_proj" not in name:
            target[f"visual.{name}"] = tensor
    return target


@pytest.mark.parametrize("layout", ["openai", "CLIPVisionModel", "with prefix", "CLIPModel"])
def test_clip_is_transformers_clip(tmp_path, layout):
    """A file of any layout gives transformers' hidden_states[-2] and its [CLS] row."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        image_size=48, patch_size=8, hidden_act="quick_gelu", attn_implementation="eager")
    theirs = transformers.CLIPVisionModel(config).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    names = {name.removeprefix("vision_model."): v for name, v in theirs.state_dict().items()}
    prefixed = {f"vision_model.{name}": value for name, value in names.items()}
    more = {"text_model.norm.weight": torch.ones(9), "visual_projection.weight": torch.ones(9, 96)}
    torch.save({"openai": openai_names(names), "CLIPVisionModel": names, "with prefix": prefixed,
                "CLIPModel": {**more, **prefixed}}[layout], tmp_path / "clip.pt")
    ours = ClipEncoder(REAL["clip"], load_net(REAL["clip"], tmp_path / "clip.pt")).eval()
    expected = theirs(ours.view(images(2)), output_hidden_states=True, output_attentions=True)
    out = ours(images(2))
    hidden = torch.cat([out.cls[:, None], out.tokens], dim=1)
    close(hidden, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    cls_row = expected.attentions[-2][:, :, 0]
    close(out.cls_scores.softmax(-1), cls_row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["SamModel", "ConvNextModel", "ConvNextForImageClassification"])
def test_sam_and_convnext_are_transformers(tmp_path, kind):
    """A file of Hugging Face's SamModel or ConvNext gives its feature map."""
    transformers = pytest.importorskip("transformers")
    name = "sam" if kind == "SamModel" else "convnext"
    config = transformers.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 64, 128])
    if name == "sam":
        config = transformers.SamConfig(vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
            "output_channels": 24, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 128})
    theirs = getattr(transformers, kind)(config).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "net.bin")
    ours = VisionEncoder(REAL[name], load_net(REAL[name], tmp_path / "net.bin")).eval()
    net = theirs.vision_encoder if name == "sam" else getattr(theirs, "convnext", theirs)
    expected = net(ours.view(images(2))).last_hidden_state                      # (B, d_i, s, s)
    close(ours(images(2)).tokens, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_encoder_files_load_whole(tmp_path):
    """A file named like the timm model fills the encoder; tables of another size are resized."""
    saved, loaded = {}, {}
    for name in ("convnext", "eva"):
        saved[name] = random_file(name, tmp_path).eval()
        net = load_net(REAL[name], find_weights(REAL[name], str(tmp_path)))
        loaded[name] = VisionEncoder(REAL[name], net).eval()
    features = saved["convnext"].forward_features(loaded["convnext"].view(images(2)))
    close(loaded["convnext"](images(2)).tokens, features.flatten(2).transpose(1, 2))
    before, after = saved["eva"].pos_embed, loaded["eva"].net.pos_embed
    assert before.shape != after.shape
    close(after[:, 0], before[:, 0])  # [CLS] has no place to be resized


def test_a_file_that_does_not_fit_is_one_line(tmp_path):
    """What timm would only warn of, a file that fits nowhere, is an error with the file's name."""
    fault = "does not fit vit_base_patch16_clip_quickgelu_224 of timm; its first tensor is 'text'"
    save_file({"text": torch.ones(96)}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=f"bad.safetensors: {fault}: .*; save model.safetensors"):
        load_net(REAL["clip"], tmp_path / "bad.safetensors")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "bad.pt")
    with pytest.raises(InputError, match="bad.pt: not readable: a TorchScript archive"):
        load_net(REAL["clip"], tmp_path / "bad.pt")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.pth: not readable"):
        load_net(REAL["clip"], tmp_path / "bad.pth")
    with pytest.raises(InputError, match=f"{tmp_path}: has no samvit_base_patch16.sa1b.safetens"):
        find_weights(REAL["sam"], str(tmp_path))


def test_whatever_the_hub_does_is_one_line(monkeypatch):
    """Without a hub: which file to put where. A proxy's error is of a class that differs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fault = ("save model.safetensors of https://huggingface.co/timm/convnext_atto.d2_in1k as "
             "convnext_atto.d2_in1k.safetensors")
    with pytest.raises(InputError, match=fault):
        load_net(REAL["convnext"], find_weights(REAL["convnext"], ""))

    def fail(*_, **__):
        raise type("ProxyError", (Exception,), {})("407 Proxy Authentication Required")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(InputError, match="gives no weights .407 Proxy Authentication Required.;"):
        load_net(REAL["convnext"], HUB)


@pytest.mark.parametrize("ending", ["pth", "pt", "bin"])
def test_a_crafted_encoder_file_runs_nothing(tmp_path, monkeypatch, ending):
    """Whatever version of timm reads it: before 1.0.31 it unpickled anything unless told not to."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"crafted.{ending}"
    torch.save({"cls_token": torch.ones(1, 1, 96), "more": RunsCode()}, file)
    with pytest.raises(InputError, match="crafted.* not readable as weights"):
        load_net(REAL["clip"], file)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ENCODERS)
def test_presets_name_real_models(name):
    """timm has weights of each encoder, quick-GELU's of CLIP, and wants bicubic views for all."""
    for c in (TINY, SMALL, FULL):
        spec = getattr(c, name)
        with torch.device("meta"):
            config = timm.data.resolve_model_data_config(create_net(spec))
        assert config["interpolation"] == "bicubic"
        if c is not TINY:
            model, _, _ = parse_spec(spec)
            hub_id = timm.get_pretrained_cfg(model).hf_hub_id
            assert is_real(spec)
            assert hub_id == "timm/" + model.replace("quickgelu_", "")
            assert ("quickgelu" in model) == (name == "clip")


def test_pretrained_llm_is_transformers_own(llama_folder):
    """A causal LM from a folder gives transformers' logits, loss and answers, padded or not."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama_folder).eval()
    ids = torch.randint(5, 40, (2, 6))
    mask = torch.ones_like(ids)
    vlm = VLM(Student(C.clip), PretrainedLLM(str(llama_folder)), image_token=-200).eval()
    logits = vlm(None, ids, mask)
    close(logits, theirs(ids).logits)
    close(text_loss(logits, next_tokens(ids)), theirs(ids, labels=ids).loss)
    left_ids, left_mask = F.pad(ids, (2, 0)), F.pad(mask, (2, 0))
    close(vlm(None, left_ids, left_mask)[:, 2:], logits, atol=1e-5, rtol=1e-5)
    right = vlm(None, F.pad(ids, (0, 2)), F.pad(mask, (0, 2)))[:, :-2]
    close(right, logits, atol=1e-5, rtol=1e-5)
    unmasked = vlm(None, F.pad(ids, (0, 2)), None)[:, :-2]  # in training: not a bit is another
    assert torch.equal(unmasked, right)
    close(vlm(None, ids, None, torch.tensor([1, 4])), logits[:, [1, 4]])
    expected = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None,
                               pad_token_id=0)[:, 6:]
    given = vlm.generate(None, left_ids, left_mask, eos=-1, max_new_tokens=5)
    assert given.tolist() == expected.tolist()
    with pytest.raises(InputError, match="--llm nowhere/at-all: cannot be loaded"):
        PretrainedLLM("nowhere/at-all")


def test_tied_weights_are_stored_once(llama_folder, tmp_path):
    """They come back strictly: a name may be missing only if another of its parameter is there."""
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(llama_folder, tmp_path / "tied")
    config = transformers.AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    c, tokenizer = Config(out=str(tmp_path), llm=str(folder)), PretrainedTokenizer(str(folder))
    model = build_movekd(c, build_vlm(c, tokenizer, {}), build_teachers(c, {}))
    export(c, True, model, tokenizer)
    write_json(tmp_path / "config.json", dataclasses.asdict(c))
    tensors = read_tensors(tmp_path / "model.safetensors", "")
    assert model.state_dict().keys() - tensors.keys() == {"vlm.llm.model.lm_head.weight"}
    vlm = load_run(tmp_path)[0]
    close(vlm.state_dict(), model.vlm.state_dict(), rtol=0, atol=0)
    assert vlm.llm.model.lm_head.weight is vlm.llm.model.get_input_embeddings().weight
    del tensors["vlm.llm.model.model.embed_tokens.weight"]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(InputError, match="do not fit its config.json: Missing key"):
        load_run(tmp_path)


MLP = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp."


def released_ffn(tensors: dict, x: torch.Tensor) -> torch.Tensor:
    """Return the released formula for one token, on their tensors: quick-GELU, scale 1/4."""
    router = tensors[f"{MLP}router.weight"] @ x + tensors[f"{MLP}router.bias"]
    e = int(router.argmax())

    def linear(name, part, v):
        fc, lora = f"{MLP}original_module.{name}.", f"{MLP}{part}.{e}.lora_"
        low = tensors[lora + "A.weight"] @ v + tensors[lora + "A.bias"]
        change = tensors[lora + "B.weight"] @ low + tensors[lora + "B.bias"]
        return tensors[fc + "weight"] @ v + tensors[fc + "bias"] + change * 1 / 4

    hidden = linear("fc1", "moe_down", x)
    return linear("fc2", "moe_up", hidden * (1.702 * hidden).sigmoid())


def test_the_authors_checkpoint_loads(released_folder, llama_folder, tmp_path):
    """An FFN is the released formula, the logits transformers', the precision config.json's."""
    transformers = pytest.importorskip("transformers")
    tensors = load_file(released_folder / "model.safetensors")
    vlm, _, c = load_run(released_folder)
    assert (c.mole_form, c.mole_rank, c.mole_alpha, c.mole_experts) == ("fc1_fc2", 4, 1.0, 2)
    x = torch.randn(1, 3, 128)
    expected = torch.stack([released_ffn(tensors, token) for token in x[0]])
    close(vlm.student.net.blocks[1].mlp(x)[0], expected, atol=1e-3, rtol=1e-4)
    ids = torch.randint(5, 20, (1, 4))
    llama = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    close(vlm(None, ids, torch.ones_like(ids)), llama(ids).logits)
    config = {**read_json(released_folder / "config.json"), "torch_dtype": "bfloat16"}
    write_json(tmp_path / "config.json", config)
    (tmp_path / "model.safetensors").symlink_to(released_folder / "model.safetensors")
    llm = PretrainedLLM("", released_config(tmp_path)[1])
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}


@pytest.fixture
def released(released_folder, tmp_path) -> tuple[Path, dict, dict]:
    """A copy of the authors' checkpoint without its weights; its tensors, its config."""
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(released_folder, tmp_path, ignore=weights, dirs_exist_ok=True)
    tensors = load_file(released_folder / "model.safetensors")
    return tmp_path, tensors, read_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_authors_shards_load(released_folder, released, kind):
    """Several *.safetensors or pytorch_model*.bin; their encoder adapters in it are left alone."""
    folder, tensors, _ = released
    tensors["eva_adapter_1.weight"] = torch.zeros(2, 2)
    names = sorted(tensors)
    for i, own in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: tensors[name] for name in own}
        if kind == "bin":
            torch.save(shard, folder / f"pytorch_model-{i:05}-of-00002.bin")
        else:
            save_file(shard, folder / f"model-{i:05}-of-00002.safetensors")
    expected = load_run(released_folder)[0].state_dict()
    close(load_run(folder)[0].state_dict(), expected, rtol=0, atol=0)


def test_what_does_not_fit_is_named(released):
    """The authors' checkpoint is read strictly, both ways; so is what its config.json says."""
    folder, tensors, config = released
    last = "model.mm_projector.2.bias"
    for fault, changed in {
            "model.extra": {**tensors, "model.extra": torch.zeros(1)},
            "size mismatch for projector.2.bias": {**tensors, last: torch.zeros(1)},
            "Missing .*projector.2.bias": {k: v for k, v in tensors.items() if k != last}}.items():
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(InputError, match=fault):
            load_run(folder)
    moe = config["moe"]
    for fault, changed in {
            "moe_encoder_dense is true": {**moe, "moe_encoder_dense": True},
            "moe_encoder is false": {**moe, "moe_encoder": False},
            "moe_encoder_lora_rank": {k: v for k, v in moe.items() if "rank" not in k},
    }.items():
        write_json(folder / "config.json", {**config, "moe": changed})
        with pytest.raises(InputError, match=fault):
            load_run(folder)


@pytest.mark.parametrize("kind", [pytest.param("authors", marks=pytest.mark.slow), "ours"])
def test_training_starts_from_a_checkpoint(kind, released_folder, workplace):
    """--init-from: a run starts with the checkpoint's weights, and takes its shape and experts."""
    start = {"authors": released_folder, "ours": workplace / "runs/tiny"}[kind]
    run_here(workplace, *SHORT, "--out", f"runs/{kind}", "--init-from", str(start),
             "--cache-teachers", "", "--image-size", "64", "--stage1-lr", "0", "--stage2-lr", "0")
    before, _, theirs = load_run(start)
    after, _, c = load_run(workplace / "runs" / kind)
    for name in ("clip", "mole_form", "mole_experts", "mole_rank", "mole_alpha"):
        assert getattr(c, name) == getattr(theirs, name)
    close(after.state_dict(), before.state_dict(), rtol=0, atol=0)


OFFICIAL = {"vision_tower.": "model.vision_tower.vision_tower.vision_model.",
            "multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "multi_modal_projector.linear_2.": "model.mm_projector.2.", "language_model.": ""}


@pytest.fixture(scope="module")
def llava(llama_folder, tmp_path_factory):
    """transformers' Llava, random: in its own folder, the official one, and there without CLIP."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("llava")
    text = transformers.AutoConfig.from_pretrained(llama_folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
        image_size=48, patch_size=8)
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    for name in ("hf", "official", "no clip"):
        shutil.copytree(llama_folder, root / name, ignore=shutil.ignore_patterns("*.safetensors"))
        about = read_json(root / name / "config.json")
        write_json(root / name / "config.json", {**about, "model_type": "llava_llama"})
    theirs.save_pretrained(root / "hf")
    clip, llm = {}, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for name, tensor in load_file(root / "hf/model.safetensors").items():
        for hf, official in OFFICIAL.items():
            name = official + name.removeprefix(hf) if name.startswith(hf) else name
        (clip if "vision_tower" in name else llm)[name] = tensor
    save_file(clip, root / "official/a.safetensors")
    save_file(clip, root / "vit_base_patch16_clip_quickgelu_224.openai.safetensors")
    save_file(llm, root / "official/b.safetensors")
    save_file(llm, root / "no clip/b.safetensors")
    torch.save({k: v for k, v in llm.items() if "projector" in k}, root / "mm_projector.bin")
    return root, theirs


def assert_same_logits(vlm: VLM, theirs: nn.Module) -> tuple:
    """Assert that a VLM gives transformers' logits for an image and words; return the three."""
    token = theirs.config.image_token_index
    ids, pixels = torch.tensor([[1, *[token] * 36, 5, 9, 21, 8]]), vlm.student.view(images(1))
    expected = theirs(input_ids=ids, pixel_values=pixels).logits
    given = vlm(vlm.student(images(1)), ids.masked_fill(ids == token, vlm.image_token), None)
    close(given, expected, atol=1e-5, rtol=1e-5)
    return ids, pixels, expected


@pytest.mark.parametrize("layout", ["hf", *[pytest.param(name, marks=pytest.mark.slow)
                                            for name in ("official", "no clip")]])
def test_llava_is_transformers_llava(llava, layout, workplace):
    """Read to answer, evaluated, trained further with zero experts, and taken out again."""
    transformers = pytest.importorskip("transformers")
    root, theirs = llava
    world_on_disk(workplace / layout)
    data = str(workplace / layout / "train.json")
    clip = REAL["clip"].replace("=96 depth=4 num_heads=4", "=128 depth=3 num_heads=2")
    more = ["--clip", clip, "--weights", str(root)]
    if layout != "no clip":
        vlm, _, c = load_run(root / layout, "cpu")
        assert c.mole_experts == 0
        assert_same_logits(vlm, theirs)
        run_here(workplace, "--evaluate", str(root / layout), "--eval-data", data, "--device",
                 "cpu", "--out", f"runs/evaluated-{layout}")
        assert "macro_accuracy" in read_json(workplace / f"runs/evaluated-{layout}/evaluation.json")
        more = []
    run_here(workplace, *SHORT, *more, "--init-from", str(root / layout), "--init-projector",
             str(root / "mm_projector.bin"), "--data", data, "--eval-data", data, "--stage2-lr",
             "0", "--stage1-epochs", "0", "--cache-teachers", "", "--out", f"runs/{layout}")
    vlm, _, c = load_run(workplace / "runs" / layout, "cpu")
    assert c.mole_experts == 3
    ids, pixels, expected = assert_same_logits(vlm, theirs)
    # the round trip: as transformers' own again, with experts that are still zero
    out = workplace / "out" / layout
    write_out([str(workplace / "runs" / layout), str(out), "--to", "transformers"])
    back = transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    ids = ids.masked_fill(ids == theirs.config.image_token_index, back.config.image_token_id)
    given = back(input_ids=ids, pixel_values=pixels).logits[..., :expected.shape[-1]]
    close(given, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="mm_projector.bin: does not fit the projector: size"):
        load_projector(Projector(96, 32), root / "mm_projector.bin")
