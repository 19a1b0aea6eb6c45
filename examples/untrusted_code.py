"""Code that misbehaves: it runs for ever, takes all memory, fails or isn't there. Each end says which it was.

It prints::

    exit      exit code 0    'fine\\n'
    exit      exit code 3    'so far\\n'
    timeout   exit code 137  'working\\n'
    oom       exit code 137  'greedy\\n'
    signal    exit code 139  ''
    exit      exit code 127  ''
    and the sandbox still works: True
"""

import asyncio

import pykata

SCRIPTS = [
    "echo fine",
    "echo so far; exit 3",
    "echo working; while true; do :; done",
    "echo greedy; tail /dev/zero",
    "kill -SEGV $$",
    "exec there-is-no-such-program",
]


async def main() -> None:
    # isolation="hardware" is what code from strangers needs; "emulated" lets the example run without KVM.
    async with pykata.Sandbox(memory="192M", isolation="emulated") as sb:
        for script in SCRIPTS:
            done = await sb.run("builtin:busybox", ["sh", "-c", script], timeout=5)
            print(f"{done.reason:8}  exit code {done.exit_code:<3}  {done.stdout!r}")

        again = await sb.run("builtin:busybox", ["true"])
        print("and the sandbox still works:", again.ok)


asyncio.run(main())
