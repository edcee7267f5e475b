"""Texts to continue: where they are cut, and BLEU and ROUGE-L as their libraries give them."""

import json

import pytest
import sacrebleu
from lm_eval.api.metrics import bleu
from lm_eval.tasks import TaskManager
from rouge_score.rouge_scorer import RougeScorer

from lminf_eval.errors import UsageError
from lminf_eval.harness.plugin import task_folder
from lminf_eval.tasks import generation

BUILDERS = {"pydocs": generation.pydocs, "arxiv": generation.arxiv, "openwebtext2": generation.openwebtext2}
WORDS = ["the", "grass", "is", "green", "and", "the", "sky", "is", "blue", "over", "here", "again"]


@pytest.fixture
def texts(tmp_path):
    """Three texts, of 150, 400 and 20 numbered words."""
    rows = [{"text": " ".join(f"{WORDS[i % 12]}{i}" for i in range(n)) + "."} for n in (150, 400, 20)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("corpus", BUILDERS)
def test_a_beginning_and_what_follows_are_the_texts_own(corpus, texts, tiny_tokenizer):
    whole = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    length = len(tiny_tokenizer(whole[0])["input_ids"]) // 3
    docs = BUILDERS[corpus](length=length, data_files=str(texts), tokenizer=tiny_tokenizer)["test"]
    sources = [int(doc["source"].rpartition(":")[2]) for doc in docs]
    assert 2 not in sources
    for source, doc in zip(sources, docs, strict=True):
        assert whole[source].startswith(doc["input"] + doc["reference"])
        assert doc["n_tokens"] == len(tiny_tokenizer(doc["input"])["input_ids"])
        assert length - 5 <= doc["n_tokens"] <= length == doc["length"]
        both = len(tiny_tokenizer(doc["input"] + doc["reference"])["input_ids"])
        assert length + 95 <= both <= length + 100


def test_pythons_manual_needs_no_data(tiny_tokenizer):
    docs = generation.pydocs(length=500, tokenizer=tiny_tokenizer)["test"]
    assert len(docs) == 4
    assert len({doc["reference"] for doc in docs}) == 4


def test_scores_are_those_of_their_libraries():
    docs = [{"reference": " ".join(WORDS)}, {"reference": "one two three four five six"}]
    answers = ["the grass is green and it rains here again", "one two three seven five six"]
    scores = [generation.score(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    expected = sacrebleu.corpus_bleu(answers, [[doc["reference"] for doc in docs]]).score
    assert bleu([score["bleu"] for score in scores]) == pytest.approx(expected)
    assert 0 < expected < 100
    for doc, answer, score in zip(docs, answers, scores, strict=True):
        rouge = RougeScorer(["rougeL"]).score(doc["reference"], answer)["rougeL"].fmeasure
        assert score["rouge_l"] == 100 * rouge
    # Seven of nine words, in order, of a reference of twelve: precision 7/9, recall 7/12.
    assert scores[0]["rouge_l"] == pytest.approx(100 * 2 / (9 / 7 + 12 / 7))


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"length": "4k"}, "arxiv length='4k': a whole number of tokens from 16 up is needed"),
        ({"length": 5}, "arxiv length=5: a whole number of tokens from 16 up is needed"),
        ({"length": 100_000}, "arxiv length=100100: none of 3 documents is that long"),
    ],
)
def test_bad_metadata_is_refused_in_one_line(metadata, line, texts, tiny_tokenizer):
    with pytest.raises(UsageError, match=line):
        generation.arxiv(data_files=str(texts), tokenizer=tiny_tokenizer, **metadata)


def test_a_task_asks_for_a_hundred_greedy_tokens(tiny_tokenizer):
    metadata = {"tokenizer": tiny_tokenizer, "length": 300}
    manager = TaskManager(include_path=task_folder(), include_defaults=False, metadata=metadata)
    task = manager.load(["pydocs_generation_2k"])["tasks"]["pydocs_generation_2k"]
    task.build_all_requests()
    context, settings = task.instances[0].args
    doc = next(iter(task.test_docs()))
    assert context == doc["input"]
    assert settings == {"do_sample": False, "max_gen_toks": 100, "until": []}
    assert task.doc_to_target(doc) == doc["reference"]
    assert task.higher_is_better() == {"bleu": True, "rouge_l": True}
