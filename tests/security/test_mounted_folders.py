"""What is mounted is all that is reached: covers hold, links lead nowhere, and the host's programs stay the host's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.inside import probe, run
from workbench.containers import spec
from workbench.linux import userns
from workbench.model import InvalidInput, LaunchFailed, Mount
from workbench.workbench import Workbench

ROOT = userns.host_ids().kind == "root"
SECRET = "secret-3b1f"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with what a home folder has."""
    home = tmp_path / "home"
    for folder in (".ssh", ".aws", ".config/deep", "notes", "proj/sub"):
        (home / folder).mkdir(parents=True)
    for file in (".ssh/id_rsa", ".aws/credentials", ".netrc", ".config/deep/token"):
        (home / file).write_text(SECRET)
    os.symlink("notes", home / ".linked")
    os.symlink("/etc", home / ".outside")
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(home / ".agent"))
    os.mkfifo(home / ".fifo")
    (home / "notes" / "fine").write_text("fine")
    monkeypatch.setenv("HOME", str(home))
    return home


SEARCH = f"""
import json, os, stat
found, top = [], TOP
for folder, folders, names in os.walk(top):
    for name in names:
        path = os.path.join(folder, name)
        try:
            if stat.S_ISREG(os.lstat(path).st_mode) and {SECRET!r} in open(path, errors="replace").read():
                found.append(path)
        except OSError:
            pass
print(json.dumps(found))
"""


def search(
    workbench: Workbench, image: str, cwd: Path, top: str = "", before: str = "", **options: object
) -> list[str]:
    """Files that hold the secret, found from inside below ``top``."""
    code = SEARCH.replace("TOP", repr(top or str(cwd)))
    result: list[str] = probe(workbench, image, before + code, cwd=str(cwd), network="none", **options)
    return result


def test_covers_of_a_home_hold(workbench, image, home):
    tricks = f"""
import os, subprocess, ctypes
def attempt(function, *args):
    try:
        function(*args)
    except OSError:
        return
    raise SystemExit(f"{{function}} {{args}} worked")
home = {str(home)!r}
for name in (".ssh", ".netrc", ".aws", ".config", ".agent", ".fifo"):
    path = f"{{home}}/{{name}}"
    attempt(os.rename, path, home + "/moved")
    attempt(os.rmdir if os.path.isdir(path) else os.unlink, path)
    attempt(os.symlink, "notes", path)
    if os.path.isdir(path):
        attempt(os.mkdir, path + "/new")
        assert os.listdir(path) == [], path
    else:
        assert open(path).read() == "", path
        attempt(open, path, "w")
    attempt(os.chmod, path, 0o777)
attempt(os.link, home + "/.netrc", home + "/linked")
attempt(os.rename, home, home + "2")
libc = ctypes.CDLL(None, use_errno=True)
for path in (home, home + "/.ssh", home + "/.netrc"):
    assert libc.umount2(path.encode(), 2) == -1
"""
    assert search(workbench, image, home, before=tricks) == []
    assert sorted(os.listdir(home / ".ssh")) == ["id_rsa"]
    assert (home / ".netrc").read_text() == SECRET


def test_a_home_mounted_by_name_or_from_above_is_covered_as_well(workbench, image, home):
    assert search(workbench, image, home.parent) == []
    assert search(workbench, image, home / "proj", "/mnt/h", mounts=[Mount(str(home), "/mnt/h")]) == []
    # What is asked for by its own name is meant.
    mounts = [Mount(str(home / ".aws"), str(home / ".aws"), read_only=True)]
    assert search(workbench, image, home, mounts=mounts) == [f"{home}/.aws/credentials"]


