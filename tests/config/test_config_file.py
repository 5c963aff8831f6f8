"""The configuration file: writes are atomic, and secrets are masked."""

import resource
import subprocess
import sys
from pathlib import Path

from tests.serving import environment
from tinyoai.config import config_file


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model.parallel": 2}')
    pairs = ["model.name=" + "x" * 5000]
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}));"
        f"from pathlib import Path; from tinyoai.config import config_file;"
        f"config_file.set_values(Path({str(tmp_path)!r}), {pairs!r}, lambda config: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert f"cannot write {tmp_path}/config.json: File too large" in done.stderr
    assert (tmp_path / "config.json").read_text() == '{"model.parallel": 2}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "config.lock"]


def test_short_secrets_are_masked_completely() -> None:
    assert config_file.mask("secret") == "********"
    assert config_file.mask("sk-0123456789abcdefghij") == "sk-0********"
