"""Atomic writes: a folder gets all new files, or none. Links that may leave a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keras_vaultgemma._files import check_link, new_folder

pytestmark = pytest.mark.any_backend


def content(folder):
    """{path: bytes} of every file in a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def texts(folder):
    return {name: text.decode() for name, text in content(folder).items()}


OLD = {"config.json": "old", "notes.txt": "mine", "model.weights.h5": "old weights"}
NEW = {
    "assets/tokenizer/vocabulary.spm": "pieces",
    "config.json": "new",
    "model.weights.h5": "new weights",
}


def test_a_new_folder_appears_complete(tmp_path):
    target = tmp_path / "saved"
    with new_folder(target) as folder:
        write(folder, NEW)
        assert not target.exists()
    assert texts(target) == NEW
    assert os.listdir(tmp_path) == ["saved"]
    os.mkdir(tmp_path / "usual")
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    target = tmp_path / "saved"
    write(target, OLD)
    with new_folder(str(target)) as folder:
        assert not os.listdir(folder)
        write(folder, NEW)
        assert texts(target) == OLD
    assert texts(target) == {"notes.txt": "mine", **NEW}
    assert os.listdir(tmp_path) == ["saved"]


def test_a_relative_folder_and_a_link_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for target in ("new", ".", "link"):
        with new_folder(target) as folder:
            write(folder, {f"{target}.txt": target})
    assert texts(tmp_path / "new") == {"new.txt": "new"}
    assert texts(tmp_path / "real") == {"link.txt": "link"}
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "..txt").read_text() == "."


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_changes_if_writing_fails(tmp_path, error, exists):
    target = tmp_path / "saved"
    if exists:
        write(target, OLD)
    with pytest.raises(type(error)), new_folder(target) as folder:
        write(folder, NEW)
        raise error
    assert texts(tmp_path) == (
        {f"saved/{name}": text for name, text in OLD.items()} if exists else {}
    )
    assert os.listdir(tmp_path) == (["saved"] if exists else [])


def refuse_link(*_):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_nothing_changes_if_any_move_fails(tmp_path, monkeypatch, has_links):
    """New files, replaced ones, a new subfolder and a superseded file: each step fails once, and all are undone."""
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_link)
    old = {**OLD, "model.weights.json": "old index"}
    new = {
        "assets/a.txt": "a",
        "config.json": "new",
        "model.weights.json": "new index",
        "model_0.weights.h5": "part",
    }
    replace = os.replace
    for step in range(100):
        target = tmp_path / f"{step}/saved"
        write(target, old)
        moves = []

        def fail_at_step(source, destination, moves=moves, step=step):
            moves.append(destination)
            if len(moves) == step + 1:
                raise OSError(5, "Input/output error")
            replace(source, destination)

        monkeypatch.setattr(os, "replace", fail_at_step)
        try:
            with new_folder(target) as folder:
                write(folder, new)
        except OSError:
            assert texts(target) == old
            assert sorted(os.listdir(target)) == sorted(old)
            assert os.listdir(target.parent) == ["saved"]
        else:
            break
    assert step == (5 if has_links else 7)  # four put in, one or three set aside
    assert texts(target) == {"notes.txt": "mine", **new}


def test_no_file_is_missing_at_any_moment(tmp_path, monkeypatch):
    """After a kill at any time each file is the old or the new one, and the weights load."""
    target, moments = tmp_path / "saved", []
    replace, link = os.replace, os.link

    def note():
        found = texts(target)
        moments.append(found)
        assert all(found.get(name) in (OLD[name], NEW.get(name)) for name in OLD)

    def then_note(function):
        return lambda *args: (function(*args), note())

    monkeypatch.setattr(os, "replace", then_note(replace))
    monkeypatch.setattr(os, "link", then_note(link))
    write(target, OLD)
    with new_folder(target) as folder:
        write(folder, NEW)
    assert moments[-1] == {"notes.txt": "mine", **NEW} and len(moments) == 5
    # One file gives way to several, and is there until they are.
    with new_folder(target) as folder:
        monkeypatch.setattr(
            os, "replace", lambda *args: (replace(*args), moments.append(texts(target)))
        )
        write(folder, {"model.weights.json": "index", "model_0.weights.h5": "part"})
    several = {"model.weights.json", "model_0.weights.h5"}
    assert all("model.weights.h5" in found or several <= found.keys() for found in moments)
    assert "model.weights.h5" not in texts(target)


