"""The pages and the README say what is true: links lead somewhere, Python runs, commands are commands.

What is done with each code block: Python is run, all blocks of a page in one namespace and one folder, unless the line
above the fence is `<!-- not run: reason -->`. A block with `title="file"` is written to that file first. Of shell
blocks every `cmmasksd …` is parsed by the real parser (not run), every `make …` must be a target, every script there.
"""

import json
import re
import runpy
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmmasksd import cli
from cmmasksd.assets import located
from cmmasksd.data.examples import write_examples

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted(set(DOCS.glob("*.md")) - {DOCS / "api.md"}),
]
FENCE = re.compile(r"^(?P<above>[^\n]*)\n+```(?P<language>\w*)(?P<title>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> Iterator[re.Match[str]]:
    return (found for found in FENCE.finditer(text_of(page)) if found["language"] in languages)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """As Python-Markdown and GitHub make them of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S), re.M):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain)).strip("-"))
    return found


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path):
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target == DOCS / "api.md":  # made by `make docs`
            continue
        assert target.exists(), f"{link} in {page.name}"
        assert page.parent != DOCS or DOCS in target.parents, f"{link} in {page.name} leaves the site"
        if anchor:
            assert anchor in anchors(target), f"{link} in {page.name}"


def test_the_site_has_every_page():
    def pages(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]  # pyright: ignore

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert set(listed) == {page.name for page in DOCS.glob("*.md")} | {"api.md", "ablation.md"}
    assert len(set(listed)) == len(listed)


def test_the_reference_knows_what_is_called():
    made = runpy.run_path(str(DOCS / "make_api.py"))["api"]()
    for part in (
        "#### BaseSegmenter.segment",
        "#### Segmenter.from_pretrained",
        "#### push_to_hub",
        "**Raises**",
        "- `threshold`: ",
        "## Data",
    ):
        assert part in made
    assert made.count("```") % 2 == 0


def test_the_times_of_a_step_are_the_measured_ones():
    file = ROOT / "benchmarks" / "ablation" / "results" / "step.json"
    arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
    page = text_of(DOCS / "performance.md")
    for name, arm in arms.items():
        flops = arm["tflop"] / arms["none"]["tflop"]
        assert name == "none" or f"| {name} | {arm['ratio']:.2f} | {flops:.2f} |" in page, name


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=named)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def draw(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (180, 240, 3), dtype=np.uint8)).save(path)

    draw(Path("image.jpg"))
    draw(Path("photo.jpg"))
    write_examples(Path("."))
    # what a page may use without making it: a network of the reader's, a model's folder
    namespace: dict[str, object] = {"network": tiny_model, "scenes": located("scenes"), "__name__": "__page__"}
    for found in FENCE.finditer(text_of(page)):
        if title := re.search(r'title="([^"]+)"', found["title"]):
            Path(title[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(title[1]).write_text(found["code"], encoding="utf-8")
            for image in re.findall(r'"image": "([^"]+)"', found["code"]):
                draw(Path(title[1]).parent / image)
        elif found["language"] == "python" and not found["above"].startswith("<!-- not run: "):
            line = text_of(page)[: found.start("code")].count("\n")
            exec(compile("\n" * line + found["code"], page.name, "exec"), namespace)


def commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a shell block as lists of words; the brackets around what is optional are dropped."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.shlex(re.sub(r" \[(--[^\]]*)\]", r" \1", line), posix=True, punctuation_chars="|&;<>")
        words.whitespace_split, words.commenters = True, "#"
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|&;<>"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def test_commands():
    block = "FOO=1 a 'b c' && d | e # no\nf \\\n g [--h 1]  # no\n"
    assert list(commands(block)) == [["FOO=1", "a", "b c"], ["d"], ["e"], ["f", "g", "--h", "1"]]


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "bash"))], ids=named)
def test_commands_are_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for found in FENCE.finditer(text_of(page)):
        if title := re.search(r'title="([^"/]+\.yaml)"', found["title"]):
            Path(title[1]).write_text(found["code"], encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for block in blocks(page, "bash"):
        for words in commands(block["code"]):
            while "=" in words[0]:
                words = words[1:]
            if words[:3] == ["accelerate", "launch", "-m"]:
                words = words[words.index("-m") + 1 :]
            if words[0] == "torchrun":
                words = words[words.index("-m") + 1 :]
            program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
            if program == "cmmasksd":
                try:
                    cli.build_parser().parse_args(rest)
                except SystemExit:  # --help, --version
                    pass
                except Exception as error:
                    pytest.fail(f"{page.name}: {' '.join(words)}: {error}")
            elif program == "make":
                assert set(rest) <= targets, words
            elif program == "python" and rest[0] != "-m":
                assert (ROOT / rest[0]).is_file(), words
            else:
                assert program in ("python", "pip", "npm", "docker", "curl"), words
