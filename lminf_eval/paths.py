"""Where downloaded models, converted weights and filtered corpora are kept."""

import os
import sys
from pathlib import Path


def cache_home() -> Path:
    """The cache folder: `$LMINF_EVAL_HOME`, else `lminf-eval` in the user's own cache directory.

    The folder is named, not created. A relative or `~` path in a variable is taken as the shell would take it.
    """
    if home := os.environ.get("LMINF_EVAL_HOME"):
        return Path(home).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "lminf-eval"
