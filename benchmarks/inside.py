"""Loops that measure themselves, run by the image's Python inside and outside; the first argument names one.

Stands alone: its text is handed to that Python with ``-c``.
"""

import glob
import os
import socket
import sys
import threading
import time


def cpu():
    total = 0
    for number in range(2_000_000):
        total += number * number % 7
    return total


def read(files=sorted(glob.glob("/usr/lib/python3*/*.py"))[:150]):  # noqa: B008 - looked for once
    """Open, read, close: files of the image, all of them in the page cache after the first time."""
    for _ in range(30):
        for name in files:
            fd = os.open(name, os.O_RDONLY)
            while os.read(fd, 65536):
                pass
            os.close(fd)


def loopback(size=256 << 20):
    """Bytes by TCP from one thread to another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    block = bytes(1 << 17)

    def send():
        with sender:
            for _ in range(size // len(block)):
                sender.sendall(block)

    thread = threading.Thread(target=send)
    thread.start()
    buffer = bytearray(1 << 17)
    got = 0
    with receiver:
        while count := receiver.recv_into(buffer):
            got += count
    thread.join()
    assert got == size


call = globals()[sys.argv[1]]
call()
start = time.perf_counter()
call()
print(time.perf_counter() - start)
