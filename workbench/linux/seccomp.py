"""A profile in Docker's JSON form -> a system call filter (seccomp(2), libseccomp's seccomp_rule_add(3)).

libseccomp compiles the profile once a helper; what a container's child loads before its exec is bytes, and takes
microseconds. The program is two of libseccomp's, one after the other, because one cannot say "all but": a rule
compares an argument once, and an allowance without conditions swallows a refusal with some. So first the
refusals, where whatever matches none falls through, then the allowances. A refusal wins over an allowance.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import struct
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from workbench.model import HostLacks, InvalidInput

PROFILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seccomp.json")

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*, linux/seccomp.h
_EPERM, _ENOSYS = 1, 38
_BADARCH, _OPTIMIZE = 2, 8  # enum scmp_filter_attr, seccomp.h
_OPERATORS = {
    f"SCMP_CMP_{name}": number for number, name in enumerate(("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"), start=1)
}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

#: System calls younger than the oldest libseccomp that may be found (2.5); their numbers are everybody's.
_YOUNG = {
    "memfd_secret": 447, "process_mrelease": 448, "futex_waitv": 449, "cachestat": 451, "fchmodat2": 452,
    "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456, "mseal": 462,
    "setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466, "file_getattr": 468,
    "file_setattr": 469,
}  # fmt: skip


def _device(name: str, index: int) -> list[dict[str, Any]]:
    """Rules that fake making a device node; FIFOs and sockets (mknod(2)'s mode in that argument) stay real."""
    return [
        {"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": 0,
         "args": [{"index": index, "value": 0o170000, "valueTwo": kind, "op": "SCMP_CMP_MASKED_EQ"}]}
        for kind in (0o020000, 0o060000)
    ]  # fmt: skip


#: For containers with a single id: giving files away and changing user seems to work and changes nothing, since
#: dpkg and apt stop when it fails.
FAKE_OWNERSHIP: list[dict[str, Any]] = [
    {
        "names": [
            "chown", "lchown", "fchown", "fchownat", "setuid", "setgid", "setreuid", "setregid", "setresuid",
            "setresgid", "setfsuid", "setfsgid", "setgroups",
        ],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": 0,
    },
    *_device("mknod", 1),
    *_device("mknodat", 2),
]  # fmt: skip


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("index", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("value_two", ctypes.c_uint64),
    )


def compile_default(capabilities: Collection[str], *, fake_ownership: bool = False) -> bytes:
    """The filter of every container, from ``seccomp.json``; see ``compile``."""
    return compile(PROFILE, frozenset(capabilities), fake_ownership=fake_ownership)


@functools.cache
def compile_ownership() -> bytes:
    """A filter that refuses nothing but fakes ownership: for building a base system with a single id."""
    return _pack(_program(FAKE_OWNERSHIP, _ALLOW)[0])


@functools.cache
def compile(path: str, capabilities: frozenset[str], *, fake_ownership: bool = False) -> bytes:  # noqa: A001
    """A BPF program from the profile in the file ``path``, for a process with these capabilities.

    capabilities: names as in capabilities(7), without ``CAP_``. fake_ownership adds FAKE_OWNERSHIP. Of the form
    ``includes`` and ``excludes`` by ``caps`` and ``arches`` count; other conditions are refused, not ignored.
    Foreign ABIs (i386, x32, 32 bit ARM) are killed. System calls newer than any that the profile names
    end with ENOSYS, so that programs fall back as on an older kernel.
    Raises HostLacks without libseccomp, InvalidInput for a profile that cannot be meant.
    """
    with open(path, "rb") as file:
        profile = json.load(file)
    architecture = _ARCHITECTURES.get(os.uname().machine)
    if architecture is None:
        raise HostLacks("compile the system call filter", f"no profile for {os.uname().machine}", "")
    rules = [rule for rule in profile["syscalls"] if _applies(rule, architecture, capabilities)]
    refusals = [rule for rule in rules if rule["action"] != "SCMP_ACT_ALLOW"]
    allowances = [rule for rule in rules if rule["action"] == "SCMP_ACT_ALLOW"]
    if fake_ownership:
        refusals += FAKE_OWNERSHIP
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet", _EPERM))
    first, newest_refused = _program(refusals, _ALLOW)
    second, newest_allowed = _program(allowances, default)
    unknown = [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x25, 0, 1, max(newest_refused, newest_allowed)),  # if it is greater,
        (0x06, 0, 0, _ERRNO | _ENOSYS),  # there is no such call
    ]
    return _pack(_falling_through(first) + unknown + second)


