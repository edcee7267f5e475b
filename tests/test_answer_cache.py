"""lm-eval's own caches: an answer or request of another model, method, length or metadata is never served."""

from types import SimpleNamespace

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict

from lminf_eval.harness.answer_cache import digest, identify, keep_requests_apart
from lminf_eval.harness.lm import LMInfinite
from tests.test_adapter import pairs, prompts, rolling

TEXT = "the quick brown fox jumps over the lazy dog " * 8


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(max_position_embeddings=512)


def answers(model, database):
    cached = CachingLM(model, str(database))
    found = (
        cached.loglikelihood(pairs((TEXT, " again"))),
        cached.loglikelihood_rolling(rolling(TEXT)),
        cached.generate_until(prompts([TEXT], max_gen_toks=3)),
    )
    cached.dbdict.close()
    return found


@pytest.mark.parametrize(
    "other",
    [
        {"attention": "lambda", "n_local": 16},
        {"attention": "window", "n_local": 16},
        {"dtype": "bfloat16"},
        {"max_length": 64},
        {"add_bos_token": True},
    ],
)
def test_one_database_serves_each_model_and_method_its_own_answers(other, folder, tmp_path):
    first = {"attention": "full", "dtype": "float32"}
    alone = [
        answers(LMInfinite(str(folder), device="cpu", **how), tmp_path / f"{i}.db")
        for i, how in enumerate((first, first | other))
    ]
    assert alone[0] != alone[1]
    shared = tmp_path / "shared.db"
    for _ in range(2):
        assert [
            answers(LMInfinite(str(folder), device="cpu", **how), shared) for how in (first, first | other)
        ] == alone


def test_answers_are_found_again_by_the_same_model_and_method(folder, tmp_path):
    found = answers(LMInfinite(str(folder), device="cpu"), tmp_path / "c.db")
    again = LMInfinite(str(folder), device="cpu", chunk_size=64)
    assert answers(again, tmp_path / "c.db") == found
    assert again.answers.tokens["computed"] == 0


def test_hf_and_lminf_do_not_read_each_others_answers(folder, tmp_path):
    ours = LMInfinite(str(folder), device="cpu", n_local=16)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
    alone = answers(ours, tmp_path / "a.db"), answers(theirs, tmp_path / "b.db")
    assert alone[0] != alone[1]
    for _ in range(2):
        assert (answers(ours, tmp_path / "c.db"), answers(theirs, tmp_path / "c.db")) == alone


def test_answers_of_a_model_object_are_not_found_again(folder, tmp_path, caplog):
    model = HFLM(str(folder), device="cpu", dtype="float32").model
    tokenizer = str(folder)
    for _ in range(2):
        lm = LMInfinite(model, tokenizer=tokenizer, device="cpu", n_local=16)
        answers(lm, tmp_path / "c.db")
        assert lm.answers.tokens["computed"] > 0
    assert "use_cache: answers of a model object are not found again" in caplog.text


def test_a_database_keeps_identities_apart(tmp_path):
    for name in ("a", "b"):
        database = SqliteDict(str(tmp_path / "d.db"), autocommit=True)
        identify(database, {"model": name})
        assert "key" not in database
        database["key"] = name
        assert database["key"] == name
        database.close()


def test_a_digest_tells_values_apart_and_knows_no_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize(
    ("task", "first", "second"),
    [
        ("pydocs_ppl_2k", {"length": 300, "buckets": 4}, {"length": 600, "buckets": 4}),
        ("passkey_4k", {"length": 300, "documents": 2}, {"length": 300, "documents": 4}),
    ],
)
def test_cached_requests_are_of_this_length_and_metadata(task, first, second, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))

    def result(metadata, **how):
        lm = LMInfinite(str(folder), device="cpu", n_local=32)
        given = metadata | {"tokenizer": str(folder)}
        found = simple_evaluate(lm, tasks=[task], task_manager=TaskManager(metadata=given), log_samples=False, **how)
        return found["results"][task] | {"name": ""}

    expected = result(first), result(second)
    for _ in range(2):
        assert (result(first, cache_requests=True), result(second, cache_requests=True)) == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_requests_are_named_by_metadata_for_any_task():
    class Task:
        def __init__(self, **metadata):
            self.config = SimpleNamespace(metadata=metadata)

        def build_all_requests(self, *, limit=None, tokenizer_name=""):
            return tokenizer_name

    keep_requests_apart(Task)
    names = [Task(length=n).build_all_requests(tokenizer_name="t") for n in (1, 2, 1)]
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("t")
