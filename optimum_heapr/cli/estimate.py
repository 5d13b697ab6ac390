# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr estimate`: sizes at each ratio and what calibrating takes, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import HeaprSubcommand
from .options import add_config_options, check_dtype, config_from, number


if TYPE_CHECKING:
    from ..estimate import Estimate


class EstimateCommand(HeaprSubcommand):
    NAME = "estimate"
    HELP = "Say what a model would weigh at each ratio, and what calibrating takes, from its config.json alone."

    @staticmethod
    def parse_args(parser):
        parser.add_argument(
            "-m",
            "--model",
            required=True,
            help="folder with a config.json, name on the Hub, or 'demo'; no weights are read",
        )
        parser.add_argument(
            "--ratios", nargs="+", type=number, metavar="RATIO", help="shares to remove (default: .1 to .8)"
        )
        parser.add_argument(
            "--memory-of-gpu", metavar="SIZE", help="say which ratio fits into it with a tenth left over, e.g. 24GB"
        )
        parser.add_argument(
            "--tflops",
            type=number,
            help="10^12 operations a second, for the time that calibrating takes; with --bandwidth",
        )
        parser.add_argument(
            "--bandwidth",
            type=number,
            metavar="GB/S",
            help="10^9 bytes a second at which weights are read; with --tflops",
        )
        parser.add_argument("--dtype", default="auto", help="weights' dtype (default: what the configuration says)")
        parser.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
        names = (
            "num_samples",
            "seq_length",
            "batch_size",
            "criterion",
            "statistics",
            "compensate",
            "compensation_scope",
        )
        add_config_options(
            parser, (*names, "width_multiple", "align_for", "tensor_parallel"), title="What is asked for"
        )

    def execute(self) -> Any:
        from ..utils.sizes import parse_size

        args = self.args
        config = config_from(args)
        check_dtype(args.dtype)
        memory = parse_size("memory_of_gpu", args.memory_of_gpu) if args.memory_of_gpu else None
        from ..estimate import RATIOS, estimate

        hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        found = estimate(
            args.model,
            config,
            tuple(args.ratios or RATIOS),
            memory,
            args.tflops,
            args.bandwidth,
            args.dtype,
            **{name: value for name, value in hub.items() if value},
        )
        self.show(estimate_text(found))
        return found.to_dict()


def estimate_text(found: Estimate) -> str:
    """Three tables: the model, its sizes at each ratio, and the ways to calibrate."""
    from ..report.numbers import count, size
    from .tables import table

    experts = ", ".join(f"{number} experts of {width} in {layers} layers" for number, width, layers in found.experts)
    stored = f", stored as {size(found.stored_bytes)}" if found.stored_bytes else ""
    share = found.routed_parameters / found.size.parameters
    lines = [
        f"{found.model}: {found.size.parameters:,} parameters, {count(found.size.active_parameters)} active a token, "
        f"{size(found.size.weight_bytes)} in {found.dtype}{stored}; {experts}, {share:.1%} of the parameters",
        "",
    ]
    least = {layout: fits for layout, fits in found.fitting.items() if fits is not None}
    rows = [
        [
            at.layout,
            f"{at.ratio:.1%}",
            at.width or "each its own",
            count(at.parameters),
            count(at.active_parameters),
            size(at.weight_bytes),
            *(
                ["fits" if at.layout in least and at.ratio >= least[at.layout].ratio else "no"]
                if found.fitting
                else []
            ),
        ]
        for at in sorted({*found.pruned, *least.values()}, key=lambda at: (at.layout, at.ratio))
    ]
    header = ["layout", "removed", "width", "parameters", "active", "weights", *(["memory"] if found.fitting else [])]
    lines += [table(header, rows), ""]
    lines += [f"layout={layout}: does not fit at any ratio" for layout in found.fitting if layout not in least]
    timed = any(way.seconds is not None for way in found.calibration)
    rows = [
        [
            way.mode,
            size(way.weights),
            size(way.statistics),
            size(way.activations),
            size(way.layer_inputs) if way.layer_inputs else "",
            size(way.bytes_read),
            f"{way.flops / 1e15:,.3g}",
            *([f"{way.seconds / 60:,.1f} min"] if timed else []),
        ]
        for way in found.calibration
    ]
    header = [
        "--memory",
        "weights at once",
        "statistics",
        "activations",
        "layer inputs",
        "weights read",
        "PFLOP",
        *(["time"] if timed else []),
    ]
    return "\n".join([*lines, table(header, rows)])
