"""tools/photos_backbone.py: from a checkpoint, a sentence encoder and WordNet, all tiny, to a backbone that loads."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmmasksd.data.expressions import Instance
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from conftest import TINY_SIZES, make_lite
from data.expressions.layouts import instance, write_instances

SYNSETS = {  # WordNet id -> words, id of the more general noun
    "00000001": (["entity"], None),
    "00000002": (["dog", "domestic_dog"], "00000001"),
    "00000003": (["husky"], "00000002"),
    "00000004": (["beagle"], "00000002"),
    "00000005": (["teapot"], "00000001"),
    "00000006": (["mug"], "00000001"),
    "00007846": (["person", "somebody"], "00000001"),
    "00000008": (["lady", "mug"], "00007846"),
}
CLASSES = ["00000003", "00000004", "00000005", "00000006"]
WORDS = ["dog", "domestic", "husky", "beagle", "teapot", "mug", "entity", "the", "a", "left", "##s", "person", "lady"]
WORDS += ["on"]


@pytest.fixture
def tool():
    file = Path(__file__).parents[1] / "tools/photos_backbone.py"
    spec = importlib.util.spec_from_file_location("photos_backbone", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    lines = ["  1 This is the licence."]
    for number, (words, general) in SYNSETS.items():
        pointers = f"001 @ {general} n 0000" if general else "000"
        names = " ".join(f"{word} 0" for word in words)
        lines.append(f"{number} 03 n {len(words):02x} {names} {pointers} | a gloss | with a bar")
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    (tmp_path / "synsets.txt").write_text("".join(f"n{number}\n" for number in CLASSES))
    return tmp_path


def checkpoint(lite, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of a network of one block a stage as the package names them."""
    weights = {"_fc.weight": rows, "_fc.bias": torch.zeros(len(rows))}
    parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
    parts |= {"project": ("_project_conv", "_bn2")}
    kinds = {"mean": "running_mean", "variance": "running_var"}
    for name, value in lite.vision_model.state_dict().items():
        *layer, part, kind = name.split(".")
        if layer == ["stem"]:
            theirs = "_conv_stem" if part == "conv" else "_bn0"
        elif layer == ["head"]:
            theirs = "_conv_head" if part == "conv" else "_bn1"
        else:
            theirs = f"_blocks.{layer[1]}.{parts[layer[3]][part == 'norm']}"
        weights[f"{theirs}.{kinds.get(kind, kind)}"] = value
        if kind == "mean":
            weights[f"{theirs}.num_batches_tracked"] = torch.tensor(7)
    return weights


def encoder(folder: Path) -> None:
    """A sentence encoder of BERT's kind with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "été", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    vocab = {word: number for number, word in enumerate(vocabulary)}
    BertTokenizerFast(vocab=vocab).save_pretrained(folder)


def photographs() -> list[tuple[np.ndarray, list[Instance]]]:
    """White persons on black, and a photograph without any."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[20:120, 40:100] = 255
    scene = [instance("person", 40, 20, 100, 120), instance("dog", 0, 0, 20, 20)]
    return [(pixels, scene), (pixels, scene[1:])]


def test_the_row_of_persons_is_where_their_pixels_are(tool, tmp_path):
    lite = make_lite(9).eval()
    file = write_instances(tmp_path, photographs())
    row = tool.person_row(lite, [file], 5)
    pixels = torch.from_numpy(photographs()[0][0]).permute(2, 0, 1)[None] / 255
    size = (lite.config.image_size,) * 2
    with torch.no_grad():
        joint = lite.vision_model(F.interpolate((pixels - 0.498) / 0.502, size, mode="bilinear"))[0][0]
    match = torch.einsum("dhw,d->hw", joint, row)
    rows, columns = match.shape
    inside = match[rows // 4 : -1, columns * 5 // 16 : columns * 9 // 16]
    assert inside.mean() > match.mean()


def test_names_of_classes_and_of_what_they_are_kinds_of(tool, wordnet):
    words = {"person", "lady", "mug"}  # without "somebody"
    names = {name.text: name.classes for name in tool.read_names(wordnet, wordnet / "synsets.txt", words)}
    dogs = [0, 1]
    assert names == {
        "entity": [0, 1, 2, 3], "dog": dogs, "domestic dog": dogs, "husky": [0], "beagle": [1], "teapot": [2],
        "mug": [3], "person": [4], "lady": [4],
    }  # fmt: skip


def test_a_backbone_is_written(tool, wordnet, tmp_path):
    lite = make_lite(9)
    rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    torch.save(checkpoint(lite, rows), tmp_path / "lite.pth")
    (tmp_path / "encoder").mkdir()
    encoder(tmp_path / "encoder")
    options = {
        "weights": tmp_path / "lite.pth", "language": tmp_path / "encoder", "wordnet": wordnet,
        "synsets": wordnet / "synsets.txt", "out": tmp_path / "out", "width_factor": 0.25, "depth_factor": 0.1,
        "words": 13, "vector_width": 8, "steps": 60,
        "persons": write_instances(tmp_path / "photographs", photographs()),
    }  # fmt: skip
    tool.main([text for name, value in options.items() for text in (f"--{name}", str(value))])

    model = CMMaskSDModel.from_backbone(tmp_path / "out", **TINY_SIZES).eval()
    processor = CMMaskSDProcessor.from_backbone(tmp_path / "out", (32, 32), patch_size=16, resize="warp", max_tokens=40)
    assert processor.mean == (0.498, 0.498, 0.498)
    assert processor.std == (0.502, 0.502, 0.502)
    for name, value in lite.vision_model.state_dict().items():
        assert torch.equal(model.backbone.vision_model.state_dict()[name], value.half().float()), name
    vectors = model.backbone.text_model.vectors
    assert vectors.shape == (4 + 13, 8)  # "été" and, beyond --words, "on" are left out
    assert not vectors[:4].any()
    assert vectors[4:].std() == pytest.approx(1.0, abs=0.05)
    tokens = processor.tokens(["the Teapot on", "a husky"])
    assert tokens.input_ids.tolist()[0] == [2, 4 + WORDS.index("the"), 4 + WORDS.index("teapot"), 1, 3]
    with torch.no_grad():
        sentences = model.encode_text(processor.tokens(["dog", "husky", "teapot", "mug", "the beagle"])).sentence
    cosine = F.normalize(sentences, dim=1) @ F.normalize(rows - rows.mean(0), dim=1).T
    nearest = cosine.argmax(1).tolist()
    assert sum(row in classes for row, classes in zip(nearest, ([0, 1], [0], [2], [3], [1]), strict=True)) >= 4
