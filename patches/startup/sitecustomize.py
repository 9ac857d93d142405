"""Runs at the start of every Python process of a job that sourced ``moetion.sh``; arms, no more."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

if os.environ.get("MOETION") == "1":
    import moetion_startup

    moetion_startup.arm()

# Another sitecustomize, which ours hides from the interpreter, still runs.
_here = os.path.dirname(os.path.abspath(__file__))
_rest = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_next = PathFinder.find_spec("sitecustomize", _rest)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(module_from_spec(_next))
