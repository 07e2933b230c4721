"""Lets lmms-eval, the harness of the field, evaluate a run folder.  lmms-eval wants an environment of its own:

    pip install lmms-eval                                                               # 0.7 or later, beside requirements-full.txt
    python -m tools.lmms_eval_adapter --model_args run=runs/full --tasks pope,gqa --batch_size 16       # and any flag of lmms-eval

`run` is a run folder of train.py, or a checkpoint of the authors' layout. Answers are greedy, in left-padded batches, one image a question.
"""

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import train
from data import InputError, run, square_image

try:
    from lmms_eval.api.model import lmms
except ImportError:  # the adapter's methods can be called without the harness
    lmms = object


class MoVEKD(lmms):
    """lmms-eval's "simple" model: it gets the prompt as text and the images as PIL. Raises InputError for several images in one question."""

    is_simple = True

    def __init__(self, run: str, batch_size: int | str = 1, device: str | None = None, max_batch_size: int | None = None):
        super().__init__()
        self.task_dict = {}  # lmms-eval fills it: task -> split -> documents
        self.vlm, self.tokenizer, self.c = train.load_run(Path(run), "cpu" if device == "cpu" else "auto")
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list) -> list[str]:
        """One answer a request, in their order; request.args = (context, generation arguments, doc_to_visual, doc_id, task, split)."""
        alike, answers = defaultdict(list), [""] * len(requests)
        for i, request in enumerate(requests):
            alike[request.args[1].get("max_new_tokens", 1024)].append(i)
        for max_new_tokens, rows in alike.items():
            pictures = {str(i): self.image_of(requests[i].args) for i in rows}
            records = [self.record(str(i), requests[i].args[0], pictures[str(i)] is not None) for i in rows]
            c = dataclasses.replace(self.c, max_new_tokens=max_new_tokens, eval_batch=self.batch_size)
            given = train.answer(c, self.vlm, self.tokenizer, records, lambda name: square_image(pictures[name], c.image_size))
            for i, text in zip(rows, given):
                until = requests[i].args[1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                answers[i] = text.strip()
        return answers

    def image_of(self, args: tuple):
        _, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        if len(visuals) > 1:
            raise InputError(f"{task}: document {doc_id} has {len(visuals)} images; a question to this model has one at most")
        return visuals[0].convert("RGB") if visuals else None

    @staticmethod
    def record(name: str, context: str, pictured: bool) -> dict:
        question = context.replace("<image>", "").strip()
        turn = {"from": "human", "value": "<image>\n" * pictured + question}
        return ({"image": name} if pictured else {}) | {"id": name, "conversations": [turn]}

    def loglikelihood(self, requests: list):
        raise NotImplementedError("MoVE-KD answers in words: choose tasks of the kind generate_until")

    def generate_until_multi_round(self, requests: list):
        raise NotImplementedError("MoVE-KD answers one round: choose tasks of the kind generate_until")


def main() -> None:
    if lmms is object:
        raise InputError("lmms-eval is not installed: pip install lmms-eval")
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("movekd", simple_class_path="tools.lmms_eval_adapter.MoVEKD"))
    sys.argv[1:1] = ["--model", "movekd"]
    cli_evaluate()


if __name__ == "__main__":
    run(main)
