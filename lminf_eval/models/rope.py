"""A family's own rotary embedding, used from outside: identity for the model, any position for us.

The model's `rotary_emb` module gives (cos, sin) for positions, and its file's `apply_rotary_pos_emb` applies them. With
the identity handed to the model, its attention gives us queries and keys that are not rotated yet; the family's own
function then rotates them to whatever positions a branch needs, with its conventions (halves, interleaved, partial,
scaled).

Shapes: B batch, S tokens, H heads, D head dimension, r rotated dimensions.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

Angles = tuple[torch.Tensor, torch.Tensor]


class Columns(NamedTuple):
    """Where in a head the rotated dimensions are, and which of them make a pair.

    For families that rotate by another function than `apply_rotary_pos_emb`, or only a part of a head that is not its
    first.

    Attributes:
        last: they are the head's last dimensions, not its first.
        neighbours: a pair is two neighbours, not one dimension of each half.
    """

    last: bool
    neighbours: bool


COLUMNS = [Columns(last, neighbours) for last in (True, False) for neighbours in (False, True)]
_FUNCTION = "apply_rotary_pos_emb"


class RotaryEmbedding(Protocol):
    """What rotates a model's queries and keys: `Rotary`, or a family's own."""

    def restore(self) -> None:
        """Give the model its rotation back."""

    def knows(self, layer_type: str | None) -> bool:
        """Return whether layers of this type are rotated at all."""

    def angles(self, positions_BS: torch.Tensor, like: torch.Tensor, layer_type: str | None = None) -> Angles:
        """Return (cos, sin) at integer positions, in the dtype and on the device of `like`."""

    def rotate(self, x_BHSD: torch.Tensor, angles: Angles) -> torch.Tensor:
        """Return x turned by `angles`."""


class FrozenFrequencies:
    """A rotary module whose frequencies are those of one length, whatever it is then asked for, until `restore`.

    Of transformers' rope types only dynamic and longrope follow the running length. Left alone, they change under keys
    that are in a cache already, so that a sequence passed in chunks is not the sequence passed at once.
    """

    @torch.inference_mode(False)  # the module's buffers must stay ordinary tensors
    def __init__(self, module: nn.Module, length: int):
        self.module = module
        self._forward = inspect.unwrap(type(module).forward)  # beneath the decorator that follows the running length
        self.by_type = "layer_type" in inspect.signature(self._forward).parameters
        buffers = module.named_buffers(remove_duplicate=False)  # transformers lets one stand in for another
        self._buffers = {name: (buffer, buffer.clone()) for name, buffer in buffers}
        self._plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, torch.Tensor))}
        self._before = vars(module).get("forward")
        module.forward = self.angles
        self.set_length(length)

    @torch.inference_mode(False)
    def set_length(self, length: int) -> None:
        """Take the frequencies that the family uses for sequences of `length` tokens."""
        if not depends_on_length(self.module):
            return
        layer_types: Any = self.module.layer_types if self.by_type else [None]
        for layer_type in layer_types:
            extra = [layer_type] if self.by_type else []
            for last in (0, length - 1):  # back to the trained ones first
                position = torch.tensor([[last]], device=next(self.module.buffers()).device)
                with suppress(KeyError):  # a layer type without rotation
                    type(self.module).forward(self.module, torch.zeros(1, device=position.device), position, *extra)

    def angles(self, x: torch.Tensor, position_ids: torch.Tensor, *args, **kwargs) -> Angles:
        """What the module's forward returns, without following the positions."""
        return self._forward(self.module, x, position_ids, *args, **kwargs)

    @torch.inference_mode()  # where every tensor may be written
    def restore(self) -> None:
        """Put the module's forward and its frequencies back as they were found."""
        set_forward(self.module, self._before)
        for name, (buffer, value) in self._buffers.items():
            setattr(self.module, name, buffer.copy_(value))
        vars(self.module).update(self._plain)


def depends_on_length(module: nn.Module) -> bool:
    """Whether a rotary module's frequencies depend on the running length."""
    found = getattr(module, "rope_type", "default")
    names = found.values() if isinstance(found, dict) else [found]
    return any("dynamic" in name or name == "longrope" for name in names)


@contextmanager
def frozen_length(modules: list[nn.Module], length: int) -> Iterator[None]:
    """Within it, the frequencies of rotary modules are those of `length` tokens."""
    frozen = [FrozenFrequencies(module, length) for module in modules if depends_on_length(module)]
    try:
        yield
    finally:
        for frequencies in frozen:
            frequencies.restore()


