"""What an image says or ships cannot widen the sandbox, nor can what a container leaves in its own layer."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.containers.inside import PYTHON, Outcome, probe, run
from workbench.containers import spec
from workbench.images import config
from workbench.linux import userns
from workbench.model import Exit, Image, InvalidInput, Kernel, LaunchFailed, Limits, Mount, Settings
from workbench.workbench import Workbench


def labelled(**labels: str) -> bytes:
    return json.dumps({
        "os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Labels": {f"org.jupyter.workbench.{name}": text for name, text in labels.items()}},
    }).encode()  # fmt: skip


@pytest.mark.parametrize(
    "limits",
    [
        '{"memory":-1}', '{"memory":0}', '{"processes":-1}', '{"processes":0}', '{"cpus":-1}', '{"cpus":0}',
        '{"cpus":1e308}', '{"memory":1e30}', '{"memory":"max"}', '{"cpus":NaN}', '{"processes":18446744073709551615}',
    ],
)  # fmt: skip
def test_limits_that_mean_no_limit(limits):
    """-1 is "unlimited" to a control group, and the smaller of two numbers."""
    with pytest.raises(InvalidInput):
        config.decode(labelled(limits=limits))


def test_an_image_narrows_limits_only():
    granted = Limits(memory=1 << 30, processes=100, cpus=1.0)
    image = config.decode(labelled(limits='{"memory":9000000000000,"processes":1000000,"cpus":64}'))
    assert granted.stricter(image.limits) == granted


def test_what_a_foreign_config_asks_for_is_not_given(workbench, image, monkeypatch):
    """Everything that some runtime takes from an image's config or labels, in one image."""
    found: Image = workbench.image(image)
    hostile = json.loads(config.encode(
        diff_ids=found.diff_ids, cmd=("/bin/true",),
        env={
            "PATH": "/opt/evil:/usr/bin:/bin", "LD_PRELOAD": "/opt/evil/x.so", "TINI_SUBREAPER": "1",
            "WORKBENCH_HOME": "/opt", "WORKBENCH_SINGLE_ID": "1", "GLIBC_TUNABLES": "glibc.malloc.check=3",
            "HOME": "/proc/1", "LD_LIBRARY_PATH": "/opt/evil",
        },
    ))  # fmt: skip
    hostile["config"] |= {
        "User": "0:0", "Volumes": {"/": {}, "/etc": {}}, "ExposedPorts": {"22/tcp": {}}, "StopSignal": "SIGKILL",
        "Labels": {
            "org.jupyter.workbench.network": "host", "org.jupyter.workbench.mounts": '["/:/host"]',
            "org.jupyter.workbench.profile": "bootstrap", "org.jupyter.workbench.capabilities": '["SYS_ADMIN"]',
            "io.podman.annotations.privileged": "TRUE", "io.containers.capabilities": "SYS_ADMIN",
            "io.kubernetes.cri-o.userns-mode": "host",
        },
        "Healthcheck": {"Test": ["CMD", "/bin/sh"]}, "OnBuild": ["RUN x"], "Privileged": True,
    }  # fmt: skip
    data = json.dumps(hostile).encode()
    evil = config.decode(data)
    wanted = workbench._spec(evil, None, None, {}, False, (), None, None)
    plain = workbench._spec(found, ["/bin/true"], None, {}, False, (), None, None)
    for name in ("mounts", "hidden", "fixed", "texts", "limits", "network", "profile", "terminal"):
        assert getattr(wanted, name) == getattr(plain, name), name
    assert wanted.capabilities() == spec.CAPABILITIES
    monkeypatch.setattr(workbench.store, "image", lambda _id: evil)
    status = run(workbench, image, ["/bin/cat", "/proc/1/status", "/proc/self/status"], network="none").text
    mask = sum(1 << spec.sc.CAPABILITIES.index(name) for name in spec.CAPABILITIES)
    caps = [line.split()[1] for line in status.splitlines() if line.startswith(("CapPrm", "CapEff", "CapBnd"))]
    assert {int(text, 16) for text in caps} == {mask}
    assert status.count("NoNewPrivs:\t1") == status.count("Seccomp:\t2") == 2
    with pytest.raises(LaunchFailed, match="no such program"):
        run(workbench, image, ["evil"], network="none")


