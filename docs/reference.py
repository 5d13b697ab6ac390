# Licensed under the Apache License, Version 2.0
"""Reference documentation out of the code: `[[autodoc]] NAME` lines become what docstrings say, commands become tables.

Docstrings are Markdown in the style of Hugging Face, pages are theirs as well, so that their doc-builder reads them as they
are. For the site, both become the Markdown that Sphinx reads (MyST). Needs the package, but not Sphinx.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import optimum_heapr


PACKAGE = optimum_heapr.__name__
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")

_AUTODOC = re.compile(r"^\[\[autodoc\]\] (?P<name>\S+)\n(?P<members>(?: +- \w+\n)*)", re.MULTILINE)
_REFERENCE = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\](?![(\[])")
_PAGE = re.compile(r"`docs/source/(?P<page>[\w/]+\.md)`")
_SECTION = re.compile(rf"^(?P<section>{'|'.join(SECTIONS)}):\n(?P<items>(?:(?: .*)?(?:\n|\Z))+)", re.MULTILINE)
_ITEM = re.compile(r"^(?P<names>[\w, *]+?)(?: \((?P<type>(?:`[^`]*`|[^`()])+)\))?:\s+(?P<text>\S.*)$", re.DOTALL)


def page_as_myst(text: str) -> str:
    """A page in the style of Hugging Face as MyST: its `[[autodoc]]` lines and its references to objects.

    Raises:
        LookupError: if something that it names does not exist.
    """
    return _AUTODOC.sub(lambda match: autodoc(match["name"], re.findall(r"\w+", match["members"])), _linked(text))


def documented_names(text: str) -> list[str]:
    """What the `[[autodoc]]` lines of a page name."""
    return [match["name"] for match in _AUTODOC.finditer(text)]


def autodoc(name: str, members: Iterable[str] = ()) -> str:
    """A class with its public methods and properties, or a function, as MyST directives.

    Args:
        name (`str`): path below the package, such as `hub.push.push_folder`.
        members (`Iterable[str]`): methods of a class, in place of all that are public and have a docstring.

    Raises:
        LookupError: if there is no such object, or it has no docstring.
    """
    thing = find(name)
    home = canonical_name(thing)
    public = f"{PACKAGE}.{name}" if name in optimum_heapr.__all__ else home
    if not inspect.isclass(thing):
        return _directive("function", public + _signature(thing), home, _docstring(thing))
    named = [member for member in members if member != "all"] or [
        member for member, value in vars(thing).items() if not member.startswith("_") and _is_documented(value)
    ]
    parts = [_docstring(thing), *(_member(thing, member) for member in named)]
    return _directive("class", public + _signature(thing), home, "\n".join(parts), fence="::::")


def canonical_name(thing: Any) -> str:
    """Where an object is defined, as a dotted path."""
    function = thing.fget if isinstance(thing, property) else thing
    return f"{function.__module__}.{function.__qualname__}"


def commands_markdown() -> str:
    """The page of commands, from their parsers."""
    from optimum_heapr.cli import HeaprCommand
    from optimum_heapr.cli.base import COMMON_FLAGS

    common = [f"| `{', '.join(flags)}` | {help} |" for flags, help in COMMON_FLAGS.items()]
    parts = [
        "# Command line",
        "`optimum-cli heapr COMMAND --help` prints the same. Exit status is 2 for what a user can correct, with one line "
        "on standard error that says how, and 130 after Ctrl-C, 143 after SIGTERM.",
        "All commands take:",
        "\n".join(["| Option | |", "|---|---|", *common]),
        "With `--json` standard output is that document and nothing else, as `optimum-cli heapr plan ... --json | jq .planned_size` "
        "wants it; what went wrong is still one line on standard error. `plan`, `apply` and `prune` give the content of "
        "[`report.json`](../guides/report.md) with `planned_size`, `parameter_ratio`, the `search` of a loss, and where the "
        "`output` is; `calibrate` and `merge` what was measured on what, and the tokens of each expert; the others what their "
        "tables show, in full.",
        "This page is made from the commands by `python docs/build.py --update-commands`.",
    ]
    for subcommand in HeaprCommand.SUBCOMMANDS:
        command = subcommand.subcommand_class
        parser = argparse.ArgumentParser(command.NAME, add_help=False)
        command.parse_args(parser)
        parts += [f"## {command.NAME}", command.HELP]
        groups = [group for group in parser._action_groups if group._group_actions]
        for group in sorted(groups, key=lambda group: group.title != "Required arguments"):
            rows = [
                f"| {_flags(action)} | {_meaning(action)} |"
                for action in group._group_actions
                if action.help != argparse.SUPPRESS
            ]
            parts.append("\n".join([f"| {group.title.capitalize()} | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with what stands outside fenced code changed."""
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))


def find(name: str, scopes: Iterable[str] = (PACKAGE,)) -> Any:
    """The object at a dotted path, or at that path below one of `scopes`.

    Raises:
        LookupError: if there is none.
    """
    return pkgutil.resolve_name(_path_of(name, scopes))


