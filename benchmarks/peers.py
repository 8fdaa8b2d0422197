"""Podman and crun, as Debian has them, with storage of their own that is gone afterwards.

What they cannot do on a host as it is, is found out by trying, and said.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scene import Scene, say

_HUGETLB = "/sys/fs/cgroup/hugetlb"


def tried(command: Sequence[str], timeout: float = 300) -> str:
    """Runs a command; empty when it went well, else the last line that it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
                          check=False)  # fmt: skip
    return _last_line(done) if done.returncode else ""


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def checked(command: Sequence[str], **options: Any) -> None:
    """Runs a command that has to go well (options: as ``subprocess.run``'s). Raises RuntimeError."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False, **options
    )  # fmt: skip
    if done.returncode:
        shown = re.sub("--[a-z]+ /[^ ]+ ", "", " ".join(command))[:80]
        raise RuntimeError(f"{shown}: {_last_line(done)}")


@contextlib.contextmanager
def whole_hierarchy() -> Iterator[None]:
    """Give crun the one cgroup v1 hierarchy whose absence makes it refuse a mixed host; root only.

    The mount is in this process's own mount namespace.
    """
    if os.geteuid() or not os.path.isdir("/sys/fs/cgroup/pids") or os.path.ismount(_HUGETLB):
        yield
        return
    made = not os.path.isdir(_HUGETLB)
    with contextlib.suppress(OSError):
        os.makedirs(_HUGETLB, exist_ok=True)
    mounted = not tried(["mount", "-t", "cgroup", "-o", "hugetlb", "cgroup", _HUGETLB])
    try:
        yield
    finally:
        if mounted:
            tried(["umount", "--lazy", _HUGETLB])
        if made:
            _remove_folders(_HUGETLB)


def _remove_folders(top: str) -> None:
    """A folder with all folders in it, if they hold nothing else: control groups that nobody is in, for one."""
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


class Podman:
    """``podman run`` of the same image, layer for layer."""

    def __init__(self, scene: Scene) -> None:
        program = shutil.which("podman")
        if not program:
            raise RuntimeError("podman is not installed; `make bench` does that")
        self._base = scene.base / "podman"
        self._base.mkdir()
        self._bases = [self._base]
        self._program = self._over(program, self._base)
        self._options: list[str] = []
        self._groups = set(glob.glob("/sys/fs/cgroup/*/libpod_parent"))
        self.image = scene.image.id.removeprefix("sha256:")
        self.said = "podman"

    def _over(self, program: str, base: Path) -> list[str]:
        """The beginning of a command line with storage below a folder."""
        places = {"root": base / "root", "runroot": base / "runroot", "tmpdir": self._base / "tmpdir"}
        return [
            program, *(word for name, place in places.items() for word in (f"--{name}", str(place))),
            "--storage-driver=overlay", "--cgroup-manager=cgroupfs", "--log-level=error",
        ]  # fmt: skip

    def load(self, scene: Scene) -> None:
        """Hand the image over as an OCI layout, and find out how this host can run it."""
        say("podman: the same image")
        self.take(scene)
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"]
        said = ""
        for network in ([], ["--network=none"]):
            for runtime in ("crun", "runc"):
                for ulimits in ([], limits):
                    self._options = [f"--runtime={runtime}", *network, *ulimits]
                    if shutil.which(runtime) is None:
                        continue
                    said = tried(self.run(command=["true"]))
                    if not said:
                        self.said = " ".join(["podman", *self._options]).replace(f"--runtime={runtime}", runtime)
                        return
        raise RuntimeError(f"podman run: {said}")

    def take(self, scene: Scene) -> None:
        """Hand over the scene's image as an OCI layout. Raises RuntimeError."""
        layout = self._base / "oci"
        _layout(scene, layout)
        said = tried([*self._program, "pull", "--quiet", f"oci:{layout}"])
        shutil.rmtree(layout)
        if said:
            raise RuntimeError(f"podman pull: {said}")

    def build(self, *words: str) -> list[str]:
        """A command line that builds from a Containerfile."""
        runtime, *rest = self._options
        limits = [word for word in rest if not word.startswith("--network")]
        return [*self._program, runtime, "build", *limits, *words]

    def save(self, image: str, path: str) -> list[str]:
        """A command line that writes an image in Docker's form."""
        return [*self._program, "save", "--output", path, image]

    def load_elsewhere(self, path: str) -> list[str]:
        """A command line that loads an archive into an empty storage of its own."""
        self._bases.append(self._base / f"load{len(self._bases)}")
        program = self._over(self._program[0], self._bases[-1])
        checked([*program, "images"])  # what it makes once is there
        return [*program, "load", "--input", path]

    def commit(self, container: str, image: str, *, pause: bool) -> list[str]:
        """A command line that makes an image of what a container changed."""
        return [*self._program, "commit", "--quiet", f"--pause={str(pause).lower()}", container, image]

    def can_pause(self, container: str) -> bool:
        """Whether a running container can be made to stand still."""
        return not tried([*self._program, "pause", container]) and not tried([*self._program, "unpause", container])

    def run(self, *options: str, command: Sequence[str]) -> list[str]:
        """A command line."""
        return [*self._program, "run", "--rm", *self._options, *options, self.image, *command]

    def end_all(self) -> None:
        """End all its containers at once."""
        tried([*self._program, "rm", "--all", "--force", "--time=0"])

    def close(self) -> None:
        """End what podman leaves running for an unprivileged user, and let go of its mounts."""
        self.end_all()
        for file in self._base.rglob("pause.pid") if os.geteuid() else ():
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        if os.geteuid() == 0:
            for base in self._bases:
                tried(["umount", "--lazy", str(base / "root" / "overlay")])
            time.sleep(1)  # what podman leaves behind to tidy up after each container has done so by then
            for group in set(glob.glob("/sys/fs/cgroup/*/libpod_parent")) - self._groups:
                _remove_folders(group)


