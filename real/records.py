"""LLaVA-format JSON files: their rows, read when they are used, and all checked before training."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import InputError, row_name
from plumbing.files import read_json
from real.image_files import DiskImages

DECODER = json.JSONDecoder()
SPACE = r"[ \t\n\r]*"
OPENING = re.compile(rf"(?:\xef\xbb\xbf)?{SPACE}(\[?){SPACE}")  # byte order mark, [
# what stands between two rows and after the last: of a JSON array, of JSON Lines
ARRAY = re.compile(rf"{SPACE},{SPACE}"), re.compile(rf"{SPACE}\]{SPACE}")
LINES = re.compile(rf"[ \t\r]*\n{SPACE}(?=[^ \t\n\r])"), re.compile(SPACE)
# keys that are read, or that LLaVA has; others, or their values, that look like a medium or answers
KNOWN = ("id", "image", "conversations", "type", "model")
TELLING = re.compile("image|img|picture|photo|frame|video|audio|answer", re.IGNORECASE)
MEDIUM = re.compile(r"\.(png|jpe?g|gif|bmp|webp|tiff?|mp4|avi|mov|mkv)\W*$", re.IGNORECASE)


@dataclass(eq=False)
class RecordFile(Sequence):
    """The rows of a file, each read when it is used: all of them would fill five times its size."""

    path: Path
    spans: np.ndarray  # (N, 2): the byte at which each row begins, and the one after its last

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int | slice):
        if isinstance(row, slice):
            return self.select(row)
        return next(iter(self.select([row])))

    def __iter__(self) -> Iterator:
        with open(self.path, "rb") as file:
            for start, stop in self.spans.tolist():
                file.seek(start)
                try:
                    record = json.loads(file.read(stop - start).decode())
                except ValueError:
                    raise InputError(f"{self.path}: has changed while it was read; start again"
                                     ) from None
                yield as_used(record)

    def select(self, rows: list[int] | slice) -> "RecordFile":
        """Return some of the rows."""
        return RecordFile(self.path, self.spans[rows])


def find_rows(path: Path) -> np.ndarray | None:
    """Return the spans (N, 2), in bytes, of the rows of a JSON array or JSON Lines, else None."""
    spans = []
    try:
        # one character per byte: a place in the text is a place in the file. For a moment the file
        # is in memory twice
        text = path.read_bytes().decode("latin-1")
        mark = OPENING.match(text)
        is_array = mark[1] == "["
        between, last = ARRAY if is_array else LINES
        while mark:
            start = mark.end()
            _, stop = DECODER.raw_decode(text, start)
            text[start:stop].encode("latin-1").decode()  # raises UnicodeDecodeError
            spans.append((start, stop))
            mark = between.match(text, stop)
    except (OSError, ValueError, RecursionError):
        return None
    is_complete = last.fullmatch(text, stop) and (is_array or len(spans) > 1)
    return np.array(spans, dtype=np.int64) if is_complete else None


def read_list(path: Path) -> RecordFile:
    """Return the rows of a LLaVA-format file. Raises InputError if it is none."""
    spans = find_rows(path) if path.is_file() else None  # a pipe would be waited for
    if spans is None:
        read_json(path)  # raises InputError if that is the fault
        raise InputError(f"{path}: must be a JSON list of records with at least one row")
    return RecordFile(path, spans)


def as_used(record):
    """Return a row of a file as it is used; it may be anything.

    A dialogue that begins in the middle, with an answer, loses that answer, as in LLaVA. An "image"
    that is null or empty is dropped. Half a character (a lone surrogate) is read as U+FFFD.
    """
    if not isinstance(record, dict):
        return record
    match record:
        case {"conversations": [{"from": "gpt"}, _, *_]}:
            del record["conversations"][0]
    for key in ("image", "type"):
        if key in record and record[key] in (None, "", []):
            del record[key]
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            turn["value"] = turn["value"].encode(errors="surrogatepass").decode(errors="replace")
    return record


def record_fault(record, held_out: bool) -> str | None:
    """Return the fault in the form of a record, in words, or None. It opens no file."""
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
    questions = [turn["value"] for turn in turns[::2]]
    answers = [turn["value"] for turn in turns[1::2]]
    if len(turns) % 2 or not all(answer.strip() for answer in answers):
        return "has a question without an answer"
    if held_out and record.get("answers") is not None:
        several = record["answers"]
        are_texts = isinstance(several, list) and all(
            isinstance(text, str) and text.strip() for text in several)
        if len(questions) > 1 or not several or not are_texts:
            return '"answers" is not a list of texts, those of its one question'
    return image_fault(record, questions, answers)


def image_fault(record: dict, questions: list[str], answers: list[str]) -> str | None:
    """Return the fault in a record's "type", its "image" or its <image> in the text."""
    if not isinstance(record.get("type", ""), str):
        return 'has a "type" that is no text'
    if "image" not in record:
        # inside a text <image> is a word, as in LLaVA; as its first or last line a lost picture
        for question in questions:
            lines = [line.strip() for line in question.strip().split("\n")]
            if "<image>" in (lines[0], lines[-1]):
                return 'has an <image> line in a question but no "image" file'
        return None
    if not isinstance(record["image"], str):
        return '"image" is not a file name'
    if any("<image>" in answer for answer in answers):
        return "has an <image> in an answer"
    count = sum(question.count("<image>") for question in questions)
    return None if count == 1 else f'has {count} <image> token(s) but one "image" file'


