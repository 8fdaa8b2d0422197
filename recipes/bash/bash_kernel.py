"""A Jupyter kernel for bash: one shell that keeps its variables, functions and folder from cell to cell.

Protocol: https://jupyter-client.readthedocs.io/en/stable/messaging.html. Only the standard library and pyzmq.
"""

import hashlib
import hmac
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime

import zmq

DELIMITER = b"<IDS|MSG>"
#: After the shell has said that a cell is over: seconds for its output to arrive.
GRACE = 0.05


class Shell:
    """An interactive bash without a terminal: a SIGINT ends the running command and not the shell."""

    def __init__(self):
        words, self.words = os.pipe()
        self.done, done = os.pipe()
        environ = dict(os.environ, PS1="", PS2="", TERM="dumb", HISTFILE="")
        # Job control would want a terminal; without it a background job stays in the group that is interrupted.
        self.process = subprocess.Popen(
            ["/bin/bash", "--noprofile", "--norc", "--noediting", "-i", "+m"],
            stdin=words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, pass_fds=[done],
            start_new_session=True,
        )
        os.close(words)
        os.close(done)
        self.report = done
        self.out, self.err = self.process.stdout.fileno(), self.process.stderr.fileno()
        self.run(":", lambda *_: None)  # it complains of the missing terminal first

    def run(self, code, tell):
        """Run a cell; its exit code, or None when the shell itself has ended. tell(name, text) for each output."""
        script = f"eval {shlex.quote(code)} </dev/null\nprintf '%d\\n' \"$?\" >&{self.report}\n"
        # From a thread: a shell that reads slowly must not keep its output from being read.
        threading.Thread(target=os.write, args=(self.words, script.encode()), daemon=True).start()
        code, until = None, None
        while until is None or time.monotonic() < until:
            ready, _, _ = select.select([self.out, self.err, self.done], [], [], 0.02 if until else None)
            if self.done in ready:
                answer = os.read(self.done, 64).split()
                code, until = int(answer[-1]) if answer else None, time.monotonic() + GRACE
                if not answer:
                    return None
                continue
            for fd, name in ((self.out, "stdout"), (self.err, "stderr")):
                if fd in ready:
                    data = os.read(fd, 1 << 16)
                    if not data and until is None:
                        until = time.monotonic() + GRACE
                    if data:
                        tell(name, data.decode(errors="replace"))
            if until and not ready:
                break
        return code

    def interrupt(self):
        """SIGINT to the shell and all that it runs."""
        os.killpg(self.process.pid, signal.SIGINT)


