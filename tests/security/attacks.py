"""Runs inside a container (standard library only): tries what must not work and prints, as JSON, what became of it.

``argv[1]`` is JSON: ``numbers`` of system calls by name, ``host_pid``, ``abstract`` (a socket's name). The answer
has a part for each function below; an attempt's outcome is the name of its errno, ``signal N``, or ``worked``.
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import stat
import struct
import subprocess
import sys

GIVEN = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
NEW = {"NS": 0x20000, "CGROUP": 0x2000000, "UTS": 0x4000000, "IPC": 0x8000000, "USER": 0x10000000,
       "PID": 0x20000000, "NET": 0x40000000}  # fmt: skip


def call(name, *args):
    """A system call by name (or by number)."""
    number = GIVEN["numbers"][name] if isinstance(name, str) else name
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *wide)
    return "worked" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def attempt(function, *args):
    try:
        function(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    except ValueError:  # Python's word for a limit that may not be raised
        return "EPERM"
    return "worked"


def in_child(function):
    """What ``function`` returns in a child, or the signal that ended it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else text


def refused_calls():
    """Every one of these has to end with EPERM, whatever its arguments."""
    buffer = ctypes.create_string_buffer(256)
    found = {name: call(name, 0, 0, 0, 0, 0, 0) for name in GIVEN["numbers"] if name not in GIVEN["special"]}
    found["mount tmpfs"] = call("mount", b"none", b"/mnt", b"tmpfs", 0, None)
    found["mount cgroup"] = call("mount", b"none", b"/mnt", b"cgroup", 0, b"memory")
    found["mount proc"] = call("mount", b"proc", b"/mnt", b"proc", 0, None)
    found["mount bind"] = call("mount", b"/", b"/mnt", None, 0x1000 | 0x4000, None)
    found["remount proc/sys"] = call("mount", None, b"/proc/sys", None, 0x20 | 0x1000, None)
    found["umount a mask"] = call("umount2", b"/proc/kcore", 2)
    found["umount proc/sys"] = call("umount2", b"/proc/sys", 2)
    found["pivot_root"] = call("pivot_root", b".", b".")
    found["open_tree clone"] = call("open_tree", -100, b"/", 0x8001)
    found["fsopen"] = call("fsopen", b"tmpfs", 0)
    found["keyctl new session"] = call("keyctl", 1, 0, 0, 0, 0)
    found["keyctl read user's"] = call("keyctl", 0, -4, 1, 0, 0)
    found["add_key"] = call("add_key", b"user", b"x", b"y", 1, -3)
    found["request_key"] = call("request_key", b"user", b"x", None, -3)
    found["bpf prog"] = call("bpf", 5, buffer, 72)
    found["userfaultfd user"] = call("userfaultfd", 1)
    found["io_uring_setup"] = call("io_uring_setup", 1, buffer)
    found["perf self"] = call("perf_event_open", buffer, 0, -1, -1, 0)
    found["sethostname"] = call("sethostname", b"x", 1)
    found["open_by_handle_at"] = call("open_by_handle_at", os.open("/", os.O_RDONLY), buffer, 0)
    for name, flag in NEW.items():
        found[f"unshare {name}"] = call("unshare", flag)
        found[f"clone {name}"] = call("clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
    found["unshare TIME"] = call("unshare", 0x80)
    for name in os.listdir("/proc/1/ns"):
        try:
            fd = os.open(f"/proc/1/ns/{name}", os.O_RDONLY)
        except OSError:  # the init is not to be looked into: as good
            fd = 0
        found[f"setns {name}"] = call("setns", fd, 0)
    for name, request in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C), ("TIOCSTI high", 0x5412 | 1 << 40)):
        found[name] = call("ioctl", 0, request, buffer)
    for name, value in (("no randomisation", 0x40000), ("read implies exec", 0x400000), ("odd", 0x8000000)):
        found[f"personality {name}"] = call("personality", value)
    for family in (38, 40):  # AF_ALG, AF_VSOCK
        found[f"socket family {family}"] = call("socket", family, socket.SOCK_STREAM, 0)
        found[f"socket family {family} high"] = call("socket", family | 1 << 33, socket.SOCK_STREAM, 0)
    return found


