"""What a cell will cost, from the sweep's file alone: no model, no GPU, no network. Where nothing is known, None."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_eval.harness.model_args import answer_args
from lminf_eval.harness.plugin import MODEL_NAME
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.sweep.cell import CellFolder, read_result
from lminf_eval.sweep.config import Cell
from lminf_eval.tasks.task_metadata import CONTINUATION, DOCUMENTS, MAX_NEW_TOKENS
from lminf_eval.utils.tokens import split_length

# Of our tasks; the others' number depends on the length.
_DOCUMENTS = {"pydocs_ppl": 4, "pydocs_generation": 4, "pg19_ppl": 100} | dict.fromkeys(MAX_NEW_TOKENS, DOCUMENTS)
_NEW_TOKENS = {"pydocs_generation": CONTINUATION} | MAX_NEW_TOKENS
_BYTES = {"float64": 8, "float32": 4}  # a number; other dtypes have 2
_PARAMETERS = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")  # in a model's name, as in Llama-2-7b


@dataclass(frozen=True)
class Estimate:
    """Tokens through the model, seconds at the rate measured or stated, bytes of weights and cache."""

    tokens: int | None
    seconds: float | None
    bytes: float | None


def estimate(cell: Cell, rates: dict[tuple[str, str], float]) -> Estimate:
    """The cost of `cell`; `rates` are measured tokens per second by model and method (see `measured_rates`)."""
    tokens = _tokens(cell)
    rate = rates.get((cell.model, cell.method), cell.resources.tokens_per_second)
    return Estimate(tokens, tokens / rate if tokens is not None and rate else None, _memory(cell))


def measured_rates(folders: Iterable[CellFolder]) -> dict[tuple[str, str], float]:
    """Tokens per second, loading included, of the cells that are done, by model and method."""
    spent: dict[tuple[str, str], list[float]] = {}
    for folder in folders:
        try:
            raw = read_result(folder.result, folder.cell)
            tokens, seconds = raw["config"]["lminf"]["tokens_computed"], float(raw["total_evaluation_time_seconds"])
        except (ValueError, KeyError, TypeError):
            continue  # not done, or done by another model than ours
        total = spent.setdefault((folder.cell.model, folder.cell.method), [0, 0])
        total[0] += tokens
        total[1] += seconds
    return {name: tokens / seconds for name, (tokens, seconds) in spent.items() if tokens and seconds}


def _tokens(cell: Cell) -> int | None:
    """An upper bound, each document's shared prefixes computed once."""
    family, _ = split_length(cell.task)
    metadata, limit = cell.settings.get("metadata") or {}, cell.settings.get("limit")
    documents = metadata.get("documents", _DOCUMENTS.get(family))
    if "data_files" in metadata:
        documents = None
    if limit is not None:
        if limit >= 1:
            documents = int(limit) if documents is None else min(documents, int(limit))
        elif documents is not None:
            documents = math.ceil(documents * limit)
    samples = cell.settings.get("samples")
    if isinstance(samples, dict) and cell.task in samples:
        documents = len(samples[cell.task])
    if cell.length is None or documents is None:
        return None
    return documents * (cell.length + _NEW_TOKENS.get(family, 0))


def _memory(cell: Cell) -> float | None:
    """Bytes of the weights, and of one sequence's keys and values where the model's configuration is at hand."""
    config = _config(cell.model_args["pretrained"])
    number = _BYTES.get(str(cell.model_args.get("dtype", config.get("dtype", config.get("torch_dtype", "auto")))), 2)
    folder = Path(cell.model_args["pretrained"]).expanduser()
    files = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder.is_dir() else []
    if files:
        weights = sum(files) * number / _BYTES.get(str(config.get("dtype", config.get("torch_dtype"))), 2)
    elif match := _PARAMETERS.search(folder.name.lower()):
        weights = float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]] * number
    else:
        return None
    return weights + _cache(cell, config) * number


def _cache(cell: Cell, config: dict[str, Any]) -> int:
    """Numbers in the keys and values of one sequence; 0 where the configuration does not say."""
    heads = config.get("num_attention_heads")
    if not heads or not cell.length:
        return 0
    width = config.get("num_key_value_heads", heads) * config.get("head_dim", config["hidden_size"] // heads)
    layers = config["num_hidden_layers"]
    kept = layers * cell.length
    if cell.settings["model"] == MODEL_NAME:
        own = {name: value for name, value in cell.model_args.items() if name in answer_args()}
        method = MethodArgs.parse(own).at(config.get("max_position_embeddings", cell.length), layers)
        kept = sum(method.rule(layer).kept(cell.length) for layer in range(layers))
    return 2 * width * kept


def _config(pretrained: str) -> dict[str, Any]:
    """A model's config.json, of a local folder or of what the hub's cache has; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    file = Path(pretrained).expanduser() / "config.json"
    if not file.is_file():
        try:
            cached = try_to_load_from_cache(pretrained, "config.json")
        except HFValidationError:
            return {}
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    config = json.loads(file.read_text(encoding="utf-8"))
    return config.get("text_config") or config
