# PLACEHOLDER by the lead until H5 writes the real one: overwrite this file.
import ctypes, fcntl, os, socket, struct, subprocess
class Attachment:
    p = None
    def detach(self):
        if self.p: self.p.kill(); self.p.wait()
def preload(): pass
def close(): pass
def sweep(): pass
def files(kind, rootful, hostname): return (("/etc/hostname",hostname+"\n"),("/etc/hosts","127.0.0.1 localhost\n"),("/etc/resolv.conf",open("/etc/resolv.conf").read()))
def loopback_up():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(s, 0x8914, struct.pack("16sh22x", b"lo", 1 | 0x40)); s.close()
def attach(kind, *, pid, **k):
    a = Attachment()
    if kind == "outbound":
        a.p = subprocess.Popen(["pasta","--config-net","--no-map-gw","-f","-q","-t","none","-u","none","-T","none","-U","none","--runas","0","--userns",f"/proc/{pid}/ns/user","--netns",f"/proc/{pid}/ns/net"])
        import time; time.sleep(0.15)
    return a
