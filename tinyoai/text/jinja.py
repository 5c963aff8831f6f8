"""The one door to Jinja: compiles and renders a chat template in a sandbox with limits.

A template comes with a model file, so it is a program by a stranger. It reads copies of the data that it is given
and calls nothing else; `jinja_bounds` bounds what it computes. The caller limits its time. Importing this module
imports jinja2.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from tinyoai.text.jinja_bounds import MAX_WIDTH, Budget, TooMuch
from tinyoai.text.marker_guard import SENTINEL

MIN_VERSION = (3, 1, 6)
MAX_SOURCE = 256 << 10
MAX_RANGE = 10_000
MAX_WORDS = 500
"""Characters of a template's own error message that a client sees."""

_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z%]")
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd0")
"""The sentinel in JSON of ASCII characters."""


class BadTemplate(Exception):
    """The template cannot be used; the message is one sentence for the user."""


class RenderError(Exception):
    """The template refuses the conversation, or fails; the message is one sentence for the client."""

    too_long = False
    """The output is over the limit."""


class _OutputTooLong(RenderError):
    too_long = True


class _Said(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` marks what a model learns in training. It changes no output."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Compiler(CodeGenerator):
    """Lets the environment check what `~` joins and what is cut out of a value."""

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Writes the call."""
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.cut(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(bound or nodes.Const(None), frame)
            self.write(", ")
        self.write("))")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Writes the call."""
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


_CALLABLE = (Macro, BlockReference, LoopContext)
_DATA = {str, int, list, dict, tuple}
_UNCHANGED = """abs attr count d default dictsort first float groupby int items last length list map max min reject
rejectattr reverse select selectattr sort unique"""
_OF_TEXT = "capitalize e escape lower safe string title trim truncate upper wordcount"
"""Names of Jinja's own filters: those that take anything, and those that take a text."""


class _Environment(SandboxedEnvironment):
    """Jinja's sandbox, with a budget for every result."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._finalize,
            cache_size=0,
        )
        self.filters = {name: self._charged(FILTERS[name]) for name in _UNCHANGED.split()}
        self.filters |= {name: self._charged(self._of_text(FILTERS[name])) for name in _OF_TEXT.split()}
        self.filters |= {
            "center": self._center,
            "format": self._format,
            "from_json": self._from_json,
            "fromjson": self._from_json,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "round": self._round,
            "sum": self._sum,
            "tojson": self._tojson,
        }
        del self.globals["lipsum"]
        self.globals |= {
            "range": _range,
            "raise_exception": self._raise_exception,
            "strftime_now": strftime_now,
        }

    # -- what the compiled template calls --------------------------------------------------------

    def _finalize(self, value: object) -> str:
        text = self.budget.text(value)
        self.budget.spend(text)
        return text

    def concatenated(self, parts: tuple[object, ...]) -> str:
        """The result of `~`."""
        texts = [self.budget.text(part) for part in parts]
        self.budget.joining("", texts)
        text = "".join(texts)
        self.budget.spend(text)
        return text

    def cut(self, value: Any, part: slice) -> Any:
        """The result of `value[a:b]`."""
        found = value[part]
        self.budget.spend(found)
        return found

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See SandboxedEnvironment."""
        if isinstance(argument, list | dict | tuple | Namespace):
            raise TooMuch(f"takes an item by a {type(argument).__name__}")
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        self.budget.binary(operator, left, right)
        value = super().call_binop(context, operator, left, right)
        self.budget.spend(value)
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """See SandboxedEnvironment."""
        if type(obj) in _DATA:  # the rest of the check takes most of a rendering's time
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)

    def is_safe_callable(self, obj: Any) -> bool:
        """See SandboxedEnvironment."""
        owner = getattr(obj, "__self__", None)
        return (
            isinstance(obj, _CALLABLE)
            or isinstance(owner, str | list | dict | tuple | Cycler | LoopContext)
            or isinstance(obj, Joiner)
            or any(obj is value for value in self.globals.values())
            or getattr(obj, "bounded_format", False)
        )

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """See SandboxedEnvironment."""
        if not __self.is_safe_callable(__obj):
            raise TooMuch(f"calls a value of type {type(__obj).__name__}, which it may not")
        owner, given = getattr(__obj, "__self__", None), list(args)
        if isinstance(owner, str | list | dict | tuple):
            __self.budget.method(owner, __obj.__name__, given, kwargs)
        value = super().call(__context, __obj, *given, **kwargs)
        __self.budget.spend(value, new_items=True)
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See SandboxedEnvironment."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form, bounds = value.__self__, self.budget

        def bounded(*args: Any, **kwargs: Any) -> str:
            bounds.format(form, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        if value.__name__ != "format":
            return None
        bounded.bounded_format = True  # type: ignore[attr-defined]
        return bounded

    # -- filters ---------------------------------------------------------------------------------

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            self.budget.spend(value, new_items=True)
            return value

        return charged

    def _of_text(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, with its value as text first."""
        at = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def of_text(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:at], self.budget.text(args[at]), *args[at + 1 :], **kwargs)

        return of_text

    def _center(self, value: Any, width: int = 80) -> str:
        self.budget.width(width)
        return self.budget.text(value).center(width)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        form = self.budget.text(value)
        self.budget.percent(form, kwargs or args)
        return form % (kwargs or args)

    def _from_json(self, value: Any) -> Any:
        found = json.loads(self.budget.text(value))
        self.budget.measure(found)
        return found

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self.budget.width(width)
        text = self.budget.text(value)
        self.budget.expect(
            len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width)
        )
        return str(FILTERS["indent"](text, width, first, blank))

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        separator, parts = self.budget.text(d), [self.budget.text(part) for part in value]
        self.budget.joining(separator, parts)
        return self._finalize(separator.join(parts))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self.budget.text(value), self.budget.text(old), self.budget.text(new)
        self.budget.replacing(text, old, new)
        return self._finalize(text.replace(old, new, -1 if count is None else count))

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        if abs(precision) > 100:
            raise TooMuch("rounds to more than 100 digits")
        return float(FILTERS["round"](value, precision, method))

    def _sum(self, value: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> float:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        for number in value:
            start = start + float(number) if isinstance(number, float) else start + int(number)
        return start

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        self.budget.measure(value)
        if len(indent if isinstance(indent, str) else " " * min(indent or 0, MAX_WIDTH)) > 8:
            raise TooMuch("indents JSON by more than 8 characters")
        if separators is not None and len(self.budget.text(list(separators))) > 100:
            raise TooMuch("separates JSON by more than 100 characters")
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self._finalize(_ESCAPED.sub(lambda found: found[1] + SENTINEL, text) if ensure_ascii else text)

    # -- functions -------------------------------------------------------------------------------

    def _raise_exception(self, message: Any) -> None:
        raise _Said(self.budget.text(message))


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > MAX_RANGE:
        raise TooMuch(f"asks for a range of {len(found)} numbers; the limit is {MAX_RANGE}")
    return found


def strftime_now(form: str) -> str:
    """The date as text. A finer time would change the prompt, and with it the cached prefix, at every request."""
    if len(form) > 200 or "%" in _DIRECTIVE.sub("", form):
        raise TooMuch("asks for a date in an unknown form")
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).strftime(form)


class JinjaTemplate:
    """One compiled template. It keeps nothing from one rendering to the next."""

    def __init__(self, source: str, *, bos: str, eos: str, max_output: int) -> None:
        """Raises BadTemplate. `max_output` is in characters."""
        _check_version()
        size = len(source.encode("utf-8", "replace"))
        if size > MAX_SOURCE:
            raise BadTemplate(f"the chat template has {size} bytes; the limit is {MAX_SOURCE}")
        self._max_output = max_output
        self._budget = Budget(16 * max_output, (jinja2.Undefined,))
        environment = _Environment(self._budget)
        self.names = frozenset(environment.globals)
        """The functions that templates call."""
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            for node in environment.parse(source).find_all(
                (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
            ):
                raise BadTemplate(
                    f"the chat template loads another file in line {node.lineno}, which it may not"
                )
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadTemplate(
                f"the chat template is not valid: {error.message} (line {error.lineno})"
            ) from None
        except RecursionError:
            raise BadTemplate("the chat template is nested too deeply") from None
        except (TooMuch, jinja2.TemplateError, SyntaxError, ValueError, MemoryError, OverflowError) as error:
            raise BadTemplate(f"the chat template cannot be compiled: {_one_line(error)}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt. The variables are changed by some templates. Raises RenderError."""
        self._budget.reset()
        parts: list[str] = []
        n_chars = 0
        try:
            for part in self._template.generate(**{**variables, **self._tokens}):
                parts.append(part)
                n_chars += len(part) - part.count(SENTINEL)
                if n_chars > self._max_output:
                    raise _OutputTooLong(f"the prompt has more than {self._max_output} characters")
        except _Said as error:
            raise RenderError(f"the chat template refuses this conversation: {_one_line(error)}") from None
        except TooMuch as error:
            raise RenderError(f"the chat template {error}") from None
        except SecurityError as error:
            raise RenderError(f"the chat template does what it may not: {_one_line(error)}") from None
        except RecursionError:
            raise RenderError("the chat template calls itself without end") from None
        except RenderError:
            raise
        except Exception as error:  # a stranger's program can fail in any way
            raise RenderError(f"the chat template fails: {_one_line(error)}") from None
        return "".join(parts)


def _check_version() -> None:
    version = str(getattr(jinja2, "__version__", "")) or "3.2"  # later versions have no such name
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        raise BadTemplate(
            f"jinja2 {version} has known holes; install {needed} or newer: pip install 'jinja2>={needed}'"
        )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).replace(SENTINEL, "").split())
    return text[:MAX_WORDS] or type(error).__name__
