# Licensed under the Apache License, Version 2.0
"""Folders that this package wrote, and what is in them."""

from optimum_heapr.utils.files import replace_folder
from optimum_heapr.utils.manifest import MANIFEST


def folder_content(path):
    """By name, without the list of files that a written folder has."""
    files = {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}
    files.pop(MANIFEST, None)
    return files


def written_folder(path, **files):
    """A folder that this package wrote; `__` in a name stands for `/`."""
    with replace_folder(path) as temporary:
        for name, content in files.items():
            (temporary / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name.replace("__", "/")).write_text(content)
    return path
