"""The Python API on the demo's model: patch, generate in bounded memory, score a long text, list the methods.

    python examples/python_api.py [MODEL]

MODEL is a folder or a hub name; by default SmolLM2-135M-Instruct, which `lminf demo` fetches. Two cores need a minute.
"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lminf_eval as lminf


def main(pretrained: str, n_local: int = 2048, tokens: int = 8192) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    text = "\n".join(topics.values())  # Python's reference manual, which every CPython carries
    ids = torch.tensor([tokenizer.encode(text)[:tokens]])

    with torch.no_grad(), lminf.patch(model, method="lambda", n_local=n_local):
        cache = lminf.Cache(model)
        new = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        print(f"after {ids.shape[1]} tokens:", repr(tokenizer.decode(new[0, ids.shape[1] :])))
        print(f"keys and values held: {cache.nbytes / 1e6:.1f} MB")

    for method in ("full", "lambda"):
        parameters = {} if method == "full" else {"n_local": n_local}
        scores = lminf.score(model, tokenizer, ids[0].tolist(), method=method, **parameters)
        print(f"{method}: perplexity {scores.perplexity:.3f} over {len(scores.log_probs)} tokens")

    for method in lminf.methods():
        print(method)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from lminf_eval.demo.models import fetch

        main(str(fetch()))