class RotationSwitch:
    """Stands in for a file's `apply_rotary_pos_emb`, which any model of the family may be calling in any thread.

    Attributes:
        rotate: the file's own function.
        takes_pairs: whether it takes queries and keys together; Gemma 3n's takes one tensor.
    """

    _installed: ClassVar[dict[ModuleType, RotationSwitch]] = {}
    _lock = threading.Lock()

    def __init__(self, home: ModuleType):
        self.home, self.rotate = home, home.apply_rotary_pos_emb
        self.takes_pairs = "k" in inspect.signature(self.rotate).parameters
        self._users, self._here = 0, threading.local()

    @classmethod
    def install(cls, home: ModuleType) -> RotationSwitch:
        """Return the file's switch, put in place if it is the first; each caller must `remove` it once."""
        with cls._lock:
            switch = cls._installed.get(home) or cls._installed.setdefault(home, cls(home))
            switch._users += 1
            setattr(home, _FUNCTION, switch)
            return switch

    def remove(self) -> None:
        """Give the file its function back, if nobody else uses the switch."""
        with self._lock:
            self._users -= 1
            if not self._users:
                setattr(self.home, _FUNCTION, self.rotate)
                del self._installed[self.home]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Rotate nothing inside, in this thread."""
        self._here.off = True
        try:
            yield
        finally:
            self._here.off = False

    def __call__(self, q: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Rotate as the file does, or return the tensors as they are."""
        if not getattr(self._here, "off", False):
            return self.rotate(q, *args, **options)
        return (q, options["k"] if "k" in options else args[0]) if self.takes_pairs else q


class Rotary:
    """One model's rotary embedding, its frequencies those of `n_local` tokens.

    Args:
        module: turns positions into (cos, sin).
        home: the family's file, with its `apply_rotary_pos_emb`.
    """

    def __init__(self, module: nn.Module, home: ModuleType, n_local: int):
        self.module = module
        self._switch = RotationSwitch.install(home) if hasattr(home, _FUNCTION) else None
        self._function: Callable = _no_function
        if self._switch is not None:
            self._function = self._switch.rotate if self._switch.takes_pairs else _alone(self._switch.rotate)
        self._takes_whole_heads: bool | None = None  # found out at the first rotation
        self._in_halves: bool | None = None  # likewise
        self._axes = torch.Size()  # before [B, S] in the model's own positions: Qwen-VL has time, height and width
        self._single: slice | None = None  # found out at the first rotation of columns
        self._frequencies = FrozenFrequencies(module, n_local)
        module.forward = self.identity

    def restore(self) -> None:
        """Give the model its rotation back."""
        self._frequencies.restore()
        if self._switch is not None:
            self._switch.remove()

    @torch.no_grad()
    def angles(self, positions_BS: torch.Tensor, like: torch.Tensor, layer_type: str | None = None) -> Angles:
        """The module's (cos, sin) [B, S, r] at integer positions, in the dtype and on the device of `like`."""
        extra = [layer_type] if self._frequencies.by_type else []
        positions = positions_BS.to(like.device).expand(*self._axes, *positions_BS.shape)
        found = self._frequencies.angles(like[:0], positions, *extra)
        if isinstance(found, torch.Tensor):  # DeepSeek V2 gives cos + i sin
            return found.real.to(like.dtype), found.imag.to(like.dtype)
        cos, sin = found
        return (cos[0], sin[0]) if cos.dim() > 3 else (cos, sin)  # text has one position in time, height and width

    def single_angles(self, positions_BS: torch.Tensor, like: torch.Tensor, layer_type: str | None = None) -> Angles:
        """Return `angles` without the repetitions that a module makes for both dimensions of a pair: [B, S, r / 2]."""
        if self._single is None:  # at position 0 all sines are alike
            self._single = _one_of_each_pair(
                self.angles(torch.ones_like(positions_BS[:1, :1]), like, layer_type)[1][0, 0]
            )
        cos, sin = self.angles(positions_BS, like, layer_type)
        return cos[..., self._single], sin[..., self._single]

    @property
    def has_function(self) -> bool:
        """Whether the family's file has an `apply_rotary_pos_emb`."""
        return self._switch is not None

    def knows(self, layer_type: str | None) -> bool:
        """Whether layers of this type are rotated at all, as far as the module tells."""
        return not self._frequencies.by_type or hasattr(self.module, f"{layer_type}_inv_freq")

    def rotate(self, x_BHSD: torch.Tensor, angles: Angles) -> torch.Tensor:
        """Return x rotated by `angles` with the family's own function; what it leaves of a head passes through."""
        if self._in_halves is None:
            self._in_halves = self._multiplies_halves(angles)
        if self._in_halves and x_BHSD.shape[-1] == angles[0].shape[-1]:
            return _rotate_halves(x_BHSD, angles)
        if self._takes_whole_heads is None:
            self._takes_whole_heads = self._accepts(x_BHSD, angles)
        if self._takes_whole_heads:
            return self._function(x_BHSD, x_BHSD[:, :0], *angles)[0]
        r = angles[0].shape[-1]
        rotated = self._function(x_BHSD[..., :r], x_BHSD[:, :0, :, :r], *angles)[0]
        return torch.cat([rotated, x_BHSD[..., r:]], -1)

    def _multiplies_halves(self, angles: Angles) -> bool:
        """Whether the family's function does what `_rotate_halves` does, faster; tried on numbers of no meaning."""
        cos, sin = (part[:1, :1] for part in angles)
        draw, r = torch.Generator().manual_seed(0), cos.shape[-1]
        x, cos, sin = (torch.randn(1, *shape, generator=draw).to(cos) for shape in ((1, 1, r), (1, r), (1, r)))
        try:
            expected = self._function(x, x[:, :0], cos, sin)[0]
        except (RuntimeError, IndexError):  # shapes that it doesn't know
            return False
        found = _rotate_halves(x, (cos, sin)) if cos.shape[-1] % 2 == 0 else None
        limit = 1e-6 if x.dtype in (torch.float32, torch.float64) else 3e-2
        return found is not None and found.shape == expected.shape and torch.allclose(found, expected, limit, limit)

    def _accepts(self, x_BHSD: torch.Tensor, angles: Angles) -> bool:
        """Whether the family's function takes whole heads, or expects its caller to cut out the rotated part."""
        try:
            self._function(x_BHSD[:1, :1, :1], x_BHSD[:1, :0, :1], *(part[:1, :1] for part in angles))
        except RuntimeError:  # shapes that don't broadcast
            return False
        return True

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Make the family's file skip, in this thread, even the motions of rotating by the identity.

        Those are four products and three copies of queries and keys a layer. A file that calls its function by another
        name goes on multiplying by one.
        """
        with nullcontext() if self._switch is None else self._switch.off():
            yield

    @torch.no_grad()
    def identity(self, x: torch.Tensor, position_ids: torch.Tensor, *args, **kwargs) -> Angles | torch.Tensor:
        """What the model is given in place of its own (cos, sin): a rotation that changes nothing."""
        self._axes = position_ids.shape[:-2]
        found = self._frequencies.angles(x, position_ids[..., -1:], *args, **kwargs)
        if isinstance(found, torch.Tensor):
            return torch.ones_like(found).expand(*position_ids.shape, -1)
        return torch.ones_like(found[0]), torch.zeros_like(found[1])


def rotate_columns(x_BHSD: torch.Tensor, angles: Angles, columns: Columns) -> torch.Tensor:
    """Return x, some columns of each head rotated by `angles`, which have each angle once: [B, S, r / 2]."""
    cos, sin = (part[:, None] for part in angles)
    wide = torch.promote_types(x_BHSD.dtype, cos.dtype)  # angles may be wider
    rotated = x_BHSD.to(wide, copy=True, memory_format=torch.contiguous_format)
    low = x_BHSD.shape[-1] - 2 * cos.shape[-1] if columns.last else 0
    (a, b), (a_turned, b_turned) = (_pairs(x[..., low:], cos.shape[-1], columns) for x in (x_BHSD, rotated))
    a_turned.mul_(cos).addcmul_(b, sin, value=-1)
    b_turned.mul_(cos).addcmul_(a, sin)
    return rotated.to(x_BHSD.dtype)


def _pairs(x_BHSD: torch.Tensor, pairs: int, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of both numbers of each of the first `pairs` pairs."""
    if columns.neighbours:
        return x_BHSD[..., 0 : 2 * pairs : 2], x_BHSD[..., 1 : 2 * pairs : 2]
    return x_BHSD[..., :pairs], x_BHSD[..., pairs : 2 * pairs]


