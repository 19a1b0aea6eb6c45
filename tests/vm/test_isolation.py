"""What a container can't reach, and what it can't use up: root in it, doing its worst, in a real guest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pykata import Completed, Sandbox
from pykata.agent import v1
from pykata.requests import container_request

BUSYBOX = "builtin:busybox"

PIDS_LIMIT = 4096
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
)  # fmt: skip

# What Docker gives a container that asks for nothing, with the numbers of linux/capability.h.
CAPABILITIES: Mapping[str, int] = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5, "CAP_SETGID": 6,
    "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_RAW": 13, "CAP_SYS_CHROOT": 18,
    "CAP_MKNOD": 27, "CAP_AUDIT_WRITE": 29, "CAP_SETFCAP": 31,
}  # fmt: skip


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def out(sb: Sandbox, script: str) -> str:
    return (await sb.run(BUSYBOX, sh(script), check=True)).stdout


async def python(sb: Sandbox, image: str, script: str) -> Completed:
    return await sb.run(f"oci:{image}", ["python3", "-c", script], timeout=600)


# --- what it sees ---


async def test_devices(sb: Sandbox) -> None:
    names = set((await out(sb, "ls /dev")).split())
    assert names == {
        "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
        "tty", "urandom", "zero",
    } - ({"console", "core"} - names)  # fmt: skip
    assert await out(sb, "head -c 3 /dev/zero | wc -c; cat /dev/null; head -c 8 /dev/urandom | wc -c") == "3\n8\n"
    assert (await sb.run(BUSYBOX, sh("echo x > /dev/full"))).exit_code == 1


async def test_what_the_kernel_has(sb: Sandbox) -> None:
    filesystems = set((await out(sb, "cat /proc/filesystems")).split()) - {"nodev"}
    assert filesystems >= {"9p", "bpf", "cgroup2", "erofs", "ext4", "overlay", "squashfs", "tmpfs", "virtiofs"}
    lines = [line.split() for line in (await out(sb, "cat /proc/cgroups")).splitlines()[1:]]
    controllers = {name for name, *_, enabled in lines if enabled == "1"}
    assert controllers >= {"blkio", "cpu", "cpuset", "hugetlb", "memory", "misc", "perf_event", "pids", "rdma"}
    devices = {line.split()[1] for line in (await out(sb, "cat /proc/misc")).splitlines()}
    assert devices >= {"fuse", "hw_random", "tun", "vsock"}
    assert {"pci", "virtio", "nd"} <= set((await out(sb, "ls /sys/bus")).split())
    assert set((await out(sb, "ls /proc/self/ns")).split()) >= {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"}
    assert "errno" in await out(sb, "cat /proc/sys/kernel/seccomp/actions_avail")


async def test_mounts(sb: Sandbox) -> None:
    mounts = {line.split()[1]: line.split() for line in (await out(sb, "cat /proc/mounts")).splitlines()}
    assert mounts["/"][2] == "overlay"
    for place, kind in {"/proc": "proc", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs", "/sys": "sysfs",
                        "/sys/fs/cgroup": "cgroup2", "/dev/mqueue": "mqueue"}.items():  # fmt: skip
        assert mounts[place][2] == kind
        assert "nosuid" in mounts[place][3].split(",")
    for place in ("/sys", "/sys/fs/cgroup", "/proc/sys"):
        assert "ro" in mounts[place][3].split(",")
    assert {place for place in mounts if "/run/pykata" in place} <= {"/run/pykata/generation"}


async def test_masked_paths_are_empty(sb: Sandbox) -> None:
    script = "; ".join(f"[ -d {path} ] && ls -A {path} || cat {path} 2>/dev/null" for path in MASKED)
    assert await out(sb, f"{script}; true") == ""


@pytest.mark.parametrize(
    "script",
    [
        "echo b > /proc/sysrq-trigger", "echo x > /proc/sys/kernel/core_pattern", "echo 1 > /proc/sys/kernel/panic",
        "echo 0 > /sys/kernel/mm/ksm/run", "mkdir /sys/fs/cgroup/mine", "echo max > /sys/fs/cgroup/pids.max",
        "mount -t tmpfs none /tmp", "mount -o remount,rw /sys", "umount /proc/sys", "mount --bind / /tmp",
        "hostname other", "date -s 2001-01-01; [ $(date +%Y) = 2001 ]", "reboot -f", "poweroff -f",
        "insmod /bin/busybox",
        "swapon /bin/busybox", "dmesg -c", "unshare -m true", "unshare -U true", "nsenter -t 1 -m true",
        "chroot /proc/1/root true && [ -e /init ]",
        "ip link add dummy0 type dummy", "ip link set lo down", "renice -n -5 $$", "kill -9 1; [ ! -d /proc/1 ]",
        "losetup -f /bin/busybox", "cat /proc/kcore", "dd if=/dev/mem count=1", "echo -1000 > /proc/self/oom_score_adj",
    ],
)  # fmt: skip
async def test_root_in_a_container_may_not(sb: Sandbox, script: str) -> None:
    done = await sb.run(BUSYBOX, sh(script), timeout=600)
    assert done.exit_code not in (0, 127), done
    assert done.reason in ("exit", "signal"), "and the guest lives"


async def test_an_idle_kernel_does_not_look_after_itself(sb: Sandbox) -> None:
    assert (await out(sb, "cd /proc/sys/vm; cat compaction_proactiveness stat_interval")).split() == ["0", "60"]


async def test_no_process_of_the_guest_is_seen(sb: Sandbox) -> None:
    seen = (await out(sb, "for p in /proc/[0-9]*; do cat $p/comm; done")).split()
    assert set(seen) <= {"cat", "init", "sh"}
    assert "init" in seen
    # Nothing of the agent is left in the container's init: no binary, no memory to read, no file that can be reached.
    assert await out(sb, "ls /proc/1/cwd/; cat /proc/1/maps /proc/1/environ /proc/1/stack; true") == ""
    assert await out(sb, "for fd in /proc/1/fd/*; do readlink $fd; ls $fd/; cat < $fd; done; true") == ""


async def test_containers_of_a_sandbox_do_not_see_each_other(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as one, sb.container(BUSYBOX) as two:
        async with one.process(sh("hostname; exec sleep 4711")) as sleeper:
            assert await anext(sleeper.stdout) == b"shared\n"
            assert "4711" not in (await two.run(["ps", "-o", "args"])).stdout
            await two.run(sh("kill -9 -1"))
            assert not sleeper.ended
            assert "4711" in (await one.run(["ps", "-o", "args"])).stdout
        await one.run(sh("echo secret > /dev/shm/file"), check=True)
        assert (await two.run(["ls", "/dev/shm"])).stdout == ""


async def test_no_network_but_loopback(sb: Sandbox) -> None:
    assert (await out(sb, "ls /sys/class/net")).split() == ["lo"]
    done = await sb.run(BUSYBOX, sh("nc -l -p 5000 -e echo hi & until nc 127.0.0.1 5000 2>&-; do :; done"), timeout=600)
    assert done.stdout == "hi\n"
    assert (await sb.run(BUSYBOX, sh("nc -w 2 10.0.2.2 80"), timeout=600)).exit_code == 1


# --- privileges ---


async def test_capabilities_are_those_we_name(sb: Sandbox) -> None:
    status = dict(line.split(":\t") for line in (await out(sb, "grep Cap /proc/self/status")).splitlines())
    mask = sum(1 << number for number in CAPABILITIES.values())
    assert {name: int(value, 16) for name, value in status.items()} == {
        "CapInh": 0, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": 0,
    }  # fmt: skip


async def test_another_user_has_none(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, sh("grep -E 'CapPrm|CapEff|CapAmb' /proc/self/status"), user="1000:1000", check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == {"0" * 16}


async def test_seccomp_filters_and_new_privileges_are_allowed(sb: Sandbox) -> None:
    status = dict(line.split(":\t", 1) for line in (await out(sb, "cat /proc/self/status")).splitlines())
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "0", "sudo works in a container; what it reaches is this guest"


async def test_calls_that_a_container_has_no_use_for(sb: Sandbox, demo_image: str) -> None:
    calls = {
        "keyctl": (250, 0, 0), "bpf": (321, 0, 0, 0), "perf_event_open": (298, 0, 0, -1, -1, 0),
        "kexec_load": (246, 0, 0, 0, 0), "mount_setattr": (442, -1, 0, 0, 0, 0), "io_uring_setup": (425, 1, 0),
        "userfaultfd": (323, 0), "init_module": (175, 0, 0, 0), "reboot": (169, 0, 0, 0, 0),
        "open_by_handle_at": (304, 0, 0, 0), "settimeofday": (164, 0, 0), "ptrace of init": (101, 16, 1, 0, 0),
    }  # fmt: skip
    script = (
        "import ctypes, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, arguments in {calls}.items():\n"
        "    result = libc.syscall(*arguments)\n"
        "    print(name, result, errno.errorcode.get(ctypes.get_errno()), sep=':')\n"
    )
    done = await python(sb, demo_image, script)
    results = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert set(results) == set(calls)
    assert {name: said for name, said in results.items() if said not in ("-1:EPERM", "-1:ENOSYS")} == {}


# --- the way to the agent and to the disks ---


async def test_the_agent_s_port_cannot_be_opened(sb: Sandbox) -> None:
    # CAP_MKNOD is there, so a node can be made of any device there is; it must not open.
    assert (await out(sb, "ls /dev | grep -E 'vport|hvc|vd|loop' || true")) == ""
    numbers = (await out(sb, "cat /sys/class/virtio-ports/*/dev 2>/dev/null || true")).split()
    for major in {number.split(":")[0] for number in numbers} or {str(major) for major in range(230, 255)}:
        for minor in range(3):
            script = f"mknod /dev/port c {major} {minor} || exit 0; exec 3<>/dev/port && echo opened"
            assert "opened" not in (await sb.run(BUSYBOX, sh(script), timeout=600)).stdout


async def test_no_device_but_the_harmless_ones_opens(sb: Sandbox, demo_image: str) -> None:
    # The disks with other containers' images, loop, the console, memory, the agent's port, vsock, RTC, the balloon, ...
    script = (
        "import os, stat\n"
        "for path in ('/n', '/tmp/n', '/dev/shm/n'):\n"
        "    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))\n"
        "    try:\n"
        "        open(path)\n"
        "        print(path)\n"
        "    except PermissionError:\n"
        "        pass\n"
        "for kind in (stat.S_IFBLK, stat.S_IFCHR):\n"
        "    for major in range(1, 512):\n"
        "        for minor in (*range(18), 32, 48, 64, 183, 234, 237, 241):\n"
        "            os.mknod('/dev/n', kind | 0o600, os.makedev(major, minor))\n"
        "            try:\n"
        "                os.close(os.open('/dev/n', os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY))\n"
        "                print(kind == stat.S_IFBLK, major, minor)\n"
        "            except OSError:\n"
        "                pass\n"
        "            os.unlink('/dev/n')\n"
    )
    done = await python(sb, demo_image, script)
    assert done.ok, done
    assert done.stdout == "", "what a container makes isn't opened, be it /dev/null"
    done = await python(sb, demo_image, "open('/dev/zero'); open('/dev/ptmx'); print('its own')")
    assert done.stdout == "its own\n"


async def test_the_host_s_end_of_the_vsock_is_out_of_reach(sb: Sandbox, demo_image: str) -> None:
    script = (
        "import socket\n"
        "for cid in (0, 1, 2, 3):\n"
        "    for port in (1, 1024, 4444, 10000):\n"
        "        try:\n"
        "            s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n"
        "            s.settimeout(1)\n"
        "            s.connect((cid, port))\n"
        "            print('connected', cid, port)\n"
        "        except OSError as error:\n"
        "            pass\n"
        "print('done')\n"
    )
    assert (await python(sb, demo_image, script)).stdout == "done\n"


# --- limits ---


async def test_limits_of_the_cgroup(sb: Sandbox) -> None:
    script = "cd /sys/fs/cgroup; cat memory.max pids.max; grep MemTotal /proc/meminfo; cat /proc/self/cgroup"
    said = await out(sb, script)
    memory, pids, _, total, _, cgroup = said.split()
    assert 64 * 1024 * 1024 < int(memory) < int(total) * 1024
    assert int(pids) == PIDS_LIMIT
    assert cgroup.startswith("0::/"), "a namespace of its own: the guest's tree isn't seen"
    assert ".." not in cgroup


async def test_open_files_are_limited(sb: Sandbox) -> None:
    assert (await out(sb, "ulimit -n; ulimit -Hn")) == "65536\n65536\n"


async def test_a_full_disk_is_an_error_of_who_fills_it(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        done = await container.run(sh("dd if=/dev/zero of=/big bs=1M count=400"), timeout=600)
        assert "No space left on device" in done.stderr
        assert (done.reason, done.exit_code) == ("exit", 1)
        await container.run(["rm", "/big"], check=True)
        assert (await container.run(sh("echo fits > /small; cat /small"))).stdout == "fits\n"
    assert (await sb.run(BUSYBOX, sh("head -c 1000000 /dev/zero > /f && echo room"))).stdout == "room\n"


async def test_the_writable_layer_is_as_large_as_asked_for(bundle: object) -> None:
    async with Sandbox(isolation="emulated", disk="8M") as sandbox:
        done = await sandbox.run(BUSYBOX, sh("head -c 20000000 /dev/zero > /big; stat -c %s /big"))
        assert 7 * 1024 * 1024 < int(done.stdout) <= 8 * 1024 * 1024
        assert (await sandbox.run(BUSYBOX, sh("head -c 6000000 /dev/zero > /big && echo whole"))).stdout == "whole\n"


async def test_inodes_run_out_before_the_memory_does(sb: Sandbox) -> None:
    script = "mkdir /many; cd /many; i=0; while [ $i -lt 300000 ] && : > $i; do i=$((i+1)); done 2>&1 | tail -1"
    async with sb.container(BUSYBOX) as container:
        done = await container.run(sh(script), timeout=600)
        assert done.reason in ("exit", "timeout"), done
        assert (await container.run(["true"])).reason in ("exit", "oom")
    assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"


async def test_memory_runs_out_in_one_container_only(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as bystander:
        async with bystander.process(["cat"]) as cat:
            done = await sb.run(BUSYBOX, sh("echo before; exec tail /dev/zero"), timeout=600)
            assert (done.reason, done.exit_code, done.signal) == ("oom", 137, 9)
            assert done.stdout == "before\n"
            await cat.stdin.send(b"alive\n")
            assert await anext(cat.stdout) == b"alive\n"
        assert (await bystander.run(["echo", "alive"])).stdout == "alive\n"
    assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"


async def test_memory_that_runs_out_below_a_shell(sb: Sandbox) -> None:
    # The kernel kills the one that took it; the shell sees that and goes on.
    done = await sb.run(BUSYBOX, sh("tail /dev/zero; echo code $?"), timeout=600)
    assert (done.reason, done.stdout) == ("exit", "code 137\n")


async def test_two_that_fill_all_memory_do_not_take_the_guest_with_them(sb: Sandbox) -> None:
    # Each within its own limit, both together beyond what the guest has.
    async with sb.container(BUSYBOX) as one, sb.container(BUSYBOX) as two:
        script = "dd if=/dev/zero of=/dev/shm/a bs=1M count=64; dd if=/dev/zero of=/b bs=1M count=120; tail /dev/zero"
        for container in (one, two):
            done = await container.run(sh(script), timeout=600)
            assert done.exit_code == 137, done
    assert (await sb.run(BUSYBOX, ["echo", "alive"], timeout=600)).stdout == "alive\n"


async def test_a_fork_bomb_hurts_only_itself(sb: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many as a container may have are more than this shows, and take a slow machine minutes.
    def few(*args: Any) -> v1.CreateContainerRequest:
        request = container_request(*args)
        request.oci_spec = b'{"linux": {"resources": {"pids": {"limit": 300}}}}'
        return request

    async with sb.container(BUSYBOX) as bystander, AsyncExitStack() as stack:
        with monkeypatch.context() as patched:
            patched.setattr("pykata.requests.container_request", few)
            victim = await stack.enter_async_context(sb.container(BUSYBOX))
        assert (await victim.run(["cat", "/sys/fs/cgroup/pids.max"])).stdout == "300\n"
        async with victim.process(sh("bomb() { bomb | bomb & }; bomb; sleep 1000")):
            for number in range(5):
                done = await bystander.run(sh(f"(echo {number})"), timeout=600)
                assert done.stdout == f"{number}\n"
        assert (await bystander.run(["echo", "alive"], timeout=600)).stdout == "alive\n"
    assert (await sb.run(BUSYBOX, ["echo", "alive"], timeout=600)).stdout == "alive\n"


async def test_processes_and_threads_are_limited(sb: Sandbox, demo_image: str) -> None:
    script = (
        "import _thread, threading, time\n"
        "threading.stack_size(32768)\n"
        "n = 1\n"
        "try:\n"
        f"    while n < {PIDS_LIMIT} + 10:\n"
        "        _thread.start_new_thread(time.sleep, (1000,))\n"
        "        n += 1\n"
        "except RuntimeError:\n"
        "    pass\n"
        "print(n, flush=True)\n"
        "import os; os._exit(0)\n"
    )
    done = await python(sb, demo_image, script)
    assert done.reason == "exit", done
    assert PIDS_LIMIT - 10 < int(done.stdout) <= PIDS_LIMIT
    assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"
