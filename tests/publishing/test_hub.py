"""Publishing and fetching models: a local folder, and a hub of our own on loopback that the real client talks to."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from cmmasksd import cli
from cmmasksd.errors import UserError
from cmmasksd.model.locating import REQUIRED
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.publishing.hub import push_to_hub

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The few endpoints of a hub that a push and a download use. Every file is small enough to lie in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.requested: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore

    def log_message(self, *args: object) -> None:
        pass

    def respond(self, value: object = None, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.requested.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.respond({"error": "no"}, 401)
        if self.path == "/api/repos/create":
            if self.server.private is None:
                self.server.private = json.loads(body).get("visibility") == "private"
            return self.respond({"url": f"{self.server.url}/someone/model"})
        if self.path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.respond({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.respond({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.respond({"commitUrl": f"{self.server.url}/someone/model/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        files, path = self.server.files, self.path.split("?")[0]
        if not path.startswith(("/api/models/someone/model", "/someone/model/resolve")):
            return self.respond({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            sums = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
            return self.respond([{"type": "file", "path": n, "size": len(files[n]), "oid": sums[n]} for n in files])
        if path.startswith("/api/"):
            return self.respond({"id": "someone/model", "sha": COMMIT, "private": self.server.private})
        name = path.split("/", 5)[-1]
        if name not in files:
            return self.respond({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        return self.respond(body=files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')

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


def push(*arguments: object) -> int:
    return cli.main(["push", *map(str, arguments)])


def same_logits(a: CMMaskSDModel, b: CMMaskSDModel) -> bool:
    pixels, ids = torch.rand(1, 3, 32, 32), torch.tensor([[512, 3, 4, 513]])
    words = torch.tensor([[-1, 0, 1, -1]])
    with torch.no_grad():
        both = [model(pixels, ids, torch.ones_like(ids), words).logits for model in (a, b)]
    return torch.allclose(*both, atol=1e-4)


PUBLISHED = {*REQUIRED, "config.yaml", "README.md"}


def test_a_local_folder(trained: Path, scored: Path, tmp_path: Path):
    out = tmp_path / "look" / "cats"
    for _ in range(2):  # the second replaces the first
        assert push("--model", trained, "--to", out, "--results", scored, "--license", "cc-by-4.0") == 0
    assert {file.name for file in out.iterdir()} == PUBLISHED
    assert [path.name for path in out.parent.iterdir()] == ["cats"]
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["data"]["root"] == "refer"
    assert settings["training"] == {"out": "a"}
    assert same_logits(CMMaskSDModel.from_pretrained(out), CMMaskSDModel.from_pretrained(trained))
    (out / "notes.txt").write_text("do not lose me")
    assert push("--model", trained, "--to", out) == 2
    assert (out / "notes.txt").exists()


def test_to_the_hub_and_back(trained: Path, scored: Path, net: Hub, capsys: pytest.CaptureFixture[str]):
    assert push("--model", trained, "--to", "someone/model", "--results", scored, "--private") == 0
    assert capsys.readouterr().out == f"{net.url}/someone/model\n"
    assert net.private is True
    assert net.files.keys() == PUBLISHED
    net.files |= {"modeling_evil.py": b"raise SystemExit", "state.pt": b"pickle"}
    net.requested.clear()
    model, processor = (kind.from_pretrained("someone/model") for kind in (CMMaskSDModel, CMMaskSDProcessor))
    assert same_logits(model, CMMaskSDModel.from_pretrained(trained))
    assert processor.size == (32, 32)
    fetched = {path.split("/")[-1] for path in net.requested if "/resolve/" in path}
    assert fetched == PUBLISHED - {"README.md"}


def test_a_model_in_memory(tiny_model: CMMaskSDModel, tiny_processor: CMMaskSDProcessor, net: Hub):
    assert push_to_hub(tiny_model, tiny_processor, "someone/model") == f"{net.url}/someone/model"
    assert net.files.keys() == PUBLISHED - {"config.yaml"}
    assert same_logits(CMMaskSDModel.from_pretrained("someone/model"), tiny_model)
    with pytest.raises(UserError, match=r"cmmasksd\.push_to_hub"):  # transformers' own would leave out the processor
        tiny_model.push_to_hub("someone/other")


def test_a_card_of_the_users_own(trained: Path, net: Hub, tmp_path: Path):
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
    arguments, message = ["--model", trained, "--to", "someone/model"], ""
    if case == "public":
        net.private, message = False, "exists and is public"
        arguments.append("--private")
    elif case == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
        message = "hf auth login"
    elif case == "folder":
        arguments[-1], message = "runs/new", "./runs/new"
    elif case == "foreign":
        with (trained / "model.safetensors").open("ab") as file:
            file.write(b" ")
        arguments += ["--results", scored]
        message = "does not hold scores of"
    elif case == "lacking":
        (trained / "tokenizer.json").unlink()
        message = "lacks tokenizer.json"
    elif case == "own":
        for name in ("state.pt", "secrets.env", "modeling_evil.py"):
            (trained / name).unlink()
        arguments[-1], message = trained, "own folder"
    else:
        arguments[1:2], message = ["nobody/nothing"], "nobody/nothing"
    assert push(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not net.files
    assert (trained / "model.safetensors").exists()
