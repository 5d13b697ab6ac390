#!/usr/bin/env bash
# transformers 5.21: a minor release that drops a version of Python, so that one requirement gives two releases.
#
# Expected: `transformers>=5.17,<6` resolves to the same release on every Python that the 5.x series began with.
# Seen: 5.20.2 needs Python 3.10, 5.21.0 needs 3.11. On Python 3.10 pip takes 5.20.2 and says nothing, so families that
# came later are "unknown model types" there. The same goes for a list of exact versions: it has to be told by Python.
# Here: families are found in the transformers that is installed; the documentation names the version it describes.
#
# Output:
#   Python 3.10: transformers-5.20.2
#   Python 3.11: transformers-5.24.0
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for python in 3.10 3.11; do
    python3 -m pip download --quiet --no-deps --python-version "$python" --only-binary :all: --dest "$folder/$python" \
        "transformers>=5.17,<=5.24.0"
    echo "Python $python: $(cd "$folder/$python" && ls | sed 's/-py3-none-any.whl//')"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EOF'
Python 3.10: transformers-5.20.2
Python 3.11: transformers-5.24.0
EOF
