"""A freeze that was asked for from inside: in a process of its own, so that it can be ended as by Ctrl-C."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.model import WorkbenchError

if TYPE_CHECKING:
    from workbench.jupyter.guest_channel import Channel
    from workbench.workbench import Workbench

_PATIENCE = 30.0  # seconds to tidy up


def freeze(bench: Workbench, channel: Channel, text: str, image: str, *, build: bool) -> dict[str, Any]:
    """What ``bench.freeze`` gives as plain values; ``left``: what is lost, in lines; ``recipe``: its texts, by file.

    text: how the image is called. Raises Interrupted, and as ``Workbench.freeze`` does.
    """
    from workbench.history.freeze import frozen_name, texts

    channel.tell(name=frozen_name(text, image).rpartition("/")[2])
    with bench.store.staging() as staging:
        folder, answer = staging / "recipe", staging / "answer"
        settings = {name: getattr(bench, name) for name in bench.trait_names(config=True)}
        wish = {"settings": settings, "text": text, "image": image, "build": build, "out": str(folder)}
        said = _run({**wish, "answer": str(answer)}, channel)
        if not answer.exists():
            raise RuntimeError(said)
        found: dict[str, Any] = json.loads(answer.read_bytes())
        if "error" in found:
            raise WorkbenchError.from_dict(found)
        return found | {"folder": "", "recipe": texts(folder, text)}


def _run(wish: dict[str, Any], channel: Channel) -> str:
    """The end of what the process says on its standard error; raises Interrupted when it was ended before its time."""
    process = subprocess.Popen(
        # Not with modules of the working folder, into which the container writes.
        [sys.executable, "-P", "-m", "workbench.jupyter.guest_freeze", str(os.getpid())], cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdin and process.stderr
        try:
            process.stdin.write(json.dumps(wish).encode())
            process.stdin.close()
            return _follow(process.stderr.fileno(), channel)
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _follow(fd: int, channel: Channel) -> str:
    """Tell what a process says, until it has nothing more to say."""
    ready = select.poll()
    ready.register(fd, select.POLLIN | select.POLLHUP)
    said, line = b"", "beginning"
    while True:
        if ready.poll(100):
            data = os.read(fd, 1 << 16)
            if not data:
                return said.decode(errors="replace")
            said = (said + data)[-4096:]
            if b"\n" in said:
                line = said.rpartition(b"\n")[0].rpartition(b"\n")[2].decode(errors="replace").strip() or line
        channel.say(line)


def main(parent: str) -> None:
    """In the process: freeze what standard input says, and end when its parent does."""
    from workbench.history.freeze import summary
    from workbench.linux import syscalls as sc
    from workbench.workbench import Workbench

    signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in the background ignores it
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != int(parent):
        sys.exit(130)
    wish = json.load(sys.stdin)
    bench = Workbench(**wish["settings"])
    try:
        done = bench.freeze(
            wish["text"], wish["out"], build=wish["build"], stranger=True, image=wish["image"],
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        answer = asdict(done) | {"image": done.image.id if done.image else None, "left": list(summary(done.lost))}
    except WorkbenchError as error:
        answer = error.as_dict()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        bench.close()
    Path(wish["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