def test_a_folder_in_place_of_a_file_raises(tmp_path):
    old = {"a.txt": "old", "config.json/mine.txt": "mine"}
    write(tmp_path / "saved", old)
    with pytest.raises(OSError, match=r"config\.json"), new_folder(tmp_path / "saved") as folder:
        write(folder, {"a.txt": "new", "config.json": "new"})
    assert texts(tmp_path / "saved") == old
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize(
    "single, index",
    [
        ("model.weights.h5", "model.weights.json"),
        ("model.safetensors", "model.safetensors.index.json"),
    ],
)
def test_sharded_weights_supersede_a_single_file(tmp_path, single, index):
    """Loaders prefer the single file, and would silently load the old weights."""
    write(tmp_path / "saved", {single: "old", "model.bin": "other"})
    with new_folder(tmp_path / "saved") as folder:
        write(folder, {index: "new"})
    assert texts(tmp_path / "saved") == {index: "new", "model.bin": "other"}


@pytest.mark.parametrize("target", ["file", "file/saved", "file/deep/saved"])
def test_targets_that_are_files(tmp_path, target):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ValueError, match="cannot be saved to") as caught,
        new_folder(tmp_path / target),
    ):
        pytest.fail("nothing should be written")
    assert str(tmp_path / target) in str(caught.value)
    assert texts(tmp_path) == {"file": "mine"}
    assert os.listdir(tmp_path) == ["file"]


def test_missing_parents_are_created(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "config.json").write_text("{}")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/b",
        "a/b/config.json",
    ]


def test_a_parent_that_is_not_writable(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    expected = pytest.raises(PermissionError, match="saved cannot be saved to: Permission denied")
    with expected, new_folder(tmp_path / "saved"):
        pytest.fail("nothing should be written")


@pytest.mark.parametrize("obstacle", ["a mounted volume", "a parent that is not writable"])
def test_a_target_on_another_file_system_than_its_parent(tmp_path, monkeypatch, obstacle):
    target = tmp_path / "saved"
    write(target, OLD)
    if obstacle == "a mounted volume":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with new_folder(target) as folder:
        assert folder.is_relative_to(target)
        write(folder, NEW)
    assert texts(target) == {"notes.txt": "mine", **NEW}


# Killed processes

WRITE_FOREVER = """
import signal, sys, time
for ignored_under_nohup in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(ignored_under_nohup, signal.SIG_DFL)
sys.path.insert(0, sys.argv[1])
from keras_vaultgemma._files import new_folder
with new_folder(sys.argv[2], exclusive=sys.argv[3] == "True") as folder:
    (folder / "large").write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


def start_writing(target, exclusive=False):
    """A process that has begun to write a folder."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", WRITE_FOREVER, root, str(target), str(exclusive)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.stdout.close()
    return process


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path, how):
    process = start_writing(tmp_path / "saved")
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(how)
    assert process.wait(10) == 128 + how
    assert os.listdir(tmp_path) == []


