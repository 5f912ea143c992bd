#!/usr/bin/env bash
# Makes the virtual environment that tests/test_sglang.py and tests/test_lmcache.py import the own
# classes of SGLang and LMCache in.
#
#   .ci/sglang.sh [DIR]        DIR: default .venv-sglang in the repository root
#
# SGLang's engine needs a GPU and pins a torch of its own; its cache modules (the storage interface,
# the factory, the host pools) do not. So it is installed without what it declares, beside the few
# packages that those modules import; the test stands in for the rest. LMCache's storage modules do
# without a GPU as well, and without nearly all of the 3 GB that it declares. A stamp file holds
# what was asked for: a second run is instant. Weighs 1.8 GB, most of it torch.
set -euo pipefail

TORCH=2.13.0
SGLANG=0.5.23
LMCACHE=0.5.6
NEEDS="transformers==5.19.0 orjson ipython pybase64 requests pillow dill psutil pydantic httpx"
NEEDS="$NEEDS cachetools sortedcontainers numba py-cpuinfo aiohttp aiofiles aiofile cryptography"
NEEDS="$NEEDS pyyaml"
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
want="torch==$TORCH sglang==$SGLANG lmcache==$LMCACHE $NEEDS root=$root"
want="$want base=$(echo "$base" | tr '\n' ' ')"

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
say "what their modules import, kvengine's base dependencies"
echo "$base" >"$dir/kvengine-needs.txt"
# shellcheck disable=SC2086
pip install $NEEDS -r "$dir/kvengine-needs.txt"
say "sglang $SGLANG and lmcache $LMCACHE, without what they declare, and kvengine from $root"
pip install --no-deps "sglang==$SGLANG" "lmcache==$LMCACHE" -e "$root"
"$dir/bin/python" -c 'import importlib.metadata as m; print(*map(m.version, ("sglang", "lmcache")))'
echo "$want" >"$stamp"
say "$dir is ready"
