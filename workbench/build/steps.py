"""The steps of a recipe: what each runs, over what, and what its cache key is made of.

A step's key covers everything that leaves a mark in its layer: the layers below, the step's own content and
program, the builder's version where it shows, the clamping time. What runs is a shell script that is given
names as arguments, never as text.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import Any

from workbench.build.recipe import Recipe
from workbench.containers.host_settings import APT_CONF, APT_SOURCES, apt_sources
from workbench.model import HostLacks, Mount, Settings

VENV = "/opt/venv"
PATH = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UV_INSIDE = "/run/workbench/uv"
UV_CACHE_INSIDE = "/run/workbench/uv-cache"
TREE_INSIDE = "/target"

#: What a base leaves out, now and in later apt-get runs; licences stay, as in Debian's own slim images.
DPKG_OPTIONS = (
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/groff/*",
)

#: Of the host's /etc, what Debian's own programs need to run; never its secrets.
_ETC = (
    "alternatives", "apt/trusted.gpg.d", "debian_version", "group", "ld.so.cache", "ld.so.conf",
    "ld.so.conf.d", "nsswitch.conf", "passwd", "perl", "ssl/certs", "ssl/openssl.cnf",
)  # fmt: skip
#: Debian's keys, where a host of another distribution keeps them out of apt's own.
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")


@dataclass(frozen=True, slots=True)
class Run:
    """One container of a step."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A step: ``name`` is for people and for the log's file name, ``content`` for the key."""

    name: str
    title: str
    content: dict[str, Any]

    def key(self, parent: str, epoch: int) -> str:
        """64 hex digits; parent: the diff_id below, epoch: seconds that times are clamped to."""
        parts = {
            **self.content,
            "step": self.name,
            "parent": parent,
            "epoch": epoch,
            "cpu": platform.machine(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Cleaning: what two builds of the same packages differ in (caches keyed by time, logs), and what names the
# machine that built. Empty log folders stay: daemons expect theirs.
_CLEAN = r"""
rm -f /var/cache/ldconfig/aux-cache /var/cache/apt/*.bin /var/lib/dpkg/*-old /var/cache/debconf/*-old
find /var/log -type f -exec rm -f {} +
if command -v fc-cache >/dev/null; then
  # fc-cache deletes its caches when SOURCE_DATE_EPOCH is set, and records folder times when it is not.
  fonts="/usr/share/fonts /usr/local/share/fonts"
  find $fonts -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} + 2>/dev/null || true
  env -u SOURCE_DATE_EPOCH fc-cache -s >/dev/null 2>&1 || true
fi
"""

# mmdebstrap's hooks, run outside of the new root, which is $1. Its own way to make /dev mounts a devpts for an
# id that a host without id ranges does not have.
_DEVICES_HOOK = 'mount --rbind /dev "$1/dev"'
_BASE_HOOK = r"""
set -eu
cd "$1"
umount --recursive --lazy dev
rm -f etc/resolv.conf etc/hostname etc/apt/sources.list.d/0000* etc/apt/apt.conf.d/99mmdebstrap
rm -f var/cache/ldconfig/aux-cache var/lib/dpkg/*-old var/cache/debconf/*-old
find var/log -type f -exec rm -f {} +
printf %s "$SOURCES" > etc/apt/sources.list
"""

# Debian's way to say that nothing is started (invoke-rc.d(8)); only during the step.
_APT = (
    r"""
set -eu
suite=$1; shift
work=/tmp/apt
mkdir -p $work/lists/partial $work/archives/partial $work/log
{
  [ -z "${APT_CONFIG:-}" ] || cat "$APT_CONFIG"
  cat <<EOF
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State::Lists "$work/lists";
Dir::Cache "$work";
Dir::Log "$work/log";
Dpkg::Use-Pty "false";
EOF
} > $work/apt.conf
export APT_CONFIG=$work/apt.conf
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get -q update
apt-get -q -y -o Dpkg::Options::=--force-confold install -- "$@"
rm -f /usr/sbin/policy-rc.d
"""
    + _CLEAN
)

_PYTHON = r"""
set -eu
uv=$1; shift
"$uv" venv --no-project --clear --python /usr/bin/python3 /opt/venv
"$uv" pip install --python /opt/venv/bin/python "$@"
rm -f /opt/venv/.lock /opt/venv/.gitignore
"""

# A second container, without uv's cache: from here on code of the packages may run (.pth files).
_COMPILE = r"""
set -eu
cd /
# What does not compile (templates, another Python's code) is never imported either.
/opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode checked-hash /opt/venv/lib || true
# Made by each import of matplotlib; here already, a plot is no change of the environment.
for folder in /opt/venv/lib/python3*/site-packages/matplotlib; do
  [ ! -d "$folder" ] || mkdir -p /root/.config/matplotlib
done
"""


def base(recipe: Recipe) -> Step:
    """Debian's minimal system, by mmdebstrap."""
    suite = recipe.base.suite
    content = {
        "suite": suite, "variant": "minbase", "dpkg": DPKG_OPTIONS, "hooks": [_DEVICES_HOOK, _BASE_HOOK],
        "sources": apt_sources(suite), "mmdebstrap": mmdebstrap_version(),
    }  # fmt: skip
    return Step("base", f"Debian {suite} by mmdebstrap", content)


def base_run(recipe: Recipe, tree: str, settings: Settings) -> Run:
    """The container of the base: the host's programs, read-only, and the new root at /target.

    tree: host folder that becomes the layer. The host's apt settings are given to this run only; the image's
    own are those that mmdebstrap writes by itself.
    """
    suite = recipe.base.suite
    options = ['APT::Sandbox::User "root"', 'Acquire::Retries "3"', 'Acquire::Languages "none"']
    offered = dict(settings.texts).get(APT_CONF, "").splitlines()
    options += [line.rstrip(";") for line in offered if not line.startswith("Dir::")]
    argv = ["/usr/bin/mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
    argv += [f"--skip={name}" for name in ("check/empty", "chroot/mount/dev", "output/dev", "output/mknod")]
    argv += [f"--dpkgopt={option}" for option in DPKG_OPTIONS]
    argv += [f"--aptopt={option}" for option in dict.fromkeys(options)]
    argv += [f"--keyring={path}" for path in (_KEYRING,) if os.path.exists(path)]
    argv += [f"--extract-hook={_DEVICES_HOOK}", '--customize-hook=sh -c "$BASE_HOOK" hook "$1"']
    argv += [suite, TREE_INSIDE]
    argv += [APT_SOURCES] if settings.mirrors else []
    folders = [f"/{name}" for name in _PROGRAMS] + [f"/etc/{name}" for name in _ETC]
    mounts = [Mount(os.path.realpath(path), path, read_only=True) for path in folders if os.path.exists(path)]
    env = {"BASE_HOOK": _BASE_HOOK, "SOURCES": apt_sources(suite), "LC_ALL": "C.UTF-8", "TMPDIR": "/tmp"}
    env["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    return Run(tuple(argv), env, (*mounts, Mount(tree, TREE_INSIDE)))


def apt(recipe: Recipe) -> Step | None:
    """The Debian packages, with python3 where Python packages follow; None when there are none."""
    packages = list(recipe.apt.packages)
    if recipe.python.packages and "python3" not in packages:
        packages.append("python3")
    if not packages:
        return None
    content = {"packages": packages, "script": _APT}
    return Step("apt", f"{_count(len(packages), 'Debian package')} with what they need", content)


def apt_run(recipe: Recipe, step: Step) -> Run:
    """The container of the apt step."""
    env = {
        "DEBIAN_FRONTEND": "noninteractive", "DEBCONF_NONINTERACTIVE_SEEN": "true", "LC_ALL": "C.UTF-8",
        "DEBCONF_NOWARNINGS": "yes",
    }  # fmt: skip
    return Run(("/bin/sh", "-c", _APT, "apt", recipe.base.suite, *step.content["packages"]), env)


def python(recipe: Recipe) -> Step | None:
    """The Python packages and pip, in /opt/venv; None when there are none."""
    if not recipe.python.packages:
        return None
    packages = [*recipe.python.packages, "pip"]
    content = {"packages": packages, "script": _PYTHON, "compile": _COMPILE, "uv": uv_version()}
    return Step("python", f"{_count(len(packages) - 1, 'Python package')} with what they need", content)


def python_runs(step: Step, cache: str, *, wheels_only: bool = True) -> list[Run]:
    """The containers of the Python step.

    cache: uv's cache on the host, shared by builds. Only wheels are unpacked beside it, which runs no code of
    theirs; what has to be built from source (``wheels_only`` False) gets a cache of its own.
    """
    env = {
        "UV_LINK_MODE": "copy", "UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1",
        "UV_CACHE_DIR": UV_CACHE_INSIDE if wheels_only else "/tmp/uv-cache", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    mounts = [Mount(uv_program(), UV_INSIDE, read_only=True)]
    if wheels_only:
        mounts.append(Mount(cache, UV_CACHE_INSIDE))
    options = ["--no-build"] if wheels_only else []
    install = ("/bin/sh", "-c", _PYTHON, "python", UV_INSIDE, *options, "--", *step.content["packages"])
    compile_ = ("/bin/sh", "-c", _COMPILE, "compile")
    return [Run(install, env, tuple(mounts)), Run(compile_, {"LC_ALL": "C.UTF-8"})]


def step_environment(epoch: int) -> dict[str, str]:
    """Variables of every step: the clamping time, and no bytecode but that which a step makes on purpose."""
    return {"PATH": PATH, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/root"}


def image_environment(recipe: Recipe) -> dict[str, str]:
    """The variables of the finished image, the recipe's last."""
    env = {"PATH": PATH if recipe.python.packages else PATH.partition(":")[2], "LANG": "C.UTF-8"}
    # A cell's ! gives apt a terminal that nobody can answer at.
    env["DEBIAN_FRONTEND"] = "noninteractive"
    if recipe.python.packages:
        env["VIRTUAL_ENV"] = VENV
    return env | recipe.env


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return " ".join(done.stdout.split()[:2])


def mmdebstrap_version() -> str:
    """As it says itself. Raises HostLacks."""
    if not os.path.exists("/usr/bin/mmdebstrap"):
        raise HostLacks("build a base", "mmdebstrap is not installed", "run `sudo apt-get install mmdebstrap`")
    return _version("/usr/bin/mmdebstrap")


def uv_program() -> str:
    """The host's uv. Raises HostLacks."""
    try:
        import uv

        return os.path.realpath(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise HostLacks("install Python packages", "uv is not installed", "run `python3 -m pip install uv`")
    return os.path.realpath(found)


def uv_version() -> str:
    """As it says itself: it stands in the environment's pyvenv.cfg. Raises HostLacks."""
    return _version(uv_program())
