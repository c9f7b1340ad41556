#!/usr/bin/env bash
# Everything that is to be known from a GPU that is at hand for a quarter of an hour: two calls of five minutes each.
#
#   benchmarks/gpu_session.sh 1|2 [--out DIR] [--dry-run] [--fresh]
#
# docs/gpu.md says what each call does, what it needs and what to do with its results. GPU_PYTHON names the Python
# (default: python3), which is used as it is: nothing is installed.
set -eu
cd "$(dirname "$0")/.."
python=${GPU_PYTHON:-python3}
command -v "$python" >/dev/null || { echo "gpu_session.sh: no $python here; name a Python with GPU_PYTHON" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "gpu_session.sh: $("$python" --version 2>&1) is too old: 3.11 or newer is needed; name one with GPU_PYTHON" >&2; exit 1; }
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 exec "$python" benchmarks/gpu_session.py "$@"
