# Licensed under the Apache License, Version 2.0
"""What an output may take the place of, and what is refused before any work is done for it."""

from pathlib import Path

import pytest

from optimum_heapr.utils.artefacts import write_artefact
from optimum_heapr.utils.errors import HeaprError
from optimum_heapr.utils.files import beside, check_output_file, check_output_folder, replace_folder, write_json
from optimum_heapr.utils.manifest import MANIFEST
from tests.utils.folders import folder_content, written_folder


# No user may create anything here, not even root, whom permissions do not bind.
UNWRITABLE = Path("/proc/1/heapr")
needs_proc = pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="needs a folder that nobody can write to")


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
