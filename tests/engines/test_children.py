"""Waiting for messages and children at once."""

from __future__ import annotations

import subprocess
import sys

MESSAGES = """
import os, threading, time
from nbaccel.engines.children import Children
from nbaccel.wire.channel import Channel, ChannelClosed, pair

ours, theirs = pair()
us, them = Channel(ours), Channel(theirs)
children = Children()
read, write = os.pipe()
them.send("first")
them.send("again")  # both lie in the socket before the first is asked for
print(children.next_message(us, timeout=5)[0])
print(children.next_message(us, timeout=5)[0])
them.send("second", [write])
os.close(write)
message, fds = children.next_message(us, timeout=5)
print(message, len(fds))

for pid in [os.fork()]:
    if pid == 0:
        os._exit(3)
try:
    print(children.next_message(us, timeout=30))  # a child's end wakes it
except TimeoutError:
    print("nothing came")
them.close()
try:
    children.next_message(us)
except ChannelClosed:
    print("closed")
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("reaped")
"""


def test_messages_that_came_together_are_given_one_by_one() -> None:
    # in a process of its own: it takes over SIGCHLD
    done = subprocess.run([sys.executable, "-c", MESSAGES], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["first", "again", "second 1", "nothing came", "closed", "reaped"], (
        done.stderr
    )
