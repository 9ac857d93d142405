"""Makes functions that ignore their arguments and give one answer.

Every call makes a new function: torch's compiler keeps a rule per function object and refuses to
import when one object stands under two names.
"""

from collections.abc import Callable
from typing import Any


def always(value: Any) -> Callable[..., Any]:
    """A new function that returns ``value`` whatever it is called with."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer
