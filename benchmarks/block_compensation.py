# Licensed under the Apache License, Version 2.0
"""Compensation that looks past one expert: over a whole block, and from the inputs that pruned layers below produce.

    python benchmarks/block_compensation.py --model MODEL --calibration calibration.jsonl --criterion obs \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --output block.json

The output of a block is one linear function `W phi` of the activations of all its atomic experts, `phi` those of the
routed experts times their router weights (zero where an expert was not chosen) and then those of the shared expert.
With `E[phi phi^T]` over all of them the least-squares fit of any of the columns that stay is exact, whatever the router
does. That matrix has `(E I)^2` entries: it fits small models alone, which is what this measurement is for.

Every method starts from the columns that the package's compensation gives, and refits some of them:

    expert       none: what the package does
    shared       those of the shared expert
    block        all that stay, routed and shared

The first layer being the same, `sequential` fits from the inputs that the pruned layers below produce: to what the block
gives for these inputs (`sequential expert`, which is the package's compensation on those inputs, and `sequential own`), to
what the unpruned model's block gives (`sequential`), or to what makes the hidden state behind the block that of the
unpruned model (`sequential state`).
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Increase, evaluation_windows, named_paths, window_losses

from optimum_heapr import AtomicStatistics, HeaprConfig
from optimum_heapr.calibration.data import load_calibration_data
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.experts import ExpertBlock, find_expert_blocks
from optimum_heapr.loading import load_model
from optimum_heapr.planning.allocation import allocate
from optimum_heapr.surgery.compensation import compensate


RIDGE = 0.01
METHODS = (
    "none",
    "expert",
    "shared",
    "block",
    "sequential expert",
    "sequential shared",
    "sequential own",
    "sequential",
    "sequential state",
)


@dataclass
class Block:
    """What one forward of a layer saw in its expert block.

    Attributes:
        phi: activations of all atomic experts, router weights in, [tokens, E I + shared width].
        output: of the block, shared expert included, [tokens, d].
        state: hidden states behind the layer, [batch, sequence, d].
        tokens: routed to each expert, [E].
    """

    phi: torch.Tensor
    output: torch.Tensor
    state: torch.Tensor
    tokens: torch.Tensor


def activations(block: ExpertBlock, hidden, index, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all routed atomic experts, [tokens, E I], and the tokens of each expert, [E]."""
    phi = hidden.new_zeros(len(hidden), block.num_experts, block.width)
    for expert in range(block.num_experts):
        token, slot = torch.where(index == expert)
        gate_up = F.linear(hidden[token], block.module.gate_up_proj[expert])
        phi[token, expert] = block.module._apply_gate(gate_up) * weights[token, slot, None]
    return phi.flatten(1), torch.bincount(index.flatten(), minlength=block.num_experts)


