"""``pykata pull``, ``images`` and ``rmi`` with a real registry."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pykata_cli import main
from pykata_cli.bars import Bars, bars

from pykata import ImageCorruptError, list_images, load_image
from pykata.spec import PullEvent
from tests.images_fixtures import digest_of, file, layout_of, tar_of
from tests.real_registry import push, registry

pytestmark = pytest.mark.usefixtures("places")

LAYER = tar_of([file("data", b"x" * 100_000)])


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    layout_of(folder / "l", [LAYER])
    with registry(folder) as host:
        push(f"{folder}/l:latest", host, "app:1")
        yield host


def test_an_image_comes_and_goes(upstream: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", f"{upstream}/app:1"]) == 0
    assert capsys.readouterr() == (f"{digest_of(LAYER)}\n", "")
    assert main(["images"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "DIGEST", "ARCH", "SIZE", "USED"]
    assert line.split()[0] == f"{upstream}/app:1"
    assert main(["images", "--format", "json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert listed["name"] == f"{upstream}/app:1"
    assert listed["digest"].removeprefix("sha256:")[:12] == line.split()[1]
    assert main(["rmi", f"{upstream}/app:1"]) == 0
    assert capsys.readouterr().out.startswith(f"{upstream}/app:1: 0.")
    assert main(["images", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_what_goes_wrong(upstream: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "-q", f"{upstream}/app:2"]) == 125
    assert capsys.readouterr().err == f"pykata: {upstream} has no app:2 (are its name and its tag right?)\n"
    assert main(["rmi", "app"]) == 125
    assert "there is no image docker.io/library/app:latest here" in capsys.readouterr().err
    assert main(["pull", "--ca-file", str(places / "none"), "registry.invalid/app"]) == 125
    assert "can't use the certificates for registry.invalid" in capsys.readouterr().err


def test_an_image_goes_elsewhere(upstream: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", f"{upstream}/app:1"]) == 0
    for target in ("saved", "saved.tar"):
        assert main(["save", f"{upstream}/app:1", str(places / target)]) == 0
        assert main(["load", "-t", f"again:{len(target)}", str(places / target)]) == 0
    assert main(["push", f"{upstream}/app:1", f"{upstream}/copy:1"]) == 0
    digest = capsys.readouterr().out.splitlines()[-1]
    assert main(["push", "again:9", f"{upstream}/loaded:1"]) == 0
    assert capsys.readouterr().out.splitlines() == [digest]
    assert main(["images", "--format", "json"]) == 0
    assert {image["digest"] for image in json.loads(capsys.readouterr().out)} == {digest}
    assert main(["pull", f"{upstream}/loaded:1"]) == 0


def test_what_is_no_layout_is_loaded_as_well(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (places / "root.tar").write_bytes(LAYER)
    assert main(["load", "-t", "root:1", f"tar:{places}/root.tar"]) == 0
    assert main(["save", "root:1", str(places / "saved.tar")]) == 0
    assert capsys.readouterr().out == "root:1\n"
    with tarfile.open(places / "saved.tar") as tar:
        names = tar.getnames()
    assert names[:2] == ["index.json", "oci-layout"]
    assert len(names) == 5
    assert main(["save", "root:1", str(places / "saved.tar")]) == 125
    assert "is there already" in capsys.readouterr().err


async def test_a_layout_with_wrong_bytes_is_not_taken_over(places: Path) -> None:
    layout_of(places / "l", [LAYER], compression="plain")
    blob = next(path for path in (places / "l/blobs/sha256").iterdir() if path.stat().st_size > 10_000)
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(ImageCorruptError, match="isn't what its digest says"):
        await load_image(f"oci:{places}/l", "app:1")
    assert [path for path in (places / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000] == []
    assert await list_images() == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars() -> None:
    out, digest = Terminal(), "sha256:" + "ab" * 32
    with bars(out) as show:
        assert isinstance(show, Bars)
        show(PullEvent("app", digest, "downloading", 500_000, 1_000_000))
        show(PullEvent("app", digest, "downloaded", 1_000_000, 1_000_000))
        show(PullEvent("app", "", "converted"))
        assert "abababababab" in out.getvalue()
        assert "1.0/1.0 MB" in out.getvalue()
        assert "done" in out.getvalue()
        show.stop()
    with bars(io.StringIO()) as nothing:
        assert nothing is None
