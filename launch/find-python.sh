#!/bin/sh
# Prints the path of a Python >= 3.12 that really starts and can make virtual environments.
# A pyenv shim lies on PATH even for versions that are not selected, so each candidate is run.
set -u

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

found() {
    "$1" -c 'import sys; print(sys.executable)'
    exit 0
}

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && found "$PYTHON"
    echo "PYTHON=$PYTHON is no Python >= 3.12 with venv: looking for another one" >&2
fi
# 3.12 first: for it the host publishes wheels with a compiled data-set helper.
for candidate in python3.12 python3.13 python3; do
    fits "$candidate" && found "$candidate"
done
if command -v pyenv >/dev/null 2>&1; then
    for minor in 12 13; do
        for version in $(pyenv versions --bare 2>/dev/null | grep "^3\.$minor\.[0-9]*$"); do
            candidate="$(pyenv prefix "$version")/bin/python"
            fits "$candidate" && found "$candidate"
        done
    done
fi
if command -v uv >/dev/null 2>&1; then
    for minor in 12 13; do
        candidate="$(uv python find "3.$minor" 2>/dev/null)" || continue
        fits "$candidate" && found "$candidate"
    done
fi
echo "no Python >= 3.12 with venv was found: install one (apt install python3.12-venv," \
    "pyenv install 3.12 or uv python install 3.12), or set PYTHON to one" >&2
exit 1
