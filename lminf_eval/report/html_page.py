"""One self-contained page of all results: it opens from disk, loads nothing, and works without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from lminf_eval import __version__
from lminf_eval.errors import UsageError
from lminf_eval.report import escape, export, formats
from lminf_eval.report.figures.figure import Plot
from lminf_eval.report.figures.style import INK
from lminf_eval.report.over_lengths import summary_table
from lminf_eval.report.pivot import Table, pivot, select_metrics
from lminf_eval.report.repro_command import reproduction_command
from lminf_eval.report.run_metadata import compact, environment_line, find_backend, table, text
from lminf_eval.report.sample_store import SampleStore
from lminf_eval.utils.formatting import format_metric
from lminf_eval.utils.tokens import format_tokens

TEMPLATES = Path(__file__).with_name("templates")
MOST_ANSWERS = 300  # rows of answers in one page, unless two for each run and length are more
FILTERS = ("model", "method", "task", "length", "metric")


def render_page(store: SampleStore, plots: list[Plot], baseline: str = "") -> str:
    """Return the whole page as HTML. `baseline` is as for `pivot.pivot`; a table without it shows no comparison."""
    collection = store.collection
    results = collection.results
    tables = _tables(store, baseline)
    rows = [_row(result, store.standard_error(result)) for _, result in results.iterrows()]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    environments: dict[str, int] = {}
    return (
        formats.page_environment()
        .get_template("report.html")
        .render(
            version=__version__,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
            tables=[_with_downloads(one, i) for i, one in enumerate(tables, start=1)],
            figures=[(plot, inline_svg(plot, f"figure{i}")) for i, plot in enumerate(plots)],
            rows=rows,
            filters={name: _choices(rows, name) for name in FILTERS},
            answers=_answers(store),
            runs=[_run(store, name, environments) for name in collection.runs],
            environments=list(environments),
            problems=[*collection.problems, *store.problems],
            notes=collection.notes,
            models=results["model_path"].nunique(),
            methods=results["method"].nunique(),
            downloads=[
                ("results.csv", data_url(export.tidy_csv(results), "text/csv")),
                ("results.parquet", data_url(export.tidy_parquet(results), "application/vnd.apache.parquet")),
            ],
        )
    )


def inline_svg(plot: Plot, prefix: str) -> str:
    """Return the figure for use inside a page, with unique ids, the page's text colour as ink, and a readable width."""
    svg = plot.svg()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{prefix}-", svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    width = float(box[1])
    size = f"min-width: {0.9 * width:.0f}px; max-width: {1.7 * width:.0f}px"
    label = escape.html(f"{plot.title}. {plot.caption}")
    svg = re.sub(r"^<svg [^>]*?(viewBox=\S+ \S+ \S+ \S+)[^>]*>", rf'<svg \1 role="img" style="{size}">', svg)
    svg = svg.replace('role="img"', f'role="img" aria-label="{label}"', 1)
    return svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif").replace(INK, "currentColor")


def data_url(content: str | bytes, kind: str) -> str:
    """Return `content` as a link that a browser can save without a server."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _tables(store: SampleStore, baseline: str) -> list[Table]:
    """Return a table for each family of tasks that has lengths, one for all that have none, one over all lengths."""
    results = select_metrics(store.collection.results)
    has_lengths = results.groupby("family")["length"].transform("count") > 0
    groups = [group for _, group in results[has_lengths].groupby("family")]
    groups += [results[~has_lengths]] if not has_lengths.all() else []
    several = results["model_path"].nunique() > 1
    rows = ("model", "method") if several else ("method",)
    tables = [_compared(store, group, rows, baseline) for group in groups]
    summary = summary_table(store, results, rows)
    return [*tables, *([summary] if summary else [])]


def _compared(store: SampleStore, results: pd.DataFrame, rows: Sequence[str], baseline: str) -> Table:
    try:
        return pivot(store, results, rows, baseline=baseline)
    except UsageError:  # these tasks were not run with the baseline, or with several that answer to it
        return pivot(store, results, rows)


def _with_downloads(table: Table, number: int) -> dict[str, Any]:
    writers = {"csv": formats.csv_text, "md": formats.markdown, "tex": formats.latex}
    kinds = {"csv": "text/csv", "md": "text/markdown", "tex": "application/x-tex"}
    names = dict.fromkeys(column.group for column in table.columns)
    return {
        "title": ", ".join(names) if len(names) < 4 else f"{len(names)} tasks",
        "table": table,
        "downloads": [(f"table{number}.{end}", data_url(write(table), kinds[end])) for end, write in writers.items()],
    }


def _row(result: pd.Series, stderr: float) -> dict[str, Any]:
    """Return one line of the table of all results."""
    return {
        "model": result["model"],
        "method": result["method"],
        "task": result["family"],
        "length": format_tokens(result["length"]),
        "tokens": "" if math.isnan(result["length"]) else f"{result['length']:.0f}",
        "metric": result["metric"] + ("" if result["filter"] == "none" else f" ({result['filter']})"),
        "value": result["diverged"] or format_metric(result["value"]),
        "exact": repr(float(result["value"])),
        "diverged": result["diverged"],
        "past": result["past_trained"],
        "stderr": "" if math.isnan(stderr) or result["diverged"] else format_metric(stderr),
        "n": "" if math.isnan(result["n"]) else f"{result['n']:.0f}",
        "run": result["run"],
    }


def _choices(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Return the choices of a filter: every value of the column, lengths by size."""
    by = (lambda row: float(row["tokens"] or 0)) if name == "length" else (lambda row: row[name])
    return list(dict.fromkeys(row[name] for row in sorted(rows, key=by) if row[name]))


