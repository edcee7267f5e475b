"""Facts in a long text: exact size, depths, what is asked, and scores as the authors' own scorers give them."""

import json
import random
import re

import pytest
from lm_eval.tasks.infinitebench.utils import process_results_kv
from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

from lminf_eval.errors import UsageError
from lminf_eval.tasks import needles

KINDS = {
    "needle_single": needles.single,
    "needle_multikey": needles.multikey,
    "needle_multivalue": needles.multivalue,
    "needle_multiquery": needles.multiquery,
    "variable_tracking": needles.variable_tracking,
    "kv_retrieval": needles.key_value,
}
ASKS_ONE = ("needle_single", "needle_multikey", "kv_retrieval")
LENGTH = 1000
FACT = re.compile(r"The access number of (\w+ \w+) is (\d{7})\.")


def build(name, tokenizer, **metadata):
    return list(KINDS[name](tokenizer=tokenizer, **{"length": LENGTH, "documents": 7, **metadata})["test"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [400, LENGTH, 5000])
def test_a_prompt_is_the_longest_that_fits(name, length, tiny_tokenizer):
    """One part more, a sentence or a pair, would be too long; parts of the manual have up to some hundred tokens."""
    for doc in build(name, tiny_tokenizer, length=length, documents=3):
        assert doc["n_tokens"] == len(tiny_tokenizer(doc["input"])["input_ids"])
        assert length - 400 < doc["n_tokens"] <= length
        assert doc["length"] == length


def test_the_search_finds_the_most_parts_from_any_guess():
    sizes = [random.Random(7).randrange(1, 300) for _ in range(200)]
    for length in (40, 41, 500, 7000):
        most = max(n for n in range(201) if 40 + sum(sizes[:n]) <= length)
        for guess in (1, 2, 50, 5000):
            found = needles._largest(lambda n: 40 + sum(sizes[:n]) + max(0, n - 200), length, guess, "")
            assert found == (most, 40 + sum(sizes[:most]))


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_gives_the_same_facts_at_every_length(name, tiny_tokenizer):
    asked = [
        [(doc["answers"], doc.get("depth_target"), doc["input"].splitlines()[-1]) for doc in docs]
        for docs in (build(name, tiny_tokenizer), build(name, tiny_tokenizer, length=3000))
    ]
    assert asked[0] == asked[1]
    other = build(name, tiny_tokenizer, seed=1)
    assert all(doc["answers"] != answers for doc, (answers, *_) in zip(other, asked[0], strict=True))


@pytest.mark.parametrize("name", ASKS_ONE)
def test_the_fact_that_is_asked_for_lies_at_its_depth(name, tiny_tokenizer):
    docs = build(name, tiny_tokenizer, length=6000)
    assert sorted(doc["depth_target"] for doc in docs) == [i / 6 for i in range(7)]
    for doc in docs:
        (answer,) = doc["answers"]
        assert doc["key"] == answer
        assert doc["input"].count(answer) == 1
        before = doc["input"].index(answer)
        assert abs(before / len(doc["input"]) - doc["depth_target"]) < 0.08
        assert abs(doc["depth"] - doc["depth_target"]) < 0.12


@pytest.mark.parametrize(("name", "names"), [("single", 1), ("multikey", 4), ("multivalue", 1), ("multiquery", 4)])
def test_needles_are_what_their_kind_says(name, names, tiny_tokenizer):
    for doc in build(f"needle_{name}", tiny_tokenizer):
        *_, question = doc["input"].splitlines()
        facts = FACT.findall(doc["input"])
        assert len(facts) == (1 if name == "single" else 4)
        assert len({one for one, _ in facts}) == names
        asked = [number for one, number in facts if one in question]
        assert sorted(asked) == sorted(doc["answers"])
        assert question.endswith((" is", " are"))


def test_a_chain_leads_from_the_value_to_every_variable(tiny_tokenizer):
    for doc in build("variable_tracking", tiny_tokenizer):
        names, value = doc["answers"], re.findall(r"the value (\d+)", doc["input"])[0]
        links = re.findall(r"Variable (\w+) is set to (?:variable )?(\w+)\.", doc["input"])
        assert links == list(zip(names, [value, *names], strict=False))
        assert len(set(names)) == 5


def test_a_json_object_is_one_and_has_the_pair(tiny_tokenizer):
    for doc in build("kv_retrieval", tiny_tokenizer, length=3000):
        text, _, question = doc["input"].partition("{")[2].rpartition("}")
        key = re.findall(r'key "(.*?)"', question)[0]
        pairs = json.loads("{" + text + "}")
        assert [pairs[key]] == doc["answers"]
        assert len(pairs) > 10


@pytest.mark.parametrize("name", ["needle_single", "kv_retrieval"])
def test_documents_share_what_comes_before_their_fact(name, tiny_tokenizer):
    first, second = build(name, tiny_tokenizer, documents=2, depths=1)
    same = next(i for i, (a, b) in enumerate(zip(first["input"], second["input"], strict=False)) if a != b)
    assert 0.3 < same / len(first["input"]) < 0.7


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_the_authors(name, tiny_tokenizer):
    """RULER's string match; for one value of a JSON object, InfiniteBench's match of whole words gives the same."""
    rng = random.Random(name)
    for doc in build(name, tiny_tokenizer):
        right = doc["answers"]
        for count in range(len(right) + 1):
            words = [*rng.sample(right, count), "1234567", "nothing"]
            rng.shuffle(words)
            answer = " " + rng.choice([", ", "\n", '", "', " and "]).join(words).swapcase()
            found = needles.score(doc, [answer])["acc"]
            assert found == count / len(right)
            assert found == string_match_all(postprocess_pred([answer]), [right])
            if name == "kv_retrieval":
                expected = {"answer": right, "context": "", "input": ""}
                assert found == process_results_kv(expected, [answer.lower()])["score"]


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"length": None}, "needle_single length=None: a whole number from 1 up is needed"),
        ({"documents": 0}, "needle_single documents=0: a whole number from 1 up is needed"),
        ({"documents": 2, "depths": 3}, "needle_single depths=3: at most one depth a document, and documents=2"),
        ({"seed": "a"}, "needle_single seed='a': a whole number is needed"),
        ({"length": 20}, r"needle_single length=20 is too short for its own prompt: the shortest possible is \d+"),
    ],
)
def test_bad_metadata_is_refused_in_one_line(metadata, line, tiny_tokenizer):
    with pytest.raises(UsageError, match=line):
        build("needle_single", tiny_tokenizer, **metadata)
