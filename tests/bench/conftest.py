"""A bench of a tiny Llama with random weights."""

import logging

import pytest

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.options import parse_options


@pytest.fixture(autouse=True)
def _lm_evals_voice():
    """The command silences lm-eval's loggers for good; tests that come after want to hear them."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def make_options():
    """`make_options(**changes)`: options of a bench that takes a moment."""

    def make(**changes):
        model = {"pretrained": "", "shape": "tiny", "dtype": "auto", "device": "cpu", "threads": None}
        cases = {
            "n_local": "32",
            "lengths": "48,96",
            "cases": "prefill,decode",
            "batches": "",
            "runs": 2,
            "baselines": False,
        }
        return parse_options(**model | cases | {"model_args": "chunk_size=16,n_global=4"} | changes)

    return make


@pytest.fixture
def subject(make_options):
    return BenchmarkModel(make_options())