def _path_of(name: str, scopes: Iterable[str]) -> str:
    for path in (name, *(f"{scope}.{name}" for scope in scopes)):
        try:
            pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError):
            continue
        return path
    raise LookupError(f"{name}: there is no such object")


def _target(name: str, scopes: Iterable[str]) -> str:
    """What a reference leads to: methods are named by the class that has them, be they inherited or not."""
    path = _path_of(name, scopes)
    owner, _, last = path.rpartition(".")
    if owner and inspect.isclass(pkgutil.resolve_name(owner)):
        return f"{canonical_name(pkgutil.resolve_name(owner))}.{last}"
    return canonical_name(pkgutil.resolve_name(path))


def _linked(text: str, scopes: Iterable[str] = (PACKAGE,)) -> str:
    """[`~a.b.C.d`] as a reference that Sphinx follows; outside the package, as code."""

    def link(match: re.Match) -> str:
        target = _target(match["name"], scopes)
        # Modules begin with a small letter: of a.b.C.d the class and its method are shown, of a.b.f the function.
        shown = re.sub(r"^(?:[a-z]\w*\.)+", "", target) if match["short"] else match["name"]
        return f"{{py:obj}}`{shown} <{target}>`" if target.startswith(f"{PACKAGE}.") else f"`{shown}`"

    return outside_code(text, lambda part: _REFERENCE.sub(link, part))


def _docstring(thing: Any, *scopes: str) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise LookupError(f"{canonical_name(thing)}: has no docstring")
    module = (thing.fget if isinstance(thing, property) else thing).__module__
    text = _linked(text + "\n", [*scopes, canonical_name(thing), module, PACKAGE])
    text = _PAGE.sub(lambda match: f"[{match['page']}](/{match['page']})", text)
    return _SECTION.sub(lambda match: _section(match["section"], textwrap.dedent(match["items"]).strip()), text)


def _section(section: str, body: str) -> str:
    """`Args:` and its kin as a list, an item an argument; indented lines go on with the item above."""
    if section in ("Returns", "Yields"):
        kind, colon, text = body.partition(":")
        return f"**{section}**: {_public(kind)}{colon}{text}\n\n"
    lines = [f"**{'Parameters' if section == 'Args' else section}**", ""]
    for item in re.split(r"\n(?=\S)", body):
        match = _ITEM.match(item)
        if match is None:
            raise LookupError(f"{section}: {item!r} is no item such as 'name (`type`): what it is'")
        names = _public(f"`{match['names']}`") if section == "Raises" else f"**{match['names']}**".replace("_", r"\_")
        kind = f" ({_public(match['type'])})" if match["type"] else ""
        lines.append(f"- {names}{kind}: {inspect.cleandoc(match['text'])}".replace("\n", "\n  "))
    return "\n".join(lines) + "\n\n"


def _public(text: str) -> str:
    """Public names of the package that stand for a type, as references."""
    names = "|".join(optimum_heapr.__all__)
    return re.sub(rf"`({names})`", rf"{{py:obj}}`\1 <{PACKAGE}.\1>`", text)


def _member(owner: type, name: str) -> str:
    value, home = inspect.getattr_static(owner, name), f"{canonical_name(owner)}.{name}"
    if isinstance(value, property):
        return _directive("property", name, home, _docstring(value, canonical_name(owner)))
    method = getattr(owner, name)
    option = {classmethod: [":classmethod:"], staticmethod: [":staticmethod:"]}.get(type(value), [])
    return _directive("method", name + _signature(method), home, _docstring(method, canonical_name(owner)), *option)


def _directive(kind: str, heading: str, home: str, body: str, *options: str, fence: str = ":::") -> str:
    """One of Sphinx's directives for objects; `home` is where it is defined, for references that name it so."""
    return "\n".join([f"{fence}{{py:{kind}}} {heading}", f":canonical: {home}", *options, "", body.strip(), fence, ""])


def _signature(thing: Any) -> str:
    if isinstance(thing, type) and issubclass(thing, Exception):
        return ""  # made from a message, like any other
    signature = inspect.signature(thing)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _is_documented(value: Any) -> bool:
    return isinstance(value, (FunctionType, classmethod, staticmethod, property)) and bool(inspect.getdoc(value))


def _flags(action: argparse.Action) -> str:
    name = action.dest.upper()
    if not action.option_strings:
        return f"`{name}`"
    flags = ", ".join(action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return f"`{flags}`"
    return f"`{flags} {name if _choices(action) else action.metavar or name}`"


def _meaning(action: argparse.Action) -> str:
    text, choices = (action.help or "").replace("%(default)s", str(action.default)), _choices(action)
    text = text.replace("(default: None)", "").strip()
    if choices:
        text += "; one of " + ", ".join(f"`{choice}`" for choice in choices)
    return text.replace("|", r"\|")


def _choices(action: argparse.Action) -> list[str]:
    """What a flag may be: its choices or, where the configuration checks them, what stands in their place in the help."""
    shown = re.fullmatch(r"\{(.+)\}", str(action.metavar))
    return shown[1].split(",") if shown else list(action.choices or [])