@pytest.mark.skipif(not ROOT, reason="only root may share mounts")
def test_covers_stay_inside_where_the_host_shares_its_mounts(workbench, image, tmp_path, monkeypatch):
    """systemd makes all mounts of a host shared: a copy of one is its peer unless it is made private."""
    place = tmp_path / "shared"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "wb-test", str(place)], check=True)
    try:
        subprocess.run(["mount", "--make-shared", str(place)], check=True)
        (place / ".ssh").mkdir()
        (place / ".ssh" / "id").write_text(SECRET)
        (place / "sub").mkdir()
        monkeypatch.setenv("HOME", str(place))
        before = Path("/proc/self/mountinfo").read_text()
        container = workbench.create(
            image, argv=["sh", "-c", "echo up; read x; ls sub"], cwd=str(place), network="none",
            mounts=[Mount(str(tmp_path), f"{place}/made")],
        )  # fmt: skip
        (reading, writing), (end, ours) = os.pipe(), os.pipe()
        container.start((end, writing, writing)).result(timeout=30)
        os.close(writing)
        os.close(end)
        with os.fdopen(reading) as out:
            assert out.readline() == "up\n"
            assert Path("/proc/self/mountinfo").read_text() == before, "what is mounted inside appears on the host"
            subprocess.run(["mount", "-t", "tmpfs", "wb-test", str(place / "sub")], check=True)
            (place / "sub" / "later").write_text(SECRET)
            os.write(ours, b"\n")
            os.close(ours)
            assert out.read() == "", "what the host mounts later appears inside"
        container.exited.result(timeout=10)
        container.settle()
        assert (place / ".ssh" / "id").read_text() == SECRET
    finally:
        subprocess.run(["umount", "-R", "-l", str(place)], check=True)


def test_private_folders_are_unseen_wherever_they_lie(image, tmp_path, monkeypatch):
    """The store (a container's state decides what its next start mounts), Jupyter's tokens, keys of kernels."""
    folder = tmp_path / "work"
    private = {"store": folder / "data" / "store", "jupyter": folder / "j" / "er" / "runtime", "conf": folder / "conf"}
    for path in private.values():
        path.mkdir(parents=True)
    (private["jupyter"] / "jpserver-1.json").write_text(f'{{"token": "{SECRET}"}}')
    (private["conf"] / "jupyter_server_config.json").write_text(SECRET)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(private["jupyter"]))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(private["conf"]))
    real = Workbench()
    bench = Workbench(home=str(private["store"]))
    try:
        (private["store"] / "state").write_text(SECRET)
        bench._store, bench._refs = real.store, real.refs  # its images, not its place
        tricks = f"""
import os
for name in ("data", "data/store", "j", "j/er", "j/er/runtime", "conf"):
    for trick in (lambda p: os.rename(p, {str(folder)!r} + "/moved"), os.rmdir, lambda p: os.rename(p, "/opt/x")):
        try:
            trick({str(folder)!r} + "/" + name)
        except OSError:
            continue
        raise SystemExit(name + " gave way")
"""
        assert search(bench, image, folder, before=tricks) == []
        assert search(bench, image, folder, "/mnt/w", mounts=[Mount(str(folder), "/mnt/w")]) == []
        for path in (*private.values(), private["jupyter"] / "kernel"):
            path.mkdir(exist_ok=True)
            with pytest.raises(InvalidInput, match="belongs to Workbench or Jupyter itself"):
                bench.create(image, argv=["true"], cwd=str(path))
            with pytest.raises(InvalidInput, match="belongs to Workbench or Jupyter itself"):
                bench.create(image, argv=["true"], cwd=None, mounts=[Mount(str(path), "/mnt")])
        os.symlink(private["store"], folder / "link")
        with pytest.raises(InvalidInput):
            bench.create(image, argv=["true"], cwd=str(folder / "link"))
    finally:
        bench.close()
        real.close()


@pytest.fixture
def below_tmp() -> Iterator[str]:
    """A folder directly below /tmp, where sockets and keys of other kernels may lie."""
    folder = tempfile.mkdtemp(prefix="wbs", dir="/tmp")
    yield folder
    shutil.rmtree(folder)


def test_other_kernels_are_out_of_reach(workbench, image, below_tmp, monkeypatch):
    """Their run folders hold the keys that sign requests: seen from a kernel that works in /tmp, or anywhere."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    other = workbench.create(image, argv=["sleep", "100"], cwd=None, network="none")
    other.start().result(timeout=30)
    try:
        Path(other.run_dir, "connection.json").write_text(SECRET)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{other.run_dir}/k-1")
        code = f"""
