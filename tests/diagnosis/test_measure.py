"""What is recorded as a text passes in chunks, against dense computations over the whole text."""

import numpy as np
import pytest
import torch
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lminf_eval.diagnosis import measure as module
from lminf_eval.diagnosis.logits import distance_edges
from lminf_eval.diagnosis.measure import measure, methods_compared
from lminf_eval.methods.registry import make

N, N_LOCAL = 75, 24
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": N,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16},  # soft-capped logits, a layer that slides as trained
    "smollm3": {"no_rope_layers": [1, 0]},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": N},  # ALiBi
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 1000)  # several blocks of queries a chunk


@pytest.fixture
def ids():
    return torch.randint(97, (N,))


def measured(model, ids, method, chunk_size=20, n_global=4):
    spec = make(n_local=N_LOCAL, n_global=n_global)
    return measure(
        model, methods_compared(spec, len(ids))[method], N_LOCAL, ids, [0, 1], tqdm(disable=True), chunk_size
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_transformers_own_attention(family, ids, randomise):
    own = {name: value for name, value in SMALL.items() if name in CONFIG_MAPPING[family]().to_dict()}
    config = CONFIG_MAPPING[family](**own | FAMILIES[family])
    model = randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()
    with torch.inference_mode():
        expected = model(ids[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    found = measured(model, ids, "full")
    assert found.positions[0] == 0
    assert found.positions[-1] == N - 1
    for index, layer in found.layers.items():
        weights_HSN = expected.attentions[index][0, :, found.positions]
        entropy = torch.special.entr(weights_HSN.double()).sum(-1).mean(0)
        np.testing.assert_allclose(layer.entropy, entropy, atol=2e-5)
        assert (layer.keys == (weights_HSN[0] > 0).sum(-1).numpy()).all()
    states = expected.hidden_states[1][0, found.state_positions]
    torch.testing.assert_close(found.layers[0].states, states, rtol=0, atol=2e-5 * states.abs().max().item())


@pytest.mark.parametrize("method", ["full", "lambda"])
def test_logits_are_those_of_a_dense_computation(method, ids, tiny_model):
    model, projected = tiny_model(), {"q_proj": [], "k_proj": []}
    attention = model.model.layers[1].self_attn
    for name, outputs in projected.items():
        getattr(attention, name).register_forward_hook(lambda m, i, out, outputs=outputs: outputs.append(out[0]))
    found = measured(model, ids, method)
    q, k = (torch.cat(outputs[-4:]).unflatten(-1, (-1, 8)).transpose(0, 1)[None] for outputs in projected.values())
    assert q.shape == (1, 4, N, 8)

    def rotated(query_positions, key_positions):
        turned_q = apply_rotary_pos_emb(q, q, *model.model.rotary_emb(q, query_positions[None]))[0]
        turned_k = apply_rotary_pos_emb(k, k, *model.model.rotary_emb(k, key_positions[None]))[0]
        return (turned_q[0] @ turned_k[0].repeat_interleave(2, 0).transpose(-1, -2)) / 8**0.5

    i = torch.arange(N)
    logits_HNN, distance_NN = rotated(i, i), i[:, None] - i
    visible_NN = distance_NN >= 0
    if method == "lambda":
        far_NN = (distance_NN >= N_LOCAL) & (i < 4)
        logits_HNN = torch.where(far_NN, rotated(torch.full_like(i, N_LOCAL), torch.zeros_like(i)), logits_HNN)
        distance_NN = torch.where(far_NN, N_LOCAL, distance_NN)
        visible_NN &= (distance_NN < N_LOCAL) | far_NN
    logits_HNN = logits_HNN.masked_fill(~visible_NN, -torch.inf)[:, found.positions]
    distance_SN = distance_NN[found.positions].masked_fill(~visible_NN[found.positions], -1)

    layer = found.layers[1]
    entropy = torch.special.entr(logits_HNN.softmax(-1)).sum(-1).mean(0)
    np.testing.assert_allclose(layer.entropy, entropy, atol=1e-5)
    assert (layer.keys == (distance_SN >= 0).sum(1).numpy()).all()
    for e, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        values_HP = logits_HNN[:, (distance_SN >= low) & (distance_SN < high)]
        assert (layer.logits.pairs[:, e] == values_HP.shape[1]).all()
        if values_HP.shape[1]:
            close = {"rtol": 0, "atol": 1e-4}
            torch.testing.assert_close(layer.logits.total[:, e].float(), values_HP.sum(1), **close)
            torch.testing.assert_close(layer.logits.highest[:, e].float(), values_HP.amax(1), **close)
            torch.testing.assert_close(layer.logits.lowest[:, e].float(), values_HP.amin(1), **close)
    within = found.positions < N_LOCAL
    inside_HP = logits_HNN[:, within][:, distance_SN[within] >= 0]
    beyond_HP = logits_HNN[:, ~within][:, distance_SN[~within] >= 0]
    outside = (beyond_HP > inside_HP.amax(1, True)) | (beyond_HP < inside_HP.amin(1, True))
    assert layer.logits.beyond == beyond_HP.shape[1]
    assert (layer.logits.outside - outside.sum(1)).abs().max() <= 1  # rounding at the very edge
    assert outside.any()


def test_both_methods_are_one_within_n_local(ids, tiny_model):
    model = tiny_model()
    full, ours = (measured(model, ids, method, chunk_size=N_LOCAL) for method in ("full", "lambda"))
    within = full.positions < N_LOCAL
    np.testing.assert_allclose(full.layers[1].entropy[within], ours.layers[1].entropy[within], atol=1e-5)
    beyond = full.positions > N_LOCAL  # at n_local itself a starting token stands where it truly is
    assert (full.layers[1].entropy[beyond] != ours.layers[1].entropy[beyond]).all()


def test_distances_that_no_method_shows_stay_empty(ids, tiny_model):
    found = measured(tiny_model(), ids, "lambda", n_global=0)
    beyond = found.edges[:-1] >= N_LOCAL
    assert beyond.any()
    assert not found.layers[0].logits.pairs[:, beyond].any()
    assert found.layers[0].logits.pairs[:, ~beyond].all()


def test_the_model_is_left_as_it_was(ids, tiny_model):
    model = tiny_model()
    with torch.inference_mode():
        before = model(ids[None]).logits
        measured(model, ids, "lambda")
        assert torch.equal(model(ids[None]).logits, before)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_edges_begin_a_bin_at_n_local():
    edges = distance_edges(1000, 300)
    assert edges[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert 300 in edges
    assert edges[-1] == 1000
    assert (np.diff(edges) > 0).all()
