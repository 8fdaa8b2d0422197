"""The filter: what it says for every system call (by interpreting it), and what the kernel makes of it."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import signal
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest

from workbench.linux import seccomp
from workbench.linux import syscalls as sc
from workbench.model import InvalidInput

CAPABILITIES = frozenset({"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SYS_CHROOT"})
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS, FAKED = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS, ERRNO
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
X86 = platform.machine() == "x86_64"
PROFILE = json.load(open(seccomp.PROFILE))


def verdict(program: bytes, number: int, *args: int, arch: int = AUDIT) -> int:
    """Run classic BPF over one struct seccomp_data (seccomp(2))."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(*args, *[0] * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        op, jt, jf, k = code[at]
        at += 1
        if op == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif op == 0x54:
            accumulator &= k
        elif op == 0x05:
            at += k
        elif op in (0x15, 0x25, 0x35, 0x45):
            hit = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}
            at += jt if hit[op] else jf
        elif op == 0x06:
            return k
        else:
            raise AssertionError(f"unexpected instruction {op:#x}")


def number(name: str) -> int:
    found: int = seccomp._library().seccomp_syscall_resolve_name(name.encode())
    return found if found >= 0 else seccomp._YOUNG.get(name, -1)


def name_of(nr: int) -> str | None:
    library = seccomp._library()
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
    found = library.seccomp_syscall_resolve_num_arch(library.seccomp_arch_native(), nr)
    return found.decode() if found else None


ALLOWED = {
    name
    for rule in PROFILE["syscalls"]
    if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args")
    if X86 or "amd64" not in rule.get("includes", {}).get("arches", [])
    for name in rule["names"]
}
CONDITIONAL = {"personality", "clone3"}


def test_every_system_call_ends_as_the_profile_says() -> None:
    program = seccomp.compile_default(CAPABILITIES)
    seen = 0
    for nr in range(470):
        name = name_of(nr) or next((n for n, value in seccomp._YOUNG.items() if value == nr), None)
        if name not in CONDITIONAL:
            seen += name in ALLOWED
            assert verdict(program, nr) == (ALLOW if name in ALLOWED else EPERM), (nr, name)
    assert seen == sum(number(name) >= 0 for name in ALLOWED) > 250


def test_newer_system_calls_do_not_exist() -> None:
    program = seccomp.compile_default(CAPABILITIES)
    for nr in (470, 500, 1000, 0x3FFFFFFF):
        assert verdict(program, nr) == ENOSYS
    assert verdict(program, number("clone3")) == ENOSYS


REFUSED = """mount umount2 pivot_root unshare setns bpf keyctl add_key request_key io_uring_setup io_uring_enter
io_uring_register userfaultfd perf_event_open open_by_handle_at fsopen fsmount move_mount open_tree
mount_setattr kexec_load init_module finit_module delete_module reboot swapon acct quotactl syslog
settimeofday clock_settime sethostname setdomainname vhangup fanotify_init process_madvise"""


@pytest.mark.parametrize("name", REFUSED.split())
def test_refused(name: str) -> None:
    assert verdict(seccomp.compile_default(CAPABILITIES), number(name)) == EPERM


def test_arguments() -> None:
    program = seccomp.compile_default(CAPABILITIES)
    high = 1 << 32  # the kernel looks at the lower half only, so the filter must not be fooled by the upper
    for family in range(50):
        expected = EPERM if family in (socket.AF_ALG, socket.AF_VSOCK) else ALLOW
        assert verdict(program, number("socket"), family) == expected
        assert verdict(program, number("socket"), family | high) == expected
    for request in (0x5412, 0x541C):
        assert verdict(program, number("ioctl"), 0, request) == EPERM
        assert verdict(program, number("ioctl"), 0, request | 7 * high) == EPERM
    assert verdict(program, number("ioctl"), 0, 0x5401) == ALLOW
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(program, number("clone"), flag | signal.SIGCHLD) == EPERM
    assert verdict(program, number("clone"), 0x3D0F00) == ALLOW  # a thread
    for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
        assert verdict(program, number("personality"), value) == ALLOW
    for value in (0x0040000, 0x0400000, 1, 8 | high):  # ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC, …
        assert verdict(program, number("personality"), value) == EPERM


def test_capabilities() -> None:
    chroot = number("chroot")
    assert verdict(seccomp.compile_default(CAPABILITIES), chroot) == ALLOW
    assert verdict(seccomp.compile_default(CAPABILITIES - {"SYS_CHROOT"}), chroot) == EPERM


def test_foreign_abis_are_killed() -> None:
    for program in (seccomp.compile_default(CAPABILITIES), seccomp.compile_ownership()):
        for arch in (0x40000003, 0x40000028, 0xC000003E ^ AUDIT ^ 0xC00000B7):  # i386, arm, the other of ours
            assert verdict(program, 1, arch=arch) == KILL
        if X86:
            assert verdict(program, 0x40000000 | 1) == KILL  # x32


