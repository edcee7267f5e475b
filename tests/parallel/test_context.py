"""A document spread over real processes by position: against the definition, in double precision."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.rope import Rotary
from lminf_eval.parallel import context_parallel
from lminf_eval.parallel.topology import Topology
from tests import small_model
from tests.test_families import FAMILIES, oracle

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("context")]  # the processes are started once for all

WHOLE = sys.maxsize  # a chunk is the whole document
SMALL = {**small_model.SMALL, "head_dim": 8, "max_position_embeddings": 64}
MODELS = {  # what is particular about each
    "llama": {},
    "mistral": {"sliding_window": 12},  # layers that slide as trained
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16},  # soft-capped logits, sliding and full layers
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 12},  # learned sinks
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without positions
    "bloom": {"n_head": 4, "n_layer": 2},  # ALiBi
    "llama4_text": FAMILIES["llama4_text"],  # layers that see their own chunk, queries scaled by position
}
METHODS = {
    "lambda": make(attention="lambda", n_local=16, n_global=5),
    "window": make(attention="window", n_local=16),
    "streaming": make(attention="streaming", n_local=16, n_global=5),
    "lambda_mask": make(attention="lambda_mask", n_local=16, n_global=5),
}


def launch(folder: Path, ranks: int, cases: list[dict]) -> list[list[dict]]:
    """What each of `ranks` processes answers to `cases`."""
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(Path(__file__).with_name("context_ranks.py")), str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def models(tmp_path_factory, randomise):
    """Folders of tiny random models of each family."""
    folders = {}
    for name, particular in MODELS.items():
        config = CONFIG_MAPPING[name](**SMALL | particular)
        folders[name] = tmp_path_factory.mktemp(name)
        randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(folders[name])
    return folders


def make_case(models, name="llama", spec=METHODS["lambda"], shard=4, chunk_size=WHOLE, batch_size=None, **requests):
    return {
        "model": str(models[name]),
        "spec": {"attention": spec.name, **spec.model_dump()},
        "shard": shard,
        "chunk_size": chunk_size,
        "batch_size": batch_size,
        "exact": name == "llama",
        **requests,
    }


def text(rng, n: int) -> list[int]:
    return rng.integers(97, size=n).tolist()


def random_requests(rng) -> list:
    """Strangers, and branches of one beginning: some long enough to be spread, some not, some nested."""
    base, requests = text(rng, 150), []
    for _ in range(int(rng.integers(1, 6))):
        cut = int(rng.integers(1, 150))
        tokens = [*base[: cut * int(rng.integers(2))], *text(rng, int(rng.integers(2, 120)))]
        requests.append([tokens, int(rng.integers(1, len(tokens)))])
    return requests


def all_cases(models, ranks: int) -> dict[str, dict]:
    rng = np.random.default_rng(ranks)
    cases = {}
    for name in MODELS:
        for method, spec in METHODS.items():
            cases[f"{name} {method}"] = make_case(models, name, spec, score=[[text(rng, 150), 1], [text(rng, 61), 30]])
    spec = METHODS["lambda"]
    for n in (15, 16, 17, 4 * 16 - 1, 4 * 16, 4 * 16 + 1, 16 + 5, 16 + 6, 127):  # just around the edges of windows
        cases[f"{n} tokens"] = make_case(models, score=[[text(rng, n + 1), 1]])
    for n_local in (1, 2, 40, 60, 61, 200):  # shards of 30 or 60 tokens: several neighbours, or all tokens, are seen
        wide = make(n_local=n_local, n_global=min(10, n_local - 1))
        cases[f"n_local {n_local}"] = make_case(models, spec=wide, score=[[text(rng, 121), 1]])
    for n_global in (0, 35, 70):  # starting tokens on more than one rank
        many = make(n_local=80, n_global=n_global)
        cases[f"n_global {n_global}"] = make_case(models, spec=many, score=[[text(rng, 161), 1]])
    for chunk_size in (20, 33, 64):  # windows that lie in the cache, in part in the cache, on other ranks
        cases[f"chunks of {chunk_size}"] = make_case(models, chunk_size=chunk_size, score=[[text(rng, 161), 1]])
    for seed in range(12):
        method = str(rng.choice(list(METHODS)))
        n_local = int(rng.integers(4, 50))
        drawn = make(attention=method, n_local=n_local, n_global=int(rng.integers(min(8, n_local))))
        how = {"chunk_size": int(rng.choice([30, 57, WHOLE])), "batch_size": [None, 1, 2, 3][seed % 4]}
        name = ["llama", "gemma2", "bloom"][seed % 3]
        cases[f"drawn {seed}"] = make_case(models, name, drawn, **how, score=random_requests(rng))
    for name in ("llama", "gpt_oss", "bloom"):
        prompts = [[text(rng, n), 12] for n in (100, 61, 3, 100)]
        prompts.append([[*prompts[0][0], *text(rng, 50)], 12])  # goes on where another ends
        cases[f"generate {name}"] = make_case(models, name, spec, batch_size=3, generate=prompts)
    for n in (400, 800, 1600):
        cases[f"sent {n}"] = make_case(models, score=[[text(rng, n + 1), 1]])
        cases[f"sent and kept {n}"] = make_case(models, generate=[[text(rng, n), 1]])
    enough = context_parallel.SHARD * ranks
    for name, n in {"enough": enough, "too few": enough - 1}.items():  # n tokens pass through the model
        cases[f"{name} to spread"] = make_case(models, shard=context_parallel.SHARD, score=[[text(rng, n + 1), n - 50]])
    return cases


@pytest.fixture(scope="module", params=[2, 4])
def answered(request, models, tmp_path_factory):
    """The number of ranks, the cases by name, and what each rank answers to each."""
    cases = all_cases(models, request.param)
    found = launch(tmp_path_factory.mktemp("ranks"), request.param, list(cases.values()))
    return request.param, cases, [dict(zip(cases, one, strict=True)) for one in found]


@cache
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


@pytest.fixture
def logits(reference_logits, monkeypatch):
    """`logits(case, tokens)` [S, V]: the definition's, in double precision."""

    def angles(self, positions, like, layer_type=None):
        half = positions.double()[..., None] * self.module.inv_freq.double()
        both = torch.cat([half, half], -1)
        return both.cos().to(like), both.sin().to(like)

    def compute(case, tokens):
        if case["exact"]:
            monkeypatch.setattr(Rotary, "angles", angles)
        model, spec, ids_1S = loaded(case["model"]), make(**case["spec"]), torch.tensor([tokens])
        if model.config.model_type == "llama4_text":
            return oracle(model, spec, ids_1S)
        return reference_logits(model, spec, ids_1S)[0]

    return compute


