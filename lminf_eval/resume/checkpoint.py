"""Checkpoints inside a document: Λ-attention's state is small, so a pass over a million tokens outlives a kill."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.cache.recurrent_states import fill, state_entries, state_tensors
from lminf_eval.errors import UsageError
from lminf_eval.utils.atomic_write import atomic_path

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

EVERY = 2**17  # tokens of one document between two checkpoints

_FORMAT = b"2"  # a file of another format is not found
_STATES = "states."  # before the names of a recurrent layer's tensors
_TENSORS = ("sink_keys", "keys", "own_values")  # a state with older keys is not small, and not kept


class Checkpoints:
    """One file for each document that a process is inside of, in `folder`; gone when the document is done.

    `salt` is what else changes a state beside the tokens (`Journal`'s identity).
    """

    def __init__(self, folder: Path, salt: bytes):
        self.folder, self.salt = folder, salt
        self._current: Path | None = None

    def begin(self, tokens: np.ndarray, wanted: np.ndarray, capacity: int) -> None:
        """Take the next document: its input tokens, the (position, token) pairs [U, 2] wanted, its cache's capacity."""
        digest = hashlib.sha256(self.salt + _FORMAT)
        for part in (tokens, wanted, np.array([capacity])):
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
        self._current = self.folder / f"{digest.hexdigest()[:40]}.safetensors"

    def load(self, cache: AttentionState, devices: Mapping[int, torch.device]) -> tuple[int, list[np.ndarray]]:
        """Return how far an earlier process came in this document: the position, and what it had found for `wanted`.

        Fills the empty `cache`, layer i on devices[i]. Returns position 0 where there is nothing to go on from.
        """
        if not self._file.exists():
            return 0, []
        try:
            with safe_open(self._file, framework="pt") as file:
                numbers = json.loads(file.metadata()["numbers"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("The checkpoint %s can't be read (%s): the document is begun again", self._current, error)
            return 0, []
        cache.lengths, cache.origins = numbers["lengths"], numbers["origins"]
        for i, window in numbers["windows"].items():
            parts = {name: tensors[f"{i}.{name}"] for name in _TENSORS if f"{i}.{name}" in tensors}
            held = {name: x.to(devices[int(i)]) for name, x in parts.items()}
            cache.layers[int(i)] = LayerCache(window, **held, shared=numbers["shared"][i])
        if cache.states is not None:
            states = {name[len(_STATES) :]: x for name, x in tensors.items() if name.startswith(_STATES)}
            fill(cache.states, numbers["states"] | states, devices)
        logger.info("Going on at token %d of a document", numbers["position"])
        return numbers["position"], [tensors["log_probs"].numpy(), tensors["greedy"].numpy()]

    def save(self, position: int, cache: AttentionState, found: Sequence[np.ndarray]) -> None:
        """Replace the document's checkpoint; a kill meanwhile leaves the one before.

        Raises:
            UsageError: if it can't be written.
        """
        numbers: dict[str, Any] = {
            "position": position,
            "lengths": cache.lengths,
            "origins": cache.origins,
            "windows": {i: layer.window for i, layer in cache.layers.items()},
            "shared": {i: layer.shared for i, layer in cache.layers.items()},
        }
        states = state_tensors(cache.states)
        if cache.states is not None:
            numbers["states"] = {place: entry for place, entry in state_entries(cache.states) if place not in states}
        held = ((f"{i}.{name}", getattr(layer, name)) for i, layer in cache.layers.items() for name in _TENSORS)
        tensors = {name: x for name, x in held if x is not None}
        tensors |= {_STATES + place: x for place, x in states.items()}
        tensors |= {"log_probs": torch.from_numpy(found[0]), "greedy": torch.from_numpy(found[1])}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._file, sync=True) as partial:
                save_file({n: t.contiguous() for n, t in tensors.items()}, partial, {"numbers": json.dumps(numbers)})
        except (OSError, SafetensorError) as error:
            raise UsageError(f"journal={self.folder.parent}: a checkpoint can't be written: {error}") from error

    @property
    def _file(self) -> Path:
        """The current document's checkpoint."""
        assert self._current is not None  # `begin` comes first
        return self._current

    def done(self) -> None:
        """Remove the current document's checkpoint: its answers are safe."""
        if self._current is not None:
            self._current.unlink(missing_ok=True)
            self._current = None
