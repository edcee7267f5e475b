"""Models that read images or sound are loaded by their own class and evaluated on text.

tests/test_families.py holds them to the definition.
"""

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.registry import METHODS, make
from lminf_eval.models.modules import check_structure
from tests.test_families import G, W, build, oracle

CONTEXT, CONTINUATION = "The quick brown fox jumps over the lazy dog and over " * 3, "all the others"


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def folder(request, randomise, tiny_tokenizer, tmp_path):
    """A tiny model that reads images, on disk, and the model."""
    model = build(randomise, request.param)
    text = {**model.config.get_text_config().to_dict(), "vocab_size": len(tiny_tokenizer)}
    config = type(model.config).from_dict({**model.config.to_dict(), "text_config": text})
    model = randomise(type(model)(config)).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("attention", ["lambda", "full"])
def test_lm_evals_requests_are_scored_by_the_text_part(folder, attention):
    path, model = folder
    windows = {"n_local": W, "n_global": G} if attention == "lambda" else {}
    with LMInfinite(str(path), device="cpu", dtype="float32", attention=attention, **windows) as lm:
        request = Instance("loglikelihood", {}, (CONTEXT, CONTINUATION), 0)
        ((found, _),) = lm.loglikelihood([request])
        context = lm.tok_encode(CONTEXT.rstrip())
        ids = torch.tensor([lm.tok_encode(CONTEXT + CONTINUATION)])
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0]
    logits = oracle(model, make(n_local=W, n_global=G), ids) if attention == "lambda" else own
    scores = logits.double().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found == pytest.approx(scores[len(context) - 1 :].sum().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["blip-2", "instructblip"])
def test_a_model_that_needs_an_image_is_refused_before_weights(family):
    with pytest.raises(UsageError, match=rf"'{family}': it reads no text without pixel_values"):
        check_structure(CONFIG_MAPPING[family](), METHODS["lambda"])
