"""Publishing and fetching models: a local folder, and a hub of our own on loopback that the real client talks to."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from cmmasksd import cli
from cmmasksd.errors import UserError
from cmmasksd.evaluation.protocols import ORIGINAL
from cmmasksd.evaluation.results import ExpressionScore, SplitScores, write_results
from cmmasksd.model.locating import REQUIRED, is_hub_id, model_folder, weights_digest
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.publishing.card import model_card
from cmmasksd.publishing.hub import push_to_hub

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The few endpoints of a hub that a push and a download use. Every file is small enough to lie in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, value: object = None, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer({"error": "no"}, 401)
        if self.path == "/api/repos/create":
            if self.server.private is None:
                self.server.private = json.loads(sent).get("visibility") == "private"
            return self.answer({"url": f"{self.server.url}/someone/model"})
        if self.path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(sent)["content"].split("---")[1])
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            return self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        assert "/commit/" in self.path
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.url}/someone/model/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        files, path = self.server.files, self.path.split("?")[0]
        if not path.startswith(("/api/models/someone/model", "/someone/model/resolve")):
            return self.answer({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            sums = {name: hashlib.sha1(held).hexdigest() for name, held in files.items()}
            return self.answer([{"type": "file", "path": n, "size": len(files[n]), "oid": sums[n]} for n in files])
        if path.startswith("/api/"):
            return self.answer({"id": "someone/model", "sha": COMMIT, "private": self.server.private})
        name = path.split("/", 5)[-1]
        if name not in files:
            return self.answer({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        return self.answer(body=files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub sees; no other can be reached."""
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[-1]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        yield server
        server.shutdown()


