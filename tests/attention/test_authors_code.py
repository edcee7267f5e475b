"""The methods' authors' own code, run and never copied: its logits against ours, on a tiny model drawn at random.

LMINF_AUTHORS_CODE names a folder with checkouts of github.com/datamllab/LongLM, github.com/HKUNLP/ChunkLlama,
github.com/bojone/rerope and github.com/thunlp/InfLLM, under these names. Their modules are executed as they are. What
they import and transformers no longer has, or this machine lacks, has a stand-in here; numbers that they round to half
or single precision stay in double precision, so that what differs is the method.

Ours follows the paper where their code does not: see the tests. The code of TokenSelect and SWAA is not here: it runs
inside SGLang, and on a flash attention of its own, on a GPU alone.
"""

import contextlib
import importlib.util
import math
import os
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model

CODE = Path(os.environ.get("LMINF_AUTHORS_CODE", ""))
pytestmark = pytest.mark.skipif(
    "LMINF_AUTHORS_CODE" not in os.environ,
    reason="LMINF_AUTHORS_CODE names no folder with the authors' code; the docstring of this file says what is in it",
)
HEADS, KV_HEADS, DIM, NEW = 4, 2, 16, 5
CLOSE = 1e-5  # of the largest logit: our angles are float32, and so is what Llama's norms compute


@pytest.fixture
def llama(randomise):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HEADS * DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
    )
    return randomise(LlamaForCausalLM(config)).double().eval()


class OldRotary(nn.Module):
    """The rotary embedding of transformers 4.31 (tables of `seq_len` positions) and 4.38 (at given positions)."""

    def __init__(self, dim, max_position_embeddings=0, base=1e4, device=None, scaling_factor=1.0):
        super().__init__()
        self.scaling_factor = scaling_factor
        self.inv_freq = (1.0 / base ** (torch.arange(0, dim, 2).float() / dim)).double()

    def forward(self, x, positions=None, seq_len=None):
        at = torch.arange(seq_len)[None, None] if positions is None else positions
        angles = at.double()[..., None] / self.scaling_factor * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


class OldCache:
    """What the authors' code asks of a cache; `layers` maps a layer to its keys and values."""

    def __init__(self):
        self.layers = {}

    def get_usable_length(self, new_tokens, layer):
        return self.layers[layer][0].shape[2] if layer in self.layers else 0

    def update(self, keys, values, layer, cache_kwargs=None):
        old = self.layers.get(layer, (keys[:, :, :0], values[:, :, :0]))
        self.layers[layer] = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
        return self.layers[layer]


def flash_attention(q_BLHD, k_BMHD, v_BMHD, causal=False, return_attn_probs=False):
    """What flash_attn computes; the last query meets the last key."""
    L, M = q_BLHD.shape[1], k_BMHD.shape[1]
    logits = torch.einsum("blhd,bmhd->bhlm", q_BLHD, k_BMHD) / math.sqrt(q_BLHD.shape[-1])
    if causal:
        logits = logits.masked_fill(torch.ones(L, M).triu(M - L + 1).bool(), -torch.inf)
    return torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v_BMHD), logits.logsumexp(-1), None


def load(monkeypatch, file, package=""):
    """Execute one of the authors' files as a module, of a package if it imports from one."""
    flash = dict.fromkeys(("flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func"), flash_attention)
    stand_ins = {"flash_attn": flash, "flash_attn.flash_attn_interface": flash}
    if package:
        stand_ins |= {
            package: {"__path__": []},
            f"{package}.selfextend_flash_attn": {"self_extend_flash_forward": None},
            f"{package}.selfextend_flash_attn_triton": {"self_extend_flash_forward_triton": None},
        }
    for path, values in stand_ins.items():
        module = ModuleType(path)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, path, module)
    spec = importlib.util.spec_from_file_location(f"{package}.{Path(file).stem}".lstrip("."), CODE / file)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(  # what `from transformers.models.llama.modeling_llama import *` once gave them
        {name: getattr(typing, name) for name in ("Optional", "Tuple")},
        math=math,
        nn=nn,
        F=nn.functional,
        repeat_kv=modeling_llama.repeat_kv,
        rotate_half=modeling_llama.rotate_half,
        LlamaAttention=type("LlamaAttention", (), {}),  # whose methods they replace
        LlamaRotaryEmbedding=OldRotary,
        LlamaLinearScalingRotaryEmbedding=OldRotary,
        Cache=OldCache,
    )
    spec.loader.exec_module(module)
    module.torch = SimpleNamespace(**vars(torch) | {"float32": torch.float64, "bfloat16": torch.float64})
    return module