def test_signals_are_as_before_afterwards(tmp_path):
    with new_folder(tmp_path / "saved"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with new_folder(tmp_path / "saved"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("target", ["saved", "another"])
def test_what_a_killed_process_has_left_is_deleted(tmp_path, exclusive, target):
    process = start_writing(tmp_path / "saved", exclusive)
    with new_folder(tmp_path / "other", exclusive) as folder:
        write(folder, NEW)
    assert len(os.listdir(tmp_path)) == 2, "the folder of a living process was deleted"
    process.kill()
    process.wait()
    with new_folder(tmp_path / target, exclusive) as folder:
        assert not os.listdir(folder)
        write(folder, NEW)
    assert sorted(os.listdir(tmp_path)) == sorted(["other", target])


def test_hidden_folders_of_others_stay(tmp_path):
    mine = {
        ".saving-photos/new/a.jpg": "a",
        f".saving-{'0' * 32}/holiday/b.jpg": "b",
        f".saving-{'1' * 32}/old/weights": "the only copy",
        f".saving-{'2' * 32}": "a file",
    }
    write(tmp_path, mine)
    with new_folder(tmp_path / "saved") as folder:
        write(folder, NEW)
    assert texts(tmp_path) == mine | {f"saved/{name}": text for name, text in NEW.items()}


def test_one_process_at_a_time_writes_exclusively(tmp_path):
    process = start_writing(tmp_path / "saved", exclusive=True)
    try:
        expected = pytest.raises(FileExistsError, match="saved is being written by another process")
        with expected, new_folder(tmp_path / "saved", exclusive=True):
            pytest.fail("nothing should be written")
        with new_folder(tmp_path / "saved") as folder:
            write(folder, OLD)
    finally:
        process.terminate()
        process.wait()
    with new_folder(tmp_path / "saved", exclusive=True) as folder:
        write(folder, NEW)
    assert os.listdir(tmp_path) == ["saved"]


def test_systems_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_vaultgemma._partial_folders.fcntl", None)
    for name in ("a", "b"):
        with new_folder(tmp_path / name, exclusive=True) as folder:
            write(folder, NEW)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# Links


def linked(link, target):
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


def test_a_users_weights_on_another_disk(tmp_path):
    write(tmp_path / "disk", {"big.safetensors": "", "v.model": "", "w.weights.h5": ""})
    for name, target in (
        ("model.safetensors", "big.safetensors"),
        ("tokenizer.model", "v.model"),
        ("model.weights.h5", "w.weights.h5"),
    ):
        check_link(linked(tmp_path / "preset" / name, tmp_path / "disk" / target))


def test_a_snapshot_that_is_linked_from_elsewhere(tmp_path):
    cache = tmp_path / "models--org--name"
    write(cache / "blobs", {"0" * 64: "weights", "1" * 40: "config"})
    linked(cache / "snapshots/abc/model.safetensors", f"../../blobs/{'0' * 64}")
    linked(cache / "snapshots/abc/config.json", f"../../blobs/{'1' * 40}")
    whole = linked(tmp_path / "models/whole", cache / "snapshots/abc")
    for name in ("model.safetensors", "config.json"):
        check_link(whole / name)
        check_link(cache / "snapshots/abc" / name)
        check_link(linked(tmp_path / "models/each" / name, cache / "snapshots/abc" / name))


@pytest.mark.parametrize(
    "name, target",
    [
        ("model.safetensors", "../secret/model.safetensors"),
        ("model.safetensors", "{root}/secret/key"),
        ("config.json", "{root}/secret/config.json"),
        ("tokenizer.model", "../secret/key"),
        ("chat_template.jinja", "{root}/secret/chat_template.jinja"),
    ],
)
def test_a_strangers_link_out_of_the_folder(tmp_path, name, target):
    files = ("model.safetensors", "key", "config.json", "chat_template.jinja")
    write(tmp_path / "secret", dict.fromkeys(files, "secret"))
    link = linked(tmp_path / "preset" / name, target.format(root=tmp_path))
    with pytest.raises(ValueError, match="must not be a link that leaves its folder"):
        check_link(link)


def test_a_linked_subfolder(tmp_path):
    write(tmp_path / "secret", {"tokenizer/vocabulary.spm": "secret"})
    linked(tmp_path / "preset/assets", tmp_path / "secret")
    path = tmp_path / "preset/assets/tokenizer/vocabulary.spm"
    with pytest.raises(ValueError, match="must not be a link that leaves its folder"):
        check_link(path, tmp_path / "preset")


def test_a_link_to_itself_is_no_endless_loop(tmp_path):
    check_link(linked(tmp_path / "a.json", tmp_path / "a.json"))
