"""tools.lmms_eval_adapter, without lmms-eval."""

import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from data import InputError
from tests.common import images
from tools import lmms_eval_adapter as adapter
from tools.lmms_eval_adapter import own_device

QUESTIONS = ["what shape?", "<image>\nwhat colour?", "what pattern?", "where?", "what shape?"]


class Request:
    """What lmms-eval hands over, as far as an adapter looks at it."""

    def __init__(self, question: str, options: dict, doc_to_visual, doc_id: int):
        self.args = (question, options, doc_to_visual, doc_id, "world", "test")


def image_of(doc: dict) -> list:
    return [doc["image"]]


@pytest.fixture
def model(workplace):
    model = adapter.MoVEKD(str(workplace / "runs/tiny"), batch_size=4, device="cpu")
    nn.init.normal_(model.vlm.llm.lm_head.weight)  # an LLM of four steps says nothing
    documents = [{"image": to_pil_image(image)} for image in images(5)]
    model.task_dict = {"world": {"test": documents}}
    return model


def test_answers_come_in_the_order_of_the_requests(model):
    """In batches they are those given one by one, with each request's own stops and lengths."""
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


def test_what_cannot_be_answered_does_not_end_the_others(model, capsys):
    """Several images, or a prompt that is too long: an empty answer, and a line that says why."""
    options = {"max_new_tokens": 3}
    fine = Request("what shape?", options, image_of, 1)
    several = Request("?", options, lambda doc: [doc["image"]] * 2, 0)
    long = Request("what " * 3000, options, image_of, 2)
    alone = model.generate_until([fine])
    assert model.generate_until([fine, several, long, fine]) == [*alone, "", "", *alone]
    first, second = [line for line in capsys.readouterr().err.splitlines() if "empty" in line]
    assert "empty answer: world: document 0: has 2 images" in first
    assert "document 2" in second and "more than --max-length 2048" in second


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"num_beams": 5}, {"do_sample": True}])
def test_sampling_and_beams_are_refused(model, options, capsys):
    """One line, exit status 2, before anything is answered; what means greedy is fine."""
    with pytest.raises(SystemExit, match="2"):
        model.generate_until([Request("what?", {**options}, image_of, 0)])
    line = capsys.readouterr().err
    assert line.startswith(f"error: world: {next(iter(options))} ")
    assert "--gen_kwargs temperature=0" in line
    greedy = {"temperature": 0.0, "num_beams": 1, "do_sample": False, "max_new_tokens": 2}
    assert len(model.generate_until([Request("what?", greedy, image_of, 0)])) == 1


def test_batch_size_and_device_are_looked_at_first(workplace, capsys):
    """--batch_size auto, and a --device that is not there or not known, are a line each."""
    for options, fault in (({"batch_size": "auto"}, "--batch_size auto: give a number"),
                           ({"device": "tpu"}, "--device tpu: must be cpu, cuda or cuda:N"),
                           ({"device": "cuda:99"}, "--device cuda:99: torch finds")):
        with pytest.raises(SystemExit, match="2"):
            adapter.MoVEKD(str(workplace / "runs/tiny"), **options)
        assert capsys.readouterr().err.startswith(f"error: {fault}")


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    """Its own number's; one process has the first, or the one that is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(None) == own_device("cuda") == torch.device("cuda", 0)
    assert own_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(None) == own_device("cuda") == torch.device("cuda", 1)
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="each process of torchrun wants a GPU of its own"):
        own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="torch finds 2 GPUs"):
        own_device(None)
