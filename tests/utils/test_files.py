# Licensed under the Apache License, Version 2.0
"""Output is old or new, never torn: kills and errors at every step of a write, and the rules of overwriting.

Kills are real: a forked child ends itself with SIGKILL at a chosen step, and the parent looks at what is left.
"""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_heapr.utils import files
from optimum_heapr.utils.artefacts import artefact_format, check_output_artefact, read_artefact, write_artefact
from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.files import (
    beside,
    check_output_file,
    check_output_folder,
    replace_file,
    replace_folder,
    write_json,
)
from optimum_heapr.utils.manifest import MANIFEST


pytestmark = pytest.mark.forks
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried in a forked child")

# No user may create anything here, not even root, whom permissions do not bind.
UNWRITABLE = Path("/proc/1/heapr")
needs_proc = pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="needs a folder that nobody can write to")


def killed_at(step, action):
    """Runs `action` in a child that kills itself before its `step`-th system call that changes names or flushes.

    Returns:
        `bool`: whether the child got as far as that step; `False` means that the action was over before.
    """
    child = os.fork()
    if child == 0:
        try:
            left = [step]

            def dying(function):
                def wrapper(*args, **kwargs):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return wrapper

            for name in ("replace", "fsync", "chmod", "unlink", "rmdir", "mkdir"):
                setattr(os, name, dying(getattr(os, name)))
            files._exchange = dying(files._exchange)
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


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


# Files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with replace_file(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent
    with replace_file(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        with replace_file(path) as temporary:
            temporary.write_text("ne")
            raise error
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@needs_fork
@pytest.mark.parametrize("existed", [True, False])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, existed):
    new, seen = "new " * 10_000, set()
    for step in range(50):
        path = tmp_path / str(step) / "file"
        path.parent.mkdir()
        if existed:
            path.write_text("old")

        def action():
            with replace_file(path) as temporary:
                temporary.write_text(new)

        killed = killed_at(step, action)
        content = path.read_text() if path.exists() else None
        assert content in (new, "old" if existed else None)
        seen.add(content)
        if not killed:
            assert content == new
            break
    else:
        pytest.fail("the write never ended")
    assert len(seen) == 2 and step >= 2, "no kill came before the new file was there"


@needs_fork
def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def action():
        with replace_file(path) as temporary:
            temporary.write_text("half of the ne")
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed_at(10**6, action)
    assert path.read_text() == "old"


def test_a_new_file_has_the_permissions_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "file", {})
        with replace_folder(tmp_path / "folder") as temporary:
            (temporary / "x").touch()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_data_is_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    write_json(tmp_path / "file", {})
    with replace_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
        (temporary / "below").mkdir()
        (temporary / "below" / "b").write_text("b")
    assert calls == ["fsync", "replace", "fsync", "fsync", "fsync", "replace"]  # the list of files is the third


def test_json_is_written_as_it_reads(tmp_path):
    content = {"ratio": 0.25, "dataset": "Wörterbuch", "widths": [1, 2]}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content and "Wörterbuch" in text and text.endswith("}\n")


@needs_proc
def test_a_place_that_cannot_be_written_is_refused_in_one_line():
    for write in (
        lambda: write_json(UNWRITABLE / "file.json", {}),
        lambda: replace_folder(UNWRITABLE / "folder").__enter__(),
        lambda: write_artefact(UNWRITABLE / "a.safetensors", "heapr_plan", {}, {}),
    ):
        with pytest.raises(HeaprError, match=r"output='/proc/1/heapr/.*name a folder you own") as error:
            write()
        assert "\n" not in str(error.value)
    assert not UNWRITABLE.exists()