def _one_of_each_pair(sin_r: torch.Tensor) -> slice:
    """Return where each angle is once, of a module's sines [r] at a position other than 0, where they all differ."""
    half, rest = divmod(len(sin_r), 2)
    if not rest and torch.equal(sin_r[:half], sin_r[half:]):
        return slice(half)
    if not rest and torch.equal(sin_r[::2], sin_r[1::2]):
        return slice(None, None, 2)
    return slice(None)


def _rotate_halves(x_BHSD: torch.Tensor, angles: Angles) -> torch.Tensor:
    """[x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2 of x (arXiv 2104.09864, in GPT-NeoX's order)."""
    cos, sin = (part[:, None] for part in angles)
    half = x_BHSD.shape[-1] // 2
    rotated = x_BHSD * cos
    rotated[..., :half].addcmul_(x_BHSD[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x_BHSD[..., :half], sin[..., half:])
    return rotated.to(x_BHSD.dtype)  # angles may be wider


def _no_function(*args: Any) -> Any:
    """Stand in for `apply_rotary_pos_emb` in a file that has none; `Rotary.has_function` says so."""
    raise AssertionError("a layer is rotated by a function that its file does not have")


def _alone(apply: Callable) -> Callable:
    """A family's function that takes one tensor (Gemma 3n), as those that take queries and keys."""
    return lambda q, k, cos, sin: (apply(q, cos, sin), k)


def backwards(angles: Angles) -> Angles:
    """The inverse rotation, without the attention scaling that some rope types fold into (cos, sin)."""
    cos, sin = angles
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, -sin / length


def set_forward(module: nn.Module, forward: Callable | None) -> None:
    """Give a module back the forward of its own that it had (an accelerate hook), or its class's."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
