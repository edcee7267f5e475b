"""How each layer rotates its queries and keys: by which rotary module of the model, and in which of its dimensions.

Shapes: B batch, S tokens, H heads, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.table import adapter_of
from lminf_eval.models.modules import find_rotary, layer_type
from lminf_eval.models.rope import COLUMNS, Angles, Columns, Rotary, RotaryEmbedding, backwards, rotate_columns


class Rotation(NamedTuple):
    """How a layer rotates.

    Attributes:
        module: the number of its rotary module.
        columns: the dimensions of a head that it rotates; None if the family's own function rotates.
    """

    module: int = 0
    columns: Columns | None = None


class LayerRotations:
    """The rotary modules of one model, taken over until `restore`, their frequencies those of `n_local` tokens.

    Attributes:
        by_layer: each layer's rotation, None if it rotates nothing. The check at load corrects it.
    """

    def __init__(self, model: PreTrainedModel, layers: list[AttentionModule], n_local: int):
        self._config, family = model.config.get_text_config(), adapter_of(model.config.model_type)
        self._modules: list[RotaryEmbedding] = []
        if family is None:
            home = sys.modules[type(layers[0]).__module__]
            self._modules += [Rotary(module, home, n_local) for module in find_rotary(model)]
        elif (own := family.rotary(model, n_local)) is not None:
            self._modules.append(own)
        self.by_layer = {layer: self.candidates(layer)[0] for layer in layers}

    def restore(self) -> None:
        """Give the model its rotations back."""
        for module in self._modules:
            module.restore()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Make the family's own function do nothing inside; see `Rotary.skipped`."""
        with ExitStack() as stack:
            for module in self._modules:
                if isinstance(module, Rotary):
                    stack.enter_context(module.skipped())
            yield

    def candidates(self, layer: AttentionModule) -> list[Rotation | None]:
        """Return how a layer may rotate, the likeliest first."""
        found: list[Rotation | None] = []
        for number, module in enumerate(self._modules):
            if module.knows(layer_type(layer, self._config)):
                if not isinstance(module, Rotary) or module.has_function:
                    found.append(Rotation(number))
                if isinstance(module, Rotary):
                    found += [Rotation(number, columns) for columns in COLUMNS]
        return [*found, None]

    def angles(self, layer: AttentionModule, positions_BS: torch.Tensor, like: torch.Tensor) -> Angles | None:
        """Return the (cos, sin) of a layer at integer positions; None if it rotates nothing."""
        rotation = self.by_layer[layer]
        if rotation is None:
            return None
        module, kind = self._modules[rotation.module], layer_type(layer, self._config)
        if rotation.columns is not None and isinstance(module, Rotary):
            return module.single_angles(positions_BS, like, kind)
        return module.angles(positions_BS, like, kind)

    def turn(self, layer: AttentionModule, x_BHSD: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """Return x, queries or keys of a layer, rotated by `angles` in the layer's way."""
        rotation = self.by_layer[layer]
        if rotation is None or angles is None:
            return x_BHSD
        if rotation.columns is not None:
            return rotate_columns(x_BHSD, angles, rotation.columns)
        return self._modules[rotation.module].rotate(x_BHSD, angles)

    def rotate(
        self,
        layer: AttentionModule,
        shared: dict[Any, Any],
        x_BHSD: torch.Tensor,
        positions_BS: torch.Tensor,
        name: str,
    ) -> torch.Tensor:
        """Return x rotated to positions; the angles of one `name` are computed once and kept in `shared`."""
        rotation = self.by_layer[layer]
        if rotation is None:
            return x_BHSD
        key = name, rotation, layer_type(layer, self._config), x_BHSD.device
        if key not in shared:
            shared[key] = self.angles(layer, positions_BS, x_BHSD)
        return self.turn(layer, x_BHSD, shared[key])

    def move_back(self, layer: AttentionModule, keys_BHSD: torch.Tensor, back_B1: torch.Tensor) -> None:
        """Rotate a layer's keys, in place, `back_B1` positions back."""
        if self.by_layer[layer] is not None:
            wide = keys_BHSD.to(torch.promote_types(keys_BHSD.dtype, torch.float32))
            angles = self.angles(layer, back_B1, wide)
            assert angles is not None  # it rotates
            keys_BHSD.copy_(self.turn(layer, wide, backwards(angles)))