import json, os, socket, glob
seen = glob.glob("/tmp/workbench-[0-9]*/*") + glob.glob("/run/workbench/{other.id}*") + glob.glob("/run/user/*/*")
for pid in filter(str.isdigit, os.listdir("/proc")):
    assert "{other.id}" not in open(f"/proc/{{pid}}/mountinfo").read()
try:
    socket.socket(socket.AF_UNIX).connect({other.run_dir + "/k-1"!r})
    seen.append("connected")
except OSError:
    pass
print(json.dumps(seen))
"""
        assert probe(workbench, image, code, cwd="/tmp", network="none") == []
        assert probe(workbench, image, code, cwd=below_tmp, network="none") == []
        runtime = Path(below_tmp, "runtime")
        runtime.mkdir(mode=0o700)
        (runtime / "bus").write_text(SECRET)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        assert search(workbench, image, Path(below_tmp)) == []
        with pytest.raises(InvalidInput):
            workbench.create(image, argv=["true"], cwd=str(runtime))
    finally:
        other.kill()
        other.exited.result(timeout=10)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        other.settle()


@pytest.mark.parametrize(
    "folder", ["/proc", "/proc/1", "/sys", "/dev", "/dev/pts", "/run", "/etc", "/usr", "/var", "/bin"]
)
def test_parts_of_the_system_are_no_working_folders(workbench, image, folder):
    with pytest.raises(InvalidInput, match="work in another folder"):
        workbench.create(image, argv=["true"], cwd=folder)


def test_the_root_folder_is_never_mounted(workbench, image, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    text = run(workbench, image, ["sh", "-c", f"pwd; cat {tmp_path}/secret"], cwd="/", network="none").text
    assert text.startswith("/\n") and SECRET not in text
    for mount in ("/", "/:/host", "//", "/proc/1/root:/host", "/proc/self/cwd/../../../../../../..:/host"):
        with pytest.raises(InvalidInput):
            spec.parse_mount(mount)


def test_what_runs_on_the_host_cannot_be_changed(workbench, image, tmp_path, monkeypatch):
    """A virtual environment in the project that the server runs from: changed from inside, it would run outside."""
    venv = tmp_path / "envs" / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("the host's")
    monkeypatch.setattr(sys, "prefix", str(venv))
    code = f"""
import json, os
worked, venv = [], {str(venv)!r}
for name, trick in {{
    "write": lambda: open(venv + "/bin/python", "w"),
    "add": lambda: open(venv + "/bin/pip", "w"),
    "remove": lambda: os.unlink(venv + "/bin/python"),
    "chmod": lambda: os.chmod(venv + "/bin", 0o777),
    "move": lambda: os.rename(venv, venv + "2"),
    "move what is above": lambda: os.rename(os.path.dirname(venv), os.path.dirname(venv) + "2"),
    "replace": lambda: os.rename("fake", venv),
}}.items():
    os.makedirs("fake", exist_ok=True)
    try:
        trick()
        worked.append(name)
    except OSError:
        pass
