"""The one error a user is meant to read, the line of another's that it quotes, and the one that can be mended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What transformers raises at a config that it can't build a model from, or a package that is missing for it.
BUILDING = (
    *(AssertionError, AttributeError, ImportError, KeyError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
_TELLING = (ImportError, OSError, RuntimeError, ValueError)  # they say what is wrong; a KeyError says a name alone


class UsageError(ValueError, SystemExit):
    """Bad input, told in one line that names the value and says what is allowed.

    It is a `ValueError`, so code can catch it as usual. It is a `SystemExit` too, so that where nobody catches it (a
    stock `lm_eval` command line), Python prints the line alone, without a traceback, and exits with status 1.
    """

    def __init__(self, message: str):
        line = message.replace("\n", "\\n").replace("\r", "\\r")  # a value that it names may hold some
        SystemExit.__init__(self, f"lminf: {line}")
        self.code = f"lminf: {line}"

    def __str__(self) -> str:
        return str(self.code)


def validation_message(problem: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, from an error that pydantic lists, to stand behind a colon."""
    message: str = problem["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def validation_line(problem: Mapping[str, Any], name: str = "") -> str:
    """Return "name=value: what is wrong" from an error that pydantic lists.

    If the error concerns several values together, return its message alone.

    Args:
        name: of the value, if pydantic does not know it.
    """
    name = name or ".".join(str(part) for part in problem["loc"])
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{name}={problem['input']}: {validation_message(problem)}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, does not suffice."""
    told = ("out of memory", "can't allocate memory", "not enough memory")  # torch's, on devices and on the host
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def first_line(error: BaseException) -> str:
    """What an error says, in its first line; its class's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Return an error in one line, with the name of its class if it says too little without."""
    said = first_line(error)
    return said if isinstance(error, _TELLING) or said == type(error).__name__ else f"{type(error).__name__}: {said}"
