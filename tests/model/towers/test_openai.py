"""Checkpoints of OpenAI and open_clip: the converted CLIP computes what theirs does, and bad files give one line."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from cmmasksd.errors import UserError
from cmmasksd.model.converting import convert
from cmmasksd.model.loading import load_backbone, load_clip, read_checkpoint
from cmmasksd.model.locating import model_folder
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.pixels import CLIP_MEAN
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import tokenize
from cmmasksd.model.torchscript import read_torchscript
from cmmasksd.model.towers.families import FAMILIES
from conftest import TINY_CONTEXT
from model.towers.openai_clip import OpenAIClip

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; OpenAI's files are in it

KINDS = ("archive.pt", "openai.pt", "open_clip.safetensors", "open_clip.bin", "run.pt")


TOWERS = pytest.mark.parametrize("resnet", [False, True], ids=["vit", "resnet"])


def network(tokenizer, quick_gelu: bool, resnet: bool = False) -> OpenAIClip:
    return OpenAIClip(len(tokenizer), TINY_CONTEXT, quick_gelu, resnet)


def save(clip: OpenAIClip, file: Path) -> Path:
    match file.name:
        case "archive.pt":
            clip.save_archive(str(file))
        case "openai.pt":
            torch.save(clip.state_dict(), file)
        case "run.pt":  # open_clip's training writes more than weights, and DDP's prefix
            weights = {f"module.{name}": value for name, value in clip.weights().items()}
            torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {"state": {}}}, file)
        case _ if file.suffix == ".safetensors":
            save_file(dict(clip.weights()), file)
        case _:
            torch.save(dict(clip.weights()), file)
    return file


@pytest.fixture
def folder(tmp_path, tiny_tokenizer) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def assert_same(clip, theirs: OpenAIClip, tokenizer) -> None:
    towers = FAMILIES[clip.config.model_type].towers(clip.eval())
    pixels = torch.randn(2, 3, theirs.size, theirs.size)
    tokens = tokenize(tokenizer, ["the red square on the left", "a zebra"])
    ids = torch.zeros(2, TINY_CONTEXT, dtype=torch.long)
    ids[:, : tokens.input_ids.shape[1]] = tokens.input_ids * tokens.attention_mask
    with torch.no_grad():
        image, text = theirs(pixels, ids)
        assert torch.allclose(towers.image(pixels)[1], image, atol=1e-5 * image.abs().max())
        assert torch.allclose(towers.text(tokens).sentence, text, atol=1e-5 * text.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_a_resnet(kind, folder, tiny_tokenizer):
    quick_gelu = kind in ("archive.pt", "openai.pt")
    theirs = network(tiny_tokenizer, quick_gelu, resnet=True)
    clip: Any = load_backbone(save(theirs, folder / kind))
    assert_same(clip, theirs, tiny_tokenizer)
    config = clip.config
    assert config.text_config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    assert (config.depths, config.width, config.image_size, config.num_attention_heads) == ([2, 1, 2, 3], 4, 96, 2)
    assert (config.projection_dim, config.text_config.num_hidden_layers) == (48, 2)
    assert clip.logit_scale.item() == 2.5
    with pytest.raises(UserError, match="is a CLIP with a ResNet: choose one with a ViT"):
        load_clip(folder / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, folder, tiny_tokenizer):
    quick_gelu = kind in ("archive.pt", "openai.pt")
    theirs = network(tiny_tokenizer, quick_gelu)
    clip = load_clip(save(theirs, folder / kind))
    assert_same(clip, theirs, tiny_tokenizer)
    config = clip.config
    assert config.vision_config.hidden_act == config.text_config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (3, 2)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (32, 8)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (2, 1)
    assert (config.projection_dim, config.text_config.max_position_embeddings) == (48, TINY_CONTEXT)
    assert clip.logit_scale.item() == 2.5


def test_the_other_activation_would_show(folder, tiny_tokenizer):
    clip = load_clip(save(network(tiny_tokenizer, True), folder / "open_clip.bin"))
    with pytest.raises(AssertionError):
        assert_same(clip, network(tiny_tokenizer, True), tiny_tokenizer)


@TOWERS
def test_half_precision(resnet, folder, tiny_tokenizer):
    """OpenAI's archives hold half precision; ours are read into float32."""
    theirs = network(tiny_tokenizer, True, resnet)
    file = folder / "archive.pt"
    theirs.half()
    torch.jit.script(Holder(theirs)).save(str(file))
    clip = load_backbone(file)
    assert clip.dtype == torch.float32
    assert_same(clip, theirs.float(), tiny_tokenizer)


