# Licensed under the Apache License, Version 2.0
"""Runs the suite with a named set of versions, in an environment of its own.

    python tests/versions/run.py lowest|constraints|newest FOLDER [--python python3.10] [arguments of pytest]

`lowest` is what setup.cfg names, `constraints` what constraints.txt names, `newest` what pip finds today. The environment is
made in FOLDER, once; a second run brings it up to date. Which build of torch that is, the settings of pip say.
"""

import argparse
import configparser
import re
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("test", "eval", "docs")
SHOWN = "torch|transformers|tokenizers|optimum|accelerate|peft|datasets|evaluate|safetensors|huggingface[-_]hub|lm[-_]eval|pytest|sphinx"


def lowest(settings: str) -> list[str]:
    """The lower bounds of a setup.cfg, as constraints; what has no bound is left to pip."""
    parser = configparser.ConfigParser()
    parser.read_string(settings)
    requirements = parser["options"]["install_requires"]
    requirements += "".join(parser["options.extras_require"][extra] for extra in EXTRAS)
    bounds = re.findall(r"^([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", requirements, re.MULTILINE)
    return [f"{name}=={version}" for name, version in bounds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=("lowest", "constraints", "newest"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="what the environment is made with")
    arguments, pytest_arguments = parser.parse_known_args()

    python = arguments.folder.absolute() / "bin" / "python"
    if not python.exists():
        subprocess.run([arguments.python, "-m", "venv", arguments.folder], check=True)
    install = [python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[{','.join(EXTRAS)}]"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        if arguments.versions == "newest":
            install += ["--upgrade", "--upgrade-strategy", "eager"]
        elif arguments.versions == "constraints":
            install += ["-c", ROOT / "constraints.txt"]
        else:
            file.write("\n".join(lowest((ROOT / "setup.cfg").read_text(encoding="utf-8"))))
            file.flush()
            install += ["-c", file.name]
        subprocess.run(install, check=True)

    subprocess.run([python, "--version"], check=True)
    listed = subprocess.run([python, "-m", "pip", "freeze"], check=True, stdout=subprocess.PIPE, text=True).stdout
    print("\n".join(re.findall(rf"^(?:{SHOWN})==.*$", listed, re.MULTILINE)), flush=True)
    return subprocess.run([python, "-m", "pytest", *pytest_arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
