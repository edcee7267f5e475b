"""The parts of a transformers model that evaluation reaches from outside: decoder, attention, rotary modules, head.

Shapes: T chosen positions, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lminf_eval.errors import BUILDING, UsageError
from lminf_eval.methods.base import AttentionMethod
from lminf_eval.methods.registry import DEFAULT
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.registry import unsupported
from lminf_eval.models.families.table import NEEDS, adapter_of
from lminf_eval.models.loading import auto_class
from lminf_eval.models.rope import set_forward

CACHE_NAMES = ("cache", "past_key_values")  # of a decoder's argument and output: transformers 5.24 renamed it
_PLUGGABLE = "ALL_ATTENTION_FUNCTIONS"  # where a pluggable attention layer finds its attention function
_TEXT_ARGS = ("self", "input_ids", "args", "kwargs")  # of a forward that text alone suffices for
_WINDOWS = ("sliding_window", "attention_chunk_size")  # what configs and attention modules call a layer's own window


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module between the embeddings and the head.

    It is not always `base_model`: OPT's head reads `model.decoder`, and a model for images and text has a text part.
    Nor is it always `get_decoder()`: ModernBERT calls its last linear layer so, and Llama 4 finds only itself. Some
    models for images and text have a whole language model, head and all, as their text part.
    """
    found = [model.get_decoder(), model.base_model, getattr(model, "model", None)]
    decoder = next((one for one in found if isinstance(one, PreTrainedModel) and one is not model), model)
    whole = decoder is not model and getattr(decoder, "lm_head", None) is not None
    return decoder_of(decoder) if whole else decoder


def check_structure(config: PretrainedConfig, method: type[AttentionMethod], trust_remote_code: bool = False) -> None:
    """Refuse, before any weight is read, a model that lacks the parts which `method` takes over.

    Raises:
        UsageError: naming the family and the reason.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except BUILDING:
        return  # some can be built only with their weights; what is wrong is said when these are read
    needed = [
        name for name, one in inspect.signature(type(model).forward).parameters.items() if one.default is one.empty
    ]
    if more := [name for name in needed if name not in _TEXT_ARGS]:
        raise UsageError(unsupported(config, f"{NEEDS} {' and '.join(more)}", method.name))
    if not method.patched:
        if takes(decoder_of(model), *CACHE_NAMES) is None:
            raise UsageError(unsupported(config, "its state is not a cache that chunks could go on from", method.name))
    else:
        attention_layers(model, method.name)


def takes(module: nn.Module, *names: str) -> str | None:
    """Return the first of `names` that the module's forward has as an argument, or None."""
    arguments = inspect.signature(type(module).forward).parameters
    return next((name for name in names if name in arguments), None)


def attention_layers(model: PreTrainedModel, attention: str = DEFAULT) -> list[AttentionModule]:
    """Return the model's attention modules, in order.

    Raises:
        UsageError: if there are none whose attention function can be replaced.
    """
    own = adapter_of(model.config.model_type) is not None
    numbered = [cast(AttentionModule, part) for part in decoder_of(model).modules() if hasattr(part, "layer_idx")]
    named = [module for module in numbered if "Attention" in type(module).__name__]
    found = named if own else [module for module in numbered if _is_pluggable(type(module))]
    # DBRX wraps its attention in a block of a like name; only the innermost computes attention.
    layers = [module for module in found if not any(part in found for part in list(module.modules())[1:])]
    if not layers:
        why = "transformers does not make its attention pluggable" if named else "none of its layers has attention"
        raise UsageError(unsupported(model.config, why, attention))
    return layers


def _is_pluggable(kind: type[nn.Module]) -> bool:
    """Return whether a class takes its attention function from the table that ours is in; a delta rule does not."""
    forwards = [inspect.unwrap(vars(one)["forward"]) for one in kind.__mro__ if "forward" in vars(one)]
    return any(_PLUGGABLE in one.__code__.co_names for one in forwards if inspect.isfunction(one))


