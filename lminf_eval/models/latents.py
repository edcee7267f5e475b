"""Multi-head latent attention: what is kept of a token is its latent, from which its keys and values are expanded.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C. A token's latent c [R] and one rotary key shared by
all heads are all that its layer needs: head h has the key [W_h c, rotary key] and the value V_h c. So a layer's state
has one key-value head, whose key is [c, rotary key] and whose value is c, the key's first R numbers.

Few queries are compared with latents as they are, by way of W_h^T q, and V_h takes what the softmax has summed. Many
queries are cheaper to compare with keys and values that are expanded for their chunk and then dropped.

Shapes: B rows, H heads, L tokens, R numbers of a latent, N and P numbers of a head's key without and with rotation, V
numbers of a head's value; D = N + P, and S = R + P numbers that are kept of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.prefill import keep, prefill_attention
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.registry import EXPAND


class Latents:
    """One layer's latents, and the weights that make keys and values of them.

    Args:
        module: an attention layer of transformers with a method `expand_kv`.
    """

    def __init__(self, module: Any):
        self._module = module
        self._own_expand = getattr(module, EXPAND)
        self.rank, self._nope = module.kv_lora_rank, module.qk_nope_head_dim
        self.value_dim = module.v_head_dim
        self._expanded = self._nope + self.value_dim

    def _weights(self) -> torch.Tensor:
        """Return [H, N + V, R]."""
        return self._module.kv_b_proj.weight.view(-1, self._expanded, self.rank)

    def stored(self, c_B1LR: torch.Tensor, rotary_B1LP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what stands for keys and values [B, 1, L, S] and [B, 1, L, R], in place of `expand_kv`."""
        return torch.cat([c_B1LR, rotary_B1LP], -1), c_B1LR

    def expand(self, k_B1LS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys [B, H, L, D] and values [B, H, L, V] of all heads, by the model's own code."""
        if not k_B1LS.shape[2]:  # which it cannot do for no tokens
            k, v = self.expand(k_B1LS.new_zeros(*k_B1LS.shape[:2], 1, k_B1LS.shape[3]))
            return k[:, :, :0], v[:, :, :0]
        return self._own_expand(k_B1LS[..., : self.rank], k_B1LS[..., self.rank :])

    def expanded(self, layer: LayerCache | None, start: int) -> LayerCache | None:
        """Return the keys and values, of all heads, of what a layer keeps of the first `start` tokens; a copy."""
        if layer is None or not start:
            return None
        slots = layer.sinks + min(start, layer.ring)
        older: tuple = ()
        if layer.older_keys is not None:
            older = self.expand(layer.older_keys[:, :, :start])
        sinks, _ = self.expand(layer.sink_keys)
        return LayerCache(layer.window, sinks, *self.expand(layer.keys[:, :, :slots]), *older)

    def absorbs(self, queries: int) -> bool:
        """Return whether so many queries are compared with latents at less cost than with expanded keys.

        To expand a token's keys and values takes R (N + V) products a head. To compare a query with its latent takes
        R more products than N for the logit, and R more than V for the sum.
        """
        return queries * (2 * self.rank - self._expanded) < self.rank * self._expanded

    def absorb(self, q_BHLD: torch.Tensor) -> torch.Tensor:
        """Return queries [B, H, L, S] whose products with latents are those of q with keys."""
        q_BHLN, rotary = q_BHLD[..., : self._nope], q_BHLD[..., self._nope :]
        return torch.cat([q_BHLN @ self._weights()[:, : self._nope], rotary], -1)

    def project(self, c_BHLR: torch.Tensor) -> torch.Tensor:
        """Return the values [B, H, L, V] of sums of latents."""
        return c_BHLR @ self._weights()[:, self._nope :].transpose(1, 2).to(c_BHLR.dtype)

    def prefill(
        self,
        q_BHLD: torch.Tensor,
        k_B1LS: torch.Tensor,
        v_B1LR: torch.Tensor,
        layer: LayerCache | None,
        call: AttentionCall,
        update_cache: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute `prefill_attention` on expanded keys and values, and keep the latents."""
        whole = self.expanded(layer, call.start)
        found = prefill_attention(q_BHLD, *self.expand(k_B1LS), whole, call, False)
        if update_cache:
            assert layer is not None
            keep(k_B1LS, v_B1LR, layer, call)
        return found


class LatentLayers(dict[AttentionModule, Latents]):
    """The layers of a model that hand over latents in place of keys and values, until `restore`.

    A layer whose weights cannot be read as they are (quantised, split among ranks, on no device) keeps its keys and
    values, as does every layer of a release of transformers without `expand_kv`.
    """

    def __init__(self, layers: Iterable[AttentionModule]):
        super().__init__((layer, Latents(layer)) for layer in layers if _readable(layer))
        self._before = {layer: vars(layer).get(EXPAND) for layer in self}
        for layer, latents in self.items():
            setattr(layer, EXPAND, latents.stored)

    def restore(self) -> None:
        """Let the layers expand their latents again."""
        for layer, before in self._before.items():
            delattr(layer, EXPAND)
            if before is not None:
                setattr(layer, EXPAND, before)


def _readable(layer: Any) -> bool:
    expand = getattr(layer, "kv_b_proj", None)
    if not hasattr(layer, EXPAND) or type(expand) is not nn.Linear or expand.bias is not None:
        return False
    weight, per_head = expand.weight, layer.qk_nope_head_dim + layer.v_head_dim
    elsewhere = weight.device.type == "meta" or hasattr(weight, "ds_id")  # accelerate's and DeepSpeed ZeRO-3's
    plain = type(weight) is nn.Parameter and weight.dim() == 2 and not elsewhere
    return plain and weight.shape[1] == layer.kv_lora_rank and weight.shape[0] % per_head == 0
