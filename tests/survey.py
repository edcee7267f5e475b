"""What becomes of every type that transformers has: `python -m tests.survey [TYPE ...]` prints a row for each.

Each type that writes text is built tiny, every weight random: by its line of tests/test_families.py, or from its
default config with small numbers. `lambda` is held to the dense float64 oracle of those tests, below, at and beyond
n_local, in one piece, in chunks and token by token; `full` to the model's own forward, in chunks. The exit status is 1
if a type ends in a traceback or gives a wrong number. "Not built" says that this script has no tiny model, nothing of
the type.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import METHODS, make
from lminf_eval.models.equivalence_check import full_model, patched_model
from lminf_eval.models.families.registry import check
from lminf_eval.models.loading import auto_class
from lminf_eval.models.modules import check_structure
from tests.conftest import _randomise
from tests.test_families import FAMILIES, MOE, SMALL, G, S, W, error, oracle, run

CUTS = [], [7, 30], [*range(10, S)]
LIMIT = 1e-4, 5e-4  # of the largest logit: right; DBRX's large projections
MOST = 60e6  # parameters of a model that still counts as tiny
TEXT = SMALL | MOE | {"head_dim": 8, "sliding_window": 8, "max_position_embeddings": 128}
OTHER = {  # of a part that reads images or sound
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 28,
    "depth": 1,
    "num_heads": 2,
    "embed_dim": 16,
    "mlp_ratio": 2,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "num_layers": 1,
    "num_position_embeddings": 64,
    "hidden_dim": 16,
    "n_layers": 1,
    "out_hidden_size": 32,
}
LIKE = {"gemma4_unified_text": "gemma4_text"}  # whose line makes it too


def tiny(name: str) -> PretrainedConfig:
    """Return a config of the type for a model of a few thousand weights, if that can be had."""
    kind = CONFIG_MAPPING[name]
    if name in FAMILIES:
        return kind(**SMALL | FAMILIES[name])
    if name in LIKE:
        return kind(**SMALL | FAMILIES[LIKE[name]])
    config = kind()
    text = config.get_text_config()
    for part in getattr(config, "sub_configs", {}):
        found = getattr(config, part, None)
        if isinstance(found, PretrainedConfig) and found is not text:
            _set(found, OTHER)
    known = LIKE.get(text.model_type, text.model_type)
    if text is not config and known in FAMILIES:
        part = next(part for part in config.sub_configs if getattr(config, part, None) is text)
        line = SMALL | FAMILIES[known] | {"model_type": text.model_type}
        return kind.from_dict(config.to_dict() | {part: line})
    _set(text, TEXT)
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" in rope:  # only some families read the sections
        half = int(8 * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return kind.from_dict(config.to_dict())


def _set(config: PretrainedConfig, numbers: dict[str, int]) -> None:
    """Set those of the numbers that the config has, each in the config's own kind, and shorten lists of layers."""
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in vars(config).items():
        if layers and isinstance(value, list) and len(value) == layers:
            different = value if isinstance(value[0], int) else list(dict.fromkeys(value))
            vars(config)[name] = (different * 3)[: numbers["num_hidden_layers"]]
    for name, number in numbers.items():
        with suppress(AttributeError):  # one that the config computes
            if type(getattr(config, name, None)) in (int, float):
                setattr(config, name, type(getattr(config, name))(number))


class NotBuilt(Exception):
    """The survey has no tiny model of the type."""


def build(name: str) -> Any:
    """Return a random tiny model of the type.

    Raises:
        NotBuilt: if no small numbers make one of its default config that reads a text by its own code.
    """
    try:
        config = tiny(name)
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in auto_class(config).from_config(config).parameters())
        if weights > MOST:
            raise NotBuilt("its default config is of a large model, whatever numbers it is given")
        torch.manual_seed(0)
        model = _randomise(auto_class(config).from_config(tiny(name))).eval()
        with torch.inference_mode():
            model(input_ids=torch.randint(3, 97, (1, 8)), use_cache=False)
        return model
    except NotBuilt:
        raise
    except Exception as failure:
        raise NotBuilt(_line(failure)) from failure


def under_lambda(name: str) -> str:
    """Say what `attention=lambda` does with the type."""
    spec = make(n_local=W, n_global=G)
    model = _admitted(name, "lambda")
    ids = torch.randint(3, 97, (1, S), generator=torch.Generator().manual_seed(0))
    patched = patched_model(model, spec)
    found = [run(patched, ids, cuts) for cuts in CUTS]
    patched.restore()
    expected = oracle(model, spec, ids)
    return _verdict(max(error(one, expected) for one in found), LIMIT[name == "dbrx"])


@torch.inference_mode()
def under_full(name: str) -> str:
    """Say what `attention=full` does with the type."""
    model = _admitted(name, "full")
    ids = torch.randint(3, 97, (1, S), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits[0].double()
    full = full_model(model)
    found = [run(full, ids, cuts) for cuts in CUTS]
    full.restore()
    return _verdict(max(error(one, expected) for one in found), LIMIT[1])


def _admitted(name: str, attention: str) -> Any:
    """Return the tiny model, if the type passes what is asked before weights are read."""
    try:
        config = tiny(name) if name in FAMILIES else CONFIG_MAPPING[name]()
    except Exception as failure:
        raise NotBuilt(_line(failure)) from failure
    check(config, METHODS[attention])
    check_structure(config, METHODS[attention])
    return build(name)


def _verdict(found: float, limit: float) -> str:
    return f"runs, {found:.0e}" if found < limit else f"WRONG, {found:.0e}"


def outcome(what: Callable[[str], str], name: str) -> str:
    """Return one line of what becomes of a type."""
    try:
        return what(name)
    except UsageError as refusal:
        line = str(refusal).split(": ", 2)[-1] if "can't run the family" in str(refusal) else str(refusal)
        return f"refused: {line.split('; ')[0]}"
    except NotBuilt as failure:
        return f"not built: {failure}"
    except Exception as failure:
        where = failure.__traceback__
        while where.tb_next:
            where = where.tb_next
        return f"CRASH in {where.tb_frame.f_code.co_name}: {_line(failure)}"


def _line(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:200]


def main(names: list[str]) -> int:
    """Print the table; return 1 if a number is wrong or a traceback was met."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    counts: Counter[tuple[str, str, str]] = Counter()
    for name in names or sorted(causal | set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)):
        mapping = "causal" if name in causal else "multimodal"
        for attention, what in {"lambda": under_lambda, "full": under_full}.items():
            line = outcome(what, name)
            counts[mapping, attention, line.replace(":", ",").split(",")[0].split(" in ")[0]] += 1
            print(f"{name}\t{mapping}\t{attention}\t{line}", flush=True)
    for (mapping, attention, kind), number in sorted(counts.items()):
        print(f"{number} {mapping} types under attention={attention}: {kind}")
    return int(any(kind in ("WRONG", "CRASH") for *_, kind in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
