"""The one error a user is meant to read, the line of another's that it quotes, and the one that can be mended."""

# What transformers raises at a config that it can't build a model from, or a package that is missing for it.
BUILDING = (
    *(AssertionError, AttributeError, ImportError, KeyError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError),
)


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
