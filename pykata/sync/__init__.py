"""pykata for programs without ``async``: the same names, and nothing to await. Also in notebooks and the REPL.

::

    import pykata.sync

    with pykata.sync.Sandbox() as sb:
        print(sb.run("builtin:busybox", ["uname", "-a"]).stdout)

Each name has a synchronous face: what is awaited there returns here, ``async with`` is ``with``, ``async for`` is
``for``. The work is done in an event loop in a thread of its own, so it also works where a loop runs already.
``on_stdout=``, ``on_stderr=`` and ``on_error=`` are called in the thread that called the method, ``setup=`` and
``warm_up=`` in a thread of their own, other callbacks in that of the loop.
Objects may be used by several threads.

Ctrl-C cancels the call that is waiting, which cleans up before KeyboardInterrupt is raised.
"""

import pykata
from pykata.process import Input, Output
from pykata.sync.facade import facade, function

__all__ = [
    "Background",
    "Container",
    "Detached",
    "Files",
    "Input",
    "Output",
    "Pool",
    "Process",
    "Sandbox",
    "Template",
    "build_bundle",
    "build_image",
    "check",
    "collect_garbage",
    "describe_volumes",
    "find_bundle",
    "find_detached",
    "list_detached",
    "list_images",
    "list_volumes",
    "load_image",
    "pull_image",
    "push_image",
    "remove_image",
    "remove_volume",
    "save_image",
]

Background = facade(pykata.Background)
Container = facade(pykata.Container)
Detached = facade(pykata.Detached)
Files = facade(pykata.Files)
Input = facade(Input)
Output = facade(Output)
Pool = facade(pykata.Pool)
Process = facade(pykata.Process)
Sandbox = facade(pykata.Sandbox)
Template = facade(pykata.Template)
build_bundle = function(pykata.build_bundle)
build_image = function(pykata.build_image)
check = function(pykata.check)
collect_garbage = function(pykata.collect_garbage)
describe_volumes = function(pykata.describe_volumes)
find_bundle = function(pykata.find_bundle)
find_detached = function(pykata.find_detached)
list_detached = function(pykata.list_detached)
list_images = function(pykata.list_images)
list_volumes = function(pykata.list_volumes)
load_image = function(pykata.load_image)
pull_image = function(pykata.pull_image)
push_image = function(pykata.push_image)
remove_image = function(pykata.remove_image)
remove_volume = function(pykata.remove_volume)
save_image = function(pykata.save_image)
