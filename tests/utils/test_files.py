# Licensed under the Apache License, Version 2.0
"""Output is old or new, never torn: kills and errors at every step of a write.

Kills are real: a forked child ends itself with SIGKILL at a chosen step, and the parent looks at what is left.
"""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from optimum_heapr.utils import files
from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.files import replace_file, replace_folder, write_json
from tests.utils.folders import folder_content, written_folder


pytestmark = pytest.mark.forks
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried in a forked child")


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


# What a kill left


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
