# Licensed under the Apache License, Version 2.0
"""`optimum-cli heapr`: one file a command. Only argument parsing is imported before a command runs."""

from argparse import Action

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .apply import ApplyCommand
from .base import one_line_errors
from .calibrate import CalibrateCommand
from .demo import DemoCommand
from .estimate import EstimateCommand
from .evaluate import EvaluateCommand
from .families import FamiliesCommand
from .frontier import FrontierCommand
from .inspect import InspectCommand
from .merge import MergeCommand
from .plan import PlanCommand
from .prune import PruneCommand
from .recover import RecoverCommand


class HeaprCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="heapr", help="Prune Mixture-of-Experts models at the granularity of atomic experts.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=command.NAME, help=command.HELP, subcommand_class=command)
        for command in (
            EstimateCommand,
            CalibrateCommand,
            MergeCommand,
            FrontierCommand,
            PlanCommand,
            ApplyCommand,
            PruneCommand,
            RecoverCommand,
            EvaluateCommand,
            InspectCommand,
            FamiliesCommand,
            DemoCommand,
        )
    )

    def __init__(self, subparsers, args=None, command=None, from_defaults_factory=False, parser=None):
        if not from_defaults_factory and self.COMMAND.name in subparsers.choices:
            # Optimum registers the commands of every copy of a plugin that it can import, as where an installed package
            # also lies on PYTHONPATH. The second stands for what the first registered.
            from_defaults_factory, parser = True, subparsers.choices[self.COMMAND.name]
        super().__init__(subparsers, args, command, from_defaults_factory, parser)
        if not from_defaults_factory:
            one_line_errors(self.parser, lambda: self.subparsers.choices)

    @staticmethod
    def parse_args(parser):
        parser.add_argument("--version", action=_Version, nargs=0, help="print the version of optimum-heapr, and exit")


class _Version(Action):
    """Prints the version of the package; it is looked up when it is asked for."""

    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(version("optimum-heapr"))
        parser.exit()
