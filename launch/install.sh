#!/usr/bin/env bash
# Make .venv with vitgraft and all that its tests need, at the versions of constraints.txt.
#   launch/install.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "vitgraft: $python is missing or older than 3.11; install python3.11 or newer, or: make PYTHON=/path/to/python" >&2
    exit 2
fi
if [ ! -x .venv/bin/pip ] && ! "$python" -m venv .venv; then
    # Debian and Ubuntu keep ensurepip in a package of its own.
    rm -rf .venv
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    echo "vitgraft: installing $package, which $python needs to make an environment" >&2
    $sudo apt-get update -qq && $sudo apt-get install -y -qq "$package"
    "$python" -m venv .venv
fi
echo "vitgraft: installing into .venv (about 6 GB with CUDA's libraries; some minutes the first time)" >&2
# Errors alone: pip's and setuptools' warnings are about themselves and ask nothing of who installs.
pip=(.venv/bin/pip install --disable-pip-version-check --progress-bar off -qq -c constraints.txt)
"${pip[@]}" 'pip>=25' 'setuptools>=75'
"${pip[@]}" -e '.[dev,demo]'
