"""`serve` as users run it: help, wrong flags, wrong files, ports in use, signals."""

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, refused
from tests.engines import make
from tests.serving import Server, command, environment, serve
from tinyoai import gguf
from tinyoai.app import BUILTIN
from tinyoai.config.options import OPTIONS


def run(*flags: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs the command and waits for its end."""
    return subprocess.run(
        command(*flags), capture_output=True, text=True, timeout=60, env=env or environment(), check=False
    )


def one_clear_line(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """Checks that stdout is empty and stderr has one line, and returns the line."""
    assert done.stdout == ""
    return refused(done, code)


def test_help_names_every_option_and_has_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    for option in OPTIONS:
        assert option.flag in done.stdout
    assert "examples:" in done.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("tinyoai ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prot", "8000"], "--prot"),
        (["--port"], "--port"),
        (["--port", "x"], "whole number"),
        (["--port", "70000"], "between"),
        (["--engine", "vllm"], "auto, ctransformers, llamacpp, fake"),
        (["--chat-template", "x"], "--chat-template: 'x' is not one of auto, chatml, zephyr"),
        (["--chat-template", "/"], "'/' is not a file"),
        (["--chat-template", "/dev/null"], "is not a file"),
        (["--parallel", "-1"], "between"),
        (["--no-mmap=1"], "--no-mmap takes no value (see"),
        (["--parallel", "1.5"], "whole number"),
        (["--grace", "nan"], "between"),
        (["--log-level", "loud"], "debug"),
        (["bake"], "bake"),
        (["model.gguf"], "--model FILE"),
        (["-p", "8000"], "-p"),
        (["--api-key", ""], "--api-key: the value is empty"),
        (["--cors-origin", "app.example"], "https://app.example"),
        (["--host", "no such host"], "--host"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags: list[str], words: str) -> None:
    assert words in one_clear_line(run(*flags), 2)


def test_the_error_names_a_wrong_variable() -> None:
    line = one_clear_line(run(env=environment(TINYOAI_PORT="x")), 2)
    assert "TINYOAI_PORT" in line


def test_template_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    for content, words, code in (
        (b"\xff", "is not UTF-8", 2),
        (b" ", "is empty", 2),
        (b"x" * (256 << 10) + b"x", "has more than 262144 bytes", 2),
        (b"{% if %}", "the chat template is not valid", 1),
        (b"{{ ''.__class__.__mro__ }}", "does what it may not", 1),
    ):
        file.write_bytes(content)
        assert words in one_clear_line(run("--engine", "fake", "--chat-template", str(file)), code)


def test_a_missing_model_file(tmp_path: Path) -> None:
    assert "none.gguf" in one_clear_line(run("--port", "0", "--model", str(tmp_path / "none.gguf")), 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.gguf", b""),
        ("text.gguf", b"this is no model\n" * 100),
        ("zeros.gguf", bytes(5000)),
        ("model.safetensors", (64).to_bytes(8, "little") + b'{"a": {}}' + bytes(64)),
        ("pickle.bin", b"PK\x03\x04" + bytes(100)),
        ("short.gguf", b"GGUF\x03\0\0\0" + bytes(16)),
    ],
)
def test_a_file_that_is_not_a_model(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert name in one_clear_line(run("--port", "0", "--model", str(path)), 1)


def test_a_directory_is_not_a_model(tmp_path: Path) -> None:
    assert "directory" in one_clear_line(run("--port", "0", "--model", str(tmp_path)), 1)


def test_a_truncated_model_is_an_error(tmp_path: Path) -> None:
    whole = BUILTIN.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: len(whole) // 2])
    line = one_clear_line(run("--port", "0", "--model", str(path)), 1)
    assert "cut.gguf" in line


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = one_clear_line(run("--port", str(taken.getsockname()[1]), "--engine", "fake"), 1)
    assert "--port" in line


def test_an_unreadable_model_file_is_an_error(tmp_path: Path) -> None:
    assert "cannot read the model file" in one_clear_line(
        run("--port", "0", "--model", str(tmp_path / "a" / "b")), 1
    )


def test_the_banner_describes_the_model(builtin: Server) -> None:
    banner = builtin.banner
    for words in (builtin.url, "tinyoai-chat", "Q8_0", "llama", "MB", "tokens", "ctransformers", "curl -N"):
        assert words in banner


def test_the_curl_line_of_the_banner_works(builtin: Server) -> None:
    line = next(line for line in builtin.banner.splitlines() if "curl -N" in line)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True)
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "Paris" in "".join(pieces)


def test_environment_variables_configure_a_server() -> None:
    env = environment(TINYOAI_ENGINE="fake", TINYOAI_MODEL_NAME="my/own model")
    with serve(env=env) as server:
        assert server.model == "my/own model"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_finish_after_a_signal(number: signal.Signals) -> None:
    with serve("--engine", "fake") as server:
        replies = []
        script = '!{"text": "x", "repeat": 500, "step_ms": 2}'
        thread = threading.Thread(target=lambda: replies.append(server.chat(script)))
        thread.start()
        time.sleep(0.5)
        server.process.send_signal(number)
        time.sleep(0.2)
        with pytest.raises(OSError):  # the server no longer accepts connections
            server.connect()
        assert server.process.wait(20) == 0
        thread.join()
        assert replies[0].json["choices"][0]["message"]["content"] == "x" * 500


def test_a_second_signal_stops_at_once() -> None:
    with serve("--engine", "fake") as server:
        workers = server.workers
        script = '!{"text": "x", "repeat": 3000, "step_ms": 10}'
        replies: list[str] = []

        def ask() -> None:
            try:
                replies.append(repr(server.chat(script, stream=True).events[-1]))
            except (OSError, AssertionError, ValueError) as error:
                replies.append(repr(error))

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 1
        thread.join(10)
        assert "error" in replies[0]
        assert time.monotonic() - started < 15  # well below the grace time
        for pid in workers:
            assert not Path(f"/proc/{pid}").exists()


def test_parallel_1_runs_one_request_at_a_time() -> None:
    with serve("--engine", "fake", "--parallel", "1") as server:
        assert "1 request at a time" in server.banner


def test_an_idle_connection_does_not_delay_the_stop() -> None:
    with serve("--engine", "fake") as server, server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200" in sock.recv(4096)
        assert server.stop() == 0


def test_a_killed_server_leaves_no_worker() -> None:
    with serve("--engine", "fake") as server:
        workers = server.workers
        assert workers
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived its server"
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "fake", "--host", "0.0.0.0"], "requires no API key"),
        (["--ctx-size", "8000"], "a context of 8000 tokens is longer than the 1024"),
    ],
)
def test_warnings(flags: list[str], words: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyoai", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert words in process.stderr.readline()
    finally:
        process.kill()
        process.communicate()


def test_files_in_the_current_folder_do_not_shadow_modules(tmp_path: Path) -> None:
    for name in ("queue.py", "signal.py", "resource.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tinyoai", "--engine", "fake", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    try:
        assert process.stdout is not None
        assert "is ready" in process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def test_the_worker_starts_before_the_server_is_imported() -> None:
    program = (
        "import sys; from tinyoai.models import spawn\n"
        "def stop(): print({'asyncio', 'uvloop', 'h11', 'tinyoai.app'} & set(sys.modules)); sys.exit()\n"
        "spawn.spawn_worker = stop\n"
        "from tinyoai.cli.main import main; main(['--engine', 'fake', '--port', '0'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "flags", [["--model", "/none.gguf"], ["--cors-origin", "nonsense"], ["--host", "no such host"]], ids=str
)
def test_a_server_that_cannot_start_ends_its_worker(flags: list[str]) -> None:
    program = (
        "import os; from tinyoai.models import spawn; start, pids = spawn.spawn_worker, []\n"
        "def started():\n"
        "    worker = start(); pids.append(worker.process.pid); return worker\n"
        "spawn.spawn_worker = started\n"
        f"from tinyoai.cli.main import main; main({['--port', '0', *flags]!r})\n"
        "print(len(pids), [pid for pid in pids if os.path.exists(f'/proc/{pid}')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "1 []\n"


def test_a_model_that_is_ready_before_the_api_waits_for_it() -> None:
    program = (
        "import sys, time; from tinyoai import app\n"
        "real = app._App._build_api\n"
        "app._App._build_api = lambda self: (time.sleep(0.5), real(self))[1]\n"
        "from tinyoai.cli.main import main; sys.exit(main(['--engine', 'fake', '--port', '0']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "is ready" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "origin",
    ["chrome-extension://abcdef", "moz-extension://1-2", "vscode-webview://x", "app://obsidian.md", "*"],
)
def test_origins_of_extensions_and_apps_are_accepted(origin: str) -> None:
    with serve("--engine", "fake", "--cors-origin", origin) as server:
        reply = server.request("GET", "/v1/models", headers={"Origin": origin})
        assert reply.headers["access-control-allow-origin"] == origin


def test_a_quantized_cache_of_values_needs_flash_attention() -> None:
    done = run("--cache-type-v", "q8_0", "--flash-attn", "off")
    assert done.returncode == 2
    assert done.stderr == (
        "tinyoai: --cache-type-v: q8_0 needs flash attention; turn it on with --flash-attn auto, or choose f16\n"
    )


def test_a_file_that_cannot_be_loaded_is_named_by_its_path(tmp_path: Path) -> None:
    path = make.llama(tmp_path / "infinite.gguf")
    header = gguf.read_header(path)
    content = bytearray(path.read_bytes())
    at = header.data_at + header.tensors["output_norm.weight"].offset
    content[at : at + 256] = struct.pack("<f", float("nan")) * 64
    path.write_bytes(content)
    done = run("--engine", "ctransformers", "--model", str(path), "--port", "0")
    assert done.returncode == 1
    assert done.stderr.count(f"tinyoai: {path} is damaged: it computes nonsense") == 1
