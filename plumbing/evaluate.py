"""Evaluation: exact match of the generated answers, per question type."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from data import Conversations, blank_image, collate, to_device
from model import VLM
from plumbing.config import Config
from tiny.llm import WordTokenizer

RARE = 10  # fewer questions than this are too few for a type of their own: they are "other"


def normalise(answer: str) -> str:
    """Return the form in which answers are compared: lower case, one space between words."""
    return " ".join(WordTokenizer.words(answer.lower()))


def questions_of(records: list[dict]) -> list[dict]:
    """Return one row per question: {record (cut after that question), question, answer, type}."""
    rows = []
    for record in records:
        turns = record["conversations"]
        for i in range(0, len(turns), 2):
            question = turns[i]["value"].replace("<image>", "").strip()
            rows.append({"record": {**record, "conversations": turns[:i + 1]},
                         "question": question, "answer": normalise(turns[i + 1]["value"]),
                         "type": record.get("type", question)})
    count = Counter(row["type"] for row in rows)
    for row in rows:
        if count[row["type"]] < RARE:
            row["type"] = "other"
    return rows


@torch.no_grad()
def answer(c: Config, vlm: VLM, tokenizer, records: list[dict], get_image: Callable) -> list[str]:
    """Return the VLM's answer to the last question of each record, by greedy decoding."""
    vlm.eval()
    n = vlm.student.num_tokens
    prompts = Conversations(records, get_image, tokenizer, "v1", n, c.max_length)
    answers = []
    for i in tqdm(range(0, len(prompts), c.eval_batch), desc="answer", leave=False):
        rows = range(i, min(i + c.eval_batch, len(prompts)))
        batch = collate([prompts.sample(row) for row in rows], tokenizer.pad, side="left")
        images = to_device(batch["images"], c.device)
        visual = None if images is None else vlm.student(images)            # (B_img, n, d)
        ids = vlm.generate(visual, batch["input_ids"].to(c.device),
                           batch["attention_mask"].to(c.device), tokenizer.eos,
                           c.max_new_tokens)                                # (B, new tokens)
        answers += [tokenizer.decode(row) for row in ids.tolist()]
    return answers


def accuracy_per_type(rows: list[dict], answers: list[str]) -> dict[str, float]:
    """Return exact match in %, per question type."""
    right = {}
    for row, given in zip(rows, answers, strict=True):
        right.setdefault(row["type"], []).append(normalise(given) == row["answer"])
    return {name: 100 * sum(hits) / len(hits) for name, hits in sorted(right.items())}


def evaluate(c: Config, vlm: VLM, tokenizer, records: list[dict], get_image: Callable) -> tuple:
    """Return held-out accuracy per type beside its baselines, in %; the questions; the answers."""
    rows = questions_of(records)
    questions = [row["record"] for row in rows]
    answers = answer(c, vlm, tokenizer, questions, get_image)
    # without a picture to tell them apart, equal questions have equal answers: ask each once
    different = {str(record["conversations"]): record for record in questions}
    blank = blank_image(c.image_size)
    given = answer(c, vlm, tokenizer, list(different.values()), lambda name: blank)
    blank_answer = dict(zip(different, given, strict=True))
    blank_answers = [blank_answer[str(record["conversations"])] for record in questions]
    accuracy = accuracy_per_type(rows, answers)
    truth = {name: Counter() for name in accuracy}
    for row in rows:
        truth[row["type"]][row["answer"]] += 1
    result = {
        "macro_accuracy": sum(accuracy.values()) / len(accuracy),
        "accuracy": accuracy,
        "blank_accuracy": accuracy_per_type(rows, blank_answers),
        # always the commonest answer of the type; and one over the number of its answers
        "majority_accuracy": {k: 100 * max(t.values()) / t.total() for k, t in truth.items()},
        "chance_accuracy": {k: 100 / len(t) for k, t in truth.items()},
    }
    return result, rows, answers


def print_accuracy(result: dict) -> None:
    """Print the accuracies as a table."""
    print(f"\nheld-out accuracy, %{'':9} model   blank image   majority   chance")
    columns = [result[f"{name}accuracy"] for name in ("", "blank_", "majority_", "chance_")]
    for name in result["accuracy"]:
        model, blank, majority, chance = (column[name] for column in columns)
        print(f"  {name[:26]:26} {model:7.1f} {blank:13.1f} {majority:10.1f} {chance:8.1f}")
    print(f"  {'macro':26} {result['macro_accuracy']:7.1f}\n")


def print_result(result: dict, out: Path, words: str = "") -> None:
    """Print a table and words for the reader, then a line for programs: `result: ` and JSON."""
    if "accuracy" in result:
        print_accuracy(result)
    print(f"{result['seconds']} s, {result['seconds_stage0']} s of them stage 0; "
          f"{result['tflops']} TFLOPs in the two stages, {result['tflops_stage0']} in stage 0; "
          f"peak {result['peak_rss_mb']} MB; everything is in {out}/\n{words}")
    print("result: " + json.dumps(result))