@pytest.fixture
def trained(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A folder as training leaves it in `last`, with settings that name folders of the machine."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "runs" / "best")
    settings = {"data": {"name": "refcoco", "root": "/home/me/refer"}, "training": {"out": "C:\\runs\\a"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for name in ("state.pt", "secrets.env", "modeling_evil.py"):
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def scored(trained: Path, tmp_path: Path) -> Path:
    """Results of that model."""
    counts = [(80, 100), (10, 40), (3, 4)]
    rows = [ExpressionScore(1, 1, n, "a cat", i, u, u, ORIGINAL.iou(i, u)) for n, (i, u) in enumerate(counts)]
    extra = {"data": "refcoco", "weights": weights_digest(trained)}
    write_results(tmp_path / "val", SplitScores("val", rows, ORIGINAL, extra))
    return tmp_path / "val"


def push(*arguments: object) -> int:
    return cli.main(["push", *map(str, arguments)])


def same_answers(one: CMMaskSDModel, other: CMMaskSDModel) -> bool:
    pixels, ids = torch.rand(1, 3, 32, 32), torch.tensor([[512, 3, 4, 513]])
    words = torch.tensor([[-1, 0, 1, -1]])
    with torch.no_grad():
        both = [model(pixels, ids, torch.ones_like(ids), words).logits for model in (one, other)]
    return torch.allclose(*both, atol=1e-4)


PUBLISHED = {*REQUIRED, "config.yaml", "README.md"}


def test_a_folder_to_look_at(trained: Path, scored: Path, tmp_path: Path):
    out = tmp_path / "look" / "cats"
    for _ in range(2):  # the second replaces the first
        assert push("--model", trained, "--to", out, "--results", scored, "--license", "cc-by-4.0") == 0
    assert {file.name for file in out.iterdir()} == PUBLISHED
    assert [path.name for path in out.parent.iterdir()] == ["cats"]
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert yaml.safe_load((out / "config.yaml").read_text()) == {
        "data": {"name": "refcoco", "root": "refer"},
        "training": {"out": "a"},
    }
    assert same_answers(CMMaskSDModel.from_pretrained(out), CMMaskSDModel.from_pretrained(trained))
    (out / "notes.txt").write_text("do not lose me")
    assert push("--model", trained, "--to", out) == 2
    assert (out / "notes.txt").exists()


def test_the_card_is_one_that_the_hub_reads(trained: Path, scored: Path, tmp_path: Path):
    from huggingface_hub import ModelCard

    assert push("--model", trained, "--to", tmp_path / "cats", "--results", scored) == 0
    card = ModelCard.load(tmp_path / "cats" / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "cmmasksd", "image-segmentation")
    found = {one.metric_type: one for one in data.eval_results}
    assert found["oIoU"].metric_value == pytest.approx(100 * 93 / 144, abs=0.005)
    assert found["mIoU"].metric_value == pytest.approx(100 * (0.8 + 0.25 + 0.75) / 3, abs=0.005)
    assert found["P@0.7"].metric_value == pytest.approx(66.67)
    assert (found["oIoU"].dataset_name, found["oIoU"].dataset_split) == ("refcoco val", "val")
    assert found["oIoU"].dataset_args["threshold"] == 0.5
    assert "| refcoco | val | 3 | 64.58 | 60.00 | 66.67 |" in card.text
    assert "comparison `>=`" in card.text
    assert 'Segmenter.from_pretrained("cats")' in card.text
    weights = sum(p.numel() for p in CMMaskSDModel.from_pretrained(trained).parameters())
    assert f"| weights | {weights / 1e6:.1f} M, F32 |" in card.text


def test_a_card_without_scores_or_settings(tiny_model_folder: Path):
    card = model_card(tiny_model_folder, "x")
    assert "None were given" in card
    assert "model-index" not in card
    assert "does not record" in card


def test_to_the_hub_and_back(trained: Path, scored: Path, net: Hub, capsys: pytest.CaptureFixture[str]):
    assert push("--model", trained, "--to", "someone/model", "--results", scored, "--private") == 0
    assert capsys.readouterr().out == f"{net.url}/someone/model\n"
    assert net.private is True
    assert net.files.keys() == PUBLISHED
    net.files |= {"modeling_evil.py": b"raise SystemExit", "state.pt": b"pickle"}
    net.asked.clear()
    model, processor = (kind.from_pretrained("someone/model") for kind in (CMMaskSDModel, CMMaskSDProcessor))
    assert same_answers(model, CMMaskSDModel.from_pretrained(trained))
    assert processor.size == (32, 32)
    fetched = {path.split("/")[-1] for path in net.asked if "/resolve/" in path}
    assert fetched == PUBLISHED - {"README.md"}


def test_a_model_in_memory(tiny_model: CMMaskSDModel, tiny_processor: CMMaskSDProcessor, net: Hub):
    assert push_to_hub(tiny_model, tiny_processor, "someone/model") == f"{net.url}/someone/model"
    assert net.files.keys() == PUBLISHED - {"config.yaml"}
    assert same_answers(CMMaskSDModel.from_pretrained("someone/model"), tiny_model)
    with pytest.raises(UserError, match=r"cmmasksd\.push_to_hub"):  # transformers' own would leave out the processor
        tiny_model.push_to_hub("someone/other")


def test_an_own_card(trained: Path, net: Hub, tmp_path: Path):
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\nä", encoding="utf-8")
    assert push("--model", trained, "--to", "someone/model", "--card", tmp_path / "mine.md") == 0
    assert net.files["README.md"].decode() == "---\nlicense: mit\n---\nä"


@pytest.mark.parametrize("case", ["public", "token", "folder", "foreign", "lacking", "own", "unknown"])
def test_mistakes(
    case: str,
    trained: Path,
    scored: Path,
    net: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    given, said = ["--model", trained, "--to", "someone/model"], ""
    if case == "public":
        net.private, said = False, "is public"
        given.append("--private")
    elif case == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
        said = "hf auth login"
    elif case == "folder":
        given[-1], said = "runs/new", "./runs/new"
    elif case == "foreign":
        with (trained / "model.safetensors").open("ab") as file:
            file.write(b" ")
        given += ["--results", scored]
        said = "does not hold scores of"
    elif case == "lacking":
        (trained / "tokenizer.json").unlink()
        said = "lacks tokenizer.json"
    elif case == "own":
        for name in ("state.pt", "secrets.env", "modeling_evil.py"):
            (trained / name).unlink()
        given[-1], said = trained, "own folder"
    else:
        given[1:2], said = ["nobody/nothing"], "nobody/nothing"
    assert push(*given) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not net.files
    assert (trained / "model.safetensors").exists()


def test_names():
    assert is_hub_id("someone/model")
    assert not any(map(is_hub_id, ("./model", "../a", "/a", "~/a", "C:/a", "a/b/c", "model")))
    with pytest.raises(UserError, match="no model folder a/b/c"):
        model_folder("a/b/c")


@pytest.mark.parametrize("name", ["CMMaskSDModel", "CMMaskSDProcessor", "CMMaskSDConfig"])
def test_auto_classes(name: str, trained: Path):
    """Any class of ours registers all of them; `import cmmasksd` by itself loads nothing."""
    code = f"""
import sys
import cmmasksd
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
from transformers import AutoConfig, AutoModel, AutoProcessor
from cmmasksd import {name}
kinds = [auto.from_pretrained({str(trained)!r}) for auto in (AutoProcessor, AutoConfig, AutoModel)]
assert [type(one) for one in kinds] == [cmmasksd.CMMaskSDProcessor, cmmasksd.CMMaskSDConfig, cmmasksd.CMMaskSDModel]
assert isinstance(AutoModel.from_config(kinds[1]), cmmasksd.CMMaskSDModel)
assert isinstance(AutoConfig.for_model("cmmasksd", decoder_width=64), cmmasksd.CMMaskSDConfig)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