SCORED = [name for name, case in all_cases(dict.fromkeys(MODELS), 2).items() if "score" in case]


@pytest.mark.parametrize("name", SCORED)
def test_every_rank_has_the_definitions_log_probabilities(name, answered, logits):
    _, cases, found = answered
    case, tolerance = cases[name], 1e-9 if cases[name]["exact"] else 1e-4
    for i, (tokens, scored_from) in enumerate(case["score"]):
        expected = logits(case, tokens[:-1]).log_softmax(-1)[scored_from - 1 :]
        followed = torch.tensor(tokens[scored_from:])
        for one in found:
            log_probs, greedy = one[name]["answers"][i]
            assert log_probs == pytest.approx(expected.gather(1, followed[:, None])[:, 0].tolist(), abs=tolerance)
            assert greedy == (expected.argmax(-1) == followed).tolist()
            assert one[name]["answers"][i] == found[0][name]["answers"][i]  # to the bit


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom"])
def test_generation_goes_on_from_a_prompt_that_was_spread(name, answered):
    _, cases, found = answered
    case = cases[f"generate {name}"]
    alone = patched_model(loaded(case["model"]), make(**case["spec"]))
    requests = [GenerateRequest(tokens, max_new) for tokens, max_new in case["generate"]]
    expected = dict(Engine(alone, 2048, 3).generate(requests))
    alone.restore()
    for one in found:
        assert one[f"generate {name}"]["answers"] == [expected[i] for i in range(len(requests))]
        assert one[f"generate {name}"]["sent"] > 0


def test_bytes_sent_in_each_layer_do_not_depend_on_the_length(answered):
    ranks, _, found = answered
    layers, numbers, window, sinks = 2, 2 * 2 * 8, 16, 5  # numbers of a key and a value: two heads of eight
    neighbour = [layers * window * numbers * 8] * (ranks - 1) + [0]
    everyone = [layers * sinks * numbers * 8 * (ranks - 1)] + [0] * (ranks - 1)
    kept = (layers * window * numbers + SMALL["hidden_size"]) * 8 * (ranks - 1)  # the window, and one hidden state
    for n in (400, 800, 1600):
        scored = [one[f"sent {n}"]["sent"] for one in found]
        assert scored == [a + b for a, b in zip(neighbour, everyone, strict=True)]
        prefilled = [one[f"sent and kept {n}"]["sent"] for one in found]
        assert prefilled == [*scored[:-1], scored[-1] + kept]


def test_short_chunks_are_not_spread(answered):
    _, _, found = answered
    assert all(one["too few to spread"]["sent"] == 0 for one in found)
    assert found[0]["enough to spread"]["sent"] > 0


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (make(attention="full"), "attention=full: parallel=context goes with lambda, window, streaming, lambda_mask"),
        *(
            (
                make(attention, n_local=256),
                f"attention={attention}: parallel=context goes with lambda, window, streaming, lambda_mask",
            )
            for attention in ("rerope", "self_extend", "dca", "infllm")
        ),
        (make(n_local=16, top_k=2), "top_k: parallel=context goes without it; no rank has all keys"),
        (make(n_local=16, full_layers="odd"), "full_layers: parallel=context goes without it; no rank has all keys"),
        (make(n_local=16, full_decode=True), "full_decode: parallel=context goes without it; no rank has all keys"),
    ],
)
def test_what_cannot_be_spread_is_refused(spec, line):
    with pytest.raises(UsageError, match=f"^lminf: {line}$"):
        context_parallel.ContextParallel(Topology()).check(None, spec)


def test_a_chunk_is_most_often_a_whole_document():
    strategy = context_parallel.ContextParallel(Topology(group_size=4))
    assert strategy.chunk_size(2048, chosen=False) == 4 * 65536
    assert strategy.chunk_size(2048, chosen=True) == 2048
