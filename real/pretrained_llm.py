"""A real LLM: any causal LM of transformers, and its tokenizer, in the tiny ones' places.

Letters: B samples, T tokens, D width, V vocabulary.
"""

import contextlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from data import InputError, common_length
from plumbing.files import library_errors
from real.encoder_weights import ask_hub, unreadable
from tiny.llm import token_positions

SPACE = "\u2581"  # in the pieces of a sentencepiece model
MARK, IMAGE_MARK = "\ue000", "\ue001"    # for private use: in no chat template
ROLES = {"human": "user", "gpt": "assistant"}


def require_transformers():
    """Return the library, which only a real LLM needs. Raises InputError if it is missing."""
    try:
        import transformers
    except ImportError:
        raise InputError("a real LLM needs transformers, which is not installed: "
                         "pip install -r requirements-full.txt") from None
    ask_hub()
    return transformers


def llm_error(name: str, fault: str) -> str:
    """Return the line for an LLM that cannot be loaded."""
    if not Path(name, "config.json").is_file() and (Path(name).exists() or name[0] in "./~"):
        fault = "is no folder with a config.json"
    hub = "" if Path(name).exists() else ", or a model of https://huggingface.co"
    return (f"--llm {name}: {fault}; name a folder with config.json, *.safetensors, and "
            f"tokenizer.json or tokenizer.model (which needs sentencepiece and protobuf){hub}")


class PretrainedLLM(nn.Module):
    """A causal LM of transformers with the methods of tiny/llm.py's.

    `name` is a folder, or a name on the hub. With `config`, a transformers config, the model is
    built from it without weights; else it has its checkpoint's precision.
    """

    def __init__(self, name: str, config=None):
        super().__init__()
        causal = require_transformers().AutoModelForCausalLM
        with library_errors(lambda e: llm_error(name, f"cannot be loaded ({e})")):
            if config is not None:
                self.model = causal.from_config(config, dtype=config.dtype)
            else:
                self.model = causal.from_pretrained(name, dtype="auto")
            self.dim = self.model.config.hidden_size
        self.accepted = list(inspect.signature(self.model.forward).parameters)
        self.cache_name = "cache" if "cache" in self.accepted else "past_key_values"  # before 5.24

    @classmethod
    def without_weights(cls, name: str, dtype=None) -> "PretrainedLLM":
        """Build the model that the config.json of a folder, or of a name on the hub, describes."""
        with library_errors(lambda e: llm_error(name, f"its config.json cannot be read ({e})")):
            config = require_transformers().AutoConfig.from_pretrained(name)
        config.dtype = dtype or config.dtype
        return cls(name, config)

    @property
    def blocks(self) -> nn.ModuleList:
        decoder = self.model.get_decoder()
        return decoder.layers if hasattr(decoder, "layers") else decoder.h  # GPT-2's name

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


def check_llm(name: str, tokenizer: "PretrainedTokenizer", max_length: int,
              max_new_tokens: int) -> None:
    """Raise InputError for an LLM that cannot be trained or answer, before its weights are read."""
    folder = Path(name)
    if folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        raise InputError(llm_error(name, "holds no *.safetensors and no pytorch_model*.bin"))
    for file in folder.glob("*.safetensors"):
        with (library_errors(lambda e, file=file: llm_error(name, unreadable(file, e))),
              safe_open(file, "pt")):
            pass    # the header shows whether the file is complete
    lacks = (f"--llm {name}: cannot be the LLM: it needs blocks, a cache of keys and values, and "
             "inputs_embeds, position_ids and logits_to_keep, as a Llama, Qwen or GPT-2 has")
    runs = True
    # fake tensors have shapes but no numbers
    with FakeTensorMode(), torch.no_grad(), library_errors(lambda _: lacks):
        llm = PretrainedLLM.without_weights(name, torch.bfloat16)
        ids = torch.zeros(1, 3, dtype=torch.long)
        mask, cache = torch.ones_like(ids), llm.new_cache()
        with contextlib.suppress(DataDependentOutputException):  # some model looks at the numbers
            logits = llm(llm.embed(ids), None, logits_at=torch.arange(2))
            llm(llm.embed(ids), mask, cache)
            token = llm(llm.embed(ids[:, :1]), F.pad(mask, (0, 1), value=1), cache)
            runs = logits.shape[:2] == (1, 2) and token.shape[:2] == (1, 1) and len(llm.blocks)
    if not runs or "position_ids" not in llm.accepted:
        raise InputError(lacks)
    largest, rows = tokenizer.largest_id(), llm.model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise InputError(f"--llm {name}: its tokenizer has ids up to {largest}, its model {rows} "
                         "embeddings: take both from one place, or save the model after "
                         f"resize_token_embeddings({largest + 1})")
    # rotary positions go on behind the last one that was trained, a table of them does not
    more = max_new_tokens if sum(isinstance(m, nn.Embedding) for m in llm.modules()) > 1 else 0
    positions = getattr(llm.model.config, "max_position_embeddings", None)
    if positions and max_length + more > positions:
        raise InputError(f"--llm {name}: its {positions} positions are fewer than --max-length "
                         f"{max_length} wants; add --max-length {max(1, positions - more)}")


