"""A worker process without an engine, for tests of the server's side. It follows scripts in its Load and requests.

The Load's `template` and a prompt's text may be a JSON script. Any other prompt is echoed, one Content for each
character.
"""

import os
import signal
import socket
import sys
import time

import msgspec

from tinyoai import wire


class LoadScript(msgspec.Struct):
    """The behaviour at load. `deaths` processes exit before Ready; `count` is the file that counts them."""

    deaths: int = 0
    count: str = ""
    refuse: str = ""
    hang: bool = False
    max_step_s: float = 0.0


class Script(msgspec.Struct):
    """The behaviour at a request."""

    text: str = ""
    die: str = ""
    """Die once this is sent: started, queued, accepted or content."""
    first: str = ""
    """A file. If it is missing, the process creates it and dies silently; otherwise the text is echoed."""
    hold: bool = False
    """After the Accepted and the text, if any, hold the request until a release."""
    release: bool = False
    """End all held requests."""
    say: str = ""
    """Send this as Content to all held requests."""
    breach: bool = False
    """Send a Done too early."""
    silent: bool = False
    """Send nothing at all."""
    threads: bool = False
    """The text of the answer is what was granted before, and when: a list of pairs (requests before it, threads)."""


class Worker:
    """The connection and the held requests."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held: dict[int, wire.Request] = {}
        self.n_requests = 0
        self.grants: list[tuple[int, int]] = []

    def send(self, *messages: wire.ToServer) -> None:
        """Sends one frame."""
        self.sock.sendall(wire.frame(messages))

    def load(self, load: wire.Load) -> None:
        """Answers the Load."""
        script = LoadScript()
        if load.template.startswith("{"):
            script = msgspec.json.decode(load.template, type=LoadScript)
        if script.refuse:
            self.send(wire.LoadFailed(message=script.refuse))
            sys.exit(3)
        while script.hang:
            time.sleep(1)
        if script.count:
            with open(script.count, "a+") as file:
                file.write("x")
                if file.tell() <= script.deaths:
                    file.flush()
                    die()
        info = wire.ModelInfo(
            name=load.name, architecture="scripted", quantization="", engine="scripted", n_params=0, n_vocab=0,
            n_ctx=load.n_ctx, n_ctx_train=0, n_embd=0, file_size=0, bos_id=-1, eos_id=-1, eog_ids=(), special={},
            chat_template="", add_bos=False, add_space_prefix=False,
        )  # fmt: skip
        self.send(
            wire.Ready(
                info=info, n_slots=load.n_slots, n_threads=1, version="0", max_step_s=script.max_step_s
            )
        )

    def request(self, request: wire.Request) -> None:
        """Answers a request."""
        text = "".join(s.text for s in request.body.prompt if isinstance(s, wire.Text))
        script = msgspec.json.decode(text, type=Script) if text.startswith("{") else Script(text=text)
        number = request.id
        self.n_requests += 1
        if script.threads:
            script.text = msgspec.json.encode(self.grants).decode()
        if script.silent:
            return
        if script.first and not os.path.exists(script.first):
            open(script.first, "x").close()
            die()
        self.stage(script, "started", wire.Started(number))
        for held in self.held if script.say else ():
            self.send(wire.Content(id=held, text=script.say))
        if script.release:
            for held in self.held:
                self.finish(held)
            self.held.clear()
        if script.breach:
            self.send(wire.Done(id=number))
            return
        self.stage(script, "queued", wire.Queued(number, n_prompt=len(text)))
        self.stage(script, "accepted", wire.Accepted(id=number, n_prompt=len(text), n_cached=0))
        for character in script.text or ("" if script.hold else "x"):
            self.stage(script, "content", wire.Content(id=number, text=character))
        if script.hold:
            self.held[number] = request
        else:
            self.finish(number)

    def stage(self, script: Script, name: str, message: wire.ToServer) -> None:
        """Sends a message, and dies after it if the script says so."""
        self.send(message)
        if script.die == name:
            die()

    def finish(self, number: int) -> None:
        """Ends a request successfully."""
        done = wire.ChoiceDone(
            id=number, choice=0, finish_reason="stop", n_cached=0, n_generated=1, prompt_ms=1, predicted_ms=1
        )
        self.send(done, wire.Done(id=number))

    def run(self) -> None:
        """Serves until the socket closes."""
        reader = wire.WorkerReader()
        while True:
            data = self.sock.recv(1 << 16)
            if not data:
                sys.exit(0)
            for message in reader.feed(data):
                if isinstance(message, wire.Load):
                    self.load(message)
                elif isinstance(message, wire.Request):
                    self.request(message)
                elif isinstance(message, wire.Cancel):
                    if self.held.pop(message.id, None) is not None:
                        self.send(wire.Failed(id=message.id, kind="Cancelled", message="cancelled"))
                elif isinstance(message, wire.Threads):
                    self.grants.append((self.n_requests, message.n))
                else:
                    sys.exit(0)


def die() -> None:
    """Kills this process, as a memory shortage does."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()
