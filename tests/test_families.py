"""Each tested family against a dense oracle: the family's own model in float64, its own code rotating.

The oracle runs three copies of a sequence side by side, whose positions are the true ones, those at which the global
branch stands its queries, and those at which it stands the starting tokens. So queries and keys come rotated, or
normalised, or not, by the family's own code, and only softmax and visibility are the oracle's. A family is one line of
`FAMILIES`: the arguments of its config class beside `SMALL`.
"""

import copy
import sys
from contextlib import ExitStack
from unittest.mock import patch as replaced

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.families.registry import INDEXED
from lminf_eval.models.families.table import FAMILIES as ROWS
from lminf_eval.models.loading import auto_class
from tests.test_full import CONV, DELTA, KDA, LATENT, MAMBA, ZAMBA2

W, G, S = 16, 3, 70  # n_local, n_global, tokens: below, at and well past n_local
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WIDE = {"head_dim": 16}  # heads wider than hidden_size / num_attention_heads
MOE = {  # four experts, two a token, by all the names that families have for it
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DEEP = {"num_hidden_layers": 4}
GPTJ = {"rotary_dim": 4, "n_inner": 48, "max_position_embeddings": 128}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
GEMMA4 = {
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1,
    "global_head_dim": 32,
}
GEMMA3N = GEMMA4 | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None}
FALCON_RW = {
    "new_decoder_architecture": False,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 128,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}


def seeing(text_type, vision_type, text=None, vision=None, **more):
    """A model that reads images: its text part, and what makes the least of its vision part."""
    vision = {"model_type": vision_type, **VISION, "patch_size": 14, **(vision or {})}
    return {"text_config": {"model_type": text_type, **SMALL, **(text or {})}, "vision_config": vision, **more}


QWEN_VISION = {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "embed_dim": 16, "fullatt_block_indexes": [0]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.5, 2.0, 3.0, 4.0]}


INDEXER = {  # sees all of the tests' tokens
    "index_topk": 128,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}


DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
MISTRAL4 = {  # queries keep their scale below the length that is named last
    "rope_type": "default",
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 128,
}
LLAMA4 = (
    MOE
    | DEEP
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 12,
        "no_rope_layers": [1, 0, 1, 1],
        "floor_scale": 5,  # the 5th token on is scaled
        "attn_scale": 0.5,
    }
)


def scaled(rope_type, **more):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **more}}