class Holder(torch.nn.Module):
    """The weights of a network under the same names; it computes nothing, for half precision may not run on a CPU."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, Holder(child))
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32-quickgelu-a.pt", "quick_gelu"),
        ("ViT-B-32-openai.bin", "quick_gelu"),
        ("MetaCLIP-b.pt", "quick_gelu"),
        ("b.pt", "gelu"),
    ],
)
def test_names_say_the_activation(name, expected, folder, tiny_tokenizer):
    file = folder / name
    torch.save(dict(network(tiny_tokenizer, True).weights()), file)
    assert read_checkpoint(file)[0].text_config.hidden_act == expected
    assert read_checkpoint(file, quick_gelu=True)[0].text_config.hidden_act == "quick_gelu"


SETTINGS = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": TINY_CONTEXT, "width": 64, "heads": 4, "layers": 2},
}


def test_open_clip_config(folder, tiny_tokenizer):
    """It says what the shapes do not: heads, activation, mean and deviation."""
    file = save(network(tiny_tokenizer, True), folder / "open_clip_model.safetensors")
    content = {"model_cfg": SETTINGS, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    config = load_clip(file).config
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (4, 4)
    assert config.vision_config.hidden_act == "quick_gelu"
    processor = CMMaskSDProcessor.from_backbone(file, (32, 32), patch_size=8, resize="warp", max_tokens=99)
    assert (processor.mean, processor.max_tokens) == ((0.5, 0.4, 0.3), TINY_CONTEXT)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"embed_dim": 512}, "belong to different models"),
        ({"vision_cfg": {"layers": 12}}, "belong to different models"),
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name, which transformers' CLIP lacks"),
        ({"text_cfg": {"hf_model_name": "xlm-roberta-base"}}, "hf_model_name"),
        ({"vision_cfg": {"head_width": 0}}, "head_width is 0"),
        ({"text_cfg": {"heads": "a"}}, "heads is 'a'"),
        ({"text_cfg": {"heads": 7}}, "cannot be split among 7 heads"),
        ({"vision_cfg": [1]}, "expected an object"),
    ],
)
def test_spoilt_open_clip_config(change, error, folder, tiny_tokenizer):
    file = save(network(tiny_tokenizer, False), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": change}))
    with pytest.raises(UserError, match=error):
        load_clip(file)


def test_a_model_on_a_checkpoint(folder, tiny_tokenizer):
    file = save(network(tiny_tokenizer, True), folder / "archive.pt")
    model = CMMaskSDModel.from_backbone(file, decoder_width=32, decoder_layers=1, decoder_heads=2, head_width=16)
    processor = CMMaskSDProcessor.from_backbone(file, (32, 32), patch_size=8, resize="warp", max_tokens=20)
    assert processor.mean == pytest.approx(CLIP_MEAN)
    assert model.config.encoder.end_token == processor.tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    assert str(folder) not in (folder / "model" / "config.json").read_text()


@TOWERS
@pytest.mark.parametrize("kind", KINDS[:3])
def test_convert(kind, resnet, folder, tiny_tokenizer):
    theirs = network(tiny_tokenizer, kind != "open_clip.safetensors", resnet)
    out = folder / "out"
    convert(save(theirs, folder / kind), out)
    assert_same(load_backbone(out), theirs, tiny_tokenizer)
    processor = CMMaskSDProcessor.from_backbone(out, (32, 32), patch_size=16, resize="warp", max_tokens=20)
    assert processor.mean == pytest.approx(CLIP_MEAN)
    with pytest.raises(UserError, match="not an empty folder"):
        convert(folder / kind, out)


def test_without_a_tokenizer(tmp_path, tiny_tokenizer, tiny_clip_folder):
    file = save(network(tiny_tokenizer, True), tmp_path / "archive.pt")
    with pytest.raises(UserError, match=r"lacks tokenizer\.json: .*openai/clip-vit-base-patch32"):
        convert(file, tmp_path / "out")
    convert(file, tmp_path / "out", tokenizer=tiny_clip_folder)
    with pytest.raises(UserError, match="get the tokenizer of this model"):
        convert(file, tmp_path / "other", tokenizer="tiny")
    assert not (tmp_path / "other").exists()


def cached(repository: Path, files: Path, monkeypatch) -> None:
    """A repository in the hub's cache."""
    commit = "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(files, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(repository.parent))


