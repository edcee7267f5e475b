"""One rank of a context-parallel group: run by test_context.py, once for each rank, with torchrun's variables set.

    python context_ranks.py FOLDER

answers the cases of FOLDER/cases.json, each {"model": a folder, "spec", "chunk_size", "batch_size", "score" or
"generate": requests, "shard": the least tokens of a shard, "exact": whether angles are to be exact}, and writes
FOLDER/RANK.json: for each {"answers": …, "sent": bytes}.
"""

import json
import os
import sys
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.rope import Rotary
from lminf_eval.parallel import context_parallel

SHARD, rounded_angles = context_parallel.SHARD, Rotary.angles


def exact_angles(self, positions, like, layer_type=None):
    """Rotary angles in double precision (transformers takes them in single)."""
    half = positions.double()[..., None] * self.module.inv_freq.double()
    both = torch.cat([half, half], -1)
    return both.cos().to(like), both.sin().to(like)


@cache
def loaded(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


class Patched:
    """The model of a case, patched under its method: as it is, if that of the case before was the same."""

    def __init__(self):
        self.key = self.model = None

    def of(self, case: dict):
        if self.key != (key := (case["model"], case["spec"], case["exact"])):
            if self.model is not None:
                self.model.restore()
            spread = partial(context_parallel.ContextModel, group=dist.group.WORLD)
            context_parallel.SHARD = SHARD  # its self-check counts on it
            self.model, self.key = patched_model(loaded(case["model"]), make(**case["spec"]), spread), key
        return self.model


def answer(case: dict, patched: Patched) -> dict:
    """This rank's answers, and the bytes it sent."""
    Rotary.angles = exact_angles if case["exact"] else rounded_angles
    model = patched.of(case)
    sent = model.exchange.bytes_sent
    context_parallel.SHARD = case["shard"]
    engine = context_parallel.ContextEngine(model, case["chunk_size"], case["batch_size"])
    if "score" in case:
        found = engine.score([ScoreRequest(tokens, scored_from) for tokens, scored_from in case["score"]])
        answers = {i: [score.log_probs.tolist(), score.greedy.tolist()] for i, score in found}
    else:
        requests = [GenerateRequest(tokens, max_new) for tokens, max_new in case["generate"]]
        answers = dict(engine.generate(requests))
    return {"answers": [answers[i] for i in range(len(answers))], "sent": model.exchange.bytes_sent - sent}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    patched = Patched()
    results = [answer(case, patched) for case in json.loads((folder / "cases.json").read_text())]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
