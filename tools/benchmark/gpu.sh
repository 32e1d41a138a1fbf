#!/bin/sh
# Compare a GPU with the CPU and with other libraries, in at most 8 minutes (docs/benchmarks/gpu.md):
#
#     tools/benchmark/gpu.sh FOLDER
#
# `--help` lists the options. PYTHON names the interpreter whose packages are used, python3 by default.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/tools/benchmark/gpu.py" "$@"