def test_settings_of_the_host_go_over_those_of_an_image():
    settings = Settings(env=(("https_proxy", "http://proxy"),))
    env = dict(spec.environment([("https_proxy", "http://evil"), ("A", "b")], settings, {"X": "y"}))
    assert env["https_proxy"] == "http://proxy"
    for name, value in (("", "x"), ("A=B", "x"), ("A", "x\0y"), ("A\0B", "x")):
        with pytest.raises(InvalidInput):
            spec.environment([(name, value)], settings, {})


@pytest.mark.parametrize("language", ["../../../../etc", "/tmp/evil", "..", ".", "a/b", "", "x\n"])
def test_a_kernels_language_is_no_path(language, tmp_path, monkeypatch):
    from workbench.jupyter import kernelspecs

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    kernel = Kernel(("/bin/true",), language=language, display_name="x" * 10_000)
    folder = kernelspecs.write("evil", Image("sha256:" + "0" * 64, (), kernel=kernel))
    assert os.listdir(folder) == ["kernel.json"]
    kernelspecs.remove("evil")


# --- what a layer ships, and what a container leaves for its next start ----------------------------------------


def start(workbench: Workbench, image: str, layer: Path, argv: list[str], mounts: tuple[Mount, ...] = ()) -> Outcome:
    """Run over the image with one more layer on top, whose files are below ``layer``."""
    base = workbench.image(image)
    below = [str(workbench.store.layer(d)) for d in reversed(base.diff_ids)]
    wanted = spec.ContainerSpec(
        id=os.urandom(6).hex(), argv=tuple(argv), env=(("PATH", spec.DEFAULT_PATH),), cwd="/",
        layers=(str(layer), *below), hostname="evil", network="none", mounts=mounts,
        limits=Limits(processes=100),
    )  # fmt: skip
    container = workbench.containers.create(wanted, image=base.id)
    try:
        container.start().result(timeout=20)
        end = container.exited.result(timeout=20)
        text = Path(container.log).read_text(errors="replace")
    except LaunchFailed as error:
        end, text = Exit(126, str(error)), ""
    kept = container.settle()
    if kept:
        workbench.remove(container.id, force=True)
    return Outcome(text, end, kept, container.id)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: os.symlink(target, path)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a link to the host's": link("/VICTIM"),
    "a link up and up": link("../../../../../../../../VICTIM"),
    "a link to a process's root": link("/proc/self/root/VICTIM"),
    "a link to a descriptor": link("/proc/self/fd/5"),
    "a link to itself": lambda path: os.symlink(path.name, path),
    "a dangling link": link("/nowhere/at/all"),
    "a FIFO": lambda path: os.mkfifo(path),
    "a file": lambda path: path.write_text("evil"),
    "a folder": lambda path: path.mkdir(),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o777),
}
PLACES = ("etc", "etc/resolv.conf", "etc/hosts", "proc", "sys", "dev", "run", "tmp", "WORK", "usr", "root")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_layer_leads_nowhere(workbench, image, tmp_path, kind):
    """It may fail to start; it may not hang, and nothing on the host is read, made or changed."""
    victim = tmp_path / "victim"
    (victim / "workbench").mkdir(parents=True)
    (victim / "hosts").write_text("the host's")
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in (victim, victim / "workbench", victim / "hosts")}
    script = (
        "for f in /etc/hosts /run/workbench /tmp /work/data; do echo evil >$f/made 2>/dev/null; done;"
        "cat /etc/hosts; grep -c ^processor /proc/cpuinfo; echo x >/proc/sys/kernel/hostname;"
        "id -u; head -c 8 /dev/zero | wc -c; cat /proc/1/comm"
    )
    for place in PLACES:
        layer = tmp_path / ("layer-" + place.replace("/", "-"))
        path = layer / place.replace("WORK", "work")
        path.parent.mkdir(parents=True)
        KINDS[kind](path)
        if os.path.islink(path) and "VICTIM" in os.readlink(path):
            target = os.readlink(path).replace("/VICTIM", str(victim))
            path.unlink()
            os.symlink(target, path)
        outcome = start(workbench, image, layer, ["/bin/sh", "-c", script], (Mount(str(work / "data"), "/work/data"),))
        assert "the host's" not in outcome.text, place
        assert outcome.end.code != 0 or outcome.text, place
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(os.listdir(victim)) == ["hosts", "workbench"]
    assert set(os.listdir(work / "data")) <= {"made"}
    assert run(workbench, image, ["true"], network="none").end.code == 0, "the helper lives on"


