# Licensed under the Apache License, Version 2.0
"""Compensation shared between experts, where it can be: on a model whose experts are all chosen for every token.

    python benchmarks/joint_compensation.py --model smollm2-moe --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --statistics statistics.safetensors

On `smollm2_as_moe.py` the router weights are constants, so the block is one sum over all atomic experts, and what one
expert cannot make up for, another may. `joint` fits the columns of all routed experts of a layer together, `joint with
shared` those of the shared expert as well; `joint obs` also chooses what goes by an elimination over the whole layer.
A model that routes differently for each token has no such common matrix: this is a measurement, not part of the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import Increase, evaluation_windows, named_paths, window_losses

from optimum_heapr import AtomicStatistics, HeaprConfig
from optimum_heapr.calibration import tap
from optimum_heapr.calibration.data import load_calibration_data
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.criteria.elimination import greedy_elimination, ridge_for_tokens
from optimum_heapr.criteria.obs import TOKEN_DEPENDENCE, scores_of_order, token_dependence
from optimum_heapr.experts import ExpertBlock, find_expert_blocks
from optimum_heapr.loading import load_model
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.surgery.compensation import compensate


METHODS = (
    # what is removed by, what is fitted together
    ("heapr", "none"),
    ("fisher", "expert"),
    ("fisher", "joint"),
    ("fisher", "joint with shared"),
    ("obs", "expert"),
    ("obs", "joint with shared"),
    ("joint obs", "joint"),
    ("joint obs", "joint with shared"),
)


class JointAccumulator(tap.BlockAccumulator):
    """Also sums `h h^T` over all routed atomic experts of the block and then the shared ones, and `dL/dh dL/dh^T`."""

    shared: torch.Tensor  # activations of the shared expert in this micro-batch, [tokens, shared width]
    activations = gradients = None

    def add(self, activation: torch.Tensor, gradient: torch.Tensor, routed) -> None:
        super().add(activation, gradient, routed)
        experts = len(routed.counts)
        if routed.valid is not None or len(set(routed.counts)) != 1:
            raise SystemExit("the model must send every token to every expert, and samples must be of one length")
        h, g = (
            part.float().view(experts, -1, part.shape[1]).transpose(0, 1).flatten(1) for part in (activation, gradient)
        )
        h = torch.cat([h, self.shared.float()], dim=1)
        if self.activations is None:
            self.activations, self.gradients = (h.new_zeros(part.shape[1], part.shape[1]) for part in (h, g))
        self.activations.addmm_(h.T, h)
        self.gradients.addmm_(g.T, g)


def measure_jointly(model, data, batch_size: int) -> tuple[AtomicStatistics, dict[str, JointAccumulator]]:
    """The statistics of the package, and the joint sums by block."""
    accumulators: list[JointAccumulator] = []

    def accumulator(*args, **options):
        accumulators.append(JointAccumulator(*args, **options))
        return accumulators[-1]

    blocks = find_expert_blocks(model)

    def keep_shared(index: int):
        return lambda module, inputs: setattr(accumulators[index], "shared", inputs[0].detach().flatten(0, -2))

    hooks = [
        shared_down_proj(model, block).register_forward_pre_hook(keep_shared(index))
        for index, block in enumerate(blocks)
    ]
    original, tap.BlockAccumulator = tap.BlockAccumulator, accumulator
    try:
        statistics = calibrate(model, data, batch_size, gram=True)
    finally:
        tap.BlockAccumulator = original
        for hook in hooks:
            hook.remove()
    return statistics, {block.path: sums for block, sums in zip(blocks, accumulators)}


def shared_down_proj(model, block: ExpertBlock) -> torch.nn.Module:
    return model.get_submodule(block.path.rsplit(".", 1)[0]).shared_experts.down_proj


def joint_scores(statistics: AtomicStatistics, joint: dict[str, JointAccumulator]) -> dict[str, torch.Tensor]:
    """As criterion `obs`, with each layer as one expert."""
    scores = {}
    for path, block in statistics.blocks.items():
        tokens, atoms = int(block.token_count[0]), block.num_experts * block.width
        scale = token_dependence(block).flatten() ** (TOKEN_DEPENDENCE / 2)
        ridge = ridge_for_tokens(0.01, atoms, tokens)
        found = greedy_elimination(
            joint[path].activations[None, :atoms, :atoms] / tokens,
            (scale[:, None] * joint[path].gradients * scale / tokens)[None],
            ridge,
        )
        score = scores_of_order(found.order, found.cost.double() / (1 + ridge))
        scores[path] = score.view(block.num_experts, block.width)
    return scores


@torch.no_grad()
def cut(model, statistics, joint, kept: dict[str, list[torch.Tensor]], together: str) -> None:
    """Sets the columns of what goes to zero, in place, and fits those that stay."""
    for block in find_expert_blocks(model):
        weight, shared = block.module.down_proj, shared_down_proj(model, block).weight
        experts, hidden, width = weight.shape
        tokens = int(statistics.blocks[block.path].token_count[0])
        keep = kept[block.path]
        if together == "expert":
            grams = statistics.blocks[block.path].mean("activation_gram_sum")
            parts = [
                compensate(weight[e], grams[e], keep[e], tokens, 0.01).down_proj if len(keep[e]) else None
                for e in range(experts)
            ]
        else:
            parts = [weight[e][:, keep[e]].clone() for e in range(experts)]
        if not together.startswith("joint"):
            weight.zero_()
            for e, part in enumerate(parts):
                if part is not None:
                    weight[e][:, keep[e]] = part
            continue
        atoms = experts * width
        # The router weight 1/E is part of what a routed column does, and not of what a shared one does.
        columns = torch.cat([weight.permute(1, 0, 2).flatten(1) / experts, shared], dim=1)
        used = columns.shape[1] if together == "joint with shared" else atoms
        index = torch.cat([part + e * width for e, part in enumerate(keep)] + [torch.arange(atoms, used)])
        fitted = compensate(
            columns[:, :used], joint[block.path].activations[:used, :used] / tokens, index, tokens, 0.01
        )
        new = torch.zeros_like(columns[:, :used])
        new[:, index] = fitted.down_proj
        weight.copy_(new[:, :atoms].view(hidden, experts, width).permute(1, 0, 2) * experts)
        if used > atoms:
            shared.copy_(new[:, atoms:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True, help="folder that smollm2_as_moe.py wrote")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--in-domain", nargs="+", required=True, metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("--out-of-domain", nargs="*", default=[], metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("-o", "--output", default="joint.json")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.7])
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=6, help="evaluation windows of each text")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32")
    options = {"num_samples": args.num_samples, "seq_length": args.seq_length}
    data = load_calibration_data(HeaprConfig(dataset=args.calibration, **options), tokenizer)
    statistics, joint = measure_jointly(model, data, args.batch_size)
    in_domain, out_of_domain = named_paths(args.in_domain), named_paths(args.out_of_domain)
    domains = {"in domain": list(in_domain), **({"out of domain": list(out_of_domain)} if out_of_domain else {})}
    windows = {
        name: evaluation_windows(path, tokenizer, args.rows, args.seq_length)
        for name, path in {**in_domain, **out_of_domain}.items()
    }
    base = window_losses(model, windows, args.batch_size)
    scores = {name: statistics.importance(name) for name in ("heapr", "fisher", "obs")}
    scores["joint obs"] = joint_scores(statistics, joint)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = []
    for ratio in args.ratios:
        for criterion, together in METHODS:
            kept = allocate(scores[criterion], HeaprConfig(ratio=ratio), statistics.unreached)
            cut(model, statistics, joint, kept, together)
            losses = window_losses(model, windows, args.batch_size)
            model.load_state_dict(original)
            found = {domain: Increase.over(losses, base, windows, sets) for domain, sets in domains.items()}
            print(f"{criterion:10s} fitted: {together:18s} {ratio:.0%}  ", found, flush=True)
            increase = {domain: vars(value) for domain, value in found.items()}
            records.append({"criterion": criterion, "fitted": together, "ratio": ratio, "increase": increase})
            Path(args.output).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
