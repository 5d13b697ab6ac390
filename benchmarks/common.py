# Licensed under the Apache License, Version 2.0
"""What the benchmarks of quality share: arguments, evaluation windows, the loss increase and its error, tables.

The loss increase is over the unpruned model, in nats a token, the mean over the sets of a domain; its standard error is
that of the paired differences, by document: windows of one document are not independent.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprPruner
from optimum_heapr.calibration import tap
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.surgery.compensation import compensate_experts
from optimum_heapr.text.documents import tokenized_documents
from optimum_heapr.text.samples import CalibrationData, load_calibration_data
from optimum_heapr.text.sources import open_dataset


RIDGE = 0.01
"""That of the package."""


def argument_parser(
    doc: str,
    output: str,
    ratios: tuple[float, ...] = (0.25, 0.5, 0.7),
    num_samples: int = 128,
    statistics: bool = False,
    resume: bool = False,
) -> argparse.ArgumentParser:
    """The arguments that all have, and on demand `--statistics` and `--resume`."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("-m", "--model", required=True, help="folder or name on the Hub")
    parser.add_argument("--calibration", required=True, help="calibration text, or rows of input_ids")
    parser.add_argument("--in-domain", nargs="+", required=True, metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("--out-of-domain", nargs="*", default=[], metavar="NAME=PATH", help="evaluation texts")
    parser.add_argument("-o", "--output", default=output, help="path of the results, without ending")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(ratios))
    parser.add_argument("--num-samples", type=int, default=num_samples, help="calibration samples")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens in a sample and in an evaluation window")
    parser.add_argument("--rows", type=int, default=24, help="evaluation windows of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--experts-implementation",
        help="of transformers, for the evaluation; on a CPU eager is faster where experts get many tokens",
    )
    if statistics:
        parser.add_argument("--statistics", help="statistics file to use, or to write if there is none")
    if resume:
        parser.add_argument(
            "--resume", action="store_true", help="keep what the output holds and measure what is missing"
        )
    return parser


def load(args: argparse.Namespace, **options):
    """The model and its tokenizer, in float32 unless the options say otherwise."""
    if args.experts_implementation:
        options["experts_implementation"] = args.experts_implementation
    return load_model(args.model, **{"dtype": "float32", **options})


def named_paths(arguments: list[str]) -> dict[str, str]:
    return {
        (name if path else Path(name).stem): path or name for name, _, path in (a.partition("=") for a in arguments)
    }


def calibration_config(args: argparse.Namespace) -> HeaprConfig:
    """For second-order statistics of the calibration text."""
    return HeaprConfig(
        dataset=args.calibration,
        num_samples=args.num_samples,
        seq_length=args.seq_length,
        batch_size=args.batch_size,
        statistics="gram",
    )


def calibration_samples(args: argparse.Namespace, tokenizer) -> CalibrationData:
    return load_calibration_data(calibration_config(args), tokenizer)


def load_or_measure(args: argparse.Namespace, model, tokenizer) -> AtomicStatistics:
    """The statistics of the file `--statistics` if there is one; else measured, and written there if it was given."""
    if args.statistics and Path(args.statistics).is_file():
        return AtomicStatistics.load(args.statistics)
    statistics = HeaprPruner(model, tokenizer, calibration_config(args)).calibrate()
    if args.statistics:
        statistics.save(args.statistics)
    return statistics


@contextmanager
def accumulating(kind: type[tap.BlockAccumulator]) -> Iterator[list[tap.BlockAccumulator]]:
    """While it lasts calibration sums by `kind`; gives the accumulators, one for each block in the order of the blocks."""
    made: list[tap.BlockAccumulator] = []

    def accumulator(*args, **options):
        made.append(kind(*args, **options))
        return made[-1]

    original, tap.BlockAccumulator = tap.BlockAccumulator, accumulator
    try:
        yield made
    finally:
        tap.BlockAccumulator = original


def prune(model, statistics: AtomicStatistics, options: dict, ratio: float, data: CalibrationData | None = None):
    """A pruned copy of the model, and the plan. `data` is what compensation over blocks is fitted to."""
    pruner = HeaprPruner(copy.deepcopy(model), config=HeaprConfig(ratio=ratio, **options))
    pruner.statistics, pruner.calibration_data = statistics, data
    plan = pruner.plan()
    return pruner.apply(plan), plan


@torch.no_grad()
def zero_and_compensate(
    model,
    statistics: AtomicStatistics,
    kept: Mapping[str, list[torch.Tensor]],
    grams: Mapping[str, torch.Tensor] | None = None,
    ridge: float = RIDGE,
) -> None:
    """Sets the columns of what goes to zero, in place, those that stay compensated by `grams`, by default those of the
    statistics."""
    for block in find_expert_blocks(model):
        weight, own = block.module.down_proj, statistics.blocks[block.path]
        gram = own.mean("activation_gram_sum") if grams is None else grams[block.path]
        results = compensate_experts(weight, gram, kept[block.path], own.token_count.tolist(), ridge)
        weight.zero_()
        for expert, result in enumerate(results):
            weight[expert][:, kept[block.path][expert]] = result.down_proj