def missing_calls():
    """ENOSYS, so that programs fall back."""
    arguments = struct.pack("8Q", 0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    return {"clone3": call(435, arguments, 64), "clone3 empty": call(435, 0, 0), "unknown": call(600)}


def foreign_abis():
    if os.uname().machine != "x86_64":
        return {}

    def by_interrupt():
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3")  # getpid of i386 by int 0x80
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()

    return {"int 0x80": in_child(by_interrupt), "x32": in_child(lambda: call(0x40000000 | 39))}


def rights():
    """Capabilities cannot grow: by capset, ambient, a set-uid program, file capabilities."""

    def status():
        with open("/proc/self/status") as file:
            return {line.split(":")[0]: line.split()[1] for line in file if line.startswith(("Cap", "NoNew", "Uid"))}

    before = status()
    everything = 0x1FFFFFFFFFF
    low, high = everything & 0xFFFFFFFF, everything >> 32
    header, wanted = struct.pack("II", 0x20080522, 0), struct.pack("IIIIII", low, low, low, high, high, high)
    found = {"capset": call("capset", header, wanted)}
    found["ambient"] = call("prctl", 47, 2, 21, 0, 0)  # PR_CAP_AMBIENT_RAISE, CAP_SYS_ADMIN
    found["give up no_new_privs"] = call("prctl", 38, 0, 0, 0, 0)
    script = "grep -E '^(CapEff|CapPrm|Uid)' /proc/self/status"
    os.makedirs("/tmp/rights", exist_ok=True)
    for name, mode in (("plain", 0o755), ("setuid", 0o6755), ("capable", 0o755)):
        with open("/bin/dash", "rb") as source, open(f"/tmp/rights/{name}", "wb") as file:
            file.write(source.read())
        os.chmod(f"/tmp/rights/{name}", mode)
    # struct vfs_cap_data, revision 2, effective, everything
    blob = struct.pack("<5I", 0x02000001, low, 0, high, 0)
    found["file capabilities"] = attempt(os.setxattr, "/tmp/rights/capable", "security.capability", blob)

    def as_other(name):
        def run():
            os.setgid(1000)
            os.setuid(1000)
            done = subprocess.run([f"/tmp/rights/{name}", "-c", script], capture_output=True, text=True, check=False)
            return (done.stdout or done.stderr).replace("\n", " ")

        return in_child(run)

    programs = {name: as_other(name) for name in ("plain", "setuid", "capable")}
    return {"before": before, "after": status(), "attempts": found, "programs": programs}


def devices():
    """Device nodes: none can be made that opens, and the host's terminals are not there."""
    kinds = {"mem": (stat.S_IFCHR, 1, 1), "kmsg": (stat.S_IFCHR, 1, 11), "tun": (stat.S_IFCHR, 10, 200),
             "fuse": (stat.S_IFCHR, 10, 229), "disk": (stat.S_IFBLK, 254, 0), "sda": (stat.S_IFBLK, 8, 0),
             "null": (stat.S_IFCHR, 1, 3)}  # fmt: skip
    opened = []
    for folder in ("/tmp", "/dev", "/dev/shm", "/run", "/run/workbench", "/opt", os.getcwd()):
        for name, (kind, major, minor) in kinds.items():
            path = f"{folder}/node-{name}"
            attempt(os.mknod, path, kind | 0o666, os.makedev(major, minor))
            if attempt(os.open, path, os.O_RDWR | os.O_NONBLOCK) == "worked":
                opened.append(path)
            attempt(os.unlink, path)
    return {"opened": opened, "terminals": sorted(os.listdir("/dev/pts")), "tty": attempt(os.open, "/dev/tty", 2),
            "disks": [n for n in os.listdir("/dev") if stat.S_ISBLK(os.lstat(f"/dev/{n}").st_mode)]}  # fmt: skip


def proc_and_sys():
    """Nothing of the kernel's settings can be opened for writing."""

    def opens(path):
        """Nobody's file is written to through a link, or where no mode lets anybody write."""
        status = os.lstat(path)
        writable = stat.S_ISREG(status.st_mode) and status.st_mode & 0o222
        return bool(writable) and attempt(os.open, path, os.O_WRONLY | os.O_NONBLOCK) == "worked"

    opened, seen = [], 0
    tops = [f"/proc/{n}" for n in os.listdir("/proc") if not n.isdigit() and n not in ("self", "thread-self")]
    for top in (*tops, "/sys/kernel", "/sys/power", "/sys/module", "/sys/fs", "/sys/class", "/sys/bus"):
        if os.path.isfile(top):
            seen += 1
            if opens(top):
                opened.append(top)
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                seen += 1
                if opens(path):
                    opened.append(path)
    limits = [f"/proc/1/{name}" for name in ("uid_map", "gid_map", "setgroups", "oom_score_adj")]
    maps = {path: attempt(write, path, "-1000" if "oom" in path else "0 0 1") for path in limits}
    with open("/proc/self/mountinfo") as file:
        cgroups = [line for line in file if " - cgroup" in line]
    return {"opened": opened, "seen": seen, "maps": maps, "cgroups": cgroups}


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def processes():
    """What of processes can be seen and reached."""
    root = os.stat("/")
    roots, outside = [], []
    for name in filter(str.isdigit, os.listdir("/proc")):
        for link in ("root", "cwd"):
            try:
                found = os.stat(f"/proc/{name}/{link}")
                if link == "root" and (found.st_dev, found.st_ino) != (root.st_dev, root.st_ino):
                    outside.append(name)
            except OSError:
                pass
        roots.append(name)
    host = GIVEN["host_pid"]
    init = "/proc/1/exe"
    result = {
        "pids": roots, "outside": outside, "group": os.getpgid(1), "parent": os.getppid(),
        "kill host": attempt(os.kill, host, 0), "pidfd host": attempt(os.pidfd_open, host),
        "ptrace host": call("ptrace", 16, host, 0, 0), "priority host": attempt(os.setpriority, 0, host, 19),
        "init exe": os.readlink(init), "init write": attempt(os.open, init, os.O_WRONLY),
        "init append": attempt(os.open, init, os.O_WRONLY | os.O_APPEND),
        "init chmod": attempt(os.chmod, init, 0), "init chown": attempt(os.chown, init, 5, 5),
        "init truncate": attempt(os.truncate, init, 0), "init xattr": attempt(os.setxattr, init, "user.x", b"y"),
        "descriptors": {n: os.readlink(f"/proc/1/fd/{n}") for n in os.listdir("/proc/1/fd")},
    }  # fmt: skip
    with open("/proc/1/environ", "rb") as file:
        result["environ"] = sorted(part.partition(b"=")[0].decode() for part in file.read().split(b"\0") if part)
    with open("/proc/self/mountinfo") as file:
        result["mountinfo"] = file.read()
    with open("/proc/self/cgroup") as file:
        result["cgroup"] = file.read()
    return result


def escape_by_chroot():
    """The classic: a folder descriptor kept above a chroot, then up and up."""

    def run():
        os.makedirs("/tmp/chroot/below", exist_ok=True)
        top = os.open("/tmp/chroot", os.O_RDONLY)
        os.chroot("/tmp/chroot/below")
        os.fchdir(top)
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        with open("/etc/hostname") as file:
            return file.read().strip()

    return {"hostname": in_child(run), "own": os.uname().nodename}


def network_rights():
    """Addresses, routes and raw packets are not the container's to change."""

    def ioctl(request):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, request, struct.pack("16sH2s4s8s", b"lo", 2, b"", bytes([10, 9, 8, 7]), b""))

    def route(kind):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
            body = struct.pack("BBHiII", 0, 0, 0, 1, 1, 1)
            sock.send(struct.pack("IHHII", 16 + len(body), kind, 5, 1, 0) + body)
            answer = sock.recv(4096)
            code = -struct.unpack_from("i", answer, 16)[0]
            if code:
                raise OSError(code, "")

    return {
        "raw": attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
        "packet": attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0),
        "set address": attempt(ioctl, 0x8916), "set flags": attempt(ioctl, 0x8914),
        "new link": attempt(route, 16), "delete route": attempt(route, 25), "new address": attempt(route, 20),
        "abstract": attempt(socket.socket(socket.AF_UNIX).connect, "\0" + GIVEN["abstract"]),
    }  # fmt: skip


def time_and_keys():
    return {
        "set time": attempt(__import__("time").clock_settime, 0, 0),
        "adjust": call("clock_adjtime", 0, struct.pack("I204x", 1)),
        "keys": attempt(write, "/proc/keys", "x"),
        "keys seen": open("/proc/keys").read() if os.path.exists("/proc/keys") else "",
        "core limit": __import__("resource").getrlimit(4),
        "raise core limit": attempt(__import__("resource").setrlimit, 4, (1, 1)),
        "sysrq": attempt(write, "/proc/sysrq-trigger", "h"),
        "core pattern": attempt(write, "/proc/sys/kernel/core_pattern", "|/tmp/x"),
        "oom": attempt(write, "/proc/self/oom_score_adj", "-1000"),
        "nice": attempt(os.setpriority, 0, 0, -20),
    }


PARTS = (refused_calls, missing_calls, foreign_abis, rights, devices, proc_and_sys, processes, escape_by_chroot,
         network_rights, time_and_keys)  # fmt: skip
print(json.dumps({part.__name__: part() for part in PARTS}))
