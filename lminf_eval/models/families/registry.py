"""Which families Λ-attention can run, told from a config alone, before any weight is loaded.

The general mechanism of `patch.py` reaches every causal LM of transformers whose modeling file rotates queries and
keys with `rotary_emb` and `apply_rotary_pos_emb` and whose attention is pluggable; that is read off its text. What the
text can't tell (a layer that treats its keys otherwise) the check at load finds, see `selfcheck.py`.
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lminf_eval.errors import UsageError

# Families of tests/test_families.py: each is held there to a dense float64 oracle.
_TESTED = """
    afmoe apertus apertus1p5_text arcee aria_text bitnet bloom codegen cohere cohere2 cohere2_moe cwm dbrx dots1
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3 gemma3_text gemma3n_text
    gemma4_text glm glm4 glm4_moe gpt_neox gpt_oss gptj granite granitemoe granitemoeshared helium hy_v3
    hyperclovax jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash minimax_m2 ministral ministral3 mistral mixtral
    modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2
    qwen2_moe qwen3 qwen3_moe sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
"""
TESTED = frozenset(_TESTED.split())

_OWN = {"gptj": "gptj", "codegen": "gptj", "mpt": "mpt", "bloom": "bloom", "falcon": "falcon"}
_STATES = "it is a state-space, convolutional or recurrent model, in part or whole: its state is not keys and values"
_ABSOLUTE_AFTER_ALL = "it normalises queries and keys after rotating them, so its logits depend on absolute positions"
_REFUSED = {
    "beam": "it scales queries by their absolute position",
    "diffllama": "its layers attend twice, with one set of keys and two of values",
    "doge": "its attention hides keys by their values",
    "dory": "its layers pass over each token several times",
    "granite_swa": "it has a rotary embedding per layer",
    "granitemoe_swa": "it has a rotary embedding per layer",
    "hrm_text": "its layers pass over each token several times",
    "mllama": "some of its layers attend to an image",
    "hunyuan_v1_dense": _ABSOLUTE_AFTER_ALL,
    "hunyuan_v1_moe": _ABSOLUTE_AFTER_ALL,
    "recurrent_gemma": _STATES,
}
_ONE_TOKEN = "its layers go on from their state for single tokens only, so that chunks would each begin again"
_REFUSED_FULL = {
    "falcon_mamba": _ONE_TOKEN,
    "jamba": _ONE_TOKEN,
    "mamba": _ONE_TOKEN,
    "xlstm": "it has a state of its own, which can't be copied for requests that begin alike",
    "zamba": _ONE_TOKEN,
    "minimax": "it has a cache of its own, which can't be copied for requests that begin alike",
    "recurrent_gemma": "its state is part of its layers, so that requests can't be kept apart",
}
_ENCODER_DECODER = "it is an encoder-decoder"
_NO_CAUSAL_LM = "transformers has no causal language model of this type"


@dataclass(frozen=True)
class Support:
    """How a family is run, or why it isn't.

    Attributes:
        family: transformers' `model_type`.
        kind: "rotary", "ALiBi", or "none" where Λ-attention can't run it.
        where: the file that takes its attention over: "patch.py" or one of "families/"; empty if kind is "none".
        reason: why not, in words that end "can't run the family X: …"; empty otherwise.
    """

    family: str
    kind: str
    where: str = ""
    reason: str = ""

    @property
    def tested(self) -> bool:
        """Whether a test holds this family to the definition; the others are held to themselves at each load."""
        return self.family in TESTED


def check(config: Any, attention: str = "lambda") -> None:
    """Refuse a transformers config that `attention` can't run.

    Raises:
        UsageError: naming the family and the reason.
    """
    reason = _REFUSED_FULL.get(config.model_type, "") if attention == "full" else support(config).reason
    if reason:
        raise UsageError(unsupported(config, reason, attention))


def support(config: Any) -> Support:
    """What is known of a transformers config's family before its weights are there."""
    family = config.model_type
    if family in _OWN:
        return Support(family, "ALiBi" if _alibi(config) else "rotary", f"families/{_OWN[family]}.py")
    reason = _REFUSED.get(family) or ("" if _custom_code(config) else _obstacle(config))
    return Support(family, "none", reason=reason) if reason else Support(family, "rotary", "patch.py")


def families_table() -> list[Support]:
    """One row for each causal LM family of the installed transformers, supported ones first, by name."""
    rows = set()
    with _quiet():  # default configs warn about themselves
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            with suppress(ValueError, KeyError, StrictDataclassError):  # a family without a default config
                rows.add(support(CONFIG_MAPPING[name]()))
    return sorted(rows, key=lambda row: (row.kind == "none", row.family))


def unsupported(config: Any, why: str, attention: str = "lambda") -> str:
    """Return the line that refuses a family by name."""
    if attention == "full":
        return f"attention=full can't run the family {config.model_type!r}: {why}; --model hf runs it"
    instead = "" if why in (_ENCODER_DECODER, _NO_CAUSAL_LM) else "attention=full runs it as it is, and "
    return (
        f"attention=lambda can't run the family {config.model_type!r}: {why}; "
        f"{instead}`lminf doctor --families` lists what is supported"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _custom_code(config: Any) -> bool:
    """Whether a model's own code, which its user trusts, has its causal LM: the check at load judges it then."""
    own = config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return own and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _alibi(config: Any) -> bool:
    return config.model_type in ("mpt", "bloom") or bool(getattr(config, "alibi", False))


def _obstacle(config: Any) -> str | None:
    """Why the general mechanism can't reach a family, as far as its config and its modeling file tell."""
    if config.is_encoder_decoder:
        return _ENCODER_DECODER
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return _NO_CAUSAL_LM
    source = _source(config)
    if "kv_a_proj" in source:
        return "its multi-head latent attention keeps no keys that could be rotated anew"
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds & {"linear_attention", "conv", "hybrid"} or re.search(r"class \w*(Rwkv|xLSTM|ShortConv)\w*\(", source):
        return _STATES
    if kinds:
        return f"its layers of the kind {', '.join(sorted(kinds))} are neither full nor sliding attention"
    if "apply_rotary_pos_emb(" not in source or "self.rotary_emb" not in source:
        if re.search(r"nn\.Embedding\([^)]*pos|wpe|PositionalEmbedding|self\.pos_encoding", source):
            return "its positions are absolute: none exist beyond the length it was trained at"
        return "it has no rotary_emb that could be taken over"
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        return "transformers does not make its attention pluggable"
    return None


def _source(config: Any) -> str:
    """The text of the modeling file that a config's causal LM is in; read, not imported."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    wanted = f"class {names if isinstance(names, str) else names[0]}("
    folder = Path(inspect.getfile(type(config))).parent
    for path in [*folder.glob("modeling_*.py"), *folder.parent.glob("*/modeling_*.py")]:  # some share another's class
        text = path.read_text(encoding="utf-8")
        if wanted in text:
            return text
    return ""