@contextmanager
def restored(model) -> Iterator[None]:
    """Gives the model the weights of its experts back at the end."""
    weights = {
        block.path: [block.module.gate_up_proj.detach().clone(), block.module.down_proj.detach().clone()]
        for block in find_expert_blocks(model)
    }
    try:
        yield
    finally:
        for block in find_expert_blocks(model):
            for parameter, weight in zip((block.module.gate_up_proj, block.module.down_proj), weights[block.path]):
                parameter.data.copy_(weight)


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


@dataclass
class Evaluation:
    """The texts of `--in-domain` and `--out-of-domain`, and what the unpruned model loses on them.

    Attributes:
        domains: names of the sets of each domain.
        windows: by set.
        base: losses of the unpruned model by window, [rows] by set.
        batch_size: windows in a forward pass.
    """

    domains: dict[str, list[str]]
    windows: dict[str, Windows]
    base: dict[str, torch.Tensor]
    batch_size: int

    @classmethod
    def of(cls, args: argparse.Namespace, model, tokenizer) -> Evaluation:
        in_domain, out_of_domain = named_paths(args.in_domain), named_paths(args.out_of_domain)
        domains = {"in domain": list(in_domain), **({"out of domain": list(out_of_domain)} if out_of_domain else {})}
        windows = {
            name: evaluation_windows(path, tokenizer, args.rows, args.seq_length)
            for name, path in {**in_domain, **out_of_domain}.items()
        }
        return cls(domains, windows, window_losses(model, windows, args.batch_size), args.batch_size)

    def measure(self, model) -> dict[str, dict]:
        """`increase` by domain (fields of `Increase`), `by_set`, and the loss of each window, for a record of the results."""
        losses = window_losses(model, self.windows, self.batch_size)
        return {
            "increase": {
                domain: vars(Increase.over(losses, self.base, self.windows, sets))
                for domain, sets in self.domains.items()
            },
            "by_set": {name: float((losses[name] - self.base[name]).mean()) for name in losses},
            "losses": {name: loss.tolist() for name, loss in losses.items()},
        }

    def measured_on(self) -> dict[str, dict]:
        """What all records of a file share."""
        return {
            "domains": self.domains,
            "unpruned_loss": {name: float(losses.mean()) for name, losses in self.base.items()},
            "rows": {name: len(losses) for name, losses in self.base.items()},
            "documents": {name: int(rows.document.max()) + 1 for name, rows in self.windows.items()},
        }


@dataclass
class Results:
    """Records of a benchmark, each of one row (its `method`) and ratio; written after each record, with their table.

    Attributes:
        output: path without ending; `.json` has everything and `.md` the table.
        about: what all records share.
        methods: names of rows in the order of the table.
        columns: by name of a value in the records, how it is formatted: further columns, one for each ratio.
        records: `method`, `ratio`, `increase` by domain, and what else the benchmark knows.
    """

    output: str
    about: dict
    methods: list[str]
    columns: dict[str, str] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)

    def resume(self) -> None:
        """Takes the records of an earlier run, if there was one, on the same model and texts."""
        path = Path(f"{self.output}.json")
        if not path.is_file():
            return
        earlier = json.loads(path.read_text())
        shared = ("calibration", "rows", "documents")
        if any(earlier.get(part) != self.about.get(part) for part in shared):
            raise SystemExit(f"{path}: measured on another model or other data; --output names another file")
        self.records = earlier["records"]

    def has(self, method: str, ratio: float) -> bool:
        return any((record["method"], record["ratio"]) == (method, ratio) for record in self.records)

    def add(self, **record) -> None:
        """Prints one record and writes all."""
        found = "  ".join(f"{domain} {Increase(**increase)}" for domain, increase in record["increase"].items())
        print(f"{record['method']:40s} {record['ratio']:.0%}  {found}", flush=True)
        self.records.append(record)
        place = {method: number for number, method in enumerate(self.methods)}
        self.records.sort(key=lambda record: place.get(record["method"], len(place)))
        Path(f"{self.output}.json").write_text(json.dumps({**self.about, "records": self.records}, indent=1) + "\n")
        Path(f"{self.output}.md").write_text(self.markdown())

    def markdown(self) -> str:
        """A row for each method, a column for each domain and ratio, and then those of `columns`."""
        ratios = sorted({record["ratio"] for record in self.records})
        pairs = [(domain, ratio) for domain in self.about["domains"] for ratio in ratios]
        header = [f"{domain}, {ratio:.0%}" for domain, ratio in pairs]
        header += [f"{name.replace('_', ' ')}, {ratio:.0%}" for name in self.columns for ratio in ratios]
        lines = ["| method | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
        for method in dict.fromkeys(record["method"] for record in self.records):
            found = {record["ratio"]: record for record in self.records if record["method"] == method}
            cells = [
                str(Increase(**found[ratio]["increase"][domain])) if ratio in found else "" for domain, ratio in pairs
            ]
            cells += [
                format(found[ratio][name], form) if ratio in found else ""
                for name, form in self.columns.items()
                for ratio in ratios
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"
