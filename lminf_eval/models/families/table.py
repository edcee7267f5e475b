"""Every family that we know something of, a row each; the others are judged by their code (`registry.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from lminf_eval.models.families import bloom, falcon, gptj, mpt
from lminf_eval.models.families.adapter import FamilyAdapter

_ABSOLUTE_AFTER_ALL = "it normalises queries and keys after rotating them, so its logits depend on absolute positions"
_ONE_TOKEN = "its layers go on from their state for single tokens only, so that chunks would each begin again"
_IN_LAYERS = "its state is part of its layers, so that requests can't be kept apart"
_OWN_STATE = "it has a state of its own, which can't be copied for requests that begin alike"
_NO_ATTENTION = "it has no attention"
_RELATIVE_BIAS = "it adds a learned bias for each distance, which ends where its training did"
NEEDS = "it reads no text without"  # how a reason begins if a model cannot be evaluated on text alone
_WITHOUT_IMAGE, _WITHOUT_SOUND = f"{NEEDS} an image", f"{NEEDS} sound"
_BOTH_WAYS = "the tokens of its prompt see those after them"
_OWN_CACHE = "it has a cache of its own, which can't be copied for requests that begin alike"


@dataclass(frozen=True)
class FamilyRow:
    """What is known of one family.

    Attributes:
        name: transformers' `model_type`.
        adapter: how its attention is taken over, if not by the general mechanism of `patching.py`.
        positions: "rotary" or "ALiBi"; Falcon's config says which of the two.
        tested: whether tests/test_families.py holds it to a dense float64 oracle.
        scales_queries: whether it scales queries by their token's position, on purpose.
        sharded: whether DeepSpeed divides it right (tests/parallel/test_deepspeed.py).
        refused: why methods that patch it cannot run it, in words that end "can't run the family X: …"; else "".
        refused_full: the same of the model as it is.
    """

    name: str
    adapter: FamilyAdapter | None = None
    positions: str = "rotary"
    tested: bool = True
    scales_queries: bool = False
    sharded: bool = True
    refused: str = ""
    refused_full: str = ""


ROWS = [
    FamilyRow("afmoe", sharded=False),
    FamilyRow("apertus"),
    FamilyRow("apertus1p5_text"),
    FamilyRow("arcee"),
    FamilyRow("aria_text"),
    FamilyRow("axk1", sharded=False),
    FamilyRow("axk2", sharded=False),
    FamilyRow("aya_vision", sharded=False),
    FamilyRow("bailing_hybrid", sharded=False),
    FamilyRow("bamba", sharded=False),
    FamilyRow("beam", scales_queries=True, sharded=False),
    FamilyRow("bitnet", sharded=False),
    FamilyRow("bloom", adapter=bloom.ADAPTER, positions="ALiBi"),
    FamilyRow("codegen", adapter=gptj.ADAPTER, sharded=False),
    FamilyRow("cohere"),
    FamilyRow("cohere2"),
    FamilyRow("cohere2_moe"),
    FamilyRow("cwm"),
    FamilyRow("dbrx", sharded=False),
    FamilyRow("deepseek_v2", sharded=False),
    FamilyRow("deepseek_v3", sharded=False),
    FamilyRow("deepseek_v32", sharded=False),
    FamilyRow("diffllama", sharded=False),
    FamilyRow("dots1"),
    FamilyRow("dots3_note_text", sharded=False),
    FamilyRow("ernie4_5"),
    FamilyRow("ernie4_5_moe"),
    FamilyRow("exaone"),
    FamilyRow("exaone4"),
    FamilyRow("exaone_moe"),
    FamilyRow("falcon", adapter=falcon.ADAPTER),
    FamilyRow("falcon_h1", sharded=False),
    FamilyRow("flex_olmo", sharded=False),
    FamilyRow("flint", sharded=False),
    FamilyRow("gemma"),
    FamilyRow("gemma2"),
    FamilyRow("gemma3"),
    FamilyRow("gemma3_text"),
    FamilyRow("gemma3n_text", sharded=False),
    FamilyRow("gemma4_text", sharded=False),
    FamilyRow("glm"),
    FamilyRow("glm4"),
    FamilyRow("glm4_moe"),
    FamilyRow("glm4_moe_lite", sharded=False),
    FamilyRow("glm4v", sharded=False),
    FamilyRow("glm_moe_dsa", sharded=False),
    FamilyRow("gpt_neox"),
    FamilyRow("gpt_oss"),
    FamilyRow("gptj", adapter=gptj.ADAPTER),
    FamilyRow("granite"),
    FamilyRow("granite_swa", sharded=False),
    FamilyRow("granitemoe"),
    FamilyRow("granitemoe_swa", sharded=False),
    FamilyRow("granitemoehybrid", sharded=False),
    FamilyRow("granitemoeshared", sharded=False),
    FamilyRow("helium"),
    FamilyRow("hrm_text", sharded=False),
    FamilyRow("hy_v3"),
    FamilyRow("hy_v4", sharded=False),
    FamilyRow("hyperclovax"),
    FamilyRow("idefics3", sharded=False),
    FamilyRow("internvl", sharded=False),
    FamilyRow("jais2"),
    FamilyRow("jetmoe", sharded=False),
    FamilyRow("kimi_k25", sharded=False),
    FamilyRow("kimi_linear", sharded=False),
    FamilyRow("kolibri1"),
    FamilyRow("laguna"),
    FamilyRow("lfm2", sharded=False),
    FamilyRow("lfm2_moe", sharded=False),
    FamilyRow("lfm2_vl", sharded=False),
    FamilyRow("lfm3", sharded=False),
    FamilyRow("llama"),
    FamilyRow("llama4", scales_queries=True, sharded=False),
    FamilyRow("llama4_text", scales_queries=True, sharded=False),
    FamilyRow("llava", sharded=False),
    FamilyRow("longcat_flash", sharded=False),
    FamilyRow("mellum"),
    FamilyRow("mimo_v2_flash"),
    FamilyRow("minicpm3", sharded=False),
    FamilyRow("minimax_m2", sharded=False),
    FamilyRow("ministral"),
    FamilyRow("ministral3"),
    FamilyRow("mistral4", sharded=False),
    FamilyRow("mistral"),
    FamilyRow("mistral3", sharded=False),
    FamilyRow("mixtral"),
    FamilyRow("modernbert-decoder", sharded=False),
    FamilyRow("mpt", adapter=mpt.ADAPTER, positions="ALiBi"),
    FamilyRow("nanochat", sharded=False),
    FamilyRow("nemotron"),
    FamilyRow("nemotron_h", sharded=False),
    FamilyRow("olmo"),
    FamilyRow("olmo2", sharded=False),
    FamilyRow("olmo3", sharded=False),
    FamilyRow("olmo_hybrid", sharded=False),
    FamilyRow("olmoe", sharded=False),
    FamilyRow("persimmon", sharded=False),
    FamilyRow("phi"),
    FamilyRow("phi3"),
    FamilyRow("phimoe", sharded=False),
    FamilyRow("qwen2"),
    FamilyRow("qwen2_5_vl", sharded=False),
    FamilyRow("qwen2_moe"),
    FamilyRow("qwen2_vl", sharded=False),
    FamilyRow("qwen3"),
    FamilyRow("qwen3_5_moe_text", sharded=False),
    FamilyRow("qwen3_5_text", sharded=False),
    FamilyRow("qwen3_moe"),
    FamilyRow("qwen3_next", sharded=False),
    FamilyRow("qwen3_vl", sharded=False),
    FamilyRow("qwen3_vl_moe", sharded=False),
    FamilyRow("sarvam_moe"),
    FamilyRow("seed_oss"),
    FamilyRow("smollm3"),
    FamilyRow("smolvlm", sharded=False),
    FamilyRow("solar_open"),
    FamilyRow("stablelm"),
    FamilyRow("starcoder2"),
    FamilyRow("vaultgemma"),
    FamilyRow("youtu", sharded=False),
    FamilyRow("zamba2", sharded=False),
    FamilyRow("zaya", sharded=False),
    FamilyRow("cpmant", tested=False, refused_full="its cache gives other answers than the text in one piece"),
    FamilyRow(
        "deepseek_v4",
        tested=False,
        refused="it keeps older keys in compressed entries of its own",
        refused_full=_OWN_CACHE,
    ),
    FamilyRow("doge", tested=False, refused="its attention hides keys by their values"),
    FamilyRow("falcon_mamba", tested=False, refused=_NO_ATTENTION, refused_full=_ONE_TOKEN),
    FamilyRow("hunyuan_v1_dense", tested=False, refused=_ABSOLUTE_AFTER_ALL),
    FamilyRow("hunyuan_v1_moe", tested=False, refused=_ABSOLUTE_AFTER_ALL),
    FamilyRow("inkling_text", tested=False, refused=_RELATIVE_BIAS),
    FamilyRow("inkling2_text", tested=False, refused=_RELATIVE_BIAS),
    FamilyRow("inkling2_loop_text", tested=False, refused=_RELATIVE_BIAS),
    FamilyRow("jamba", tested=False, refused=_ONE_TOKEN, refused_full=_ONE_TOKEN),
    FamilyRow("mamba", tested=False, refused=_NO_ATTENTION, refused_full=_ONE_TOKEN),
    FamilyRow("mamba2", tested=False, refused=_NO_ATTENTION),
    FamilyRow("minimax", tested=False, refused=_OWN_CACHE, refused_full=_OWN_CACHE),
    FamilyRow("mllama", tested=False, refused="some of its layers attend to an image"),
    FamilyRow(
        "recurrent_gemma",
        tested=False,
        sharded=False,
        refused=_IN_LAYERS,
        refused_full=_IN_LAYERS,
    ),
    FamilyRow("rwkv", tested=False, refused=_NO_ATTENTION),
    FamilyRow("xlm", tested=False, refused_full="it has no cache, so that chunks would each begin again"),
    FamilyRow(
        "xlstm",
        tested=False,
        sharded=False,
        refused=_NO_ATTENTION,
        refused_full=_OWN_STATE,
    ),
    FamilyRow("zamba", tested=False, refused=_ONE_TOKEN, refused_full=_ONE_TOKEN),
    FamilyRow("idefics", tested=False, refused=_WITHOUT_IMAGE, refused_full=_WITHOUT_IMAGE),
    FamilyRow("kosmos-2", tested=False, refused=_WITHOUT_IMAGE, refused_full=_WITHOUT_IMAGE),
    FamilyRow("paligemma", tested=False, refused=_BOTH_WAYS, refused_full=_BOTH_WAYS),
    FamilyRow("voxtral_realtime", tested=False, refused=_WITHOUT_SOUND, refused_full=_WITHOUT_SOUND),
]
FAMILIES = {row.name: row for row in ROWS}


def family_row(name: str) -> FamilyRow:
    """Return what is known of a family; of one without a row, that nothing is."""
    return FAMILIES.get(name, FamilyRow(name, tested=False))


def adapter_of(name: str) -> FamilyAdapter | None:
    """Return how a family's attention is taken over, if not by the general mechanism."""
    return family_row(name).adapter
