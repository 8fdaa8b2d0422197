"""``run``: a command in a new container, with this process's input, output, signals and exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from workbench.cli import show
from workbench.containers import state
from workbench.containers.spec import parse_mount
from workbench.model import Exit, InvalidInput, Limits, WorkbenchError, parse_size

if TYPE_CHECKING:
    from workbench.cli import Kernelspecs
    from workbench.containers.container import Container
    from workbench.workbench import Workbench

#: What `run IMAGE` means for an image that names no command: the best shell that it has.
SHELL = ("/bin/sh", "-c", 'exec "$(command -v bash || echo sh)"')
#: What is handed on to the command. SIGKILL and SIGSTOP can't be; a stop from the terminal's keyboard reaches
#: the command itself where there is a terminal.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def run(bench: Workbench, options: Any, _: Callable[[], Kernelspecs]) -> int:
    """``run IMAGE [COMMAND...]``: the command's exit code, 128 + n when signal n killed it (bash(1))."""
    terminal = os.isatty(0) and os.isatty(1)
    memory = parse_size(options.memory) if options.memory else None
    image = f"after-failure/{options.image}" if options.after_failure else options.image
    command = options.command or bench.image(image).cmd or SHELL
    container = bench.create(
        image,
        argv=command,
        cwd=None if options.no_folder else os.getcwd(),
        env=_variables(options.env) | ({"TERM": os.environ.get("TERM", "xterm")} if terminal else {}),
        terminal=terminal,
        mounts=[parse_mount(text) for text in options.mount],
        limits=Limits(memory, options.processes, options.cpus),
        network=options.network,
        names=[options.name] if options.name else [],
    )
    if options.debug:
        print(bench.describe(container), file=sys.stderr, flush=True)
    try:
        with _signals() as wakeup:
            ended = _attend(container, wakeup)
    except BaseException:
        _give_up(container)
        raise
    kept = container.settle()
    if kept and options.rm:
        container.remove()
    elif kept:
        show.error(
            f"container {container.id} stays with what it changed; `jupyter workbench rm {container.id}` removes it"
        )
    if ended.limit:
        show.error(ended.reason)
    return ended.code


def _give_up(container: Container) -> None:
    """Tidy up after a launch that failed, though what stood in its way may stand here again."""
    try:
        container.settle()
    except (WorkbenchError, OSError):
        if container.pid < 0:  # it never ran: nothing of it is worth keeping, nor owned by others
            with suppress(OSError):
                state.remove(container.folder)


def _variables(words: list[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise InvalidInput("set a variable", f"{word!r} has no value", "write it as NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that tells which signals came, one byte each, while they do nothing else (signal(7))."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, lambda *_: None) for number in (*PASSED_ON, signal.SIGWINCH)}
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _attend(container: Container, wakeup: int) -> Exit:
    """Start the container and wait for its end, passing everything on meanwhile."""
    import select

    done_r, done_w = os.pipe2(os.O_CLOEXEC)
    try:
        started = container.start((0, 1, 2))
        started.add_done_callback(lambda _: os.write(done_w, b"s"))
        poll = select.poll()
        for fd in (done_r, wakeup):
            poll.register(fd, select.POLLIN)
        waiting = b""  # signals that came before there was anybody to hand them on to
        while not started.done():
            for fd, _ in poll.poll():
                if fd == wakeup:
                    waiting += os.read(wakeup, 64)
                else:
                    os.read(done_r, 1)
        started.result()
        for number in waiting.replace(bytes([signal.SIGWINCH]), b""):
            container.signal(number)
        container.exited.add_done_callback(lambda _: os.write(done_w, b"e"))
        if container.terminal >= 0:
            from workbench.cli.terminal import Terminal

            with Terminal(container.terminal) as terminal:
                terminal.attend(container.signal, wakeup, done_r)
        else:
            while not container.exited.done():
                for fd, _ in poll.poll():
                    if fd == wakeup:
                        for number in os.read(wakeup, 64):
                            if number != signal.SIGWINCH:
                                container.signal(number)
                    else:
                        os.read(done_r, 1)
        return container.exited.result()
    finally:
        os.close(done_r)
        os.close(done_w)
