"""The passkey task: exact size, spread depths, first-number scoring, and clear words for bad metadata."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lminf_eval.errors import UsageError
from lminf_eval.tasks import passkey, task_metadata

LENGTH = 2048


def encode(tokenizer, doc):
    return tokenizer(passkey.prompt(doc))["input_ids"]


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_tokenizer):
    """The tiny tokenizer, but one that puts <s> before every text, as Llama's do."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tiny_tokenizer.bos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def merging_tokenizer():
    """Byte pairs merged across sentences and lines, so that no sentence has a fixed cost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("n", "."), (".", "Ġ"), (".Ġ", "T"), (".", "Ċ"), (".Ċ", "T"), ("Ġ", "T")]
    vocab = {piece: i for i, piece in enumerate(alphabet + ["".join(pair) for pair in pairs])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")


@pytest.mark.parametrize("name", ["tiny_tokenizer", "bos_tokenizer", "merging_tokenizer"])
@pytest.mark.parametrize("length", [513, LENGTH, 8192])
def test_prompt_is_within_one_sentence_below_the_length(request, name, length):
    tokenizer = request.getfixturevalue(name)
    docs = passkey.build(tokenizer=tokenizer, length=length, documents=7)["test"]
    for doc in docs:
        assert doc["n_tokens"] == len(encode(tokenizer, doc)) <= length
        total = doc["before"] + doc["after"] + 1
        before = int(doc["depth_target"] * total + 0.5)
        assert len(encode(tokenizer, {**doc, "before": before, "after": total - before})) > length


def test_add_bos_token_false_leaves_the_special_token_out(bos_tokenizer):
    (doc,) = passkey.build(tokenizer=bos_tokenizer, length=LENGTH, documents=1, add_bos_token=False)["test"]
    assert doc["n_tokens"] == len(bos_tokenizer(passkey.prompt(doc), add_special_tokens=False)["input_ids"])


def test_depth_is_the_place_of_the_key_in_tokens(bos_tokenizer):
    for doc in passkey.build(tokenizer=bos_tokenizer, length=LENGTH, documents=5)["test"]:
        head = passkey.prompt(doc).partition("\nThe pass key is")[0]
        assert doc["depth"] == pytest.approx(len(bos_tokenizer(head)["input_ids"]) / doc["n_tokens"], abs=1 / LENGTH)


def test_prompt_text(tiny_tokenizer):
    assert passkey.prompt({"key": "12345", "before": 6, "after": 2}) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        "The grass is green.\n"
        "The pass key is 12345. Remember it. 12345 is the pass key.\n"
        "The grass is green. The sky is blue.\n"
        "What is the pass key? The pass key is"
    )


def test_same_keys_and_depths_at_every_length_and_more_documents_only_add(tiny_tokenizer):
    def drawn(**metadata):
        docs = passkey.build(tokenizer=tiny_tokenizer, depths=4, **metadata)["test"]
        return [(doc["key"], doc["depth_target"]) for doc in docs]

    base = drawn(length=1024, documents=8, seed=3)
    assert drawn(length=4096, documents=8, seed=3) == base
    assert drawn(length=1024, documents=12, seed=3)[:8] == base
    assert [key for key, _ in drawn(length=1024, documents=8, seed=4)] != [key for key, _ in base]
    assert all(10_000 <= int(key) <= 99_999 for key, _ in base)
    assert [depth for _, depth in base] == [0, 2 / 3, 1 / 3, 1] * 2


@pytest.mark.parametrize("count", [2, 5, 16, 20])
def test_every_beginning_of_the_depths_is_spread(count):
    depths = task_metadata.spread_depths(count)
    assert sorted(depths) == pytest.approx([i / (count - 1) for i in range(count)])
    for taken in range(2, count + 1):
        points = sorted(depths[:taken])
        gaps = [b - a for a, b in zip(points, [*points[1:], 1.0], strict=True)]
        assert max(points[0], *gaps) <= 2 / taken + 1 / (count - 1)


def test_one_depth_is_the_middle():
    assert task_metadata.spread_depths(1) == [0.5]


@pytest.mark.parametrize(
    ("answer", "acc"),
    [
        (" 12345.", 1),
        ("12345", 1),
        (" 12345. Remember it. 54321", 1),
        ("The pass key is\n12345", 1),
        (" 123456", 0),
        (" 54321 or 12345", 0),
        ("The 5-digit pass key is 12345.", 1),
        ("12,345", 1),
        ("It is 12 345, or so", 1),
        ("12,345,678", 0),
        ("1 2 3 4 5", 0),
        ("2 of 12345", 1),
        (" 1234", 0),
        (" no number", 0),
        ("", 0),
    ],
)
def test_the_first_number_of_five_digits_counts(answer, acc):
    assert passkey.score({"key": "12345"}, [answer]) == {"acc": acc}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"length": "4k"}, "length='4k'"),
        ({"length": 4096.0}, "length=4096.0"),
        ({}, "length=None"),
        ({"length": 4096, "documents": 0}, "documents=0"),
        ({"length": 4096, "documents": True}, "documents=True"),
        ({"length": 4096, "depths": -1}, "depths=-1"),
        ({"length": 4096, "documents": 4, "depths": 5}, "depths=5"),
        ({"length": 4096, "seed": "x"}, "seed='x'"),
    ],
)
def test_bad_metadata_is_named(tiny_tokenizer, metadata, message):
    with pytest.raises(UsageError, match=message):
        passkey.build(tokenizer=tiny_tokenizer, **metadata)


def test_too_short_names_the_shortest_and_the_shortest_works(tiny_tokenizer):
    with pytest.raises(UsageError, match=r"length=20 .* shortest possible is \d+") as refused:
        passkey.build(tokenizer=tiny_tokenizer, length=20)
    shortest = int(str(refused.value).rsplit(" ", 1)[1])
    docs = passkey.build(tokenizer=tiny_tokenizer, length=shortest)["test"]
    assert max(docs["n_tokens"]) == shortest
    with pytest.raises(UsageError, match="too short"):
        passkey.build(tokenizer=tiny_tokenizer, length=shortest - 1)


def test_no_tokenizer_says_what_to_pass():
    with pytest.raises(UsageError, match="--metadata"):
        passkey.build(length=4096, model="gpt-4o")


def test_absent_tokenizer_is_named(tmp_path):
    with pytest.raises(UsageError, match="nothing-here"):
        passkey.build(length=4096, pretrained=str(tmp_path / "nothing-here"))


def test_tokenizer_that_encodes_to_nothing_is_refused(tmp_path):
    backend = Tokenizer(models.BPE())
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="to no tokens"):
        passkey.build(length=4096, tokenizer=str(tmp_path))
