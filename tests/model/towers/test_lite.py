"""EfficientNet-Lite's towers: held to a forward written by hand, and to what blanking, hiding and padding promise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.model.loading import save_float16
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer, tokenize
from cmmasksd.model.towers.efficientnet import EfficientNetLite, padding
from cmmasksd.model.towers.families import FAMILIES
from cmmasksd.model.towers.lite import LiteConfig, LiteImageTower, LiteModel, LiteTextTower
from conftest import TINY_SIZES, randomise

SIZES = [(32, 32), (64, 16), (48, 80), (16, 16)]
SENTENCES = ["the red square", "A blue Circle left of zebra 7", "right"]
REACH = 425
"""Pixels beyond its edge that a patch of Lite0 can depend on."""


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def pixels(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def lite(tiny_lite_folder: Path) -> LiteModel:
    return LiteModel.from_pretrained(tiny_lite_folder).eval()


@pytest.fixture
def tokenizer(tiny_lite_folder: Path):
    return load_tokenizer(tiny_lite_folder)


@pytest.fixture
def model(tiny_lite_folder: Path) -> CMMaskSDModel:
    torch.manual_seed(0)
    return CMMaskSDModel.from_backbone(tiny_lite_folder, **TINY_SIZES).eval()


@pytest.fixture
def processor(tiny_lite_folder: Path) -> CMMaskSDProcessor:
    return CMMaskSDProcessor.from_backbone(tiny_lite_folder, (64, 48), patch_size=16, resize="warp", max_tokens=99)


# ---------------------------------------------------------------------------------------------------------------- image


def tensorflow_same(x, kernel, stride, dilation):
    """TensorFlow's rule, from the size of the input."""
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // stride) - 1) * stride + dilation * (kernel - 1) + 1 - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def by_hand(weights, image):
    """The network of one block a stage, from its weights by name."""

    def layer(x, name, *, stride=1, dilation=1, depthwise=False, linear=False):
        weight = weights[f"{name}.conv.weight"]
        x = tensorflow_same(x, weight.shape[-1], stride, dilation)
        x = F.conv2d(x, weight, None, stride, 0, dilation, weight.shape[0] if depthwise else 1)
        norm = {key: weights[f"{name}.norm.{key}"][:, None, None] for key in ("mean", "variance", "weight", "bias")}
        x = (x - norm["mean"]) / (norm["variance"] + 1e-3).sqrt() * norm["weight"] + norm["bias"]
        return x if linear else x.clamp(0, 6)

    x, finer = layer(image, "stem", stride=2), []
    for stage, (stride, dilation) in enumerate([(1, 1), (2, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 2)]):
        name, before = f"stages.{stage}.0", x
        if f"{name}.expand.conv.weight" in weights:
            x = layer(x, f"{name}.expand")
        x = layer(x, f"{name}.depthwise", stride=stride, dilation=dilation, depthwise=True)
        x = layer(x, f"{name}.project", linear=True)
        if stride == 1 and before.shape == x.shape:
            x = x + before
        if stage in (1, 2, 4):
            finer.append(x)
    return layer(x, "head"), finer


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_network_equals_a_forward_by_hand(lite, size):
    image = pixels(2, *size)
    joint, finer = lite.vision_model(image)
    expected, expected_finer = by_hand(lite.vision_model.state_dict(), image)
    close(joint, expected)
    assert joint.std() > 0.1
    for feature, other, stride in zip(finer, expected_finer, (4, 8, 16), strict=True):
        assert feature.shape[-2:] == (size[0] // stride, size[1] // stride)
        close(feature, other)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_padding_is_tensorflows(kernel, stride, dilation):
    x = torch.ones(1, 1, 4, 6)
    assert torch.equal(F.pad(x, 2 * padding(kernel, stride, dilation)), tensorflow_same(x, kernel, stride, dilation))


def test_lite0_has_its_known_size():
    """4.65 million parameters with the classifier of 1,000 classes."""
    network = EfficientNetLite(width_factor=1.0, depth_factor=1.0, joint_width=1280)
    assert sum(parameter.numel() for parameter in network.parameters()) + 1281 * 1000 == 4_652_008
    assert [len(stage) for stage in network.stages] == [1, 2, 2, 3, 3, 4, 1]


def test_batch_norm_never_moves(lite):
    image = pixels(2, 32, 32)
    before = {name: buffer.clone() for name, buffer in lite.named_buffers()}
    with torch.no_grad():
        expected = lite.vision_model(image)[0]
    joint = lite.train().vision_model(image)[0]
    close(joint, expected)
    joint.sum().backward()
    assert all(parameter.grad is not None for parameter in lite.vision_model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in lite.named_buffers())


@torch.no_grad()
def test_patches_and_their_finer_features(lite):
    image = pixels(2, 32, 48)
    features, embedding = LiteImageTower(lite)(image, value_path=True)
    joint, finer = lite.vision_model(image)
    assert features.grid == (2, 3)
    close(features.patches[:, 4], joint[:, :, 1, 1])
    assert features.dense is not None
    assert torch.equal(features.dense, features.patches)
    close(embedding, joint.mean((2, 3)))
    assert features.pixels is not None
    own = [part[..., 16 // s : 2 * 16 // s, 16 // s : 2 * 16 // s] for part, s in zip(finer, (4, 8, 16), strict=True)]
    close(features.pixels[:, 4, 192:], torch.cat([part.flatten(1) for part in own], 1))


@torch.no_grad()
def test_dropped_patches_have_no_influence(lite):
    image, tower = pixels(1, 64, 64), LiteImageTower(lite)
    keep = torch.tensor([[3, 0, 14, 7]])
    other = image.clone()
    other[..., 32:48, 16:48] += 3.0  # patches 9 and 10
    (before, whole), (after, other_whole) = (tower(x, keep=keep, value_path=True) for x in (image, other))
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.pixels, after.pixels)
    assert torch.equal(whole, other_whole)
    assert not torch.allclose(tower(image)[0].patches[:, 14], tower(other)[0].patches[:, 14])
    everything = torch.arange(16)[None]
    assert torch.equal(tower(image, keep=everything)[0].patches, tower(image)[0].patches)


def strip(changed):
    """Images of one row of 80 patches that differ in the pixels from `changed` on."""
    image = pixels(1, 16, 1280)
    other = image.clone()
    other[..., changed:] += 3.0
    return image, other


@torch.no_grad()
@pytest.mark.parametrize("beyond", [REACH + 16, 32])
def test_a_masked_view_sees_no_further_than_the_overlap(tokenizer, beyond, tmp_path):
    """At feature level, patches from 32 on are hidden. Pixels beyond the reach of patch 31 change nothing in what the
    branch predicts, neither by the joint space nor by any finer scale; nearer ones do."""
    sizes = {"width_factor": 0.1, "joint_width": 24, "hidden_size": 16, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    randomise(LiteModel(LiteConfig(**sizes))).save_pretrained(tmp_path)  # the depth of Lite0
    model = CMMaskSDModel.from_backbone(tmp_path, **TINY_SIZES).eval()
    objective = MaskedSelfDistillation(model, DistillationConfig(), 24).eval()
    hidden = (torch.arange(80) >= 32)[None]
    text, index = model.encode_text(tokenize(tokenizer, ["the red square"])), torch.tensor([0])
    first, second = strip(32 * 16 + beyond)
    seen = []
    for image in (first, second):
        features = model.encode_image(image)
        view = objective.mask_patches(image, index, features, hidden)
        assert view.pixels is not None
        assert not view.pixels[:, 32:].any()  # all scales
        assert view.pixels[:, 0].any()
        seen.append((features, view))
    (features, view), (other_features, other_view) = seen
    assert not torch.equal(features.pixels, other_features.pixels)
    unchanged = torch.equal(view.patches, other_view.patches) and torch.equal(view.pixels, other_view.pixels)
    assert unchanged == (beyond > REACH)
    # the standardisation of the match comes from the whole image, as for every family
    logits = [model.decode(type(view)(v.patches, v.grid, pixels=v.pixels), text) for v in (view, other_view)]
    assert torch.equal(*logits) == (beyond > REACH)


# ----------------------------------------------------------------------------------------------------------------- text


@torch.no_grad()
def test_words_sentence_and_embeddings(lite, tokenizer):
    tokens = tokenize(tokenizer, SENTENCES)
    features = LiteTextTower(lite)(tokens)
    assert torch.equal(features.sentence, features.words[:, 0])
    assert tokens.input_ids[:, 0].tolist() == [2, 2, 2]
    network = lite.text_model
    expected = network.vector_in(network.vectors[tokens.input_ids])
    expected = expected + network.learned_in(network.word_embedding(tokens.input_ids))
    assert features.embedded is not None
    close(features.embedded, expected)
    assert torch.equal(features.word_mask, tokens.word_ids >= 0)
    swapped = LiteTextTower(lite)(tokenize(tokenizer, ["square red the"]))
    assert not torch.allclose(swapped.sentence[0], features.sentence[0], atol=1e-3)  # order matters


@torch.no_grad()
def test_a_hidden_word_leaves_nothing(lite, tokenizer):
    tower = LiteTextTower(lite)
    first, second = (tokenize(tokenizer, [f"the {colour} square"]) for colour in ("red", "blue"))
    a, b = (tower(tokens.hide(tokens.word_ids == 1)) for tokens in (first, second))
    assert torch.equal(a.sentence, b.sentence)
    assert torch.equal(a.words, b.words)
    assert torch.equal(a.embedded, b.embedded)
    assert not torch.allclose(tower(first).sentence, tower(second).sentence)


def test_learned_vectors_are_dropped_in_training_only(lite, tokenizer):
    tokens, network = tokenize(tokenizer, SENTENCES), lite.text_model
    with torch.no_grad():
        fixed = network.vector_in(network.vectors[tokens.input_ids])
        learned = network.learned_in(network.word_embedding(tokens.input_ids))
        torch.manual_seed(0)
        embedded = network.train()(tokens.input_ids, tokens.attention_mask)[1]
    dropped = (embedded - fixed).abs().amax(-1) < 1e-6
    kept = (embedded - fixed - learned).abs().amax(-1) < 1e-6
    assert (dropped ^ kept).all()
    assert dropped.any()
    assert kept.any()


def test_pieces_of_a_word_and_its_case(tokenizer):
    tokens = tokenize(tokenizer, ["a Zebra on the LEFT"])
    assert [len(word.tokens) for word in tokens.words(0)] == [1, 5, 1, 1, 1]
    assert torch.equal(tokenize(tokenizer, ["RED"]).input_ids, tokenize(tokenizer, ["red"]).input_ids)


# ---------------------------------------------------------------------------------------------------------- the product


@torch.no_grad()
def test_saved_and_loaded(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "float32")
    save_float16(model, tmp_path / "float16")
    image, tokens = pixels(1, 64, 48), processor.tokens(SENTENCES)
    inputs = (image, tokens.input_ids, tokens.attention_mask, tokens.word_ids)
    expected = model(*inputs).logits
    assert torch.equal(CMMaskSDModel.from_pretrained(tmp_path / "float32").eval()(*inputs).logits, expected)
    half = CMMaskSDModel.from_pretrained(tmp_path / "float16").eval()(*inputs).logits
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("change", [{"joint_width": 41}, {"width_factor": 0.4}, {"depth_factor": 3.0}])
def test_another_size_stops_the_load(tiny_lite_folder, tmp_path, change):
    folder = Path(shutil.copytree(tiny_lite_folder, tmp_path / "lite"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError):
        CMMaskSDModel.from_backbone(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 33}, "hidden_size 33"),
        ({"width_factor": 99.0}, "width_factor"),
        ({"depth_factor": True}, "depth_factor"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"word_dropout": -1.0}, "word_dropout"),
    ],
)
def test_unfit_sizes_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        FAMILIES["lite"].config(change)


def test_settings_of_a_new_processor(processor):
    assert processor.mean == (0.498, 0.498, 0.498)
    assert processor.max_tokens == 24
    with pytest.raises(UserError, match="patch size 16"):
        CMMaskSDProcessor(processor.tokenizer, (40, 40), patch_size=16)
