"""Finding a bundle: in the order that is promised, and never a damaged one."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from pykata.errors import BundleDamagedError, BundleMissingError
from pykata.guest import bundle as finding
from pykata.guest import find_bundle, load_bundle, trust, write_wheel
from pykata.guest.bundle import OUTPUTS
from pykata.guest.inputs import host_arch, tree_hash
from pykata.host import file_hash

ROOT = Path(__file__).resolve().parents[2]


def make_bundle(path: Path, *, tree: str = "t", **head: object) -> Path:
    path.mkdir(parents=True)
    for name in OUTPUTS:
        (path / name).write_bytes(f"content of {name}".encode())
    outputs = {name: {"sha256": file_hash(path / name), "size": (path / name).stat().st_size} for name in OUTPUTS}
    manifest = {"format": 1, "arch": host_arch(), "hash": "h" * 64, "tree": tree, "inputs": {}, "outputs": outputs}
    (path / "manifest.json").write_text(json.dumps(manifest | head))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYKATA_BUNDLE", raising=False)
    monkeypatch.setattr(finding, "WHEEL", "no_such_package")
    return tmp_path / "cache" / "guest"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "source_tree", lambda: None)


def test_an_explicit_path_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, given = make_bundle(tmp_path / "named"), make_bundle(tmp_path / "given")
    monkeypatch.setenv("PYKATA_BUNDLE", str(named))
    assert find_bundle().path == named
    assert find_bundle(given).path == given


def test_a_source_tree_takes_its_own_bundle_and_not_the_newest(cache: Path) -> None:
    wanted = make_bundle(cache / f"{host_arch()}-a", tree=tree_hash(ROOT, host_arch()))
    make_bundle(cache / f"{host_arch()}-b", tree="another")
    assert find_bundle().path == wanted


def test_without_sources_the_newest_is_taken(cache: Path, installed: None) -> None:
    older = make_bundle(cache / f"{host_arch()}-a")
    os.utime(older / "manifest.json", (1, 1))       # older kernels' clocks for files tick every 4 ms
    newer = make_bundle(cache / f"{host_arch()}-b")
    make_bundle(cache / f"{host_arch()}-c", format=99)
    assert find_bundle().path == newer


def test_a_missing_bundle_names_the_command(cache: Path) -> None:
    with pytest.raises(BundleMissingError) as caught:
        find_bundle()
    assert "pykata guest build" in caught.value.hint


def test_without_sources_the_hint_is_the_package(cache: Path, installed: None) -> None:
    with pytest.raises(BundleMissingError) as caught:
        find_bundle()
    assert "pykata-guest" in caught.value.hint
    assert "without the sources" in caught.value.message


def test_a_truncated_file_is_noticed_at_once(cache: Path, tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle")
    (path / "vmlinux").write_bytes(b"half")
    with pytest.raises(BundleDamagedError, match=r"vmlinux.*4 bytes, not"):
        load_bundle(path)


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle")
    (path / "initrd.cpio").unlink()
    with pytest.raises(BundleDamagedError, match=r"initrd\.cpio"):
        load_bundle(path)


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle")
    bundle = load_bundle(path)
    bundle.verify()
    size = (path / "vmlinux").stat().st_size
    (path / "vmlinux").write_bytes(bytes(size))
    with pytest.raises(BundleDamagedError, match="vmlinux"):
        bundle.verify()


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_byte_that_changed_is_noticed_before_a_start(cache: Path, tmp_path: Path, name: str) -> None:
    path = make_bundle(tmp_path / "bundle")
    assert find_bundle(path) == find_bundle(path)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    os.utime(path / name, ns=(0, 0))        # older kernels' clocks for files tick every 4 ms
    for _ in range(2):
        with pytest.raises(BundleDamagedError, match=name):
            find_bundle(path)
    (path / name).write_bytes(whole)
    assert find_bundle(path).path == path


def test_a_bundle_is_read_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = make_bundle(tmp_path / "bundle"), list[Path]()
    monkeypatch.setattr(finding.Bundle, "verify", lambda bundle: read.append(bundle.path))
    for _ in range(3):
        find_bundle(path)
    trust.noted.cache_clear()       # another process
    find_bundle(path)
    assert read == [path]


def test_a_bundle_for_another_machine_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError, match="vax"):
        find_bundle(make_bundle(tmp_path / "bundle", arch="vax"))


def test_a_wrong_variable_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (file, tmp_path / "none"):
        monkeypatch.setenv("PYKATA_BUNDLE", str(wrong))
        with pytest.raises(BundleMissingError) as caught:
            find_bundle()
        assert "PYKATA_BUNDLE" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", "{", '{"format": 1}', '{"format": 1, "arch": "x", "hash": "y"}']
)
def test_a_damaged_manifest_is_a_typed_error(tmp_path: Path, text: str) -> None:
    path = make_bundle(tmp_path / "bundle")
    (path / "manifest.json").write_text(text)
    with pytest.raises(BundleDamagedError, match=r"manifest\.json"):
        load_bundle(path)


def test_a_damaged_bundle_in_the_cache_does_not_hide_the_others(cache: Path, installed: None) -> None:
    good = make_bundle(cache / f"{host_arch()}-a")
    (make_bundle(cache / f"{host_arch()}-b") / "manifest.json").write_text("{")
    assert find_bundle().path == good


def test_the_wheel_carries_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(make_bundle(tmp_path / "bundle"))
    wheel = write_wheel(bundle, tmp_path / "dist", "1.2.3")
    again = write_wheel(bundle, tmp_path / "again", "1.2.3")
    assert wheel.read_bytes() == again.read_bytes()
    assert wheel.name == f"pykata_guest-1.2.3-py3-none-manylinux_2_17_{host_arch()}.whl"
    with zipfile.ZipFile(wheel) as archive:
        record = archive.read("pykata_guest-1.2.3.dist-info/RECORD").decode().splitlines()
        assert {line.split(",")[0] for line in record} == set(archive.namelist())
        archive.extractall(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.delenv("PYKATA_BUNDLE", raising=False)
    assert find_bundle().path == tmp_path / "site" / "pykata_guest" / "bundle"
