"""Loading: any version's files, names and lengths, duplicates, and whatever else lies in a folder."""

import json
import math
import os

import pandas as pd
import pytest

from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.report.load import load_results
from lminf_eval.report.run_metadata import hardware, model_args, short_name
from lminf_eval.report.samples import SamplesError, metric_totals, read_samples
from lminf_eval.utils.tokens import format_tokens


def test_both_versions_of_the_format_give_the_same_rows(lm_eval_files, make_passkeys):
    for version in ("0.4.9", "0.4.13"):
        for backend, args in (("hf", {}), ("lminf", {"attention": "lambda", "n_local": "2048"})):
            args = {"pretrained": f"org/model-{version}", "dtype": "float32", **args}
            lm_eval_files.write({"passkey_4k": make_passkeys([1, 1, 0, 1])}, backend, args, version)
    results = load_results([lm_eval_files.folder]).results
    assert len(results) == 4
    apart = ["run", "model", "model_path", "lm_eval_version", "date", "file"]
    for _, pair in results.groupby("method"):
        rows = pair.drop(columns=apart).reset_index(drop=True)
        pd.testing.assert_series_equal(rows.loc[0], rows.loc[1], check_names=False)
    row = results[results["backend"] == "lminf"].iloc[0]
    assert (row["attention"], row["method"], row["n_local"]) == ("lambda", "lambda n_local=2048", 2048)
    assert (row["task"], row["family"], row["length"], row["n"], row["value"]) == (
        "passkey_4k",
        "passkey",
        4096,
        4,
        0.75,
    )
    assert (row["other"], row["dtype"], row["commit"], row["hardware"]) == (
        *("dtype=float32", "float32", "abc1234", "AMD EPYC, 2 cores"),
    )


@pytest.mark.parametrize(
    ("attention", "method"),
    [
        ("full", "full rope=linear"),
        ("window", "window n_local=64 top_k=5"),
        ("streaming", "streaming n_local=64 n_global=4 top_k=5"),
        ("rerope", "rerope n_local=64"),
        ("self_extend", "self_extend n_local=64"),
        ("dca", "dca n_local=64"),
        ("lambda", "lambda n_local=64 n_global=4 top_k=5"),
    ],
)
def test_a_method_is_named_by_the_settings_it_uses(lm_eval_files, make_passkeys, attention, method):
    settings = {"attention": attention, "n_local": "64", "n_global": "4", "top_k": "5", "rope": "linear"}
    lm_eval_files.write({"passkey_4k": make_passkeys([1])}, args={**settings, "chunk_size": "32", "batch_size": "2"})
    row = load_results([lm_eval_files.folder]).results.iloc[0]
    assert (row["method"], row["other"]) == (method, "")


@pytest.mark.parametrize("attention", ["full", "window", "streaming", "lambda"])
@pytest.mark.parametrize("setting", [{"top_k": "5"}, {"rope": "yarn", "rope_factor": "4"}])
def test_no_method_is_named_by_a_setting_that_it_refuses(lm_eval_files, make_passkeys, attention, setting):
    args = {"attention": attention, "n_local": "64", **setting}
    row = load_results([lm_eval_files.write({"passkey_4k": make_passkeys([1])}, args=args)]).results.iloc[0]
    try:
        MethodArgs.parse(args)
        refused = False
    except UsageError:
        refused = True
    assert (next(iter(setting)) in row["method"]) is not refused


def test_past_the_trained_length(lm_eval_files, make_passkeys):
    tasks = {f"passkey_{k}k": make_passkeys([1]) for k in (4, 8, 16)}
    lm_eval_files.write(tasks, "hf")
    lm_eval_files.write(tasks, "lminf", max_length=1 << 20)  # under lminf it is what the evaluation may reach
    results = load_results([lm_eval_files.folder]).results
    assert set(results["trained_length"]) == {8192}
    assert set(results.loc[results["past_trained"], "task"]) == {"passkey_16k"}
    given = load_results([lm_eval_files.folder], trained_length=4096).results
    assert set(given.loc[given["past_trained"], "task"]) == {"passkey_8k", "passkey_16k"}


