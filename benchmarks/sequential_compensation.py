# Licensed under the Apache License, Version 2.0
"""Compensation over blocks, from which inputs, to what, and by whom: what the package does against what it could do.

    python benchmarks/sequential_compensation.py --model MODEL --calibration calibration.jsonl --criterion obs \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --output sequential

    block                      all experts of a block, to its output in the unpruned model: what the package does
    without shared experts     the routed ones alone
    to the output              sequential: from the inputs that the pruned layers below produce, to the output of the
                               unpruned block for its own inputs
    to the state               sequential, to the hidden state behind the unpruned layer
    experts, sequential        each expert alone, from these inputs
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from pathlib import Path

import torch
from common import RIDGE, Evaluation, Results, argument_parser, calibration_samples, load, load_or_measure

from optimum_heapr import HeaprConfig
from optimum_heapr.criteria import importance
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.layerwise.activations import ActivationStore
from optimum_heapr.layerwise.decoder import Decoder
from optimum_heapr.layerwise.walk import LayerWalk
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.surgery.block_compensation import BlockFit
from optimum_heapr.surgery.block_inputs import watched_blocks
from optimum_heapr.surgery.compensation import compensate
from optimum_heapr.surgery.selection import set_rows


METHODS = ("block", "without shared experts", "to the output", "to the state", "experts, sequential")
BUDGET = 2**32


class Side:
    """A model whose layers are gone through, and what its mixtures give."""

    def __init__(self, model, batches: dict[int, dict], folder: Path):
        self.decoder = Decoder(model, find_expert_blocks(model))
        folder.mkdir()
        self.walk = LayerWalk(self.decoder, batches, ActivationStore(folder, BUDGET))
        self.walk.capture(batches)
        self.batches = batches

    def run(self, number: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Takes all micro-batches through a layer: inputs of its blocks, output of its mixture, and states behind it."""
        model, blocks, outputs = self.decoder.model, self.decoder.blocks_of(number), []
        hooks = [
            model.get_submodule(block.path.rpartition(".")[0]).register_forward_hook(
                lambda _, inputs, output: outputs.append(output.flatten(0, -2))
            )
            for block in blocks
        ]
        with watched_blocks(model, blocks) as watched:
            for index, batch in self.batches.items():
                for inputs in watched.values():
                    inputs.counts = batch["attention_mask"].bool().flatten()
                self.walk.forward(number, self.decoder.layers[number], index)
        for hook in hooks:
            hook.remove()
        states = [self.walk.hidden(number + 1, index).flatten(0, -2) for index in self.batches]
        return watched, torch.cat(outputs) if outputs else torch.empty(0), torch.cat(states)


def alone(block, inputs, kept: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each expert compensated by itself, on these inputs."""
    hidden, index, weight = inputs.routing()
    rows = []
    for expert, indices in enumerate(kept):
        tokens, slot = torch.where(index == expert)
        gate_up = torch.nn.functional.linear(hidden[tokens], block.module.gate_up_proj[expert])
        activations = block.module._apply_gate(gate_up) * weight[tokens, slot, None]
        gram = activations.T @ activations / max(len(tokens), 1)
        rows.append(compensate(block.down_rows(expert).T, gram, indices, len(tokens), RIDGE).down_proj.T)
    return rows


@torch.no_grad()
def prune(model, batches: dict[int, dict], kept: dict[str, list[torch.Tensor]], method: str):
    """A copy of the model with the columns of what goes set to zero and those that stay fitted by `method`."""
    pruned, sequential = copy.deepcopy(model), method not in METHODS[:2]
    with tempfile.TemporaryDirectory() as folder:
        dense = Side(model, batches, Path(folder) / "dense")
        side = Side(pruned, batches, Path(folder) / "pruned") if sequential else None
        for number in range(len(dense.decoder.layers)):
            watched, output, state = dense.run(number)
            if sequential:
                watched, own_output, own_state = side.run(number)
            for block in find_expert_blocks(pruned):
                if block.path not in watched:
                    continue
                inputs, own = watched[block.path], kept[block.path]
                if method == "without shared experts":
                    inputs.shared = {}
                if method == "experts, sequential":
                    rows, shared = alone(block, inputs, own), {}
                else:
                    besides = None
                    if method == "to the output":
                        besides = output - own_output
                    if method == "to the state":
                        besides = state - own_state
                    fitted = BlockFit(block, inputs, own, RIDGE, besides=besides).solved()
                    rows, shared = fitted.rows, fitted.shared
                for expert in range(block.num_experts):
                    block.down_rows(expert).zero_()
                set_rows(block, own, rows)
                for name, weight in shared.items():
                    pruned.get_parameter(name).copy_(weight)
            if sequential:
                for index in batches:  # once more, now with what the layer became
                    side.walk.forward(number, side.decoder.layers[number], index)
    return pruned


def main() -> None:
    parser = argument_parser(__doc__, "sequential", statistics=True, resume=True)
    parser.add_argument("--criterion", default="obs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    model, tokenizer = load(args)
    statistics = load_or_measure(args, model, tokenizer)
    data = calibration_samples(args, tokenizer)
    batches = dict(enumerate(data.micro_batches(args.batch_size)))
    evaluation = Evaluation.of(args, model, tokenizer)
    about = {**evaluation.measured_on(), "calibration": statistics.fingerprint, "criterion": args.criterion}
    results = Results(args.output, about, list(METHODS))
    if args.resume:
        results.resume()
    scores = importance(statistics, args.criterion)
    for method, ratio in itertools.product(args.methods, args.ratios):
        if not results.has(method, ratio):
            kept = allocate(scores, HeaprConfig(ratio=ratio, criterion=args.criterion), statistics.unreached)
            results.add(method=method, ratio=ratio, **evaluation.measure(prune(model, batches, kept, method)))


if __name__ == "__main__":
    main()
