"""What is installed: the wheel's contents, one version, text files that read the same on every system, and (slow) the
wheel in an empty environment.
"""

import ast
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import cmmasksd
from cmmasksd import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "cmmasksd"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/cmmasksd"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of files to compare with")
    ours = {name.removeprefix("src/") for name in listed.stdout.split() if (ROOT / name).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
        meta = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == ours
    assert {"cmmasksd/py.typed", "cmmasksd/assets/scenes-model/model.safetensors"} <= ours
    assert "cmmasksd/configs/refcoco-vit-b16.yaml" in ours
    assert f"{info}/licenses/LICENSE" in names
    assert "cmmasksd = cmmasksd.cli:main" in commands
    assert (meta["Version"], meta["License-Expression"]) == (cmmasksd.__version__, "MIT")
    assert wheel.stat().st_size < 40e6  # PyPI takes 100 MB


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["cmmasksd", cmmasksd.__version__]
    assert f"## [{cmmasksd.__version__.split('.dev')[0]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_text_files_name_their_encoding(file: Path):
    """Else Windows reads and writes its own code page."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [part.value for part in [*node.args, *(key.value for key in node.keywords)] if _is_mode(part)]
        opens_text = name == "open" and isinstance(node.func, ast.Attribute) and modes and "b" not in modes[0]
        if (name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)) or opens_text:
            assert any(key.arg == "encoding" for key in node.keywords), f"{file}:{node.lineno}"


def _is_mode(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 4


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path):
    """`pip install` and `predict` with the shipped model, from a folder that knows nothing of the source."""
    home = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=300)
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", wheel], check=True, timeout=3000)
    draw = "from PIL import Image; Image.new('RGB', (90, 60), 'red').save('picture.png')"
    subprocess.run([programs / "python", "-c", draw], cwd=tmp_path, check=True, timeout=300)
    command = [programs / "cmmasksd", "predict", "--model", "scenes", "--image", "picture.png", "--text", "red square"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*command, "--out", "out"], cwd=tmp_path, env=clean | {"HF_HUB_OFFLINE": "1"}, text=True, capture_output=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 2
    command = [programs / "cmmasksd", "train", "--config", "refcoco-vit-b16", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, env=clean, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "name: refcoco\n" in done.stdout


def test_no_test_can_hang_the_run(pytestconfig: pytest.Config):
    assert float(pytestconfig.getini("timeout")) > 0


def test_actions_and_the_base_image_are_pinned_by_digest():
    workflows = [file.read_text(encoding="utf-8") for file in (ROOT / ".github" / "workflows").glob("*.yml")]
    actions = [line.split("uses:")[1].strip() for text in workflows for line in text.splitlines() if "uses:" in line]
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}  # v[\d.]+", action)] == []
    images = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert images
    assert [image for image in images if not re.fullmatch(r"python:3\.11-slim@sha256:[0-9a-f]{64}", image)] == []
