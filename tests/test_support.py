"""What a config alone tells of its family: how it is run, or the reason why it isn't."""

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import METHODS
from lminf_eval.models.families.registry import check, families_table, support
from lminf_eval.models.families.table import FAMILIES, family_row

REFUSED = {
    "deepseek_v32": "an indexer chooses",
    "glm_moe_dsa": "an indexer chooses",
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
    "llama4_text": "chunked_attention",
    "gpt_neox_japanese": "pluggable",
    "clip": "no causal language model",
    "vit": "no causal language model",
    "kosmos-2": "without an image",
    "paligemma": "see those after them",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_out_of_reach_is_refused_by_name_and_reason(family):
    with pytest.raises(UsageError, match=f"'{family}': .*{REFUSED[family]}") as refusal:
        check(CONFIG_MAPPING[family](), METHODS["lambda"])
    assert "\n" not in str(refusal.value)
    runs_at_all = not (
        REFUSED[family] in ("encoder-decoder", "no causal language model") or family_row(family).refused_full
    )
    assert ("attention=full" in str(refusal.value)) == runs_at_all


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
    assert all(by_name[name].kind != "none" for name in known)
    assert {row.family for row in rows if row.where.startswith("families/")} == {
        name for name, row in FAMILIES.items() if row.adapter
    }
    assert all(bool(row.reason) == (row.kind == "none") == (not row.where) for row in rows)
    assert not any(row.tested for row in rows if row.kind == "none")
