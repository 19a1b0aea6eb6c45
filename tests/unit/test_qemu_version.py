"""Which build of QEMU a program is: what was saved by one is for no other."""

from __future__ import annotations

from pathlib import Path

from pykata.hypervisors.qemu import version

NOTE = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"


def test_programs_are_told_by_their_build_id_or_their_content(tmp_path: Path) -> None:
    (tmp_path / "noted").write_bytes(b"\x7fELF" + NOTE + bytes(range(20)) + b"and so on")
    assert version.build(tmp_path / "noted") == bytes(range(20)).hex()
    for name in "ab":
        (tmp_path / name).write_bytes(b"\x7fELF" + name.encode())      # shorter than what is searched for the note
    assert version.build(tmp_path / "a") != version.build(tmp_path / "b")


def test_scripts_are_told_by_what_they_start_too(tmp_path: Path) -> None:
    script, qemu = tmp_path / "script", tmp_path / "qemu-system-x86_64"
    qemu.write_bytes(b"\x7fELF" + NOTE + bytes(20))
    script.write_text(f"#!/bin/sh\nexec {qemu} \"$@\"\n")
    assert version.program(script) == qemu
    first = version.build(script)
    qemu.write_bytes(b"\x7fELF, another" + NOTE + bytes(range(20)))
    second = version.build(script)
    script.write_text(f"#!/bin/sh\nexec {qemu} -L /elsewhere \"$@\"\n")
    assert len({first, second, version.build(script)}) == 3
