"""lm-eval's own evaluator with `hf` and with `lminf`, side by side on tasks made here from local data."""

import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_eval import __version__

TASKS = Path(__file__).parents[2] / "tasks"
TEXT = topics["exceptions"]
SHARED = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
LAMBADA = """output_type: loglikelihood
doc_to_text: "{{text.rsplit(' ', 1)[0]}}"
doc_to_target: " {{text.rsplit(' ', 1)[1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ARC = """output_type: multiple_choice
doc_to_text: "{{passage}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GSM8K = """output_type: generate_until
fewshot_split: test
num_fewshot: 2
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: " {{label}}"
generation_kwargs: {until: ["Q:", "\\n\\n"], max_gen_toks: 12, do_sample: false}
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "(\\\\d+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
WIKITEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
KINDS = {"lambada_like": LAMBADA, "arc_like": ARC, "gsm8k_like": GSM8K, "wikitext_like": WIKITEXT}


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """A task manager that knows the four tasks of `KINDS` alone, of six documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    documents = [
        {
            "text": " ".join(words[20 * i : 20 * i + 15 + i]),
            "passage": TEXT[: 500 + 100 * (i // 3)],  # three questions share a passage
            "question": f"How many are {i} and {i}?",
            "choices": [str(2 * i), "the exception", "a", "handlers and so on"],
            "label": i % 4,
        }
        for i in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, rest in KINDS.items():
        (folder / f"{name}.yaml").write_text(SHARED.format(name=name, data=data) + rest)
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def folder(tiny_llama):
    folder = tiny_llama(max_position_embeddings=1024)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(model, folder, manager, tasks=tuple(KINDS), args=None, **kwargs):
    model_args = {"pretrained": str(folder), "dtype": "float32", **(args or {})}
    settings = {"device": "cpu", "batch_size": 2, "bootstrap_iters": 0, "task_manager": manager}
    return simple_evaluate(model, model_args=model_args, tasks=list(tasks), **settings | kwargs)


def answers(results):
    """Every task's model outputs, in the order of the documents."""
    return {name: [sample["resps"] for sample in samples] for name, samples in results["samples"].items()}


def assert_same(ours, theirs):
    """Metrics and every single answer agree to 1e-4; texts and flags exactly."""
    assert ours["results"].keys() == theirs["results"].keys()
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            found = ours["results"][name][metric]
            assert found == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (name, metric)
    flat = [[x for doc in answers(r).values() for resps in doc for resp in resps for x in resp] for r in (ours, theirs)]
    assert len(flat[0]) == len(flat[1])
    for found, expected in zip(*flat, strict=True):
        if isinstance(expected, str):
            assert found == expected
        else:
            values = zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True)
            for one, other in values:
                assert float(one) == pytest.approx(float(other), rel=1e-4)


@pytest.fixture(scope="module")
def theirs(folder, manager):
    return evaluate("hf", folder, manager)


@pytest.mark.parametrize("args", [{}, {"attention": "full"}, {"prefix_sharing": False, "chunk_size": 64}], ids=str)
def test_all_kinds_of_tasks_give_what_hf_gives(args, folder, manager, theirs):
    ours = evaluate("lminf", folder, manager, args=args)
    assert_same(ours, theirs)
    assert ours["n-shot"]["gsm8k_like"] == 2
    told = ours["config"]["lminf"]
    assert told["version"] == __version__
    assert told["attention"] == args.get("attention", "lambda")
    assert (told["tokens_reused"] > 1000) == args.get("prefix_sharing", True)  # the passages' 4 choices
    if not args:
        assert (told["n_local"], told["n_local_from"]) == (1024, "max_position_embeddings")


def test_beyond_the_window_every_document_is_read_whole(folder, manager):
    ours = evaluate("lminf", folder, manager, args={"n_local": 32, "n_global": 4})
    again = evaluate("lminf", folder, manager, args={"n_local": 32, "n_global": 4, "chunk_size": 7}, batch_size="auto")
    assert_same(ours, again)
    assert all(math.isfinite(v) for m in ours["results"].values() for v in m.values() if isinstance(v, float))


