"""The tiny LLM, its tokenizer, and the count of its FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plumbing.files import flop_counter
from tiny.llm import TinyLLM, WordTokenizer

close = torch.testing.assert_close


def test_tiny_llm_is_transformers_llama():
    """The tiny LLM with a transformers Llama's weights gives its logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=2, num_attention_heads=4,
                                      rms_norm_eps=1e-6)
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = theirs.state_dict()
    for value in state.values():
        nn.init.normal_(value, std=0.3)
    ours = TinyLLM(40, dim=32, depth=2, heads=4, hidden=48)
    ours.load_state_dict({name.removeprefix("model."): v for name, v in state.items()})
    ids, mask = torch.randint(40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    expected = theirs(ids, attention_mask=mask).logits
    close(ours(ours.embed(ids), mask), expected, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing():
    """A sample's logits are the same alone, padded on the right and padded on the left."""
    llm = TinyLLM(40, dim=32, depth=2, heads=4, hidden=48)
    ids = torch.randint(7, 40, (1, 5))
    ones = torch.ones(1, 5, dtype=torch.long)
    alone = llm(llm.embed(ids), ones)
    for pad in ((0, 3), (3, 0)):
        mask = F.pad(ones, pad)
        padded = llm(llm.embed(F.pad(ids, pad)), mask)[mask.bool()]
        close(padded, alone[0], atol=1e-5, rtol=1e-5)


def test_padding_on_the_right_needs_no_mask():
    """No real token's logits change, not by a bit, if what stands behind it is not hidden."""
    llm = TinyLLM(40, dim=32, depth=2, heads=4, hidden=48)
    x = llm.embed(torch.randint(40, (3, 9)))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    assert torch.equal(llm(x, None)[mask.bool()], llm(x, mask)[mask.bool()])


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
