"""parallel=layers: weights on the host or on disk, put in place layer by layer; the answers of a model in memory."""

from pydoc_data.topics import topics

import pytest
import torch
from accelerate import cpu_offload_with_hook, disk_offload, dispatch_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lminf_eval.harness.lm import LMInfinite
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import ScoreRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.modules import device_of
from lminf_eval.parallel.topology import Topology
from lminf_eval.resume.checkpoint import Checkpoints

TEXT = topics["exceptions"][:700]
OPTIONS = {"until": [], "max_gen_toks": 5, "do_sample": False}
SPEC = make(n_local=24, n_global=3)


def answers(model: LMInfinite) -> list:
    return [
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)]),
        model.loglikelihood([Instance("loglikelihood", {}, (TEXT, " the end"), 0)]),
        model.generate_until([Instance("generate_until", {}, (TEXT, OPTIONS), 0)]),
    ]


@pytest.mark.parametrize("attention", ["lambda", "full", "self_extend", "dca"])
def test_weights_that_are_offloaded_give_the_answers_of_a_model_in_memory(attention, tiny_llama, tmp_path):
    folder = tiny_llama(max_position_embeddings=512, num_hidden_layers=3, tie_word_embeddings=False)
    common = {"device": "cpu", "dtype": "float32", "attention": attention, "chunk_size": 32}
    if attention != "full":
        common["n_local"] = 64
    expected = answers(LMInfinite(str(folder), **common))
    offload = {"max_cpu_memory": 500_000, "offload_folder": str(tmp_path)}
    layers = LMInfinite(str(folder), parallel="layers", **offload, **common)
    assert answers(layers) == expected
    assert set(layers.load().hf_device_map.values()) == {"cpu", "disk"}
    assert {parameter.device.type for parameter in layers.load().parameters()} == {"cpu", "meta"}
    info = layers.get_model_info()["lminf"]
    assert (info["parallel"], info["ranks"]) == ("layers", 1)
    assert info["attention_primitive"] == ("" if attention == "full" else "cpu-flash")


def test_without_a_cuda_device_all_layers_are_in_memory(tiny_llama):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = LMInfinite(str(tiny_llama()), device="cpu", parallel="layers", dtype="float32")
    assert {parameter.device.type for parameter in model.load().parameters()} == {"cpu"}


def tokens(n: int = 150) -> torch.Tensor:
    return torch.randint(97, (n,), generator=torch.Generator().manual_seed(3)).numpy()


def disk(model, folder):
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def mixed(model, folder):
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def whole(model, folder):
    return cpu_offload_with_hook(model, torch.device("cpu"))[0]


@pytest.mark.parametrize("dispatch", [disk, mixed, whole])
def test_a_patched_model_and_the_hooks_of_accelerate_leave_each_other_alone(dispatch, tiny_model, tmp_path):
    request = ScoreRequest(tokens(), 1, rolling=True)
    ((_, expected),) = Engine(patched_model(tiny_model(), SPEC), 40).score([request])
    ids = torch.from_numpy(tokens(60))[None]
    with torch.inference_mode():
        plain = tiny_model()(ids).logits
        model = dispatch(tiny_model(), tmp_path / "weights")
        assert (model(ids).logits == plain).all()
        patched = patched_model(model, SPEC)
        engine = Engine(patched, 40, checkpoints=Checkpoints(tmp_path / "kept", b""))
        ((_, found),) = engine.score([request])
        assert (found.log_probs == expected.log_probs).all()
        assert (patched.restore()(ids).logits == plain).all()


def test_where_a_layer_computes_is_where_its_hook_says(tiny_model, tmp_path):
    model = disk(tiny_model(), tmp_path)
    for module in (model.get_input_embeddings(), *(layer.self_attn for layer in model.model.layers)):
        assert next(module.parameters()).device.type == "meta"
        assert device_of(module) == torch.device("cpu")


def test_ranks_of_a_node_share_its_devices(tiny_llama, monkeypatch):
    """Two ranks on a node of four devices: each spreads its layers over two of them."""
    model = LMInfinite(str(tiny_llama()), device="cpu", dtype="float32")
    everything = {"device_map": "auto", "max_memory": {0: 10, 1: 11, 2: 12, 3: 13, "cpu": 99}}
    monkeypatch.setattr(HFLM, "_get_accelerate_args", lambda self, **kwargs: dict(everything))
    assert model._get_accelerate_args() == everything
    model.ranks.topology.local_world, model.ranks.topology.local_rank = 2, 1
    assert model._get_accelerate_args()["max_memory"] == {1: 11, 3: 13, "cpu": 99}


@pytest.mark.parametrize(("count", "visible", "device"), [(4, None, "cuda:2"), (1, "3", "cuda:0")])
def test_each_rank_of_a_node_has_its_own_device(count, visible, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    topology = Topology(world=4, local_rank=2, local_world=4)
    assert topology.device("cuda") == topology.device("cuda:0") == device
    assert topology.device("cpu") == "cpu"
    assert chosen[0] == int(device[-1])


def test_more_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    topology = Topology(world=4, local_rank=2, local_world=4)
    with pytest.raises(ValueError, match="4 ranks on a node of 2 CUDA devices: start one rank for each"):
        topology.device("cuda")
