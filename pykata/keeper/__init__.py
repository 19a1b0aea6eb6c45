"""The process that owns a detached sandbox: its virtual machine, its agent's connection, its main command.

``python -m pykata.keeper`` is started by :mod:`pykata.detached.start`. It lives in a session of its own, so that no
terminal ends it, and everything that a sandbox in a program has, it has in the same way: killed, it takes its virtual
machine with it. Others reach it at a socket; for each of them it plugs disks and passes on calls to the agent.
"""