def unread_keys(record, held_out: bool) -> list[str]:
    """Return the keys of a row that look like a picture or answers, and that nothing reads."""
    unread = []
    for key, value in record.items() if isinstance(record, dict) else ():
        is_read = key in KNOWN or (held_out and key == "answers")
        if not is_read and value and (TELLING.search(key) or MEDIUM.search(str(value))):
            unread.append(key)
    return unread


def tell(line: str) -> None:
    """Print a line on stderr, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def row_faults(records: RecordFile, get_image: DiskImages | None,
               held_out: bool) -> Iterator[tuple[int, str]]:
    """Yield (row, fault) of every bad row; with get_image its image file is opened too.

    Then name the keys that nothing reads. A held-out set may have "answers".
    """
    unread = Counter()

    def fault_of(record) -> tuple[str | None, list[str]]:
        fault = record_fault(record, held_out)
        if fault is None and get_image and "image" in record:
            try:
                get_image(record["image"])
            except InputError as e:
                fault = f"has a bad image: {e}"
        return fault, unread_keys(record, held_out)

    # threads help: PIL decodes a picture without Python's lock
    with ThreadPoolExecutor() as pool, tqdm(total=len(records), desc="check", leave=False) as bar:
        for start in range(0, len(records), 1000):
            found = pool.map(fault_of, records[start:start + 1000])
            for row, (fault, keys) in enumerate(found, start):
                bar.update()
                unread.update(keys)
                if fault:
                    yield row, fault
    for key, count in unread.items():
        tell(f"note: {records.path}: {json.dumps(key)} is in {count} rows, and nothing reads "
                 'it; the picture of a row is its "image", and only a held-out set has "answers"')


def read_records(path: Path, folder: Path, skip_bad: bool, get_image=None,
                 held_out: bool = False) -> RecordFile:
    """Return the records of a LLaVA-format file, every row checked before anything is trained.

    With get_image, a DiskImages, their images are opened too. Raises InputError for the first bad
    row (rows count from 0), or with skip_bad leaves such rows out and says so on stderr.
    """
    records = read_list(path)
    bad = {}
    for row, fault in row_faults(records, get_image, held_out):
        name = row_name(row, records[row])
        if not skip_bad:
            command = f"python -m tools.check_data {path} {folder}{' --held-out' * held_out}"
            raise InputError(f"{path}: {name} {fault}; `{command}` lists every bad row")
        tell(f"skipped: {path}: {name} {fault}")
        bad[row] = fault
    if len(bad) == len(records):
        raise InputError(f"{path}: every row is bad, the first {bad[0]}")
    return records.select([row for row in range(len(records)) if row not in bad])
