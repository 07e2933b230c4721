"""tools.lmms_eval_adapter, without lmms-eval."""

import pytest
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from plumbing.cli import InputError
from tests_common import images
from tools.lmms_eval_adapter import MoVEKD

QUESTIONS = ["what shape?", "<image>\nwhat colour?", "what pattern?", "where?", "what shape?"]


class Request:
    """What lmms-eval hands over, as far as an adapter looks at it."""

    def __init__(self, question: str, options: dict, doc_to_visual, doc_id: int):
        self.args = (question, options, doc_to_visual, doc_id, "world", "test")


def image_of(doc: dict) -> list:
    return [doc["image"]]


@pytest.fixture
def model(workplace):
    model = MoVEKD(str(workplace / "runs/tiny"), batch_size=4, device="cpu")
    nn.init.normal_(model.vlm.llm.lm_head.weight)  # an LLM of four steps says nothing
    documents = [{"image": to_pil_image(image)} for image in images(5)]
    model.task_dict = {"world": {"test": documents}}
    return model


def test_lmms_eval_adapter_answers_plain_requests(model):
    """Answers come in the order of the requests, in batches, with and without image.

    They are those given one by one; stops and lengths are those asked for.
    """
    requests = []
    for i, question in enumerate(QUESTIONS):
        options = {"max_new_tokens": 3 + i % 2, "until": ["\n\n"]}
        requests.append(Request(question, options, image_of, i))
    requests.append(Request("what colour?", {"max_new_tokens": 3}, lambda doc: [], 0))
    answers = model.generate_until(requests)
    model.batch_size = 1
    assert answers == [model.generate_until([request])[0] for request in requests]
    assert any(answers)
    requests[0].args[1]["until"] = [answers[0].split()[0]]
    assert model.generate_until(requests[:1]) == [""]


def test_several_images_are_refused(model):
    """A question to this model has one image at most."""
    request = Request("?", {}, lambda doc: [doc["image"]] * 2, 0)
    with pytest.raises(InputError, match="document 0 has 2 images"):
        model.generate_until([request])
