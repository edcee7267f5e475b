"""Local data: real files of every format, and what is said of each kind of bad one."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lminf_eval.errors import UsageError
from lminf_eval.tasks.data_files import read_texts

TEXTS = ["The first document.", "Ein zweites, mit Umlaut: ü.", "A third one 🙂"]


def jsonl(texts, column="text", **more):
    return "".join(json.dumps({column: text, **more}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path, texts, column="text"):
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), path)
    elif path.name.endswith(".jsonl"):
        path.write_bytes(jsonl(texts, column))
    elif path.name.endswith(".jsonl.zst"):
        half = len(texts) // 2  # two frames, as parallel compressors write them
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(jsonl(texts[:half], column)) + pack(jsonl(texts[half:], column)))
    else:
        path.write_bytes("\n".join(texts).encode())
    return str(path)


def read(*args, **kwargs):
    return [text for _, text in read_texts(*args, **kwargs)]


@pytest.fixture
def log(caplog):
    """The package's log records, also where an earlier test has made lm-eval keep its log to itself."""
    logger = logging.getLogger("lm_eval.lminf_eval.tasks.data_files")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.zst"])
def test_rows_in_order_with_their_places(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", TEXTS)
    assert list(read_texts(path)) == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS)]


def test_a_txt_file_is_one_document(tmp_path):
    assert read(write(tmp_path / "book.txt", TEXTS)) == ["\n".join(TEXTS)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.zst"])
def test_another_text_column(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", TEXTS, column="content")
    assert read(path, text_column="content") == TEXTS
    with pytest.raises(UsageError, match=r"no column 'text'.*content"):
        read(path)


def test_folder_glob_and_list(tmp_path):
    (tmp_path / "deep").mkdir()
    first = write(tmp_path / "a.parquet", TEXTS[:1])
    second = write(tmp_path / "deep" / "b.jsonl", TEXTS[1:2])
    third = write(tmp_path / "deep" / "c.txt", TEXTS[2:])
    (tmp_path / "README.md").write_text("not data")
    assert read(str(tmp_path)) == TEXTS
    assert read(str(tmp_path / "*.parquet")) == TEXTS[:1]
    assert read(str(tmp_path / "**" / "*.jsonl")) == TEXTS[1:2]
    assert read([third, first, second]) == [TEXTS[2], *TEXTS[:2]]


def test_a_name_with_glob_characters_is_taken_as_it_is(tmp_path):
    assert read(write(tmp_path / "part[1].jsonl", TEXTS)) == TEXTS


@pytest.mark.parametrize("value", ["{}/*.parquet", "{}/absent.jsonl", "{}"])
def test_what_matches_nothing_is_named(tmp_path, value):
    with pytest.raises(UsageError, match="matches no file"):
        read(value.format(tmp_path))


@pytest.mark.parametrize("value", [[], [1], {"train": "x"}, ["a", None]])
def test_data_files_of_another_type(value):
    with pytest.raises(UsageError, match="data_files="):
        read(value)


def test_unknown_suffix(tmp_path):
    (tmp_path / "data.csv").write_text("text\nhello\n")
    with pytest.raises(UsageError, match=r"data\.csv.*suffix"):
        read(str(tmp_path / "data.csv"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.zst", ".txt"])
def test_empty_file(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        read(str(path))


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(UsageError, match="is empty"):
        read(str(path))


def test_truncated_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    write(path, TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"data\.parquet.*cut short"):
        read(str(path))


def test_file_that_is_no_zstandard(tmp_path):
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(jsonl(TEXTS))
    with pytest.raises(UsageError, match=r"jsonl\.zst.*damaged"):
        read(str(path))


def test_truncated_zstandard(tmp_path):
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(jsonl([f"{i} {hash(str(i))}" for i in range(20_000)]))[:-1000])
    with pytest.raises(UsageError, match=r"jsonl\.zst.*cut short"):
        read(str(path))


def test_parquet_column_that_is_no_text(tmp_path):
    path = write(tmp_path / "data.parquet", TEXTS)
    with pytest.raises(UsageError, match=r"'id' holds int64"):
        read(path, text_column="id")


def test_bad_lines_are_skipped_and_counted(tmp_path, log):
    path = tmp_path / "data.jsonl"
    bad = [
        b'{"text": "broken \xff byte"}\n',
        b'{"text": 3}\n',
        b'{"text": "cut sh\n',
        b"[1]\n",
        b'{"other": "x"}\n',
        b'{"text": "\\ud800"}\n',
    ]
    path.write_bytes(jsonl(TEXTS[:1]) + b"".join(bad) + b"\n" + jsonl(TEXTS[1:]))
    assert read(str(path)) == TEXTS
    assert "skipped 6 of 9 documents" in log.text


def test_bad_parquet_texts_are_skipped_and_counted(tmp_path, log):
    path = tmp_path / "data.parquet"
    raw = pa.array([TEXTS[0].encode(), b"broken \xff byte", None, TEXTS[1].encode()], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), path)
    assert read(str(path)) == TEXTS[:2]
    assert "skipped 2 of 4 documents" in log.text


def test_bad_txt_is_skipped_and_counted(tmp_path, log):
    (tmp_path / "a.txt").write_bytes(b"broken \xff byte")
    write(tmp_path / "b.txt", TEXTS[:1])
    assert read(str(tmp_path)) == TEXTS[:1]
    assert "skipped 1 of 1 documents" in log.text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pile_subset_is_kept_and_rows_without_one_too(tmp_path, suffix):
    rows = [{"text": t, "meta": {"pile_set_name": s}} for t, s in zip(TEXTS, ["ArXiv", "Github", "ArXiv"], strict=True)]
    path = tmp_path / f"val{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(str(path), pile_set="ArXiv") == [TEXTS[0], TEXTS[2]]
    assert read(str(path)) == TEXTS
    assert read(write(tmp_path / f"plain{suffix}", TEXTS), pile_set="ArXiv") == TEXTS
