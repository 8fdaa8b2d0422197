"""What of the host's settings is offered: found in every place where it can stand, and nothing else."""

from __future__ import annotations

import pytest

from workbench.containers.host_settings import APT_CONF, APT_SOURCES, CA_FILE, discover


@pytest.fixture
def host(tmp_path):
    """A host of our own making; its files by path."""

    class Host:
        home = tmp_path / "home"

        def write(self, path, text):
            target = tmp_path / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            return str(target)

        def discover(self, suite=None, **environ):
            return discover({"HOME": str(self.home), **environ}, suite=suite, root=str(tmp_path))

    return Host()


def test_a_bare_host_offers_apt_its_user_and_nothing_else(host):
    found = host.discover()
    assert dict(found.env) == {"APT_CONFIG": APT_CONF}
    assert found.files == ()
    assert found.texts == ((APT_CONF, 'APT::Sandbox::User "root";\n'),)


def test_nothing_else_of_the_environment_is_offered(host):
    secrets = {"AWS_SECRET_ACCESS_KEY": "x", "PIP_TOKEN": "x", "JUPYTER_TOKEN": "x", "UV_PUBLISH_TOKEN": "x"}
    assert host.discover(**secrets) == host.discover()


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"])
def test_a_bundle_named_by_a_variable(host, name):
    bundle = host.write("/own.pem", "x")
    found = host.discover(**{name: bundle})
    assert found.files == ((bundle, CA_FILE),)
    for each in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"):
        assert dict(found.env)[each] == CA_FILE
    assert f'Acquire::https::CAInfo "{CA_FILE}";' in dict(found.texts)[APT_CONF]


def test_the_systems_bundle_and_one_of_pips_file(host):
    system = host.write("/etc/ssl/certs/ca-certificates.crt", "x")
    assert host.discover().files == ((system, CA_FILE),)
    own = host.write("/own.pem", "x")
    host.write("/etc/pip.conf", f"[global]\ncert = {own}\n")
    assert host.discover().files == ((own, CA_FILE),)
    assert host.discover(SSL_CERT_FILE="/nowhere").files == ((own, CA_FILE),)


def test_proxies_in_both_cases(host):
    env = {"http_proxy": "http://p:1", "HTTPS_PROXY": "http://p:2", "no_proxy": "a,b", "ALL_PROXY": ""}
    found = dict(host.discover(**env).env)
    assert {name: found.get(name) for name in env} == env | {"ALL_PROXY": None}


def test_pips_settings_from_files_and_variables(host):
    host.write("/etc/pip.conf", "[global]\nindex-url = https://a/simple\ntimeout = 9\n")
    host.write(
        "/home/.config/pip/pip.conf",
        "[global]\nindex_url = https://b/simple\nfind-links = /opt/wheels\n"
        "extra-index-url =\n  file:///opt/x\n  https://c/simple\n[install]\ntrusted-host = b\n",
    )
    found = dict(host.discover().env)
    assert found["PIP_INDEX_URL"] == "https://b/simple"
    assert found["PIP_EXTRA_INDEX_URL"] == "https://c/simple"
    assert (found["PIP_TRUSTED_HOST"], found["PIP_TIMEOUT"]) == ("b", "9")
    assert "PIP_FIND_LINKS" not in found
    assert dict(host.discover(PIP_INDEX_URL="https://d/simple").env)["PIP_INDEX_URL"] == "https://d/simple"
    broken = host.write("/home/.config/pip/pip.conf", "not = an [ini")
    assert broken and dict(host.discover().env)["PIP_INDEX_URL"] == "https://a/simple"


def test_uv_gets_its_own_settings_or_else_pips(host):
    host.write("/etc/pip.conf", "[global]\nindex-url = https://a/simple\nextra-index-url = https://c/simple\n")
    found = dict(host.discover().env)
    assert (found["UV_DEFAULT_INDEX"], found["UV_INDEX"]) == ("https://a/simple", "https://c/simple")
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    host.write("/home/.config/uv/uv.toml", '[[index]]\nname = "x"\nurl = "https://u/simple"\ndefault = true\n')
    found = dict(host.discover().env)
    assert found["UV_DEFAULT_INDEX"] == "https://u/simple"
    assert "UV_INDEX" not in found
    found = dict(host.discover(UV_INDEX="own=https://v/simple file:///x").env)
    assert found["UV_INDEX"] == "own=https://v/simple"


DEB822 = """# comment
Types: deb deb-src
URIs: https://mirror.example.org/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: https://mirror.example.org/debian-security/
Suites: bookworm-security
Components: main
"""


def test_a_mirror_is_offered_for_the_suite_of_the_image(host):
    host.write("/etc/apt/sources.list.d/debian.sources", DEB822)
    assert APT_SOURCES not in dict(host.discover().texts)
    found = dict(host.discover(suite="trixie").texts)
    assert f'Dir::Etc::SourceList "{APT_SOURCES}";' in found[APT_CONF]
    assert found[APT_SOURCES] == (
        "deb https://mirror.example.org/debian trixie main\n"
        "deb https://mirror.example.org/debian trixie-updates main\n"
        "deb https://mirror.example.org/debian-security trixie-security main\n"
    )


def test_debians_own_addresses_and_other_archives_are_no_mirror(host):
    host.write("/etc/apt/sources.list", "deb [arch=amd64] http://deb.debian.org/debian bookworm main\n")
    host.write("/etc/apt/sources.list.d/x.list", "deb https://packages.example.org/apt cloud main\n")
    host.write("/etc/apt/sources.list.d/off.sources", DEB822.replace("Types", "Enabled: no\nTypes"))
    assert host.discover().mirrors == ()


def test_a_mirror_in_the_old_form(host):
    host.write(
        "/etc/apt/sources.list",
        "deb [a=b] http://m.example.org/debian/ bookworm main\n# deb http://x/debian y z\n",
    )
    assert host.discover().mirrors == (("debian", "http://m.example.org/debian"),)


def test_apts_proxy(host):
    host.write("/etc/apt/apt.conf.d/90proxy", 'Acquire { http { Proxy "http://p:3128"; } };\n')
    assert 'Acquire::http::Proxy "http://p:3128";' in dict(host.discover().texts)[APT_CONF]