@contextlib.contextmanager
def podman(scene: Scene) -> Iterator[Podman | None]:
    """Podman with the image loaded, or None (and why) where it does not work here."""
    made: Podman | None = None
    try:
        made = Podman(scene)
        made.load(scene)
    except RuntimeError as error:
        say(f"  not compared with podman: {error}")
        if made:
            made.close()
        made = None
    try:
        yield made
    finally:
        if made:
            made.close()


def _layout(scene: Scene, folder: Path) -> None:
    """An OCI image layout (image-layout.md) with the image's own config and uncompressed layers."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    kind = "application/vnd.oci.image"

    def described(media: str, digest: str) -> dict[str, Any]:
        return {"mediaType": f"{kind}.{media}", "digest": digest, "size": (blobs / digest[7:]).stat().st_size}

    for digest in scene.image.diff_ids:
        scene.workbench.store.write_tar(digest, blobs / digest[7:])
    config = Path(scene.workbench.home, "blobs", "sha256", scene.image.id[7:]).read_bytes()
    (blobs / scene.image.id[7:]).write_bytes(config)
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json",
        "config": described("config.v1+json", scene.image.id),
        "layers": [described("layer.v1.tar", digest) for digest in scene.image.diff_ids],
    }).encode()  # fmt: skip
    name = hashlib.sha256(manifest).hexdigest()
    (blobs / name).write_bytes(manifest)
    index = {"schemaVersion": 2, "manifests": [described("manifest.v1+json", f"sha256:{name}")]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


class Crun:
    """``crun run`` of a command over the image's plain tree: one folder, no overlay, no network.

    filtered: with the filter of system calls that podman hands to it, which every real use has; else with the
    specification as ``crun spec`` writes it.
    """

    def __init__(self, scene: Scene, command: Sequence[str], *, filtered: bool) -> None:
        program = shutil.which("crun")
        if not program:
            raise RuntimeError("crun is not installed; `make bench` does that")
        self._name = f"wbb{os.getpid()}{'f' * filtered}"
        self._bundle = scene.base / self._name
        self._bundle.mkdir()
        spec = [program, "spec", *(["--rootless"] if os.geteuid() else [])]
        subprocess.run(spec, cwd=self._bundle, check=True)
        file = self._bundle / "config.json"
        config = json.loads(file.read_text())
        config["process"] |= {"terminal": False, "args": list(command)}
        config["root"] = {"path": str(scene.tree), "readonly": True}
        if filtered:
            config["linux"]["seccomp"] = _runtime_profile(config["process"]["capabilities"]["bounding"])
        file.write_text(json.dumps(config))
        self.said, said = "", ""
        for options in ([], ["--cgroup-manager=disabled"]):
            self._program = [program, "--root", str(scene.base / "crun"), *options]
            said = tried(self._command())
            if not said:
                self.said = " ".join(["crun run", *options, "with" if filtered else "without", "a seccomp filter"])
                return
        raise RuntimeError(f"crun run: {said}")

    def _command(self) -> list[str]:
        return [*self._program, "run", "--bundle", str(self._bundle), self._name]

    def run(self) -> None:
        """Run the command to its end."""
        subprocess.run(self._command(), check=True, stdin=subprocess.DEVNULL)


def _runtime_profile(capabilities: Sequence[str]) -> dict[str, Any]:
    """Podman's seccomp profile in the form of the OCI runtime specification, as podman itself hands it on."""
    profile = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    machine = os.uname().machine
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    rules = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if set(includes.get("caps") or ()) - set(capabilities) or arch not in (includes.get("arches") or [arch]):
            continue
        if set(excludes.get("caps") or ()) & set(capabilities) or arch in (excludes.get("arches") or ()):
            continue
        kept = {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key)}
        rules.append(kept)
    native = f"SCMP_ARCH_{machine.upper()}"
    return {"defaultAction": profile["defaultAction"], "architectures": [native], "syscalls": rules}
