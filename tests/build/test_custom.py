"""What is the recipe's own: files, scripts, other recipes and images to stand on, and what a failed step leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.conftest import BASE

SUITE = '[base]\nsuite = "bookworm"\n'


def written(name: str, text: str) -> Path:
    folder = BASE / "recipes" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(f'name = "{name}"\n{text}')
    return folder


def built(cli, folder: Path, *options: str) -> dict:
    done = cli("build", str(folder), "--json", *options)
    assert done.code == 0, done.err
    return json.loads(done.out)


def inside(cli, image: str, script: str) -> str:
    done = cli("run", "--rm", "--no-folder", "--network", "none", image, "/bin/sh", "-euc", script)
    assert done.code == 0, done.err
    return done.out


def test_files_are_the_same_from_every_checkout(cli, image):
    text = SUITE + '[files]\n"/opt/app" = "app"\n"/etc/app.conf" = "conf"\n'
    folder = written("files", text)
    (folder / "app" / "deep").mkdir(parents=True)
    (folder / "app" / "run.sh").write_text("#!/bin/sh\necho run\n")
    (folder / "app" / "run.sh").chmod(0o700)
    (folder / "app" / "deep" / "data").write_bytes(b"\0\1")
    (folder / "app" / "link").symlink_to("deep/data")
    (folder / "conf").write_text("a=1\n")
    first = built(cli, folder)
    listing = inside(
        cli, first["id"], "cd /opt/app; stat -c '%n %a %u:%g' . run.sh deep/data /etc/app.conf; readlink link"
    )
    assert listing.splitlines() == [
        ". 755 0:0", "run.sh 755 0:0", "deep/data 644 0:0", "/etc/app.conf 644 0:0", "deep/data",
    ]  # fmt: skip
    # Another checkout: other times and modes, nothing that counts.
    for path in folder.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1, 1))
    (folder / "conf").chmod(0o600)
    assert built(cli, folder)["id"] == first["id"]
    (folder / "conf").write_text("a=2\n")
    assert built(cli, folder)["id"] != first["id"]


@pytest.mark.parametrize("source", ["nothing", "out"])
def test_files_that_cannot_be_taken(cli, image, source):
    folder = written("nofiles", SUITE + f'[files]\n"/opt/x" = "{source}"\n')
    (folder / "out").symlink_to("/etc/passwd")
    done = cli("build", str(folder))
    assert done.code == 1
    assert re.search(r"there is no \S+nothing|leads out of the recipe's folder", done.err.splitlines()[-1])


def test_a_script_reaches_out_only_where_it_says_so(cli, image):
    look = "ls /sys/class/net > /opt/net"
    text = f'[[run]]\nscript = "{look}"\n[[run]]\nscript = "{look}2"\nnetwork = true\n'
    found = built(cli, written("script", SUITE + text), "--name", "script:a")
    shown = inside(cli, found["id"], "cat /opt/net; echo -; cat /opt/net2").split("-")
    assert shown[0].split() == ["lo"]
    assert len(shown[1].split()) > 1 or shown[1].split() == ["lo"]  # offline hosts have no more


def test_what_is_not_the_same_twice_is_named(cli, image):
    folder = written(
        "clock", '[base]\nimage = "python"\n' + '[[run]]\nscript = "date +%N > /opt/stamp; echo same > /opt/same"\n'
    )
    done = cli("build", "--check", "--json", str(folder))
    assert done.code == 1
    assert json.loads(done.out)["differences"] == ["step run-1 gives another layer each time, in opt/stamp"]
    assert cli("lock", str(folder)).code == 0
    text = (folder / "recipe.lock").read_text()
    (folder / "recipe.lock").write_text(re.sub(r'("opt/stamp" = )"\w+"', r'\1"00000000"', text).replace(
        re.findall(r'diff_id = "sha256:(\w+)"', text)[-1], "0" * 64))  # fmt: skip
    done = cli("build", "--json", str(folder))
    assert json.loads(done.out)["differences"] == ["step run-1 differs from the lock in opt/stamp"]


def test_on_another_recipe_an_image_and_an_archive(cli, image, tmp_path):
    below = written("below", SUITE + '[env]\nA = "1"\nB = "1"\n[[run]]\nscript = "echo below > /opt/below"\n')
    own = '[env]\nB = "2"\n[[run]]\nscript = "cat /opt/below > /opt/above"\n'
    ground = built(cli, below)
    for base in ('recipe = "../below"', 'image = "below"', f'image = "{ground["id"]}"'):
        found = built(cli, written("above", f"[base]\n{base}\n{own}"))
        assert inside(cli, found["id"], 'cat /opt/above; echo "$A $B"') == "below\n1 2\n"
        assert layers(found["id"])[:-1] == layers(ground["id"])
    archive = written("archive", f'[base]\narchive = "small.tar"\n{own}')
    docker_archive(archive / "small.tar", {"opt/below": b"from an archive\n", "bin/sh": None})
    done = cli("build", str(archive), "--json")
    assert done.err.splitlines()[-1].endswith("cannot find the command '/bin/sh': it is no program")  # as it is there


def layers(image_id: str) -> list[str]:
    blob = Path(os.environ["WORKBENCH_HOME"], "blobs", "sha256", image_id.removeprefix("sha256:"))
    return json.loads(blob.read_text())["rootfs"]["diff_ids"]


def docker_archive(path: Path, files: dict) -> None:
    """What ``docker save`` writes, with one layer."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as layer:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            layer.addfile(info, io.BytesIO(data or b""))
    diff_id = f"sha256:{hashlib.sha256(inner.getvalue()).hexdigest()}"
    config = {"os": "linux", "architecture": "amd64", "created": "2025-01-01T00:00:00Z",
              "rootfs": {"type": "layers", "diff_ids": [diff_id]}}  # fmt: skip
    manifest = [{"Config": "config.json", "RepoTags": ["small:latest"], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        for name, content in (
            ("config.json", json.dumps(config).encode()), ("layer.tar", inner.getvalue()),
            ("manifest.json", json.dumps(manifest).encode()),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_recipe_that_stands_on_itself_is_refused(cli, image):
    written("one", '[base]\nrecipe = "../two"\n')
    folder = written("two", '[base]\nrecipe = "../one"\n')
    done = cli("build", str(folder))
    assert done.code == 1
    assert done.err.splitlines()[-1].endswith("stands on itself; correct base.recipe")


@pytest.mark.parametrize("kind", ["OPENSSH ", "RSA ", "EC ", "ENCRYPTED ", ""])
@pytest.mark.parametrize("way", ["files", "run"])
def test_a_private_key_never_ships(cli, image, way, kind):
    line = f"-----BEGIN {kind}PRIVATE KEY-----"
    script = f"mkdir -p /srv/keys; echo '{line}' > /srv/keys/id"
    table = '[files]\n"/srv/keys" = "keys"\n' if way == "files" else f"[[run]]\nscript = {json.dumps(script)}\n"
    folder = written("keys", '[base]\nimage = "python"\n' + table)
    (folder / "keys").mkdir()
    (folder / "keys" / "id").write_text(f"my key\n{line}\nMHcCAQEE\n")
    (folder / "keys" / "id.pub").write_text("-----BEGIN PUBLIC KEY-----\n")
    done = cli("build", str(folder))
    assert done.code == 1
    assert "leaves a private key in /srv/keys/id;" in done.err.splitlines()[-1]


def test_keys_that_packages_make_for_one_machine_stay_out(cli, image):
    found = built(cli, written("sshd", SUITE + '[apt]\npackages = ["openssh-server", "ssl-cert"]\n'))
    shown = inside(cli, found["id"], "ls /usr/sbin/sshd /etc/ssh /etc/ssl/private /etc/ssl/certs | grep -v pem; true")
    assert "/usr/sbin/sshd" in shown and "sshd_config" in shown
    assert "ssh_host" not in shown and ".key" not in shown


def test_a_whole_recipe_folder_as_files_has_a_lock_that_holds(cli, image):
    folder = written("whole", SUITE + '[files]\n"/srv/repo" = "."\n')
    assert cli("lock", str(folder), "--vendor", str(folder / "vendor")).code == 0
    assert built(cli, folder)["identical"]


def test_a_failed_step_can_be_entered(cli, image):
    number = random.randint(1, 10**9)
    folder = written("broken", SUITE + f'[[run]]\nscript = "echo {number} > /opt/so-far; echo too bad; exit 3"\n')
    done = cli("build", str(folder))
    assert done.code == 1
    assert "  | too bad" in done.err
    assert "enter it with `jupyter workbench run --after-failure broken`" in done.err
    found = cli("run", "--rm", "--no-folder", "--after-failure", "broken", "cat", "/opt/so-far")
    assert (found.code, found.out) == (0, f"{number}\n")
    assert "broken" not in {name for row in json.loads(cli("images", "--json").out) for name in row["names"]}
    (folder / "recipe.toml").write_text(f'name = "broken"\n{SUITE}')
    built(cli, folder)
    assert "there is none named" in cli("run", "--after-failure", "broken", "true").err


def test_limits_network_and_preload_of_a_recipe(cli, image):
    text = 'network = "none"\npreload = ["json"]\n' + SUITE + "[limits]\nprocesses = 33\n"
    found = built(cli, written("narrow", text))
    done = cli("run", "--no-folder", "--network", "outbound", found["id"], "ls", "/sys/class/net")
    assert done.out.split() == ["lo"]
