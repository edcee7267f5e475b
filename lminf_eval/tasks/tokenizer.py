"""The evaluated model's tokenizer, as a task sees it: loaded and called exactly as lm-eval's `hf` model does."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lminf_eval.errors import UsageError, first_line
from lminf_eval.tasks.chunked_tokenization import Tokens, encode, pieces

_MISSING = (
    "this task is sized in tokens and needs the evaluated model's tokenizer, but the model arguments have neither "
    '`pretrained` nor `tokenizer`; pass --metadata \'{"tokenizer": "…"}\''
)


@dataclass(frozen=True)
class TaskTokenizer:
    """A tokenizer with lm-eval's `hf` rules for special tokens.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        add_bos_token: the model argument of that name; None leaves the tokenizer its own default.
        prefix: text of the token that `hf` conditions rolling likelihoods on; text that starts with it gets no
            special tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    add_bos_token: bool | None
    prefix: str

    def encode(self, text: str) -> np.ndarray:
        """Return token ids [n] as the model gets them, special tokens included."""
        special = True if self.add_bos_token is None else self.add_bos_token
        special = special and not self._has_prefix(text)
        return encode(self.tokenizer, text, lambda part: self._ids(part, special))

    def encode_bare(self, text: str) -> np.ndarray:
        """Return token ids [n] of the text alone, without special tokens."""
        return pieces(self.tokenizer).encode(text)[0] if self.tokenizer.is_fast else self._ids(text, False)

    def offsets(self, text: str) -> Tokens:
        """Return token ids [n] of the text alone, and the characters [n, 2] that each token covers, from and to.

        Raises:
            UsageError: if the tokenizer is a Python-only one, which does not know the offsets.
        """
        if not self.tokenizer.is_fast:
            raise UsageError(
                f"tokenizer {self.tokenizer.name_or_path!r} does not know the positions of its tokens in the text; "
                "perplexity tasks need a fast tokenizer (use_fast_tokenizer=True, or another `tokenizer`)"
            )
        return pieces(self.tokenizer).encode(text)

    def n_special(self, text: str) -> int:
        """Return the number of special tokens that `encode` adds to this text."""
        head = text[: len(self.prefix) + 16]
        return len(self.encode(head)) - len(self.encode_bare(head))

    def _has_prefix(self, text: str) -> bool:
        return bool(self.prefix) and text.startswith(self.prefix)

    def _ids(self, text: str, special: bool) -> np.ndarray:
        encoding = self.tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return np.array(encoding["input_ids"], dtype=np.int32)


def load_tokenizer(**metadata: Any) -> TaskTokenizer:
    """Load the tokenizer that lm-eval's `hf` would load from the model arguments in a task's metadata.

    Reads `pretrained`, `tokenizer` (a name, a folder or a tokenizer object), `revision`, `subfolder`, `gguf_file`,
    `use_fast_tokenizer`, `trust_remote_code`, `add_bos_token` and `prefix_token_id`; ignores everything else.

    Raises:
        UsageError: if no tokenizer is named, it cannot be loaded, or it encodes text to nothing.
    """
    given, pretrained = metadata.get("tokenizer"), metadata.get("pretrained")
    if given is not None and not isinstance(given, str):
        tokenizer = given
    else:
        name = given or (pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", None))
        if not name:
            raise UsageError(_MISSING)
        options: dict[str, Any] = {"revision": str(metadata.get("revision") or "main")}
        options["trust_remote_code"] = bool(metadata.get("trust_remote_code", False))
        if not given and metadata.get("gguf_file") is not None:
            options["gguf_file"] = metadata["gguf_file"]
        else:
            options["use_fast"] = metadata.get("use_fast_tokenizer", True)
        if metadata.get("add_bos_token") is not None:
            options["add_bos_token"] = metadata["add_bos_token"]
        if metadata.get("subfolder"):
            options["subfolder"] = str(metadata["subfolder"])
        tokenizer = _from_pretrained(name, **options)
    prefix_id = metadata.get("prefix_token_id")
    if prefix_id is None:
        prefix_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prefix = "" if prefix_id is None else tokenizer.decode(prefix_id)
    return TaskTokenizer(tokenizer, metadata.get("add_bos_token"), prefix)


@cache
def _from_pretrained(name: str, **options: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UsageError(f"cannot load the tokenizer of {name!r}: {reason}") from error
    if not tokenizer("The grass is green.", add_special_tokens=False)["input_ids"]:
        raise UsageError(f"the tokenizer of {name!r} encodes text to no tokens; pass another one as `tokenizer`")
    return tokenizer
