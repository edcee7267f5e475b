"""Facts are stated once: a pretend method, argument and family appear everywhere that they must."""

from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance
from pydantic import Field
from transformers import AutoModelForCausalLM, LlamaConfig

import lminf_eval as lminf
from lminf_eval.cli import doctor_checks
from lminf_eval.errors import UsageError
from lminf_eval.harness import model_args
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import ScoreRequest
from lminf_eval.methods.branches import Branch, FirstKeys, SlidingWindow
from lminf_eval.methods.hides_keys import HidesKeys
from lminf_eval.methods.registry import METHODS, MethodArgs, make
from lminf_eval.models.families import registry, table
from lminf_eval.models.families.adapter import FamilyAdapter
from lminf_eval.models.memory_estimate import memory
from lminf_eval.parallel.context_parallel import ContextParallel
from lminf_eval.parallel.topology import Topology
from lminf_eval.report.figures.style import style_of
from lminf_eval.report.run_metadata import describe_run
from lminf_eval.sweep.config import read_sweep
from lminf_eval.sweep.cost import estimate


class Pretend(HidesKeys):
    """A window and a few first tokens, at a distance that a parameter says."""

    name = "pretend"
    title = "Pretended attention"
    paper = "arXiv 0000.00000"
    summary = "what nobody does"
    color = "#123456"
    marker = "*"
    line = "--"
    pretend_far: int = Field(0, ge=0, description="how much further the first tokens stand")

    def branches(self):
        """Return a window, and three first tokens."""
        at = self.n_local + self.pretend_far
        first = Branch(FirstKeys(3, after=self.n_local), lambda i: 0 * i + at, lambda j: 0 * j)
        return Branch(SlidingWindow(self.n_local)), first


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setitem(METHODS, "pretend", Pretend)
    return {"attention": "pretend", "n_local": 16, "pretend_far": 5}


def described(folder, args):
    """The columns of a results file that was run with these model arguments."""
    file = folder / "results_2026-11-28T00-00-00.json"
    file.write_text("{}")
    return describe_run(file, {"config": {"model": "lminf", "model_args": {"pretrained": "x/y", **args}}})


def test_a_method_is_parsed_listed_and_documented(pretend):
    assert MethodArgs.parse(pretend).at(0) == Pretend(n_local=16, pretend_far=5, top_k_distance=8, top_k_from_layer=0)
    assert "pretend_far" in {method.name: method for method in lminf.methods()}["pretend"].parameters
    rows = {name: (default, meaning) for name, default, meaning in model_args.arguments_table()}
    assert "`pretend`: what nobody does" in rows["attention"][1]
    assert rows["pretend_far"] == ("0", "how much further the first tokens stand")
    with pytest.raises(UsageError, match=r"must be one of .*, pretend \(did you mean pretend\?\)"):
        MethodArgs.parse({"attention": "pretnd"})
    with pytest.raises(UsageError, match="pretend_far=5 goes with attention=pretend, not with attention=lambda"):
        MethodArgs.parse(pretend | {"attention": "lambda"})


