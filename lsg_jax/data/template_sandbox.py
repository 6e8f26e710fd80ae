"""Jinja for chat templates, which are foreign code: as transformers compiles them, with a bound on their time and memory.

Every step of a loop or macro, every character that is made and every value that is walked through is charged to a budget, which
grows with the messages. What could make much of little is charged before it runs: `*`, `**`, `%`, `~`, the methods and filters
that pad, repeat, replace, join or format, comparisons of nested values, and what is printed.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET = 500_000
"""Steps and characters of a template, beside `PER_CHARACTER` for each character that it is given."""

PER_CHARACTER = 200
MAX_BITS = 4096  # of an integer
_WIDTH = re.compile(r"\d{5,}|\{[^}]*\{|%[^a-zA-Z%]*\*")

_GROWING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "truncate")
_DEEP = (
    "string", "tojson", "join", "format", "e", "escape", "forceescape", "striptags", "upper", "lower", "title", "capitalize",
    "trim", "replace", "center", "indent", "wordcount", "truncate", "urlencode", "sort", "unique", "min", "max", "dictsort",
    "groupby", "sum", "safe",
)  # fmt: skip
"""Filters that write a value as text or compare its parts, so all of it is charged."""

_LEFT_OUT = ("urlize", "wordwrap", "pprint", "xmlattr", "random", "filesizeformat")
"""Filters that no prompt needs, and whose cost is hard to tell."""

_COMPARING = ("eq", "==", "equalto", "ne", "!=", "lt", "<", "le", "<=", "gt", ">", "ge", ">=", "in")


class TemplateLimit(Exception):
    """A template takes more time or memory than a prompt may."""


def render_template(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Renders a template of `compile_template`. Raises TemplateLimit, and what the template raises."""
    environment: Any = template.environment
    with environment.metered(BUDGET + PER_CHARACTER * _weight(values, None)):
        return template.render(values)


def compile_template(source: str) -> jinja2.Template:
    """Compiles a chat template. Raises TemplateLimit, or what Jinja raises for a broken one."""
    environment = _Environment()
    with environment.metered(BUDGET):
        return environment.from_string(source)


