"""The program that damages a file in a container, on this machine: every step of it may be the last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlchaos_dagster.agent import files
from mlchaos_dagster.drivers.kubernetes.faults.model_volume import mount_of
from mlchaos_dagster.drivers.s3_damage import damaged

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "damaged", damaged, raising=False)  # sent along into the same namespace
    monkeypatch.setattr(files, "told_to_go", lambda: True)
    monkeypatch.setattr(files, "say", lambda **words: None)
    monkeypatch.setattr(files.signal, "setitimer", lambda *_: None)
    path = tmp_path / "model.bin"
    path.write_bytes(CONTENT)
    os.utime(path, (1e9, 1e9))
    return path


def order(path: Path) -> dict[str, object]:
    seen = files.look({"path": str(path), "lease": "x", "how": "bit_flip", "seed": "s"})
    return {"lease": "x", "how": "bit_flip", "seed": "s", "seconds": 9, **seen}


def test_damage_is_as_announced_and_the_very_original_comes_back(model: Path) -> None:
    wanted, before = order(model), model.stat()
    files.hold(wanted)
    assert files.sha256_of(str(model)) == wanted["damaged_sha256"] != wanted["sha256"]
    assert files.look({"path": str(model), "lease": "x"})["kept"]
    files.hold(wanted)  # once more: the kept original must survive it
    after = files.restore(wanted)
    assert model.read_bytes() == CONTENT and not after["kept"] and not after["partial"]
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(model.parent) == ["model.bin"]
    files.restore(wanted)
    assert model.read_bytes() == CONTENT


def test_a_late_word_finds_nothing_to_put_in_place(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = order(model)
    monkeypatch.setattr(files, "told_to_go", lambda: bool(files.restore(wanted)))
    files.hold(wanted)
    assert model.read_bytes() == CONTENT and os.listdir(model.parent) == ["model.bin"]


def test_where_a_volume_knows_no_second_names_a_copy_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(files.errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    wanted, before = order(model), model.stat()
    files.hold(wanted)
    kept = Path(files.kept(str(model), "x"))
    assert kept.read_bytes() == CONTENT
    files.restore(wanted)
    assert model.read_bytes() == CONTENT and model.stat().st_mtime_ns == before.st_mtime_ns
    wanted = order(model)
    files.hold(wanted)
    kept.write_bytes(b"rot")
    with pytest.raises(ValueError, match="copy"):
        files.restore(wanted)
    kept.unlink()
    with pytest.raises(ValueError, match="is gone"):
        files.restore(wanted)


def test_what_changed_meanwhile_is_left_alone(model: Path) -> None:
    wanted = order(model)
    model.write_bytes(b"newer")
    files.hold(wanted)
    assert model.read_bytes() == b"newer" and os.listdir(model.parent) == ["model.bin"]


def test_what_could_not_be_given_back_is_unfit(model: Path) -> None:
    os.link(model, model.with_name("other"))
    assert "2 names" in order(model)["unfit"]  # pyright: ignore[reportOperatorIssue]
    empty = model.with_name("empty")
    empty.write_bytes(b"")
    assert "is empty" in order(empty)["unfit"]  # pyright: ignore[reportOperatorIssue]
    assert "cannot be read" in order(model.with_name("none"))["unfit"]  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([{"name": "v", "mountPath": "/models"}], ("v", "/a/m.bin")),
        ([{"name": "v", "mountPath": "/models/", "subPath": "team/one"}], ("v", "/team/one/a/m.bin")),
        ([{"name": "v", "mountPath": "/models"}, {"name": "w", "mountPath": "/models/a"}], ("w", "/m.bin")),
        ([{"name": "v", "mountPath": "/model"}], None),
        ([{"name": "v", "mountPath": "/"}], ("v", "/models/a/m.bin")),
    ],
)
def test_where_a_file_is_on_its_volume(mounts: list[dict[str, str]], expected: tuple[str, str] | None) -> None:
    """A wrong answer would have the original looked for in the wrong place when the service does not start any more."""
    found = mount_of(None, {"volumeMounts": mounts}, "/models/a/m.bin")
    assert (found and (found["name"], found["below"])) == expected
