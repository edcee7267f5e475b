"""What a config alone tells of its family: how it is run, or the reason why it isn't."""

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import METHODS, MethodArgs
from lminf_eval.models.families.registry import INDEXED, check, checked_method, families_table, support
from lminf_eval.models.families.table import FAMILIES
from lminf_eval.models.modules import check_structure

REFUSED = {
    "deepseek_v4": "compressed entries",
    "mamba": "no attention",
    "mamba2": "no attention",
    "rwkv": "no attention",
    "jamba": "for single tokens only",
    "minimax": "a cache of its own",
    "recurrent_gemma": "part of its layers",
    "inkling_text": "learned bias",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "gpt2": "positions are absolute",
    "opt": "positions are absolute",
    "gpt_neo": "positions are absolute",
    "gpt_bigcode": "positions are absolute",
    "xglm": "positions are absolute",
    "hunyuan_v1_dense": "normalises queries and keys after rotating",
    "hunyuan_v1_moe": "normalises queries and keys after rotating",
    "mllama": "attend to an image",
    "gpt_neox_japanese": "pluggable",
    "clip": "no causal language model",
    "vit": "no causal language model",
    "bert": "is_decoder=False",
    "xlm-roberta": "is_decoder=False",
    "roformer": "is_decoder=False",
    "kosmos-2": "without an image",
    "paligemma": "see those after them",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_out_of_reach_is_refused_by_name_and_reason(family):
    with pytest.raises(UsageError, match=f"'{family}': .*{REFUSED[family]}") as refusal:
        check(CONFIG_MAPPING[family](), METHODS["lambda"])
    assert "\n" not in str(refusal.value)
    try:
        check(CONFIG_MAPPING[family](), METHODS["full"])
        runs_at_all = True
    except UsageError:
        runs_at_all = False
    assert ("attention=full" in str(refusal.value)) == runs_at_all


def test_a_model_that_reads_no_text_alone_is_not_sent_to_full():
    with pytest.raises(UsageError, match="'blip-2': it reads no text without pixel_values") as refusal:
        check_structure(CONFIG_MAPPING["blip-2"](), METHODS["lambda"])
    assert "attention=full" not in str(refusal.value)


@pytest.mark.parametrize("family", ["t5", "bert", "clip", "minimax", "jamba", "paligemma", "deepseek_v4"])
def test_a_family_that_cannot_be_scored_token_by_token_is_refused_under_full_too(family):
    reason = "a cache of its own" if family == "deepseek_v4" else REFUSED[family]
    with pytest.raises(UsageError, match=f"attention=full can't run the family '{family}': .*{reason}") as refusal:
        check(CONFIG_MAPPING[family](), METHODS["full"])
    assert ("--model hf" in str(refusal.value)) == (family not in ("bert", "clip"))


def test_a_two_way_family_runs_as_a_decoder():
    check(CONFIG_MAPPING["bert"](is_decoder=True), METHODS["full"])


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_a_window_wider_than_the_indexer_chooses_is_refused_with_the_one_that_is_not(family):
    config = CONFIG_MAPPING[family](index_topk=64)
    if INDEXED not in config.layer_types:
        pytest.skip("this transformers' own masks keys wrongly if its tokens are moved on: refused")
    line = f"'{family}': its indexer .* index_topk=64, so n_local can be 60 at most"
    with pytest.raises(UsageError, match=line):
        checked_method(config, MethodArgs.parse({"n_local": 61, "n_global": 4}))
    method, _ = checked_method(config, MethodArgs.parse({"n_local": 60, "n_global": 4}))
    assert method.attention_span == 64
    for parameters in ({"full_layers": "odd"}, {"full_decode": True}, {"attention": "rerope"}):
        with pytest.raises(UsageError, match="index_topk=64;"):
            checked_method(config, MethodArgs.parse({"n_local": 32, **parameters}))
    with pytest.raises(UsageError, match="n_local can be 55 at most"):
        checked_method(config, MethodArgs.parse({"n_local": 60, "n_global": 4, "top_k": 5}))


@pytest.mark.parametrize(
    ("family", "more", "kind", "where"),
    [
        ("llama", {}, "rotary", "patching.py"),
        ("gpt_oss", {}, "rotary", "patching.py"),
        ("codegen", {}, "rotary", "families/gptj.py"),
        ("mpt", {}, "ALiBi", "families/mpt.py"),
        ("bloom", {}, "ALiBi", "families/bloom.py"),
        ("falcon", {}, "rotary", "families/falcon.py"),
        ("falcon", {"alibi": True}, "ALiBi", "families/falcon.py"),
    ],
)
def test_where_a_family_is_taken_over(family, more, kind, where):
    found = support(CONFIG_MAPPING[family](**more))
    assert (found.kind, found.where, found.reason, found.tested) == (kind, where, "", True)
    check(CONFIG_MAPPING[family](**more), METHODS["lambda"])


def test_a_config_from_a_folder_is_enough(tiny_llama):
    assert support(AutoConfig.from_pretrained(tiny_llama())).kind == "rotary"


def test_the_table_is_of_every_causal_family_and_of_the_code():
    rows = families_table()
    by_name = {row.family: row for row in rows}
    assert len(rows) == len(by_name) > 100
    known = {
        name for name, row in FAMILIES.items() if row.tested and name in CONFIG_MAPPING
    }  # an older transformers lacks some
    assert by_name.keys() >= known > {"llama", "falcon"}
    older = {name for name in known if "deepseek_sparse_attention" in by_name[name].reason}  # refused there
    assert all(by_name[name].kind != "none" for name in known - older)
    assert {row.family for row in rows if row.where.startswith("families/")} == {
        name for name, row in FAMILIES.items() if row.adapter
    }
    assert all(bool(row.reason) == (row.kind == "none") == (not row.where) for row in rows)
    assert not any(row.tested for row in rows if row.kind == "none")
