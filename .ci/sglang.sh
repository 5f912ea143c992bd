#!/usr/bin/env bash
# Makes the virtual environment that tests/test_sglang.py imports SGLang's own classes in.
#
#   .ci/sglang.sh [DIR]        DIR: default .venv-sglang in the repository root
#
# SGLang's engine needs a GPU and pins a torch of its own; its cache modules (the storage interface,
# the factory, the host pools) do not. So it is installed without what it declares, beside the few
# packages that those modules import; the test stands in for the rest. A stamp file holds what was
# asked for: a second run is instant. Weighs 1.5 GB, most of it torch.
set -euo pipefail

TORCH=2.13.0
SGLANG=0.5.23
NEEDS="transformers==5.19.0 orjson ipython pybase64 requests pillow dill psutil pydantic httpx"
PYTHON=${PYTHON:-python3}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${1:-$root/.venv-sglang}
stamp=$dir/kvengine-stamp
# The base dependencies of kvengine are part of the stamp: a new one is to be installed here too.
base=$("$PYTHON" - "$root/pyproject.toml" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))
PY
)
want="torch==$TORCH sglang==$SGLANG $NEEDS root=$root base=$(echo "$base" | tr '\n' ' ')"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    echo "sglang.sh: $dir is ready"
    exit 0
fi

say() { echo "sglang.sh: [${SECONDS}s] $*"; }
pip() { "$dir/bin/python" -m pip --disable-pip-version-check --no-input --quiet "$@"; }

if [ ! -x "$dir/bin/python" ]; then
    say "making $dir"
    "$PYTHON" -m venv "$dir"
fi
rm -f "$stamp"
say "torch $TORCH"
pip install "torch==$TORCH"
say "what SGLang's cache modules import, kvengine's base dependencies"
echo "$base" >"$dir/kvengine-needs.txt"
# shellcheck disable=SC2086
pip install $NEEDS -r "$dir/kvengine-needs.txt"
say "sglang $SGLANG, without what it declares, and kvengine from $root"
pip install --no-deps "sglang==$SGLANG" -e "$root"
"$dir/bin/python" -c 'import importlib.metadata as m; print(*map(m.version, ("sglang", "torch")))'
echo "$want" >"$stamp"
say "$dir is ready"
