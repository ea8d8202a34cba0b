#!/usr/bin/env bash
# Builds the virtual environment: setup_venv.sh VENV EXTRAS. Safe to run again; quick when nothing changed.
# Needs Python 3.11+ and, on Debian's Python, the python3-venv package (installed here only if truly missing).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
extras=$2

pick_python() {
    local candidate
    # 3.11 first: local CPU wheels of torch are usually built for one version only.
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "sps2 needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2
    exit 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(pick_python)
    echo "setup: building $venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" 2>/dev/null; then
        echo "setup: this Python cannot build virtual environments; installing python3-venv"
        apt-get update -qq </dev/null && apt-get install -y -qq python3-venv </dev/null
        rm -rf "$venv"
        "$python" -m venv "$venv"
    fi
fi

echo "setup: installing sps2[$extras]"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    -c constraints.txt -e ".[$extras]" </dev/null
echo "setup: done"
