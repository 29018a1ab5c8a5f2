"""Jinja's sandbox with limits: a chat template comes with a model's file, and its input from callers.

Rules:
- One rendering's work is counted as a whole: loop rounds, macro calls, and the length of every value.
- Its time is limited too, and checked wherever it counts.
- A value is weighed before it is written out as text or JSON. A list that contains another list twice, which contains a third
  twice, is small until it is written.
- Exceeding a limit is a `TemplateError`, like everything else that a template does wrong.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE: Final = 256 * 1024  # characters of a template; the longest in use have about 20,000
_MAX_SLICES: Final = 65536  # lists that a filter may make of one; no request has more values
_LOOK_EACH: Final = 256  # rounds between checks of the clock
# Names that no template uses itself.
_ROUND: Final = "lacre_round"
_WRITTEN: Final = "lacre_written"
_JOINED: Final = "lacre_joined"
# Characters of a number or another value without text. Longer numbers have a few thousand digits at most.
_SCALAR: Final = 32
_HOLDING: Final = (Mapping, list, tuple, set, frozenset, ItemsView, KeysView, ValuesView)
# Filters that read values and write none of them out.
_LOOKING: Final = frozenset({
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
})  # fmt: skip
T = TypeVar("T")


class TemplateTooLarge(jinja2.TemplateError):
    """The template exceeds a limit."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one rendering.

    - rounds: templates loop a few times over the messages, of which there are at most 2,048.
    - size: characters and items of all values; a request has 7 MiB, which a template may copy several times.
    - seconds: checked in loops; a long conversation takes some hundredths.
    """

    rounds: int = 1_000_000
    size: int = 128 * 2**20
    seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Weight:
    """The size of a value when written out: characters (without JSON's escapes), values in it, and nesting depth."""

    characters: int
    values: int
    depth: int


def weight(value: Any) -> Weight:
    """Visits each distinct value once, however often it is contained. Raises `RecursionError` for deep nesting."""
    return _weight(value, {})


def _weight(value: Any, known: dict[int, tuple[Any, Weight]]) -> Weight:
    """known: by identity, with the value itself, so that no other value gets the same identity."""
    if isinstance(value, str):
        return Weight(len(value) + 2, 1, 0)
    if not isinstance(value, _HOLDING):
        return Weight(value.bit_length() // 3 + 2 if isinstance(value, int) else _SCALAR, 1, 0)
    if id(value) not in known:
        inside = [_weight(each, known) for each in value]
        if isinstance(value, Mapping):
            inside += [_weight(each, known) for each in value.values()]
        weighed = Weight(
            sum((each.characters + 2 for each in inside), start=2),
            sum((each.values for each in inside), start=1),
            max((each.depth for each in inside), default=0) + 1,
        )
        known[id(value)] = value, weighed
    return known[id(value)][1]


class _Spent:
    """What a rendering has used so far."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._rounds = self._size = 0
        self._until = time.monotonic() + bounds.seconds

    def round(self) -> str:
        self._rounds += 1
        late = self._rounds % _LOOK_EACH == 0 and time.monotonic() > self._until
        if late or self._rounds > self._bounds.rounds:
            raise TemplateTooLarge("The template loops too often.")
        return ""

    def room(self, size: int) -> None:
        """Checks the limit before a value of that size is made."""
        if self._size + size > self._bounds.size:
            raise TemplateTooLarge("The template makes values that are too large.")

    def value(self, value: T) -> T:
        if isinstance(value, str | list | tuple | dict):
            self.room(len(value))
            self._size += len(value)
        return value

    def written(self, value: T) -> T:
        """Counts a value that becomes part of the text."""
        self.weigh(value)
        return self.value(value)

    def weigh(self, *values: Any) -> None:
        """Checks values before they are written out."""
        for value in values:
            if not isinstance(value, str):
                self.room(weight(value).characters)

    def joined(self, *values: Any) -> str:
        """The result of `~`."""
        self.weigh(*values)
        texts = [str(value) for value in values]
        self.room(sum(map(len, texts)))
        return self.value("".join(texts))

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Checks the arguments of a call: a number may be a width or a count."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                self.room(abs(value))


_spent: ContextVar[_Spent] = ContextVar("lacre.template")


def make_room(size: int) -> None:
    """During a rendering: checks the limit before a value of that size is made."""
    _now().room(size)


def _now() -> _Spent:
    """The current rendering. A constant is evaluated at compile time, when there is none yet."""
    return _spent.get(None) or _Spent(Bounds())


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment for one model's template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, bounds: Bounds | None = None, *, extensions: Sequence[type[Extension]] = (loopcontrols,)) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self._bounds = bounds or Bounds()
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _bounded(function, writes=name not in _LOOKING)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateTooLarge(f"The template is longer than {MAX_SOURCE} characters.")
        bounded: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        bounded.set_lineno(1)
        return bounded.set_environment(self)  # type: ignore[return-value]  # it answers itself

    def compiled(self, source: str) -> jinja2.Template:
        """Raises `TemplateError`."""
        try:
            return self.from_string(source)
        # Python's own errors about Jinja's generated code
        except (RecursionError, MemoryError, OverflowError, ValueError, SyntaxError):
            raise TemplateTooLarge("The template is nested too deeply, or has a number that is too large.") from None

    def variables(self, source: str) -> frozenset[str]:
        """The names that a template reads and neither it nor this environment gives. Raises `TemplateError`."""
        return frozenset(meta.find_undeclared_variables(self.parse(source)) - self.globals.keys() - {_ROUND, _WRITTEN, _JOINED})

    def rendered(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        """A template's text. Raises as `render`."""
        spent = _Spent(self._bounds)
        token = _spent.set(spent)
        try:
            return template.render(**values, **{_ROUND: spent.round, _WRITTEN: spent.written, _JOINED: spent.joined})
        # An infinite number becomes a name in Jinja's generated code
        except (RecursionError, MemoryError, OverflowError, NameError):
            raise TemplateTooLarge("The template goes too deep, or makes a value that is too large.") from None
        finally:
            _spent.reset(token)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spent = _spent.get()
        if operator == "**" and not (_small(left) and _small(right)):
            raise TemplateTooLarge("The template raises a number to a large power.")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    spent.room(len(one) * max(other, 0))
                elif isinstance(one, int) and one.bit_length() > 4096:
                    raise TemplateTooLarge("The template makes a number that is too large.")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            spent.weigh(right)
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            spent.room(len(left) + len(right))
        return spent.value(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        spent = _spent.get()
        if __obj in (spent.round, spent.written, spent.joined):
            return __obj(*args)
        spent.arguments(args, kwargs)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format` and `format_map`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            _check_method(method.__name__, owner, args, spent)
            spent.weigh(*args, *kwargs.values())
        return spent.value(super().call(__context, __obj, *args, **kwargs))


class _Counted(NodeTransformer):
    """Inserts counting into each loop round and macro call, and for each joined or written value."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_ROUND, [])))
        return node  # type: ignore[no-any-return]  # a Macro, For or CallBlock has a body, and Node has none

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(_JOINED, node.nodes)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [each if isinstance(each, nodes.TemplateData) else _call(_WRITTEN, [each]) for each in node.nodes]
        return node


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


def _bounded(function: Callable[..., Any], *, writes: bool) -> Callable[..., Any]:
    """Wraps a filter: it gets no large number, and its value counts. writes: whether its arguments become text."""
    has_context = int(hasattr(function, "jinja_pass_arg"))  # the template's context, before the arguments

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        spent = _now()
        spent.arguments(args, kwargs)
        if function.__name__ in ("do_join", "sync_do_join"):
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        if writes:
            spent.weigh(*args[has_context:], *kwargs.values())
        given = (*args, *kwargs.values())
        texts = [value for value in args if isinstance(value, str)]
        if texts and function.__name__ == "do_format":
            _check_format(texts[0])
        if function.__name__ in ("do_slice", "do_batch") and any(isinstance(n, int) and n > _MAX_SLICES for n in given):
            raise TemplateTooLarge("The template cuts a list into too many parts.")
        if function.__name__ in ("do_replace", "do_indent") and texts:
            spent.room((len(texts[0]) + 1) * max(map(len, texts[1:]), default=1))
        return spent.value(function(*args, **kwargs))

    return bounded


def _check_method(name: str, owner: str, args: tuple[Any, ...], spent: _Spent) -> None:
    """Checks text methods whose result is longer than their arguments."""
    match name:
        case "format" | "format_map":
            _check_format(owner)
        case "replace" if len(args) > 1 and isinstance(args[1], str):
            spent.room((len(owner) + 1) * len(args[1]))
        case "join" if args and isinstance(args[0], str | list | tuple):
            spent.room(len(owner) * len(args[0]))


def _check_format(form: str) -> None:
    """A width in a format makes a text of that length."""
    if re.search(r"[0-9]{6}|%[^a-zA-Z%]*\*", form):
        raise TemplateTooLarge("The template asks for a wide format.")


def _small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 1024
