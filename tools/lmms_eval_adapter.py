"""Let lmms-eval, the harness of the field, evaluate a run folder.

lmms-eval wants an environment of its own; 0.7 or later, beside requirements-full.txt:

    pip install lmms-eval
    python -m tools.lmms_eval_adapter --model_args run=runs/full --tasks pope,gqa --batch_size 16
    torchrun --nproc-per-node 2 -m tools.lmms_eval_adapter --model_args run=runs/full --tasks pope

and any flag of lmms-eval; each process of torchrun has a GPU of its own and answers its part.
`run` is a run folder of train.py, or a checkpoint of the authors' layout. Answers are greedy, in
left-padded batches, one image per question: a document with several, or with a prompt longer than
--max-length of the run, gets an empty answer and a warning.
"""

import dataclasses
import functools
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError
from plumbing.cli import run
from plumbing.evaluate import answer
from plumbing.finished_run import load_run
from plumbing.sets import student_size
from real.image_files import as_seen, fit

try:
    from lmms_eval.api.model import lmms
except ImportError:  # the adapter's methods can be called without the harness
    lmms = object

GREEDY = {"temperature": 0, "num_beams": 1, "do_sample": False}  # options of a task


class MoVEKD(lmms):
    """lmms-eval's "simple" model: it gets the prompt as text and the images as PIL.

    What it refuses is one line and exit status 2, past lmms-eval, which would go on without it.
    """

    is_simple = True

    def __init__(self, run: str, batch_size: int | str = 1, device: str | None = None,
                 max_batch_size: int | None = None):
        super().__init__()
        self.task_dict = {}  # lmms-eval fills it: task -> split -> documents
        or_one_line(self.load, run, batch_size, device)

    def load(self, folder: str, batch_size: int | str, device: str | None) -> None:
        """Load the run on this process's device. Raises InputError."""
        if not str(batch_size).isdecimal() or int(batch_size) == 0:
            raise InputError(f"--batch_size {batch_size}: give a number, 16 for example")
        self.batch_size = int(batch_size)
        self.device = own_device(device)  # lmms-eval looks at it
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.vlm, self.tokenizer, self.c = load_run(Path(folder), self.device.type)

    def generate_until(self, requests: list) -> list[str]:
        """Return one answer per request, in their order.

        request.args = (context, generation arguments, doc_to_visual, doc_id, task, split)
        """
        or_one_line(refuse_sampling, requests)
        # requests of one length can share batches
        alike = defaultdict(list)
        for i, request in enumerate(requests):
            alike[request.args[1].get("max_new_tokens", 1024)].append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="documents") as bar:
            for max_new_tokens, rows in alike.items():
                for k in range(0, len(rows), self.batch_size):
                    batch = rows[k:k + self.batch_size]
                    given = self.answer_batch([requests[i] for i in batch], max_new_tokens)
                    for i, text in zip(batch, given, strict=True):
                        answers[i] = cut_at_stops(text, requests[i].args[1].get("until"))
                    bar.update(len(batch))
        return answers

    def answer_batch(self, requests: list, max_new_tokens: int) -> list[str]:
        """Return the answers to requests of one length, uncut. The pictures are freed after it.

        A request that cannot be answered gets an empty answer, and a warning with the reason.
        """
        c = dataclasses.replace(self.c, max_new_tokens=max_new_tokens, eval_batch=self.batch_size)
        pictures = {}
        records = []
        try:
            for i, request in enumerate(requests):
                picture = self.image_of(request.args)
                if picture is not None:
                    pictures[str(i)] = picture
                records.append(self.record(str(i), request.args[0], picture is not None))
            return answer(c, self.vlm, self.tokenizer, records,
                          lambda name: fit(pictures[name], student_size(c)))
        except InputError as e:
            if len(requests) == 1:
                _, _, _, doc_id, task, _ = requests[0].args
                print(f"empty answer: {task}: document {doc_id}: {e}", file=sys.stderr)
                return [""]
        return [self.answer_batch([request], max_new_tokens)[0] for request in requests]

    def image_of(self, args: tuple):
        """Return the request's image, or None. Raises InputError for several."""
        _, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        if len(visuals) > 1:
            raise InputError(f"has {len(visuals)} images; a question to this model has one at most")
        return as_seen(visuals[0]) if visuals else None

    @staticmethod
    def record(name: str, context: str, pictured: bool) -> dict:
        """Return a request as a LLaVA-format record."""
        question = context.replace("<image>", "").strip()
        if not pictured:
            return {"id": name, "conversations": [{"from": "human", "value": question}]}
        turn = {"from": "human", "value": f"<image>\n{question}"}
        return {"image": name, "id": name, "conversations": [turn]}

    def loglikelihood(self, requests: list):
        """Refuse: this model only generates text."""
        raise NotImplementedError("MoVE-KD answers in words: choose tasks of the kind "
                                  "generate_until")

    def generate_until_multi_round(self, requests: list):
        """Refuse: this model answers single questions."""
        raise NotImplementedError("MoVE-KD answers one round: choose tasks of the kind "
                                  "generate_until")


def or_one_line(function, *args) -> None:
    """Call a function; bad input ends the program with one line, as everywhere here."""
    run(functools.partial(function, *args))


def own_device(device: str | None) -> torch.device:
    """Return the device of this process: the one given, or under torchrun a GPU for each process.

    Raises InputError if it is not there.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = wanted.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise InputError(f"--device {device}: must be cpu, cuda or cuda:N")
    if index and several:
        raise InputError(f"--device {device}: each process of torchrun wants a GPU of its own; "
                         "give --device cuda")
    number = int(index or (os.environ["LOCAL_RANK"] if several else 0))
    if number >= torch.cuda.device_count():
        raise InputError(f"--device {wanted}: torch finds {torch.cuda.device_count()} GPUs, and "
                         f"this process wants number {number}, counted from 0")
    return torch.device("cuda", number)


def refuse_sampling(requests: list) -> None:
    """Raise InputError for a request that wants its answer drawn, or searched with beams."""
    for request in requests:
        options = request.args[1]
        for name, greedy in GREEDY.items():
            if options.get(name) not in (None, greedy):
                raise InputError(f"{request.args[4]}: {name} {options[name]}: answers of this "
                                 "model are greedy; to have them so, add --gen_kwargs "
                                 "temperature=0,num_beams=1,do_sample=False")


def cut_at_stops(text: str, until: str | list[str] | None) -> str:
    """Return a text up to the first of the stops that a request names."""
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def main() -> None:
    """Run lmms-eval's own command line with this model."""
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
