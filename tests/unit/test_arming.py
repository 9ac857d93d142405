"""Import hooks, in an interpreter of their own where the import system is touched."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_moetion import arming


def _run(tmp_path: Path, code: str) -> str:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("print('pkg executed')\n")
    (tmp_path / "pkg" / "mod.py").write_text("x = 1\nprint('mod executed')\n")
    (tmp_path / "space").mkdir()
    head = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\nfrom megatron_moetion import arming\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(arming.__file__).parent.parent,
        check=False,
    )
    return done.stdout + done.stderr


def test_callbacks_run_right_after_the_module_and_only_once(tmp_path: Path) -> None:
    code = """
        arming.when_imported("pkg.mod", lambda module: print("saw", module.x))
        arming.when_imported("pkg.mod", lambda module: print("again", module.x))
        import pkg
        print("between")
        import pkg.mod, importlib, inspect
        print(type(pkg.mod.__loader__).__name__, type(pkg.mod.__spec__.loader).__name__)
        print(inspect.getsource(pkg.mod).splitlines()[0])
        importlib.reload(pkg.mod)
    """
    assert _run(tmp_path, code).splitlines() == [
        "pkg executed",
        "between",
        "mod executed",
        "saw 1",
        "again 1",
        "SourceFileLoader SourceFileLoader",
        "x = 1",
        "mod executed",
    ]


def test_a_module_that_is_already_there_is_seen_at_once() -> None:
    seen: list[str] = []
    arming.when_imported("json", lambda module: seen.append(module.__name__))
    assert seen == ["json"]


def test_before_import_runs_ahead_of_the_package(tmp_path: Path) -> None:
    code = """
        arming.before_import("pkg", lambda: print("first"))
        import pkg.mod
        try:
            arming.before_import("pkg", print)
        except RuntimeError as error:
            print(error)
    """
    assert _run(tmp_path, code).splitlines() == [
        "first",
        "pkg executed",
        "mod executed",
        "pkg is imported already; arm before the first import of it",
    ]


def test_an_error_in_a_callback_is_the_imports_error(tmp_path: Path) -> None:
    code = """
        def refuse(module):
            raise SystemExit("refused")
        arming.when_imported("pkg.mod", refuse)
        import pkg.mod
        print("not reached")
    """
    assert _run(tmp_path, code).splitlines() == ["pkg executed", "mod executed", "refused"]


def test_a_namespace_package_cannot_be_awaited(tmp_path: Path) -> None:
    code = """
        arming.when_imported("space", print)
        import space
    """
    assert "space executes no code" in _run(tmp_path, code)


@pytest.mark.parametrize("module", ["arming", "interception", "config", "patch_location"])
def test_what_a_launcher_imports_brings_no_torch(tmp_path: Path, module: str) -> None:
    code = f"import megatron_moetion.{module}; print('torch' in sys.modules)"
    assert _run(tmp_path, code).strip() == "False"
