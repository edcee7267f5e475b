"""Kills a worker with a journal at random moments, again and again: run by test_kills.py in a process of its own.

    python kills.py MODEL FOLDER KILLS

forks a worker after the other, each of which answers the same requests with a journal, and sends it SIGKILL after a
random time, at most what an undisturbed worker takes, till KILLS have struck. Whenever a worker comes to its end, its
answers are printed as a line of JSON, and a fresh journal is begun; the first line is the undisturbed worker's. Forking
is safe here: this process itself only imports, and has no threads.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from lm_eval.api.instance import Instance

from lminf_eval.harness.lm import LMInfinite

TEXTS = [" ".join(f"there are {17 * i % (n + 3)} of {n}" for i in range(6 + n % 3)) for n in range(12)]


def answers(model: str, journal: str | None, progress: Path | None = None) -> dict:
    """What `model` answers to all requests; `progress` is written to when its work begins."""
    lm = LMInfinite(
        model, journal=journal, dtype="float32", device="cpu", n_local=24, n_global=4, chunk_size=8, batch_size=1
    )
    if progress:
        progress.write_text("begun")
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    choices = [Instance("loglikelihood", {}, (text, " or more"), i) for i, text in enumerate(TEXTS)]
    open_ended = {"max_gen_toks": 6, "until": []}
    generations = [Instance("generate_until", {}, (text, open_ended), i) for i, text in enumerate(TEXTS)]
    return {
        "rolling": lm.loglikelihood_rolling(rolling, disable_tqdm=True),
        "choices": lm.loglikelihood(choices, disable_tqdm=True),
        "generations": lm.generate_until(generations, disable_tqdm=True),
        "recalled": lm.get_model_info()["lminf"]["requests_from_journal"],
    }


class Worker:
    """A forked process that answers, and leaves its answers in `result` when it is done."""

    def __init__(self, model: str, journal: Path | None, result: Path):
        begun = result.with_suffix(".begun")
        begun.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open till the end)
                found = answers(model, journal and str(journal), begun)
                partial = result.with_suffix(".partial")
                partial.write_text(json.dumps(found))
                os.replace(partial, result)
            finally:
                os._exit(0)
        while not begun.exists():
            time.sleep(0.002)

    def end(self) -> bool:
        """Wait for the end; whether a signal made it."""
        return os.WIFSIGNALED(os.waitpid(self.pid, 0)[1])


def main(model: str, folder: Path, kills: int) -> None:
    rng = random.Random(0)
    calm = Worker(model, None, folder / "calm.json")
    began = time.monotonic()
    calm.end()
    seconds = time.monotonic() - began
    print((folder / "calm.json").read_text(), flush=True)
    struck = sweeps = tries = 0
    while struck < kills or tries:
        journal, result = folder / f"{sweeps}", folder / f"{sweeps}.json"
        worker = Worker(model, journal, result)
        tries += 1
        if struck < kills:
            time.sleep(rng.uniform(0, seconds))
            os.kill(worker.pid, signal.SIGKILL)  # to one that has ended it does nothing: it is still to be waited for
        struck += worker.end()
        if result.exists():
            written = sum(file.read_bytes().count(b'\n{"key"') for file in journal.glob("*.jsonl"))
            print(json.dumps(json.loads(result.read_text()) | {"tries": tries, "written": written}), flush=True)
            sweeps, tries = sweeps + 1, 0
    print(json.dumps({"kills": struck}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
