"""What of the host's own settings a build or a kernel needs to reach the same registries as its user.

Certificates, proxies and the addresses of package indexes, as variables and files below
``/run/workbench/host``: a tmpfs or a bind that is never part of a layer. Nothing else of the host's
environment is looked at, and only addresses that mean something inside (``http``, ``https``) are offered.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workbench.model import Settings

INSIDE = "/run/workbench/host"
CA_FILE = f"{INSIDE}/ca.pem"
APT_CONF = f"{INSIDE}/apt.conf"
APT_SOURCES = f"{INSIDE}/sources.list"

#: Where a host keeps its bundle of certificates: Debian, Fedora, openSUSE, Alpine.
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")

#: pip's options that say how an index is reached (``pip install --help``).
_PIP_OPTIONS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout", "retries")
_PIP_ADDRESSES = ("index-url", "extra-index-url", "find-links")

_UV_ADDRESSES = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL")
_UV_PLAIN = ("UV_INDEX_STRATEGY", "UV_INSECURE_HOST", "UV_HTTP_TIMEOUT", "UV_KEYRING_PROVIDER")

DEBIAN = "http://deb.debian.org/debian"
SECURITY = "http://security.debian.org/debian-security"
#: Other names of the same archives, whose use on the host is no reason to deviate.
_DEFAULTS = ("deb.debian.org", "security.debian.org")


def discover(environ: Mapping[str, str] = os.environ, *, suite: str | None = None, root: str = "/") -> Settings:
    """What the host offers, as variables, files and texts for a container.

    environ: the user's environment; suite: the Debian suite inside, for which a mirror that the host uses is
    offered to apt; root: where the host's own files are looked for. Reads a few small files and starts no
    program unless apt's configuration speaks of a proxy.
    """
    host = _Host(environ, root)
    env: dict[str, str] = {"APT_CONFIG": APT_CONF}
    files: list[tuple[str, str]] = []
    bundle = host.ca_bundle()
    if bundle:
        files.append((bundle, CA_FILE))
        env.update(dict.fromkeys(_CA_VARIABLES, CA_FILE))
    env.update(host.proxies())
    pip = host.pip()
    env.update({f"PIP_{name.upper().replace('-', '_')}": value for name, value in pip.items()})
    env.update(host.uv(pip))
    texts = ((APT_CONF, _apt_conf(bundle is not None, host.apt_proxies())),)
    mirrors = tuple(sorted(host.apt_mirrors().items()))
    settings = Settings(tuple(sorted(env.items())), tuple(files), texts, mirrors)
    return _with_mirrors(settings, suite) if suite and mirrors else settings


def _with_mirrors(settings: Settings, suite: str) -> Settings:
    more = f'Dir::Etc::SourceList "{APT_SOURCES}";\nDir::Etc::SourceParts "/dev/null";\n'
    texts = [(path, text + more if path == APT_CONF else text) for path, text in settings.texts]
    texts.append((APT_SOURCES, apt_sources(suite, dict(settings.mirrors))))
    return replace(settings, texts=tuple(texts))


def apt_sources(suite: str, mirrors: Mapping[str, str] = {}) -> str:
    """The sources of a Debian suite as mmdebstrap writes them by itself; ``mirrors`` replaces addresses."""
    debian, security = mirrors.get("debian", DEBIAN), mirrors.get("security", SECURITY)
    return f"deb {debian} {suite} main\ndeb {debian} {suite}-updates main\ndeb {security} {suite}-security main\n"


def _apt_conf(certificates: bool, proxies: Mapping[str, str]) -> str:
    # apt's download user could not read below /run/workbench, which only root may enter.
    lines = ['APT::Sandbox::User "root";']
    if certificates:
        lines.append(f'Acquire::https::CAInfo "{CA_FILE}";')
    lines += [f'Acquire::{scheme}::Proxy "{value}";' for scheme, value in sorted(proxies.items())]
    return "\n".join(lines) + "\n"


def _is_web(address: str) -> bool:
    return urlsplit(address).scheme in ("http", "https")


def _web_only(text: str) -> str:
    """The http and https addresses of a list separated by whitespace; uv's may be ``name=address``."""
    words = text.split()
    return " ".join(word for word in words if _is_web(re.sub(r"^[A-Za-z0-9._-]+=", "", word)))


