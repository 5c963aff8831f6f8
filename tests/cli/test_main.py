"""The `tinyoai` command: help, wrong commands, and what is not imported."""

import subprocess
import sys

import pytest

from tests.cli.commands import Place, refused
from tests.serving import command


@pytest.mark.parametrize(
    "words",
    [["status"], ["get"], ["set"], ["unset"], ["agent", "start"], ["agent", "stop"], ["agent", "restart"],
     ["agent", "status"], ["agent", "logs"]],
    ids=" ".join,
)  # fmt: skip
def test_every_command_has_help_with_examples(words: list[str], place: Place) -> None:
    done = place.run(*words, "--help")
    assert done.returncode == 0
    assert f"usage: tinyoai {' '.join(words)}" in done.stdout
    assert f"  tinyoai {' '.join(words)}" in done.stdout.split("examples:")[1]


def test_the_help_names_every_command(place: Place) -> None:
    text = place.run("--help").stdout
    for word in ("serve", "status", "agent start", "get", "set", "unset"):
        assert f"  {word}" in text or f" {word}" in text.split("commands")[1]
    assert place.run("serve", "--help").stdout == text
    text = place.run("agent", "--help").stdout
    for word in ("start", "stop", "restart", "status", "logs"):
        assert f"\n  {word} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["statsu"], "did you mean status?"),
        (["agent"], "missing action: start, stop, restart, status or logs"),
        (["agent", "strat"], "did you mean start?"),
        (["agent", "start", "--prot", "1"], "did you mean --port?"),
        (["agent", "logs", "-n", "-1"], "0 or more"),
        (["agent", "logs", "-x"], "unknown flag -x"),
        (["status", "--jsno"], "did you mean --json?"),
        (["status", "now"], "unrecognized arguments: now"),
        (["get", "http.prot"], "did you mean http.port?"),
        (["unset", "http.prot"], "did you mean http.port?"),
        (["set"], "key=value"),
        (["--port", "0", "status"], "status comes first"),
    ],
)
def test_a_wrong_command_prints_one_line_and_exits_with_2(
    words: list[str], message: str, place: Place
) -> None:
    done = place.run(*words)
    assert message in refused(done, 2)
    assert done.stdout == ""


def test_a_closed_pipe_causes_no_traceback(place: Place) -> None:
    line = " ".join([*command("get"), "| head -c 1; exit ${PIPESTATUS[0]}"])
    done = subprocess.run(
        ["bash", "-c", line], env=place.env(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["status"], ["agent", "status"], ["agent", "stop"], ["get"]], ids=" ".join)
def test_other_commands_do_not_import_the_server(words: list[str], place: Place) -> None:
    program = (
        "import sys; from tinyoai.cli.main import main; main(sys.argv[1:]);"
        "print({'uvloop', 'tinyoai.app', 'tinyoai.web', 'asyncio'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=place.env(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "set()"