def load(program: bytes) -> None:
    """Put the calling process under the filter for good (seccomp(2)); it needs no_new_privs before.

    Raises OSError.
    """
    code = ctypes.create_string_buffer(program, len(program))
    what = struct.pack("HP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
    # SECCOMP_FILTER_FLAG_SPEC_ALLOW: kernels before 5.16 would slow every branch of the process down
    # (Speculative Store Bypass) for a filter; runc and crun ask for the same.
    arguments = (ctypes.c_long(number), ctypes.c_long(1), ctypes.c_long(1 << 2), what)
    if libc.syscall(*arguments):
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure))


Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jt, jf, k


def _applies(rule: dict[str, Any], architecture: str, capabilities: frozenset[str]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    strange = {*includes, *excludes} - {"caps", "arches"}
    if strange:
        _refuse(f"the condition {strange.pop()!r} of {rule['names'][0]} is not known here")

    def has(names: Sequence[str]) -> list[bool]:
        return [name.removeprefix("CAP_") in capabilities for name in names]

    return (
        all(has(includes.get("caps", ())))
        and (not includes.get("arches") or architecture in includes["arches"])
        and not any(has(excludes.get("caps", ())))
        and architecture not in excludes.get("arches", ())
    )


def _action(name: str, number: int) -> int:
    actions = {
        "SCMP_ACT_ALLOW": _ALLOW,
        "SCMP_ACT_ERRNO": _ERRNO | number,
        "SCMP_ACT_KILL_PROCESS": _KILL,
    }
    if name not in actions:
        _refuse(f"the action {name} is not known here")
    return actions[name]


def _refuse(why: str) -> NoReturn:
    raise InvalidInput("compile the system call filter", why)


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise HostLacks(
            "compile the system call filter", "libseccomp.so.2 is missing", "apt-get install libseccomp2"
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _program(rules: Sequence[dict[str, Any]], default: int) -> tuple[list[Instruction], int]:
    """What libseccomp makes of the rules, and the highest number of a system call that they name."""
    library = _library()
    newest = 0
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context.value:
        _checked("begin a filter", -12)
    try:
        for attribute, value in ((_BADARCH, _KILL), (_OPTIMIZE, 2)):  # 2: a binary tree, not a chain
            _checked("set up a filter", library.seccomp_attr_set(context, attribute, ctypes.c_uint32(value)))
        for rule in rules:
            action = ctypes.c_uint32(_action(rule["action"], rule.get("errnoRet", _EPERM)))
            comparisons = _comparisons(rule.get("args") or ())
            for name in rule["names"]:
                number = library.seccomp_syscall_resolve_name(name.encode())
                if number < 0:
                    number = _YOUNG.get(name, -1)
                if number < 0:  # not a call of this processor
                    continue
                newest = max(newest, number)
                done = library.seccomp_rule_add_array(context, action, number, len(comparisons), comparisons)
                _checked(f"add a rule for {name}", done)
        memory = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            _checked("write the filter", library.seccomp_export_bpf(context, memory))
            os.lseek(memory, 0, os.SEEK_SET)
            with os.fdopen(memory, "rb", closefd=False) as file:
                return list(struct.iter_unpack("=HBBI", file.read())), newest
        finally:
            os.close(memory)
    finally:
        library.seccomp_release(context)


def _comparisons(wanted: Sequence[dict[str, Any]]) -> Any:
    found = []
    for entry in wanted:
        value, value_two = entry["value"], entry.get("valueTwo", 0)
        if entry["op"] not in _OPERATORS:
            _refuse(f"the comparison {entry['op']} is not known here")
        found.append(_Comparison(entry["index"], _OPERATORS[entry["op"]], value, value_two))
    return (_Comparison * len(found))(*found)


def _checked(what: str, code: int) -> None:
    """libseccomp's way of failing: a negative errno."""
    if code:
        raise HostLacks("compile the system call filter", f"libseccomp cannot {what}: {os.strerror(-code)}", "")


def _falling_through(program: list[Instruction]) -> list[Instruction]:
    """The program with each of its returns of "allowed" replaced by a jump behind its end (BPF_JA)."""
    last = len(program) - 1
    return [
        (0x05, 0, 0, last - index) if (code, k) == (0x06, _ALLOW) else (code, jt, jf, k)
        for index, (code, jt, jf, k) in enumerate(program)
    ]


def _pack(program: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
