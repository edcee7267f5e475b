"""What the queries of one layer see: the method's rule, or a sliding window of the model's own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from lminf_eval.errors import UsageError
from lminf_eval.methods.base import AttentionMethod, LayerRule
from lminf_eval.methods.branches import Branch, OwnChunk, sliding
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.registry import INDEXED, unsupported
from lminf_eval.models.modules import layer_type

_HARMLESS = {  # what families pass to their attention function besides what we read; it changes nothing at inference
    "dropout",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
}
_READ = {"sliding_window", "softcap", "s_aux"}


def layer_rule(
    module: AttentionModule, config: PreTrainedConfig, method: AttentionMethod, options: dict[str, Any], number: int
) -> LayerRule:
    """Return a layer's rule: the method's, or its own window if the layer slides as trained.

    Args:
        config: the model's.
        options: what the family passes to its attention function.
        number: the layer's.

    Raises:
        UsageError: if the family's attention does what we know nothing of.
    """

    def refuse(why: str) -> UsageError:
        return UsageError(unsupported(config, why, method.name))

    text = config.get_text_config()
    own, kind = options.get("sliding_window"), layer_type(module, text)
    strange = sorted(name for name, value in options.items() if value is not None and name not in _HARMLESS | _READ)
    if strange:
        raise refuse(f"its attention takes {', '.join(strange)}")
    if kind == "chunked_attention":
        return LayerRule((Branch(OwnChunk(text.attention_chunk_size)),))
    if kind == "sliding_attention":
        own = own or text.sliding_window
    elif kind in ("full_attention", INDEXED):
        own = None
    elif kind is not None and "attention" in kind:
        raise refuse(f"it has layers of the kind {kind!r}")
    return LayerRule(sliding(own)) if own else method.rule(number)
