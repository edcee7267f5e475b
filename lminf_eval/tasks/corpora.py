"""The corpora of the perplexity and generation tasks: where each one's texts come from.

Each corpus's function is a `custom_dataset` of lm-eval. It takes the task's metadata and returns the documents of
`documents.cut_documents`; `data_files` in the metadata (see `data_files.read_texts`) replaces the corpus's own source.
"""

import hashlib
import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from lminf_eval.errors import UsageError, first_line
from lminf_eval.paths import cache_home
from lminf_eval.tasks.data_files import read_rows, read_texts
from lminf_eval.tasks.documents import Text, cut_documents
from lminf_eval.utils.atomic_write import atomic_path

logger = logging.getLogger(f"lm_eval.{__name__}")  # under lm-eval's own, which shows it

PG19_REPO = "emozilla/pg19-test"
PILE_REPO, PILE_FILE = "mit-han-lab/pile-val-backup", "val.jsonl.zst"
PILE_SETS = ("ArXiv", "OpenWebText2")


def pydocs(**metadata: Any) -> dict[str, Dataset]:
    """Return the reference manual's topics that every CPython carries, as four documents.

    Document d is the whole circle of topics begun a d-th quarter round, so each is as long as the whole text. The text
    is that of the running Python; the documents record its version and the text's SHA-256.
    """
    return cut_documents("pydocs", texts("pydocs", metadata), metadata)


def pg19(**metadata: Any) -> dict[str, Dataset]:
    """Return PG-19's test set: 100 books from Project Gutenberg (Rae et al. 2019, arXiv 1911.05507)."""
    return cut_documents("pg19", texts("pg19", metadata), metadata)


def arxiv(**metadata: Any) -> dict[str, Dataset]:
    """Return ArXiv papers in the Pile's validation set (Gao et al. 2020, arXiv 2101.00027)."""
    return cut_documents("arxiv", texts("arxiv", metadata), metadata)


def openwebtext2(**metadata: Any) -> dict[str, Dataset]:
    """Return OpenWebText2 pages in the Pile's validation set (Gao et al. 2020, arXiv 2101.00027)."""
    return cut_documents("openwebtext2", texts("openwebtext2", metadata), metadata)


def texts(corpus: str, metadata: dict[str, Any]) -> Iterator[Text]:
    """Return the texts of a corpus, or those of `data_files` in its place.

    Raises:
        UsageError: if they cannot be read.
    """
    pile_set = next((name for name in PILE_SETS if name.lower() == corpus), None)
    if metadata.get("data_files") is not None:
        local = read_texts(metadata["data_files"], metadata.get("text_column", "text"), pile_set)
        return (({"source": where}, text) for where, text in local)
    if pile_set:
        return _pile(pile_set)
    return _pg19() if corpus == "pg19" else _python_topics()


def pile_subset(name: str) -> Path:
    """Return the cached parquet file of one of `PILE_SETS`; the first call makes all of them in one pass over the Pile.

    Raises:
        UsageError: if the Pile's validation file cannot be downloaded.
    """
    folder = cache_home() / "pile-val"
    wanted = folder / f"{name}.parquet"
    if wanted.exists():
        return wanted
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not wanted.exists():
            try:
                source = hf_hub_download(PILE_REPO, PILE_FILE, repo_type="dataset")
            except (OSError, HfHubHTTPError) as error:
                raise _unreachable(PILE_REPO, error) from error
            _filter_pile(Path(source), folder)
    return wanted


def _filter_pile(source: Path, folder: Path) -> None:
    """Split the Pile's file into `folder`/NAME.parquet for each of `PILE_SETS`, which appear only when complete.

    The caller holds the folder's lock.
    """
    logger.info("Reading %s once for %s", source, ", ".join(PILE_SETS))
    schema = pa.schema([("text", pa.large_string())])
    pending: dict[str, list[str]] = {name: [] for name in PILE_SETS}
    with ExitStack() as files:
        partial = {
            name: files.enter_context(atomic_path(folder / f"{name}.parquet", exclusive=True)) for name in PILE_SETS
        }
        writers = {name: pq.ParquetWriter(path, schema) for name, path in partial.items()}
        for text, name in read_rows(source, "text"):
            if text is not None and name in pending:
                pending[name].append(text)
                if len(pending[name]) == 256:
                    writers[name].write_table(pa.table({"text": pending[name]}, schema=schema))
                    pending[name].clear()
        for name, writer in writers.items():
            writer.write_table(pa.table({"text": pending[name]}, schema=schema))
            writer.close()


def _python_topics() -> Iterator[Text]:
    names = list(topics)
    origin = {
        "python": platform.python_version(),
        "sha256": hashlib.sha256("\n".join(topics[name] for name in names).encode()).hexdigest(),
    }
    for quarter in range(4):
        first = quarter * len(names) // 4
        turned = names[first:] + names[:first]
        yield {"source": f"pydoc_data.topics from {turned[0]!r}", **origin}, "\n".join(topics[n] for n in turned)


def _pg19() -> Iterator[Text]:
    try:
        books = load_dataset(PG19_REPO, split="test")
    except (OSError, HfHubHTTPError) as error:
        raise _unreachable(PG19_REPO, error) from error
    for number, text in enumerate(books["text"]):
        yield {"source": f"{PG19_REPO}:{number}"}, text


def _pile(name: str) -> Iterator[Text]:
    for where, text in read_texts(str(pile_subset(name))):
        yield {"source": f"{PILE_REPO} {name}:{where.rpartition(':')[2]}"}, text


def _unreachable(repo: str, error: Exception) -> UsageError:
    return UsageError(
        f"cannot get {repo} from the Hugging Face hub ({first_line(error)}); "
        'pass local data instead: --metadata \'{"data_files": "/data/*.parquet"}\''
    )