def _answers(store: SampleStore) -> list[dict[str, Any]]:
    """Return answers about a fact at a known depth, one right and one wrong a depth; thinned out evenly if many."""
    results = store.collection.results
    groups = []
    for _, result in results[results["metric"] == "acc"].iterrows():
        samples = store.samples(result["run"], result["task"])
        if samples is None or samples["key"].isna().all():
            continue
        planned = samples["depth_target"]
        depth = pd.to_numeric(planned.where(planned.notna(), samples["depth"]), errors="coerce")
        samples = samples.assign(depth=depth, right=[m.get("acc") == 1 for m in samples["metrics"]])
        shown = samples.dropna(subset=["depth"]).sort_values("depth", kind="stable")
        shown = shown.drop_duplicates(["depth", "right"])
        groups.append([_answer(result, sample) for _, sample in shown.iterrows()])
    allowed = max(2, MOST_ANSWERS // max(1, len(groups)))
    return [answer for group in groups for answer in group[:: math.ceil(len(group) / allowed) or 1]]


def _answer(result: pd.Series, sample: pd.Series) -> dict[str, Any]:
    return {
        "model": result["model"],
        "method": result["method"],
        "task": result["family"],
        "length": format_tokens(result["length"]),
        "depth": f"{sample['depth']:.0%}",
        "key": text(sample["key"]),
        "answer": escape.shorten(escape.plain(sample["response"]), 80),
        "right": sample["right"],
    }


def _run(store: SampleStore, name: str, environments: dict[str, int]) -> dict[str, Any]:
    """Return what the page shows about one run. Add its environment to `environments`, once if runs share it."""
    run = store.collection.runs[name]
    results = store.collection.results
    first = results[results["run"] == name].iloc[0]
    config, environment = table(run.raw.get("config")), text(run.raw.get("pretty_env_info"))
    own = table(config.get("lminf"))
    brief = re.sub(r"^(Flags|Vulnerability [^:]*):.*\n?", "", environment, flags=re.MULTILINE).strip()
    facts = {
        "Model": first["model_path"],
        "Model settings": ", ".join(f"{key}={value}" for key, value in find_backend(run.raw)[2].items()),
        "Attention": ", ".join(f"{key}={text(value)}" for key, value in own.items() if key != "model_args"),
        "Parameters": f"{count:,}" if isinstance(count := config.get("model_num_parameters"), int) else "",
        "Data type": first["dtype"],
        "Trained length": "" if pd.isna(first["trained_length"]) else f"{first['trained_length']:.0f} tokens",
        "Tasks": ", ".join(f"{task} (version {version})" for task, version in table(run.raw.get("versions")).items()),
        "Generation": compact(config.get("gen_kwargs")),
        "Prompt": first["prompt"],
        "Seeds": compact({key: config[key] for key in sorted(config) if key.endswith("_seed")}),
        "Started": first["date"],
        "Took": "" if math.isnan(first["seconds"]) else f"{first['seconds']:.0f} s",
        "Device": first["device"],
        "Hardware": first["hardware"],
        "lm-eval": first["lm_eval_version"],
        "transformers": first["transformers_version"],
        "PyTorch": first["torch_version"],
        "Python": environment_line(environment, "Python version"),
        "Operating system": environment_line(environment, "OS"),
        "Commit": first["commit"],
        "Results file": escape.file_name(run.file),
        "Samples": f"logged for {len(run.samples)} of {len(run.raw['results'])} tasks",
    }
    return {
        "name": name,
        "model": first["model"],
        "method": first["method"],
        "date": first["date"],
        "command": reproduction_command(run.raw, bool(run.samples)),
        "facts": {label: value for label, value in facts.items() if value},
        "environment": environments.setdefault(brief, len(environments)) if brief else None,
    }