class Kernel:
    """The five channels."""

    def __init__(self, path):
        with open(path) as file:
            self.info = json.load(file)
        self.key = self.info["key"].encode()
        self.session = uuid.uuid4().hex
        self.count = 0
        self.parent = {}
        self.lock = threading.Lock()
        self.shell = Shell()
        context = zmq.Context()
        kinds = {"shell": zmq.ROUTER, "control": zmq.ROUTER, "stdin": zmq.ROUTER, "iopub": zmq.PUB, "hb": zmq.REP}
        self.sockets = {name: context.socket(kind) for name, kind in kinds.items()}
        for name, socket in self.sockets.items():
            socket.linger = 1000
            if self.info["transport"] == "ipc":
                socket.bind(f"ipc://{self.info['ip']}-{self.info[name + '_port']}")
            else:
                socket.bind(f"tcp://{self.info['ip']}:{self.info[name + '_port']}")

    def serve(self):
        """Answer until a shutdown is asked for."""
        threading.Thread(target=self.echo, daemon=True).start()
        threading.Thread(target=self.listen, args=("control",), daemon=True).start()
        self.status("starting")
        self.listen("shell")

    def echo(self):
        heart = self.sockets["hb"]
        while True:
            heart.send(heart.recv())

    def listen(self, name):
        """Take one request of a channel after the other."""
        socket = self.sockets[name]
        while True:
            frames = socket.recv_multipart()
            at = frames.index(DELIMITER)
            if self.sign(frames[at + 2 : at + 6]) != frames[at + 1]:
                continue
            header, content = json.loads(frames[at + 2]), json.loads(frames[at + 5])
            answer = getattr(self, "on_" + header["msg_type"], None)
            if answer is None:
                continue
            self.status("busy", header)
            reply = answer(content, header)
            kind = header["msg_type"].replace("_request", "_reply")
            self.send(socket, kind, reply, header, frames[:at])
            self.status("idle", header)
            if header["msg_type"] == "shutdown_request":
                time.sleep(0.1)
                os._exit(0)

    def sign(self, frames):
        digest = hmac.new(self.key, digestmod=hashlib.sha256)
        for frame in frames:
            digest.update(frame)
        return digest.hexdigest().encode() if self.key else b""

    def send(self, socket, kind, content, parent, identities=()):
        header = {
            "msg_id": uuid.uuid4().hex, "session": self.session, "username": "kernel", "msg_type": kind,
            "date": datetime.now(UTC).isoformat(), "version": "5.3",
        }
        frames = [json.dumps(part).encode() for part in (header, parent or {}, {}, content)]
        with self.lock:
            socket.send_multipart([*identities, DELIMITER, self.sign(frames), *frames])

    def publish(self, kind, content, parent):
        self.send(self.sockets["iopub"], kind, content, parent, [kind.encode()])

    def status(self, state, parent=None):
        self.publish("status", {"execution_state": state}, parent)

    def on_kernel_info_request(self, _content, _header):
        with open("/etc/debian_version") as file:
            system = file.read().strip()
        version = subprocess.run(["/bin/bash", "-c", "echo $BASH_VERSION"], capture_output=True, text=True).stdout
        return {
            "status": "ok", "protocol_version": "5.3", "implementation": "workbench-bash",
            "implementation_version": "1", "banner": f"bash {version.strip()} on Debian {system}", "help_links": [],
            "language_info": {
                "name": "bash", "version": version.strip(), "mimetype": "text/x-sh", "file_extension": ".sh",
                "codemirror_mode": "shell", "pygments_lexer": "bash",
            },
        }

    def on_execute_request(self, content, header):
        silent = content.get("silent", False)
        if not silent:
            self.count += 1
            self.publish("execute_input", {"code": content["code"], "execution_count": self.count}, header)

        def tell(name, text):
            if not silent:
                self.publish("stream", {"name": name, "text": text}, header)

        code = self.shell.run(content["code"], tell)
        if code is None:
            tell("stderr", "The shell has ended; a new one begins, without the variables of the old one.\n")
            self.shell = Shell()
        if code == 0:
            return {"status": "ok", "execution_count": self.count, "payload": [], "user_expressions": {}}
        name = "KeyboardInterrupt" if code == 130 else "ExitCode"
        error = {"ename": name, "evalue": str(code), "traceback": [f"{name}: {code}"]}
        if not silent:
            self.publish("error", error, header)
        return {"status": "error", "execution_count": self.count, **error}

    def on_is_complete_request(self, content, _header):
        done = subprocess.run(["/bin/bash", "-n"], input=content["code"], capture_output=True, text=True)
        if done.returncode == 0:
            return {"status": "complete"}
        unfinished = "unexpected end of file" in done.stderr or "unexpected EOF" in done.stderr
        return {"status": "incomplete", "indent": "  "} if unfinished else {"status": "invalid"}

    def on_complete_request(self, content, _header):
        end = content["cursor_pos"]
        start = max((content["code"].rfind(mark, 0, end) for mark in " \t\n;|&"), default=-1) + 1
        word = shlex.quote(content["code"][start:end])
        kinds = "-c -f -v" if start == 0 else "-f -v"
        found = []
        for kind in kinds.split():
            done = subprocess.run(["/bin/bash", "-c", f"compgen {kind} -- {word}"], capture_output=True, text=True)
            found += done.stdout.split("\n")
        matches = sorted({name for name in found if name})[:500]
        return {"status": "ok", "matches": matches, "cursor_start": start, "cursor_end": end, "metadata": {}}

    def on_inspect_request(self, _content, _header):
        return {"status": "ok", "found": False, "data": {}, "metadata": {}}

    def on_comm_info_request(self, _content, _header):
        return {"status": "ok", "comms": {}}

    def on_history_request(self, _content, _header):
        return {"status": "ok", "history": []}

    def on_interrupt_request(self, _content, _header):
        self.shell.interrupt()
        return {"status": "ok"}

    def on_shutdown_request(self, content, _header):
        self.shell.process.kill()
        return {"status": "ok", "restart": content.get("restart", False)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: kernel.shell.interrupt())
    kernel = Kernel(sys.argv[1])
    kernel.serve()