FAMILIES = {
    "llama": {},
    "llama linear": scaled("linear"),
    "llama yarn": scaled("yarn", original_max_position_embeddings=32),
    "llama llama3": scaled("llama3", **LLAMA3),
    "llama dynamic": scaled("dynamic") | {"max_position_embeddings": 32},
    "llama dynamic beyond": scaled("dynamic") | {"max_position_embeddings": 8},  # n_local is past the trained length
    "phi3 longrope": scaled("longrope", **LONGROPE, original_max_position_embeddings=32) | {"sliding_window": None},
    "phi3 longrope beyond": scaled("longrope", **LONGROPE, original_max_position_embeddings=8)
    | {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "mistral sliding": {"sliding_window": 8},
    "mixtral": MOE,
    "qwen2": {},
    "qwen2 sliding": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": MOE,
    "qwen3": WIDE,
    "qwen3_moe": MOE | WIDE,
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi qk": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"sliding_window": None},
    "phimoe": MOE | {"sliding_window": None},
    "phimoe sliding": MOE | {"sliding_window": 8},  # its mask alone tells the window
    "dbrx": DBRX,  # a block of norm and attention around its attention
    "ministral3": WIDE | {"sliding_window": None},
    "gemma": WIDE,
    "gemma2": {"sliding_window": 8} | WIDE,  # soft-capped logits
    "gemma3_text": SLIDING | WIDE,  # two rotary bases
    "gemma3": {"text_config": SMALL | SLIDING | WIDE, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": SLIDING | WIDE | GEMMA3N,  # later layers share the keys of earlier ones
    "gemma4_text": SLIDING | WIDE | GEMMA4,
    "vaultgemma": {"sliding_window": 8} | WIDE,
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": MOE,
    "flex_olmo": MOE,
    "gpt_neox": {"rotary_pct": 0.5},
    "stablelm": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "cohere": {"use_qk_norm": True},  # interleaved
    "cohere2": SLIDING,  # full-attention layers without positions
    "cohere2_moe": SLIDING | MOE | WIDE,
    "glm": WIDE,  # interleaved, partial
    "glm4": WIDE,
    "glm4_moe": MOE | WIDE | {"use_qk_norm": True},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "granitemoe": MOE,
    "granitemoeshared": MOE,
    "starcoder2": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt_oss": SLIDING | MOE | WIDE,  # learned sinks
    "persimmon": {"num_key_value_heads": 4},
    "helium": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "exaone": {},
    "exaone4": SLIDING,
    "exaone_moe": SLIDING | MOE,
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": MOE,
    "sarvam_moe": MOE | WIDE,
    "seed_oss": {"head_dim": 8},
    "arcee": {},
    "apertus": {},
    "apertus1p5_text": {},
    "dots1": MOE,
    "ministral": SLIDING | WIDE,
    "minimax_m2": MOE | WIDE,
    "mimo_v2_flash": SLIDING | MOE | WIDE | {"v_head_dim": 8},  # narrower values
    "jetmoe": MOE | WIDE,
    "afmoe": SLIDING | MOE | WIDE,
    "cwm": SLIDING | WIDE,
    "nanochat": WIDE,
    "jais2": WIDE,
    "bitnet": {},
    "hyperclovax": WIDE,
    "modernbert-decoder": {"sliding_window": 8},
    "aria_text": MOE,
    "flint": MOE | WIDE,
    "hy_v3": MOE | WIDE,
    "kolibri1": SLIDING | MOE | WIDE,
    "laguna": SLIDING | MOE | WIDE,
    "mellum": SLIDING | MOE | WIDE,
    "solar_open": MOE | WIDE,
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]} | DEEP,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": MAMBA | MOE | DEEP | {"layer_types": DELTA["layer_types"]},
    "granitemoehybrid rope": MAMBA
    | MOE
    | DEEP
    | {"layer_types": DELTA["layer_types"], "position_embedding_type": "rope"},
    "lfm2": CONV | DEEP,
    "lfm2_moe": CONV | MOE | DEEP | {"num_dense_layers": 1},
    "lfm3": CONV | DEEP,
    "nemotron_h": MAMBA | MOE | DEEP | {"hybrid_override_pattern": "M*M*", "head_dim": 8},
    "olmo_hybrid": DELTA | DEEP,
    "qwen3_next": DELTA | MOE | DEEP,
    "qwen3_5_text": DELTA | DEEP,
    "qwen3_5_moe_text": DELTA | MOE | DEEP,
    "zaya": MOE | DEEP | {"num_experts_per_tok": 1, "head_dim": 8},
    "deepseek_v2": LATENT | MOE | {"first_k_dense_replace": 1},  # rotates by complex numbers
    "deepseek_v2 yarn": LATENT
    | MOE
    | {"first_k_dense_replace": 1}
    | scaled("yarn", original_max_position_embeddings=32, attention_factor=1.5),  # angles that scale, at any position
    "deepseek_v3": LATENT | MOE | {"first_k_dense_replace": 1},  # neighbours
    "deepseek_v3 halves": LATENT | MOE | {"rope_interleave": False},
    "minicpm3": LATENT,
    "glm4_moe_lite": LATENT | MOE,
    "youtu": LATENT,
    "axk1": LATENT | MOE,
    "deepseek_v32": LATENT | MOE | INDEXER,
    "axk2": LATENT | MOE | INDEXER,
    "glm_moe_dsa": LATENT | MOE | INDEXER | {"indexer_types": ["full", "shared", "full"]},
    "hy_v4": LATENT | MOE | INDEXER | {"indexer_types": ["full", "shared", "full"]},
    "dots3_note_text": LATENT | MOE | SLIDING | INDEXER | DOTS3,  # sliding layers have dimensions of their own
    "mistral4": LATENT | MOE | {"rope_parameters": MISTRAL4},
    "beam": MOE | SLIDING,
    "llama4_text": LLAMA4,
    "llama4": seeing(
        "llama4_text", "llama4_vision_model", LLAMA4, {"vision_output_dim": 16, "pixel_shuffle_ratio": 1.0}
    ),
    "longcat_flash": LATENT | MOE | {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
    "kimi_linear": LATENT | MOE | DEEP | {"linear_attn_config": KDA},  # no positions at all
    "bailing_hybrid": LATENT | MOE | DEEP | {"layer_types": DELTA["layer_types"], "mlp_layer_types": ["dense"] * 4},
    "kimi_k25": seeing("deepseek_v3", "kimi_k25_vision", LATENT | MOE | {"first_k_dense_replace": 1}),
    "zamba2": ZAMBA2,  # layers share one attention module
    "diffllama": {},  # each layer attends twice
    "hrm_text": {},  # several passes over its layers
    "granite_swa": SLIDING | {"layer_rope_theta": [1e4, 0, 5e5]},  # a rotary module for each theta; 0: no positions
    "granitemoe_swa": SLIDING | MOE | {"layer_rope_theta": [1e4, 0, 5e5]},
    "llava": seeing("llama", "clip_vision_model", vision={"projection_dim": 16}),
    "internvl": seeing("qwen2", "internvl_vision", vision={"image_size": [28, 28], "patch_size": [14, 14]}),
    "mistral3": seeing("mistral", "pixtral", {"sliding_window": None}),
    "aya_vision": seeing("cohere2", "siglip_vision_model", SLIDING),
    "idefics3": seeing("llama", "idefics3_vision"),
    "smolvlm": seeing("llama", "smolvlm_vision"),
    "lfm2_vl": seeing("lfm2", "siglip2_vision_model", CONV | DEEP, {"num_patches": 4}),
    "qwen2_vl": seeing("qwen2_vl_text", "qwen2_vl", MROPE, QWEN_VISION | {"hidden_size": 32}),
    "qwen2_5_vl": seeing("qwen2_5_vl_text", "qwen2_5_vl", MROPE, QWEN_VISION),
    "qwen3_vl": seeing("qwen3_vl_text", "qwen3_vl", MROPE | {"head_dim": 8}, QWEN_VISION),
    "qwen3_vl_moe": seeing("qwen3_vl_moe_text", "qwen3_vl_moe", MROPE | MOE | {"head_dim": 8}, QWEN_VISION),
    "glm4v": seeing("glm4v_text", "glm4v_vision", MROPE, QWEN_VISION),
    "gptj": GPTJ,
    "codegen": GPTJ,
    "mpt": {},
    "mpt 5 heads": {"n_heads": 5, "d_model": 40},
    "bloom": {},
    "bloom 6 heads": {"n_head": 6, "hidden_size": 48},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon 7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon rw": FALCON_RW,
}

# Each another way to rotate, to scale, to hide keys, to call attention, to keep a state or to hold the model within
# another: these lines are among the quick tests. The others are slow ones, which the runs on other releases have too.
QUICK = """llama|llama dynamic beyond|phi3 longrope beyond|mistral sliding|qwen2 sliding|phi qk|phimoe sliding|dbrx
gemma2|gemma3n_text|gemma4_text|cohere2|glm|smollm3|gpt_oss|mimo_v2_flash|modernbert-decoder|falcon_h1|lfm2|nemotron_h
qwen3_next|deepseek_v2 yarn|deepseek_v3 halves|deepseek_v32|beam|llama4|longcat_flash|zamba2|diffllama|granite_swa|llava
qwen2_vl|gptj|mpt 5 heads|bloom|falcon 7b|falcon rw""".replace("\n", "|").split("|")
EACH_FAMILY = [
    name if name in QUICK else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.families]) for name in FAMILIES
]


