"""Lets lmms-eval, the harness of the field, evaluate a run folder.

lmms-eval wants an environment of its own; 0.7 or later, beside requirements-full.txt:

    pip install lmms-eval
    python -m tools.lmms_eval_adapter --model_args run=runs/full --tasks pope,gqa --batch_size 16

and any flag of lmms-eval. `run` is a run folder of train.py, or a checkpoint of the authors'
layout. Answers are greedy, in left-padded batches, one image a question.
"""

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

from data import square_image
from plumbing.cli import InputError, run
from plumbing.evaluate import answer
from plumbing.image_files import as_seen
from plumbing.run_folder import load_run

try:
    from lmms_eval.api.model import lmms
except ImportError:  # the adapter's methods can be called without the harness
    lmms = object


class MoVEKD(lmms):
    """lmms-eval's "simple" model: it gets the prompt as text and the images as PIL.

    Raises InputError for several images in one question.
    """

    is_simple = True

    def __init__(self, run: str, batch_size: int | str = 1, device: str | None = None,
                 max_batch_size: int | None = None):
        super().__init__()
        self.task_dict = {}  # lmms-eval fills it: task -> split -> documents
        place = "cpu" if device == "cpu" else "auto"
        self.vlm, self.tokenizer, self.c = load_run(Path(run), place)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list) -> list[str]:
        """One answer a request, in their order.

        request.args = (context, generation arguments, doc_to_visual, doc_id, task, split)
        """
        # requests of one length can share batches
        alike = defaultdict(list)
        for i, request in enumerate(requests):
            alike[request.args[1].get("max_new_tokens", 1024)].append(i)
        answers = [""] * len(requests)
        for max_new_tokens, rows in alike.items():
            given = self.answer_alike([requests[i] for i in rows], max_new_tokens)
            for i, text in zip(rows, given):
                answers[i] = cut_at_stops(text, requests[i].args[1].get("until"))
        return answers

    def answer_alike(self, requests: list, max_new_tokens: int) -> list[str]:
        """The answers to requests of one length, uncut."""
        pictures = {}
        records = []
        for i, request in enumerate(requests):
            pictures[str(i)] = self.image_of(request.args)
            records.append(self.record(str(i), request.args[0], pictures[str(i)] is not None))
        c = dataclasses.replace(self.c, max_new_tokens=max_new_tokens, eval_batch=self.batch_size)
        return answer(c, self.vlm, self.tokenizer, records,
                      lambda name: square_image(pictures[name], c.image_size))

    def image_of(self, args: tuple):
        """The request's image, or None. Raises InputError for several."""
        _, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        if len(visuals) > 1:
            raise InputError(f"{task}: document {doc_id} has {len(visuals)} images; a question to "
                             "this model has one at most")
        return as_seen(visuals[0]) if visuals else None

    @staticmethod
    def record(name: str, context: str, pictured: bool) -> dict:
        """A request as a LLaVA-format record."""
        question = context.replace("<image>", "").strip()
        if not pictured:
            return {"id": name, "conversations": [{"from": "human", "value": question}]}
        turn = {"from": "human", "value": f"<image>\n{question}"}
        return {"image": name, "id": name, "conversations": [turn]}

    def loglikelihood(self, requests: list):
        """Not for this model."""
        raise NotImplementedError("MoVE-KD answers in words: choose tasks of the kind "
                                  "generate_until")

    def generate_until_multi_round(self, requests: list):
        """Not for this model."""
        raise NotImplementedError("MoVE-KD answers one round: choose tasks of the kind "
                                  "generate_until")


def cut_at_stops(text: str, until: str | list[str] | None) -> str:
    """A text up to the first of the stops that a request names."""
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def main() -> None:
    """lmms-eval's own command line, with this model."""
    if lmms is object:
        raise InputError("lmms-eval is not installed: pip install lmms-eval")
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    here = "tools.lmms_eval_adapter.MoVEKD"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("movekd", simple_class_path=here))
    sys.argv[1:1] = ["--model", "movekd"]
    cli_evaluate()


if __name__ == "__main__":
    run(main)
