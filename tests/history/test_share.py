"""From one user to another in a file: the same image there, and what other tools make of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.conftest import other_account
from tests.history.test_faults import fill, tree
from tests.history.test_snapshot import DRIVER, Live, difference, listed
from workbench.images import config, files
from workbench.model import Conflict, Corrupt, InvalidInput, NotFound
from workbench.workbench import Workbench

NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'


@pytest.fixture
def made(workbench: Workbench, image: str) -> str:
    """The ID of the second of two snapshots, ``share/plots``."""
    live = Live(workbench, image)
    try:
        for seed in (21, 22):
            live.ask(do="mutate", seed=seed, rounds=80)
            taken = live.snapshot(f"Step {seed}", name="share/plots")
        assert taken.image is not None
        return taken.image.id
    finally:
        live.close()


def test_there_and_back(workbench: Workbench, elsewhere: Workbench, made: str, tmp_path: Path) -> None:
    out = tmp_path / "plots.oci.tar"
    notebook = tmp_path / "analysis.ipynb"
    notebook.write_text(NOTEBOOK)
    assert workbench.export("share/plots", str(out), along=[str(notebook)]) == out.stat().st_size
    assert sorted(os.listdir(tmp_path)) == ["analysis.ipynb", "plots.oci.tar"]
    told: list[tuple[str, int, int]] = []
    name, image, along = elsewhere.load(str(out), meter=lambda *how_far: told.append(how_far))
    assert (
        len(told) > 1
        and told == sorted(told)
        and told[0][:2] == ("reading", 0)
        and len({total for *_, total in told}) == 1
    )
    assert (name, image.id, along) == ("share/plots:latest", made, {"analysis.ipynb": NOTEBOOK.encode()})
    assert [entry.message for entry in elsewhere.history(name)] == ["Step 22", "Step 21", "built from a recipe"]
    assert elsewhere.image("share/plots~2").id == workbench.image("lower").id
    assert elsewhere.check() == []
    assert difference(listed(elsewhere, image), listed(workbench, image)) == []


def test_several_large_layers_and_an_end_midway(workbench: Workbench, elsewhere: Workbench, tmp_path: Path) -> None:
    """They are laid out at once, each in a process of its own, of which none stays behind."""
    layers = [tree((f"file{number}", os.urandom(17 << 20), {})) for number in range(6)]
    made, out = fill(workbench, tmp_path, *layers), tmp_path / "large.oci.tar"
    workbench.export(made.id, str(out))

    def nothing_stays() -> bool:
        elsewhere.gc()
        return elsewhere.images() == [] and os.listdir(elsewhere.store.home / "tmp") == [] and elsewhere.check() == []

    told: list[int] = []

    def impatient(_what: str, done: int, _whole: int) -> None:
        told.append(done)
        if done:
            raise InterruptedError("that is enough")

    with pytest.raises(InterruptedError):
        elsewhere.load(str(out), meter=impatient)
    assert 0 < told[-1] < 5 * (17 << 20)
    assert len(elsewhere.store.layers()) < 6 and nothing_stays()
    damaged = tmp_path / "damaged.oci.tar"
    data = bytearray(out.read_bytes())
    data[data.index(layers[1][4096:8192])] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(Corrupt, match=f"blob {made.diff_ids[1][:19]} is"):
        elsewhere.load(str(damaged))
    assert nothing_stays()
    _, image, _ = elsewhere.load(str(out))
    assert image.id == made.id and elsewhere.check() == []


@pytest.mark.parametrize("form", ["none", "gzip", "zstd"])
def test_compressed_and_the_same_each_time(
    workbench: Workbench, elsewhere: Workbench, made: str, tmp_path: Path, form: str
) -> None:
    layer = workbench.image(made).diff_ids[-1]
    small = workbench.store.add_image(config.encode(diff_ids=[layer], created="2026-01-01T00:00:00Z"))
    workbench.refs.set("share/small:v1", small.id)
    outs = [tmp_path / name for name in ("one.tar", "two.tar")]
    for path in outs:
        workbench.export("share/small:v1", str(path), form=form)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert elsewhere.load(str(outs[0]))[0] == "share/small:v1"
    assert elsewhere.image("share/small:v1").id == small.id and elsewhere.check() == []


@pytest.mark.parametrize("form", ["none", "gzip"])
def test_an_export_tells_how_far_it_is(workbench: Workbench, tmp_path: Path, form: str) -> None:
    """Also while a layer is compressed, in bytes before that."""
    ids, size = [], 0
    for number in range(2):
        path = tmp_path / f"layer{number}"
        path.write_bytes(tree((f"file{number}", bytes(5 << 20), {})))
        ids.append(files.digest(str(path)))
        size += path.stat().st_size
        workbench.store.adopt_tar(path, ids[-1], path.stat().st_size)
    made = workbench.store.add_image(config.encode(diff_ids=ids, created="2026-01-01T00:00:00Z"))
    told: list[tuple[str, int, int]] = []
    workbench.export(made.id, str(tmp_path / "x.tar"), form=form, meter=lambda *how_far: told.append(how_far))
    numbers = [done for _, done, _ in told]
    assert {(what, total) for what, _, total in told} == {("writing", size)}
    assert numbers == sorted(numbers) and len(set(numbers)) > 10 and numbers[-1] == size


def interrupting(*_: object) -> None:
    raise InterruptedError


def test_other_tools_read_it(workbench: Workbench, elsewhere: Workbench, made: str, tmp_path: Path) -> None:
    """skopeo and umoci see the same image; what umoci unpacks is what we launch."""
    out = tmp_path / "plots.oci.tar"
    workbench.export("share/plots", str(out))
    inspect = ["skopeo", "inspect", "--config", f"oci-archive:{out}"]
    seen = json.loads(subprocess.run(inspect, capture_output=True, check=True).stdout)
    assert seen["rootfs"]["diff_ids"] == list(workbench.image(made).diff_ids)
    raw = subprocess.run([*inspect, "--raw"], capture_output=True, check=True).stdout
    assert config.digest_of(raw) == made
    copied = tmp_path / "copied.tar"
    subprocess.run(
        ["skopeo", "copy", "-q", f"docker-archive:{out}", f"docker-archive:{copied}:a/b:c"], check=True, timeout=120
    )
    assert workbench.load(str(copied), "share/copied")[1].id == made  # docker save's form, by another hand
    with pytest.raises(InterruptedError):
        elsewhere.load(str(copied), "share/copied", meter=interrupting)
    layout = tmp_path / "layout"
    layout.mkdir()
    subprocess.run(["tar", "-C", str(layout), "-xf", str(out)], check=True)
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    entry["annotations"]["org.opencontainers.image.ref.name"] = "one"  # umoci takes no slash
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    subprocess.run(["umoci", "unpack", *rootless, "--image", f"{layout}:one", str(tmp_path / "bundle")], check=True,
                   capture_output=True)  # fmt: skip
    theirs = tmp_path / "bundle" / "rootfs"
    ours = listed(workbench, workbench.image(made))
    for path, row in ours.items():
        plain = os.fsdecode(bytes.fromhex(path))
        if plain.startswith(("/etc/host", "/etc/resolv", "/mnt")) or not os.path.lexists(f"{theirs}{plain}"):
            assert plain.startswith(("/etc/host", "/etc/resolv", "/mnt")), plain
            continue
        found = os.lstat(f"{theirs}{plain}")
        if os.geteuid() == 0:
            assert row[:3] == [oct(found.st_mode), found.st_uid, found.st_gid], plain
    shutil.rmtree(tmp_path / "bundle")


@pytest.mark.alone
@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to be two users")
def test_a_colleague_on_the_same_machine(workbench: Workbench, made: str, tmp_path: Path) -> None:
    """Another account, store and way of having ids: the same ID, and the same tree in every attribute."""
    account, python = other_account()
    out = tmp_path / "plots.oci.tar"
    notebook = tmp_path / "analysis.ipynb"
    notebook.write_text(NOTEBOOK)
    workbench.export("share/plots", str(out), along=[str(notebook)])
    place = Path("/tmp", f"wbc{os.getpid()}")
    place.mkdir(0o700)
    shutil.copy(out, place)
    shutil.chown(place, account)
    (place / out.name).chmod(0o644)
    environment = [f"HOME={place}", f"PATH={Path(python).parent}:/usr/bin:/bin:/usr/sbin", f"WORKBENCH_HOME={place}/w",
                   f"JUPYTER_DATA_DIR={place}/j"]  # fmt: skip

    def colleague(*words: str, text: str = "") -> str:
        command = ["runuser", "-u", account, "--", "env", "-i", *environment, python, "-m", "workbench", *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=place, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        said = colleague("import", out.name)
        assert said.splitlines() == [f"share/plots:latest {made}", "analysis.ipynb"]
        assert (place / "analysis.ipynb").read_text() == NOTEBOOK
        assert (place / "j" / "kernels" / "wb-share-plots" / "kernel.json").exists()
        run = ["run", "--Workbench.offer_host_settings=False", "--no-folder", "--network", "none", "share/plots"]
        theirs = json.loads(colleague(*run, "/usr/bin/python3", "-ISuc", DRIVER, text='{"do": "list"}\n'))
        assert difference(theirs, listed(workbench, workbench.image(made))) == []
        assert (
            "Step 22" in colleague("log", "share/plots") and colleague("check") == "Everything is as its digests say.\n"
        )
    finally:
        remove = (
            "import sys; from workbench.linux import userns as u; u.call('workbench.linux.trees:remove', sys.argv[1])"
        )
        command = ["runuser", "-u", account, "--", "env", "-i", *environment, python, "-c", remove, f"{place}/w"]
        subprocess.run(command, check=True, cwd="/")
        shutil.rmtree(place)


def test_what_is_refused(workbench: Workbench, elsewhere: Workbench, made: str, tmp_path: Path) -> None:
    out = tmp_path / "plots.oci.tar"
    for wrong, kind in (
        ({"text": "nothing"}, NotFound), ({"text": "share/plots", "form": "rar"}, InvalidInput),
        ({"text": "share/plots", "along": ["/etc/passwd"]}, InvalidInput),
        ({"text": "share/plots", "along": ["gone.ipynb"]}, NotFound),
    ):  # fmt: skip
        with pytest.raises(kind):
            workbench.export(wrong.pop("text"), str(out), **wrong)  # type: ignore[arg-type]
    assert not out.exists()
    workbench.export("share/plots", str(out))
    with pytest.raises(Conflict, match="--force"):
        workbench.load(str(out), "lower")
    assert workbench.image("lower").id != made
    # a changed byte, and what else lies in an archive
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises((Corrupt, InvalidInput)):
        elsewhere.load(str(tmp_path / "bad.tar"))
    assert elsewhere.refs.all() == {}
    elsewhere.gc()
    assert elsewhere.check() == [] and elsewhere.store.layers() == []


def test_nothing_but_notebooks_comes_along(workbench: Workbench, cli, made: str, tmp_path: Path) -> None:
    out = tmp_path / "plots.oci.tar"
    workbench.export("share/plots", str(out))
    evil = tmp_path / "evil"
    evil.mkdir()
    for name in ("jupyter_server_config.py", ".profile", "..ipynb", "ok.ipynb"):
        (evil / name).write_text(NOTEBOOK)
    with tarfile.open(out, "a") as archive:
        for path in evil.iterdir():
            archive.add(path, f"workbench/{path.name}")
    into = tmp_path / "into"
    into.mkdir()
    done = cli("import", str(out), "share/evil", cwd=into)
    assert done.code == 0, done.err
    assert os.listdir(into) == ["ok.ipynb"]
    (into / "ok.ipynb").write_text("mine")
    done = cli("import", str(out), "share/evil", cwd=into)
    assert "stays as it is" in done.err and (into / "ok.ipynb").read_text() == "mine"
    cli("rmi", "share/evil")
