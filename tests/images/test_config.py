"""An image's config as other tools know it."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.images import config
from workbench.model import Corrupt, InvalidInput, Kernel, Limits

LAYER = "sha256:" + "ab" * 32
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)


def test_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    data = config.encode(
        diff_ids=[LAYER], env={"PATH": "/bin", "A": "x=y"}, cmd=["sh"], kernel=Kernel(("/bin/k", "{connection_file}")),
        limits=Limits(memory=5), created="2025-01-01T00:00:00Z", architecture="amd64",
        history=[{"created_by": "apt"}],
    )  # fmt: skip
    assert json.loads(data) == {
        "architecture": "amd64",
        "config": {
            "Cmd": ["sh"],
            "Env": ["PATH=/bin", "A=x=y"],
            "Labels": {
                "org.jupyter.workbench.kernel": '{"argv":["/bin/k","{connection_file}"],"display_name":"",'
                '"interrupt_mode":"signal","language":"python","supported_encryption":[],"transport":"ipc"}',
                "org.jupyter.workbench.limits": '{"cpus":null,"memory":5,"processes":null}',
            },
            "WorkingDir": "/",
        },
        "created": "2025-01-01T00:00:00Z",
        "history": [{"created_by": "apt"}],
        "os": "linux",
        "rootfs": {"diff_ids": [LAYER], "type": "layers"},
    }
    image = config.decode(data)
    assert image.id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert image.env == (("PATH", "/bin"), ("A", "x=y")) and image.limits.memory == 5 and image.labels == ()


@given(
    env=st.dictionaries(TEXT.filter(lambda t: t and "=" not in t), TEXT, max_size=3),
    cmd=st.lists(TEXT, max_size=3),
    labels=st.dictionaries(TEXT, TEXT, max_size=3),
    kernel=st.none() | st.builds(Kernel, argv=st.lists(TEXT).map(tuple), display_name=TEXT),
    limits=st.builds(Limits, memory=st.none() | st.integers(1, 2**40), cpus=st.none() | st.floats(0.1, 64)),
)
def test_what_goes_in_comes_out(env, cmd, labels, kernel, limits) -> None:
    fields = {"env": env, "cmd": cmd, "labels": labels, "kernel": kernel, "limits": limits, "working_dir": "/w"}
    data = config.encode(diff_ids=[LAYER, LAYER], **fields)
    assert data == config.encode(diff_ids=[LAYER, LAYER], **{**fields, "labels": dict(reversed(labels.items()))})
    image = config.decode(data)
    assert dict(image.env) == env and list(image.cmd) == cmd and dict(image.labels) == labels
    assert (image.kernel, image.limits, image.diff_ids, image.working_dir) == (kernel, limits, (LAYER, LAYER), "/w")


def test_an_image_of_others() -> None:
    """Docker's own: nulls, an entry point, members that the spec doesn't know."""
    data = json.dumps({
        "architecture": "amd64", "os": "linux", "container_config": {"Hostname": "x"}, "docker_version": "20",
        "config": {"Env": ["PATH=/bin", "odd"], "Cmd": ["a"], "Entrypoint": ["/e"], "WorkingDir": "", "Labels": None,
                   "OnBuild": None, "User": "1000"},
        "rootfs": {"type": "layers", "diff_ids": [LAYER]}, "history": [],
    }).encode()  # fmt: skip
    image = config.decode(data)
    assert (
        image.kernel is None
        and image.cmd == ("/e", "a")
        and image.working_dir == "/"
        and image.env == (("PATH", "/bin"),)
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'{"os":"linux"}',
     b'{"os":"linux","architecture":"a","rootfs":{"type":"layers","diff_ids":["sha256:12"]}}',
     b'{"os":"linux","architecture":"a","rootfs":{"type":"layers","diff_ids":["../../x"]}}',
     b'{"os":"linux","architecture":"a","rootfs":{"type":"layers","diff_ids":["../sha256:' + b"a" * 64 + b'"]}}',
     b'{"os":"linux","architecture":"a","rootfs":{"type":"layers","diff_ids":["sha256:' + b"a" * 64 + b'\\n"]}}',
     b'{"os":"linux","architecture":"a","rootfs":{"type":"layers","diff_ids":[]},"config":{"Env":[1]}}'],
)  # fmt: skip
def test_what_is_no_config(data: bytes) -> None:
    with pytest.raises(Corrupt) as refused:
        config.decode(data)
    assert "\n" not in str(refused.value)


def test_what_is_not_for_us() -> None:
    document = {"os": "windows", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}
    with pytest.raises(InvalidInput, match="windows"):
        config.decode(json.dumps(document).encode())
    document |= {"os": "linux", "config": {"Labels": {config.KERNEL_LABEL: '{"argv": "sh"}'}}}
    with pytest.raises(InvalidInput, match=r"workbench\.kernel is malformed"):
        config.decode(json.dumps(document).encode())


@pytest.mark.parametrize("bad", [{"diff_ids": ["x"]}, {"env": {"": "x"}}, {"env": {"A=B": "x"}}, {"env": {"A": "\0"}}])
def test_what_cannot_be_written(bad) -> None:
    with pytest.raises(InvalidInput):
        config.encode(**{"diff_ids": [], **bad})