def test_chat_template_and_few_shot_turns(folder, manager):
    settings = {"tasks": ["gsm8k_like"], "apply_chat_template": True, "system_instruction": "Add.", "num_fewshot": 1}
    ours, theirs = (evaluate(model, folder, manager, **settings) for model in ("lminf", "hf"))
    assert_same(ours, theirs)
    prompt = ours["samples"]["gsm8k_like"][0]["arguments"][0][0]
    assert prompt.startswith("<system>Add.\n<user>Q: ")
    assert prompt.count("<assistant>") == 2


def test_limit_and_write_out(folder, manager, capsys, theirs):
    ours = evaluate("lminf", folder, manager, tasks=["lambada_like"], limit=2, write_out=True)
    assert [sample["doc_id"] for sample in ours["samples"]["lambada_like"]] == [0, 1]
    assert answers(ours)["lambada_like"] == [
        [[(pytest.approx(value, rel=1e-4), flag)]] for (((value, flag),),) in answers(theirs)["lambada_like"][:2]
    ]
    assert ours["n-samples"]["lambada_like"] == {"original": 6, "effective": 2}


def test_predict_only_leaves_the_answers(folder, manager, theirs):
    ours = evaluate("lminf", folder, manager, tasks=["gsm8k_like"], predict_only=True)
    assert answers(ours)["gsm8k_like"] == answers(theirs)["gsm8k_like"]
    assert "bypass,number" in ours["results"]["gsm8k_like"]


def test_without_samples_results_are_json(folder, manager, theirs):
    ours = evaluate("lminf", folder, manager, tasks=["wikitext_like"], log_samples=False)
    assert "samples" not in ours
    read = json.loads(json.dumps(ours, default=str))
    assert read["results"]["wikitext_like"]["bits_per_byte,none"] == pytest.approx(
        theirs["results"]["wikitext_like"]["bits_per_byte,none"], rel=1e-4
    )


def test_the_second_run_answers_from_the_cache_without_weights(folder, manager, tmp_path, monkeypatch):
    settings = {"use_cache": str(tmp_path / "cache")}
    first = evaluate("lminf", folder, manager, **settings)
    assert first["config"]["lminf"]["tokens_computed"] > 0

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    second = evaluate("lminf", folder, manager, **settings)
    assert second["results"] == first["results"]
    assert answers(second) == answers(first)
    assert second["config"]["lminf"]["tokens_computed"] == 0
    assert second["config"]["model_num_parameters"] == -1


def test_pydocs_perplexity_is_hfs(folder):
    settings = {"length": 900, "documents": 2, "buckets": 4}
    ours, theirs = (
        evaluate(
            model,
            folder,
            TaskManager(
                include_path=str(TASKS), include_defaults=False, metadata={"pretrained": str(folder), **settings}
            ),
            tasks=["pydocs_ppl_2k"],
        )
        for model in ("lminf", "hf")
    )
    assert_same(ours, theirs)
    for metric in ("nll", "nll_tail", "token_perplexity", "byte_perplexity", "bits_per_byte"):
        assert math.isfinite(ours["results"]["pydocs_ppl_2k"][f"{metric},none"])


@pytest.mark.slow
def test_rulers_niah_single_1_as_it_comes(tiny_llama):
    pytest.importorskip("wonderwords", reason="needs lm-eval[ruler]")
    pytest.importorskip("nltk", reason="needs lm-eval[ruler]")
    folder = tiny_llama(max_position_embeddings=512)
    ours = simple_evaluate(
        "lminf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["niah_single_1"],
        device="cpu",
        limit=2,
        bootstrap_iters=0,
        metadata={"max_seq_lengths": [4096]},
    )
    samples = ours["samples"]["niah_single_1"]
    assert [sample["doc"]["max_length"] for sample in samples] == [4096, 4096]
    lengths = [sample["doc"]["length"] for sample in samples]  # room for 128 generated tokens included
    assert all(2000 < length <= 4096 for length in lengths)
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples)
    assert 0 <= ours["results"]["niah_single_1"]["4096,none"] <= 1
    told = ours["config"]["lminf"]
    assert told["tokens_computed"] + told["tokens_reused"] > sum(lengths) - 2 * 128