def join_spaces_last(tokenizer) -> None:
    """Let a tokenizer made of Llama's tokenizer.model join runs of spaces last, as Llama does.

    A word takes the last space before it. transformers 5 puts the merges of spaces first.
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
    """A real LLM's tokenizer with the methods of WordTokenizer, and Vicuna's instruction."""

    image = -200  # no word: VLM.splice puts the image's tokens there
    plain = staticmethod(str)  # a text as it is: `encode` reads no control tokens in it
    system = ("A chat between a curious user and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the user's questions. ")

    def __init__(self, name: str, prompt: str = "v1"):
        with library_errors(lambda e: llm_error(name, f"its tokenizer cannot be loaded ({e})")):
            self.tokenizer = require_transformers().AutoTokenizer.from_pretrained(name)
            join_spaces_last(self.tokenizer)
        self.eos = self.tokenizer.eos_token_id
        if self.eos is None:
            raise InputError(f"--llm {name}: its tokenizer has no end token, with which an answer "
                             'ends; add "eos_token" to tokenizer_config.json')
        bos = self.tokenizer.bos_token_id
        self.bos = self.eos if bos is None else bos
        self.pad = self.eos  # never seen: the attention mask hides it, its label is IGNORE
        # a sentencepiece model puts a space before a text, and after </s> again or not
        self.puts_space = "".join(self.tokenizer.tokenize("a")).startswith(SPACE)
        after_end = self.tokenizer(self.tokenizer.eos_token + "a", add_special_tokens=False)
        self.anew_after_end = after_end.input_ids[1:] == self.encode("a")
        self.needed = {self.eos, self.bos}  # beside words
        text = "Hello world, is it \u00e9t\u00e9?\nYes, 20 of them."
        if self.tokenizer.decode(self.encode(text)).strip() != text:
            raise InputError(f"--llm {name}: its tokenizer garbles {text!r}; take all files of one "
                             "model, and transformers >= 5.3")
        if prompt == "chat":
            self.read_chat_template(name)

    def read_chat_template(self, name: str) -> None:
        """Take as eos what ends an answer in the chat template. Raises InputError."""
        if self.tokenizer.chat_template is None:
            raise InputError(f"--prompt chat: --llm {name} has no chat template; give --prompt v1")
        tokens = self.tokenizer.added_tokens_decoder
        self.control = {token.content: [i] for i, token in tokens.items() if token.special}
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        fault = f"--prompt chat: --llm {name}: its chat template cannot be used"
        with library_errors(lambda e: f"{fault} ({e}); give --prompt v1"):
            pieces = list(self.chat_pieces({"conversations": turns}, 0))
        learnt = [tokens for tokens, is_learnt in pieces if is_learnt]
        if not learnt:
            raise InputError(f"{fault}: no control token ends an answer; give --prompt v1")
        self.eos = learnt[0][-1]
        self.needed.update(*[tokens for tokens, _ in pieces])

    def chat_pieces(self, record: dict, n: int) -> Iterator[tuple[list, bool]]:
        """Yield a record in the LLM's chat template, in pieces: (tokens, whether they are learnt).

        The template gets marks in place of the texts, so that no text holds a control token. As in
        "v1", the text between two control tokens is tokenised as a whole.
        """
        messages, texts = [], {}
        for i, turn in enumerate(record["conversations"]):
            content = mark = f"{MARK}{i}{MARK}"
            texts[mark] = turn["value"].strip()
            # The image comes first, wherever the question has it.
            if "image" in record and turn["from"] == "human" and "<image>" in turn["value"]:
                texts[mark] = turn["value"].replace("<image>", "").strip()
                content = f"{IMAGE_MARK}\n{mark}" if texts[mark] else IMAGE_MARK
            messages.append({"role": ROLES[turn["from"]], "content": content})
        written = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user")

        control = {**self.control, IMAGE_MARK: [self.image] * n}
        encode = self.encode
        text, answer = "", None     # since the last control token; where an answer begins in it
        for piece in re.split("(" + "|".join(map(re.escape, [*control, *texts])) + ")", written):
            if piece in control:
                tokens = encode(text)
                start = len(tokens)
                if answer is not None:
                    start = common_length(tokens, encode(text[:answer]))
                yield tokens[:start], False
                yield tokens[start:] + control[piece], answer is not None
                text, answer, encode = "", None, self.encode_after_end
                continue
            if piece in texts and messages[int(piece.strip(MARK))]["role"] == "assistant":
                answer = len(text)
            text += texts.get(piece, piece)
        yield encode(text), False

    def largest_id(self) -> int:
        """Return the largest id of all that `encode`, or a prompt, can hold."""
        words = self.tokenizer.get_vocab().values()
        return max({*words} - {*self.tokenizer.all_special_ids} | self.needed)

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
