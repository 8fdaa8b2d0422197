"""What the figures play in: the image, its files in a plain folder, and folders that are gone afterwards.

The *plain* side runs the same files without a container: the image's tree is copied into a folder of the same disk
(no overlay), and its programs are entered with ``nsenter`` and a root directory, in the host's own network, process,
user and cgroup namespaces and without a filter of system calls. (An unprivileged user needs a user namespace for
chroot(2); programs do not notice it.) That costs a plain start one ``exec``, about a millisecond.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.model import Image
    from workbench.workbench import Workbench

TOP = Path(__file__).resolve().parent.parent
#: Kernelspecs of the two sides.
PLAIN, OURS = "plain", "ours"


@dataclass(frozen=True, slots=True)
class Scene:
    """The stage: ``base`` holds everything that is removed at the end, ``work`` is what kernels work in."""

    base: Path
    work: Path
    workbench: Workbench
    image: Image
    tree: Path
    enter: tuple[str, ...]
    env: dict[str, str]
    mark: str = ""

    def plain(self, *command: str) -> list[str]:
        """A command of the image's, run without a container."""
        return [*self.enter, "/usr/bin/env", "-i", *(f"{k}={v}" for k, v in self.env.items()), *command]


def say(text: str) -> None:
    """A sign of life; the table alone goes to the standard output."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def folders() -> Iterator[Path]:
    """A short-named temporary folder, with Jupyter's own folders in it; removed whoever owns what is in it."""
    base = Path(tempfile.mkdtemp(prefix="wbb", dir="/tmp"))
    for name in ("config", "data", "runtime"):
        os.environ[f"JUPYTER_{name.upper()}_DIR"] = str(base / "j" / name)
        (base / "j" / name).mkdir(parents=True)
    for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "JPY_SESSION_NAME"):
        os.environ.pop(name, None)
    try:
        yield base
    finally:
        from workbench.linux import userns

        userns.call("workbench.linux.trees:remove", str(base))


@contextlib.contextmanager
def stage(base: Path, recipe: str = "python", mark: str = "") -> Iterator[Scene]:
    """Build (or find) the image, copy its tree, write the kernelspecs; ``mark`` ends the names of all that is made."""
    from workbench.workbench import Workbench

    bench = Workbench()
    try:
        say(f"image: recipe {recipe}")
        image = bench.build(str(TOP / "recipes" / recipe), refresh=True, progress=lambda line: say(f"  {line}")).image
        work, tree = base / f"work{mark}", base / f"tree{mark}"
        for path in (work, tree):
            path.mkdir()
        _copy(bench, image, tree)
        _forget(tree, *(bench.store.layer(diff_id) for diff_id in image.diff_ids))
        env = {**dict(image.env), "HOME": "/root"}
        with _entered(tree, (base / "j", work)) as enter:
            scene = Scene(base, work, bench, image, tree, enter, env, mark)
            _kernelspecs(scene)
            yield scene
    finally:
        bench.close()


def _copy(bench: Workbench, image: Image, tree: Path) -> None:
    """The image's files as one plain tree with the owners that they have inside."""
    from workbench.model import Mount

    say("image: its files in a plain folder")
    container = bench.create(
        image.id, argv=["cp", "-ax", "/.", "/mnt/tree/"], cwd=None, network="none",
        mounts=[Mount(str(tree), "/mnt/tree")],
    )  # fmt: skip
    container.start().result()
    end = container.exited.result()
    said = bench.logs(container.id)
    container.settle()
    # The few files that are bound over the image's belong to nobody's environment: only a real failure counts.
    if not (tree / "usr" / "bin").is_dir():
        raise RuntimeError(f"copy the image's files: exit code {end.code}: {said[-300:]}")


def _forget(*trees: Path) -> None:
    """Have programs and libraries read anew on both sides.

    What was just written lies in larger pieces of the page cache than what was read, and runs quicker.
    """
    os.sync()
    for tree in trees:
        for folder, _, names in os.walk(tree):
            for name in names:
                with contextlib.suppress(OSError):
                    if os.lstat(path := os.path.join(folder, name)).st_size >= 1 << 16:
                        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                        os.close(fd)


@contextlib.contextmanager
def _entered(tree: Path, shown: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """A process with ``tree`` as its root, whose mounts end with it; the command that joins it."""
    root = os.geteuid() == 0
    binds = [f"mkdir -p {tree}{path} && mount --bind {path} {tree}{path}" for path in shown]
    script = " && ".join([
        f"mount --rbind /proc {tree}/proc", f"mount --rbind /dev {tree}/dev", *binds,
        "echo ready", f"exec chroot {tree} sleep infinity",
    ])  # fmt: skip
    unshare = ["unshare", "--mount", "--propagation", "private", *([] if root else ["--user", "--map-root-user"])]
    holder = subprocess.Popen(
        [*unshare, "sh", "-c", script], stdout=subprocess.PIPE, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError("enter the plain folder: no mount namespace can be made")
        while os.readlink(f"/proc/{holder.pid}/exe").endswith(("/sh", "/dash", "/chroot")):
            pass
        yield ("nsenter", f"--target={holder.pid}", "--mount", "--root", "--wd",
               *([] if root else ["--user", "--preserve-credentials"]))  # fmt: skip
    finally:
        holder.kill()
        holder.wait()


def _kernelspecs(scene: Scene) -> None:
    assert scene.image.kernel is not None
    write_kernelspec(scene.base, PLAIN + scene.mark, {"argv": scene.plain(*scene.image.kernel.argv)})
    ours_kernelspec(scene)


def ours_kernelspec(scene: Scene) -> None:
    """The kernelspec of the scene's image, in a container."""
    config = {"image": scene.image.id, "home": scene.workbench.home}
    provisioner = {"provisioner_name": "workbench", "config": config}
    metadata = {"kernel_provisioner": provisioner}
    write_kernelspec(scene.base, OURS + scene.mark, {"argv": ["unused", "{connection_file}"], "metadata": metadata})


def write_kernelspec(base: Path, name: str, spec: dict[str, Any]) -> None:
    """Where jupyter_client looks for them while the scene stands."""
    folder = base / "j" / "data" / "kernels" / name
    folder.mkdir(parents=True)
    common = {"display_name": name, "language": "python", "interrupt_mode": "message"}
    (folder / "kernel.json").write_text(json.dumps(common | spec))
