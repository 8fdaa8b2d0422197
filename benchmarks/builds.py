"""Figures of builds: a recipe from its lock against a Containerfile of the same packages, and what images take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Figure, bounded, compare, timed
from benchmarks.peers import Podman, checked
from benchmarks.scene import TOP, Scene
from workbench.images import config
from workbench.linux import userns
from workbench.workbench import Workbench

RECIPE = TOP / "recipes" / "python"
#: What somebody would write by hand for the recipe's packages.
CONTAINERFILE = """\
FROM {base}
ARG PIP_CERT SSL_CERT_FILE
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \\
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir {packages}
"""
IMAGES = 20


def builds(scene: Scene, podman: Podman | None, count: int) -> Iterator[Figure]:
    """Cold: an empty store, nothing downloaded; podman has Debian's base already, ours makes it. One package more is
    written into the recipe beside its lock, whose other steps stay."""
    cold, sizes = [], []
    for number in range(count):
        home = scene.base / f"cold{number}"
        bench = Workbench(home=str(home))
        try:
            cold.append(timed(lambda bench=bench: bench.build(str(RECIPE), refresh=True)))  # type: ignore[misc]
            image = bench.image("python")
            sizes.append(float(bench.store.size(image)))
            if number == count - 1:
                more = timed(lambda bench=bench: bench.build(str(_more(scene)), refresh=True))  # type: ignore[misc]
        finally:
            bench.close()
            userns.call("workbench.linux.trees:remove", str(home))
    yield compare("one Python package more / the cold build", [more], cold[-1:], 0.1, unit="s", scale=1)
    yield _shared(scene)
    if podman is not None:
        theirs, size = _by_podman(scene, podman, count)
        said = f"{podman.said}, over Debian's base"
        yield compare("recipe from its lock, cold / podman build", cold, theirs, 0.5, unit="s", scale=1, against=said)
        yield compare("size of the image / podman's", sizes[:1], [size], 1, unit="MB", scale=1e-6, against=said)


def _more(scene: Scene) -> Path:
    folder = scene.base / "more"
    folder.mkdir()
    text = (RECIPE / "recipe.toml").read_text().replace('"pandas"]', '"pandas", "toolz"]')
    (folder / "recipe.toml").write_text(text)
    shutil.copy(RECIPE / "recipe.lock", folder)
    return folder


def _by_podman(scene: Scene, podman: Podman, count: int) -> tuple[list[float], float]:
    """Seconds of each build, and bytes of the image as layers."""
    import tomllib

    base = _base(scene, podman)
    packages = tomllib.loads((RECIPE / "recipe.toml").read_text())["python"]["packages"]
    folder = scene.base / "containerfile"
    folder.mkdir()
    words = " ".join(f"'{name}'" for name in [*packages, "pip"])
    (folder / "Containerfile").write_text(CONTAINERFILE.format(base=base, packages=words))
    bundle = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    command = podman.build("--no-cache", "--network=host", f"--volume={bundle}:/run/ca.pem:ro",
                           "--build-arg=PIP_CERT=/run/ca.pem", "--build-arg=SSL_CERT_FILE=/run/ca.pem",
                           "--tag=bench-build", str(folder))  # fmt: skip
    seconds = []
    for _ in range(count):
        seconds.append(timed(lambda: checked(command)))
    archive = folder / "image.tar"
    checked(podman.save("bench-build", str(archive)))
    size = 0
    shutil.unpack_archive(archive, folder / "image", "tar")
    for entry in json.loads((folder / "image" / "manifest.json").read_text())[0]["Layers"]:
        size += (folder / "image" / entry).stat().st_size
    return seconds, float(size)


def _base(scene: Scene, podman: Podman) -> str:
    """The lowest layer of our image, Debian's minimal system, as an image of podman's."""
    store = scene.workbench.store
    history = store.history(scene.image.id)[:1]  # buildah wants an entry for each layer
    data = config.encode(diff_ids=scene.image.diff_ids[:1], env=scene.image.env[:1], cmd=("/bin/sh",), history=history)
    image = store.add_image(data)
    podman.take(replace(scene, image=image))
    return image.id.removeprefix("sha256:")


def _shared(scene: Scene) -> Figure:
    """What 20 images over one base take on the disk, to the base once and what each adds."""
    home = scene.base / "shared"
    bench = Workbench(home=str(home))
    try:
        below = scene.base / "below"
        below.mkdir()
        (below / "recipe.toml").write_text('name = "below"\n[base]\nsuite = "bookworm"\n')
        bench.build(str(below))
        layers = Path(home, "layers")
        base, deltas = _blocks(layers), 0
        for number in range(IMAGES):
            folder = scene.base / f"above{number}"
            folder.mkdir()
            script = f"head -c {1 << 20} /dev/zero | tr '\\\\0' {chr(97 + number)} > /opt/data; mkdir /opt/{number}"
            (folder / "recipe.toml").write_text(
                f'name = "above{number}"\n[base]\nrecipe = "../below"\n[[run]]\nscript = "{script}"\n'
            )
            top = bench.build(str(folder)).image.diff_ids[-1]
            deltas += _blocks(layers / top[7:])
        ratio = _blocks(layers) / (base + deltas)
        return bounded(f"disk of {IMAGES} images over one base / base and deltas", [ratio], 1.02, "x")
    finally:
        bench.close()
        userns.call("workbench.linux.trees:remove", str(home))


def _blocks(folder: Path) -> int:
    """Bytes that a folder takes on the disk (du(1))."""
    done = subprocess.run(["du", "-s", "--block-size=1", str(folder)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0])
