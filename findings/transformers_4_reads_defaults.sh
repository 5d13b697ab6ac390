#!/usr/bin/env bash
# transformers 4.57.6: reads what transformers 5.23.0 has saved with defaults in place of what is in it, without a word.
#
# Expected: an older version either understands a `config.json` of its own model type, or says that it does not.
# Seen: 5.23 writes `num_local_experts` and `rope_parameters` where 4.57 looks for `num_experts` and `rope_theta`. Keys that
# are not known are kept and ignored, keys that are missing get defaults: a model of 8 experts at a base of 1,000,000 becomes
# one of 128 at 10,000. Where the number of experts is the default by chance, it loads, and computes something else.
# Here: checkpoints of stock layouts keep the keys of their source beside the new ones.
#
# Output:
#   saved by 5.23.0: num_local_experts=8, rope_parameters={'rope_theta': 1000000.0, 'rope_type': 'default'}
#   read by 5.23.0: 8 experts, base 1000000
#   read by 4.57.6: 128 experts, base 10000
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet transformers==$version
done
cd "$folder"
5.23.0/bin/python - <<'EOF' 2> /dev/null
import json
from transformers import Qwen3MoeConfig

Qwen3MoeConfig(num_experts=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained("model")
saved = json.load(open("model/config.json"))
assert "num_experts" not in saved and "rope_theta" not in saved
print(f"saved by 5.23.0: num_local_experts={saved['num_local_experts']}, rope_parameters={saved['rope_parameters']}")
EOF
read_by() {
    "$1/bin/python" - "$1" <<'EOF' 2> messages
import sys
from transformers import AutoConfig

config = AutoConfig.from_pretrained("model")
base = config.rope_theta if hasattr(config, "rope_theta") else config.rope_parameters["rope_theta"]
print(f"read by {sys.argv[1]}: {config.num_experts} experts, base {base:.0f}")
EOF
}
[ "$(read_by 5.23.0 | tee /dev/stderr)" = "read by 5.23.0: 8 experts, base 1000000" ]
[ "$(read_by 4.57.6 | tee /dev/stderr)" = "read by 4.57.6: 128 experts, base 10000" ]
if grep -iE "rope|experts" messages; then exit 1; fi
