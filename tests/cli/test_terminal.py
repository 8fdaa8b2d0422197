"""``run`` on a terminal, a real pseudo-terminal between the test and the command line."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time

import pytest


class Screen:
    """A person at a terminal: types, reads, resizes."""

    def __init__(self, *command: str) -> None:
        self.master, inner = os.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(inner)
        self.inner = inner
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workbench", "run", "--network", "none", "python", *command],
            stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.text = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str, timeout: float = 20) -> None:
        until = time.monotonic() + timeout
        while text not in self.text:
            left = until - time.monotonic()
            assert left > 0, self.text
            if select.select([self.master], [], [], max(left, 0))[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
        self.text = self.text.partition(text)[2]

    def end(self) -> int:
        code = self.process.wait(20)
        assert termios.tcgetattr(self.inner) == self.before  # restored
        return code


@pytest.fixture
def screen(image):
    screens = []

    def make(*command: str) -> Screen:
        screens.append(Screen(*command))
        return screens[-1]

    yield make
    for one in screens:
        one.process.kill()
        one.process.wait()
        os.close(one.master)
        os.close(one.inner)


def test_a_shell_on_a_terminal(screen):
    one = screen("sh", "-c", 'tty; stty size; read -r word; echo "<$word>"; read -r word; stty size; exit 5')
    one.expect("/dev/pts/")
    one.expect("24 80")
    one.type("typed\n")
    one.expect("<typed>")
    one.resize(40, 100)
    time.sleep(0.3)
    one.type("again\n")
    one.expect("40 100")
    assert one.end() == 5


def test_control_c_reaches_the_command_and_not_the_launcher(screen):
    one = screen("sh", "-c", "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.1; done")
    one.expect("ready")
    one.type("\x03")
    one.expect("caught")
    assert one.end() == 7


def test_a_long_paste_and_long_output(screen):
    one = screen("sh", "-c", "stty -echo; echo ready; head -n 2000 | wc -c; seq 100000; echo done")
    one.expect("ready")
    for _ in range(20):
        one.type(("x" * 99 + "\n") * 100)
        time.sleep(0.01)
    one.expect("200000")
    one.expect("100000")
    one.expect("done")
    assert one.end() == 0


def test_the_default_command_is_a_shell(screen):
    one = screen()
    one.type("echo $((6 * 7)) on $(tty); exit 3\n")
    one.expect("42 on /dev/pts/")
    assert one.end() == 3
