"""Shapes of models with random weights: speed and memory don't depend on what a weight is.

Each is a transformers config. Most are Llamas; the others are of other kinds, with SmolLM2's vocabulary and about as
many weights.
"""

from typing import Any

_SMOLLM2 = {  # SmolLM2-135M
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "135m": _SMOLLM2,
    "1b": {  # Llama-3.2-1B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "7b": {  # Llama-2-7B
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "hybrid-delta-135m": {  # Qwen3.5: three layers of a gated delta rule, then one of attention
        "model_type": "qwen3_5_text",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "hybrid-conv-135m": {  # LFM2: short convolutions, and attention in six layers of sixteen, as in LFM2-350M
        "model_type": "lfm2",
        "vocab_size": 49152,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "mla-135m": {  # DeepSeek-V3's latent attention, its MLPs dense, its queries not compressed (as in V2-Lite)
        "model_type": "deepseek_v3",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "first_k_dense_replace": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
        "q_lora_rank": None,
        "kv_lora_rank": 144,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # A Llama with the operations of mla-135m: 9 heads of 80 + 80 numbers for 9 of 96 + 64.
    "gqa-135m": _SMOLLM2 | {"head_dim": 80},
}
EQUAL_FLOPS = {"mla-135m": "gqa-135m"}  # what a shape is compared with: the operations of a token are equal within 1 %
