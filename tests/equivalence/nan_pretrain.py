"""The demo's script with a model that gives NaN from iteration $MOETION_TEST_NAN_FROM on, whatever
state it begins with.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from megatron_moetion import session

SESSIONS: list[session.Session] = []
FROM = int(os.environ["MOETION_TEST_NAN_FROM"])
begin = session.Session.__init__


def noted(self: Any, *args: Any) -> None:
    SESSIONS.append(self)
    begin(self, *args)


session.Session.__init__ = noted  # type: ignore[method-assign]


def diverging(forward: Any) -> Any:
    def diverged(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = forward(self, *args, **kwargs)
        wrong = any(each.cursor.iteration >= FROM for each in SESSIONS)
        return (hidden * float("nan") if wrong else hidden, *rest)

    return diverged


def main() -> None:
    """Trains."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    TransformerLayer.forward = diverging(TransformerLayer.forward)
    script = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