def find_rotary(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's modules that turn positions into (cos, sin)."""
    return [
        module
        for name, module in decoder_of(model).named_modules()
        if name.rpartition(".")[2] == "rotary_emb" or "RotaryEmbedding" in type(module).__name__
    ]


def layer_type(module: AttentionModule, config: Any) -> str | None:
    """Return what a family calls the kind of an attention layer ("full_attention", …), or None if it has no name."""
    for name in ("layer_type", "attention_type"):
        if isinstance(getattr(module, name, None), str):
            return getattr(module, name)
    types = getattr(config, "layer_types", None)
    return types[module.layer_idx] if types and module.layer_idx < len(types) else None


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes. accelerate may keep an offloaded module's weights elsewhere, or nowhere yet."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def devices_of_layers(model: PreTrainedModel) -> dict[int, torch.device]:
    """Return where each layer that keeps something of the tokens before computes, by its number."""
    numbered = [(getattr(part, "layer_idx", None), part) for part in decoder_of(model).modules()]
    return {i: device_of(part) for i, part in numbered if isinstance(i, int) and any(True for _ in part.parameters())}


class DecoderTap:
    """Stands before a decoder's forward, and says for each thread what its next pass is about.

    Args:
        decoder: the module; its own forward is given back by `restore`.
        around: (own forward, the cache handed to this pass or None, args, options) -> what the pass returns.
    """

    def __init__(self, decoder: nn.Module, around: Callable[[Callable, Any, tuple, dict], Any]):
        self.decoder, self._around, self._here = decoder, around, threading.local()
        self._before = vars(decoder).get("forward")
        self._own = decoder.forward
        decoder.forward = self._forward

    def restore(self) -> None:
        """Give the decoder its forward back."""
        set_forward(self.decoder, self._before)

    def _forward(self, *args: Any, **options: Any) -> Any:
        answer, self._here.answer = getattr(self._here, "answer", None), None
        if answer is not None:
            return answer
        handed, self._here.handed = getattr(self._here, "handed", None), None
        return self._around(self._own, handed, args, options)

    @property
    def current(self) -> Any:
        """The context of the pass that this thread is in."""
        return self._here.context

    @contextmanager
    def context(self, context: Any) -> Iterator[None]:
        """Make `context` the current one inside."""
        self._here.context = context
        try:
            yield
        finally:
            self._here.context = None

    @contextmanager
    def handing(self, cache: Any) -> Iterator[None]:
        """Hand `cache` to the next pass; transformers, which may do more with a cache, does not see it."""
        self._here.handed = cache
        try:
            yield
        finally:
            self._here.handed = None

    @contextmanager
    def answering(self, output: Any) -> Iterator[None]:
        """Let the next pass return `output` and compute nothing."""
        self._here.answer = output
        try:
            yield
        finally:
            self._here.answer = None


def head_logits(model: PreTrainedModel, tap: DecoderTap, output: Any, hidden_TC: torch.Tensor) -> torch.Tensor:
    """Return [T, V]: the model's own forward, its decoder standing still and answering with the given hidden states.

    So whatever a family does between the decoder and its logits (scaling, soft-capping) happens as it always does.
    """
    caches = {field.name: None for field in fields(output) if field.name in CACHE_NAMES}
    answer = replace(output, last_hidden_state=hidden_TC[None], **caches)
    ids_1T = torch.zeros(1, len(hidden_TC), dtype=torch.long, device=device_of(model.get_input_embeddings()))
    with tap.answering(answer):
        return model(input_ids=ids_1T, use_cache=False).logits[0]  # Gemma 4 looks its tokens up, too


@contextmanager
def short_windows(model: PreTrainedModel, most: int) -> Iterator[None]:
    """Within it, each sliding window of the model is `most` tokens or its own size, whichever is less.

    So a few tokens cross every window, and a check at load need not be as long as the window.
    """
    owners = {id(owner): owner for owner in [model.config, model.config.get_text_config(), *model.modules()]}
    owners |= {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    wide = [
        (owner, name, vars(owner)[name])
        for owner in owners.values()
        for name in _WINDOWS
        if type(vars(owner).get(name)) is int and vars(owner)[name] > most
    ]
    for owner, name, _ in wide:
        setattr(owner, name, most)
    try:
        yield
    finally:
        for owner, name, window in wide:
            setattr(owner, name, window)
