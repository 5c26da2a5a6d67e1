"""Worker processes that end in every way there is: what test_runner.py runs in place of those of the comparison.

Nothing heavy is imported, since each of them is started for one cell.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LARGE = 2**24  # bytes, more than a pipe holds
LONG = 600.0  # seconds, after which a test that hangs would have failed


@dataclass(frozen=True)
class Cell:
    """As that of the comparison; its method says what becomes of the process."""

    task: str
    method: str
    learning_rate: float = 1.0
    seed: int = 0
    stage: str = "select"


def serve(connection, device, threads, number):
    ends_at_the_next = False
    while True:
        if ends_at_the_next:
            connection.poll(LONG)
            os._exit(0)  # what was sent stays unread: the other side sees a connection that is reset
        cell, steps = connection.recv()
        if cell.method in ENDS:
            ENDS[cell.method](connection)
        if cell.method in STAYS:
            STAYS[cell.method](connection, Path(cell.task))
            time.sleep(LONG)
        more = MORE.get(cell.method, dict)()
        connection.send({**asdict(cell), "steps": steps, "process": os.getpid(), **more})
        if cell.method == "answers and exits":
            os._exit(0)
        ends_at_the_next = cell.method == "answers and leaves the next unread"


MORE = {"sends a large row": lambda: {"filling": os.urandom(LARGE)}, "takes long": lambda: {"seconds": 100.0}}


def close(connection):
    connection.close()
    time.sleep(LONG)


def send_half(connection):
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")
    os._exit(0)


def leave_a_child(connection):
    if os.fork() == 0:  # keeps the pipe open
        time.sleep(3)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def send_half_and_leave_a_child(connection):
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")
    if os.fork() == 0:  # keeps the pipe open, longer than the test may take, and nothing else
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        time.sleep(150)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def send_slowly(connection):
    """A message in pieces, the size in two."""
    message = struct.pack("!i", 1000) + b"half"
    for piece in (message[:2], message[2:]):
        os.write(connection.fileno(), piece)
        time.sleep(0.5)
    os._exit(5)


def fail(connection):
    raise RuntimeError("no row")


ENDS = {
    "exits": lambda connection: os._exit(3),
    "leaves": lambda connection: sys.exit(4),
    "raises": fail,
    "is killed": lambda connection: os.kill(os.getpid(), signal.SIGKILL),
    "aborts": lambda connection: os.kill(os.getpid(), signal.SIGABRT),
    "closes": close,
    "sends half": send_half,
    "sends half and leaves a child": send_half_and_leave_a_child,
    "sends half slowly": send_slowly,
    "sends no pickle": lambda connection: connection.send_bytes(b"no pickle"),
    "sends an unknown class": lambda connection: connection.send_bytes(b"cnowhere\nThing\n."),
    "sends a lambda": lambda connection: connection.send(lambda: None),
    "is killed and leaves a child": leave_a_child,
}


def stop(connection, note):
    note.touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def ignore_sigterm(connection, note):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note.touch()


def send_half_and_go_on(connection, note):
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")
    note.touch()


STAYS = {  # until they are killed; the task of the cell is a file that is there from then on
    "is stopped": stop,
    "ignores SIGTERM": ignore_sigterm,
    "sends half and goes on": send_half_and_go_on,
}
