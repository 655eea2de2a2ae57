"""Reads rows by `datasets`, and makes text of them: by fields, or by the tokenizer's chat template."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import quoted


TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # and their loaders in datasets
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LINES = {"keep_linebreaks": True, "encoding": "utf-8-sig", "encoding_errors": "replace"}
USUAL_FIELDS = (("text",), ("messages",), ("prompt", "completion"), ("question", "answer"))


def suffix_of(path: Path) -> str:
    """Returns the suffix of a file's name, without that of its compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """
    Yields the rows of a table, or the lines of any other file as rows with `text`.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the file cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('reading texts needs datasets: pip install "hf_phibalance[texts]"') from error
    loader = TABLES.get(suffix_of(path), "text")
    options = LINES if loader == "text" else {}
    if not path.stat().st_size:
        return
    try:
        yield from load_dataset(loader, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
    except Exception as error:  # each loader and codec has its own
        reason = f"{quoted(str(path))} cannot be read as {loader}: {quoted(str(error))}"
        raise ValueError(f"{reason}. Repair it, or leave it out of `--texts`.") from error


def fields_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the fields that are the text of such rows, if there is no doubt; raises `ValueError` otherwise."""
    filled = _filled(row)
    usual = [names for names in USUAL_FIELDS if set(names) <= set(filled)]
    if not usual and len(filled) != 1:
        raise ValueError(f"say by `--field` which field is the text; there is some in {quoted(filled)}.")
    return usual[0] if usual else (filled[0],)


def text_of(row: Mapping[str, Any], fields: tuple[str, ...], tokenizer: Any) -> str:
    """
    Returns the text of a row: its `fields` joined by line ends, or what the chat template of `tokenizer` makes of messages.

    Raises:
        ValueError: if a field has no text, or the template does not take its messages.
    """
    for name in fields:
        if name not in _filled(row):
            raise ValueError(f"there is no text in field {quoted(name)}, but in {quoted(_filled(row))}.")
    values = [row[name] for name in fields]
    if all(isinstance(value, str) for value in values):
        return ("" if fields == ("prompt", "completion") else "\n").join(values)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"field {quoted(fields[0])} holds messages, but the tokenizer {quoted(tokenizer.name_or_path)} has no chat "
            "template: give one that has (`--tokenizer`), or name a field of plain text (`--field`)."
        )
    try:  # a table has every key in each of its messages, with null where there was none
        messages = [{k: v for k, v in message.items() if v is not None} for value in values for message in value]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the tokenizer's chat template does not take the messages: {quoted(str(error))}.") from error


def _filled(row: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields with text or with messages."""
    return [name for name, value in row.items() if isinstance(value, str) or _is_chat(value)]


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) and "role" in part for part in value)
    )
