# Licensed under the Apache License, Version 2.0
"""llm-compressor's own REAP, for `quality.py`: run by the Python of an environment of its own, where nothing of this
package is installed.

    python -m venv llmcompressor && llmcompressor/bin/pip install llmcompressor
    python benchmarks/quality.py --llmcompressor-python llmcompressor/bin/python ...

    llmcompressor/bin/python benchmarks/llmcompressor_reap.py --model MODEL --rows rows.json --ratio 0.25 --output FOLDER

`rows.json` holds the calibration samples as lists of token ids, all of one length. Writes the pruned checkpoint, in
float32, and prints one line of JSON: the versions, and what was left in each layer.
"""

import argparse
import json
import tempfile
from pathlib import Path

import llmcompressor
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSON list of lists of token ids")
    parser.add_argument("--ratio", type=float, required=True, help="share of the experts to remove")
    parser.add_argument("--output", required=True, help="folder for the pruned checkpoint")
    args = parser.parse_args()

    rows = json.loads(Path(args.rows).read_text())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "retained.json"
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
            recipe=REAPPruningModifier(sparsity=args.ratio, report_path=str(report)),
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False,
            # Its modifier asks for none but the tokens that the router sends; what it is given else does not count.
            moe_calibrate_all_experts=False,
        )
        retained = json.loads(report.read_text())
    model.save_pretrained(args.output)
    versions = {"llmcompressor": llmcompressor.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "experts": {layer: len(kept) for layer, kept in retained.items()}}))


if __name__ == "__main__":
    main()