# Folders


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "above" / "folder"
    with replace_folder(path) as temporary:
        (temporary / "a").write_text("new")
        assert not path.exists() and temporary.parent == path.parent
    assert folder_content(path) == {"a": "new"}
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename_aside"])
@pytest.mark.parametrize("filled", [True, False])
def test_an_old_folder_is_replaced_and_not_merged(tmp_path, monkeypatch, filled, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    path = tmp_path / "folder"
    written_folder(path, old="old") if filled else path.mkdir()
    with replace_folder(path, overwrite=filled) as temporary:
        (temporary / "a").write_text("new")
        assert folder_content(path) == ({"old": "old"} if filled else {})
    assert folder_content(path) == {"a": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error, existed):
    path = tmp_path / "folder"
    if existed:
        written_folder(path, old="old")
    with pytest.raises(error):
        with replace_folder(path, overwrite=True) as temporary:
            (temporary / "a").write_text("new")
            raise error
    assert [entry.name for entry in tmp_path.iterdir()] == (["folder"] if existed else [])
    assert not existed or folder_content(path) == {"old": "old"}


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupt_between_the_renames_brings_the_old_folder_back(tmp_path, monkeypatch, failing):
    """Where two folders cannot be exchanged in one step."""
    path, calls, replace = written_folder(tmp_path / "folder", old="old"), [], os.replace

    def interrupted(*args):
        calls.append(args)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with replace_folder(path, overwrite=True) as temporary:
            (temporary / "a").write_text("new")
    assert folder_content(path) == {"old": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@needs_fork
@pytest.mark.parametrize("existed", ["filled", "empty", "absent"])
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path, existed):
    first, second = tmp_path / "x", tmp_path / "y"
    first.mkdir(), second.mkdir()
    if existed == "filled" and not files._exchange(first, second):
        pytest.skip("this system cannot exchange two folders in one step")
    old = {"filled": {"a": "old", "b/c": "old"}, "empty": {}, "absent": None}[existed]
    new, seen = {"a": "new", "b/d": "new"}, []
    for step in range(100):
        path = tmp_path / str(step) / "folder"
        path.parent.mkdir()
        if old:
            written_folder(path, **{name.replace("/", "__"): content for name, content in old.items()})
        if existed == "empty":
            path.mkdir()

        def action():
            with replace_folder(path, overwrite=True) as temporary:
                for name, content in new.items():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / name).write_text(content)

        killed = killed_at(step, action)
        content = folder_content(path) if path.exists() else None
        assert content in (old, new), f"step {step}"
        seen.append(content == new)
        if not killed:
            assert content == new
            break
    else:
        pytest.fail("the write never ended")
    assert seen == sorted(seen) and not seen[0], "once the new folder is there it stays"


