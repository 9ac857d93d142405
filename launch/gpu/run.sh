#!/usr/bin/env bash
# Runs tests/gpu from a bare checkout: `make gpu`. Python 3.12 with torch for CUDA has to be there;
# what else is needed comes out of .gpu-bundle/ (`make gpu-bundle`), without network, or is installed.
#   PYTHON          which interpreter; default: .venv's without a bundle, python3 with one
#   MOETION_RESULTS where to write the results; default docs/results
# Further arguments go to pytest.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
bundle="$root/.gpu-bundle"

if compgen -G "$bundle/*.whl" >/dev/null; then
    python="${PYTHON:-python3}"
    site="$(mktemp -d)"
    trap 'rm -rf -- "$site"' EXIT
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || {
        echo "run.sh: the bundle is for Python 3.12, $("$python" --version) is another: set PYTHON" >&2
        exit 2
    }
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
        --target "$site" "$bundle"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
else
    python="${PYTHON:-$root/.venv/bin/python}"
fi
"$python" -c 'import torch, numpy' || {
    echo "run.sh: $python lacks torch or numpy: set PYTHON to an interpreter that has both" >&2
    exit 2
}
export MOETION_RESULTS="${MOETION_RESULTS:-$root/docs/results}"
cd "$root"
# No cache: a checkout that is only read must do.
"$python" -m pytest -p no:cacheprovider -m gpu -ra tests/gpu "$@"