@pytest.mark.parametrize(
    ("own", "trained", "n_local"),
    [
        ({"n_local": 512, "n_global": 10, "n_local_from": "max_position_embeddings"}, 512, 512),
        ({"n_local": 512, "n_global": 10, "n_local_from": "set by n_local"}, math.nan, 512),
        ({"n_local": 512, "n_global": 10, "n_local_from": "set by n_local", "trained_length": 4096}, 4096, 512),
    ],
)
def test_what_the_adapter_settled_on(lm_eval_files, make_passkeys, own, trained, n_local):
    config = {"model": "lminf", "model_args": {"pretrained": "org/model", "attention": "lambda"}, "lminf": own}
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1])}, config=config)
    row = load_results([file]).results.iloc[0]
    assert row["trained_length"] == pytest.approx(trained, nan_ok=True)
    assert (row["method"], row["n_local"], row["n_global"]) == ("lambda", n_local, 10)


def test_no_trained_length_is_no_claim(lm_eval_files, make_passkeys):
    lm_eval_files.write({"passkey_4k": make_passkeys([1])}, "lminf")
    row = load_results([lm_eval_files.folder]).results.iloc[0]
    assert math.isnan(row["trained_length"])
    assert not row["past_trained"]


def test_of_duplicates_the_newest_counts_and_a_note_tells(lm_eval_files, make_passkeys):
    old = lm_eval_files.write({"passkey_4k": make_passkeys([0, 0])})
    new = lm_eval_files.write({"passkey_4k": make_passkeys([1, 1])}, args={"chunk_size": "512"})
    other = lm_eval_files.write({"passkey_4k": make_passkeys([1, 0, 0])})  # three documents: not the same measurement
    collection = load_results([new, old, other, old])
    assert sorted(collection.results["value"]) == pytest.approx([1 / 3, 1.0])
    assert collection.notes == [f"1 result of {old} replaced by newer ones of the same measurement"]
    assert str(old) not in {str(run.file) for run in collection.runs.values()}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON, or cut off: Expecting value at line 1"),
        (b'{"results": {"a": {', "not JSON, or cut off"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"[1, 2]", "no table named results"),
        (b'{"model_type": "llama"}', "no table named results"),
        (b'{"results": []}', "no table named results"),
        (b'{"results": {}}', "holds no result"),
        (b'{"results": {"a": {"alias": "a"}}}', "holds no result"),
        (b'{"results": {"a": [1]}}', "a: not a table of metrics"),
        (b'{"results": {"a": {"acc,none": "high"}}}', "a: acc,none is not a number"),
        (b'{"results": {"a": {"acc,none": {"b": 1}}}}', "a: acc,none is not a number"),
        (b'{"results": {"a": {"acc": ' + b"[" * 300 + b"]" * 300 + b"}}}", "nested more than 100 deep"),
        (b'{"a":' * 100_000, "JSON that cannot be read: maximum recursion depth"),
        (b"9" * 5000, "JSON that cannot be read: Exceeds the limit"),
    ],
)
def test_foreign_and_broken_files_are_listed_with_the_reason(lm_eval_files, make_passkeys, content, reason):
    lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    broken = lm_eval_files.folder / "broken.json"
    broken.write_bytes(content)
    collection = load_results([lm_eval_files.folder])
    assert len(collection.results) == 1
    assert {problem.file for problem in collection.problems} == {str(broken)}
    assert reason in collection.problems[0].reason
    with pytest.raises(UsageError, match="no lm-eval result in") as told:
        load_results([broken])
    assert reason in str(told.value)


def test_answers_that_were_not_scored_are_no_result(lm_eval_files, make_passkeys):
    """As `--predict_only` writes them: a metric bypass of 999."""
    lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    unscored = {"t": {"alias": "t", "bypass,none": 999, "bypass_stderr,none": "N/A"}}
    lm_eval_files.write({"t": [{"acc": 1.0}]}, samples=False, results=unscored)
    collection = load_results([lm_eval_files.folder])
    assert list(collection.results["metric"]) == ["acc"]
    assert [problem.reason for problem in collection.problems] == [
        "holds no result: its answers were not scored (--predict_only)"
    ]


