"""LLaVA's own functions beside ours: the same ids, the same labels, the same pixels.

    LLAVA_REPO=DIR LLAMA_TOKENIZER=DIR python -m pytest -m slow tests/test_llava.py

LLAVA_REPO is a clone of https://github.com/haotian-liu/LLaVA; LLAMA_TOKENIZER is explained in
tests/test_words.py. LLaVA's modules want the transformers of their day, so the functions are
taken out of their files; its tokenizer is sentencepiece itself.
"""

import ast
import copy
import dataclasses
import random
import shutil
import sys
import types
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from data import IGNORE, conversation_ids, square_views, stack_images
from plumbing.config import FULL
from real.pretrained_llm import PretrainedTokenizer
from teachers import VisionEncoder
from tests import test_words as words
from tests.common import conversation, noise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llava() -> types.SimpleNamespace:
    """LLaVA's functions of words and pixels, and its `conversation_lib`."""
    folder = words.folder_of("LLAVA_REPO") / "llava"
    talk = types.ModuleType("conversation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "conversation", talk)  # its dataclass looks there
        exec((folder / "conversation.py").read_text(encoding="utf-8"), talk.__dict__)
    names = {"torch": torch, "copy": copy, "Image": Image, "conversation_lib": talk,
             "IS_TOKENIZER_GREATER_THAN_0_14": True}  # as of the 0.15.1 that LLaVA wants
    exec((folder / "constants.py").read_text(encoding="utf-8"), names)
    for file in ("mm_utils.py", "train/train.py"):
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        for node in tree.body:
            node.returns = None  # hints name what is not here
            for argument in node.args.args:
                argument.annotation = None
        exec(compile(tree, file, "exec"), names)
    return types.SimpleNamespace(**names)


@dataclasses.dataclass
class SentencePieceTokenizer:
    """The slow tokenizer of transformers' day, as far as LLaVA's functions use it."""

    read: Callable
    legacy: bool
    bos_token_id: int
    pad_token_id: int = 0  # LLaVA pads with <unk>
    model_max_length: int = FULL.max_length

    def __call__(self, text: str | list[str], **options) -> types.SimpleNamespace:
        if isinstance(text, list):  # one, padded to its own length
            return types.SimpleNamespace(input_ids=torch.tensor([self(text[0]).input_ids]))
        return types.SimpleNamespace(input_ids=[self.bos_token_id, *self.read(text)])


@pytest.fixture(scope="module", params=words.LEGACY)
def tokenizers(request, tmp_path_factory) -> tuple[PretrainedTokenizer, SentencePieceTokenizer]:
    """Ours and LLaVA's, of one tokenizer.model."""
    folder = words.folder_of("LLAMA_TOKENIZER")
    copied = shutil.copytree(folder, tmp_path_factory.mktemp("tokenizer") / "copied")
    ours = words.load(copied, request.param)
    read = words.reading_of_sentencepiece(folder / "tokenizer.model", request.param, ours.eos)
    return ours, SentencePieceTokenizer(read, request.param, ours.bos)


def llavas(llava, tokenizer, record: dict, template: str) -> tuple[list, list]:
    """Make ids and labels as LLaVA's dataset makes them."""
    llava.conversation_lib.default_conversation = llava.conversation_lib.conv_templates[template]
    sources = [copy.deepcopy(record["conversations"])]
    pictured = "image" in record
    if pictured:
        options = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        sources = llava.preprocess_multimodal(sources, options)
    result = llava.preprocess(sources, tokenizer, has_image=pictured)
    return result["input_ids"][0].tolist(), result["labels"][0].tolist()


def test_ids_and_labels_of_dialogues_are_llavas(llava, tokenizers, capsys):
    """Ids always, labels wherever LLaVA has any; what it gives up is learnt here."""
    ours, theirs = tokenizers
    compared = 0    # with n = 1 the image is one token, as LLaVA's -200 is
    for record in words.some_records(5000):
        ids, labels = conversation_ids(record, "v1", ours, n=1)
        expected_ids, expected = llavas(llava, theirs, record, "vicuna_v1")
        assert ids == expected_ids, record
        typed = any("ASSISTANT:" in turn["value"] for turn in record["conversations"])
        if not typed or set(expected) != {IGNORE}:
            assert labels == expected, record
            compared += 1
    assert compared > 2500
    capsys.readouterr()
    for question in ("who says ASSISTANT: and why?", ""):
        record = {"id": "0", "conversations": conversation(question, "a robot")}
        _, labels = conversation_ids(record, "v1", ours, n=1)
        assert set(llavas(llava, theirs, record, "vicuna_v1")[1]) == {IGNORE}
        assert "tokenization mismatch" in capsys.readouterr().out
        assert ours.decode([label for label in labels if label != IGNORE]) == "a robot"


def test_ids_and_labels_of_captions_are_llavas(llava, tokenizers):
    """With the image before the human's words, after them or alone, and spaces around a caption."""
    ours, theirs = tokenizers
    draw = random.Random(0)
    for i in range(1000):
        caption = " ".join(draw.choices(words.WORDS, k=draw.randint(1, 9)))
        human = ("<image>\nsay", "say\n<image>", "<image>")[i % 3]
        record = {"id": str(i), "image": "a.png", "conversations": conversation(human, caption)}
        expected = llavas(llava, theirs, record, "plain")
        assert conversation_ids(record, "plain", ours, 1, "newline") == expected, record


@pytest.mark.parametrize("form", [(640, 480), (480, 640), (336, 336), (500, 375), (1024, 768),
                                  (1023, 517), (335, 337), (100, 399), (37, 31), (7, 2),
                                  (1800, 90), (4000, 999)])
def test_pixels_are_llavas(llava, form):
    """At CLIP's 336 px they are those of `process_images` and transformers' CLIPImageProcessor."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    size = {"shortest_edge": 336}
    processor = clip.CLIPImageProcessorPil(size=size, crop_size={"height": 336, "width": 336})
    picture = noise(*form)
    pad = types.SimpleNamespace(image_aspect_ratio="pad")
    expected = llava.process_images([picture], processor, pad)                  # (1, 3, R_i, R_i)
    with torch.device("meta"):
        encoder = VisionEncoder(FULL.clip)
    ours = encoder.view(stack_images([square_views(picture, (336,))]))          # (1, 3, R_i, R_i)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
