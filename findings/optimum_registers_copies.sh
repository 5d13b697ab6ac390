#!/usr/bin/env bash
# optimum 2.3.0: `optimum-cli` registers a plugin's command once for each folder that a copy of the plugin lies in.
#
# Expected: a plugin that is installed and also lies on PYTHONPATH is one command, as it is one module for Python.
# Seen: `load_optimum_namespace_cli_commands` goes through the folders of the namespace `optimum.commands.register`, imports
# the module of that name for each, which is the first one every time, and returns its commands again. From Python 3.11 on,
# argparse then refuses every call of optimum-cli ("conflicting subparser"); before, it lists the command twice.
# Here: the class of the command registers itself only where its name is free.
#
# Output:
#   2 commands of one class: ['hello', 'hello']
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder/site" optimum==2.3.0 packaging==26.2
for copy in installed checkout; do
    mkdir -p "$folder/$copy/optimum/commands/register"
    cat >"$folder/$copy/optimum/commands/register/register_hello.py" <<'EOF'
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class HelloCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="hello", help="Says hello.")


REGISTER_COMMANDS = [HelloCommand]
EOF
done
PYTHONPATH="$folder/site:$folder/checkout:$folder/installed" python3 - <<'EOF'
from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands

commands = [command for command, _ in load_optimum_namespace_cli_commands() if command.COMMAND.name == "hello"]
print(f"{len(commands)} commands of one class: {[command.COMMAND.name for command in commands]}")
assert len(commands) == 2 and len(set(commands)) == 1
EOF