def test_a_folder_that_filled_up_in_the_meantime_is_not_deleted(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(HeaprError, match="folder is not empty"):
        with replace_folder(path) as temporary:
            (temporary / "a").write_text("new")
            path.mkdir()
            (path / "mine").write_text("somebody else's")
    assert folder_content(path) == {"mine": "somebody else's"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    written_folder(tmp_path / "real", old="old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replace_folder(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert folder_content(tmp_path / "real") == {"a": "new"}


def test_the_current_folder_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with replace_folder(".") as temporary:
        (temporary / "a").write_text("new")
    monkeypatch.chdir(tmp_path)
    assert folder_content(tmp_path / "here") == {"a": "new"}


# The rules of overwriting


def test_a_filled_folder_needs_overwrite(tmp_path):
    old = written_folder(tmp_path / "old", file="x")
    with pytest.raises(HeaprError, match=r"output='.*': folder is not empty; name another or pass overwrite=True"):
        check_output_folder(old)
    with pytest.raises(HeaprError, match="folder is not empty"):
        replace_folder(old).__enter__()
    check_output_folder(old, overwrite=True)
    check_output_folder(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")
    assert not (tmp_path / "new").exists(), "a check creates nothing"


@pytest.mark.parametrize("name", ["paper.tex", ".git/HEAD", "sub/deep/notes", "heapr/notes.txt"])
def test_what_somebody_else_put_into_a_folder_is_not_replaced(tmp_path, name):
    folder = written_folder(tmp_path / "out", weights="old", sub__more="old")
    check_output_folder(folder, overwrite=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = folder_content(folder)
    for overwrite in (True, False):
        with pytest.raises(HeaprError, match=f"holds '{name}', which this package has no record of writing") as error:
            replace_folder(folder, overwrite).__enter__()
        assert "\n" not in str(error.value)
    assert folder_content(folder) == before


def test_a_link_that_somebody_else_put_into_a_folder_is_not_removed(tmp_path):
    folder = written_folder(tmp_path / "out", weights="old")
    (tmp_path / "mine").mkdir()
    (folder / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(HeaprError, match="holds 'link'"):
        check_output_folder(folder, overwrite=True)


@pytest.mark.parametrize("name", ["README.md", "sub/more", "model.safetensors"])
def test_what_was_changed_since_is_not_replaced(tmp_path, name):
    files = {"README.md": "card", "sub__more": "old", "model.safetensors": "weights"}
    folder = written_folder(tmp_path / "out", **files)
    check_output_folder(folder, overwrite=True)
    (folder / name).write_text("mine")
    with pytest.raises(
        HeaprError, match=f"holds '{name}', which was changed after this package wrote it; move that away"
    ):
        check_output_folder(folder, overwrite=True)
    assert (folder / name).read_text() == "mine"


def test_a_large_file_is_looked_into_all_over(tmp_path):
    with replace_folder(tmp_path / "out") as temporary:
        (temporary / "model.safetensors").write_bytes(bytes(20 * 2**20))
    check_output_folder(tmp_path / "out", overwrite=True)
    weights = bytearray(20 * 2**20)
    weights[::4096] = b"1" * len(weights[::4096])  # trained: of the same size
    (tmp_path / "out" / "model.safetensors").write_bytes(weights)
    with pytest.raises(HeaprError, match="holds 'model.safetensors', which was changed"):
        check_output_folder(tmp_path / "out", overwrite=True)


def test_a_record_of_names_alone_is_read(tmp_path):
    folder = written_folder(tmp_path / "out", weights="old")
    (folder / MANIFEST).write_text('["weights"]')
    (folder / "weights").write_text("new")
    check_output_folder(folder, overwrite=True)


@pytest.mark.parametrize("output", ["out", "out/", "./out", "."])
def test_what_stands_beside_an_output_is_outside_it(output, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out" if output == "." else tmp_path)
    assert beside(output, ".state").absolute() == tmp_path / "out.state"


@pytest.mark.parametrize("record", [None, "{torn", "3", "[[1]]", "[" * 100_000], ids=repr)
def test_a_folder_without_a_readable_record_is_not_replaced(tmp_path, record):
    folder = written_folder(tmp_path / "out", weights="old")
    (folder / MANIFEST).unlink() if record is None else (folder / MANIFEST).write_text(record)
    with pytest.raises(HeaprError, match="has no record of writing"):
        check_output_folder(folder, overwrite=True)


def test_of_files_only_artefacts_are_replaced(tmp_path):
    for name, content in (("paper.tex", b"mine"), ("torn", (80).to_bytes(8, "little") + b'{"__metadata__":{"form')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HeaprError, match=f"{name}': is not a statistics file or plan"):
            check_output_artefact(tmp_path / name, overwrite=True)
    (tmp_path / "empty").touch()
    write_artefact(tmp_path / "plan", "heapr_plan", {}, {})
    for name in ("new", "empty", "plan"):
        check_output_artefact(tmp_path / name, overwrite=True)
    with pytest.raises(HeaprError, match="file exists; name another or pass overwrite=True"):
        check_output_artefact(tmp_path / "plan")


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for overwrite in (True, False):
        with pytest.raises(HeaprError, match=r"output='.*file': is a file; name a folder"):
            check_output_folder(tmp_path / "file", overwrite)
        with pytest.raises(HeaprError, match=r"output='.*': is a folder; name a file"):
            check_output_file(tmp_path, overwrite)


def test_an_existing_file_needs_overwrite(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HeaprError, match=r"output='.*file': file exists; name another or pass overwrite=True"):
        check_output_file(tmp_path / "file")
    check_output_file(tmp_path / "file", overwrite=True)
    check_output_file(tmp_path / "new" / "file")
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("check", [check_output_file, check_output_folder])
def test_a_place_below_a_file_is_refused(tmp_path, check):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HeaprError, match="is not writable .*; name a folder you own"):
        check(tmp_path / "file" / "below")


@pytest.mark.parametrize("check", [check_output_file, check_output_folder])
def test_a_folder_without_write_access_is_refused(tmp_path, check, monkeypatch):
    """The answer of the system is made up, as it lets root write everywhere."""

    def denied(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(HeaprError, match=r"is not writable \(Permission denied\); name a folder you own"):
        check(tmp_path / "new")


@pytest.mark.parametrize("check", [check_output_file, check_output_folder])
def test_a_place_that_takes_no_files_is_refused_before_any_work(check):
    if not Path("/proc/self").exists():
        pytest.skip("needs a file system that takes no files")
    with pytest.raises(HeaprError, match=r"'/proc' is not writable"):
        check(Path("/proc/new"))


# Artefacts


def test_an_artefact_says_what_it_is(tmp_path):
    import torch

    path = tmp_path / "a.safetensors"
    write_artefact(path, "heapr_plan", {"x": torch.arange(3).flip(0)[::2]}, {"blocks": ["a", "ü"]})
    tensors, document = read_artefact(path, "heapr_plan")
    assert tensors["x"].tolist() == [2, 0] and document == {"blocks": ["a", "ü"]}
    assert artefact_format(path) == "heapr_plan"
    with pytest.raises(HeaprError, match="holds 'heapr_plan' data, not 'heapr_statistics'"):
        read_artefact(path, "heapr_statistics")


def test_tensors_that_share_memory_are_written(tmp_path):
    """The accumulators of a block are rows of one tensor."""
    import torch

    first, second = torch.arange(6.0).view(2, 3)
    write_artefact(tmp_path / "a", "heapr_plan", {"first": first, "second": second}, {})
    tensors, _ = read_artefact(tmp_path / "a", "heapr_plan")
    assert tensors["first"].tolist() == [0, 1, 2] and tensors["second"].tolist() == [3, 4, 5]


def test_the_kind_of_a_foreign_or_torn_file_is_unknown(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert artefact_format(tmp_path / "model.safetensors") is None
    (tmp_path / "torn").write_bytes((tmp_path / "model.safetensors").read_bytes()[:20])
    with pytest.raises(HeaprError, match="truncated or not a safetensors file"):
        artefact_format(tmp_path / "torn")
    with pytest.raises(HeaprError, match="no such file; name a statistics file, a plan or a pruned model"):
        artefact_format(tmp_path / "missing")


HALF_WRITTEN = """
import sys, time
from optimum_heapr.utils import files

with getattr(files, sys.argv[1])(sys.argv[2]) as temporary:
    (temporary / "weights" if temporary.is_dir() else temporary).write_text("half")
    print("written", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path, replace):
    """And nothing else: neither what another output's run left, nor what a living run writes."""
    others = [tmp_path / name for name in (".out.tmp", ".out.abcdefgh.old", ".out.abc.tmp", ".out2.abcdefgh.tmp")]
    for other in others:
        other.mkdir() if replace is replace_folder else other.touch()
    arguments = [sys.executable, "-c", HALF_WRITTEN, replace.__name__, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "written\n"
            (half,) = set(tmp_path.iterdir()) - set(others)
            with replace(tmp_path / "out"):
                assert half.exists()  # its process lives
        finally:
            process.kill()
    assert half.exists()
    with replace(tmp_path / "out", **({"overwrite": True} if replace is replace_folder else {})):
        assert not half.exists()
    assert set(tmp_path.iterdir()) == {tmp_path / "out", *others}
