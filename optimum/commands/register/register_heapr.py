# Licensed under the Apache License, Version 2.0
"""Makes `optimum-cli heapr` known. Optimum imports this file at every start of `optimum-cli`, so it imports nothing heavy.

There is no `__init__.py` here or above: `optimum.commands.register` is a namespace that Optimum's plugins share (PEP 420).
"""

from optimum_heapr.cli import HeaprCommand


REGISTER_COMMANDS = [HeaprCommand]
