"""A ladder's folder is written whole, even if the writer is killed or others read and write at the same time."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, LadderError, RankLadder
from chunkwise_lora.files import write_atomically
from chunkwise_lora.ladder import LadderModule, folder_lock, whole_folder
from chunkwise_lora.ladder.folder_lock import OpenFolder, locked_folder
from chunkwise_lora.ladder.peft_adapter import PeftAdapter

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")


def one_module(seed: int, policy: str) -> RankLadder:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(5, 4, generator=generator), torch.randn(4, 6, generator=generator)
    module = LadderModule(up, down, torch.ones(4), (0, 2, 4))
    return RankLadder({"proj": module}, policy=ChunkWiseConfig.preset(policy))


OLD, NEW = one_module(1, "compact"), one_module(2, "lossless")
STEPS = ("mkdir", "open", "fsync", "link", "rename", "replace", "unlink", "rmdir", "chmod")
NO_EXCHANGE = OSError(errno.ENOSYS, "no such call")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def which(ladder: RankLadder) -> RankLadder | None:
    """`OLD` or `NEW`, whichever `ladder` equals completely; None if it equals neither."""
    for one in (OLD, NEW):
        mine, module = ladder.modules["proj"], one.modules["proj"]
        if torch.equal(mine.up, module.up) and torch.equal(mine.down, module.down) and ladder.policy == one.policy:
            return one
    return None


def product(folder: Path) -> torch.Tensor:
    """The weight change (out, in) that PEFT computes from the folder."""
    ((a, b, scale),) = PeftAdapter.load(folder).factors.values()
    return scale * b @ a


def of(ladder: RankLadder) -> torch.Tensor:
    return ladder.modules["proj"].up @ ladder.modules["proj"].down


def add_others(folder: Path) -> None:
    """Add files that other programs wrote."""
    (folder / "README.md").write_text("mine")
    (folder / "ladder-of-fame.safetensors").write_bytes(b"mine")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state").write_text("mine")
    (folder / "link").symlink_to("README.md")


def others_are_unchanged(folder: Path) -> bool:
    files = ("README.md", "ladder-of-fame.safetensors", "checkpoint/state", "link")
    return all((folder / name).read_bytes() == b"mine" for name in files)


@contextmanager
def child(work: Callable[[], Any]) -> Iterator[int]:
    """Run `work` in another process, which is killed at the end."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def killed_at_step(work: Callable[[], Any], step: int) -> bool:
    """Run `work` in a process that is killed before its change number `step` on disk.

    Returns whether the process came that far.
    """
    if (pid := os.fork()) == 0:
        passed = 0

        def killed_in_time(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal passed
                if passed == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1
                return function(*args, **kwargs)

            return call

        try:
            for name in STEPS:
                setattr(os, name, killed_in_time(getattr(os, name)))
            for name in ("exchange", "rename_new"):
                setattr(whole_folder, name, killed_in_time(getattr(whole_folder, name)))
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_after_a_kill_at_any_step_the_folder_holds_the_old_or_the_new_ladder(tmp_path: Path) -> None:
    folder, found, step = tmp_path / "ladder", [], 0
    OLD.save_pretrained(folder)
    add_others(folder)
    while killed_at_step(lambda: NEW.save_pretrained(folder), step):
        ladder = which(RankLadder.load(folder))
        assert ladder is not None and torch.equal(product(folder), of(ladder))
        found.append("old" if ladder is OLD else "new")
        OLD.save_pretrained(folder)
        assert others_are_unchanged(folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ladder"], "what was left over is gone"
        step += 1
    assert step > 15
    assert found == ["old"] * found.count("old") + ["new"] * found.count("new")
    assert found.count("old") > 5 < found.count("new")


def test_after_a_kill_at_any_step_of_a_first_save_there_is_nothing_or_the_ladder(tmp_path: Path) -> None:
    step = 0
    while True:
        folder = tmp_path / str(step) / "ladder"
        if not killed_at_step(partial(NEW.save_pretrained, folder), step):
            break
        assert not folder.exists() or which(RankLadder.load(folder)) is NEW
        NEW.save_pretrained(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["ladder"]
        step += 1
    assert step > 8


def test_after_a_kill_at_any_step_of_an_export_the_folder_holds_no_mixture(tmp_path: Path) -> None:
    folder, step = tmp_path / "adapter", 0
    OLD.save_adapter(folder)
    while killed_at_step(lambda: NEW.save_adapter(folder), step):
        assert any(torch.equal(product(folder), of(one)) for one in (OLD, NEW))
        OLD.save_adapter(folder)
        step += 1
    assert step > 10


def test_after_a_kill_at_any_step_of_writing_in_place_no_mixture_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Path) -> None:
        raise NO_EXCHANGE

    monkeypatch.setattr(whole_folder, "exchange", refuse)
    folder, refused, step = tmp_path / "ladder", 0, 0
    OLD.save_pretrained(folder)
    add_others(folder)
    while killed_at_step(lambda: NEW.save_pretrained(folder), step):
        try:
            assert which(RankLadder.load(folder)) is not None
            assert any(torch.equal(product(folder), of(one)) for one in (OLD, NEW))
        except LadderError:
            refused += 1
        OLD.save_pretrained(folder)
        assert which(RankLadder.load(folder)) is OLD
        assert others_are_unchanged(folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ladder"]
        assert not [path for path in folder.iterdir() if path.name.endswith("tmp")]
        step += 1
    assert 0 < refused < step / 2


def test_after_kills_at_random_moments_there_is_one_whole_ladder(tmp_path: Path) -> None:
    folder, draw = tmp_path / "ladder", random.Random(0)
    OLD.save_pretrained(folder)
    add_others(folder)

    def save_repeatedly() -> None:
        while True:
            NEW.save_pretrained(folder)
            OLD.save_pretrained(folder)

    for _ in range(40):
        with child(save_repeatedly):
            time.sleep(draw.uniform(0.001, 0.05))
        assert which(RankLadder.load(folder)) is not None
        assert (folder / "README.md").read_text() == "mine"
    OLD.save_pretrained(folder)
    assert others_are_unchanged(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["ladder"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "in place"])
def test_two_writers_leave_one_whole_ladder_and_readers_always_load_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    def refuse(*args: Path) -> None:
        raise NO_EXCHANGE

    if not exchanges:
        monkeypatch.setattr(whole_folder, "exchange", refuse)
    folder, failed = tmp_path / "ladder", tmp_path / "failed"
    OLD.save_pretrained(folder)

    def save_repeatedly(first: RankLadder, second: RankLadder) -> Callable[[], None]:
        def save() -> None:
            try:
                while True:
                    first.save_pretrained(folder)
                    second.save_pretrained(folder)
            except BaseException as error:
                failed.write_text(repr(error))

        return save

    seen = set()
    with child(save_repeatedly(NEW, OLD)), child(save_repeatedly(OLD, NEW)):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            ladder = which(RankLadder.load(folder))
            assert ladder is not None
            seen.add(id(ladder))
            RankLadder.from_peft(folder)
    assert len(seen) == 2
    assert not failed.exists(), failed.read_text()


def test_two_first_writers_leave_one_whole_ladder(tmp_path: Path) -> None:
    for trial in range(10):
        folder = tmp_path / str(trial) / "ladder"
        with child(partial(OLD.save_pretrained, folder)) as pid:
            NEW.save_pretrained(folder)
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                time.sleep(0.001)
        assert which(RankLadder.load(folder)) is not None
        assert [path.name for path in folder.parent.iterdir()] == ["ladder"]


def test_the_files_of_a_running_writer_are_not_removed(tmp_path: Path) -> None:
    live, dead, other = (tmp_path / f".ladder.{name}.chunkwise-tmp" for name in ("0" * 16, "1" * 16, "mine"))
    for path in (live, dead, other):
        path.mkdir()
        (path / "adapter_config.json").write_text("half")
    writer = OpenFolder(live)
    assert writer.lock()
    NEW.save_pretrained(tmp_path / "ladder")
    NEW.save_pretrained(tmp_path / "ladder")
    assert (live.exists(), dead.exists(), other.exists()) == (True, False, True)
    writer.close()
    NEW.save_pretrained(tmp_path / "ladder")
    assert not live.exists()


def test_files_that_a_killed_writer_moved_come_back_and_replace_nothing(tmp_path: Path) -> None:
    folder, leftover = tmp_path / "ladder", tmp_path / f".ladder.{'a' * 16}.chunkwise-tmp"
    OLD.save_pretrained(leftover)
    add_others(leftover)
    NEW.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("newer")
    OLD.save_pretrained(leftover)
    (leftover / "README.md").write_text("older")
    NEW.save_pretrained(folder)
    assert not leftover.exists()
    assert (folder / "README.md").read_text() == "newer"
    assert (folder / "README.md.recovered-1").read_text() == "older"
    assert which(RankLadder.load(folder)) is NEW


def test_a_writer_waits_for_another_one_and_then_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OLD.save_pretrained(tmp_path / "ladder")
    monkeypatch.setattr(folder_lock.locked_folder.__wrapped__, "__defaults__", (0.05,))  # type: ignore[attr-defined]
    holder = OpenFolder(tmp_path / "ladder")
    assert holder.lock()
    with pytest.raises(LadderError, match=r"ladder: cannot be written \(another process"):
        NEW.save_pretrained(tmp_path / "ladder")
    holder.close()
    assert which(RankLadder.load(tmp_path / "ladder")) is OLD
    NEW.save_pretrained(tmp_path / "ladder")
    assert [path.name for path in tmp_path.iterdir()] == ["ladder"]
    with locked_folder(tmp_path / "ladder"):
        pass


@pytest.mark.parametrize("failing", ["fsync", "open", "mkdir", "exchange"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_failed_save_leaves_the_old_ladder_and_no_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    OLD.save_pretrained(tmp_path / "ladder")
    add_others(tmp_path / "ladder")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(whole_folder if failing == "exchange" else os, failing, fail)
        with pytest.raises(LadderError if isinstance(error, OSError) else KeyboardInterrupt):
            NEW.save_pretrained(tmp_path / "ladder")
    assert which(RankLadder.load(tmp_path / "ladder")) is OLD
    assert others_are_unchanged(tmp_path / "ladder")
    NEW.save_pretrained(tmp_path / "ladder")
    assert [path.name for path in tmp_path.iterdir()] == ["ladder"]


def test_files_of_others_are_kept_and_format_1_is_replaced(tmp_path: Path) -> None:
    add_others(tmp_path)
    (tmp_path / "ladder-0123456789ab.safetensors").write_bytes(b"of no manifest")
    OLD.save_pretrained(tmp_path)
    NEW.save_pretrained(tmp_path)
    assert others_are_unchanged(tmp_path)
    assert (tmp_path / "ladder-0123456789ab.safetensors").exists()
    NEW.save_adapter(tmp_path)
    assert others_are_unchanged(tmp_path)
    assert not list(tmp_path.glob("chunkwise*"))


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "adapter_config.json" / "x").write_text("mine")
    with pytest.raises(LadderError, match=r"adapter_config\.json.*|move it away"):
        NEW.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json" / "x").read_text() == "mine"


def test_a_linked_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    for name in ("link", "link", "dangling"):
        NEW.save_pretrained(tmp_path / name)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert which(RankLadder.load(tmp_path / "real")) is which(RankLadder.load(tmp_path / "later")) is NEW


def test_the_current_folder_stays_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for ladder in (OLD, NEW):
        ladder.save_pretrained(".")
        assert Path("chunkwise.json").exists()
        assert which(RankLadder.load(".")) is ladder


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a b\nc", "[*]", ".hidden"])
def test_a_folder_can_have_any_name(tmp_path: Path, name: str) -> None:
    for ladder in (OLD, NEW):
        ladder.save_pretrained(tmp_path / name)
        assert which(RankLadder.load(tmp_path / name)) is ladder
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_respected(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for ladder in (OLD, NEW):
            ladder.save_pretrained(tmp_path / "ladder")
        write_atomically(tmp_path / "file", b"")
        assert stat.S_IMODE((tmp_path / "ladder").stat().st_mode) == 0o777 & ~mask
        for path in (tmp_path / "file", *(tmp_path / "ladder").iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        (tmp_path / "ladder").chmod(0o750)
        NEW.save_pretrained(tmp_path / "ladder")
        assert stat.S_IMODE((tmp_path / "ladder").stat().st_mode) == 0o750, "an own mode is kept"
    finally:
        os.umask(before)


@pytest.mark.parametrize("path", ["\x00", "x" * 5000, "file/ladder"])
def test_an_impossible_path_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LadderError):
        NEW.save_pretrained(tmp_path / path)
    with pytest.raises(ChunkWiseError):
        RankLadder.load(tmp_path / path)


def test_a_loaded_ladder_does_not_change_when_its_files_are_truncated(tmp_path: Path) -> None:
    NEW.save_pretrained(tmp_path)
    ladder = RankLadder.load(tmp_path)
    os.truncate(tmp_path / "adapter_model.safetensors", 0)
    assert which(ladder) is NEW


def test_a_reader_that_finds_damage_does_not_wait(tmp_path: Path) -> None:
    replace(NEW, base_model="base").save_pretrained(tmp_path)
    os.truncate(tmp_path / "adapter_model.safetensors", 100)
    with pytest.raises(LadderError, match="cut off or altered"):
        RankLadder.load(tmp_path)
