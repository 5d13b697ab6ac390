# Licensed under the Apache License, Version 2.0
"""How much worse a model gets, by method and ratio: every method in one run, on the same model, data and windows.

    python benchmarks/quality.py --model PATH --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --out-of-domain sql=eval_sql.jsonl --output quality

Prints one table and writes it as `quality.md`, everything measured as `quality.json`, and with `--plot` the loss
against the ratio as `quality.png`. The loss increase is over the unpruned model, in nats a token, the mean over the
sets of a domain; its standard error is that of the paired differences of windows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration.data import packed
from optimum_heapr.calibration.sources import open_dataset, tokenized_documents
from optimum_heapr.pruner import load_model


# By name, options of HeaprConfig. `drop` takes the lowest-ranked experts out of the router too, as REAP does.
METHODS: dict[str, dict] = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "activation": {"criterion": "activation"},
    "frequency": {"criterion": "frequency", "allocation": "layer"},
    "REAP": {"criterion": "reap", "allocation": "layer"},
    "REAP, out of the router": {"criterion": "reap", "allocation": "layer", "drop": True},
    "HEAPr as published": {"criterion": "heapr"},
    "HEAPr + comp.": {"criterion": "heapr", "compensate": True},
    "HEAPr total": {"criterion": "heapr", "reduction": "total"},
    "HEAPr total + comp.": {"criterion": "heapr", "reduction": "total", "compensate": True},
    "Fisher": {"criterion": "fisher"},
    "Fisher + comp.": {"criterion": "fisher", "compensate": True},
    "Fisher total": {"criterion": "fisher", "reduction": "total"},
    "Fisher total + comp.": {"criterion": "fisher", "reduction": "total", "compensate": True},
    "OBS": {"criterion": "obs"},
    "OBS + comp.": {"criterion": "obs", "compensate": True},
    "OBS + comp., multiple of 8": {"criterion": "obs", "compensate": True, "width_multiple": 8},
    "OBS + comp., by layer": {"criterion": "obs", "compensate": True, "allocation": "layer"},
    "HEAPr, uniform": {"criterion": "heapr", "allocation": "uniform"},
    "HEAPr + comp., uniform": {"criterion": "heapr", "allocation": "uniform", "compensate": True},
    "Fisher + comp., uniform": {"criterion": "fisher", "allocation": "uniform", "compensate": True},
    "OBS + comp., uniform": {"criterion": "obs", "allocation": "uniform", "compensate": True},
}


@dataclass
class Increase:
    """Loss increase in nats a token, and its standard error."""

    value: float
    error: float

    @classmethod
    def over(cls, windows: dict[str, torch.Tensor], base: dict[str, torch.Tensor], sets: list[str]) -> Increase:
        """Mean over sets of the mean paired difference of windows."""
        differences = [windows[name] - base[name] for name in sets]
        errors = [float(difference.var()) / len(difference) for difference in differences if len(difference) > 1]
        return cls(sum(map(float, map(torch.mean, differences))) / len(sets), math.sqrt(sum(errors)) / len(sets))

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def evaluation_windows(path: str, tokenizer, rows: int, length: int) -> torch.Tensor:
    """The first windows of a text, [rows, length]; a shorter last one is left out."""
    data = open_dataset(path)
    if "input_ids" in data.column_names:
        windows = (torch.tensor(row[:length]) for row in data["input_ids"])
    else:
        windows = packed(tokenized_documents(data, range(len(data)), path, tokenizer, "text"), length)
    windows = [window for window in itertools.islice(windows, rows) if len(window) == length]
    if not windows:
        raise SystemExit(f"{path}: holds less than one window of {length} tokens")
    return torch.stack(windows)


@torch.no_grad()
def window_losses(model, windows: dict[str, torch.Tensor], batch_size: int) -> dict[str, torch.Tensor]:
    """Mean next-token loss of each window in nats, [rows] by set."""
    device, result = model.get_input_embeddings().weight.device, {}
    for name, rows in windows.items():
        losses = []
        for batch in rows.split(batch_size):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(batch), -1).double().mean(1).cpu())
        result[name] = torch.cat(losses)
    return result


def prune(model, statistics, options: dict, ratio: float):
    """A pruned copy of the model, and the plan."""
    options = {name: value for name, value in options.items() if name != "drop"}
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(ratio=ratio, **options))
    pruner.statistics = statistics
    plan = pruner.plan()
    return pruner.apply(plan), plan


def drop_experts(model, statistics, criterion: str, ratio: float):
    """A copy of the model without the lowest-ranked experts of each layer, which the router no longer knows either."""
    model = copy.deepcopy(model)
    for path, score in statistics.importance(criterion).items():
        kept = max(round((1 - ratio) * len(score)), model.config.num_experts_per_tok)
        chosen = score[:, 0].sort(descending=True, stable=True).indices[:kept].sort().values
        experts, router = model.get_submodule(path), model.get_submodule(path.rsplit(".", 1)[0]).gate
        for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (router, "weight")):
            setattr(module, name, torch.nn.Parameter(getattr(module, name).detach()[chosen]))
        for module in (experts, router):
            if hasattr(module, "num_experts"):
                module.num_experts = kept
    return model


def measure(model, statistics, windows, base, domains, methods, ratios, batch_size, known=()) -> Iterator[dict]:
    """One record for each method and ratio that is not `known`, printed as it comes."""
    for method in methods:
        options = METHODS[method]
        for ratio in ratios:
            if (method, ratio) in known:
                continue
            start = time.perf_counter()
            if options.get("drop"):
                pruned, estimate = drop_experts(model, statistics, options["criterion"], ratio), None
            else:
                pruned, plan = prune(model, statistics, options, ratio)
                estimate = plan.estimated_loss_increase
            seconds = time.perf_counter() - start
            losses = window_losses(pruned, windows, batch_size)
            found = {domain: Increase.over(losses, base, sets) for domain, sets in domains.items()}
            print(f"{method:28s} {ratio:.0%}  " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
            yield {
                "method": method,
                "ratio": ratio,
                "options": options,
                "increase": {domain: vars(increase) for domain, increase in found.items()},
                "by_set": {name: float((losses[name] - base[name]).mean()) for name in losses},
                "estimated_increase": estimate,
                "seconds": seconds,
            }


def markdown(result: dict) -> str:
    """The table: a row for each method, a column for each domain and ratio."""
    ratios = sorted({record["ratio"] for record in result["records"]})
    columns = [(domain, ratio) for domain in result["domains"] for ratio in ratios]
    lines = [
        "| method | " + " | ".join(f"{domain}, {ratio:.0%}" for domain, ratio in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in dict.fromkeys(record["method"] for record in result["records"]):
        cells = {
            (domain, record["ratio"]): str(Increase(**increase))
            for record in result["records"]
            if record["method"] == method
            for domain, increase in record["increase"].items()
        }
        lines.append(f"| {method} | " + " | ".join(cells.get(column, "") for column in columns) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Loss increase in domain against the share removed, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domain = next(iter(result["domains"]))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    methods = dict.fromkeys(record["method"] for record in result["records"])
    for index, method in enumerate(methods):
        points = sorted(
            (record["ratio"], record["increase"][domain]["value"], record["increase"][domain]["error"])
            for record in result["records"]
            if record["method"] == method
        )
        ratios, values, errors = zip(*points)
        style = {"color": pyplot.get_cmap("tab20")(index % 20), "linestyle": ("-", "--")[index % 2]}
        axes.errorbar(ratios, [max(value, 1e-4) for value in values], yerr=errors, label=method, **style)
    axes.set(xlabel="routed atomic experts removed", ylabel=f"loss increase {domain}, nats a token", yscale="log")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def named_paths(arguments: list[str]) -> dict[str, str]:
    return {
        (name if path else Path(name).stem): path or name for name, _, path in (a.partition("=") for a in arguments)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True, help="folder or name on the Hub")
    parser.add_argument("--calibration", required=True, help="calibration text, or rows of input_ids")
    parser.add_argument("--in-domain", nargs="+", required=True, metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("--out-of-domain", nargs="*", default=[], metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("-o", "--output", default="quality", help="path of the results, without ending")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens in a sample and in an evaluation window")
    parser.add_argument("--rows", type=int, default=24, help="evaluation windows of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--statistics", help="statistics file to use, or to write if there is none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device-map", default=None)
    parser.add_argument("--resume", action="store_true", help="keep what the output holds and measure what is missing")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype=args.dtype, device_map=args.device_map)
    config = HeaprConfig(
        dataset=args.calibration,
        num_samples=args.num_samples,
        seq_length=args.seq_length,
        batch_size=args.batch_size,
        statistics="gram",
    )
    start = time.perf_counter()
    pruner = HeaprPruner(model, tokenizer, config)
    if args.statistics and Path(args.statistics).is_file():
        from optimum_heapr import AtomicStatistics

        pruner.statistics = AtomicStatistics.load(args.statistics)
    else:
        pruner.calibrate()
        if args.statistics:
            pruner.statistics.save(args.statistics)
    calibration_seconds = time.perf_counter() - start

    in_domain, out_of_domain = named_paths(args.in_domain), named_paths(args.out_of_domain)
    domains = {"in domain": list(in_domain), **({"out of domain": list(out_of_domain)} if out_of_domain else {})}
    windows = {
        name: evaluation_windows(path, tokenizer, args.rows, args.seq_length)
        for name, path in {**in_domain, **out_of_domain}.items()
    }
    base = window_losses(model, windows, args.batch_size)
    for name, losses in base.items():
        print(
            f"unpruned, {name}: loss {losses.mean():.4f}, perplexity {losses.mean().exp():.1f}, {len(losses)} windows"
        )

    result = {
        "domains": domains,
        "unpruned_loss": {name: float(losses.mean()) for name, losses in base.items()},
        "rows": {name: len(losses) for name, losses in base.items()},
        "seq_length": args.seq_length,
        "calibration": pruner.statistics.fingerprint,
        "calibration_seconds": calibration_seconds,
        "records": [],
    }
    output = Path(f"{args.output}.json")
    if args.resume and output.is_file():
        earlier = json.loads(output.read_text())
        if earlier["calibration"] != result["calibration"] or earlier["rows"] != result["rows"]:
            raise SystemExit(f"{output}: measured on another model or other data")
        result["records"] = earlier["records"]
    known = {(record["method"], record["ratio"]) for record in result["records"]}
    for record in measure(
        model, pruner.statistics, windows, base, domains, args.methods, args.ratios, args.batch_size, known
    ):
        result["records"].append(record)
        result["records"].sort(key=lambda record: list(METHODS).index(record["method"]))
        output.write_text(json.dumps(result, indent=1) + "\n")
        Path(f"{args.output}.md").write_text(markdown(result))
    if args.plot:
        plot(result, Path(f"{args.output}.png"))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