class _Host:
    """The host's files and variables, read once and only where something was set."""

    def __init__(self, environ: Mapping[str, str], root: str) -> None:
        self.environ = environ
        self.root = Path(root)
        self.home = environ.get("HOME") or os.path.expanduser("~")

    def path(self, text: str) -> Path:
        return self.root / text.lstrip("/")

    # Certificates and proxies

    def ca_bundle(self) -> str | None:
        pip_cert = self._pip_files.get("cert", "")
        named = [self.environ.get(name, "") for name in _CA_VARIABLES]
        for candidate in [*named, pip_cert, *(str(self.path(bundle)) for bundle in _BUNDLES)]:
            if candidate and os.path.isfile(candidate) and os.access(candidate, os.R_OK):
                return os.path.realpath(candidate)
        return None

    def proxies(self) -> dict[str, str]:
        names = [form for name in _PROXY_VARIABLES for form in (name, name.upper())]
        return {name: self.environ[name] for name in names if self.environ.get(name)}

    # Python packages

    @cached_property
    def _pip_files(self) -> dict[str, str]:
        """pip's options from its files."""
        return dict(self._read_pip_files())

    def _read_pip_files(self) -> Iterator[tuple[str, str]]:
        """In pip's order: what comes later wins."""
        environ = self.environ
        config_home = environ.get("XDG_CONFIG_HOME") or f"{self.home}/.config"
        paths = [str(self.path(f"{folder}/pip/pip.conf")) for folder in ("/etc/xdg",)]
        paths += [
            str(self.path("/etc/pip.conf")),
            f"{self.home}/.pip/pip.conf",
            f"{config_home}/pip/pip.conf",
            f"{sys.prefix}/pip.conf",
        ]
        own = environ.get("PIP_CONFIG_FILE")
        if own == os.devnull:
            return
        for path in [*paths, *([own] if own else [])]:
            if not os.path.exists(path):
                continue
            import configparser

            if not os.path.exists(path):
                continue
            parser = configparser.RawConfigParser()
            try:
                parser.read(path, "utf-8")
            except (configparser.Error, UnicodeDecodeError, OSError):
                continue
            for section in ("global", "install"):
                if parser.has_section(section):
                    yield from ((name.replace("_", "-"), value) for name, value in parser.items(section))

    def pip(self) -> dict[str, str]:
        found = dict(self._pip_files)
        for name in _PIP_OPTIONS:
            variable = self.environ.get(f"PIP_{name.upper().replace('-', '_')}")
            if variable is not None:
                found[name] = variable
        kept = {name: " ".join(found[name].split()) for name in _PIP_OPTIONS if found.get(name)}
        for name in _PIP_ADDRESSES:
            if name in kept:
                kept[name] = _web_only(kept[name])
        return {name: value for name, value in kept.items() if value}

    def uv(self, pip: Mapping[str, str]) -> dict[str, str]:
        """uv's settings; where the host has none of its own, pip's indexes, which uv does not read."""
        found = dict(self._uv_file())
        named = [name for name in (*_UV_ADDRESSES, *_UV_PLAIN) if self.environ.get(name)]
        found.update({name: self.environ[name] for name in named})
        kept = {name: _web_only(found[name]) for name in _UV_ADDRESSES if name in found}
        kept |= {name: found[name] for name in _UV_PLAIN if name in found}
        if not any(kept.get(name) for name in _UV_ADDRESSES):
            pairs = (("index-url", "UV_DEFAULT_INDEX"), ("extra-index-url", "UV_INDEX"))
            kept.update({uv: pip[name] for name, uv in pairs if name in pip})
            if "UV_INDEX" in kept:
                # pip takes the best version of all its indexes; uv would stop at the first that knows a name.
                kept.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
            if "trusted-host" in pip:
                kept.setdefault("UV_INSECURE_HOST", pip["trusted-host"])
        return {name: value for name, value in kept.items() if value}

    def _uv_file(self) -> Iterator[tuple[str, str]]:
        config_home = self.environ.get("XDG_CONFIG_HOME") or f"{self.home}/.config"
        for path in (str(self.path("/etc/uv/uv.toml")), f"{config_home}/uv/uv.toml"):
            if not os.path.exists(path):
                continue
            import tomllib

            try:
                with open(path, "rb") as file:
                    data = tomllib.load(file)
            except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
                continue
            indexes = [item for item in data.get("index", []) if isinstance(item, dict) and "url" in item]
            for name, default in (("UV_INDEX", False), ("UV_DEFAULT_INDEX", True)):
                urls = [str(item["url"]) for item in indexes if bool(item.get("default")) is default]
                if urls:
                    yield name, " ".join(urls)
            for table in (data, data.get("pip", {})):
                yield from _uv_table(table)

    # apt

    def _apt_files(self, pattern: str) -> Iterator[tuple[str, str]]:
        for path in sorted(self.path("/etc/apt").glob(pattern)):
            try:
                yield path.suffix, path.read_text("utf-8", "replace")
            except OSError:
                continue

    def apt_proxies(self) -> dict[str, str]:
        """Proxies that the host's apt.conf names; those of the environment reach apt by themselves."""
        texts = [*self._apt_files("apt.conf"), *self._apt_files("apt.conf.d/*")]
        if not any("proxy" in text.lower() for _, text in texts):
            return {}
        tool = shutil.which("apt-config", path="/usr/bin:/bin")
        if tool is None:
            return {}
        # apt.conf(5): the file that APT_CONFIG names is read first, so it can say where the others are.
        with os.fdopen(os.memfd_create("apt.conf"), "w") as first:
            first.write(f'Dir "{self.root}";')
            first.flush()
            dump = subprocess.run(
                [tool, "dump", "Acquire::http::Proxy", "Acquire::https::Proxy"],
                env={"APT_CONFIG": f"/proc/self/fd/{first.fileno()}", "PATH": "/usr/bin:/bin"},
                pass_fds=[first.fileno()], capture_output=True, text=True, check=False,
            ).stdout  # fmt: skip
        return dict(re.findall(r'^Acquire::(https?)::Proxy "([^"]+)";', dump, re.MULTILINE))

    def apt_mirrors(self) -> dict[str, str]:
        """``debian`` and ``security``: what the host's sources name in place of Debian's own addresses."""
        found: dict[str, str] = {}
        for address, suite in self._apt_sources():
            kind = "security" if "security" in suite or "/debian-security" in address else "debian"
            if not _is_web(address) or not address.rstrip("/").endswith(("/debian", "/debian-security")):
                continue
            if urlsplit(address).hostname not in _DEFAULTS:
                found.setdefault(kind, address.rstrip("/"))
        return found

    def _apt_sources(self) -> Iterator[tuple[str, str]]:
        """Address and suite of each binary source, of both forms of sources.list(5)."""
        for suffix, text in [*self._apt_files("sources.list"), *self._apt_files("sources.list.d/*")]:
            if suffix == ".sources":
                for stanza in re.split(r"\n\s*\n", text):
                    fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
                    if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes") != "no":
                        suites = fields.get("Suites", "").split()
                        yield from ((u, s) for u in fields.get("URIs", "").split() for s in suites)
            elif suffix == ".list":
                pattern = r"^\s*deb\s+(?:\[[^\]]*\]\s*)?(\S+)\s+(\S+)"
                yield from re.findall(pattern, text, re.MULTILINE)


def _uv_table(table: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    names = {
        "index-url": "UV_INDEX_URL",
        "extra-index-url": "UV_EXTRA_INDEX_URL",
        "index-strategy": "UV_INDEX_STRATEGY",
        "allow-insecure-host": "UV_INSECURE_HOST",
    }
    for key, variable in names.items():
        value = table.get(key)
        if isinstance(value, str):
            yield variable, value
        elif isinstance(value, list):
            yield variable, " ".join(str(item) for item in value)


# What of the host no container may see or change


def homes() -> list[str]:
    """Home folders on this host: the user's, and those of /etc/passwd (passwd(5))."""
    found = [os.path.expanduser("~")]
    try:
        with open("/etc/passwd") as file:
            found += [fields[5] for fields in (line.split(":") for line in file) if len(fields) > 5 and fields[5]]
    except OSError:
        pass
    return [home for home in found if os.path.isabs(home)]


def programs() -> Iterator[str]:
    """Where the environment that runs us lies: what could change it there would run as the host's user."""
    yield sys.prefix
    yield sys.base_prefix
    yield os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
