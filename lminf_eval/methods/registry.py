"""The methods by name, and a user's arguments turned into one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lminf_eval.config.trained_length import trained_length
from lminf_eval.errors import UsageError, validation_line
from lminf_eval.methods.base import AttentionMethod
from lminf_eval.methods.branches import UNBOUNDED
from lminf_eval.methods.dca import DualChunk
from lminf_eval.methods.full import Full
from lminf_eval.methods.infllm import InfLLM
from lminf_eval.methods.lambda_ import Lambda
from lminf_eval.methods.lambda_mask import LambdaMask
from lminf_eval.methods.rerope import ReRoPE
from lminf_eval.methods.self_extend import SelfExtend
from lminf_eval.methods.streaming import Streaming
from lminf_eval.methods.tokenselect import TokenSelect
from lminf_eval.methods.window import Window
from lminf_eval.utils.names import closest

METHODS: dict[str, type[AttentionMethod]] = {
    one.name: one
    for one in (
        *(Lambda, Full, Window, Streaming, LambdaMask, ReRoPE),
        *(SelfExtend, DualChunk, InfLLM, TokenSelect),
    )
}
DEFAULT = Lambda.name

# One set of arguments serves a comparison of methods: these change nothing in a method that has no such parameter.
SHARED = (
    *("n_local", "n_global", "top_k_queries", "top_k_distance", "top_k_from_layer", "top_k_choice", "top_k_block"),
)
# What results and journals have said of every method since 0.1, in this order; other parameters only of their own.
_ALWAYS: dict[str, Any] = {
    "n_local": None,
    "n_global": 10,
    "top_k": 0,
    "top_k_from_layer": 0,
    "top_k_distance": None,
    "rope": None,
    "rope_factor": None,
}


def parameters() -> dict[str, FieldInfo]:
    """Return the parameters of all methods by name; those that several have once."""
    found: dict[str, FieldInfo] = {}
    for method in METHODS.values():
        found = {**method.model_fields, **found}
    return dict(sorted(found.items(), key=lambda item: list(_ALWAYS).index(item[0]) if item[0] in _ALWAYS else 99))


def default_of(parameter: str, field: FieldInfo) -> str:
    """Return an argument's default for people, in Markdown; after it, those of methods that have another one."""
    common = shown_default(field)
    own = {name: shown_default(METHODS[name].model_fields[parameter]) for name in methods_with(parameter)}
    return "; ".join([common, *(f"`{name}`: {default}" for name, default in own.items() if default != common)])


def methods_with(parameter: str) -> list[str]:
    """Return the names of the methods that have a parameter."""
    return [name for name, method in METHODS.items() if parameter in method.model_fields]


@dataclass(frozen=True)
class MethodArgs:
    """A method's name and what a user set of its parameters; the others are open or have their defaults.

    Attributes:
        method: the method's class.
        given: the values that were set, for this method or `SHARED`.
    """

    method: type[AttentionMethod]
    given: Mapping[str, Any]

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> MethodArgs:
        """Read `attention` and parameters from `--model_args`. A value of None counts as not given.

        Raises:
            UsageError: for an unknown method, a parameter that it does not have, or an impossible value.
        """
        given = {name: value for name, value in args.items() if value is not None}
        name = given.pop("attention", DEFAULT)
        if not isinstance(name, str) or name not in METHODS:
            raise UsageError(f"attention={name}: must be one of {', '.join(METHODS)}{closest(str(name), METHODS)}")
        method = METHODS[name]
        for parameter in [parameter for parameter in given if parameter not in method.model_fields]:
            given[parameter] = _checked(parameter, given[parameter], name)
        made = cls(method, given).at(UNBOUNDED)
        return cls(method, given | {name: value for name, value in made.model_dump().items() if name in given})

    def resolve(self, config: Any) -> tuple[AttentionMethod, str]:
        """Return the method for a model, from its transformers `config`, and where its n_local comes from.

        Raises:
            UsageError: if the config names no pre-training length and n_local is open, or a parameter does not fit.
        """
        why, length = "set by n_local", 0
        if "n_local" in self.method.model_fields and "n_local" not in self.given:
            found, why = trained_length(config)
            if found is None:
                raise UsageError(
                    f"n_local: the config of {config.model_type!r} tells no pre-training length; pass n_local=<tokens>"
                )
            length = found
        layers = 0
        if self.method.patched:  # a config that names two text models, such as MusicGen's, is refused elsewhere
            layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        method = self.at(length, layers)
        if layers:
            method.check_layers(layers)
        if length and method.model_dump()["n_local"] != length:
            why = f"from {why}={length}"
        return method, why if "n_local" in self.method.model_fields else ""

    def at(self, length: int, layers: int = 0) -> AttentionMethod:
        """Return the method for a model of `layers` layers that was pre-trained at `length` tokens.

        Raises:
            UsageError: if a parameter does not fit.
        """
        own = {name: value for name, value in self.given.items() if name in self.method.model_fields}
        try:
            return self.method(**self.method.filled(own, length, layers))
        except ValidationError as error:
            raise UsageError("; ".join(validation_line(problem) for problem in error.errors())) from None

    def record(self, method: AttentionMethod | None = None) -> dict[str, Any]:
        """Return what results and journals say of the method: its name and parameters, resolved ones from `method`."""
        resolved = {} if method is None else method.recorded()
        return {"attention": self.method.name, **_ALWAYS, **self.given, **resolved}


def make(attention: str = DEFAULT, **given: Any) -> AttentionMethod:
    """Return a method whose open parameters are all given.

    Raises:
        UsageError: for an unknown method or parameter, an impossible value, or one that is missing.
    """
    args = MethodArgs.parse({"attention": attention, **given})
    if "n_local" in args.method.model_fields and "n_local" not in args.given:
        raise UsageError(f"n_local: attention={attention} needs it here")
    return args.at(0)


def _checked(parameter: str, value: Any, name: str) -> Any:
    """Return the value of a parameter that the method `name` does not have, if it may be set all the same."""
    if not (owners := methods_with(parameter)):
        raise UsageError(f"{parameter}={value}: unknown parameter{closest(parameter, parameters())}")
    field = METHODS[owners[0]].model_fields[parameter]
    declared: Any = Annotated[field.annotation, field]
    try:
        value = TypeAdapter(declared).validate_python(value)
    except ValidationError as error:
        raise UsageError("; ".join(validation_line(problem, parameter) for problem in error.errors())) from None
    if parameter not in SHARED and value != field.default:
        raise UsageError(f"{parameter}={value} goes with attention={' or '.join(owners)}, not with attention={name}")
    return value


@dataclass(frozen=True)
class MethodInfo:
    """What `lminf.methods()` says of a method.

    Attributes:
        parameters: name -> one line; defaults are in it.
    """

    name: str
    title: str
    paper: str
    summary: str
    parameters: Mapping[str, str]

    @classmethod
    def of(cls, method: type[AttentionMethod]) -> MethodInfo:
        """Describe a method."""
        lines = {
            name: f"{field.description} (default: {shown_default(field)})"
            for name, field in method.model_fields.items()
        }
        return cls(method.name, method.title, method.paper, method.summary, lines)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}, {self.summary}" + (f" ({self.paper})" if self.paper else "")]
        return "\n".join([*lines, *(f"    {name}: {line}" for name, line in self.parameters.items())])


def shown_default(field: FieldInfo) -> str:
    """Return a parameter's default for people, in Markdown."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = field.get_default()
    shown = f"`{default}`" if isinstance(default, str | bool) else "none" if default is None else str(default)
    return str(extra.get("default", shown))
