"""The steps of Debian packages: the base by mmdebstrap, and what apt-get adds.

Both resolve against the suite's archives, whose signatures apt checks, and then install without a network from a
private repository of exactly the packages that the lock names (deb822(5), sources.list(5)). So a locked build,
today's or next year's, is the same run.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from msgspec.structs import replace

from workbench.build import keys
from workbench.build.fetch import File
from workbench.build.lock import Deb, StepLock
from workbench.build.steps import IN, OUT, Run, Site, hand_over, read_out
from workbench.containers.host_settings import DEBIAN, SECURITY, apt_sources
from workbench.model import BuildFailed, Corrupt, HostLacks, Mount, Settings, count

TREE = "/target"
_REPOSITORY = f"{IN}/debs"

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

# Cleaning: what two builds of the same packages differ in (caches keyed by time, logs), and what names the
# machine that built. Empty log folders stay: daemons expect theirs.
_CLEAN = r"""
rm -f /var/cache/ldconfig/aux-cache /var/cache/apt/*.bin /var/lib/dpkg/*-old /var/cache/debconf/*-old
find /var/log -type f -exec rm -f {} +
FORGETif command -v fc-cache >/dev/null; then
  # fc-cache deletes its caches when SOURCE_DATE_EPOCH is set, and records folder times when it is not.
  fonts="/usr/share/fonts /usr/local/share/fonts"
  find $fonts -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} + 2>/dev/null || true
  env -u SOURCE_DATE_EPOCH fc-cache -s >/dev/null 2>&1 || true
fi
""".replace("FORGET", keys.FORGET.lstrip())

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

# What apt would fetch, as "'address' file size SHA256:digest" (apt-get(8), --print-uris).
_RESOLVE = r"""
set -eu
status=$1; shift
work=/tmp/resolve
mkdir -p $work/lists/partial $work/archives/partial $work/log $work/dpkg
[ -n "$status" ] || : > $work/dpkg/status
{
  [ -z "${APT_CONFIG:-}" ] || cat "$APT_CONFIG"
  cat <<EOF
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::ForceHash "SHA256";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Etc::Preferences "$work/preferences";
Dir::State "$work";
Dir::State::Lists "$work/lists";
Dir::State::status "${status:-$work/dpkg/status}";
Dir::Cache "$work";
Dir::Log "$work/log";
EOF
} > $work/apt.conf
export APT_CONFIG=$work/apt.conf
printf %s "$SOURCES" > $work/sources.list
printf %s "$PREFERENCES" > $work/preferences
apt-get -q update
apt-get -qq -y --print-uris install -- "$@" > OUT/uris
# The archive's own word on what is required; a package's differs now and then (its "override").
apt list -qq '?priority(required)' 2>/dev/null | sed 's,/.*,,' > OUT/required
""".replace("OUT", OUT)

# Debian's way to say that nothing is started (invoke-rc.d(8)); only during the step.
_INSTALL = (
    r"""
set -eu
work=/tmp/apt
mkdir -p $work/lists/partial $work/archives/partial $work/log
cat > $work/apt.conf <<EOF
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$work/lists";
Dir::Cache "$work";
Dir::Log "$work/log";
Dpkg::Use-Pty "false";
EOF
export APT_CONFIG=$work/apt.conf
echo "deb [trusted=yes] file:REPOSITORY ./" > $work/sources.list
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get -q update
apt-get -q -y -o Dpkg::Options::=--force-confold install -- "$@"
rm -f /usr/sbin/policy-rc.d
""".replace("REPOSITORY", _REPOSITORY)
    + _CLEAN
)

_ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive", "DEBCONF_NONINTERACTIVE_SEEN": "true", "DEBCONF_NOWARNINGS": "yes",
}  # fmt: skip


class Base:
    """Debian's minimal system."""

    name = "base"
    own = False

    def __init__(self, suite: str) -> None:
        self.asks: dict[str, Any] = {"suite": suite}
        self.title = f"Debian {suite} by mmdebstrap"

    def marks(self) -> dict[str, Any]:
        return {
            "variant": "minbase", "dpkg": DPKG_OPTIONS, "hooks": [_DEVICES_HOOK, _BASE_HOOK],
            "sources": apt_sources(self.asks["suite"]),
        }  # fmt: skip

    def resolve(self, site: Site, old: StepLock | None) -> StepLock:
        # As mmdebstrap's variant "minbase" has it: what is essential or required, and apt.
        names = ["?essential", "?priority(required)", "apt"]
        found, required = _resolve(self, site, old, names, _host_programs(), status="")
        debs = tuple(replace(deb, priority="required") if deb.name in required else deb for deb in found)
        return StepLock(self.name, self.asks, mmdebstrap_version(), debian=debs)

    def prepare(self, locked: StepLock, site: Site) -> None:
        """Nothing: all of it is fetched."""

    def files(self, locked: StepLock, site: Site, *, every: bool = False) -> list[File]:
        return [_file(deb, site.settings) for deb in locked.debian]

    def runs(self, locked: StepLock, taken: Mapping[str, Path], site: Site) -> list[Run]:
        """The host's programs, read-only, and the new root at /target; the image's own apt settings are those that
        mmdebstrap writes by itself."""
        mmdebstrap_version()
        repository = _repository(site.suite, locked.debian, taken, site.scratch())
        tree = site.scratch()
        tree.chmod(0o755)  # the mode of /
        argv = ["/usr/bin/mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
        argv += [f"--skip={name}" for name in ("check/empty", "chroot/mount/dev", "output/dev", "output/mknod")]
        argv += [f"--dpkgopt={option}" for option in DPKG_OPTIONS]
        argv += ['--aptopt=APT::Sandbox::User "root"', '--aptopt=Acquire::Languages "none"']
        argv += [f"--extract-hook={_DEVICES_HOOK}", '--customize-hook=sh -c "$BASE_HOOK" hook "$1"']
        argv += [self.asks["suite"], TREE, f"deb [trusted=yes] copy:{_REPOSITORY} ./"]
        env = {
            "BASE_HOOK": _BASE_HOOK, "SOURCES": apt_sources(self.asks["suite"]), "TMPDIR": "/tmp",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }  # fmt: skip
        mounts = (*_host_programs(), Mount(str(tree), TREE), Mount(str(repository), _REPOSITORY, read_only=True))
        return [Run(tuple(argv), env, mounts, bootstrap=True, tree=str(tree))]


class Apt:
    """Packages that apt-get adds."""

    name = "apt"
    own = False

    def __init__(self, packages: Iterable[str]) -> None:
        self.asks: dict[str, Any] = {"packages": list(packages)}
        self.title = f"{count(len(self.asks['packages']), 'Debian package')} with what they need"

    def marks(self) -> dict[str, Any]:
        return {"script": _INSTALL}

    def resolve(self, site: Site, old: StepLock | None) -> StepLock:
        found, _ = _resolve(self, site, old, self.asks["packages"], (), status="/var/lib/dpkg/status")
        return StepLock(self.name, self.asks, debian=found)

    def prepare(self, locked: StepLock, site: Site) -> None:
        """Nothing: all of it is fetched."""

    def files(self, locked: StepLock, site: Site, *, every: bool = False) -> list[File]:
        return [_file(deb, site.settings) for deb in locked.debian]

    def runs(self, locked: StepLock, taken: Mapping[str, Path], site: Site) -> list[Run]:
        repository = _repository(site.suite, locked.debian, taken, site.scratch())
        # Of each there is one version: how it was chosen is over.
        names = [re.split("[=/]", text)[0] for text in self.asks["packages"]]
        argv = ("/bin/sh", "-c", _INSTALL, "apt", *names)
        return [Run(argv, _ENVIRONMENT, (Mount(str(repository), _REPOSITORY, read_only=True),))]


def _host_programs() -> tuple[Mount, ...]:
    folders = [f"/{name}" for name in _PROGRAMS] + [f"/etc/{name}" for name in _ETC]
    return tuple(Mount(os.path.realpath(path), path, read_only=True) for path in folders if os.path.exists(path))


def _resolve(
    step: Base | Apt, site: Site, old: StepLock | None, names: Iterable[str], mounts: tuple[Mount, ...], status: str
) -> tuple[tuple[Deb, ...], frozenset[str]]:
    """What apt chooses for these names over a status file ("" for an empty one); names that the archive requires."""
    out = site.scratch()
    mirrors = dict(site.settings.mirrors)
    sources = apt_sources(site.suite, mirrors)
    if not status and os.path.exists(_KEYRING):
        sources = sources.replace("deb ", f"deb [signed-by={_KEYRING}] ")
    preferences = ""
    if old is not None:  # what can still be had stays, unless its neighbours no longer allow it
        kept = {deb.sha256: path for deb in old.debian if (path := site.fetcher.here(_file(deb, site.settings)))}
        repository = _repository(site.suite, [deb for deb in old.debian if deb.sha256 in kept], kept, site.scratch())
        mounts = (*mounts, Mount(str(repository), _REPOSITORY, read_only=True))
        sources += f"deb [trusted=yes] file:{_REPOSITORY} ./\n"
        preferences = 'Package: *\nPin: origin ""\nPin-Priority: 990\n'
    env = {"SOURCES": sources, "PREFERENCES": preferences}
    if mounts:
        env["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    run = Run(
        ("/bin/sh", "-c", _RESOLVE, "resolve", status, *names), env, (*mounts, Mount(str(out), OUT)),
        network="outbound", bootstrap=not status,
    )  # fmt: skip
    site.try_out(step, [run])
    known = {deb.file: deb for deb in old.debian} if old else {}
    bases = (("security", mirrors.get("security", SECURITY)), ("debian", mirrors.get("debian", DEBIAN)))
    required = frozenset(read_out(out, "required").decode("utf-8", "replace").split())
    return tuple(_read_uris(read_out(out, "uris").decode("utf-8", "replace"), bases, known, step.name)), required


def _read_uris(text: str, bases: Iterable[tuple[str, str]], known: Mapping[str, Deb], step: str) -> Iterator[Deb]:
    for line in text.splitlines():
        found = re.fullmatch(r"'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", line)
        if found is None:
            raise BuildFailed(f"resolve step {step}", f"apt tells no SHA256 of {line[:100]}")
        address, file, size, digest = found.groups()
        if address.startswith("file:"):
            yield known[unquote(address).rpartition("/")[2]]
            continue
        for archive, base in bases:
            if address.startswith(f"{base}/"):
                name, version, arch = unquote(file).removesuffix(".deb").split("_")
                path = f"{archive}/{unquote(address.removeprefix(f'{base}/'))}"
                yield Deb(name, version, arch, digest, int(size), path)
                break
        else:
            raise BuildFailed(f"resolve step {step}", f"apt names a file of an archive unknown here: {file}")


def _file(deb: Deb, settings: Settings) -> File:
    mirrors = dict(settings.mirrors)
    bases = {"debian": mirrors.get("debian", DEBIAN), "security": mirrors.get("security", SECURITY)}
    archive, _, path = deb.path.partition("/")
    return File(
        deb.sha256, deb.size, deb.file, f"{deb.name} {deb.version} ({deb.arch})",
        lambda: [f"{bases[archive]}/{path}"],
    )  # fmt: skip


# The private repository


def _repository(suite: str, debs: Iterable[Deb], taken: Mapping[str, Path], folder: Path) -> Path:
    """A flat repository of these packages (apt's documentation: repository format)."""
    hand_over(folder, {deb.file: taken[deb.sha256] for deb in debs})
    stanzas = []
    for deb in sorted(debs, key=lambda deb: deb.file):
        control = control_of(folder / deb.file).rstrip("\n")
        if deb.priority:
            control = re.sub(r"^Priority: .*", f"Priority: {deb.priority}", control, flags=re.MULTILINE)
        stanzas.append(f"{control}\nFilename: ./{deb.file}\nSize: {deb.size}\nSHA256: {deb.sha256}\n")
    packages = "\n".join(stanzas).encode()
    (folder / "Packages").write_bytes(packages)
    # mmdebstrap takes only what a release of that name offers.
    digest = hashlib.sha256(packages).hexdigest()
    release = f"Suite: {suite}\nCodename: {suite}\nDate: {_DATE}\nSHA256:\n {digest} {len(packages)} Packages\n"
    (folder / "Release").write_text(release)
    return folder


#: Of the private repository: a release wants one, and nobody looks at it.
_DATE = "Thu, 01 Jan 1970 00:00:00 UTC"
_CONTROL_LIMIT = 1 << 20


def control_of(path: Path) -> str:
    """The control file of a Debian package (deb(5): an ar archive with control.tar.*). Raises Corrupt."""
    try:
        with open(path, "rb") as file:
            if file.read(8) != b"!<arch>\n":
                raise ValueError("no ar archive")
            while header := file.read(60):
                name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
                if name.startswith("control.tar"):
                    return _control(name, file.read(min(size, _CONTROL_LIMIT * 4)))
                file.seek(size + size % 2, os.SEEK_CUR)
        raise ValueError("no control.tar")
    except (ValueError, OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise Corrupt("read a Debian package", f"{path.name}: {error}", "build again") from None


def _control(name: str, data: bytes) -> str:
    if name.endswith(".zst"):
        data = subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
        name = name.removesuffix(".zst")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
        for member in archive:
            if member.name.removeprefix("./") == "control" and member.isfile() and member.size < _CONTROL_LIMIT:
                content = archive.extractfile(member)
                assert content
                return content.read().decode("utf-8")
    raise ValueError("no control file")


def mmdebstrap_version() -> str:
    """As it says itself. Raises HostLacks."""
    if not os.path.exists("/usr/bin/mmdebstrap"):
        raise HostLacks("build a base", "mmdebstrap is not installed", "run `sudo apt-get install mmdebstrap`")
    done = subprocess.run(["/usr/bin/mmdebstrap", "--version"], capture_output=True, text=True, check=False)
    return " ".join(done.stdout.split()[:2])


def archive_time(suite: str, settings: Settings) -> int:
    """When the suite's archives were last written, in seconds since 1970: the newest Date of their InRelease.

    Times in layers are clamped to it and the image gives it as its own. Today's midnight where none answers;
    what then hinders the build is told by apt.
    """
    dates = []
    for line in apt_sources(suite, dict(settings.mirrors)).splitlines():
        _, address, dist, *_ = line.split()
        with suppress(OSError, ValueError, TypeError, HTTPException):
            request = urllib.request.urlopen(f"{address}/dists/{dist}/InRelease", timeout=10)
            with request as answer:
                found = re.search(rb"^Date: (.+)$", answer.read(4096), re.MULTILINE)
            if found:
                dates.append(int(parsedate_to_datetime(found[1].decode()).timestamp()))
    return max(dates, default=int(time.time()) // 86400 * 86400)
