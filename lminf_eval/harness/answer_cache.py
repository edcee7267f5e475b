"""lm-eval's own caches (`--use_cache`, `--cache_requests`), made to tell apart what they mix up.

Both name an entry by too little: a database of answers by the request's text alone, whatever model and method gave
them; built requests by the task's name, however long its documents are. Here each entry is named by what it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from typing import Any

from sqlitedict import SqliteDict


class IdentifiedDict(SqliteDict):
    """A database whose keys begin with an identity: answers of another model, and those of others, are not found."""

    identity = ""

    def __contains__(self, key: str) -> bool:
        return super().__contains__(self.identity + key)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self.identity + key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(self.identity + key, value)


def identify(database: SqliteDict, identity: Any) -> None:
    """Make an open database find and keep only what belongs to `identity` (JSON, or anything that str tells apart).

    lm-eval opens it and hands it on; its class is changed because both sides hold this very object.
    """
    database.__class__ = IdentifiedDict
    database.identity = digest(identity) + ":"


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits that tell one JSON value from another; anything else in it is known by its str."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def keep_requests_apart(task: Any) -> None:
    """Make lm-eval's `Task` name its built requests by the task's metadata too: length, tokenizer, model arguments."""
    build = task.build_all_requests
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_all_requests(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        metadata = digest(getattr(self.config, "metadata", None))
        call.arguments["tokenizer_name"] = f"{call.arguments['tokenizer_name']}{metadata}"
        return build(*call.args, **call.kwargs)

    task.build_all_requests = build_all_requests