class Layers:
    """A model whose decoder layers are run one at a time."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.blocks = {block.path.rsplit(".", 2)[0]: block for block in find_expert_blocks(model)}
        prefix = next(iter(self.blocks)).rsplit(".", 1)[0]
        self.layers = {f"{prefix}.{index}": layer for index, layer in enumerate(model.get_submodule(prefix))}

    def mixture(self, name: str) -> torch.nn.Module:
        return self.model.get_submodule(self.blocks[name].path.rsplit(".", 1)[0])

    def down_proj(self, name: str) -> torch.nn.Parameter:
        return self.blocks[name].module.down_proj

    def shared(self, name: str) -> torch.nn.Module | None:
        return getattr(self.mixture(name), "shared_experts", None)

    def columns(self, name: str) -> torch.Tensor:
        """`W` [d, E I + shared width]."""
        columns, shared = self.down_proj(name).permute(1, 0, 2).flatten(1), self.shared(name)
        return columns if shared is None else torch.cat([columns, shared.down_proj.weight], dim=1)

    def set_columns(self, name: str, columns: torch.Tensor) -> None:
        weight, shared = self.down_proj(name), self.shared(name)
        atoms = weight.shape[0] * weight.shape[2]
        weight.copy_(columns[:, :atoms].view(len(columns), len(weight), -1).permute(1, 0, 2))
        if shared is not None:
            shared.down_proj.weight.copy_(columns[:, atoms:])

    def inputs(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """What the first layer gets."""
        found = []

        def keep(module, args, kwargs):
            found.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
            raise StopIteration

        hook = next(iter(self.layers.values())).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.model(input_ids=batch, use_cache=False)
        except StopIteration:
            pass
        finally:
            hook.remove()
        return found[0]

    def run(self, name: str, state: torch.Tensor, options: dict) -> Block | torch.Tensor:
        """One layer; the state alone if it has no experts."""
        if name not in self.blocks:
            return self.layers[name](state, **options)
        seen = {}
        hooks = [
            self.blocks[name].module.register_forward_pre_hook(lambda _, args: seen.update(routed=args)),
            self.mixture(name).register_forward_hook(lambda _, args, out: seen.update(output=out)),
        ]
        shared = self.shared(name)
        if shared is not None:
            hooks.append(shared.down_proj.register_forward_pre_hook(lambda _, args: seen.update(shared=args[0])))
        state = self.layers[name](state, **options)
        for hook in hooks:
            hook.remove()
        phi, tokens = activations(self.blocks[name], *seen["routed"])
        if shared is not None:
            phi = torch.cat([phi, seen["shared"].flatten(0, -2)], dim=1)
        return Block(phi, seen["output"].flatten(0, -2), state, tokens)


@dataclass
class Sums:
    """Of a block over the calibration tokens: `phi phi^T`, target `phi^T` and tokens of each expert."""

    gram: torch.Tensor | float = 0.0
    cross: torch.Tensor | float = 0.0
    tokens: torch.Tensor | int = 0
    top_k: int = 1

    def add(self, block: Block, target: torch.Tensor) -> None:
        self.gram = self.gram + block.phi.T @ block.phi
        self.cross = self.cross + target.T @ block.phi
        self.tokens = self.tokens + block.tokens
        self.top_k = int(block.tokens.sum()) // len(block.phi)


def fitted(columns: torch.Tensor, sums: Sums, kept: list[torch.Tensor], width: int, free: str) -> torch.Tensor:
    """`W` with what is removed zero, each expert compensated alone, and then the columns `free` refitted."""
    experts = len(kept)
    atoms = experts * width
    shared = torch.arange(atoms, columns.shape[1])
    start = torch.zeros_like(columns)
    start[:, shared] = columns[:, shared]
    ridge = sums.gram.new_zeros(columns.shape[1])
    for expert, (indices, count) in enumerate(zip(kept, sums.tokens.tolist())):
        part = slice(expert * width, (expert + 1) * width)
        gram = sums.gram[part, part] / max(count, 1)
        if len(indices):
            own = columns[:, part]
            alone = own[:, indices] if free == "none" else compensate(own, gram, indices, count, RIDGE).down_proj
            start[:, part.start + indices] = alone
    if free in ("none", "expert"):
        return start
    # Columns that are fitted together share their tokens: as many columns as one token meets count against them.
    tokens = sums.tokens.sum() / sums.top_k
    together = len(shared) + (sums.top_k * width if free == "block" else 0)
    for expert, count in enumerate(sums.tokens.tolist()):
        part = slice(expert * width, (expert + 1) * width)
        least = sums.top_k * width / max(count, 1) + len(shared) / tokens
        ridge[part] = sums.gram.diagonal()[part].mean() * max(RIDGE, least)
    if len(shared):
        ridge[shared] = sums.gram.diagonal()[shared].mean() * max(RIDGE, together / tokens)
    stay = torch.cat([indices + expert * width for expert, indices in enumerate(kept)] + [shared])
    stay = stay[sums.gram.diagonal()[stay] > 0]
    refit = shared if free == "shared" else stay
    left = sums.cross[:, refit] - start[:, stay] @ sums.gram[stay][:, refit]
    matrix = (sums.gram[refit][:, refit] + ridge[refit].diag()).double()
    start[:, refit] += torch.cholesky_solve(left.T.double(), torch.linalg.cholesky(matrix)).T.to(start.dtype)
    return start


@torch.no_grad()
def prune(
    model, batches: list[torch.Tensor], kept: dict[str, list[torch.Tensor]], method: str, joint: dict[str, Sums]
):
    """A copy of the model with the columns of what goes set to zero and those that stay fitted by `method`.

    `joint` holds the sums on inputs of the unpruned model, and is filled on first use.
    """
    dense, pruned = Layers(model), Layers(copy.deepcopy(model))
    sequential, free = method.startswith("sequential"), method.split()[-1]
    free = {"sequential": "block", "own": "block", "state": "block"}.get(free, free)
    if not sequential and joint:
        for name, block in pruned.blocks.items():
            pruned.set_columns(name, fitted(pruned.columns(name), joint[name], kept[block.path], block.width, free))
        return pruned.model
    inputs = [dense.inputs(batch) for batch in batches]
    states = [(state, state) for state, _ in inputs]
    for name in dense.layers:
        sums, block = Sums(), dense.blocks.get(name)
        for index, ((above, below), (_, options)) in enumerate(zip(states, inputs)):
            truth = dense.run(name, above, options)
            if block is None:
                states[index] = truth, dense.run(name, below, options) if sequential else truth
                continue
            seen = dense.run(name, below, options) if sequential else truth
            target = {
                "sequential": truth.output,
                "sequential state": (truth.state - seen.state).flatten(0, -2) + seen.output,
            }.get(method, seen.output)
            sums.add(seen, target)
            states[index] = truth.state, below
        if block is None:
            continue
        if not sequential:
            joint[name] = sums
        pruned.set_columns(name, fitted(pruned.columns(name), sums, kept[block.path], block.width, free))
        if sequential:
            states = [
                (above, pruned.run(name, below, options).state) for (above, below), (_, options) in zip(states, inputs)
            ]
        else:
            states = [(above, above) for above, _ in states]
    return pruned.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--in-domain", nargs="+", required=True, metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("--out-of-domain", nargs="*", default=[], metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("-o", "--output", default="block.json")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.7])
    parser.add_argument("--criterion", default="obs")
    parser.add_argument("--allocation", default="global")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=24, help="evaluation windows of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--statistics", help="statistics file to use, or to write if there is none")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32")
    options = {"num_samples": args.num_samples, "seq_length": args.seq_length}
    data = load_calibration_data(HeaprConfig(dataset=args.calibration, **options), tokenizer)
    if args.statistics and Path(args.statistics).is_file():
        statistics = AtomicStatistics.load(args.statistics)
    else:
        statistics = calibrate(model, data, args.batch_size, gram=True)
        if args.statistics:
            statistics.save(args.statistics)
    in_domain, out_of_domain = named_paths(args.in_domain), named_paths(args.out_of_domain)
    domains = {"in domain": list(in_domain), **({"out of domain": list(out_of_domain)} if out_of_domain else {})}
    windows = {
        name: evaluation_windows(path, tokenizer, args.rows, args.seq_length)
        for name, path in {**in_domain, **out_of_domain}.items()
    }
    base = window_losses(model, windows, args.batch_size)
    scores = statistics.importance(args.criterion)
    batches = [batch["input_ids"] for batch in data.micro_batches(args.batch_size)]
    joint: dict[str, Sums] = {}
    records = []
    for ratio in args.ratios:
        config = HeaprConfig(ratio=ratio, criterion=args.criterion, allocation=args.allocation)
        kept = allocate(scores, config, statistics.unreached)
        for method in args.methods:
            losses = window_losses(prune(model, batches, kept, method, joint), windows, args.batch_size)
            found = {domain: Increase.over(losses, base, windows, sets) for domain, sets in domains.items()}
            print(f"{ratio:.0%}  {method:18s} " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
            increase = {domain: vars(value) for domain, value in found.items()}
            records.append({"method": method, "ratio": ratio, "criterion": args.criterion, "increase": increase})
            Path(args.output).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