def test_many_files_of_one_name_and_reason_are_told_once(lm_eval_files, make_passkeys):
    lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    for folder in "abc":
        (lm_eval_files.folder / folder).mkdir()
        (lm_eval_files.folder / folder / "done.json").write_text("{}")
    problems = load_results([lm_eval_files.folder]).problems
    assert [problem.file for problem in problems] == [str(lm_eval_files.folder / "a" / "done.json")]
    assert problems[0].reason.endswith("(and 2 more of that name)")


WRONG = [None, 7, -1.5, "text", "", [], [[]], {}, {"a": {"b": None}}, True, 10**400]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_an_entry_of_any_wrong_type_breaks_nothing(lm_eval_files, make_passkeys, value):
    names = json.loads(lm_eval_files.write({"passkey_4k": make_passkeys([1, 0])}).read_text()).keys()
    for name in names - {"results"}:
        file = lm_eval_files.write({"passkey_4k": make_passkeys([1, 0])}, **{name: value})
        results = load_results([file]).results
        assert list(results["value"]) == [0.5], name
    for inner in ("config", "configs", "versions", "n-samples", "higher_is_better", "n-shot"):
        key = "model_args" if inner == "config" else "passkey_4k"
        file = lm_eval_files.write({"passkey_4k": make_passkeys([1, 0])}, **{inner: {key: value}})
        assert list(load_results([file]).results["value"]) == [0.5], inner


def test_nan_and_infinity_however_they_are_written(lm_eval_files):
    written = {"a,none": None, "b,none": "NaN", "c,none": math.nan, "d,none": math.inf, "token_perplexity,none": 1e4}
    file = lm_eval_files.write({"passkey_4k": [{"acc": 1.0}]}, results={"t": {**written, "e,none": True}})
    found = dict(load_results([file]).results.set_index("metric")["diverged"])
    assert found == {"a": "NaN", "b": "NaN", "c": "NaN", "d": "inf", "token_perplexity": ">1000", "e": ""}


def test_keys_of_before_filters(lm_eval_files):
    file = lm_eval_files.write({"t": [{"acc": 1.0}]}, results={"t": {"acc": 0.5, "acc_stderr": 0.1}})
    row = load_results([file]).results.iloc[0]
    assert (row["metric"], row["filter"], row["value"], row["stderr"]) == ("acc", "none", 0.5, 0.1)


@pytest.mark.parametrize("length", [math.inf, -5, 0, None, "long"])
def test_a_length_that_is_none_leaves_the_one_in_the_name(lm_eval_files, make_passkeys, length):
    configs = {"passkey_4k": {"metadata": {"length": length}}}
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1])}, configs=configs)
    assert load_results([file]).results.iloc[0]["length"] == 4096


def test_groups_count_the_documents_of_their_tasks(lm_eval_files):
    file = lm_eval_files.write(
        {"a": [{"acc": 1.0}] * 3, "b": [{"acc": 0.0}] * 5},
        version="0.4.9",
        results={"both": {"acc,none": 0.375, "alias": "both"}},
        group_subtasks={"both": ["a", "b"]},
    )
    assert load_results([file]).results.iloc[0]["n"] == 8


def test_groups_of_each_other_are_read(lm_eval_files):
    parts = {"both": ["a", "other"], "other": ["both"]}
    file = lm_eval_files.write({"a": [{"acc": 1.0}] * 3}, results={"both": {"acc,none": 0.5}}, group_subtasks=parts)
    assert load_results([file]).results.iloc[0]["n"] == 3


def test_samples_without_their_results_are_listed(lm_eval_files, make_passkeys):
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    file.unlink()
    collection = load_results([lm_eval_files.folder])
    assert [problem.reason.partition(":")[0] for problem in collection.problems] == [
        "samples without their results file"
    ]
    assert file.name.removeprefix("results") in collection.problems[0].file.replace("samples_passkey_4k", "")


