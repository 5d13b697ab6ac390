# Licensed under the Apache License, Version 2.0
"""The parser of `optimum-cli`, for tools that make completions for shells out of a parser, as shtab does.

Optimum makes its parser where it runs a command, so that nothing else can have it; this one is made in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum.commands.base import RootOptimumCLICommand

from optimum.commands import optimum_cli


if TYPE_CHECKING:
    from argparse import ArgumentParser


def parser() -> ArgumentParser:
    """What `optimum-cli` parses its arguments with: the commands of Optimum, and of the plugins that are installed."""
    root = RootOptimumCLICommand("optimum-cli")
    for command in optimum_cli.OPTIMUM_CLI_ROOT_SUBCOMMANDS:
        optimum_cli.register_optimum_cli_subcommand(command, parent_command=root)
    found = optimum_cli.load_optimum_namespace_cli_commands()
    parents = optimum_cli.resolve_command_to_command_instance(root, [parent for _, parent in found if parent])
    for command, parent in found:
        optimum_cli.register_optimum_cli_subcommand(command, parent_command=parents.get(parent, root))
    return root.parser
