"""The one parser of token counts, and its inverse."""

import math

import pytest

from lminf_eval.utils.tokens import format_tokens, parse_tokens, split_length


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("16k", 16384), (" 2K ", 2048), ("1m", 2**20)])
def test_what_people_write(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "0k", "-4k", "4.5k", "4g", "k", "1_000", "٣", "9" * 40])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(ValueError, match="is not a number of tokens; write 4096, 16k or 1m"):
        parse_tokens(text)


@pytest.mark.parametrize(("tokens", "text"), [(4096, "4k"), (2**20, "1m"), (5000, "5000"), (math.nan, "")])
def test_how_tokens_are_printed(tokens, text):
    assert format_tokens(tokens) == text


@pytest.mark.parametrize(
    ("task", "family", "tokens"),
    [
        ("passkey_4k", "passkey", 4096),
        ("pydocs_ppl_1m", "pydocs_ppl", 2**20),
        ("babilong_qa1_0k", "babilong_qa1", 0),
        ("qa_4k_easy", "qa_4k_easy", None),
        ("_4k", "_4k", None),
        ("qa_" + "9" * 40 + "k", "qa_" + "9" * 40 + "k", None),
    ],
)
def test_lengths_in_the_names_of_tasks(task, family, tokens):
    assert split_length(task) == (family, tokens)
