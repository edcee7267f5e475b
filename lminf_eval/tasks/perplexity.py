"""Perplexity over long documents, and the curve of it along them, within lm-eval's own protocol.

A document is scored by one rolling likelihood for each of its prefixes (see `documents.cut_documents`). In the samples
file of any model, the responses are therefore the log-likelihoods, in nats, of the first `boundaries[i]` tokens; their
differences are those of the stretches in between.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from lminf_eval.tasks.documents import tail_start

logger = logging.getLogger(f"lm_eval.{__name__}")  # under lm-eval's own, which shows it

# A document's share in a metric: its log-likelihood in nats, and the number of tokens or bytes that it is over.
Share = tuple[float, int]


class PerplexityTask(ConfigurableTask):
    """A rolling-likelihood task whose documents are asked for at every boundary."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Return one request for each of the document's prefixes, the whole document last."""
        return [
            Instance(
                request_type="loglikelihood_rolling",
                doc=doc,
                arguments=(doc["text"][:cut],),
                idx=i,
                metadata=kwargs["metadata"],
            )
            for i, cut in enumerate(doc["cuts"])
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[float]) -> dict[str, Share]:
        """Return the document's `metric_contributions`; log a warning for a log-likelihood that is NaN, and keep it."""
        for boundary, value in zip(doc["boundaries"], results, strict=True):
            if math.isnan(value):
                logger.warning(
                    "%s: log-likelihood of %s up to token %d is NaN", self.task_name, doc["source"], boundary
                )
        return super().process_results(doc, results)


def metric_contributions(doc: dict[str, Any], results: Sequence[float]) -> dict[str, Share]:
    """Return a document's share in each metric, from the log-likelihoods [boundaries] of its prefixes, in nats."""
    whole = float(results[-1])
    tokens, size = (whole, doc["n_tokens"]), (whole, doc["n_bytes"])
    result = {"token_perplexity": tokens, "nll": tokens, "byte_perplexity": size, "bits_per_byte": size}
    # A boundary lies at its mark or a few tokens before, so the tail's is the last one that is not beyond the mark.
    heads = [i for i, boundary in enumerate(doc["boundaries"][:-1]) if boundary <= tail_start(doc["length"])]
    if heads:
        head = heads[-1]
        result["nll_tail"] = (whole - float(results[head]), doc["n_tokens"] - doc["boundaries"][head])
    return result


class Aggregation:
    """A metric over documents, each weighted by its tokens or bytes.

    lm-eval gives a bootstrap standard error to the aggregations on a list of its own, which it looks up by `==`, and
    none to any other. Calling itself equal to one of them, `perplexity`, is how a task's aggregation gets one.
    """

    def __init__(self, name: str):
        self.__name__ = name  # lm-eval prints it, and draws the bootstrap's bars under it

    def __call__(self, shares: Sequence[Share]) -> float:
        per_unit = -sum(share[0] for share in shares) / sum(share[1] for share in shares)
        if self.__name__.endswith("perplexity"):
            return math.exp(per_unit) if not per_unit > 700 else math.inf
        return per_unit / math.log(2) if self.__name__ == "bits_per_byte" else per_unit

    def __eq__(self, other: object) -> bool:
        return self is other or other is metrics.perplexity

    def __hash__(self) -> int:
        return hash(self.__name__)

    def __repr__(self) -> str:
        return f"lminf_eval.tasks.perplexity.{self.__name__}"


token_perplexity = Aggregation("token_perplexity")
nll = Aggregation("nll")
nll_tail = Aggregation("nll_tail")
byte_perplexity = Aggregation("byte_perplexity")
bits_per_byte = Aggregation("bits_per_byte")
