"""Where QEMU may connect to: what is judged, and that the kernel asks."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata import host
from pykata.net import gate, user_qemu
from pykata.net.user_qemu import GATE, NOWHERE

REFUSED = [*NOWHERE, "169.254.0.0/16", "192.0.2.9/32"]
FREE = "198.51.100.1"


def ipv4(address: str, port: int = 80, family: int = socket.AF_INET) -> bytes:
    return struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


@pytest.fixture(autouse=True)
def of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A resolv.conf with a name server on the loopback."""
    path = tmp_path / "resolv.conf"
    path.write_text("search example\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n")
    monkeypatch.setattr(gate, "name_servers", lambda read=gate.name_servers: read(str(path)))
    return path


@pytest.mark.parametrize("to", [
    "10.0.2.2", "10.0.2.255", "127.0.0.1", "127.9.9.9", "0.0.0.0", "0.0.0.1", "255.255.255.255", "224.0.0.251",  # noqa: S104
    "169.254.169.254", "192.0.2.9",
])  # fmt: skip
def test_the_host_by_any_name_is_refused(to: str) -> None:
    for family in (socket.AF_INET, socket.AF_UNSPEC):
        for port in (0, 22, 53, 80):
            assert gate.Gate(REFUSED).refusal(ipv4(to, port, family)) == errno.EHOSTUNREACH


def test_what_is_free_is_let_through() -> None:
    judge = gate.Gate(REFUSED)
    for _ in range(2):
        assert judge.refusal(ipv4(FREE)) == 0
    assert judge.refusal(struct.pack("=H", socket.AF_UNIX) + b"/socket") == 0


def test_the_hosts_name_servers_answer_and_have_no_other_ports(of_the_host: Path) -> None:
    judge = gate.Gate(REFUSED)
    assert judge.refusal(ipv4("127.0.0.53", 53)) == 0
    assert judge.refusal(ipv4("127.0.0.53", 22)) == errno.EHOSTUNREACH
    of_the_host.write_text("")
    assert judge.refusal(ipv4("127.0.0.53", 53)) == errno.EHOSTUNREACH
    assert judge.refusal(ipv4("127.0.0.1", 53)) == 0        # where none is named it is the host itself
    of_the_host.unlink()
    assert judge.refusal(ipv4("127.0.0.1", 53)) == 0


@pytest.mark.parametrize("raw", [
    b"", b"\x02", ipv4(FREE)[:7], struct.pack("=H", socket.AF_INET6) + bytes(26), struct.pack("=H", socket.AF_PACKET),
])  # fmt: skip
def test_what_is_not_understood_is_refused(raw: bytes) -> None:
    assert gate.Gate(REFUSED).refusal(raw) == errno.EACCES


@given(st.lists(st.ip_addresses(v=4).map(str), max_size=4), st.ip_addresses(v=4).map(str))
def test_any_address_is_judged_by_the_networks(single: list[str], to: str) -> None:
    refused = gate.Gate([f"{each}/32" for each in single]).refusal(ipv4(to))
    assert bool(refused) == (to in single)


async def test_it_works_here_and_leaves_this_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = privileges()
    monkeypatch.setattr(user_qemu, "_worked", None)
    assert await user_qemu.gate_works()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.connect(("127.0.0.1", 9))
    assert privileges() == before
    monkeypatch.setattr(user_qemu, "GATE", Path("/nowhere"))
    assert await user_qemu.gate_works()             # it was tried already


def privileges() -> list[str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return [line for line in lines if line.startswith(("NoNewPrivs", "Seccomp"))]


@pytest.mark.parametrize(("there", "instead"), [
    # Linux before 5.5 doesn't know how to let a call go on.
    ("0x80082102, 1  ", "0x80082102, 2  "),
    # Yama, or a missing capability: who judges may not look into what it judges.
    ('descriptor = os.open(f"/proc/{pid}/mem"', 'raise PermissionError(pid); os.open("/proc/self/mem"'),
    # Before 5.0 there is nothing of that, and some containers don't allow it.
    ("SET_MODE_FILTER, NEW_LISTENER = 1, 8", "SET_MODE_FILTER, NEW_LISTENER = 1, 1 << 30"),
])  # fmt: skip
async def test_where_the_kernel_does_not_it_is_found_out_before_a_machine_starts(
    there: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GATE.read_text()
    assert source.count(there) == 1
    other = tmp_path / "gate.py"
    other.write_text(source.replace(there, instead))
    monkeypatch.setattr(user_qemu, "GATE", other)
    monkeypatch.setattr(user_qemu, "_worked", None)
    assert not await user_qemu.gate_works()


def test_where_somebody_judges_already_it_does_not_work() -> None:
    code = (
        "import asyncio, os\n"
        "from pykata.net import gate, user_qemu\n"
        "listener = gate.installed()\n"
        "print(asyncio.run(user_qemu.gate_works()), os.fstat(listener).st_mode > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


ATTEMPTS = """
import socket, sys
def tcp(*to):
    with socket.socket() as one:
        one.connect(to)
def udp(*to):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", to)
def attempt(act, *to):
    try:
        act(*to)
    except OSError as exc:
        return exc.errno
    return 0
port = int(sys.argv[1])
print(*(attempt(act, address, port) for act in (tcp, udp) for address in ("127.0.0.1", "127.0.0.2")))
one, other = socket.socketpair()
one.send(b"pair")
print(other.recv(9).decode(), flush=True)
sys.stdin.read()
"""


async def test_the_kernel_asks_about_connections_and_datagrams() -> None:
    no = errno.EHOSTUNREACH
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        async with user_qemu._gate("before", ["127.0.0.2/32"]) as (through, fd, words):
            argv = [sys.executable, "-c", ATTEMPTS, port]
            async with host.spawn(argv, through=through, pass_fds=[fd], stdin=host.PIPE, stdout=host.PIPE) as process:
                assert process.stdout is not None
                said = b""
                while not said.endswith(b"pair\n"):
                    said += await process.stdout.receive()
                assert said == f"0 {no} 0 {no}\npair\n".encode()
            # It is ours, so we end it, and wait for it: it doesn't end by itself.
            judge = int(through[-1])
            os.kill(judge, 0)
        assert "was killed by SIGKILL" in await words.ended()
        with pytest.raises(ProcessLookupError):
            os.kill(judge, 0)
