"""Reading LLaVA-format JSON: every row is validated before anything is trained."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data import DataError, load_image, read_json


def record_fault(record) -> str | None:
    """What is wrong with the form of one record, in words, or None. No file is opened here."""
    if not isinstance(record, dict):
        return "is not an object {id, image, conversations}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return 'has no "conversations" list'
    for i, turn in enumerate(turns):
        well_formed = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not well_formed or turn.get("from") not in ("human", "gpt"):
            return f'conversations[{i}] is not {{"from": "human" or "gpt", "value": text}}'
        if turn["from"] != ("human", "gpt")[i % 2]:
            return (f"conversations[{i}] is from {turn['from']}: human and gpt must take turns, "
                    "human first")
    answers = [turn["value"] for turn in turns[1::2]]
    if len(turns) % 2 or not all(answer.strip() for answer in answers):
        return "has a question without an answer"
    if any("<image>" in answer for answer in answers):
        return "has an <image> in an answer"
    images = sum(turn["value"].count("<image>") for turn in turns)
    if images != ("image" in record):
        files = "one" if "image" in record else "no"
        return f'has {images} <image> token(s) but {files} "image" file'
    if "image" in record and (not isinstance(record["image"], str) or not record["image"]):
        return '"image" is not a file name'
    return None


def row_faults(records: list, folder: Path | None) -> Iterator[tuple[int, str]]:
    """(row, what is wrong) of every bad row: its form and, with a folder, its image file."""
    def fault_of(record) -> str | None:
        fault = record_fault(record)
        if fault is None and folder and "image" in record:
            try:
                load_image(folder / record["image"], 16)
            except DataError as e:
                fault = f"has a bad image: {e}"
        return fault

    # threads help: the decoding of a picture leaves Python to others
    with ThreadPoolExecutor() as pool, tqdm(total=len(records), desc="check", leave=False) as bar:
        for start in range(0, len(records), 1000):
            faults = pool.map(fault_of, records[start:start + 1000])
            for row, fault in enumerate(faults, start):
                bar.update()
                if fault:
                    yield row, fault


def read_list(path: Path) -> list:
    """The rows of a LLaVA-format file.

    A dialogue that begins in the middle, with an answer, loses that answer, as in LLaVA.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: must be a JSON list of records with at least one row")
    for record in records:
        match record:
            case {"conversations": [{"from": "gpt"}, _, *_]}:
                del record["conversations"][0]
    return records


def read_records(path: Path, folder: Path, open_images: bool, skip_bad: bool) -> list[dict]:
    """The records of a LLaVA-format file, every row validated before anything is trained.

    Their images, relative to `folder`, are opened too if asked for. Raises DataError for the first
    bad row (rows count from 0), or with skip_bad leaves such rows out and says so on stderr.
    """
    records = read_list(path)
    bad = {}
    for row, fault in row_faults(records, folder if open_images else None):
        if not skip_bad:
            raise DataError(f"{path}: row {row} (counted from 0) {fault}; "
                            f"`python -m tools.check_data {path} {folder}` lists every bad row")
        print(f"skipped: {path}: row {row} (counted from 0) {fault}", file=sys.stderr)
        bad[row] = fault
    if len(bad) == len(records):
        raise DataError(f"{path}: every row is bad, the first {bad[0]}")
    return [record for row, record in enumerate(records) if row not in bad]