def authors_logits(model, forward, prepare, ids, prompt, tuples=False):
    """Logits [S, V] of a prompt at once and then of single tokens, with the authors' `forward` in each layer.

    `prepare` sets the layer's rotary embedding as they do; `tuples`: a cache is what the layer's last call returned.
    """
    cache, returned, found = OldCache(), {}, []

    def standing_in(layer):
        own = SimpleNamespace(
            **{name: getattr(layer, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx")},
            config=SimpleNamespace(pretraining_tp=1),
            pretraining_tp=1,
            num_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            num_key_value_groups=HEADS // KV_HEADS,
            head_dim=DIM,
            hidden_size=HEADS * DIM,
            max_position_embeddings=4096,
            attention_dropout=0.0,
            training=False,
        )
        prepare(own)

        def stand_in(hidden_states, position_ids=None, **others):
            L, index = hidden_states.shape[1], layer.layer_idx
            mask = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None] if L > 1 else None
            past = returned.get(index) if tuples else cache
            out, _, returned[index] = forward(own, hidden_states, mask, position_ids, past, use_cache=True)
            return out, None

        return stand_in

    for layer in model.model.layers:
        layer.self_attn.forward = standing_in(layer.self_attn)
    try:
        for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
            at = torch.arange(start, stop)[None]
            found.append(model(ids[:, start:stop], position_ids=at, use_cache=False).logits[0])
    finally:
        for layer in model.model.layers:
            del layer.self_attn.forward
    return torch.cat(found)


@torch.no_grad()
def difference(model, method, forward, prepare, prompt, tuples=False):
    """The largest between their logits and ours, as a share of ours."""
    ids = torch.randint(3, 97, (1, prompt + NEW))
    theirs = authors_logits(model, forward, prepare, ids, prompt, tuples)
    patched = patched_model(model, method)
    state, ours = patched.new_cache(1, prompt + NEW), []
    state.answers_from = [patched.answers_from(prompt)]
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + NEW))]:
        output = patched.hidden(ids[:, start:stop], state)
        ours.append(patched.logits(output, output.last_hidden_state[0]))
    patched.restore()
    ours = torch.cat(ours)
    found = float((theirs - ours).abs().max() / ours.abs().max())
    print(f"{method.name} {method.model_dump()}, a prompt of {prompt}: {found:.1e}")
    return found


@pytest.mark.parametrize("prompt", [9, 16, 17, 33, 90])
@pytest.mark.parametrize("group", [1, 2, 4, 16])
def test_self_extend(monkeypatch, llama, prompt, group):
    module = load(monkeypatch, "LongLM/self_extend_patch/Llama.py", "self_extend_patch")

    def forward(own, hidden, mask, positions, cache, use_cache):
        return module.self_extend_forward(own, hidden, mask, positions, cache, group_size_1=group, group_size_2=16)

    def prepare(own):
        own.rotary_emb = OldRotary(DIM)

    method = make("self_extend", n_local=16, self_extend_group=group)
    assert difference(llama, method, forward, prepare, prompt) < CLOSE


def test_self_extend_if_the_group_does_not_divide_the_window(monkeypatch, llama):
    """The paper (algorithm 1) moves queries on by w - floor(w / g), their code by w - w / g: ours is the paper's."""
    module = load(monkeypatch, "LongLM/self_extend_patch/Llama.py", "self_extend_patch")

    def forward(own, hidden, mask, positions, cache, use_cache):
        return module.self_extend_forward(own, hidden, mask, positions, cache, group_size_1=3, group_size_2=16)

    def prepare(own):
        own.rotary_emb = OldRotary(DIM)

    def floored(x, positions=None, seq_len=None):  # of their group positions, only queries' have a fraction
        return OldRotary.forward(OldRotary(DIM), x, positions.ceil() if positions.is_floating_point() else positions)

    def prepare_floored(own):
        own.rotary_emb = floored

    method = make("self_extend", n_local=16, self_extend_group=3)
    assert difference(llama, method, forward, prepare, 90) > 100 * CLOSE
    assert difference(llama, method, forward, prepare_floored, 90) < CLOSE


