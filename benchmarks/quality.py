# Licensed under the Apache License, Version 2.0
"""How much worse a model gets, by method and ratio: every method in one run, on the same model, data and windows.

    python benchmarks/quality.py --model PATH --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --out-of-domain sql=eval_sql.jsonl --output quality

Prints one table and writes it as `quality.md`, everything measured as `quality.json`, and with `--plot` the loss
against the size as `quality.png`. The loss increase is over the unpruned model, in nats a token, the mean over the
sets of a domain; its standard error is that of the paired differences, by document: windows of one document are not
independent. `--llmcompressor-python` adds llm-compressor's own REAP, run in an environment of its own
(`llmcompressor_reap.py`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.calibration.data import load_calibration_data
from optimum_heapr.calibration.sources import open_dataset, tokenized_documents
from optimum_heapr.loading import load_model


# By name, options of HeaprConfig. `drop` takes the lowest-ranked experts out of the router too, as REAP does;
# `llmcompressor` leaves the whole job to that package.
METHODS: dict[str, dict] = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "activation": {"criterion": "activation"},
    "frequency": {"criterion": "frequency", "allocation": "layer"},
    "REAP": {"criterion": "reap", "allocation": "layer"},
    "REAP, out of the router": {"criterion": "reap", "allocation": "layer", "drop": True},
    "REAP of llm-compressor": {"llmcompressor": True},
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
PLOTTED = (
    "random",
    "magnitude",
    "activation",
    "REAP, out of the router",
    "REAP of llm-compressor",
    "HEAPr as published",
    "Fisher + comp.",
    "OBS + comp.",
    "HEAPr, uniform",
    "OBS + comp., uniform",
)


@dataclass
class Windows:
    """Evaluation windows of one text.

    Attributes:
        ids: token ids, [rows, length].
        document: number of the document that each row is from, [rows].
    """

    ids: torch.Tensor
    document: torch.Tensor


@dataclass
class Increase:
    """Loss increase in nats a token, and its standard error."""

    value: float
    error: float

    @classmethod
    def over(
        cls,
        losses: dict[str, torch.Tensor],
        base: dict[str, torch.Tensor],
        windows: dict[str, Windows],
        sets: list[str],
    ) -> Increase:
        """Mean over sets of the mean paired difference of windows, with the standard error by document.

        With `G` documents of `n_g` windows and mean difference `d_g`, and `d` the mean over all `N` windows, the squared
        error of a set is `G / (G - 1) sum_g (n_g (d_g - d) / N)^2` (the cluster-robust variance of a mean); that of the
        mean over sets follows, since sets are independent. A set of one document has no such error: `nan`.
        """
        values, squares = [], []
        for name in sets:
            difference, document = losses[name] - base[name], windows[name].document
            value = difference.mean()
            groups = int(document.max()) + 1
            sums = difference.new_zeros(groups).index_add(0, document, difference - value)
            values.append(float(value))
            squares.append(
                groups / (groups - 1) * float(sums.square().sum()) / len(difference) ** 2 if groups > 1 else math.nan
            )
        return cls(sum(values) / len(sets), math.sqrt(sum(squares)) / len(sets))

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def evaluation_windows(path: str, tokenizer, rows: int, length: int) -> Windows:
    """Whole windows of the documents of a text, one of each by turns; rows of token ids are documents.

    By turns, so that a few windows come from as many documents as there are; none spans two.
    """
    data = open_dataset(path)
    if "input_ids" in data.column_names:
        documents = data["input_ids"]
    else:
        documents = tokenized_documents(data, range(len(data)), path, tokenizer, "text")
    cut = [[ids[start : start + length] for start in range(0, len(ids) - length + 1, length)] for ids in documents]
    cut = [windows for windows in cut if windows]
    turns = [
        (window, number)
        for windows in itertools.zip_longest(*cut)
        for number, window in enumerate(windows)
        if window is not None
    ][:rows]
    if not turns:
        raise SystemExit(f"{path}: no document has a window of {length} tokens")
    return Windows(torch.tensor([window for window, _ in turns]), torch.tensor([number for _, number in turns]))


@torch.no_grad()
def window_losses(model, windows: dict[str, Windows], batch_size: int) -> dict[str, torch.Tensor]:
    """Mean next-token loss of each window in nats, [rows] by set."""
    device, result = model.get_input_embeddings().weight.device, {}
    for name, rows in windows.items():
        losses = []
        for batch in rows.ids.split(batch_size):
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


def llmcompressor_reap(python: str, model: str, samples: list[torch.Tensor], ratio: float):
    """The model that llm-compressor's REAP makes of the checkpoint `model`, and its versions."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps([sample.tolist() for sample in samples]))
        script = Path(__file__).with_name("llmcompressor_reap.py")
        command = [python, script, "--model", model, "--rows", rows, "--ratio", ratio, "--output", f"{folder}/model"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{python}: llm-compressor failed\n{done.stderr[-3000:]}")
        return load_model(f"{folder}/model", dtype="float32")[0], json.loads(done.stdout.splitlines()[-1])["versions"]


def measure(model, statistics, windows, base, domains, todo, batch_size, by_llmcompressor: Callable) -> Iterator[dict]:
    """One record for each method and ratio `todo`, printed as it comes."""
    for method, ratio in todo:
        options, estimate, versions = METHODS[method], None, None
        start = time.perf_counter()
        if options.get("llmcompressor"):
            pruned, versions = by_llmcompressor(ratio)
        elif options.get("drop"):
            pruned = drop_experts(model, statistics, options["criterion"], ratio)
        else:
            pruned, plan = prune(model, statistics, options, ratio)
            estimate = plan.estimated_loss_increase
        seconds = time.perf_counter() - start
        losses = window_losses(pruned, windows, batch_size)
        found = {domain: Increase.over(losses, base, windows, sets) for domain, sets in domains.items()}
        print(f"{method:28s} {ratio:.0%}  " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
        yield {
            "method": method,
            "ratio": ratio,
            "options": options,
            "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
            "increase": {domain: vars(increase) for domain, increase in found.items()},
            "by_set": {name: float((losses[name] - base[name]).mean()) for name in losses},
            "estimated_increase": estimate,
            "seconds": seconds,
            "versions": versions,
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
    """Loss increase in domain against the size, a line for each of the methods `PLOTTED`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domain = next(iter(result["domains"]))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in PLOTTED:
        points = sorted(
            (
                100 * record["parameters"] / result["parameters"],
                record["increase"][domain]["value"],
                record["increase"][domain]["error"],
            )
            for record in result["records"]
            if record["method"] == method
        )
        if not points:
            continue
        sizes, values, errors = zip(*points)
        style = {
            "linestyle": "--" if method.endswith("uniform") else "-",
            "marker": "o",
            "markersize": 4,
            "capsize": 2,
        }
        axes.errorbar(sizes, [max(value, 1e-4) for value in values], yerr=errors, label=method, **style)
    axes.set(xlabel="size, % of the parameters", ylabel=f"loss increase {domain}, nats a token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


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
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="defaults to all that can run")
    parser.add_argument("--llmcompressor-python", metavar="PATH", help="Python of an environment with llm-compressor")
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
    methods = args.methods or [
        name for name, options in METHODS.items() if args.llmcompressor_python or not options.get("llmcompressor")
    ]
    if args.llmcompressor_python is None and any(METHODS[name].get("llmcompressor") for name in methods):
        raise SystemExit("--methods: REAP of llm-compressor needs --llmcompressor-python")

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
            f"unpruned, {name}: loss {losses.mean():.4f}, perplexity {losses.mean().exp():.1f}, {len(losses)} windows of "
            f"{int(windows[name].document.max()) + 1} documents"
        )

    result = {
        "domains": domains,
        "unpruned_loss": {name: float(losses.mean()) for name, losses in base.items()},
        "rows": {name: len(losses) for name, losses in base.items()},
        "documents": {name: int(rows.document.max()) + 1 for name, rows in windows.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seq_length": args.seq_length,
        "calibration": pruner.statistics.fingerprint,
        "calibration_seconds": calibration_seconds,
        "records": [],
    }
    output = Path(f"{args.output}.json")
    if args.resume and output.is_file():
        earlier = json.loads(output.read_text())
        if any(earlier.get(part) != result[part] for part in ("calibration", "rows", "documents")):
            raise SystemExit(f"{output}: measured on another model or other data")
        result["records"] = earlier["records"]
    known = {(record["method"], record["ratio"]) for record in result["records"]}
    todo = [pair for pair in itertools.product(methods, args.ratios) if pair not in known]

    def by_llmcompressor(ratio: float):
        samples = load_calibration_data(config, tokenizer).samples
        return llmcompressor_reap(args.llmcompressor_python, args.model, samples, ratio)

    for record in measure(model, pruner.statistics, windows, base, domains, todo, args.batch_size, by_llmcompressor):
        result["records"].append(record)
        result["records"].sort(key=lambda record: list(METHODS).index(record["method"]))
        output.write_text(json.dumps(result, indent=1) + "\n")
        Path(f"{args.output}.md").write_text(markdown(result))
    if args.plot:
        plot(result, Path(f"{args.output}.png"))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