def distances(method, n: int):
    """[n, n] true distances; masks of the two branches; the positions of the global branch's queries and keys [n].

    The definition is `attention/reference.py`'s; here it is written out once more, from the papers.
    """
    i = torch.arange(n)
    distance = i[:, None] - i[None, :]
    local = (distance >= 0) & (distance < method.n_local)
    n_global = 0 if method.name == "window" else method.n_global
    far = (distance >= method.n_local) & (i[None, :] < n_global)
    if method.name == "streaming":
        return distance, local, far, i.clamp(max=method.n_local + n_global - 1), i
    return distance, local, far, torch.full_like(i, method.n_local), torch.zeros_like(i)


def dense(spec, q, k, v, scale, mask=None, softcap=None, sinks=None):
    """Λ-attention of the three copies' queries, keys and values [3, heads, n, D]; all three get the same answer.

    `mask` is the family's own. Where it hides more than the future, the layer slides as trained.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    n = q.shape[2]
    distance, local, far, *_ = distances(spec, n)
    near_logits = q[0] @ k[0].mT * scale
    if mask is not None and not torch.equal(mask[0, 0], distance >= 0):
        logits, visible = near_logits, mask[0, 0]
    else:
        logits, visible = torch.where(local, near_logits, q[1] @ k[2].mT * scale), local | far
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits).view(-1, 1, 1).expand(-1, n, 1)], -1)
    return (logits.softmax(-1)[..., :n] @ v[0])[None].expand(3, -1, -1, -1)


def plug(spec, query_scale=1.0):
    """The oracle as a transformers attention function; queries times `query_scale` [n, 1], or times that of a layer."""

    def attention(module, q, k, v, attention_mask, scaling=None, softcap=None, s_aux=None, **options):
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        more = query_scale.get(module, 1.0) if isinstance(query_scale, dict) else query_scale
        return dense(spec, q * more, k, v, scale, attention_mask, softcap, s_aux).transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", sdpa_mask)


@torch.no_grad()
def oracle(model, spec, ids_1S, query_scale=1.0):
    """Logits [S, V] of a copy of `model` in float64 under the definition."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the others know no float64
    hold_frequencies(model, spec.n_local)
    n, kind = ids_1S.shape[1], model.config.model_type
    if kind in ("mpt", "bloom") or getattr(model.config, "alibi", False):
        return alibi_oracle(model, spec, ids_1S)
    *_, query_at, key_at = distances(spec, n)  # transformers 5.24 made GPT-J's attention pluggable
    inputs = {"input_ids": ids_1S.expand(3, -1), "position_ids": torch.stack([torch.arange(n), query_at, key_at])}
    with ExitStack() as stack:
        if kind in ("gptj", "codegen") and hasattr(model.transformer.h[0].attn, "_attn"):
            for block in model.transformer.h:
                scale = block.attn.head_dim**-0.5
                block.attn._attn = lambda q, k, v, mask, scale=scale: (dense(spec, q, k, v, scale), None)
        elif kind == "falcon":
            swap = replaced.object(
                torch.nn.functional,
                "scaled_dot_product_attention",
                lambda q, k, v, **options: dense(spec, q, k, v, q.shape[-1] ** -0.5),
            )
            stack.enter_context(swap)
        else:
            if kind == "beam":
                modeling = sys.modules[type(model).__module__]
                own = modeling.compute_attention_scaling
                capped = replaced.object(modeling, own.__name__, lambda at: own(at.clamp(max=spec.n_local - 1)))
                stack.enter_context(capped)
            plug(spec, temperatures(model, n, spec.n_local) or query_scale)
            model.set_attn_implementation("oracle")
            inputs["attention_mask"] = torch.ones(3, n, dtype=torch.long)  # positions that repeat are not packed texts
        return model(**inputs, use_cache=False).logits[0]


