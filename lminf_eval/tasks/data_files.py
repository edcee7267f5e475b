"""Texts from local files: parquet, JSON lines (plain or zstandard-compressed), and plain text."""

import glob
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from lminf_eval.errors import UsageError, first_line

logger = logging.getLogger(f"lm_eval.{__name__}")  # under lm-eval's own, which shows it

# One document: its text, or None if it has none (broken UTF-8, not a string), and `meta.pile_set_name` if it has one.
Row = tuple[str | None, str | None]

_SURROGATE = re.compile("[\ud800-\udfff]")
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.zst", ".txt")


def read_texts(
    data_files: str | list[str], text_column: str = "text", pile_set: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the documents of local files, each as its place ("FILE:ROW") and its text.

    A .txt file is one document; the other formats hold one a row, its text in `text_column`. A row that is no text is
    skipped, and each file's skipped rows are counted in the log.

    Args:
        data_files: a file, a folder (searched at every depth), a glob, or a list of them.
        text_column: name of the column, or JSON key, that holds the text.
        pile_set: keep only the rows whose `meta.pile_set_name` is this, or that have none.

    Raises:
        UsageError: nothing matches, a suffix is unknown, a file is empty or damaged, or it lacks the column.
    """
    for path in find_files(data_files):
        rows = skipped = 0
        for text, row_set in read_rows(path, text_column):
            if text is None:
                skipped += 1
            elif pile_set is None or row_set in (None, pile_set):
                yield f"{path}:{rows}", text
            rows += 1
        if rows == 0:
            raise UsageError(f"data file {str(path)!r} is empty: it must hold at least one document")
        if skipped:
            logger.warning("%s: skipped %d of %d documents, which are no valid UTF-8 text", path, skipped, rows)


def find_files(data_files: str | list[str]) -> list[Path]:
    """Return the files that `data_files` (see `read_texts`) names, sorted within each entry."""
    entries = [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise UsageError(f"data_files={data_files!r}: a path, a folder, a glob, or a list of them is needed")
    found: list[Path] = []
    for entry in entries:
        path = Path(entry).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        for folder in (match for match in matches if match.is_dir()):
            files += [file for file in folder.rglob("*") if file.is_file() and file.name.endswith(_SUFFIXES)]
        if not files:
            raise UsageError(f"data_files {entry!r} matches no file ({', '.join(_SUFFIXES)})")
        found += sorted(set(files))
    return found


def read_rows(path: Path, text_column: str) -> Iterator[Row]:
    """Yield the rows of one file, whose suffix names its format. Raises the errors of `read_texts`."""
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path, text_column)
        elif path.name.endswith(".jsonl"):
            with path.open("rb") as lines:
                yield from _jsonl(lines, path, text_column)
        elif path.name.endswith(".jsonl.zst"):
            with path.open("rb") as packed:
                yield from _jsonl(_unpacked_lines(packed), path, text_column)
        elif path.name.endswith(".txt"):
            if data := path.read_bytes():
                yield _decode(data), None
        else:
            raise UsageError(f"data file {str(path)!r}: its suffix must be one of {', '.join(_SUFFIXES)}")
    except (OSError, EOFError, pa.ArrowException, zstandard.ZstdError) as error:
        reason = first_line(error)
        raise UsageError(f"data file {str(path)!r} cannot be read, it may be damaged or cut short: {reason}") from error


def _parquet(path: Path, text_column: str) -> Iterator[Row]:
    if path.stat().st_size == 0:
        return
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        _check_column(path, text_column, schema.names)
        kind = schema.field(text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UsageError(f"data file {str(path)!r}: column {text_column!r} holds {kind}, not text")
        columns = [text_column, "meta"] if "meta" in schema.names else [text_column]
        for batch in file.iter_batches(batch_size=64, columns=columns):
            # As bytes, so that one text that is no valid UTF-8 spoils itself alone.
            texts = batch.column(text_column).cast(pa.large_binary()).to_pylist()
            metas = batch.column("meta").to_pylist() if "meta" in columns else [None] * len(texts)
            for text, meta in zip(texts, metas, strict=True):
                yield None if text is None else _decode(text), _pile_set_name(meta)


def _unpacked_lines(packed: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a zstandard stream of any number of frames; zstandard's own reader misses a truncated one."""
    frame, line = zstandard.ZstdDecompressor().decompressobj(), b""
    while chunk := packed.read(1 << 20):
        while chunk:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            line += frame.decompress(chunk)
            chunk = frame.unused_data
        *lines, line = line.split(b"\n")
        yield from lines
    if packed.tell() and not frame.eof:
        raise EOFError("the last zstandard frame has no end")
    yield line


def _jsonl(lines: Iterable[bytes], path: Path, text_column: str) -> Iterator[Row]:
    checked = False
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # what json raises, and what a wrong byte raises
            row = None
        if not isinstance(row, dict):
            yield None, None
            continue
        if not checked:
            _check_column(path, text_column, list(row))
            checked = True
        text = row.get(text_column)
        # JSON can write half a surrogate pair ("\ud800"), which no UTF-8 and no tokenizer can take.
        valid = isinstance(text, str) and not _SURROGATE.search(text)
        yield text if valid else None, _pile_set_name(row.get("meta"))


def _check_column(path: Path, text_column: str, columns: list[str]) -> None:
    if text_column not in columns:
        raise UsageError(f"data file {str(path)!r} has no column {text_column!r}; text_column must be one of {columns}")


def _pile_set_name(meta: object) -> str | None:
    return meta.get("pile_set_name") if isinstance(meta, dict) else None


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
