"""Which families Λ-attention can run, told from a config alone, before any weight is loaded.

The general mechanism of `patching.py` reaches every causal LM of transformers whose modeling file rotates queries and
keys with `rotary_emb` and `apply_rotary_pos_emb` and whose attention is pluggable; that is read off its text. What the
text can't tell (a layer that treats its keys otherwise) the check at load finds, see `equivalence_check.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from lminf_eval.config.model_shape import WITHOUT_KEYS
from lminf_eval.errors import UsageError
from lminf_eval.methods.base import AttentionMethod, WindowedMethod
from lminf_eval.methods.branches import UNBOUNDED
from lminf_eval.methods.full import Full
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.models.families.table import NEEDS, family_row

_ENCODER_DECODER = "it is an encoder-decoder"
_NO_CAUSAL_LM = "transformers has no causal language model of this type"
_TWO_WAY = "its config has is_decoder=False, so that each token sees those after it"
_SCALED = "llama_4_scaling_beta"  # of rope_parameters
_ABSOLUTE = r"nn\.Embedding\([^)]*pos|wpe|PositionalEmbedding|self\.pos_encoding"  # in a modeling file
EXPAND = "expand_kv"  # the method of attention modules that makes keys and values of latents
INDEXED = "indexed_attention"  # a kind of layer
_READ = WITHOUT_KEYS | {"full_attention", "sliding_attention", "chunked_attention", "hybrid"}  # kinds of layers


@dataclass(frozen=True)
class Support:
    """How a family is run, or why it isn't.

    Attributes:
        family: transformers' `model_type`.
        kind: "rotary", "ALiBi", or "none" where Λ-attention can't run it.
        where: the file that takes its attention over: "patching.py" or one of "families/"; empty if kind is "none".
        reason: why not, in words that end "can't run the family X: …"; empty otherwise.
    """

    family: str
    kind: str
    where: str = ""
    reason: str = ""

    @property
    def tested(self) -> bool:
        """Whether a test holds this family to the definition; the others are held to themselves at each load."""
        return self.kind != "none" and family_row(self.family).tested


def check(config: Any, method: type[AttentionMethod]) -> None:
    """Refuse a transformers config that an attention method can't run.

    Raises:
        UsageError: naming the family and the reason.
    """
    reason = support(config).reason if method.patched else _unscored(config)
    if reason:
        raise UsageError(unsupported(config, reason, method.name))


def checked_method(config: Any, args: MethodArgs) -> tuple[AttentionMethod, str]:
    """Return the method for a model, and where its n_local comes from, as `MethodArgs.resolve` does.

    Raises:
        UsageError: naming the family and the reason, if the method can't run the model.
    """
    check(config, args.method)
    method, why = args.resolve(config)
    most = index_topk(config)
    if most and isinstance(method, WindowedMethod) and (too_many := method.most_seen - most) > 0:
        line = f"its indexer chooses among a query's keys if these are more than index_topk={most}"
        if method.most_seen < UNBOUNDED:
            line += f", so n_local can be {method.n_local - too_many} at most"
        raise UsageError(unsupported(config, line, method.name))
    return method, why


def support(config: Any) -> Support:
    """What is known of a transformers config's family before its weights are there."""
    row = family_row(config.model_type)
    if row.adapter is not None:
        return Support(row.name, "ALiBi" if getattr(config, "alibi", False) else row.positions, row.adapter.file)
    reason = row.refused or ("" if _custom_code(config) else _obstacle(config))
    return Support(row.name, "none", reason=reason) if reason else Support(row.name, row.positions, "patching.py")


def families_table() -> list[Support]:
    """One row for each family of the installed transformers that writes text, supported ones first, by name."""
    rows = set()
    with _quiet():  # default configs warn about themselves
        for name in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}:
            with suppress(ValueError, KeyError, StrictDataclassError):  # a family without a default config
                rows.add(support(CONFIG_MAPPING[name]()))
    return sorted(rows, key=lambda row: (row.kind == "none", row.family))


def unsupported(config: Any, why: str, attention: str) -> str:
    """Return the line that refuses a family by name."""
    line = f"attention={attention} can't run the family {config.model_type!r}: {why}"
    if attention == Full.name:
        nor_hf = why.startswith(NEEDS) or why in (_NO_CAUSAL_LM, _TWO_WAY)
        return line if nor_hf else f"{line}; --model hf runs it"
    instead = "" if why.startswith(NEEDS) or _unscored(config) else f"attention={Full.name} runs it as it is, and "
    return f"{line}; {instead}`lminf doctor --families` lists what is supported"


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_multimodal(config: Any) -> bool:
    """Return whether transformers loads the model only together with the part that reads images or sound."""
    family = config.model_type
    return family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def index_topk(config: Any) -> int:
    """Return the most keys that a model's indexer chooses for a query; 0 if it has no indexer."""
    return getattr(config.get_text_config(), "index_topk", None) or 0


def keeps_latents(config: Any) -> bool:
    """Return whether latents are kept of a model with latent attention, in place of its keys and values.

    They are if this release of transformers has the model expand them in one place. Under our methods, layers whose
    weights are quantised keep keys and values; see `models/latents.py`.
    """
    return EXPAND in _source(config.get_text_config())


def scales_queries(config: Any) -> bool:
    """Return whether a model scales queries by their token's position, on purpose."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return _SCALED in rope or family_row(config.model_type).scales_queries


def _custom_code(config: Any) -> bool:
    """Whether a model's own code, which its user trusts, has its causal LM: the check at load judges it then."""
    own = config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return own and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _unscored(config: Any) -> str:
    """Why a model can't be scored token by token even as it is; empty if it can, as far as its config tells."""
    return family_row(config.model_type).refused_full or ("" if _custom_code(config) else _not_causal(config))


def _not_causal(config: Any) -> str:
    """Why a config is not of a causal language model; empty if it is of one."""
    if config.is_encoder_decoder:
        return _ENCODER_DECODER
    if is_multimodal(config):
        return ""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return _NO_CAUSAL_LM
    if getattr(config, "is_decoder", True) is False and "`is_decoder=True" in _source(config):
        return _TWO_WAY
    return ""


def _obstacle(config: Any) -> str | None:
    """Why the general mechanism can't reach a family, as far as its config and its modeling file tell."""
    if reason := _not_causal(config):
        return reason
    if is_multimodal(config):
        return family_row(config.get_text_config().model_type).refused or None  # the check at load says the rest
    source = _source(config)
    text = config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    read = _READ | {INDEXED} if index_topk(config) else _READ
    if kinds - read:
        return f"its layers of the kind {', '.join(sorted(kinds - read))} are neither full nor sliding attention"
    if "rotary_emb" not in source and re.search(_ABSOLUTE, source):
        return "its positions are absolute: none exist beyond the length it was trained at"
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        return "transformers does not make its attention pluggable"
    return None


def _source(config: Any) -> str:
    """The text of the modeling file that a config's causal LM is in; read, not imported."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if names is None:
        return ""
    wanted = f"class {names if isinstance(names, str) else names[0]}("
    folder = Path(inspect.getfile(type(config))).parent
    for path in [*folder.glob("modeling_*.py"), *folder.parent.glob("*/modeling_*.py")]:  # some share another's class
        text = path.read_text(encoding="utf-8")
        if wanted in text:
            return text
    return ""
