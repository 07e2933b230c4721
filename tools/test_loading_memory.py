"""The memory of loading: what the tables of docs/gpus.md say, at small sizes."""

import pytest

from data import read_json
from plumbing.pretrained_llm import PretrainedTokenizer
from plumbing.records import read_list
from tools.loading_memory import (LAYERS, memory_of_records, peaks_of_loading, record_table,
                                  write_llama, write_rows)


def test_rows_in_their_file_take_less_than_a_list(tmp_path):
    """At most a third in one process; and a worker that reads a list makes a copy of it."""
    path = tmp_path / "train.json"
    write_rows(path, 12_000)
    rows, listed = read_list(path), read_json(path)
    assert (len(rows), rows[0], rows[-1]) == (12_000, listed[0], listed[-1])
    places, _ = memory_of_records(lambda: read_list(path), workers=0)
    alone, shared = memory_of_records(lambda: read_json(path), workers=1)
    assert alone > 10_000  # kB
    assert places < alone / 3
    assert shared > 1.2 * alone


def test_the_table_of_records_has_a_line_each():
    lines = record_table(200).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == ["places in the file", "a list"]


@pytest.mark.slow
def test_two_processes_hold_the_weights_once(tmp_path):
    """Each has a half of a large LLM, and not all of it."""
    pytest.importorskip("transformers")
    sizes = {layers: write_llama(tmp_path / f"llm{layers}", layers) / 1024 for layers in LAYERS}
    PretrainedTokenizer(str(tmp_path / "llm1"))
    peaks_of_loading(tmp_path, tmp_path / "llm1", 1)  # makes stage 0's files
    small = peaks_of_loading(tmp_path, tmp_path / "llm1", 2)
    large = peaks_of_loading(tmp_path, tmp_path / "llm9", 2)
    added = sum(large) - sum(small)
    assert 0.6 * (sizes[9] - sizes[1]) < added < 1.6 * (sizes[9] - sizes[1])
