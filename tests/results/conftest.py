"""Result files in exactly lm-eval's layout, with documents whose values a test chooses."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from lm_eval.tasks.ruler.common_utils import aggregate_metrics, process_results

AGGREGATE = {
    "acc": lambda values: float(np.mean(values)),
    "nll": lambda values: float(np.mean(values)),
    "token_perplexity": lambda pairs: math.exp(-sum(ll for ll, _ in pairs) / sum(n for _, n in pairs)),
    "word_perplexity": lambda pairs: math.exp(-sum(ll for ll, _ in pairs) / sum(n for _, n in pairs)),
}
ENVIRONMENT = (
    "PyTorch version: 2.13.0+cpu\nIs debug build: False\n\nOS: Debian GNU/Linux 12 (bookworm) (x86_64)\n"
    "GPU models and configuration: Could not collect\n\nCPU:\nCPU(s):                                  2\n"
    "Model name:                              AMD EPYC\n"
)


class LmEvalFiles:
    """Writes what `lm_eval --log_samples` writes: 0.4.13's layout, or with `version="0.4.9"` that one's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written = 0

    def write(
        self,
        tasks: dict[str, list[dict]],
        backend: str = "lminf",
        args: dict[str, str] | None = None,
        version: str = "0.4.13",
        samples: bool = True,
        **changes,
    ) -> Path:
        """A run of `tasks` (name -> documents: doc, resps and each metric's value); returns the results file.

        `changes` replace entries of the results JSON.
        """
        args = {"pretrained": "org/model"} | (args or {})
        self.written += 1
        date = f"2026-01-01T{10 + self.written // 60}-{self.written % 60:02}-00.000001"
        folder = self.folder / re.sub(r"\W+", "__", args["pretrained"], flags=re.ASCII)[:100]
        folder.mkdir(parents=True, exist_ok=True)
        raw = {
            "results": {name: self._results(name, documents, version) for name, documents in tasks.items()},
            "group_subtasks": {},
            "configs": {name: {"task": name, "metadata": {"version": 1.0, **args}} for name in tasks},
            "versions": dict.fromkeys(tasks, 1.0),
            "n-shot": dict.fromkeys(tasks, 0),
            "higher_is_better": {
                name: {m: m == "acc" or m.isdigit() for m in self._metrics(docs)} for name, docs in tasks.items()
            },
            "n-samples": {name: {"original": len(docs), "effective": len(docs)} for name, docs in tasks.items()},
            "config": {
                "model": backend,
                "model_args": ",".join(f"{k}={v}" for k, v in args.items()) if version == "0.4.9" else args,
                "model_dtype": "torch.float32",
                "device": "cpu",
                "batch_size": 1,
                "limit": None,
                "gen_kwargs": {},
                "random_seed": 0,
            },
            "git_hash": "abc1234",
            "date": 1767261600.0 + 60 * self.written,
            "pretty_env_info": ENVIRONMENT,
            "transformers_version": "5.23.0",
            "lm_eval_version": version,
            "max_length": 8192,
            "model_source": backend,
            "model_name": args["pretrained"],
            "total_evaluation_time_seconds": "12.5",
        } | changes
        file = folder / f"results_{date}.json"
        file.write_text(json.dumps(raw, indent=2))
        for name, documents in tasks.items() if samples else ():
            lines = [self._sample(i, document) for i, document in enumerate(documents)]
            (folder / f"samples_{name}_{date}.jsonl").write_text("".join(lines))
        return file

    @staticmethod
    def _metrics(documents: list[dict]) -> list[str]:
        keys = (key for document in documents for key in document)
        return [key for key in dict.fromkeys(keys) if key not in ("doc", "resps", "doc_id")]

    def _results(self, name: str, documents: list[dict], version: str) -> dict:
        row = {"alias": name} if version == "0.4.9" else {"name": name, "alias": name, "sample_len": len(documents)}
        for metric in self._metrics(documents):
            values = [document[metric] for document in documents if metric in document]
            row[f"{metric},none"] = AGGREGATE.get(metric, aggregate_metrics)(values)
            error = np.std(values, ddof=1) / len(values) ** 0.5 if metric == "acc" and len(values) > 1 else "N/A"
            row[f"{metric}_stderr,none"] = error
        return row

    def _sample(self, i: int, document: dict) -> str:
        doc = document.get("doc", {"id": i})
        metrics = {metric: document[metric] for metric in self._metrics([document])}
        resps = document.get("resps", [""])
        sample = {
            "doc_id": document.get("doc_id", i),
            "doc": doc,
            "target": str(doc.get("key", "")),
            "arguments": {"gen_args_0": {"arg_0": "a prompt"}},
            "resps": [[response] for response in resps],
            "filtered_resps": resps,
            "filter": "none",
            "metrics": list(metrics),
            "doc_hash": hashlib.sha256(json.dumps(doc, indent=2).encode()).hexdigest(),
            "prompt_hash": "0",
            "target_hash": "0",
            **metrics,
        }
        return json.dumps(sample, ensure_ascii=False) + "\n"


@pytest.fixture
def lm_eval_files(tmp_path) -> LmEvalFiles:
    return LmEvalFiles(tmp_path / "results")


def passkeys(hits: list[int], length: int = 4096, response: str = "") -> list[dict]:
    """Documents of a passkey task, a fifth of them at each of five depths, right where `hits` is 1."""
    return [
        {
            "doc": {"key": str(10_000 + i), "depth": (i % 5) / 4, "n_tokens": length - 3},
            "resps": [response or (str(10_000 + i) if hit else "99999")],
            "acc": float(hit),
        }
        for i, hit in enumerate(hits)
    ]


def texts(nlls: list[list[float]], step: int = 1024, perplexity: bool = True) -> list[dict]:
    """Documents of a perplexity task: `nlls[document][bucket]` in nats a token, buckets of `step` tokens."""
    documents = []
    for i, buckets in enumerate(nlls):
        totals = [float(total) for total in -step * np.cumsum(buckets)]
        boundaries = [step * (b + 1) for b in range(len(buckets))]
        doc = {"text": f"text {i}", "boundaries": boundaries, "n_tokens": boundaries[-1]}
        resps = [str(total) for total in totals]
        metrics = {"token_perplexity": [totals[-1], boundaries[-1]], "nll": float(np.mean(buckets))}
        documents.append({"doc": doc, "resps": resps, **(metrics if perplexity else {"nll": metrics["nll"]})})
    return documents


def ruler(hits: dict[int, list[int]]) -> list[dict]:
    """Documents of a RULER task, scored by lm-eval's own code: by length, whether the answer is right."""
    documents = []
    for length, answers in hits.items():
        for i, hit in enumerate(answers):
            doc = {"index": i, "max_length": length, "outputs": [f"{length}{i}"]}
            answer = f"{length}{i}." if hit else "no"
            documents.append({"doc": doc, "resps": [answer], **process_results(doc, [answer])})
    return documents


@pytest.fixture
def make_ruler():
    return ruler


@pytest.fixture
def edit():
    """`edit(file, **changes)` changes entries of a results file: `config__limit=2` is `config.limit`."""

    def change(file: Path, **changes) -> Path:
        raw = json.loads(file.read_text())
        for path, value in changes.items():
            *tables, name = path.split("__")
            inner = raw
            for table in tables:
                inner = inner.setdefault(table, {})
            inner[name] = value
        file.write_text(json.dumps(raw))
        return file

    return change


@pytest.fixture
def make_passkeys():
    return passkeys


@pytest.fixture
def make_texts():
    return texts