@TOWERS
@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_the_hub(weights, resnet, folder, tiny_tokenizer, tmp_path_factory, monkeypatch):
    theirs = network(tiny_tokenizer, True, resnet)
    save(theirs, folder / weights)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 48, "quick_gelu": True}}))
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))  # as timm's
    cached(tmp_path_factory.mktemp("cache") / "models--someone--clip", folder, monkeypatch)
    assert_same(load_backbone("hf-hub:someone/clip"), theirs, tiny_tokenizer)
    CMMaskSDProcessor.from_backbone("hf-hub:someone/clip", (32, 32), patch_size=16, resize="warp", max_tokens=20)
    with pytest.raises(UserError, match="hf-hub:USER/NAME"):
        load_clip("someone/clip")
    with pytest.raises(UserError, match=r"--model\.backbone hf-hub:someone/clip"):
        model_folder("hf-hub:someone/clip")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:clip", "hf-hub:../a", "hf-hub:/a", "hf-hub:a/b/c"])
def test_bad_names(name):
    with pytest.raises(UserError, match="expected hf-hub:USER/NAME"):
        load_clip(name)


def test_a_checkpoint_in_place_of_a_model(folder, tiny_tokenizer):
    file = save(network(tiny_tokenizer, True), folder / "archive.pt")
    with pytest.raises(UserError, match=r"--model\.backbone .*cmmasksd convert"):
        model_folder(file)
    with pytest.raises(UserError, match="is not a checkpoint"):
        convert(folder, folder / "out")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda w: w | {"visual.layer1.0.conv1.weight": torch.ones(1)}, "has the shape"),
        (lambda w: w | {"visual.trunk.blocks.0": torch.ones(1)}, "no CLIP of OpenAI or open_clip has"),
        (lambda w: w | {"transformer.resblocks.0.ls_1.gamma": torch.ones(1)}, "no CLIP of OpenAI or open_clip has"),
        (lambda w: {k: v for k, v in w.items() if k != "visual.conv1.weight"}, "is missing"),
        (lambda w: {k: v for k, v in w.items() if k != "ln_final.bias"}, "missing"),
        (lambda w: w | {"visual.conv1.weight": torch.ones(3)}, "has the shape"),
        (lambda w: w | {"visual.positional_embedding": torch.ones(16, 128)}, "not a square"),
        (lambda w: w | {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.ones(8, 8)}, "has the shape"),
        (lambda w: w | {"visual.transformer.resblocks.0.attn.in_proj_bias": torch.ones(0)}, "has the shape"),
        (lambda w: w | {"transformer.resblocks.x.ln_1.bias": torch.ones(64)}, "missing|unexpected"),
        (lambda w: w | {"ln_final.bias": torch.full((64,), float("nan"))}, "not finite"),
        (lambda w: w | {"ln_final.bias": torch.ones(65)}, "another shape"),
        (lambda w: {}, "is missing"),
    ],
)
def test_other_weights(change, error, folder, tiny_tokenizer):
    file = folder / "weights.pt"
    torch.save(change(dict(network(tiny_tokenizer, False).weights())), file)
    with pytest.raises(UserError, match=error):
        load_clip(file)