def temperatures(model, n, n_local):
    """Llama 4's own for its layers without positions, switched off there: the factors [n, 1] of their queries."""
    found, at = {}, torch.arange(n, dtype=torch.float64).clamp(max=n_local - 1)
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            module.attn_temperature_tuning = False
            found[module] = 1 + module.attn_scale * torch.log(1 + torch.floor((at + 1) / module.floor_scale))[:, None]
    return found


def alibi_oracle(model, spec, ids_1S):
    """The family's own attention, handed the definition's distances times its own slopes, and its mask."""
    distance, local, far, query_at, key_at = distances(spec, ids_1S.shape[1])
    as_if = torch.where(local, distance, query_at[:, None] - key_at[None, :]).double()
    kind, inner = model.config.model_type, model.transformer
    modeling = sys.modules[type(model).__module__]
    if kind == "mpt":
        slopes_H = -inner.build_mpt_alibi_tensor(inner.num_heads, 2)[:, 0, 0]
    else:
        slopes_H = modeling.build_alibi_tensor(torch.ones(1, 2), inner.num_heads, torch.float64)[:, 0, 1]
    bias_HSS = -slopes_H.double()[:, None, None] * as_if
    owner, name = {
        "mpt": (inner, "build_mpt_alibi_tensor"),
        "bloom": (inner, "build_alibi_tensor"),
        "falcon": (modeling, "build_alibi_tensor"),
    }[kind]
    hidden = torch.zeros_like(as_if).masked_fill(~(local | far), -torch.inf)
    with replaced.object(owner, name, lambda *args, **kwargs: bias_HSS):
        return model(ids_1S, attention_mask=hidden[None, None], use_cache=False).logits[0]


