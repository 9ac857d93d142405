"""What a row remembers of a host callable: the shape of its parameters, a hash of its source.

Both look through static and class methods, and through wrappers that say what they wrap.
"""

import hashlib
import inspect
import textwrap
from collections.abc import Hashable
from functools import cache
from typing import Any


def function_of(host: Any) -> Any:
    """Returns the function inside a static or class method; anything else as it is."""
    return host.__func__ if isinstance(host, staticmethod | classmethod) else host


def signature_of(host: Any) -> str:
    """Returns parameter names, kinds and which have defaults, without annotations or values.

    Annotations and default objects print differently from one torch or Python to the next;
    names, kinds and optionality are what a handler relies on. Static and class methods are looked
    through. Empty for callables without a signature and for things that are not callable.
    """
    function = function_of(host)
    if not callable(function):
        return ""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return ""
    shown: list[str] = []
    kinds = inspect.Parameter
    marks: dict[Any, str] = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}
    starred = False
    previous: Any = None
    for parameter in parameters:
        if previous is kinds.POSITIONAL_ONLY and parameter.kind is not kinds.POSITIONAL_ONLY:
            shown.append("/")
        if parameter.kind is kinds.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        starred = starred or parameter.kind is kinds.VAR_POSITIONAL
        mark = marks.get(parameter.kind, "")
        default = "" if parameter.default is kinds.empty else "=..."
        shown.append(f"{mark}{parameter.name}{default}")
        previous = parameter.kind
    if previous is kinds.POSITIONAL_ONLY:
        shown.append("/")
    return f"({', '.join(shown)})"


def source_digest(host: Any) -> str:
    """Returns 12 hex digits of the SHA-256 of the callable's source; empty without a source."""
    function = function_of(host)
    return _digest_of(function) if isinstance(function, Hashable) else ""


@cache
def _digest_of(function: Any) -> str:
    # Cached: looking for a source takes milliseconds, and a warm process does it for its workers.
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()[:12]