RESNET_SETTINGS = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "layers": [2, 1, 2, 3], "width": 4, "patch_size": None},
    "text_cfg": {"context_length": TINY_CONTEXT, "width": 64, "heads": 4, "layers": 2},
}


def test_open_clip_config_of_a_resnet(folder, tiny_tokenizer):
    file = save(network(tiny_tokenizer, True, resnet=True), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": RESNET_SETTINGS}))
    config: Any = load_backbone(file).config
    assert (config.text_config.hidden_act, config.text_config.num_attention_heads) == ("quick_gelu", 4)
    spoilt = RESNET_SETTINGS | {"vision_cfg": {"layers": [3, 4, 6, 3]}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": spoilt}))
    with pytest.raises(UserError, match=r"layers \[3, 4, 6, 3\], the weights have \[2, 1, 2, 3\]"):
        load_backbone(file)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda w: {k: v for k, v in w.items() if ".layer3." not in k}, r"depths\[2\] is 0"),
        (lambda w: {k: v for k, v in w.items() if k != "visual.attnpool.c_proj.weight"}, "is missing"),
        (lambda w: {k: v for k, v in w.items() if k != "visual.layer2.0.bn1.running_var"}, "1 weights .* missing"),
        (lambda w: w | {"visual.attnpool.positional_embedding": torch.ones(9, 128)}, "not a square"),
        (lambda w: w | {"visual.layer1.0.conv1.weight": torch.ones(3)}, "has the shape"),
        (lambda w: w | {"visual.layer1.0.conv1.weight": torch.ones(5, 4, 1, 1)}, "width is 5"),
        (lambda w: w | {"visual.layer1.0.conv1.weight": torch.ones(6, 4, 1, 1)}, "another shape"),
        (lambda w: w | {"visual.layer4.7.conv1.weight": torch.ones(1)}, "missing|unexpected|another shape"),
        (lambda w: w | {"visual.head.weight": torch.ones(1)}, "1 weights .* unexpected"),
        (lambda w: w | {"visual.bn1.running_mean": torch.full((2,), float("nan"))}, "not finite"),
    ],
)
def test_other_weights_of_a_resnet(change, error, folder, tiny_tokenizer):
    file = folder / "weights.pt"
    torch.save(change(dict(network(tiny_tokenizer, False, resnet=True).weights())), file)
    with pytest.raises(UserError, match=error):
        load_backbone(file)


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def rewritten(file: Path, change) -> Path:
    """A TorchScript archive whose entries went through change(name, content); None leaves one out."""
    other = file.with_name("changed.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return other


def test_nothing_is_run(folder, tiny_tokenizer):
    file, harm = save(network(tiny_tokenizer, True), folder / "archive.pt"), folder / "harm"
    payload = pickle.dumps({"a": Harmful(harm)}, protocol=2)
    for data in (payload, pickle.dumps(Harmful(harm), protocol=2)):
        bad = rewritten(file, lambda name, content, data=data: data if name.endswith("/data.pkl") else content)
        with pytest.raises(UserError, match="could run any code"):
            load_clip(bad)
    torch.save({"a": Harmful(harm)}, folder / "harmful.pt")
    with pytest.raises(UserError, match="more than tensors"):
        load_clip(folder / "harmful.pt")
    assert not harm.exists()
    # the program of an archive is not even read
    load_clip(rewritten(file, lambda name, content: b"import os" if "/code/" in name else content))


def test_damaged_archives(folder, tiny_tokenizer):
    file = save(network(tiny_tokenizer, True), folder / "archive.pt")
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    bad, generator = folder / "bad.pt", torch.Generator().manual_seed(0)
    for at in torch.randint(len(data), (20,), generator=generator).tolist():
        bad.write_bytes(data[:at])
        with pytest.raises(UserError):
            load_clip(bad)
    content = zipfile.ZipFile(file).read(info)
    for at in torch.randint(len(content), (60,), generator=generator).tolist():
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        changed = rewritten(file, lambda n, c, s=bytes(spoilt): s if n.endswith("/data.pkl") else c)
        with suppress(UserError):
            read_checkpoint(changed)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda name, content: None if name.endswith("/data/3") else content, "no item named"),
        (lambda name, content: content[:128] if name.endswith("/data/0") else content, "larger"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "little-endian"),
        (lambda name, content: b"\x80\x02." if name.endswith("/data.pkl") else content, "cannot read"),
        (lambda name, content: b"\x80\x02" if name.endswith("/data.pkl") else content, "cannot read"),
        (lambda name, content: None if name.endswith("/data.pkl") else content, "expected one data.pkl"),
    ],
)
def test_spoilt_archives(change, error, folder, tiny_tokenizer):
    file = save(network(tiny_tokenizer, True), folder / "archive.pt")
    with pytest.raises(UserError, match=error):
        load_clip(rewritten(file, change))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    """The instructions for a tensor in storage 0, as TorchScript writes them."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89tR"


def module(*attributes: bytes) -> bytes:
    return b"c__torch__\nM\n)\x81}(" + b"".join(attributes) + b"ub"


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        (tensor(b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "larger than its storage"),  # one number, 2^31 times
        (tensor(b"K\x04\x85", b"K\x09\x85"), "cannot read"),  # beyond its storage
        (tensor(b"K\x02\x85", b"K\x01\x85", b"K\x09"), "cannot read"),
        (tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "cannot read"),  # a stride of -1
        (tensor(b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"), "9 dimensions"),
        (tensor(text("a"), b"K\x01\x85"), "expected a tuple"),
        (b"cbuiltins\nlist\n)\x81", "objects that are not modules"),
        (b"cbuiltins\neval\n" + text("1") + b"\x85R", "could run any code"),
        (b"(" + text("storage") + b"cos\nsystem\n" + text("0") + b"tQ", "it holds"),
        (b"h\x63", "cannot read"),  # from an empty place of the memo
        (b"ios\nsystem\n", "unexpected instruction|cannot read"),
    ],
)
def test_hostile_archives(attributes, error, tmp_path):
    file = tmp_path / "a.pt"
    write_archive(file, module(text("a"), attributes))
    with pytest.raises(UserError, match=error):
        read_torchscript(file)


def test_the_shape_of_hostile_archives_is_right(tmp_path):
    """What the test above spoils is read, so it fails for the reason given."""
    write_archive(tmp_path / "a.pt", module(text("a"), module(text("b"), tensor(b"K\x02K\x02\x86", b"K\x01K\x02\x86"))))
    assert read_torchscript(tmp_path / "a.pt")["a.b"].tolist() == [[0, 2], [1, 3]]


def test_modules_that_share_parts(tmp_path):
    """Sixty modules, each with the next one twice, would make 2^60 names."""
    data = module() + b"q\x00"
    for _ in range(60):
        data = b"c__torch__\nM\n)\x81}(" + text("a") + data + text("b") + b"h\x00" + b"ubq\x00"
    write_archive(tmp_path / "a.pt", data)
    with pytest.raises(UserError, match="more modules than any CLIP has"):
        read_torchscript(tmp_path / "a.pt")


def write_archive(file: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + data + b".")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/data/0", struct.pack("<4f", 0, 1, 2, 3))


def test_compressed_archives(tmp_path):
    write_archive(tmp_path / "a.pt", module(), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_torchscript(tmp_path / "a.pt")
