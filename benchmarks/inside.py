"""Loops that measure themselves, run by the image's Python inside and outside; the first argument names one,
the others are its own.

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


def read(pattern, rounds):
    """Open, read in pieces of 128 KiB, close; all of it is in the page cache after the first time."""
    files = sorted(glob.glob(pattern))[:150]
    assert files
    buffers = [bytearray(1 << 17)]  # kept: fresh memory would be measured otherwise
    for _ in range(int(rounds)):
        for name in files:
            fd = os.open(name, os.O_RDONLY)
            while os.readv(fd, buffers):
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


call, words = globals()[sys.argv[1]], sys.argv[2:]
call(*words)
time.sleep(0.3)  # what the start of one container and the end of another leave the kernel to do is over by then
start = time.perf_counter()
call(*words)
print(time.perf_counter() - start)