open("mine", "w").write("x")
print(json.dumps([worked, open(venv + "/bin/python").read()]))
"""
    assert probe(workbench, image, code, cwd=str(tmp_path), network="none") == [[], "the host's"]
    assert (tmp_path / "mine").exists()
    text = run(workbench, image, ["sh", "-c", "touch x; touch ../y"], cwd=str(venv / "bin"), network="none").text
    assert text.count("touch") == 2 and "Read-only" in text


@pytest.mark.parametrize("when", ["before the start", "before a restart"])
def test_a_link_in_a_mounts_place_is_not_followed(workbench, image, tmp_path, when):
    """A kernel that works above may put one there while another is about to start."""
    victim, work = tmp_path / "victim", tmp_path / "proj" / "work"
    victim.mkdir()
    work.mkdir(parents=True)
    (victim / "file").write_text(SECRET)
    container = workbench.create(image, argv=["sh", "-c", "cat file; echo x >made"], cwd=str(work), network="none")
    if when == "before a restart":
        container.start().result(timeout=30)
        container.exited.result(timeout=10)
        (work / "made").unlink()
    work.rmdir()
    for target, place in ((victim, work), (victim, None)):
        if place is None:  # a link further up
            work.unlink()
            work.parent.rmdir()
            (victim / "work").mkdir()
            place = work.parent
        os.symlink(target, place)
        with pytest.raises(LaunchFailed, match="symbolic link has taken the place"):
            container.start().result(timeout=30)
    container.settle()
    if container.id in {row["id"] for row in workbench.ps(every=True)}:
        workbench.remove(container.id, force=True)
    assert sorted(os.listdir(victim)) == ["file", "work"]
    assert os.listdir(victim / "work") == []


def test_links_raced_against_starts(workbench, image, tmp_path):
    """A folder and a link change places as fast as they can while containers start there, or mount below it."""
    victim, proj, data = tmp_path / "victim", tmp_path / "proj", tmp_path / "data"
    for folder in (victim, proj / "work", data):
        folder.mkdir(parents=True)
    (victim / "file").write_text(SECRET)
    os.symlink(victim, proj / "link")
    os.symlink("../../../../../../../../../../" + str(victim), proj / "dots")
    exchange = """
import ctypes, sys
libc = ctypes.CDLL(None)
names = [b"link", b"dots"]
while True:
    for name in names:
        for _ in range(2):
            libc.renameat2(-100, b"work", -100, name, 2)
"""
    swapper = subprocess.Popen([sys.executable, "-c", exchange], cwd=proj)
    try:
        outcomes = []
        for number in range(16):
            mounts = [Mount(str(data), f"{proj}/work/sub/{number}")] if number % 2 else []
            cwd = str(proj) if number % 2 else str(proj / "work")
            command = ["sh", "-c", "cat file work/file; echo x >made"]
            try:
                container = workbench.create(image, argv=command, cwd=cwd, mounts=mounts, network="none")
            except InvalidInput as error:
                outcomes.append(str(error))
                continue
            sources = [mount["source"] for mount in container.state["spec"]["mounts"]]
            try:
                container.start().result(timeout=30)
                container.exited.result(timeout=10)
                # A name that was a link at that moment names the victim: to who starts it, not behind his back.
                assert SECRET not in Path(container.log).read_text() or str(victim) in sources
                outcomes.append("ran")
            except LaunchFailed as error:
                outcomes.append(str(error))
            container.settle()
    finally:
        swapper.kill()
        swapper.wait()
    assert len(outcomes) == 16
    for row in workbench.ps(every=True):
        workbench.remove(row["id"], force=True)
    assert set(os.listdir(victim)) <= {"file", "made"}


def test_nothing_mounted_grants_rights(workbench, image, tmp_path):
    """Neither set-user-ID programs nor devices of a mounted folder count, below it as little."""
    mounts = [Mount(str(tmp_path), "/mnt/x"), Mount("/etc", "/mnt/etc", read_only=True)]
    code = "import json; print(json.dumps([line.split()[4:6] for line in open('/proc/self/mountinfo')]))"
    rows = dict(probe(workbench, image, code, cwd=str(tmp_path), mounts=mounts, network="none"))
    for path in (str(tmp_path), "/mnt/x", "/mnt/etc", "/run", "/run/workbench", "/etc/hosts", "/etc/resolv.conf"):
        assert {"nosuid", "nodev"} <= set(rows[path].split(",")), path
    for path in ("/proc", "/sys", "/dev/pts", "/dev/shm", "/dev/mqueue"):
        assert {"nosuid", "noexec"} <= set(rows[path].split(",")), path
    assert "nosuid" in rows["/dev"] and "nodev" in rows["/"]
    assert {"ro"} <= set(rows["/mnt/etc"].split(",")) & set(rows["/proc/sys"].split(",")) & set(rows["/sys"].split(","))


@pytest.mark.skipif(ROOT, reason="what root mounts is root's to read, inside as outside")
def test_other_users_files_stay_theirs(workbench, image):
    text = run(workbench, image, ["cat", "/mnt/shadow"], mounts=[Mount("/etc", "/mnt")], network="none").text
    assert "Permission denied" in text
    text = run(workbench, image, ["sh", "-c", "echo >>/mnt/passwd; chmod 666 /mnt/passwd; touch /mnt/new"],
               mounts=[Mount("/etc", "/mnt")], network="none").text  # fmt: skip
    assert text.count("Permission denied") == 2 and "Operation not permitted" in text


LIMITATION = "a cover is a mount on one name that is there; README and docs say so"


@pytest.mark.xfail(strict=True, reason=LIMITATION)
def test_a_dot_file_that_the_host_replaces_stays_unseen(workbench, image, home):
    container = workbench.create(
        image, argv=["sh", "-c", "echo up; read x; cat .netrc .later"], cwd=str(home), network="none"
    )
    (reading, writing), (end, ours) = os.pipe(), os.pipe()
    container.start((end, writing, writing)).result(timeout=30)
    os.close(writing)
    os.close(end)
    with os.fdopen(reading) as out:
        assert out.readline() == "up\n"
        for name in (".netrc", ".later"):
            (home / ".staging").write_text(SECRET)
            os.replace(home / ".staging", home / name)
        os.write(ours, b"\n")
        os.close(ours)
        text = out.read()
    container.exited.result(timeout=10)
    container.settle()
    assert SECRET not in text


@pytest.mark.xfail(strict=True, reason=LIMITATION)
def test_no_new_dot_file_can_be_made_in_a_home(workbench, image, home):
    run(workbench, image, ["sh", "-c", "echo evil >.bash_profile"], cwd=str(home), network="none")
    assert not (home / ".bash_profile").exists()


def test_mount_points_are_never_opened(workbench, image, tmp_path):
    """A FIFO where a file is to be mounted must not make the launch wait for its writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("content")
    mounts = [Mount(str(tmp_path / "file"), f"{tmp_path}/pipe")]
    assert run(workbench, image, ["cat", "pipe"], cwd=str(tmp_path), mounts=mounts, network="none").text == "content"


