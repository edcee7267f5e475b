"""Files of the right shape that hold anything: `load` never raises, and what it gives can be shown."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lminf_eval.report.export import tidy_csv
from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.repro_command import reproduction_command
from lminf_eval.report.sample_store import SampleStore
from lminf_eval.report.samples import SamplesError, read_samples

TOLD = ["4096", "4k", "0k", "NaN", "-1", "CUSTOM", "lminf", "False", "set by n_local", "passkey_4k", "both", "a=1,b=2"]
TASKS = ["passkey_4k", "niah_single_1", "babilong_qa1", "both"]
METRICS = ["acc", "acc_stderr", "4096", "8192", "16384_stderr", "bypass", "alias", "token_perplexity", "score"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.sampled_from([-1.0, 10**400, -(10**400), 1e308, 8192])
    | st.floats()
    | st.sampled_from(TOLD)
    | st.text(st.characters(), max_size=5)
)
ANY = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
NUMBERS = st.floats() | st.sampled_from([-1, -1.0, None, "NaN"])


def tables(names, values, **options):
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=4), values, **options)


def entries(*names, values=ANY):
    """A table with some of `names`, or now and then anything else."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, values)) | ANY


def of_tasks(values):
    return tables(TASKS, values | ANY, max_size=4) | ANY


METADATA = entries("length", "max_seq_lengths", "documents", "version", "pretrained")
CONFIG = entries(
    "metadata", "num_fewshot", "output_type", "generation_kwargs", "dataset_path", "custom_dataset", "process_docs"
)
LMINF = entries(
    "attention", "n_local", "n_local_from", "top_k", "top_k_distance", "rope", "model_args", "trained_length"
)
RUN = {
    **dict.fromkeys(["model", "model_args", "model_dtype", "model_sha", "model_revision", "limit", "gen_kwargs"], ANY),
    **dict.fromkeys(["random_seed", "fewshot_seed", "num_fewshot", "device"], ANY),
    "lminf": LMINF,
}
REST = [
    "date",
    "model_source",
    "model_name",
    "chat_template",
    "chat_template_sha",
    "fewshot_as_multiturn",
    "max_length",
]
SCORES = tables(
    [f"{metric}{end}" for metric in METRICS for end in (",none", "")], NUMBERS | LEAVES, min_size=1, max_size=6
)
FILES = st.fixed_dictionaries(
    {"results": tables(TASKS, SCORES | ANY, min_size=1, max_size=4)},
    optional={
        "config": st.fixed_dictionaries({}, optional=RUN),
        "configs": tables(TASKS, st.fixed_dictionaries({"metadata": METADATA}) | CONFIG, max_size=4),
        "group_subtasks": tables(TASKS, st.lists(st.sampled_from(TASKS), max_size=3) | ANY, max_size=4),
        "n-samples": of_tasks(entries("original", "effective", values=NUMBERS)),
        **dict.fromkeys(["versions", "n-shot", "higher_is_better", "task_hashes"], of_tasks(ANY)),
        **dict.fromkeys(REST, ANY),
    },
)
DOC = entries("max_length", "depth", "depth_target", "key", "boundaries")
NAMES = st.lists(st.sampled_from(METRICS) | ANY, max_size=3)
SAID = {"filter": st.just("none") | ANY, "resps": ANY, "filtered_resps": ANY}
SAMPLE = st.fixed_dictionaries(
    {"doc_id": st.integers(0, 3) | ANY, "doc": DOC},
    optional={
        "metrics": NAMES | ANY,
        **dict.fromkeys(METRICS, NUMBERS | ANY),
        **SAID,
    },
)
EACH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)


@pytest.fixture
def good(lm_eval_files, make_passkeys):
    """A file that can be read, so that there is always a result."""
    return lm_eval_files.write({"good": make_passkeys([1, 0])}, samples=False)


@EACH
@given(FILES, st.lists(SAMPLE, max_size=3))
def test_any_file_is_read_or_listed_and_what_is_read_can_be_shown(good, tmp_path, raw, samples):
    file = tmp_path / "results_2026-02-02T00-00-00.000001.json"
    file.write_text(json.dumps(raw))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "samples_niah_single_1_2026-02-02T00-00-00.000001.jsonl").write_text(lines)
    collection = load_results([file, good])
    assert "good" in set(collection.results["task"])
    chosen = select_metrics(collection.results)
    assert len(pivot(SampleStore(collection), chosen).cells) == len(chosen)
    assert tidy_csv(collection.results).count("\n") == len(collection.results) + 1
    for run in collection.runs.values():
        assert reproduction_command(run.raw, True)


@EACH
@given(st.lists(SAMPLE | ANY, max_size=4))
def test_samples_of_any_kind_are_read_or_refused(tmp_path, samples):
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with contextlib.suppress(SamplesError):
        assert len(read_samples(file)) == len(samples)
