"""Reading LLaVA-format JSON: every row is validated before anything is trained."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data import InputError
from plumbing.files import read_json
from real.image_files import DiskImages
from real.record_file import RecordFile, find_rows


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
    if not isinstance(record.get("type", ""), str):
        return 'has a "type" that is no text'
    if "image" not in record:
        return None  # an <image> in its text is a word
    if not isinstance(record["image"], str):
        return '"image" is not a file name'
    if any("<image>" in answer for answer in answers):
        return "has an <image> in an answer"
    places = sum(turn["value"].count("<image>") for turn in turns)
    if places != 1:
        return f'has {places} <image> token(s) but one "image" file'
    return None


def row_faults(records: Sequence, get_image: DiskImages | None) -> Iterator[tuple[int, str]]:
    """(row, what is wrong) of every bad row: its form and, with get_image, its image file."""
    def fault_of(record) -> str | None:
        fault = record_fault(record)
        if fault is None and get_image and "image" in record:
            try:
                get_image(record["image"])
            except InputError as e:
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


def read_list(path: Path) -> Sequence:
    """The rows of a LLaVA-format file, in `as_used`'s form. Raises InputError if it is none."""
    path = Path(path)
    places = find_rows(path) if path.is_file() else None
    if places is not None:
        return RecordFile(path, places, as_used)
    # what is no plain list of rows is read whole, if only to say what is wrong
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: must be a JSON list of records with at least one row")
    return [as_used(record) for record in records]


def as_used(record):
    """A row of a file as it is used; it may be anything.

    A dialogue that begins in the middle, with an answer, loses that answer, as in LLaVA. An "image"
    that is null or empty is none. Half a character (a lone surrogate) is read as U+FFFD.
    """
    match record:
        case {"conversations": [{"from": "gpt"}, _, *_]}:
            del record["conversations"][0]
    if not isinstance(record, dict):
        return record
    for key in ("image", "type"):
        if key in record and record[key] in (None, "", []):
            del record[key]
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            turn["value"] = whole_characters(turn["value"])
    return record


def select_rows(records: Sequence, rows: list[int]) -> Sequence:
    """Some rows of a set, which may be a list or lie in a file."""
    if isinstance(records, RecordFile):
        return records.select(rows)
    return [records[row] for row in rows]


def whole_characters(text: str) -> str:
    """A text with U+FFFD in the place of each lone surrogate, which no encoding has."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def place_of(row: int, record) -> str:
    """Where a record is, in words: a bad row may be anything, and have no id."""
    if isinstance(record, dict) and "id" in record:
        return f"row {row} (counted from 0, id {record['id']})"
    return f"row {row} (counted from 0)"


def read_records(path: Path, folder: Path, skip_bad: bool, get_image: DiskImages | None = None
                 ) -> Sequence[dict]:
    """The records of a LLaVA-format file, every row validated before anything is trained.

    With get_image their images are opened too. Raises InputError for the first bad row (rows count
    from 0), or with skip_bad leaves such rows out and says so on stderr.
    """
    records = read_list(path)
    bad = {}
    for row, fault in row_faults(records, get_image):
        place = place_of(row, records[row])
        if not skip_bad:
            raise InputError(f"{path}: {place} {fault}; "
                            f"`python -m tools.check_data {path} {folder}` lists every bad row")
        print(f"skipped: {path}: {place} {fault}", file=sys.stderr)
        bad[row] = fault
    if len(bad) == len(records):
        raise InputError(f"{path}: every row is bad, the first {bad[0]}")
    return select_rows(records, [row for row in range(len(records)) if row not in bad])
