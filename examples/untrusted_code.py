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

SCRIPTS = [  # each with the seconds it may take
    ("echo fine", 60),
    ("echo so far; exit 3", 60),
    ("echo working; while true; do :; done", 2),
    ("echo greedy; tail /dev/zero", 60),
    ("kill -SEGV $$", 60),
    ("exec there-is-no-such-program", 60),
]


async def main() -> None:
    # isolation="hardware" is what code from strangers needs; "emulated" lets the example run without KVM.
    async with pykata.Sandbox(memory="192M", isolation="emulated") as sb:
        for script, seconds in SCRIPTS:
            done = await sb.run("builtin:busybox", ["sh", "-c", script], timeout=seconds)
            print(f"{done.reason:8}  exit code {done.exit_code:<3}  {done.stdout!r}")

        again = await sb.run("builtin:busybox", ["true"])
        print("and the sandbox still works:", again.ok)


asyncio.run(main())
