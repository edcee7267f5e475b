"""What lm-eval's own evaluator is spared by prefix sharing on our tasks, and that no metric moves for it."""

from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[2] / "tasks"
TEMPLATE = "include: {tasks}/{kind}/_template.yaml\ntask: {name}\nmetadata: {{version: 1.0, length: {length}}}\n"
LENGTHS = (256, 512, 1024, 2048)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(max_position_embeddings=4096)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap starts a pool of processes otherwise
        yield


@pytest.fixture(scope="module")
def evaluate(folder, tmp_path_factory):
    """`evaluate(tasks, model, **model_args)` -> lm-eval's results on tasks of ours at lengths a test can afford."""
    own = tmp_path_factory.mktemp("tasks")
    for kind in ("pydocs", "passkey"):
        for length in LENGTHS:
            text = TEMPLATE.format(tasks=TASKS, kind=kind, name=f"{kind}_{length}", length=length)
            (own / f"{kind}_{length}.yaml").write_text(text)

    def run(tasks, model="lminf", **model_args):
        args = {"pretrained": str(folder), "dtype": "float32", **model_args}
        manager = TaskManager(include_path=str(own), include_defaults=False, metadata=args)
        settings = {"device": "cpu", "bootstrap_iters": 0, "task_manager": manager}
        return simple_evaluate(model, model_args=args, tasks=list(tasks), **settings)

    return run


def computed(results):
    return results["config"]["lminf"]["tokens_computed"]


def assert_same(found, expected):
    for metric, value in expected.items():
        wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        assert found[metric] == wanted, metric


def test_four_lengths_cost_what_the_longest_does(evaluate):
    names = [f"pydocs_{length}" for length in LENGTHS]
    together = evaluate(names, n_local=200)
    alone = {name: evaluate([name], n_local=200) for name in names}
    assert computed(together) <= 1.05 * computed(alone[names[-1]])
    for name in names:
        assert_same(together["results"][name], alone[name]["results"][name])


def test_twenty_passkeys_share_their_filler(evaluate):
    shared = evaluate(["passkey_2048"], n_local=200)
    apart = evaluate(["passkey_2048"], n_local=200, prefix_sharing=False)
    assert computed(apart) > 20 * 2000
    assert computed(shared) < 0.7 * computed(apart)
    assert [s["resps"] for s in shared["samples"]["passkey_2048"]] == [
        s["resps"] for s in apart["samples"]["passkey_2048"]
    ]


def test_within_the_window_it_is_hfs_perplexity(evaluate):
    ours, theirs = (evaluate(["pydocs_1024"], model)["results"]["pydocs_1024"] for model in ("lminf", "hf"))
    assert_same(ours, theirs)
