"""Where each corpus comes from: the running Python, the hub (stood in for here), or local files."""

import hashlib
import json
import platform
from pydoc_data.topics import topics

import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub.errors import LocalEntryNotFoundError

from lminf_eval.errors import UsageError
from lminf_eval.tasks import corpora

LONG = "\n".join(topics[name] for name in sorted(topics)[:4])


@pytest.fixture
def meta(tiny_tokenizer):
    return {"tokenizer": tiny_tokenizer, "length": 1024}


@pytest.fixture
def pile(tmp_path, monkeypatch):
    """A stand-in for the Pile's validation file on the hub; the list grows by one with each download."""
    monkeypatch.setenv("LMINF_EVAL_HOME", str(tmp_path / "home"))
    sets = ["ArXiv", "Github", "OpenWebText2", "ArXiv"]
    rows = [{"text": f"{i} {LONG}", "meta": {"pile_set_name": name}} for i, name in enumerate(sets)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode() + b'{"text": "broken \xff"}\n'
    path = tmp_path / "val.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    downloads = []

    def download(repo, filename, repo_type):
        downloads.append((repo, filename, repo_type))
        return str(path)

    monkeypatch.setattr(corpora, "hf_hub_download", download)
    return downloads


def test_pydocs_is_the_whole_circle_of_topics_four_times(meta):
    docs = corpora.pydocs(**meta)["test"]
    names, count = list(topics), len(topics)
    text = "\n".join(topics.values())
    assert len(docs) == 4
    for quarter, doc in enumerate(docs):
        assert doc["text"] == "\n".join(topics[n] for n in names[quarter * count // 4 :])[: len(doc["text"])]
        assert doc["source"] == f"pydoc_data.topics from {names[quarter * count // 4]!r}"
        assert doc["python"] == platform.python_version()
        assert doc["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_every_pydocs_document_is_as_long_as_the_whole_text(tiny_tokenizer):
    with pytest.raises(UsageError, match="none of 4 documents is that long") as refused:
        corpora.pydocs(tokenizer=tiny_tokenizer, length=2**20)
    reach = int(str(refused.value).split()[-2])
    whole = len(tiny_tokenizer("\n".join(topics.values()))["input_ids"])
    assert reach == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("corpus", [corpora.pydocs, corpora.pg19, corpora.arxiv, corpora.openwebtext2])
def test_local_data_takes_the_place_of_every_corpus(tmp_path, meta, corpus):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"body": LONG}) + "\n")
    (doc,) = corpus(**meta, data_files=str(path), text_column="body")["test"]
    assert LONG.startswith(doc["text"])
    assert doc["source"] == f"{path}:0"


def test_a_local_pile_file_is_filtered(tmp_path, meta):
    path = tmp_path / "val.jsonl"
    rows = [{"text": LONG, "meta": {"pile_set_name": name}} for name in ("Github", "ArXiv", "OpenWebText2", "ArXiv")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert corpora.arxiv(**meta, data_files=str(path))["test"]["source"] == [f"{path}:1", f"{path}:3"]
    assert corpora.openwebtext2(**meta, data_files=str(path))["test"]["source"] == [f"{path}:2"]


def test_the_pile_is_read_once_for_both_subsets(pile, meta, tmp_path):
    arxiv = corpora.arxiv(**meta)["test"]
    corpora.openwebtext2(**meta)
    corpora.arxiv(**{**meta, "length": 512})
    assert pile == [("mit-han-lab/pile-val-backup", "val.jsonl.zst", "dataset")]
    assert [doc["text"].split()[0] for doc in arxiv] == ["0", "3"]
    assert arxiv["source"] == ["mit-han-lab/pile-val-backup ArXiv:0", "mit-han-lab/pile-val-backup ArXiv:1"]
    kept = {path.name: pq.read_table(path).num_rows for path in (tmp_path / "home" / "pile-val").glob("*.parquet")}
    assert kept == {"ArXiv.parquet": 2, "OpenWebText2.parquet": 1}


def test_an_interrupted_filtering_leaves_nothing_to_be_taken_for_whole(pile, meta, tmp_path, monkeypatch):
    def interrupted(*args):
        yield LONG, "ArXiv"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "read_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            corpora.arxiv(**meta)
    assert len(corpora.arxiv(**meta)["test"]) == 2


def test_pg19_rows_are_documents(meta, monkeypatch):
    asked = []

    def load(repo, split):
        asked.append((repo, split))
        return {"text": ["short", LONG]}

    monkeypatch.setattr(corpora, "load_dataset", load)
    assert corpora.pg19(**meta)["test"]["source"] == ["emozilla/pg19-test:1"]
    assert asked == [("emozilla/pg19-test", "test")]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline mode"), ConnectionError("no route")])
@pytest.mark.parametrize("name", ["pg19", "arxiv", "openwebtext2"])
def test_unreachable_hub_says_what_to_pass(meta, monkeypatch, tmp_path, name, error):
    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setenv("LMINF_EVAL_HOME", str(tmp_path))
    monkeypatch.setattr(corpora, "load_dataset", unreachable)
    monkeypatch.setattr(corpora, "hf_hub_download", unreachable)
    with pytest.raises(UsageError, match=r"cannot get .*(offline mode|no route).*data_files"):
        getattr(corpora, name)(**meta)
