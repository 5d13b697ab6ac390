# Licensed under the Apache License, Version 2.0
"""How much worse a model gets, by method and ratio: every method in one run, on the same model, data and windows.

    python benchmarks/quality.py --model PATH --calibration calibration.jsonl \\
        --in-domain code=eval_code.jsonl prose=eval_prose.jsonl --out-of-domain sql=eval_sql.jsonl --output quality

Prints one table and writes it as `quality.md`, everything measured as `quality.json`, and with `--plot` the loss
against the size as `quality.png`. `--llmcompressor-python` adds llm-compressor's own REAP, run in an environment of its
own (`llmcompressor_reap.py`).
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Evaluation, Results, argument_parser, calibration_samples, load, load_or_measure, prune

from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.criteria import importance


OVER_BLOCKS = {"compensate": True, "compensation_scope": "block", "batch_size": 8}
TRAINED = {**OVER_BLOCKS, "reconstruction_steps": 200}
RECTANGLE = {"criterion": "obs", "layout": "uniform", "num_experts": "auto"}

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
    "OBS + comp., multiple of 4": {"criterion": "obs", "compensate": True, "width_multiple": 4},
    "OBS + comp., multiple of 8": {"criterion": "obs", "compensate": True, "width_multiple": 8},
    "OBS + comp., multiple of 16": {"criterion": "obs", "compensate": True, "width_multiple": 16},
    "OBS + comp., by layer": {"criterion": "obs", "compensate": True, "allocation": "layer"},
    "HEAPr + block comp.": {"criterion": "heapr", **OVER_BLOCKS},
    "Fisher + block comp.": {"criterion": "fisher", **OVER_BLOCKS},
    "OBS + block comp.": {"criterion": "obs", **OVER_BLOCKS},
    "OBS + block comp. + reconstruction": {"criterion": "obs", **TRAINED},
    "HEAPr, uniform": {"criterion": "heapr", "allocation": "uniform"},
    "HEAPr + comp., uniform": {"criterion": "heapr", "allocation": "uniform", "compensate": True},
    "Fisher + comp., uniform": {"criterion": "fisher", "allocation": "uniform", "compensate": True},
    "OBS + comp., uniform": {"criterion": "obs", "allocation": "uniform", "compensate": True},
    "OBS + block comp., uniform": {"criterion": "obs", "allocation": "uniform", **OVER_BLOCKS},
    "OBS + block comp. + reconstruction, uniform": {"criterion": "obs", "allocation": "uniform", **TRAINED},
    "OBS + block comp., rectangle": {**RECTANGLE, **OVER_BLOCKS},
    "OBS + block comp. + reconstruction, rectangle": {**RECTANGLE, **TRAINED},
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
    "OBS + block comp.",
    "OBS + block comp. + reconstruction",
    "HEAPr, uniform",
    "OBS + comp., uniform",
)


def drop_experts(model, statistics, criterion: str, ratio: float):
    """A copy of the model without the lowest-ranked experts of each layer, which the router no longer knows either."""
    model = copy.deepcopy(model)
    for path, score in importance(statistics, criterion).items():
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


def pruned_model(model, statistics, data, options: dict, ratio: float, by_llmcompressor: Callable):
    """The pruned model, the loss increase that its plan states, if there is one, and versions of what made it."""
    if options.get("llmcompressor"):
        pruned, versions = by_llmcompressor(ratio)
        return pruned, None, versions
    if options.get("drop"):
        return drop_experts(model, statistics, options["criterion"], ratio), None, None
    pruned, plan = prune(model, statistics, options, ratio, data)
    return pruned, plan.estimated_loss_increase, None


def plot(results: Results, path: Path) -> None:
    """Loss increase in domain against the size, a line for each of the methods `PLOTTED`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domain = next(iter(results.about["domains"]))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in PLOTTED:
        points = sorted(
            (
                100 * record["parameters"] / results.about["parameters"],
                record["increase"][domain]["value"],
                record["increase"][domain]["error"],
            )
            for record in results.records
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


def main() -> None:
    parser = argument_parser(__doc__, "quality", statistics=True, resume=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="defaults to all that can run")
    parser.add_argument(
        "--num-experts",
        type=int,
        metavar="N",
        help="of the rectangles, where it is known which is best; by default auto",
    )
    parser.add_argument("--reconstruction-steps", type=int, metavar="N", help="of the rows with it; by default 200")
    parser.add_argument("--llmcompressor-python", metavar="PATH", help="Python of an environment with llm-compressor")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device-map", default=None)
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    methods = args.methods or [
        name for name, options in METHODS.items() if args.llmcompressor_python or not options.get("llmcompressor")
    ]
    if args.llmcompressor_python is None and any(METHODS[name].get("llmcompressor") for name in methods):
        raise SystemExit("--methods: REAP of llm-compressor needs --llmcompressor-python")

    model, tokenizer = load(args, dtype=args.dtype, device_map=args.device_map)
    start = time.perf_counter(), time.process_time()
    statistics = load_or_measure(args, model, tokenizer)
    calibration = time.perf_counter() - start[0], time.process_time() - start[1]
    evaluation = Evaluation.of(args, model, tokenizer)
    for name, losses in evaluation.base.items():
        print(
            f"unpruned, {name}: loss {losses.mean():.4f}, perplexity {losses.mean().exp():.1f}, {len(losses)} windows of "
            f"{int(evaluation.windows[name].document.max()) + 1} documents"
        )
    about = {
        **evaluation.measured_on(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seq_length": args.seq_length,
        "calibration": statistics.fingerprint,
        "calibration_seconds": calibration[0],
        "calibration_cpu_seconds": calibration[1],
    }
    results = Results(args.output, about, list(METHODS))
    if args.resume:
        results.resume()

    data = calibration_samples(args, tokenizer)

    def by_llmcompressor(ratio: float):
        return llmcompressor_reap(args.llmcompressor_python, args.model, data.samples, ratio)

    for method, ratio in itertools.product(methods, args.ratios):
        if results.has(method, ratio):
            continue
        given = {"num_experts": args.num_experts, "reconstruction_steps": args.reconstruction_steps}
        options = {name: given.get(name) or value for name, value in METHODS[method].items()}
        start = time.perf_counter(), time.process_time()
        pruned, estimate, versions = pruned_model(model, statistics, data, options, ratio, by_llmcompressor)
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        results.add(
            method=method,
            ratio=ratio,
            options=options,
            parameters=sum(parameter.numel() for parameter in pruned.parameters()),
            **evaluation.measure(pruned),
            estimated_increase=estimate,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            versions=versions,
        )
    if args.plot:
        plot(results, Path(f"{args.output}.png"))
    print("\n" + results.markdown())


if __name__ == "__main__":
    main()