@pytest.mark.parametrize("prompt", [9, 16, 17, 32, 33, 37, 90])
@pytest.mark.parametrize("window", [1, 5, 15])
def test_dual_chunk_attention(monkeypatch, llama, prompt, window):
    """Their positions end at c, the paper's at c - 1 (equations 5 and 7): their w is ours less one."""
    module = load(monkeypatch, "ChunkLlama/chunkllama_attn_replace.py")
    module.chunk_size, module.local_window = 16 + window, window

    def prepare(own):
        own.rotary_emb = module.ChunkLlamaRotaryEmbedding(DIM)  # up to 4096 tokens without the scale that YaRN has

    method = make("dca", n_local=16, dca_window=window + 1)
    assert difference(llama, method, module.forward, prepare, prompt) < CLOSE
    if prompt > 32:
        method = make("dca", n_local=16, dca_window=window)
        assert difference(llama, method, module.forward, prepare, prompt) > 100 * CLOSE


@pytest.mark.parametrize("prompt", [9, 16, 17, 33, 90])
@pytest.mark.parametrize("step", [None, 2.0, 16.0])
def test_rerope(monkeypatch, llama, prompt, step):
    """Their code also multiplies queries beyond the trained length by a logarithm, which is no part of the method."""
    module = load(monkeypatch, f"rerope/{'leaky_' if step else ''}rerope_patch.py")
    module.window, module.training_length = 16, 10**9
    module.scaling_factor = int(step or 1)

    def prepare(own):
        own.rotary_emb = OldRotary(DIM)
        if step:
            module.LlamaAttention._init_rope(own)

    method = make("rerope", n_local=16, rerope_step=step)
    forward = module.LlamaAttention.forward
    assert difference(llama, method, forward, prepare, prompt, tuples=True) < CLOSE


def infllm(monkeypatch):
    """Execute InfLLM's modules, which ask for a GPU everywhere, on a CPU and without their assertions."""

    class Event:
        def record(self, stream):
            return None

        wait = record

    def at_home(make):
        return lambda *args, device=None, **others: make(*args, **others)

    cuda = SimpleNamespace(stream=contextlib.nullcontext, current_stream=lambda: None, Event=lambda: Event())
    here = {name: at_home(getattr(torch, name)) for name in ("empty", "zeros", "ones", "arange")}
    modules = {}
    for name in ("dot_production_attention.base", "dot_production_attention.torch_impl", "context_manager", "rope"):
        package = f"infllm.{name}".rpartition(".")[0]
        module = ModuleType(f"infllm.{name}")
        module.__package__ = package
        if name == "context_manager":
            made_by = modules["dot_production_attention.torch_impl"].TorchMultiStageDotProductionAttention
            stand_in = ModuleType("infllm.dot_production_attention")
            stand_in.get_multi_stage_dot_production_attention = lambda _, made_by=made_by: (made_by, False)
            monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        file = CODE / "InfLLM/inf_llm/attention" / f"{name.replace('.', '/')}.py"
        exec(compile(file.read_text(), file, "exec", optimize=1), vars(module))
        module.torch = SimpleNamespace(**vars(torch) | {"float32": torch.float64, "cuda": cuda} | here)
        modules[name] = module
    return modules["context_manager"].ContextManager, modules["rope"].RotaryEmbeddingESM


@pytest.mark.parametrize("prompt", [9, 17, 18, 33, 90])
@pytest.mark.parametrize("k", [1, 5, 200])
def test_infllm_of_single_tokens(monkeypatch, llama, prompt, k):
    """If each token of the prompt chooses for itself, by head, among blocks of one token that stand for themselves.

    A token that has just left their window of n tokens is no block yet, and every head sees it: ours is n + 1. Their
    query is at n - 1, where n is meant; that is put right here, since the token of before is at n.
    """
    Manager, Rotary = infllm(monkeypatch)

    class Meant(Rotary):
        def apply_rotary_pos_emb_one_angle(self, x, index):
            return super().apply_rotary_pos_emb_one_angle(x, index + 1)

    def prepare(own):
        own.position = Meant(DIM)

    def forward(own, hidden, mask, positions, past, use_cache):
        q, k_new, v = (
            project(hidden).unflatten(-1, (-1, DIM)).transpose(1, 2) for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        if past is None:
            past = Manager(own.position, 0, 16, 1, 300, k, exc_block_size=1, perhead=True)
        out = past.append(q, k_new, v, q, k_new, v)
        return own.o_proj(out.transpose(1, 2).flatten(2)), None, past

    method = make("infllm", n_local=17, n_global=0, top_k=k, top_k_block=1, top_k_choice="head", top_k_distance=16)
    assert difference(llama, method, forward, prepare, prompt, tuples=True) < CLOSE
