"""The tiny LLM: Vicuna (a Llama) in miniature, and its tokenizer of whole words.

Parameter names are those of transformers' Llama, so weights can be exchanged.

Letters: B samples, T tokens (T_all with those in the cache), D width, h heads, V vocabulary.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

# Thai to Burmese, Khmer, kana, Han and Hangul, with their marks: a character of them is a word
SPACELESS = ("\u0e00-\u109f\u1780-\u17ff\u3001-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff01-\uffef"
             "\U00020000-\U0003ffff")
# any other letter or digit; an accent or a vowel sign counts as one
LETTER = rf"(?:[^\W{SPACELESS}]|[\u0300-\u036f\u064b-\u065f\u0900-\u0963\u0966-\u0dff])"


class WordTokenizer:
    """One token per word or punctuation mark, in lower case; the vocabulary is the data's words.

    The role names are one token each, so that the real prompt costs a tiny LLM nothing. Marks
    inside a number, a contraction or an abbreviation are part of it: 1,000 .5 10:30 don't U.S.
    """

    SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"]
    pad, unk, bos, eos, image = range(5)
    system = ""     # no instruction before the first question
    _pattern = re.compile("|".join(SPECIAL) + rf"|(?:[^\W\d_{SPACELESS}]\.){{2,}}"
                          rf"|(?:\.(?=\d))?{LETTER}+(?:(?:['\u2019]|(?<=\d)[.,:](?=\d)){LETTER}+)*"
                          rf"|[{SPACELESS}]|[^\w\s]")

    def __init__(self, vocabulary: list[str]):
        self.vocabulary = vocabulary
        self.ids = {word: i for i, word in enumerate(vocabulary)}

    @classmethod
    def from_texts(cls, texts: list[str]) -> "WordTokenizer":
        """Return a tokenizer whose vocabulary is the words of some texts, in alphabetical order."""
        words = set()
        for text in texts:
            words.update(cls.words(text))
        return cls(cls.SPECIAL + sorted(words - set(cls.SPECIAL)))

    @classmethod
    def from_records(cls, records: list[dict]) -> "WordTokenizer":
        """Return a tokenizer of the words of LLaVA-format records."""
        texts = []
        for record in records:
            for turn in record["conversations"]:
                text = turn["value"]
                if "image" in record:
                    text = text.replace("<image>", "")
                texts.append(cls.plain(text))
        return cls.from_texts(texts)

    @classmethod
    def words(cls, text: str) -> list[str]:
        """Split a text into words and marks."""
        return [w if w in cls.SPECIAL else w.lower() for w in cls._pattern.findall(text)]

    @classmethod
    def plain(cls, text: str) -> str:
        """Return a text in which nothing reads as a control token: "</s>" becomes "</s >"."""
        for special in cls.SPECIAL:
            text = text.replace(special, f"{special[:-1]} {special[-1]}")
        return text

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, self.unk) for word in self.words(text)]

    encode_after_end = encode  # a word is the same token everywhere

    def decode(self, ids: list[int]) -> str:
        """Return the text up to the end-of-sentence token, with one space between words."""
        if self.eos in ids:
            ids = ids[:ids.index(self.eos)]
        text = " ".join(self.vocabulary[i] for i in ids)
        return re.sub(f"(?<=[{SPACELESS}]) (?=[{SPACELESS}])", "", text)


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count real tokens, whichever side the padding is on: (B, T) -> positions (B, T)"""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)                                  # (B, T)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + D/2h}) by position * theta_i: (B, h, T, D/h) -> the same"""
    a, b = x.chunk(2, dim=-1)                                                      # (B, h, T, D/2h)
    turned = torch.cat([-b, a], dim=-1)                                             # (B, h, T, D/h)
    return (x * cos + turned * sin).to(x.dtype)                                     # (B, h, T, D/h)


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding.  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, rotary: tuple, mask: torch.Tensor | None,
                cache: list | None) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, h, T, D/h)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, h, T, D/h)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, h, T, D/h)
        q = rotate(q, *rotary)                                                      # (B, h, T, D/h)
        k = rotate(k, *rotary)                                                      # (B, h, T, D/h)
        if cache is not None:
            if cache:  # keys and values of the tokens before these
                k = torch.cat([cache[0], k], dim=2)                             # (B, h, T_all, D/h)
                v = torch.cat([cache[1], v], dim=2)                             # (B, h, T_all, D/h)
            cache[:] = [k, v]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None)                  # (B, h, T, D/h)
        return self.o_proj(x.transpose(1, 2).flatten(2))                                 # (B, T, D)


