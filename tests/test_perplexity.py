"""Perplexity metrics: against the model's own logits, weighted by tokens, with a bootstrap error; what is logged."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.metrics import stderr_for_metric
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_eval.tasks import perplexity

TASKS = Path(__file__).parents[1] / "tasks"
LENGTH = 200


@pytest.fixture(scope="module")
def model_dir(tiny_llama):
    return str(tiny_llama(max_position_embeddings=512))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap starts a pool of processes otherwise


def evaluate(model_dir, tasks="pydocs_ppl_2k", limit=None, **metadata):
    """Results of lm-eval's own `hf` on a task of ours, the samples after a trip through JSON."""
    arguments = {"pretrained": model_dir, "dtype": "float32"}
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"length": LENGTH, **arguments, **metadata}
    )
    results = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[tasks],
        task_manager=manager,
        device="cpu",
        limit=limit,
        bootstrap_iters=1000,
        log_samples=True,
    )
    samples = json.loads(json.dumps(results["samples"][tasks], default=handle_non_serializable))
    return results["results"][tasks], samples


@pytest.fixture(scope="module")
def evaluated(model_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        return evaluate(model_dir)


@torch.no_grad()
def token_nlls(model_dir, text):
    """Nats [n] that each token of the text costs, the first one after the start token: straight from the logits."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
    return -logprobs.gather(-1, ids[0, 1:, None])[:, 0].double().numpy()


def test_metrics_equal_those_of_the_logits(model_dir, evaluated):
    results, samples = evaluated
    nlls = [token_nlls(model_dir, sample["doc"]["text"]) for sample in samples]
    assert [len(one) for one in nlls] == [sample["doc"]["n_tokens"] for sample in samples]
    nll = np.concatenate(nlls).mean()
    heads = [max(b for b in s["doc"]["boundaries"] if b <= LENGTH * 7 // 8) for s in samples]
    tail = np.concatenate([one[head:] for one, head in zip(nlls, heads, strict=True)]).mean()
    per_byte = np.concatenate(nlls).sum() / sum(len(s["doc"]["text"].encode()) for s in samples)
    assert results["nll,none"] == pytest.approx(nll, rel=1e-5)
    assert results["nll_tail,none"] == pytest.approx(tail, rel=1e-4)
    assert results["token_perplexity,none"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(per_byte), rel=1e-4)
    assert results["bits_per_byte,none"] == pytest.approx(per_byte / math.log(2), rel=1e-5)


def test_the_curve_comes_out_of_the_samples(model_dir, evaluated):
    _, samples = evaluated
    for sample in samples:
        nlls = token_nlls(model_dir, sample["doc"]["text"])
        values = [-float(value) for value in sample["filtered_resps"]]
        assert values == pytest.approx([nlls[:boundary].sum() for boundary in sample["doc"]["boundaries"]], rel=1e-5)
        assert len(values) == 16
        prefixes = [argument[0] for argument in sample["arguments"]]
        assert prefixes == [sample["doc"]["text"][:cut] for cut in sample["doc"]["cuts"]]


def test_a_standard_error_for_every_metric(evaluated):
    results, samples = evaluated
    shares = np.array([sample["nll"] for sample in samples])
    picks = np.random.default_rng(0).integers(len(shares), size=(20_000, len(shares)))
    sums = shares[picks].sum(axis=1)
    assert results["nll_stderr,none"] == pytest.approx((-sums[:, 0] / sums[:, 1]).std(), rel=0.1)
    for metric in ("token_perplexity", "nll_tail", "byte_perplexity", "bits_per_byte"):
        assert 0 < results[f"{metric}_stderr,none"] < results[f"{metric},none"]


def test_one_bucket_and_one_document(model_dir):
    results, (sample,) = evaluate(model_dir, buckets=1, limit=1)
    assert sample["doc"]["boundaries"] == [sample["doc"]["n_tokens"]]
    assert len(sample["resps"]) == 1
    assert "nll_tail,none" not in results
    assert results["nll,none"] == pytest.approx(token_nlls(model_dir, sample["doc"]["text"]).mean(), rel=1e-5)
    assert results["nll_stderr,none"] == "N/A"


def test_a_tokenizer_that_adds_bos_is_counted_as_it_is_scored(model_dir, tmp_path):
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path)
    results, (sample,) = evaluate(str(tmp_path), limit=1)
    nlls = token_nlls(str(tmp_path), sample["doc"]["text"])
    assert len(nlls) == sample["doc"]["n_tokens"]
    assert results["nll,none"] == pytest.approx(nlls.mean(), rel=1e-5)


def test_documents_weigh_by_their_tokens():
    shares = [(-10.0, 10), (-90.0, 30)]
    assert perplexity.nll(shares) == 2.5
    assert perplexity.token_perplexity(shares) == pytest.approx(math.exp(2.5))
    assert perplexity.byte_perplexity(shares) == pytest.approx(math.exp(2.5))
    assert perplexity.bits_per_byte(shares) == pytest.approx(2.5 / math.log(2))


def test_perplexity_beyond_floats_is_infinite():
    assert perplexity.token_perplexity([(-1e6, 10)]) == math.inf


@pytest.mark.parametrize("name", ["token_perplexity", "nll", "nll_tail", "byte_perplexity", "bits_per_byte"])
def test_nan_stays_nan(name):
    assert math.isnan(getattr(perplexity, name)([(-10.0, 10), (math.nan, 10)]))


def test_lm_eval_bootstraps_our_aggregations_and_prints_their_name(capsys):
    stderr = stderr_for_metric(perplexity.nll, bootstrap_iters=1000)
    assert stderr([(-10.0, 10), (-20.0, 10), (-30.0, 10)]) == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert "nll" in capsys.readouterr().out
    assert perplexity.nll != perplexity.nll_tail


def doc(**changes):
    return {"source": "book:3", "length": 64, "n_tokens": 63, "n_bytes": 200, "boundaries": [31, 55, 63], **changes}


def test_tail_begins_at_the_last_boundary_not_beyond_seven_eighths():
    assert perplexity.metric_contributions(doc(), [-30.0, -50.0, -70.0])["nll_tail"] == (-20.0, 8)
    early = perplexity.metric_contributions(doc(boundaries=[31, 54, 63]), [-30.0, -50.0, -70.0])
    assert early["nll_tail"] == (-20.0, 9)
    assert early["nll"] == (-70.0, 63)
    assert early["bits_per_byte"] == (-70.0, 200)


def test_nan_log_likelihood_is_told_with_its_place(model_dir, caplog, monkeypatch):
    metadata = {"pretrained": model_dir, "length": LENGTH, "buckets": 2}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    task = manager.load(["pydocs_ppl_2k"])["tasks"]["pydocs_ppl_2k"]
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    shares = task.process_results(doc(), [-30.0, math.nan, -70.0])
    assert "pydocs_ppl_2k: log-likelihood of book:3 up to token 55 is NaN" in caplog.text
    assert shares["nll"] == (-70.0, 63)
    assert math.isnan(shares["nll_tail"][0])