def hold_frequencies(model, n_local):
    """FrozenFrequencies that follow the running length stay at those of n_local."""
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            found, _ = ROPE_INIT_FUNCTIONS[module.rope_type](model.config, "cpu", seq_len=n_local)
            module.inv_freq.copy_(found)
            module.rope_type = "default"


@pytest.mark.parametrize("kind", ["ministral3", "mistral4"])
def test_queries_scaled_by_their_position_take_it_from_the_sequence_up_to_the_window(kind, randomise):
    """Their temperature: 1 + beta log(1 + floor(position / length)), the position held at n_local - 1."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    rope["original_max_position_embeddings"] = 5
    model = build(randomise, kind, rope_parameters=rope)
    ids, spec = torch.randint(3, 97, (1, S)), make(n_local=W, n_global=G)
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.self_attn.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    at = torch.arange(S).clamp(max=W - 1)
    scale_S1 = (1 + 0.5 * torch.log(1 + at // 5).double())[:, None]
    expected = oracle(plain, spec, ids, scale_S1)
    patched = patched_model(model, spec)
    for cuts in ([], [7, 30], [*range(10, S)]):
        assert error(run(patched, ids, cuts), expected) < 1e-4
    patched.restore()
    with torch.no_grad():
        assert error(expected[:W], model(ids[:, :W]).logits[0].double()) < 1e-4


def build(randomise, name, **more):
    """A random tiny model: `name` is a line of FAMILIES, its config class named by the part before any space."""
    kind = name.split()[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    if INDEXER.keys() <= FAMILIES.get(name, {}).keys() and INDEXED not in CONFIG_MAPPING[kind]().layer_types:
        pytest.skip(f"this transformers' own {name} masks keys wrongly if its tokens are moved on: refused")
    config = CONFIG_MAPPING[kind](**SMALL | FAMILIES.get(name, {}) | more)
    return randomise(auto_class(config).from_config(config)).eval()


def run(patched, ids_1S, cuts):
    """Logits [S, V], float64, of the tokens passed in pieces that end at `cuts`."""
    cache, found = patched.new_cache(1, ids_1S.shape[1]), []
    for start, stop in zip([0, *cuts], [*cuts, ids_1S.shape[1]], strict=True):
        output = patched.hidden(ids_1S[:, start:stop], cache)
        found.append(patched.logits(output, output.last_hidden_state[0]))
    return torch.cat(found).double()


def error(found, expected):
    """The largest error of any logit, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(params=EACH_FAMILY)
def family(request, randomise):
    """The name of a line of FAMILIES, its model, and 70 tokens."""
    return request.param, build(randomise, request.param), torch.randint(3, 97, (1, S))