def test_results_renamed_by_hand_keep_their_samples(lm_eval_files, make_passkeys):
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    renamed = file.rename(file.with_name("best.json"))
    assert list(load_results([renamed]).runs["run1"].samples) == ["passkey_4k"]


def test_a_file_name_need_not_be_text(lm_eval_files, make_passkeys):
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1])})
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/\xff.json"))
    (file.parent / os.fsdecode(b"\xfe.json")).write_text("{}")
    collection = load_results([lm_eval_files.folder])
    assert collection.results["file"].iloc[0].endswith("/\ufffd.json")
    assert collection.problems[0].file.endswith("/\ufffd.json")


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        load_results([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="no lm-eval result in"):
        load_results([tmp_path])


def test_samples_keep_what_is_used_and_not_the_prompt(lm_eval_files, make_texts):
    file = lm_eval_files.write({"pydocs_ppl_2k": make_texts([[3.0, 2.0], [3.5, 2.5]])})
    samples = read_samples(load_results([file]).runs["run1"].samples["pydocs_ppl_2k"])
    assert samples["boundaries"].iloc[1] == [1024, 2048]
    assert samples["loglikelihoods"].iloc[1] == [-3584.0, -6144.0]
    assert "prompt" not in samples.to_json()
    found = metric_totals(samples, "token_perplexity")
    assert found["total"].tolist() == [-5120.0, -6144.0]
    assert found["weight"].tolist() == [2048.0, 2048.0]
    assert metric_totals(samples, "absent").empty


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no sample"),
        (b'{"doc_id": 0', "not JSON lines, or cut off"),
        (b"[1]\n", "not samples of lm-eval"),
        (b'{"no_id": 0}\n', "not samples of lm-eval"),
        (b"\xff\n", "not samples of lm-eval"),
    ],
)
def test_broken_samples_tell_the_reason(tmp_path, content, reason):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(content)
    with pytest.raises(SamplesError, match=reason):
        read_samples(file)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pretrained=a/b,dtype=float32", {"pretrained": "a/b", "dtype": "float32"}),
        ("pretrained=a,stop=[1,2],x=3", {"pretrained": "a", "stop": "[1,2]", "x": "3"}),
        ('{"pretrained": "a", "n": 3}', {"pretrained": "a", "n": "3"}),
        ({"pretrained": "a", "n": 3}, {"pretrained": "a", "n": "3"}),
        ("pretrained=a,token=hf_x", {"pretrained": "a", "token": "hidden"}),
        ({"pretrained": "a", "api_key": "x"}, {"pretrained": "a", "api_key": "hidden"}),
        ({"use_auth_token": "x", "my_secret": "x"}, {"use_auth_token": "hidden", "my_secret": "hidden"}),
        ("add_bos_token=True,think_end_token=x", {"add_bos_token": "True", "think_end_token": "x"}),  # no secrets
        ("", {}),
        ("{broken", {}),
        (None, {}),
    ],
)
def test_model_args(given, expected):
    assert model_args(given) == expected


def test_names_of_things():
    assert [format_tokens(n) for n in (4096, 1 << 20, 3 << 20, 5000, 512, math.nan)] == [
        "4k",
        "1m",
        "3m",
        "5000",
        "512",
        "",
    ]
    assert [short_name(p) for p in ("org/model", "/data/m", "./m/", "C:\\m\\n", "/")] == [
        "org/model",
        "m",
        "m",
        "n",
        "/",
    ]
    two = "GPU models and configuration: \nGPU 0: NVIDIA H100\nGPU 1: NVIDIA H100\n\nNvidia driver version: 1"
    assert hardware(two) == "2 x NVIDIA H100"
    assert hardware("GPU models and configuration: GPU 0: NVIDIA A100\n") == "1 x NVIDIA A100"
    assert hardware("GPU models and configuration: Could not collect\n") == ""