@pytest.mark.parametrize(
    "name", ["new\nline", 'quo"te', "com,ma:colon=x", "back\\slash", "%n%s", "-rf", "*", "\udcff\udcfe", "\u202e"]
)
def test_odd_names_of_folders(workbench, image, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "data").mkdir()
    code = "import os, json; print(json.dumps([os.getcwd(), os.listdir('.'), os.path.isdir('/mnt/x')]))"
    mounts = [Mount(str(folder / "data"), "/mnt/x")]
    assert probe(workbench, image, code, cwd=str(folder), mounts=mounts, network="none") == [
        str(folder),
        ["data"],
        True,
    ]
    container = workbench.create(image, argv=["true"], cwd=str(folder), network="none")
    (folder / "data").rmdir()
    folder.rmdir()
    folder.touch()
    with pytest.raises(LaunchFailed, match="Not a directory"):
        container.start().result(timeout=30)
    container.settle()
    assert run(workbench, image, ["true"], network="none").end.code == 0, "the helper lives on"


def test_the_log_tells_no_path_of_the_host(workbench, image):
    container = workbench.create(image, argv=["sh", "-c", "ls -l /proc/1/fd"], cwd=None, network="none")
    container.start().result(timeout=30)
    container.exited.result(timeout=10)
    text = Path(container.log).read_text()
    container.settle()
    assert text.count("-> /log\n") == 2
    assert workbench.home not in text


def test_a_link_does_not_lead_into_what_is_hidden(workbench, image, home):
    os.symlink("../.ssh", home / "proj" / "data")
    with pytest.raises(InvalidInput, match="is a link to"):
        workbench.create(image, argv=["true"], cwd=str(home / "proj" / "data"))
