"""A process that writes files when it is told to, and watches for how long it stood still meanwhile.

Stands alone: its text is handed to the image's Python with ``-c``, here and there. Each line on stdin is a call of
one of the functions below by name, with its arguments; what it returns is printed. Between calls it looks at the
clock every millisecond, and the largest gap between two looks is what it stood still.
"""

import os
import select
import sys
import time


def fill(folder, files, size):
    """Files of a few KiB, and one in 150 of 1 MiB, as packages have them: ``files`` with ``size`` bytes together."""
    files, size = int(files), int(size)
    large = files // 150
    small = (size - (large << 20)) // (files - large)
    for number in range(files):
        if number % 100 == 0:
            below = os.path.join(folder, str(number // 100))
            os.makedirs(below)
        write(os.path.join(below, str(number)), 1 << 20 if number % 150 == 149 else small)


def write(path, size):
    """A file of bytes that no program makes smaller than half."""
    with open(path, "wb") as file:
        file.write(os.urandom(-(-int(size) // 2)).hex().encode()[: int(size)])


def watch():
    """Forget the largest gap so far."""
    global gap
    gap = 0.0


def stood():
    """The largest gap since then, in seconds."""
    return gap


def main():
    """Until stdin is closed."""
    global gap
    last = time.monotonic()
    while True:
        ready = select.select([0], [], [], 0.001)[0]
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        if ready:
            words = sys.stdin.readline().split()
            if not words:
                return
            print(globals()[words[0]](*words[1:]), flush=True)
            last = time.monotonic()


gap = 0.0
if __name__ == "__main__":
    main()