def test_a_method_runs_by_its_branches(pretend, tiny_model, reference_logits):
    model, tokens = tiny_model(), torch.randint(97, (90,)).tolist()
    expected = reference_logits(model, make(**pretend), torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    with lminf.patch(model, method="pretend", n_local=16, pretend_far=5) as runner:
        for chunk in (1, 15, 16, 200):
            ((_, found),) = Engine(runner, chunk).score([ScoreRequest(tokens, 1)])
            assert torch.allclose(torch.from_numpy(found.log_probs), expected[range(89), tokens[1:]], atol=1e-4)
        assert runner.attention_span == 19


def test_a_method_is_estimated_described_and_drawn(pretend, tmp_path):
    method, config = make(**pretend), LlamaConfig()
    kept = memory(config, method, 2048, 65536, 1, torch.float32)["keys and values"]
    assert kept == 4 * 2 * config.hidden_size * config.num_hidden_layers * (16 + 3)
    assert (method.kept(100), method.seen(50), method.pairs(2)) == (19, 19, 3)
    _, rows = doctor_checks.describe_model(config, MethodArgs.parse(pretend), torch.float32, "cpu")
    assert {("attention", "pretend"), ("n_local", "16 (set by n_local)"), ("n_global", "3")} <= set(rows)
    assert style_of("pretend").color == "#123456"
    row = described(tmp_path, {name: str(value) for name, value in pretend.items()})
    assert (row["method"], row["pretend_far"], row["other"]) == ("pretend n_local=16 pretend_far=5", 5, "")


def test_a_method_is_swept_and_spread(pretend, tmp_path):
    file = tmp_path / "sweep.yaml"
    far = "{attention: pretend, n_local: 16, pretend_far: 7}"
    file.write_text(
        "models: [{pretrained: org/model-1b}]\n"
        f"methods: [{{attention: pretend, n_local: 16, pretend_far: 5}}, {far}]\n"
        "tasks: [passkey_4k]\nresources: {tokens_per_second: 1000}\n"
    )
    found = read_sweep(file)
    assert [cell.method for cell in found] == ["pretend n_local=16 pretend_far=5", "pretend n_local=16 pretend_far=7"]
    assert len({cell.id for cell in found}) == 2
    assert estimate(found[0], {}).tokens > 0
    ContextParallel(Topology()).check(None, make(**pretend))
    with pytest.raises(UsageError, match=r"parallel=context goes with .*pretend"):
        ContextParallel(Topology()).check(None, make("full"))


def test_a_method_is_written_into_results_and_the_journals_identity(pretend, tiny_llama):
    lm = LMInfinite(str(tiny_llama(max_position_embeddings=512)), device="cpu", **pretend)
    info = lm.get_model_info()["lminf"]
    assert (info["attention"], info["n_local"], info["pretend_far"]) == ("pretend", 16, 5)
    assert lm._answers_identity()["spec"]["pretend_far"] == 5


def test_an_argument_is_checked_documented_and_kept_out_of_identities(monkeypatch, tiny_llama, tmp_path):
    class Pretended(model_args.ExecutionArgs):
        knob: int = Field(3, ge=1, description="turns nothing")

    monkeypatch.setattr(model_args, "ExecutionArgs", Pretended)
    assert ("knob", "3", "turns nothing") in list(model_args.arguments_table())
    assert "knob" in model_args.execution_args()
    folder = str(tiny_llama(max_position_embeddings=512))
    lm = LMInfinite(folder, device="cpu", knob="4")
    assert lm.args.execution.knob == 4
    assert "knob" not in str(lm._answers_identity())
    with pytest.raises(UsageError, match="knob=0: input should be greater than or equal to 1"):
        LMInfinite(folder, device="cpu", knob=0)
    with pytest.raises(UsageError, match=r"unknown argument knb=1 \(did you mean knob\?\)"):
        LMInfinite(folder, device="cpu", knb=1)
    assert described(tmp_path, {"knob": "4"})["other"] == ""


def test_a_familys_row_decides_wherever_it_is_asked(monkeypatch, tiny_model, capsys):
    plain = table.family_row("llama")
    monkeypatch.setitem(table.FAMILIES, "llama", replace(plain, refused="it pretends", refused_full="it pretends more"))
    config = tiny_model().config
    assert registry.support(config).reason == "it pretends"
    for method, why in (("lambda", "it pretends;"), ("rerope", "it pretends;"), ("full", "it pretends more;")):
        with pytest.raises(UsageError, match=f"attention={method} can't run the family 'llama': {why}"):
            lminf.patch(tiny_model(), method, n_local=16).__enter__()
    doctor_checks.print_families()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("llama ")]
    assert "it pretends" in line
    monkeypatch.setitem(table.FAMILIES, "llama", replace(plain, sharded=False, tested=False))
    assert not registry.support(config).tested


def test_a_familys_adapter_takes_its_attention_over(monkeypatch, tiny_model):
    """Its row names the adapter, and nothing else needs to know of it."""
    seen = []

    def forward(module, *args, **options):
        seen.append(module)
        raise ZeroDivisionError

    adapter = FamilyAdapter("families/llama.py", forward, lambda model, n_local: None, lambda model: None)
    monkeypatch.setitem(table.FAMILIES, "llama", replace(table.family_row("llama"), adapter=adapter))
    with pytest.raises(ZeroDivisionError):
        lminf.patch(tiny_model(), n_local=16).__enter__()
    assert seen
    monkeypatch.undo()
    ids = torch.randint(97, (1, 30))
    model = AutoModelForCausalLM.from_config(tiny_model().config).eval()
    with torch.no_grad(), lminf.patch(model, n_local=64):
        assert model(ids).logits.isfinite().all()


def test_results_and_journals_say_of_a_method_what_they_always_said():
    """Journals and checkpoints of 0.1 are found again only if this stays as it is."""
    common = {"n_global": 10, "top_k": 0, "top_k_from_layer": 0, "rope": None, "rope_factor": None}
    args = MethodArgs.parse({"n_local": 32})
    assert args.record(args.at(0)) == {"attention": "lambda", "n_local": 32, **common, "top_k_distance": 16}
    args = MethodArgs.parse({"attention": "window", "n_local": 32, "n_global": 4})
    assert args.record(args.at(0)) == {
        "attention": "window",
        "n_local": 32,
        **common,
        "n_global": 4,
        "top_k_distance": 16,
    }
    args = MethodArgs.parse({"attention": "full", "n_local": 32, "rope": "linear", "rope_factor": 2})
    scaled = {**common, "rope": "linear", "rope_factor": 2.0}
    assert args.record(args.at(0)) == {"attention": "full", "n_local": 32, **scaled, "top_k_distance": None}


def test_a_generation_is_asked_for_before_the_weights_of_a_scaled_model_are_read(tiny_llama, tmp_path):
    """All scores were in the journal, so that nothing has loaded the model when the generation config is asked for."""
    folder, journal = str(tiny_llama(max_position_embeddings=512)), str(tmp_path)
    args = {"device": "cpu", "journal": journal, "attention": "full", "rope": "linear", "rope_factor": 2}
    score = [Instance("loglikelihood", {}, ("The sky", " is blue."), 0)]
    LMInfinite(folder, **args).loglikelihood(score)
    again = LMInfinite(folder, **args)
    again.loglikelihood(score)
    again.generate_until([Instance("generate_until", {}, ("The sky", {"until": ["."], "max_gen_toks": 2}), 0)])
    assert again.answers.recalled == 1
