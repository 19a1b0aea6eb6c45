"""The exit codes of ``pykata`` that aren't the command's own. The numbers are those people know."""

TIMEOUT = 124           # as timeout(1)
PYKATA = 125            # as docker: we failed, not the command; also a command line that can't be right
SIGPIPE = 13
SIGNAL = 128            # plus the signal's number, as a shell says it
UNHEALTHY = 1           # `pykata check` found something
NOT_ALL = 1             # `pykata volumes rm` couldn't remove each, as rm(1)
