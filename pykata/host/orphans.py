"""A program that isn't executed when whoever started it has ended meanwhile.

The kernel kills a process at the end of the thread that started it if the process has asked for that
(``PR_SET_PDEATHSIG``), and tells nobody who asks too late. So whether the thread is there is looked at after that, by
what would execute the program: where it isn't, nothing is executed.
"""

from __future__ import annotations

import functools
import os
import shutil

from pykata.host.tools import find_tool

# Of all that a thread has in /proc it is what anybody may look up, and the kernel finds it by way of the thread's
# namespaces. An ending thread gives those up before its children are told (do_exit() in linux/kernel/exit.c).
_LOOKED_UP = "net/stat"
_CHECK = '[ "$PPID" = {pid} ] || exit; '
_ADDED = ("PWD", "OLDPWD", "SHLVL", "_")    # to the environment, by a shell


def unless_orphaned(program: str) -> list[str]:
    """The beginning of a command that executes ``program`` if our process is there. A shell is in between: 0.5 ms."""
    shell, env = _find_shell()
    script = _CHECK.format(pid=os.getpid())
    if env and "=" not in program:      # which it would take for a variable
        unset = [word for name in _ADDED for word in ("-u", name)]
        return [shell, "-c", f'{script}exec "$0" "$@"', env, *unset, program]
    return [shell, "-c", f'{script}unset {" ".join(_ADDED)}; exec "$@"', "sh", program]


def path_unless_orphaned(program: str, *, other_user: bool) -> list[str]:
    """The same at no cost: a path that leads to ``program`` only as long as our thread is there.

    The program sees it as its ``argv[0]``. ``other_user``: it is looked up by a user who has no capabilities.
    """
    thread = _thread(other_user)
    if thread is None:
        return unless_orphaned(program)
    directory = f"{thread}/{_LOOKED_UP}"
    up = "/".join([".."] * directory.count("/"))
    return [f"{directory}/{up}{os.path.abspath(program)}"]


def _thread(other_user: bool) -> str | None:
    """Our thread's directory in /proc; None: it isn't there for the one who looks."""
    try:
        if other_user and _hides_processes():
            return None
        # Not our own numbers: /proc may be that of another PID namespace.
        thread = f"/proc/{os.readlink('/proc/thread-self')}"
    except OSError:
        return None
    return thread if os.path.isdir(f"{thread}/{_LOOKED_UP}") else None


@functools.cache
def _hides_processes() -> bool:
    """Whether /proc is mounted with ``hidepid``: nobody sees the processes of others (proc(5))."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounted = [words[-1].split(",") for words in map(str.split, file) if words[4] == "/proc"]
    return any(option.startswith("hidepid=") and option not in ("hidepid=0", "hidepid=off")
               for option in (mounted[-1] if mounted else ()))


@functools.cache
def _find_shell() -> tuple[str, str]:
    """A shell, and what removes its variables from the environment if it can't itself: bash sets SHLVL as it execs."""
    shell = shutil.which("dash") or str(find_tool("sh", package="dash"))
    if os.path.basename(os.path.realpath(shell)) == "dash":
        return shell, ""
    return shell, str(find_tool("env", package="coreutils"))
