"""A real LLM: any causal LM of transformers, and its tokenizer, in the tiny ones' places.

Letters: B samples, T tokens, D width, V vocabulary.
"""

import inspect
import json
from pathlib import Path

import torch
from torch import nn

from data import InputError
from real.encoder_weights import ask_hub
from tiny.llm import token_positions

SPACE = "\u2581"  # in the pieces of a sentencepiece model


def require_transformers():
    """Return the library, which only a real LLM needs. Raises InputError if it is missing."""
    try:
        import transformers
    except ImportError:
        raise InputError("a real LLM needs transformers, which is not installed: "
                         "pip install -r requirements-full.txt") from None
    ask_hub()
    return transformers


def llm_error(name: str, fault: str) -> InputError:
    """Return the error for an LLM that cannot be used."""
    return InputError(f"--llm {name}: {fault}; name a folder with config.json, *.safetensors, and "
                      "tokenizer.json or tokenizer.model (which needs sentencepiece and protobuf): "
                      f"the files of https://huggingface.co/{name}, if that is a name of the hub")


class PretrainedLLM(nn.Module):
    """A causal LM of transformers with the methods of tiny/llm.py's.

    `name` is a folder, or a name on the hub. With `config`, a transformers config, the model is
    built from it without weights; else it has its checkpoint's precision.
    """

    def __init__(self, name: str, config=None):
        super().__init__()
        causal = require_transformers().AutoModelForCausalLM
        try:
            if config is not None:
                self.model = causal.from_config(config, dtype=config.dtype)
            else:
                self.model = causal.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as e:
            raise llm_error(name, f"cannot be loaded ({type(e).__name__})") from None
        self.dim = self.model.config.hidden_size
        accepted = inspect.signature(self.model.forward).parameters  # 5.24 renamed one
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"

    @classmethod
    def without_weights(cls, folder: Path) -> "PretrainedLLM":
        """Build the model that folder/config.json describes."""
        return cls(str(folder), require_transformers().AutoConfig.from_pretrained(folder))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_decoder().layers

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(ids)                                    # (B, T, D)

    def new_cache(self):
        return require_transformers().DynamicCache()

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None,
                cache=None, logits_at: torch.Tensor | None = None) -> torch.Tensor:
        """inputs_embeds (B, T, D), attention_mask (B, T_all) -> logits (B, T, V)

        Without a mask, as in training, attention takes its fastest kernel. With logits_at (K,)
        the logits are those of these positions alone, (B, K, V).
        """
        positions = None  # those of the model: 0, 1, ...
        if attention_mask is not None:
            positions = token_positions(attention_mask)[:, -inputs_embeds.shape[1]:]        # (B, T)
        output = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                            position_ids=positions, use_cache=cache is not None,
                            logits_to_keep=0 if logits_at is None else logits_at,  # 0: all
                            **{self.cache_name: cache})
        return output.logits                                                             # (B, K, V)


def join_spaces_last(tokenizer) -> None:
    """Let a tokenizer made of Llama's tokenizer.model read runs of spaces as Llama does.

    There, and in the hub's tokenizer.json, they are joined last: a word takes the last space before
    it. transformers 5 orders the merges by the pieces' numbers, spaces first.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in state.get("merges", [])]
    if not merges or merges[0] != (SPACE, SPACE):
        return
    spaces = [merge for merge in merges if set("".join(merge)) == {SPACE}]
    words = [merge for merge in merges if set("".join(merge)) != {SPACE}]
    spaces.sort(key=lambda merge: (len(merge[0]), len(merge[1])), reverse=True)
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
        state["vocab"], words + spaces, fuse_unk=state["fuse_unk"], unk_token=state["unk_token"],
        byte_fallback=state["byte_fallback"])


class PretrainedTokenizer:
    """A real LLM's tokenizer with the methods of WordTokenizer.

    Vicuna's instruction comes before the first question.
    """

    image = -200  # no word: VLM.splice puts the image's tokens there
    plain = staticmethod(str)  # a text as it is: `encode` reads no control tokens in it
    system = ("A chat between a curious user and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the user's questions. ")

    def __init__(self, name: str):
        try:
            self.tokenizer = require_transformers().AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, ImportError) as e:
            fault = f"its tokenizer cannot be loaded ({type(e).__name__})"
            raise llm_error(name, fault) from None
        join_spaces_last(self.tokenizer)
        self.eos = self.tokenizer.eos_token_id
        bos = self.tokenizer.bos_token_id
        self.bos = self.eos if bos is None else bos
        self.pad = self.eos  # never seen: the attention mask hides it, its label is IGNORE
        # a sentencepiece model puts a space before a text, and after </s> again or not
        self.puts_space = "".join(self.tokenizer.tokenize("a")).startswith(SPACE)
        after_end = self.tokenizer(self.tokenizer.eos_token + "a", add_special_tokens=False)
        self.anew_after_end = after_end.input_ids[1:] == self.encode("a")
        text = "Hello world, is it \u00e9t\u00e9?\nYes, 20 of them."
        decoded = self.tokenizer.decode(self.encode(text))
        if decoded.strip() != text:
            raise InputError(f"--llm {name}: its tokenizer reads {text!r} as {decoded!r}; "
                             "transformers 5.0 to 5.2 garble a tokenizer.model: pip install "
                             "'transformers>=5.3'")

    def encode(self, text: str) -> list[int]:
        if self.puts_space and text.startswith(" "):
            text = f" {text}"  # transformers 5 puts none before a space, sentencepiece does
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def encode_after_end(self, text: str) -> list[int]:
        """Return the ids of a text that follows </s>."""
        if self.anew_after_end:
            return self.encode(text)
        # a line break is a token of its own, and after it, as after </s>, no space is put
        return self.encode(f"\n{text}")[len(self.encode("\n")):]

    def decode(self, ids: list[int]) -> str:
        """Return the text up to the end-of-sentence token."""
        if self.eos in ids:
            ids = ids[:ids.index(self.eos)]
        return self.tokenizer.decode(ids).strip()
