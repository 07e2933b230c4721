"""Evaluation: the VQA evaluation's accuracy of the generated answers, per question type."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from data import Conversations, blank_image, collate, row_name, to_device
from model import VLM
from plumbing.config import Config
from plumbing.files import replacing
from tiny.llm import WordTokenizer

RARE = 10  # fewer questions than this are too few for a type of their own: they are "other"

# as the VQA evaluation: github.com/GT-Vision-Lab/VQA, PythonEvaluationTools, vqaEval.py
MARKS = ";/[]\"{}()=+\\_-><@`,?!" + "、。・「」『』【】《》〈〉“”«»–—"    # and other scripts'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
           "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def normalise(answer: str) -> str:
    """Return the form in which answers are compared: the VQA evaluation's, in whatever script.

    Marks and articles go, unless nothing else is there: "A." is "A", but not "the" or "".
    """
    bare = text = " ".join(unicodedata.normalize("NFKC", answer).lower().split())
    for mark in MARKS:
        # as there, one place decides for the whole text: "1,000", or a mark beside a space
        goes = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        bare = bare.replace(mark, "" if goes else " ")
    bare = re.sub(r"\.(?!\d)|['‘’]", "", bare)     # no apostrophes: "dont" is "don't"
    # the words of a text, joined as the tiny LLM would: "50%" is "50 %"
    words = [NUMBERS.get(word, word) for word in WordTokenizer.words(bare)]
    content = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(content or words or WordTokenizer.words(text))


def questions_of(records: list[dict]) -> list[dict]:
    """Return one row per question: {record (cut after that question), name, question, type,

    answers: the texts of the record's "answers", or its one answer; references: normalised}.
    """
    rows = []
    for number, record in enumerate(records):
        turns = record["conversations"]
        for i in range(0, len(turns), 2):
            question = turns[i]["value"].replace("<image>", "").strip()
            answers = record.get("answers") or [turns[i + 1]["value"]]
            rows.append({"record": {**record, "conversations": turns[:i + 1]},
                         "name": row_name(number, record), "question": question,
                         "type": record.get("type", question), "answers": answers,
                         "references": [normalise(text) for text in answers]})
    count = Counter(row["type"] for row in rows)
    for row in rows:
        if count[row["type"]] < RARE:
            row["type"] = "other"
    return rows


def score(row: dict, given: str) -> float:
    """Return how right an answer is, from 0 to 1: as in VQA, three equal texts suffice."""
    same, count = row["references"].count(normalise(given)), len(row["references"])
    # of fewer than three texts, or than ten that all differ, each alone makes it right
    alternatives = count < 3 or count == len(set(row["answers"])) < 10
    return min(same / (1 if alternatives else 3), 1.0)


@torch.no_grad()
def answer(c: Config, vlm: VLM, tokenizer, records: list[dict], get_image: Callable) -> list[str]:
    """Return the VLM's answer to the last question of each record, by greedy decoding."""
    vlm.eval()
    n = vlm.student.num_tokens
    prompts = Conversations(records, get_image, tokenizer, c.prompt, n, c.max_length)
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
    """Return the mean score in %, per question type."""
    scores = {}
    for row, given in zip(rows, answers, strict=True):
        scores.setdefault(row["type"], []).append(score(row, given))
    return {name: 100 * sum(hits) / len(hits) for name, hits in sorted(scores.items())}


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
        commonest, _ = Counter(row["references"]).most_common(1)[0]
        truth[row["type"]][commonest] += 1
    result = {
        "macro_accuracy": sum(accuracy.values()) / len(accuracy),
        "accuracy": accuracy,
        "blank_accuracy": accuracy_per_type(rows, blank_answers),
        # always the commonest answer of the type; and one over the number of its answers
        "majority_accuracy": {k: 100 * max(t.values()) / t.total() for k, t in truth.items()},
        "chance_accuracy": {k: 100 / len(t) for k, t in truth.items()},
    }
    return result, rows, answers


def write_predictions(path: Path, rows: list[dict], answers: list[str]) -> None:
    """Write a JSON object for each question, with the right answers, the given one, its score."""
    lines = []
    for row, given in zip(rows, answers, strict=True):
        about = {key: row[key] for key in ("type", "question", "answers")}
        lines.append(json.dumps({"id": row["record"].get("id"), **about, "prediction": given,
                                 "correct": score(row, given)}, ensure_ascii=False) + "\n")
    with replacing(path) as temporary:      # an id may hold half a character
        temporary.write_text("".join(lines), encoding="utf-8", errors="replace")


def print_accuracy(result: dict) -> None:
    """Print the accuracies as a table."""
    print(f"\nheld-out accuracy, %{'':9} model   blank image   majority   chance")
    columns = [result[f"{name}accuracy"] for name in ("", "blank_", "majority_", "chance_")]
    for name in result["accuracy"]:
        model, blank, majority, chance = (column[name] for column in columns)
        print(f"  {name[:26]:26} {model:7.1f} {blank:13.1f} {majority:10.1f} {chance:8.1f}")
    print(f"  {'macro':26} {result['macro_accuracy']:7.1f}\n")


def print_result(result: dict, out: Path, references: list[tuple], words: str) -> None:
    """Print a table and words for the reader, then a line for programs: `result: ` and JSON."""
    if "accuracy" in result:
        print_accuracy(result)
    for name, mean, width, seeds in references:
        print(f"  reference: {name:15} {mean} ± {width} ({seeds} seeds)")
    print(f"{result['seconds']} s; {result['tflops']} TFLOPs of training; peak "
          f"{result['peak_rss_mb']} MB; everything is in {out}/\n{words}")
    print("result: " + json.dumps(result))