REPLACED = {
    "/tmp is a link": "rm -rf /tmp; ln -s /etc /tmp",
    "/tmp is gone": "rm -rf /tmp",
    "/tmp is a file": "rm -rf /tmp; echo >/tmp",
    "/etc is a link": "mv /etc /opt/etc; ln -s /proc/1/root /etc",
    "/etc is a folder of its own": "mv /etc /opt/etc; mkdir -p /etc/resolv.conf /etc/hosts",
    "pipes in /etc": "mv /etc /opt/etc; mkdir /etc; mkfifo /etc/resolv.conf /etc/hosts /etc/hostname",
    "the working folder's parent is a link": "mv TOP /opt/top; ln -s /proc TOP",
    "modes of nothing": "mkdir -p /opt/a/b; chmod 0 /opt/a/b /opt/a /opt; chmod 0 /tmp /",
    "sticky, set-group": "mkdir /opt/s; chmod 7777 /opt/s /; chown 65534:65534 /opt/s",
    "the root is busy with names": "cd /; for n in proc sys dev run; do mv $n $n.x; rmdir $n; done; touch '/new\nline'",
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("single", [False, True], ids=["usual", "single"])
def test_what_a_container_replaced_hurts_nobody_at_its_next_start(image, tmp_path, monkeypatch, what, single):
    if single:
        monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "secret").write_text("the host's")
    script = REPLACED[what].replace("TOP", "/" + str(tmp_path).split("/")[1])
    code = f"""
import os, subprocess
if not os.path.exists("/opt/second"):
    open("/opt/second", "w").close()
    subprocess.run(["sh", "-c", {script!r}])
else:
    print("again", os.getcwd(), os.path.exists({str(tmp_path / "secret")!r}))
"""
    workbench = Workbench()
    try:
        container = workbench.create(image, argv=[PYTHON, "-c", code], cwd=str(work), network="none")
        container.start().result(timeout=20)
        container.exited.result(timeout=20)
        try:
            container.start().result(timeout=20)
            container.exited.result(timeout=20)
            text = Path(container.log).read_text()
            assert "True" not in text
        except LaunchFailed as error:
            assert len(str(error).splitlines()) == 1
        assert container.settle()
        assert os.listdir(work) == []
        assert os.listdir(tmp_path) == sorted(["secret", "work"]) or set(os.listdir(tmp_path)) == {"secret", "work"}
        assert run(workbench, image, ["true"], network="none").end.code == 0
        workbench.remove(container.id, force=True)
        assert not os.path.exists(container.folder)
    finally:
        workbench.close()


def test_one_container_cannot_spoil_the_init_of_others(workbench, image):
    spoil = "cd /proc/1; chmod 0 exe; chown 5 exe; truncate -s 0 exe; cp /bin/true exe; rm exe; true"
    for _ in range(2):
        assert run(workbench, image, ["sh", "-c", spoil], network="none").end.code == 0
    assert probe(workbench, image, "import os; print(os.stat('/proc/1/exe').st_mode & 0o777)", network="none") == 0o555


def test_ids_are_the_containers_own(workbench, image):
    maps = run(workbench, image, ["cat", "/proc/self/uid_map", "/proc/self/gid_map"], network="none").text
    rows = [list(map(int, line.split())) for line in maps.splitlines()]
    assert all(row[0] >= 0 for row in rows)
    if userns.host_ids().kind == "root":
        assert all(row[1] >= userns.ROOT_BASE and row[2] == userns.IDS for row in rows), "never the host's root"
