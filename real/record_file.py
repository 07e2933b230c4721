"""Rows of a JSON file that are read when they are asked for: a million rows hold no memory.

LLaVA's 665k conversations are 1 GB of text and 5 GB of Python's objects, in every process and every
worker. Here a process holds where each row begins and ends; the text is the file's, which the
system keeps once for all.
"""

import codecs
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data import InputError

BLOCK = 1 << 22  # bytes read at once
SPACE = " \t\n\r"


class RecordFile(Sequence):
    """The rows of a file, each made by `finish` from what its JSON says.

    places (N, 2): the byte at which each row begins, and the one after its last.
    """

    def __init__(self, path: Path, places: np.ndarray, finish: Callable):
        self.path = path
        self.places = places
        self.finish = finish

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int | slice):
        if isinstance(row, slice):
            return list(self.select(range(len(self))[row]))
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return next(iter(self.select([row])))

    def __iter__(self) -> Iterator:
        with open(self.path, "rb") as file:
            for start, stop in self.places.tolist():
                file.seek(start)
                yield self.finish(self.parse(file.read(stop - start)))

    def parse(self, text: bytes):
        """The value of a row. Raises InputError if it is no longer there."""
        try:
            return json.loads(text.decode("utf-8"))
        except ValueError:
            raise InputError(f"{self.path}: has changed while it was read; start again") from None

    def select(self, rows: Sequence[int]) -> "RecordFile":
        """Some of the rows."""
        return RecordFile(self.path, self.places[list(rows)], self.finish)


def find_rows(path: Path) -> np.ndarray | None:
    """Where the rows of a JSON array, or of JSON Lines, begin and end: bytes (N, 2).

    None if the file is neither, or has no row: then what is wrong is for others to say.
    """
    try:
        with open(path, "rb") as file:
            places = array_rows(Window(file))
        if places is None:
            with open(path, "rb") as file:
                places = line_rows(file)
    except (OSError, ValueError, RecursionError):
        return None
    return np.array(places, dtype=np.int64).reshape(-1, 2) if places else None


class Window:
    """A part of a file's text, which moves on: `at` is the next character, `byte` its place."""

    def __init__(self, file):
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.at = 0
        bom = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self.byte = file.tell() if bom else 0
        file.seek(self.byte)

    def grow(self) -> bool:
        """Read on, and forget what is behind; False at the end of the file."""
        self.text = self.text[self.at:]
        self.at = 0
        # twice as much: a row of any length is found in a few attempts
        block = self.file.read(max(BLOCK, len(self.text)))
        self.text += self.decoder.decode(block, final=not block)
        return bool(block)

    def move(self, to: int) -> None:
        self.byte += len(self.text[self.at:to].encode())
        self.at = to

    def mark(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in SPACE:
                to += 1
            self.move(to)
            if to < len(self.text):
                return self.text[to]
            if not self.grow():
                return ""

    def skip_value(self) -> bool:
        """Go behind a JSON value; False if there is none."""
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                end = len(self.text)
            if end < len(self.text):  # else it may go on
                self.move(end)
                return True
            if not self.grow():
                return False


def array_rows(window: Window) -> array | None:
    """Begin, end, begin, end, ... of the values of an array; None if it is none."""
    places = array("q")
    mark = window.mark()
    if mark != "[":
        return None
    while mark != "]":
        window.move(window.at + 1)
        window.mark()
        places.append(window.byte)
        if not window.skip_value():
            return None
        places.append(window.byte)
        mark = window.mark()
        if mark not in (",", "]"):
            return None
    window.move(window.at + 1)
    return None if window.mark() else places


def line_rows(file) -> array | None:
    """The same of the lines of a file; None if there are fewer than two."""
    places = array("q")
    start = 0
    for line in file:
        text = line.decode("utf-8-sig" if start == 0 else "utf-8")
        if text.strip():
            json.loads(text)
            before = len(line) - len(text.encode())  # a byte order mark
            places.extend((start + before, start + len(line)))
        start += len(line)
    return places if len(places) > 2 else None
