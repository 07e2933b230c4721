"""The tiny LLM, its tokenizer, the count of its FLOPs; and which real LLMs are refused."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data import InputError
from plumbing.files import flop_counter
from real.pretrained_llm import PretrainedTokenizer, check_llm
from tiny.llm import TinyLLM, WordTokenizer

close = torch.testing.assert_close


def test_tiny_llm_is_transformers_llama():
    """The tiny LLM with a transformers Llama's weights gives its logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=2, num_attention_heads=4, rms_norm_eps=1e-6)
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = theirs.state_dict()
    for value in state.values():
        nn.init.normal_(value, std=0.3)
    ours = TinyLLM(40, dim=32, depth=2, heads=4, hidden=48)
    ours.load_state_dict({name.removeprefix("model."): v for name, v in state.items()})
    ids, mask = torch.randint(40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    expected = theirs(ids, attention_mask=mask).logits
    close(ours(ours.embed(ids), mask), expected, atol=1e-4, rtol=1e-4)


def test_words_are_tokens():
    """One token per word or mark, lower case; role names are one each; decoding ends at </s>."""
    tokenizer = WordTokenizer.from_texts(["What shape?", "heart."])
    ids = tokenizer.encode("USER: <image> WHAT shape? ASSISTANT: heart of gold")
    words = [tokenizer.vocabulary[i] for i in ids]
    assert words == "USER: <image> what shape ? ASSISTANT: heart <unk> <unk>".split()
    assert tokenizer.decode(tokenizer.encode("Heart.") + [tokenizer.eos, 7]) == "heart ."


@pytest.mark.parametrize("text, count", [
    ("1,000 .5 3.5kg 10:30 don't it’s u.s. e.g.", 8), ("no .5 , t - 恤", 6),
    ("५ हिन्दी العَرَبِيَّة e\u0301t\u00e9", 4),
    ("红色的心，在草地上。", 10), ("ハートです", 5), ("빨간", 2), ("ครับ", 4), ("𠀀ｶﾞ", 3)])
def test_numbers_contractions_and_scripts_without_spaces(text, count):
    """A number, a contraction, an abbreviation is one word; of Han, kana, Thai each character."""
    tokenizer = WordTokenizer.from_texts([text])
    ids = tokenizer.encode(text)
    assert len(ids) == count and tokenizer.unk not in ids
    assert tokenizer.decode(ids) == text


def test_flop_counter_counts_attention_forward_and_backward():
    """Attention is 2 products of 2 B h n n d FLOPs forward, and 5 backward (one recomputed)."""
    q, k, v = (torch.randn(2, 4, 37, 24, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 4 * 37 * 37 * 24


def copy_of(llama_folder, tmp_path, kind="Llama", **changed):
    """Return a folder with Llama's tokenizer and the config of a small model; its weights are {}"""
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(llama_folder, tmp_path / "llm")
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, **changed})
    config.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return folder


REFUSED = {
    "rows": ("Llama", {"vocab_size": 60}, "its tokenizer has ids up to 494, its model 60 "),
    "rotary": ("Llama", {"max_position_embeddings": 64}, "its 64 positions .*--max-length 64$"),
    "table": ("GPT2", {"n_positions": 64}, "its 64 positions .*add --max-length 48$"),
    "no cache": ("Mamba", {}, "cannot be the LLM"), "no decoder": ("Bert", {}, "cannot be the LLM"),
    "no positions": ("Bloom", {}, "cannot be the LLM"), "T5": ("T5", {}, "cannot be loaded .Unrec"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_llm_that_cannot_run_is_refused(llama_folder, tmp_path, case):
    """By its config alone: embeddings, positions, and what its forward takes."""
    kind, changed, fault = REFUSED[case]
    folder = str(copy_of(llama_folder, tmp_path, kind, **changed))
    with pytest.raises(InputError, match=f"--llm {folder}: {fault}"):
        check_llm(folder, PretrainedTokenizer(str(llama_folder)), 100, 16)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma2", "OPT", "GPT2"])
def test_other_llms_are_not_refused(llama_folder, tmp_path, kind):
    """Blocks called `layers` or `h`, positions of both kinds."""
    folder = str(copy_of(llama_folder, tmp_path, kind, num_key_value_heads=2, head_dim=8))
    check_llm(folder, PretrainedTokenizer(str(llama_folder)), 100, 16)


@pytest.mark.parametrize("name, text, fault", [     # "": without the file
    ("config.json", "", "is no folder with a config.json"),
    ("config.json", '{"model_type": "xyz"}', "has model type `xyz`"),
    ("model.safetensors", "", "holds no .*safetensors and no pytorch_model"),
    ("model.safetensors", "version https://git-lfs", "is a git-lfs pointer"),
    ("tokenizer.json", "{", "its tokenizer cannot be loaded .Expecting"),
    ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}',
     "its tokenizer has no end token")])
def test_a_folder_that_holds_no_llm_says_why(llama_folder, tmp_path, name, text, fault):
    """The file and the reason in place of an error's class, and no link to the hub."""
    folder = copy_of(llama_folder, tmp_path)
    (folder / name).unlink()
    if text:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"--llm {folder}: .*{fault}") as error:
        check_llm(str(folder), PretrainedTokenizer(str(folder)), 100, 16)
    assert "huggingface.co" not in str(error.value)
