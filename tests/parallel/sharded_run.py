"""One rank of test_deepspeed.py, started by torchrun: each family whole, and sharded over all ranks.

Rank 0 prints a line of JSON for each: the family, its variant, the largest error of any logit of the sharded model
(of 70 tokens in chunks and one by one, past n_local), and of how many key-value heads the two caches hold keys.
"""

import importlib.util
import json
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from lminf_eval.methods.registry import make
from lminf_eval.models.families.table import family_row
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.strategy import ParallelStrategy
from lminf_eval.parallel.tensor_parallel import TensorParallel
from lminf_eval.parallel.topology import Topology

MORE = ("falcon rw", "bloom 6 heads", "phi3 longrope")  # lines of FAMILIES beside the first of each family
TOP_K = {"top_k": 3, "top_k_from_layer": 1, "top_k_distance": 8}
OTHERS = {"full": {"attention": "full"}, "top-k": TOP_K}  # variants, of the families in VARIED
VARIED = ("llama", "gpt_neox", "phi3", "gpt_oss", "falcon")


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def main() -> None:
    torch.set_num_threads(1)
    tests = Path(__file__).parents[1]
    families, randomise = module(tests / "test_families.py"), module(tests / "conftest.py")._randomise
    ranks = Ranks()
    topology = ranks.topology
    with ranks.lifecycle.guard():
        topology.create_groups(topology.world)
        known = [name for name in families.FAMILIES if name.split()[0] in CONFIG_MAPPING]
        first = {name.split()[0]: name for name in reversed(known)}
        names = sorted(name for family, name in first.items() if family_row(family).sharded)
        cases = [(name, "lambda") for name in (*names, *MORE)] + [(name, kind) for name in VARIED for kind in OTHERS]
        for name, kind in cases:
            if told := compare(families, randomise, topology, name, kind):
                print(json.dumps(told), flush=True)
    if topology.rank:
        ranks.lifecycle.exit()


def compare(families, randomise, topology: Topology, name: str, kind: str) -> list | None:
    """What rank 0 prints; only it runs the whole model."""
    n_local = {} if kind == "full" else {"n_local": families.W, "n_global": families.G}
    spec, strategy = make(**n_local, **OTHERS.get(kind, {})), TensorParallel(topology)
    ids = torch.randint(3, 97, (1, families.S), generator=torch.Generator().manual_seed(0))
    whole = families.build(randomise, name)
    strategy.check(whole.config, spec)
    part = strategy.load(lambda: families.build(randomise, name), torch.float32, torch.device("cpu"))
    found, own_heads = run(families, strategy.prepare(part, spec), ids, kind)
    if topology.rank:
        return None
    expected, whole_heads = run(families, ParallelStrategy(topology).prepare(whole, spec), ids, kind)
    return [name.split()[0], kind, families.error(found, expected), whole_heads, own_heads]


def run(families, patched, ids: torch.Tensor, kind: str) -> tuple[torch.Tensor, int]:
    """Logits, and the heads whose keys the first layer's cache holds."""
    cache, found = patched.new_cache(1, families.S), []
    cache.answers_from = [40]
    for start, stop in zip([0, 20, *range(60, families.S)], [20, *range(60, families.S + 1)], strict=True):
        output = patched.hidden(ids[:, start:stop], cache)
        found.append(patched.logits(output, output.last_hidden_state[0]))
    layers = cache.layers.layers if kind == "full" else cache.layers
    return torch.cat(found).double(), layers[0].keys.shape[1]


if __name__ == "__main__":
    main()