class SwiGLU(nn.Module):
    """FFN(x) = W_down( SiLU(W_gate x) * W_up x ).  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))               # (B, T, D)


class DecoderLayer(nn.Module):
    """x + Attention(norm(x)), then x + SwiGLU(norm(x)).  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dim, eps=1e-6)
        self.self_attn = Attention(dim, heads)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, hidden)

    def forward(self, x: torch.Tensor, rotary: tuple, mask: torch.Tensor | None,
                cache: list | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)             # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))                            # (B, T, D)


class TinyLLM(nn.Module):
    """A small causal LM with the interface of real/pretrained_llm.py."""

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.dim = dim
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        # Llama's 0.02 is for width 4096; at this width look-up in context then comes late
        nn.init.normal_(self.embed_tokens.weight, std=0.3)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(ids)                                                    # (B, T, D)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def new_cache(self) -> list:
        return [[] for _ in self.layers]  # for the keys and values of each

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None,
                cache: list | None = None,
                logits_at: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits: inputs_embeds (B, T, D), attention_mask (B, T_all) -> (B, T, V)

        With a cache, empty before the prompt, the mask covers the past too. Padding may stand on
        either side. Without a mask all tokens are real. With logits_at (K,) the logits are those of
        these positions alone, (B, K, V).
        """
        mask = None
        T = inputs_embeds.shape[1]
        positions = torch.arange(T, device=inputs_embeds.device)[None]                      # (1, T)
        if attention_mask is not None:
            positions = token_positions(attention_mask)[:, -T:]                             # (B, T)
            mask = self.visible(attention_mask, T)                                # (B, 1, T, T_all)
        rotary = self.rotary(positions)                                         # 2 x (B, 1, T, D/h)
        x = inputs_embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, None if cache is None else cache[i])              # (B, T, D)
        if logits_at is not None:
            x = x[:, logits_at]                                                          # (B, K, D)
        return self.lm_head(self.norm(x))                                                # (B, K, V)

    def visible(self, attention_mask: torch.Tensor, T: int) -> torch.Tensor:
        """Return whether each of the last T tokens sees each: (B, T_all) -> (B, 1, T, T_all)"""
        T_all = attention_mask.shape[1]
        ones = torch.ones(T, T_all, dtype=torch.bool, device=attention_mask.device)     # (T, T_all)
        causal = ones.tril(T_all - T)                                                   # (T, T_all)
        mask = causal & attention_mask[:, None, None, :].bool()                   # (B, 1, T, T_all)
        # padding sees itself: no empty softmax
        itself = torch.eye(T_all, dtype=torch.bool, device=mask.device)[-T:]            # (T, T_all)
        return mask | itself                                                      # (B, 1, T, T_all)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of position * theta_i: (B, T) -> 2 x (B, 1, T, D/h)"""
        size = self.dim // self.layers[0].self_attn.heads
        even = torch.arange(0, size, 2, device=positions.device)                           # (D/2h,)
        # theta_i = 10000^(-2i / (D/h))
        theta = 10000.0 ** (-even / size)                                                  # (D/2h,)
        angle = positions[:, None, :, None] * theta                                # (B, 1, T, D/2h)
        angle = angle.repeat(1, 1, 1, 2)                                            # (B, 1, T, D/h)
        return angle.cos(), angle.sin()
