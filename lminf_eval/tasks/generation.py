"""Long texts to continue: what a model writes after a beginning, compared with what stands there.

Source: LM-Infinite (Han et al. 2023, arXiv 2308.16137, section 4.3, table 3), which continues ArXiv papers and
OpenWebText2 pages by 100 tokens, and gives BLEU and ROUGE.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from datasets import Dataset

from lminf_eval.tasks import corpora
from lminf_eval.tasks.documents import cut_texts, read_length
from lminf_eval.tasks.task_metadata import CONTINUATION


def pydocs(**metadata: Any) -> dict[str, Dataset]:
    """Return beginnings of the reference manual that every CPython carries (see `_build`)."""
    return _build("pydocs", metadata)


def arxiv(**metadata: Any) -> dict[str, Dataset]:
    """Return beginnings of ArXiv papers (see `_build`)."""
    return _build("arxiv", metadata)


def openwebtext2(**metadata: Any) -> dict[str, Dataset]:
    """Return beginnings of OpenWebText2 pages (see `_build`)."""
    return _build("openwebtext2", metadata)


def _build(corpus: str, metadata: dict[str, Any]) -> dict[str, Dataset]:
    """Build the documents of a task, for lm-eval's `custom_dataset`: every text that is long enough.

    Metadata: `length`, tokens of the beginning; `data_files` and `text_column`; and the model arguments that name the
    tokenizer.

    A document has `input`, its beginning, and `reference`, the text of the next 100 tokens; `length`, the target, and
    `n_tokens`, the beginning's number of tokens, at most a few below it (see `documents.cut_documents`); `source`.

    Raises:
        UsageError: the length is out of range, or no text reaches it.
    """
    length = read_length(corpus, metadata)
    docs = []
    for doc in cut_texts(corpus, corpora.texts(corpus, metadata), metadata, length + CONTINUATION, {length}):
        text, (n_tokens, *_), (cut, *_) = doc.pop("text"), doc.pop("boundaries"), doc.pop("cuts")
        docs.append({**doc, "input": text[:cut], "reference": text[cut:], "length": length, "n_tokens": n_tokens})
        del docs[-1]["n_bytes"]
    return {"test": Dataset.from_list([doc for doc in docs if doc["reference"]])}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return `bleu`, the pair of texts from which lm-eval computes BLEU over all documents, and `rouge_l`.

    `rouge_l` is 100 times the F-measure of the longest common subsequence of words (Lin 2004).
    """
    (found,) = _rouge().score(doc["reference"], results[0]).values()
    return {"bleu": (doc["reference"], results[0]), "rouge_l": 100 * found.fmeasure}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, which tasks without it need not wait

    return RougeScorer(["rougeL"])
