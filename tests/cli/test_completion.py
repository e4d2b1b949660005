"""`cmmasksd completion`: scripts that the shells accept."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cli.commands import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("predict", "evaluate", "--threshold" if shell != "tcsh" else "threshold"))
    (tmp_path / "script").write_text(script)
    if shutil.which(shell) is None or shell == "tcsh":
        return
    subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)
    if shell == "bash":
        ask = f"""source {tmp_path / "script"}
for line in 'pre' 'predict --t' 'compare --unit i'; do
    COMP_WORDS=(cmmasksd $line); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
    _shtab_cmmasksd; echo ${{COMPREPLY[@]}}
done"""
        told = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, timeout=60).stdout
        assert told.splitlines() == ["predict", "--text --texts --threshold", "image"]


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main("completion", "bash") == 2
    assert "pip install 'cmmasksd[completion]'" in capsys.readouterr().err
