"""The host: the one place that spawns processes, makes run directories and looks tools up.

Who calls :func:`spawn` owns the process for as long as its ``async with`` block runs, whatever happens in it. A process
also dies when the thread that spawned it ends (``PR_SET_PDEATHSIG`` is about the *thread*, prctl(2)); that is the
thread of the event loop, so a process can't outlive the loop that owns it, even if that is killed with SIGKILL.
Nothing is started, opened or created by importing this module.
"""

from pykata.host.byte_locks import byte_is_locked, lock_byte
from pykata.host.capacity import Room, Use, all_memory, in_use, room
from pykata.host.cleanup import finish
from pykata.host.daemon import start_daemon
from pykata.host.directories import abandoned_run_dirs, cache_dir, run_dir, run_root, short_name, state_dir
from pykata.host.disk_users import loop_of, where_written
from pykata.host.identity import Identity, ephemeral_identity
from pykata.host.lend import lent_directory
from pykata.host.locks import is_at, locked, locked_one_of, open_lock, try_lock
from pykata.host.memory import copy_file, copy_range, extents, held, memory_file, seal, seal_size
from pykata.host.mounts import is_one_filesystem, kinds_below
from pykata.host.pipes import PipeReader, PipeWriter
from pykata.host.process import (
    DEVNULL,
    KILL,
    NO_ENV,
    PIPE,
    STDOUT,
    TERM,
    TOOL_ENV,
    HostProcess,
    KillPolicy,
    describe_exit,
    spawn,
)
from pykata.host.removal import remove_tree
from pykata.host.run import TAIL, run_tool
from pykata.host.stamps import Stamp, file_hash, stamp
from pykata.host.tools import find_tool
from pykata.host.trim import (
    BUILDING,
    CONTENT,
    CONTENT_SIZE,
    cache_limit,
    remove_unfinished,
    remove_unused,
    size_in,
    trim_cache,
)
from pykata.host.words import LastWords

__all__ = [
    "BUILDING",
    "CONTENT",
    "CONTENT_SIZE",
    "DEVNULL",
    "KILL",
    "NO_ENV",
    "PIPE",
    "STDOUT",
    "TAIL",
    "TERM",
    "TOOL_ENV",
    "HostProcess",
    "Identity",
    "KillPolicy",
    "LastWords",
    "PipeReader",
    "PipeWriter",
    "Room",
    "Stamp",
    "Use",
    "abandoned_run_dirs",
    "all_memory",
    "byte_is_locked",
    "cache_dir",
    "cache_limit",
    "copy_file",
    "copy_range",
    "describe_exit",
    "ephemeral_identity",
    "extents",
    "file_hash",
    "find_tool",
    "finish",
    "held",
    "in_use",
    "is_at",
    "is_one_filesystem",
    "kinds_below",
    "lent_directory",
    "lock_byte",
    "locked",
    "locked_one_of",
    "loop_of",
    "memory_file",
    "open_lock",
    "remove_tree",
    "remove_unfinished",
    "remove_unused",
    "room",
    "run_dir",
    "run_root",
    "run_tool",
    "seal",
    "seal_size",
    "short_name",
    "size_in",
    "spawn",
    "stamp",
    "start_daemon",
    "state_dir",
    "trim_cache",
    "try_lock",
    "where_written",
]