def test_float32_is_the_definition(family):
    """To 1e-4 of the largest logit, in whole, in chunks and token by token; restored, the model is itself to the bit.

    Token by token from below n_local until it has been passed twice, and at the end.
    Measured worst: 5e-6; of DBRX, whose clipped projections are large, 1.1e-4 with torch 2.6.
    """
    name, model, ids = family
    with torch.no_grad():
        before = model(ids).logits
    for attention, ways in {
        "lambda": ([], [7, 30], [*range(10, 36), *range(60, S)]),
        "window": ([20, *range(60, S)],),
        "streaming": ([20, *range(60, S)],),
    }.items():
        spec = make(attention=attention, n_local=W, n_global=G)
        expected = oracle(model, spec, ids)
        patched = patched_model(model, spec)
        for cuts in ways:
            assert error(run(patched, ids, cuts), expected) < (5e-4 if name == "dbrx" else 1e-4)
        patched.restore()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_bfloat16_stays_near_it(family):
    """The median token's logits within 3 % (in norm), and nine in ten within 6 % where no expert is chosen by a hair.

    The single worst token is left to chance: with other random weights it ranged from 6 % to 21 % in Gemma 4, by one
    order of rounding in the rotation as by another, where the median stayed at 2 %. A gated delta rule in bfloat16 is
    3 to 7 % from itself in float64, in the model's own forward as in ours (three seeds), and Zamba 2 is 3 to 4 %: they
    are allowed twice as much.
    """
    name, model, ids = family
    if name == "dbrx":
        pytest.skip("its own forward in bfloat16 is 9 to 11 % from itself in float64 on such weights (three seeds)")
    model, spec = model.bfloat16(), make(n_local=W, n_global=G)
    expected = oracle(model, spec, ids)
    patched = patched_model(model, spec)
    found = run(patched, ids, [20, *range(60, S)])
    patched.restore()
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    allowed = 2 if name == "zamba2" or "linear_num_value_heads" in FAMILIES[name] else 1
    assert errors.median() < 0.03 * allowed
    if not (FAMILIES[name] | FAMILIES[name].get("text_config", {})).keys() & MOE.keys():
        assert errors.quantile(0.9) < 0.06 * allowed


def test_the_table_names_what_is_tested_here():
    """Of which an older transformers lacks some: apertus1p5_text, exaone and sarvam_moe came with 5.24."""
    assert {name.split()[0] for name in FAMILIES} == {name for name, row in ROWS.items() if row.tested}
    assert set(QUICK) < FAMILIES.keys()


def test_a_model_whose_layers_all_slide_says_so(randomise, caplog):
    for name, said in {"mistral sliding": True, "gemma2": False, "mistral": False}.items():
        for attention in ("lambda", "dca"):
            caplog.clear()
            patched_model(build(randomise, name), make(attention, n_local=W, n_global=G)).restore()
            assert ("all layers slide as trained, over 8 tokens" in caplog.text) == said


def test_a_bias_that_the_model_rounds_is_not_held_against_it(randomise):
    """Falcon-RW has its bias in bfloat16 even in float32: exact at its slopes, off by rounding in its products."""
    model = build(randomise, "falcon rw", num_attention_heads=32, hidden_size=256)
    ids, spec = torch.randint(3, 97, (1, S)), make(n_local=W, n_global=G)
    expected = oracle(model, spec, ids)
    patched = patched_model(model, spec)
    assert error(run(patched, ids, [20]), expected) < 1e-4
    patched.restore()


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon rw"])
def test_alibi_is_exact_at_any_position(randomise, name):
    """The counter moved by whole rings past 2 ** 24, where float32 knows only even numbers; no output changes."""
    model, ids = build(randomise, name), torch.randint(3, 97, (1, S))
    patched = patched_model(model, make(n_local=W, n_global=G))
    near, far = (patched.new_cache(1, S) for _ in range(2))
    for cache in (near, far):
        patched.hidden(ids[:, :40], cache)
    moved = 2**24 // W * W + W
    far.lengths, far.origins = [far.lengths[0] + moved], [far.origins[0] + moved]
    for part in (ids[:, 40:60], *ids[:, 60:].split(1, 1)):
        outputs = [patched.hidden(part, cache).last_hidden_state for cache in (near, far)]
        assert torch.equal(*outputs)
    patched.restore()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "glm", "gptj", "falcon", "bloom", "mpt"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_on_a_gpu_it_is_the_definition(randomise, name, dtype, limit):
    model, ids, spec = build(randomise, name).to(dtype), torch.randint(3, 97, (1, S)), make(n_local=W, n_global=G)
    expected = oracle(model, spec, ids)
    patched = patched_model(model.cuda(), spec)
    assert error(run(patched, ids.cuda(), [20, *range(60, S)]).cpu(), expected) < limit
    patched.restore()