def test_faked_ownership() -> None:
    whole = seccomp.compile_default(CAPABILITIES, fake_ownership=True)
    alone = seccomp.compile_ownership()
    for program in (whole, alone):
        for name in seccomp.FAKE_OWNERSHIP[0]["names"]:
            if number(name) >= 0:
                assert verdict(program, number(name)) == FAKED
        assert verdict(program, number("mknodat"), 0, 0, stat.S_IFCHR | 0o666) == FAKED
        assert verdict(program, number("mknodat"), 0, 0, stat.S_IFBLK) == FAKED
        assert verdict(program, number("mknodat"), 0, 0, stat.S_IFIFO) == ALLOW
        assert verdict(program, number("mknodat"), 0, 0, stat.S_IFSOCK) == ALLOW
        assert verdict(program, number("openat")) == ALLOW
    assert verdict(alone, number("mount")) == ALLOW
    assert verdict(whole, number("mount")) == EPERM


def test_a_profile_that_cannot_be_meant(tmp_path: Any) -> None:
    for change in (
        {"action": "SCMP_ACT_TRACE"},
        {"includes": {"minKernel": "4.8"}},
        {"args": [{"index": 0, "value": 1, "op": "SCMP_CMP_LIKE"}]},
    ):
        rule = {"names": ["read"], "action": "SCMP_ACT_ALLOW"} | change
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}))
        with pytest.raises(InvalidInput, match="not known here"):
            seccomp.compile(str(path), frozenset())
        seccomp.compile.cache_clear()


def filtered(probe: Callable[[], Any], *, fake_ownership: bool = False, uid: int | None = None) -> Any:
    """What ``probe`` returns in a child under the filter; the signal that ended it as an int < 0."""
    program = seccomp.compile_default(CAPABILITIES, fake_ownership=fake_ownership)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if uid is not None and os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.load(program)
            os.write(write, json.dumps(probe()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(data) if data else os.waitstatus_to_exitcode(status)


libc = ctypes.CDLL(None, use_errno=True)


def call(nr: int, *args: int) -> int:
    """0, or the errno."""
    result = libc.syscall(ctypes.c_long(nr), *(ctypes.c_ulong(a) for a in args))
    return ctypes.get_errno() if result == -1 else 0


@pytest.mark.parametrize("uid", [None, 65534])
def test_the_kernel_agrees(uid: int | None) -> None:
    def probe() -> dict[str, int]:
        return {
            "unshare": call(number("unshare"), sc.CLONE_NEWUSER),
            "clone": call(number("clone"), sc.CLONE_NEWUSER | signal.SIGCHLD),
            "clone3": call(435, 0, 0),
            "unknown": call(999),
            "bpf": call(number("bpf")),
            "keyctl": call(number("keyctl")),
            "io_uring": call(number("io_uring_setup"), 1, 0),
            "alg": call(number("socket"), socket.AF_ALG | 1 << 32, socket.SOCK_SEQPACKET, 0),
            "vsock": call(number("socket"), socket.AF_VSOCK, socket.SOCK_STREAM, 0),
            "inet": call(number("socket"), socket.AF_INET, socket.SOCK_STREAM, 0),
            "tiocsti": call(number("ioctl"), 0, 0x5412 | 1 << 40, 0),
            "getpid": call(number("getpid")),
        }

    found = filtered(probe, uid=uid)
    assert {name for name, code in found.items() if code == errno.EPERM} == {
        "unshare", "clone", "bpf", "keyctl", "io_uring", "alg", "vsock", "tiocsti",
    }  # fmt: skip
    assert found["clone3"] == found["unknown"] == errno.ENOSYS
    assert found["inet"] == found["getpid"] == 0


@pytest.mark.skipif(not X86, reason="i386 and x32 belong to x86_64")
def test_the_kernel_kills_foreign_abis() -> None:
    def by_i386() -> int:
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3")  # push rbx; mov eax, 20 (getpid); int 0x80; …
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        return ctypes.CFUNCTYPE(ctypes.c_int)(address)()

    assert filtered(by_i386) == -signal.SIGSYS
    assert filtered(lambda: call(0x40000000 | 39)) == -signal.SIGSYS


def test_ownership_is_faked_for_real() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "file")
        with open(path, "w"):
            pass
        os.chmod(folder, 0o777)

        def probe() -> list[Any]:
            os.chown(path, 5, 6)
            os.setgroups([7])
            os.setresuid(8, 8, 8)
            os.mknod(path + ".device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            os.mkfifo(path + ".fifo")
            return [os.stat(path).st_uid, os.getuid(), os.path.exists(path + ".device"), os.listdir(folder)]

        owner, uid, device, names = filtered(probe, fake_ownership=True, uid=65534)
        assert owner == os.geteuid()
        assert uid in (65534, os.geteuid())
        assert not device
        assert sorted(names) == ["file", "file.fifo"]


def test_it_is_quick() -> None:
    seccomp.compile.cache_clear()
    begin = time.perf_counter()
    seccomp.compile_default(CAPABILITIES)
    assert time.perf_counter() - begin < 0.1