class _Meter(threading.local):
    """What is left of the budget of the render of this thread."""

    left = 0

    def charge(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TemplateLimit("it takes more steps or memory than a prompt may")


def _weight(value: Any, limit: int | None) -> int:
    """Values and characters in a value, however often one occurs, as its text would repeat it; stops beyond `limit`."""
    if isinstance(value, str):
        return 1 + len(value)
    count, waiting = 0, [value]
    while waiting and (limit is None or count <= limit):
        each = waiting.pop()
        count += 1
        if isinstance(each, str):
            count += len(each)
        elif isinstance(each, jinja2.Undefined):
            continue
        elif isinstance(each, Mapping):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, Namespace):
            waiting += object.__getattribute__(each, "_Namespace__attrs").values()
        elif isinstance(each, Iterable) and hasattr(each, "__len__") and not isinstance(each, (bytes, range)):
            waiting += each
    return count


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.meter = _Meter()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # constants are computed when rendering, on the budget
            finalize=_printed,
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, call) for name, call in self.filters.items() if name not in _LEFT_OUT}
        self.tests |= {name: self._comparing(self.tests[name]) for name in _COMPARING if name in self.tests}

    def metered(self, budget: int) -> _Metered:
        return _Metered(self.meter, budget)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        counted = _Counted().visit(source)
        return super()._generate(counted.set_environment(self), *args, **kwargs)

    # What the compiled template calls; see `_Counted`.

    def tick(self, cost: int) -> bool:
        self.meter.charge(cost)
        return True

    def joined(self, *parts: Any) -> str:
        self.deep(parts)
        return "".join(map(str, parts))

    def sliced(self, value: Any) -> Any:
        self._result(value)
        return value

    def deep(self, value: Any) -> Any:
        """Charges all of a value; of a text that is compared, only a part of what its characters cost."""
        self.meter.charge(_weight(value, self.meter.left))
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As Jinja's; a nested key is hashed or written out, so all of it is charged."""
        self._containers((argument,))
        return super().getitem(obj, argument)

    def _containers(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple, dict, set, Namespace)):
                self.deep(value)

    # ------------------------------------------------------------------------------------------------------------ operations

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" or (operator == "*" and numbers):
            self._check_number(operator, left, right)
        elif operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                self.meter.charge(_length(text) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            self._formatting(left, right)
        elif operator == "+" and not numbers:
            self.meter.charge(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def _check_number(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateLimit("it computes a number that is too large")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        made = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        owner = getattr(made, "__self__", None)
        if owner is self:
            return obj(*args)
        own = {name: value for name, value in kwargs.items() if name[0] != "_"}  # Jinja passes variables of loops
        if isinstance(owner, str):
            if (name := getattr(made, "__name__", "")) == "translate":
                raise TemplateLimit("it translates the characters of a text")
            args = self._guard(name, (owner, *args), own)[1:]
        elif not isinstance(obj, jinja2.runtime.Macro):
            self._containers((*args, *own.values()))
        self.meter.charge(1)
        return self._result(super().call(context, obj, *args, **kwargs))

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged before it runs, and for what it returns."""
        lead = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes first

        @functools.wraps(function)  # with what it is to be passed
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value = args[lead]
            self.meter.charge(1 + _length(value) // 16)
            if name in _DEEP:
                self.deep(value)
            args = (*args[:lead], *self._guard(name, args[lead:], kwargs))
            return self._result(function(*args, **kwargs))

        return guarded

    def _comparing(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def compared(value: Any, *args: Any) -> Any:
            if not isinstance(value, str):
                self.deep(value)
            return function(value, *args)

        return compared

    def _guard(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Charges what a method of a text, or a filter, is about to make. Returns its arguments, iterators as lists."""
        value, given = args[0], [*args[1:], *kwargs.values()]
        self._containers(given)
        size = max((abs(each) if isinstance(each, int) else _length(each) for each in given), default=0)
        if name in _GROWING:
            self.meter.charge(size * (1 + _length(value)))
        elif name == "tojson":
            self.meter.charge(size * _weight(value, self.meter.left))
        elif name == "replace" and len(given) >= 2:
            old, new = map(str, given[:2])
            self.meter.charge(str(value).count(old) * len(new))
        elif name == "join":
            at = 1 if isinstance(value, str) and len(args) > 1 and not isinstance(args[1], str) else 0
            items = list(args[at]) if isinstance(args[at], Iterable) else [args[at]]
            self.deep(items)
            self.meter.charge(len(items) * _length(args[1 - at] if len(args) > 1 else kwargs.get("d", "")))
            return (*args[:at], items, *args[at + 1 :])
        elif name in ("format", "format_map"):
            self._formatting(str(value), given)
        return args

    def _formatting(self, text: str, given: Any) -> None:
        """Charges a format string, as if each of its fields held all that it is given."""
        if _WIDTH.search(text):
            raise TemplateLimit("it formats a text with a width of five digits, or one that is an argument")
        fields = text.count("%") + text.count("{")
        self.meter.charge(fields * (_weight(given, self.meter.left) + (10_000 if re.search(r"\d{3}", text) else 1000)))

    def _result(self, value: Any) -> Any:
        self.meter.charge(_length(value))
        return value


class _Metered:
    """Sets the budget of this thread for a block; blocks may be nested."""

    def __init__(self, meter: _Meter, budget: int):
        self._meter, self._budget = meter, budget

    def __enter__(self) -> None:
        self._before, self._meter.left = self._meter.left, self._budget

    def __exit__(self, *raised: object) -> None:
        self._meter.left = self._before


@jinja2.pass_context
def _printed(context: Any, value: Any) -> Any:
    """Charges what is printed; with a context, nothing is printed while compiling."""
    return context.environment.deep(value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, Sequence)) or type(value) in (dict, set) else 0


class _Counted(NodeTransformer):
    """Puts a tick into each loop and macro, and charges for `~`, slices and comparisons."""

    def _call(self, method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        attribute = nodes.EnvironmentAttribute(method, lineno=line)
        return nodes.Call(attribute, args, [], None, None, lineno=line)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._tick(node)
        if node.test is not None:
            node.test = nodes.And(self._call("tick", [nodes.Const(1)], node.lineno), node.test, lineno=node.lineno)
        return node

    def _tick(self, node: Any) -> nodes.Node:
        data = sum(len(each.data) for part in node.body for each in part.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = self._call("tick", [nodes.Const(1 + data // 64, lineno=node.lineno)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = _tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("sliced", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._call("deep", [node.key], node.lineno)  # it is hashed
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        wrap = lambda each: each if isinstance(each, nodes.Const) else self._call("deep", [each], node.lineno)
        node.expr = wrap(node.expr)
        for operand in node.ops:
            if operand.op not in ("in", "notin"):
                operand.expr = wrap(operand.expr)
        return node


# ------------------------------------------------------------------------------------------------ as transformers defines them


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says; here it prints what it holds."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict`, of which a template sees no attribute but this."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]
        for name in (given := dict(*args, **kwargs)):
            _Namespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot store {name!r}")
