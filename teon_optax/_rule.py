"""The rule that a user writes."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, overload

from optax.contrib import MuonDimensionNumbers

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, repr=False)
class Rule:
    """Says how some leaves are orthogonalized; the first rule that matches takes the leaf.

    Attributes:
      pattern: Regular expression, searched (`re.search`) in the leaf's path. A named group
        `(?P<layer>\\d+)` gives the layer number; where the group is optional and does not match,
        the layer is 0. `(?P<slice>query|key|value)` couples the leaves of a layer that differ only
        there, in the order of the alternatives.
      stack: How many consecutive layers of a series are coupled. 0 sends the leaf to the fallback
        optimizer, 1 is Muon, 2 or more TEON. K is this times what `slice` and `join` couple.
      mode: Mode of the unfolding (arXiv 2601.23261). 1 shares the Gram matrix over fan_out, 2 over
        fan_in, 3 over the K matrices.
      dims: Axes that are summed over (fan_in) and axes of the result (fan_out) of the whole leaf,
        or of its `view`; all others are batch. None is a matrix (fan_in, fan_out) in the axes that
        `layer_axis` leaves.
      layer_axis: Axis of the leaf that counts layers (`nn.scan`, `nnx.vmap`).
      split: A fused projection's parts along the first fan_out axis: their number, or their sizes.
      join: "parts", "heads" or both: couples the (equal) parts of `split`, and the matrices along
        the axes that `dims` does not name. Without it, each part and each head is alone.
      view: The shape that a leaf is reshaped to before `dims` names its axes; with `layer_axis`,
        that of one layer. It takes apart what lies in turns along one axis: Q, K and V by heads,
        (d, 3 h k), are `view=(d, h, 3, k), dims=(0, (1, 3))`; by groups of q query heads and a key
        and a value head they are `view=(d, g, q + 2, k), dims=(0, (2, 1, 3)), split=(q, 1, 1)`;
        gate and up in turns, (d, 2 f), are `view=(d, f, 2), dims=(0, 1)`.

    Raises:
      ValueError: If an argument has the wrong type or range, or two of them contradict each other.

    Examples:
      >>> from teon_optax import Rule
      >>> Rule(
      ...     r"block_(?P<layer>\\d+)/attn/(query|key|value)/kernel", stack=2
      ... )  # the paper's choice
      Rule(r"block_(?P<layer>\\d+)/attn/(query|key|value)/kernel", stack=2)
    """

    pattern: str
    stack: int = 1
    mode: int = 1
    dims: MuonDimensionNumbers | None = None
    layer_axis: int | None = None
    split: int | tuple[int, ...] = 1
    join: str | tuple[str, ...] = ()
    view: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.search("")  # Compiles the pattern, or raises.
        self._set("stack", self._integer("stack", self.stack))
        self._set("mode", self._integer("mode", self.mode))
        if self.stack < 0:
            raise ValueError(
                f"`{self}` has a negative stack: write 0 for the fallback, 1 for Muon, K >= 2 for "
                "TEON."
            )
        if self.mode not in (1, 2, 3):
            raise ValueError(
                f"`{self}` has mode {self.mode}: write 1 (joint over fan_out, the paper's choice), "
                "2 (over fan_in) or 3 (over layers)."
            )
        if self.layer_axis is not None:
            self._set("layer_axis", self._integer("layer_axis", self.layer_axis))
        self._check_view()
        self._check_dims()
        self._check_split()
        self._check_coupling()
        if self.stack >= 2 and not self.counts_layers:
            raise ValueError(
                f"`{self}` cannot tell which layer a leaf belongs to: put `(?P<layer>\\d+)` in the "
                "pattern, or pass `layer_axis=` for leaves of `nn.scan` and `vmap`."
            )

    @property
    def counts_layers(self) -> bool:
        """Tells whether it says which layer a leaf (or each part of a scanned one) belongs to."""
        return self.layer_axis is not None or "layer" in self.compiled.groupindex

    def search(self, path: str) -> re.Match[str] | None:
        """Finds the pattern anywhere in `path`; None where it is not."""
        return self.compiled.search(path)

    @functools.cached_property
    def compiled(self) -> re.Pattern[str]:
        """Compiles the pattern once: the cache of `re` holds 512."""
        if not isinstance(self.pattern, str):
            raise ValueError(
                f"`Rule({self.pattern!r})`: pattern should be a string, a regular expression."
            )
        try:
            return re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"`Rule({self.pattern!r})`: the pattern is no regular expression: {error}. "
                "Escape special characters with a backslash in a raw string, as in r'h\\.0'."
            ) from error

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integer(self, name: str, value: Any) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            return operator.index(value)
        except TypeError:
            raise ValueError(
                f"`Rule({self.pattern!r}, {name}={value!r})`: {name} should be an integer, not "
                f"{type(value).__name__}."
            ) from None

    def _check_view(self) -> None:
        if self.view is None:
            return
        sizes = self._axes("view", self.view)
        if not isinstance(self.view, Sequence) or len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"`Rule({self.pattern!r}, view={self.view!r})`: view should be a shape, a tuple of "
                "two positive lengths or more."
            )
        self._set("view", sizes)

    def _check_dims(self) -> None:
        if self.dims is None:
            return
        if not isinstance(self.dims, MuonDimensionNumbers):
            raise ValueError(
                f"`Rule({self.pattern!r}, dims={self.dims!r})`: dims should be "
                "`optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`."
            )
        axes = [self._axes("dims", a) for a in self.dims]
        if not all(axes):
            raise ValueError(
                f"`Rule({self.pattern!r}, dims={self.dims!r})`: name at least one axis of each "
                "kind."
            )
        self._set("dims", MuonDimensionNumbers(*(a[0] if len(a) == 1 else a for a in axes)))
        # With a view, `dims` counts the axes of one layer, which has no layer axis.
        has_layer = self.layer_axis is not None and self.view is None
        named = (*axes[0], *axes[1], *([self.layer_axis] if has_layer else []))
        if len(set(named)) != len(named):
            raise ValueError(
                f"`{self}` names an axis twice: reduction axes, output axes and layer_axis must "
                "not overlap."
            )

    def _axes(self, name: str, axes: Any) -> tuple[int, ...]:
        axes = axes if isinstance(axes, Sequence) else (axes,)
        return tuple(self._integer(name, axis) for axis in axes)

    def _check_split(self) -> None:
        sizes = self._axes("split", self.split)
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"`Rule({self.pattern!r}, split={self.split!r})`: split should be a positive "
                "number of equal parts, or a tuple of positive sizes."
            )
        self._set("split", sizes if isinstance(self.split, Sequence) else sizes[0])

    def _check_coupling(self) -> None:
        given = (self.join,) if isinstance(self.join, str) else self.join
        if not isinstance(given, tuple) or any(part not in ("parts", "heads") for part in given):
            raise ValueError(f'`{self}`: join should be "parts", "heads" or ("parts", "heads").')
        sizes = self.split if isinstance(self.split, tuple) else (1,) * min(self.split, 2)
        if "parts" in given and (len(sizes) == 1 or len(set(sizes)) > 1):
            raise ValueError(
                f"`{self}` should join parts of one size, two at least: split into such parts, as "
                "with split=fan_out // head_dim, or leave join out."
            )

    def __repr__(self) -> str:
        """Writes the call that makes this rule, without defaults: it can be pasted back as code."""
        raw = self.pattern.isprintable() and not re.search(r'"|\\$', self.pattern)
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)[1:]
            if getattr(self, field.name) != field.default
        ]
        pattern = f'r"{self.pattern}"' if raw else repr(self.pattern)
        return f"Rule({', '.join([pattern, *changed])})"


class Rules(tuple[Rule, ...]):
    """Some rules. `print` shows code that makes them, a line each.

    Attributes:
      reasons: By path, what the default rules took a leaf of the fallback for and by what. Rules
        that differ in them alone are equal.
    """

    reasons: Mapping[str, str] = MappingProxyType({})

    def __str__(self) -> str:
        # Inside the parentheses, so that the text is one expression: `rules = ` may stand before.
        names = "from teon_optax import Rule"
        if any(rule.dims for rule in self):
            names = f"from optax.contrib import MuonDimensionNumbers; {names}"
        lines = "".join(f"    {rule},\n" for rule in self)
        return f"(  # {names}\n{lines})" if self else "()"


@overload
def checked_rules(rules: None, name: str = "rules") -> None: ...
@overload
def checked_rules(rules: Iterable[Rule], name: str = "rules") -> tuple[Rule, ...]: ...
def checked_rules(rules: Any, name: str = "rules") -> tuple[Rule, ...] | None:
    """Makes a tuple of an argument's rules; None stays: `default_rules` of a tree not yet seen.

    Args:
      rules: What the user gave.
      name: Name of the argument.

    Raises:
      ValueError: If it is no iterable of `Rule`.
    """
    if rules is None:
        return None
    listed = tuple(rules) if isinstance(rules, Iterable) else (rules,)
    if isinstance(rules, Rule) or not all(isinstance(rule, Rule) for rule in listed):
        raise ValueError(
            f"`{name}={rules!r}` should be a tuple of `Rule`, such as `(Rule('kernel'),)`."
        )
    return listed


def takes_rules(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wraps a function of `rules`, so that an argument of `Rule` is told where it belongs."""

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        misplaced = {field.name for field in dataclasses.fields(Rule)} & {*named}
        if misplaced:
            name = min(misplaced)
            given, ready = f"{name}={named[name]!r}", ""
            if name in ("mode", "stack"):
                ready = f", or take a ready set, such as `teon_optax.rules.paper(params, {given})`"
            raise TypeError(
                f"`{function.__name__}({given})`: each rule has its own {name}, so write "
                f"`rules=[Rule(pattern, {given})]`{ready}."
            )
        return function(*arguments, **named)

    return call


def fan_axes(dims: MuonDimensionNumbers) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gives the reduction (fan_in) and output (fan_out) axes of `dims`, each as a tuple."""
    reduction, output = ((a,) if isinstance(a, int) else tuple(a) for a in dims)
    return reduction, output
