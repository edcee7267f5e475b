"""`lminf diagnose`: LM-Infinite's three out-of-distribution factors, measured on a model under `full` and `lambda`."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lminf_eval.diagnosis.figures import draw_figures
from lminf_eval.diagnosis.measure import Measures, measure, methods_compared
from lminf_eval.diagnosis.tables import Tables, build_tables
from lminf_eval.errors import UsageError
from lminf_eval.harness import model_args
from lminf_eval.methods.lambda_ import Lambda
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.models.families import registry
from lminf_eval.models.loading import auto_class, read_config, read_weights
from lminf_eval.report.escape import plain, shorten
from lminf_eval.tasks.tokenizer import load_tokenizer

_PANELS = 4
_LEAST = 32  # tokens of a range that what lies beyond is compared with


def diagnose(
    pretrained: str,
    length: int = 16384,
    layers: str = "",
    n_local: int | None = None,
    text: Path | None = None,
    output: Path = Path("lminf-diagnosis"),
    dtype: str = "auto",
    device: str | None = None,
) -> None:
    """Measure the first `length` tokens of a text; write figures (PNG, SVG) and numbers (CSV) to the folder `output`.

    Args:
        layers: comma-separated indices; by default four, evenly spaced from the first to the last.
        text: a file in UTF-8; the reference manual that every CPython carries by default.

    Raises:
        UsageError: for bad input, or a model that Λ-attention cannot run; before any weight is read.
    """
    model_args.check(pretrained, {"dtype": dtype})
    device = model_args.find_device(device)
    config = read_config(pretrained, {})
    args = MethodArgs.parse({"attention": Lambda.name, "n_local": n_local})
    ours, why = registry.checked_method(config, args)
    assert isinstance(ours, Lambda)
    window = ours.n_local
    assert window is not None  # `resolve` has settled it
    if window < _LEAST:
        raise UsageError(f"n_local={window} ({why}): must be {_LEAST} or more, to tell a range by; see --n-local")
    if length <= window:
        raise UsageError(f"length={length}: must be more than n_local={window} ({why}); see --length, --n-local")
    chosen = choose_layers(layers, config.get_text_config().num_hidden_layers)
    ids_N = torch.tensor(load_tokenizer(pretrained=pretrained).encode(_read(text))[:length])
    if len(ids_N) < length:
        raise UsageError(f"length={length}: the text has {len(ids_N)} tokens; pass a longer one with --text")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output {output}: {error.strerror}") from None

    model = read_weights(auto_class(config), pretrained, dtype=dtype).eval()
    module: torch.nn.Module = model  # transformers' own annotation of `to` takes no device
    module.to(device)
    measures = _measure_methods(model, ours, window, ids_N, chosen)
    tables = build_tables(measures, window, ours.n_global, length)
    name = shorten(plain(Path(pretrained).resolve().name if Path(pretrained).is_dir() else pretrained), 40)
    try:
        write_csv(tables, output)
        for plot in draw_figures(tables, name, window, ours.n_global):
            plot.write(output)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    print(summarize(tables, window, ours.n_global, length))
    print(f"figures (PNG, SVG) and numbers (CSV): {plain(str(output))}")


def _measure_methods(
    model: PreTrainedModel, ours: Lambda, n_local: int, ids_N: torch.Tensor, layers: list[int]
) -> dict[str, Measures]:
    """Run the text under each method, with a progress bar."""
    measures = {}
    compared = methods_compared(ours, len(ids_N))
    with tqdm(total=len(compared) * len(ids_N), unit="token") as bar:
        for name, method in compared.items():
            bar.set_description(name)
            measures[name] = measure(model, method, n_local, ids_N, layers, bar)
    return measures


def choose_layers(given: str, count: int) -> list[int]:
    """Return the indices in `given`, ascending and once each, of a model with `count` layers.

    Raises:
        UsageError: for anything that is not the index of a layer.
    """
    if not given.strip():
        return sorted(set(np.linspace(0, count - 1, _PANELS).round().astype(int).tolist()))
    chosen = set()
    for part in given.split(","):
        if not part.strip().isdecimal() or int(part) >= count:
            raise UsageError(
                f"layers={given}: {part.strip()!r} is no layer; they are 0 to {count - 1}, as in 0,{count - 1}"
            )
        chosen.add(int(part))
    return sorted(chosen)


def write_csv(tables: Tables, folder: Path) -> None:
    """Write the tables as CSV: logits, entropy, hidden-states, summary."""
    named = {
        "logits": tables.logits,
        "entropy": tables.entropy,
        "hidden-states": tables.states,
        "summary": tables.summary,
    }
    for name, table in named.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")


def summarize(tables: Tables, n_local: int, n_global: int, length: int) -> str:
    """Summarize each method in a line: the means over the layers of `Tables.summary`, which defines them."""
    layers = ", ".join(map(str, tables.summary["layer"].unique()))
    lines = [
        f"within n_local={n_local} → beyond, in {length} tokens, mean over layers {layers}:",
        f"  {'':<6}  {'highest logit':<15}  {'out of range':<12}  {'entropy (nats)':<15}  drift of hidden states",
    ]
    for method, mean in tables.summary.groupby("method").mean().iterrows():
        logit, entropy = (f"{mean[f'{x}_within']:.2f} → {mean[f'{x}_beyond']:.2f}" for x in ("highest", "entropy"))
        lines.append(f"  {method:<6}  {logit:<15}  {mean['logits_outside']:<12.2%}  {entropy:<15}  {mean['drift']:.2f}")
    full = tables.summary[tables.summary["method"] == "full"].set_index("layer")["first_tokens"]
    lines.append(
        f"hidden states of the first {n_global} tokens: up to {full.max():.1f} times as far from the middle as the "
        f"others' (layer {full.idxmax()})"
    )
    return "\n".join(lines)


def _read(text: Path | None) -> str:
    if text is None:
        return "\n".join(topics.values())
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"text {text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"text {text}: it is not UTF-8 at byte {error.start}") from None
