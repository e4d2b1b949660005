"""CMMaskSDModel: contracts of the network, and that loading weights is all or nothing.

A model whose weights are partly random gives masks, only bad ones: a peer's wrong flag evaluated such a model in
silence. So every gap must stop the load with one line that names the weights.
"""

import copy
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from cmmasksd.errors import UserError
from cmmasksd.model.auto import CMMaskSDConfig
from cmmasksd.model.loading import load_clip
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.base import Tokens
from conftest import TINY_SIZES

SENTENCES = ["the red square", "a blue circle left of unbelievable things", "right", "on the left"]


def pixels(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def segment(model: CMMaskSDModel, image: Tensor, tokens: Tokens, image_index: Tensor | None = None) -> Tensor:
    logits = model(image, tokens.input_ids, tokens.attention_mask, tokens.word_ids, image_index).logits
    assert logits is not None
    return logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4), (7, 2), (9, 9)])
def test_logits_are_four_times_the_grid(tiny_model, tiny_processor, grid):
    image = pixels(2, 8 * grid[0], 8 * grid[1])
    logits = segment(tiny_model, image, tiny_processor.tokens(SENTENCES[:2]))
    assert logits.shape == (2, 4 * grid[0], 4 * grid[1])
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert image.shape[-1] / logits.shape[-1] == tiny_model.stride


def test_gradient_reaches_every_parameter_but_clips_temperature(tiny_model, tiny_processor):
    tiny_model.train()
    segment(tiny_model, pixels(2, 24, 40), tiny_processor.tokens(SENTENCES[:2])).square().sum().backward()
    without = {name for name, p in tiny_model.named_parameters() if p.grad is None}
    assert without == {"clip.logit_scale"}
    # A bias of the keys shifts every score of a query alike: the softmax, and so the output, cannot depend on it.
    still = {name for name, p in tiny_model.named_parameters() if p.grad is not None and not p.grad.abs().amax() > 1e-4}
    assert {name.removesuffix(".bias").rpartition(".")[2] for name in still} <= {"k_proj"}
    # Only positions that the sentence reaches are trained.
    position = tiny_model.clip.text_model.embeddings.position_embedding.weight.grad
    assert position is not None
    length = tiny_processor.tokens(SENTENCES[:2]).input_ids.shape[1]
    assert (position[:length].abs().amax(1) > 0).all()


def test_eval_is_deterministic_and_training_drops(tiny_clip_folder, tiny_processor):
    model = CMMaskSDModel.from_backbone(tiny_clip_folder, **TINY_SIZES, dropout=0.5)
    image, tokens = pixels(1, 32, 32), tiny_processor.tokens(SENTENCES[:1])
    with torch.no_grad():
        model.eval()
        assert torch.equal(segment(model, image, tokens), segment(model, image, tokens))
        model.train()
        assert not torch.equal(segment(model, image, tokens), segment(model, image, tokens))


@pytest.fixture
def count_encodings(tiny_model) -> list[int]:
    """The number of images of every pass through the image tower."""
    passes: list[int] = []
    tiny_model.clip.vision_model.encoder.layers[0].register_forward_pre_hook(
        lambda _module, args: passes.append(len(args[0]))
    )
    return passes


@torch.no_grad()
def test_many_sentences_encode_their_image_once(tiny_model, tiny_processor, count_encodings):
    image = pixels(1, 40, 24)
    together = segment(tiny_model, image, tiny_processor.tokens(SENTENCES))
    assert count_encodings == [1]
    alone = torch.cat([segment(tiny_model, image, tiny_processor.tokens([text])) for text in SENTENCES])
    assert len(count_encodings) == 1 + len(SENTENCES)
    close(together, alone)
    assert (together[0] - together[1]).abs().amax() > 1e-2  # the sentences matter


@torch.no_grad()
def test_image_index_says_whose_sentence_it_is(tiny_model, tiny_processor, count_encodings):
    images, owner = pixels(2, 32, 32), torch.tensor([1, 0, 1, 1])
    together = segment(tiny_model, images, tiny_processor.tokens(SENTENCES), owner)
    assert count_encodings == [2]
    for k, text in enumerate(SENTENCES):
        image = images[owner[k]][None]
        close(together[k], segment(tiny_model, image, tiny_processor.tokens([text]))[0])
        assert not torch.allclose(
            together[k], segment(tiny_model, images[~owner[k]][None], tiny_processor.tokens([text]))
        )
    pairs = segment(tiny_model, images, tiny_processor.tokens(SENTENCES[:2]))  # sentence k with image k
    close(pairs, segment(tiny_model, images, tiny_processor.tokens(SENTENCES[:2]), torch.arange(2)))


@torch.no_grad()
def test_padding_does_not_matter(tiny_model, tiny_processor):
    """A short sentence gives the same logits alone, padded beside a longer one, and whatever the padding holds."""
    image = pixels(1, 32, 32)
    short, both = tiny_processor.tokens(SENTENCES[:1]), tiny_processor.tokens(SENTENCES[:2])
    padding = both.attention_mask == 0
    assert padding[0].any()
    alone = segment(tiny_model, image, short)[0]
    close(segment(tiny_model, image, both)[0], alone)
    garbage = Tokens(both.input_ids.masked_fill(padding, 5), both.attention_mask, both.word_ids, both.truncated)
    close(segment(tiny_model, image, garbage)[0], alone)


@torch.no_grad()
def test_forward_is_encode_encode_decode(tiny_model, tiny_processor):
    image, tokens = pixels(1, 32, 32), tiny_processor.tokens(SENTENCES)
    features = tiny_model.encode_image(image).select(torch.zeros(len(tokens), dtype=torch.int64))
    assert torch.equal(tiny_model.decode(features, tiny_model.encode_text(tokens)), segment(tiny_model, image, tokens))


def test_attention_runs_on_the_fused_kernel(tiny_model):
    """Eager attention takes half as long again on a large image."""
    towers = (tiny_model.clip.vision_model, tiny_model.clip.text_model)
    assert [tower.config._attn_implementation for tower in towers] == ["sdpa", "sdpa"]


@torch.no_grad()
def test_copied_decoder_is_equal_and_independent(tiny_model, tiny_processor):
    image, text = (
        tiny_model.encode_image(pixels(1, 32, 32)),
        tiny_model.encode_text(tiny_processor.tokens(["the left"])),
    )
    own = tiny_model.copy_decoder()
    before = tiny_model.decode(image, text)
    assert torch.equal(own(image, text), before)
    for parameter in own.parameters():
        parameter.add_(1)
    assert torch.equal(tiny_model.decode(image, text), before)


def test_logits_of_fixed_weights(tiny_model, tiny_processor):
    """Numbers of the whole forward pass, so that a change of the network is never unnoticed."""
    image = torch.linspace(-2, 2, 3 * 24 * 40).reshape(1, 3, 24, 40).sin()
    with torch.no_grad():
        logits = segment(tiny_model, image, tiny_processor.tokens(["the red square", "unbelievable things"]))
    assert logits.mean((1, 2)).tolist() == pytest.approx([-0.07947, 0.35132], abs=1e-3)
    assert logits[:, 5, 11].tolist() == pytest.approx([-0.02396, 0.50614], abs=1e-3)


def test_a_new_model_begins_calmly(tiny_clip_folder):
    """transformers calls `_init_weights` for single layers only; what concerns more than one must not be lost."""
    model = CMMaskSDModel.from_backbone(tiny_clip_folder, **TINY_SIZES)
    kernel, fusion = model.decoder.head.kernel, model.decoder.fusion
    assert kernel.bias[-1].item() == -2  # masks are rare
    assert kernel.weight.std() < 0.2 * kernel.in_features**-0.5  # and one kernel serves all sentences
    assert torch.equal(fusion.word_in.weight, fusion.patch_in.weight)
    for layer in fusion.layers:
        attention = layer.cross_attention
        assert torch.equal(attention.key_value.weight[: attention.query.out_features], attention.query.weight)


# ---------------------------------------------------------------------------------------------------------------- files


def test_round_trip_is_exact(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = CMMaskSDModel.from_pretrained(tmp_path)
    assert not loaded.training
    ours, theirs = tiny_model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    image, tokens = pixels(1, 40, 24), tiny_processor.tokens(SENTENCES)
    with torch.no_grad():
        assert torch.equal(segment(loaded, image, tokens), segment(tiny_model, image, tokens))


def test_a_saved_model_is_safetensors_and_json(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_saved_model_knows_nothing_of_the_machine(tiny_clip_folder, tmp_path):
    CMMaskSDModel.from_backbone(tiny_clip_folder, **TINY_SIZES).save_pretrained(tmp_path)
    assert str(tiny_clip_folder) not in (tmp_path / "config.json").read_text()


def test_backbone_keeps_every_weight_of_its_clip(tiny_clip_folder):
    model = CMMaskSDModel.from_backbone(tiny_clip_folder, **TINY_SIZES)
    stored = load_file(tiny_clip_folder / "model.safetensors")
    state = model.clip.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(state[key], stored[key]) for key in stored)


def test_half_precision_files_load_into_float32(tiny_clip_folder, tmp_path):
    CLIPModel.from_pretrained(tiny_clip_folder).half().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = CMMaskSDModel.from_backbone(tmp_path, **TINY_SIZES)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, stored[key].float()) for key, value in model.clip.state_dict().items())


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    """A trained model's folder that the test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def clip_folder(tiny_clip_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_clip_folder, tmp_path / "clip"))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def refuse() -> Iterator[Callable[..., None]]:
    """Call the loader: it must raise one line that holds the words, and transformers must log no report beside it."""
    logged: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    def check(load: Callable[[Path], object], folder: Path | str, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            load(folder)
        message = str(caught.value)
        assert "\n" not in message
        for word in (str(folder), *words):
            assert word in message
        assert not logged

    handler = Handler()
    transformers.utils.logging.add_handler(handler)
    yield check
    transformers.utils.logging.remove_handler(handler)


LOADERS = pytest.mark.parametrize("load", [CMMaskSDModel.from_pretrained, load_clip, CMMaskSDModel.from_backbone])


def weight_of(load: Callable) -> str:
    """A weight that the loader's folder has."""
    return "clip.visual_projection.weight" if load == CMMaskSDModel.from_pretrained else "visual_projection.weight"


@pytest.fixture
def matching(folder, clip_folder) -> Callable[[Callable], Path]:
    """The folder that a loader takes."""
    return lambda load: folder if load == CMMaskSDModel.from_pretrained else clip_folder


@LOADERS
def test_missing_weights_stop_the_load(load, matching, refuse):
    change_weights(matching(load), lambda weights: weights.pop(weight_of(load)))
    refuse(load, matching(load), "missing", weight_of(load))


@LOADERS
def test_unexpected_weights_stop_the_load(load, matching, refuse):
    change_weights(matching(load), lambda weights: weights.update(stray=torch.zeros(3)))
    refuse(load, matching(load), "unexpected", "stray")


@LOADERS
def test_misshapen_weights_stop_the_load(load, matching, refuse):
    change_weights(matching(load), lambda weights: weights.update({weight_of(load): torch.zeros(2, 2)}))
    refuse(load, matching(load), "shape", weight_of(load))


def test_a_config_of_another_size_stops_the_load(folder, refuse):
    change_config(folder, decoder_width=64)
    refuse(CMMaskSDModel.from_pretrained, folder, "shape", "decoder.")


def test_many_gaps_are_counted_and_few_named(folder, refuse):
    def drop(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if key.startswith("decoder.")]:
            del weights[key]

    change_weights(folder, drop)
    refuse(CMMaskSDModel.from_pretrained, folder, "missing", "decoder.fusion.", "…")


def test_old_clip_files_with_position_indices_load(clip_folder):
    """The first CLIP checkpoints in transformers' format also store these; they are no weights."""
    extra = {
        "text_model.embeddings.position_ids": torch.arange(24)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    change_weights(clip_folder, lambda weights: weights.update(extra))
    load_clip(clip_folder)


def test_a_clip_is_not_a_trained_model(tiny_clip_folder, refuse):
    refuse(CMMaskSDModel.from_pretrained, tiny_clip_folder, "'clip'", "trained model")


@pytest.mark.parametrize("load", [load_clip, CMMaskSDModel.from_backbone])
def test_a_trained_model_is_not_a_clip(load, tiny_model_folder, refuse):
    refuse(load, tiny_model_folder, "'cmmasksd'", "not CLIP", "choose a backbone")


@LOADERS
def test_other_models_are_refused(load, matching, refuse):
    change_config(matching(load), model_type="bert")
    refuse(load, matching(load), "'bert'")


@LOADERS
def test_a_folder_that_does_not_exist(load, tmp_path, refuse):
    refuse(load, tmp_path / "nothing", "no model folder")


@LOADERS
def test_a_folder_without_a_config(load, tmp_path, refuse):
    refuse(load, tmp_path, "config.json")


@LOADERS
def test_a_config_that_is_no_json(load, matching, refuse):
    (matching(load) / "config.json").write_text("{")
    refuse(load, matching(load), "JSON")


@LOADERS
def test_a_folder_without_weights(load, matching, refuse):
    (matching(load) / "model.safetensors").unlink()
    refuse(load, matching(load), "model.safetensors")


@LOADERS
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"not weights" * 9])
def test_damaged_weights(load, matching, refuse, damage):
    file = matching(load) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refuse(load, matching(load), "cannot load")


@LOADERS
def test_a_hub_id_without_a_network(load, refuse):
    refuse(load, "someone/something", "cannot load")


class Malicious:
    """Unpickled, it would run a command of the attacker's: here, make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@LOADERS
@pytest.mark.parametrize("style", ["torch", "pickle"])
def test_pickled_code_is_never_run(load, matching, refuse, tmp_path, style):
    folder, trace = matching(load), tmp_path / "was here"
    (folder / "model.safetensors").unlink()
    if style == "torch":
        torch.save({"weight": Malicious(trace)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    refuse(load, folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # the trap does work
    assert trace.exists()


@LOADERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite(load, matching, refuse, value, dtype):
    def spoil(weights: dict[str, Tensor]) -> None:
        weights.update({key: one.to(dtype) for key, one in weights.items()})
        weights[weight_of(load)][1, 2] = value

    change_weights(matching(load), spoil)
    refuse(load, matching(load), weight_of(load), "not finite")


@LOADERS
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_that_are_not_floats(load, matching, refuse, dtype):
    key = weight_of(load)
    change_weights(matching(load), lambda weights: weights.update({key: weights[key].to(dtype)}))
    refuse(load, matching(load), weight_of(load), "expected floating-point numbers")


def test_large_finite_weights_load(folder):
    """Their sum overflows."""
    change_weights(folder, lambda weights: weights["clip.visual_projection.weight"].fill_(3e38))
    assert CMMaskSDModel.from_pretrained(folder).clip.visual_projection.weight.amax() == 3e38


@pytest.fixture
def sharded(clip_folder) -> Path:
    """A CLIP whose weights lie in several files."""
    CLIPModel.from_pretrained(clip_folder).save_pretrained(clip_folder, max_shard_size="40KB")
    assert len(list(clip_folder.glob("model-*.safetensors"))) > 2
    (clip_folder / "model.safetensors").unlink()
    return clip_folder


def test_a_clip_in_several_files(sharded, tiny_clip_folder):
    whole, parts = (load_clip(one).state_dict() for one in (tiny_clip_folder, sharded))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_clip_in_the_hubs_cache(sharded, tmp_path):
    """There every file is a link to a blob that two folders share."""
    cache, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    cache.mkdir(parents=True)
    blobs.mkdir()
    for nth, file in enumerate(sharded.iterdir()):
        file.rename(blobs / str(nth))
        (cache / file.name).symlink_to(Path("../../blobs") / str(nth))
    load_clip(cache)


@pytest.mark.parametrize("case", ["up", "absolute", "link", "folder", "number", "none", "list", "missing"])
def test_an_index_stays_in_its_folder(case, sharded, refuse, tmp_path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    key, shard = next(iter(index["weight_map"].items()))
    (sharded / shard).rename(tmp_path / "outside.safetensors")
    if case == "link":
        (sharded / shard).symlink_to(tmp_path / "outside.safetensors")
    names = {
        "up": "../outside.safetensors",
        "absolute": str(tmp_path / "outside.safetensors"),
        "folder": "a/b.safetensors",
        "number": 5,
    }
    for key in [key for key, one in index["weight_map"].items() if one == shard]:
        index["weight_map"][key] = names.get(case, shard)
    index |= {"none": {"weight_map": None}, "list": {"weight_map": [1]}}.get(case, {})
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    said = {
        "link": "is a link",
        "missing": "lacks",
        "folder": "lacks a/b",
        "up": "not a path",
        "absolute": "not a path",
    }
    refuse(load_clip, sharded, said.get(case, "expected"))


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "other.safetensors"])
def test_only_the_named_file_is_read(name, folder, tiny_model):
    """transformers prefers some other files where they lie in the folder, or config.json names one."""
    other = {key: torch.zeros_like(value) for key, value in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / name, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/something"}')
    change_config(folder, transformers_weights="other.safetensors")
    loaded = CMMaskSDModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tiny_model.state_dict().items())


# Keys of a config.json by which transformers fetches or runs something, or that would change the network.
FOREIGN = {
    "attn_implementation": "some/kernel",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "eager",
    "_experts_implementation": "some/kernel",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "auto_map": {"AutoModel": "someone/else--modeling.Evil", "AutoConfig": "modeling.Evil"},
    "torch_dtype": "float16",
    "dtype": "load",
    "_name_or_path": "someone/else",
    "_commit_hash": "abc",
    "custom_generate": "someone/else",
    "fusion_config": {"patch_embeddings": True},
    "per_layer_config": {"0": {"hidden_size": 7}},
    "pruned_heads": {"0": [0]},
    "return_dict": False,
    "chunk_size_feed_forward": 7,
    "problem_type": "single_label_classification",
    "num_labels": 1,
    "id2label": {"a": 5},
    "to_dict": 5,
    "architectures": 5,
}


@LOADERS
def test_other_keys_of_a_config_do_nothing(load, matching, tiny_model, tiny_processor):
    file = matching(load) / "config.json"
    config = json.loads(file.read_text())
    clip = config.get("clip_config", config)
    for section in (config, clip, clip["text_config"], clip["vision_config"]):
        section |= FOREIGN
    file.write_text(json.dumps(config))
    model = load(matching(load))
    clip = getattr(model, "clip", model)
    for one in (model, clip, clip.text_model, clip.vision_model):
        assert one.config._attn_implementation == "sdpa"
        assert not {"quantization_config", "auto_map", "fusion_config"} & vars(one.config).keys()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, tiny_model.clip.state_dict()[key]) for key, value in clip.state_dict().items())
    if load == CMMaskSDModel.from_pretrained:
        image, tokens = pixels(1, 32, 32), tiny_processor.tokens(SENTENCES)
        assert torch.equal(segment(model, image, tokens), segment(tiny_model, image, tokens))
        del config["auto_map"]  # transformers itself looks at it, and asks
        file.write_text(json.dumps(config))
        assert transformers.AutoModel.from_pretrained(matching(load)).config._attn_implementation == "sdpa"


def test_sizes_given_to_the_loader(folder):
    assert CMMaskSDModel.from_pretrained(folder, dropout=0.25).config.dropout == 0.25
    config = CMMaskSDConfig.from_pretrained(folder, dropout=0.5)
    assert CMMaskSDModel.from_pretrained(folder, config=config).config.dropout == 0.5
    model = CMMaskSDModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float16)
    assert model.clip.text_model.config._attn_implementation == "eager"
    assert model.dtype == torch.float16


def test_transformers_logs_as_before_after_a_load(tiny_model_folder):
    before = transformers.utils.logging.get_verbosity()
    CMMaskSDModel.from_pretrained(tiny_model_folder)
    assert transformers.utils.logging.get_verbosity() == before
    with pytest.raises(UserError):
        CMMaskSDModel.from_pretrained("someone/something")
    assert transformers.utils.logging.get_verbosity() == before


def test_a_clip_in_harmless_pickled_weights_loads(clip_folder):
    """Some CLIPs on the hub have nothing else."""
    weights = load_file(clip_folder / "model.safetensors")
    (clip_folder / "model.safetensors").unlink()
    torch.save(weights, clip_folder / "pytorch_model.bin")
    assert torch.equal(load_clip(clip_folder).visual_projection.weight, weights["visual_projection.weight"])


# -------------------------------------------------------------------------------------------------------- configuration


def test_config_round_trip(tmp_path):
    clip = CLIPConfig(
        vision_config={"patch_size": 8, "hidden_size": 48}, text_config={"vocab_size": 99}, projection_dim=40
    )
    config = CMMaskSDConfig(clip_config=clip, decoder_width=96, decoder_heads=3, head_width=48, dropout=0.1)
    config.save_pretrained(tmp_path)
    loaded = CMMaskSDConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.clip_config, CLIPConfig)
    assert loaded.clip_config.vision_config.patch_size == 8
    assert loaded.clip_config.text_config.vocab_size == 99
    assert loaded.clip_config.projection_dim == 40
    assert (loaded.decoder_width, loaded.decoder_heads, loaded.head_width, loaded.dropout) == (96, 3, 48, 0.1)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "cmmasksd"


def test_config_takes_a_dict_and_has_a_default():
    nested = CMMaskSDConfig(clip_config={"vision_config": {"patch_size": 14}})
    assert nested.clip_config.vision_config.patch_size == 14
    assert isinstance(CMMaskSDConfig().clip_config, CLIPConfig)


def test_config_says_nothing_of_the_distillation():
    assert not [key for key in CMMaskSDConfig().to_dict() if "mask" in key.replace("cmmasksd", "") or "distil" in key]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"decoder_width": 100, "decoder_heads": 8}, ("100", "8")),
        ({"head_width": 40}, ("40", "32")),
        ({"head_width": 8}, ("8", "16")),
        ({"decoder_layers": 0}, ("decoder_layers", "0")),
        ({"decoder_mlp": "wide"}, ("decoder_mlp", "'wide'")),
        ({"decoder_heads": 1.5}, ("decoder_heads", "1.5")),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(UserError) as caught:
        CMMaskSDConfig(**sizes)
    assert all(word in str(caught.value) for word in words)


def test_an_impossible_size_in_a_saved_config_is_one_line(folder, refuse):
    change_config(folder, decoder_heads=5)
    refuse(CMMaskSDModel.from_pretrained, folder, "decoder_heads")


HUGE = [10**6, 2**70, True, 7.0, "7", None, [], {}, float("nan"), float("inf"), -1, 0]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("key", ["decoder_layers", "decoder_width", "decoder_heads", "decoder_mlp", "head_width"])
def test_sizes_of_a_strangers_config(key, value, folder, refuse):
    """A million layers would be built for hours."""
    change_config(folder, **{key: value})
    refuse(CMMaskSDModel.from_pretrained, folder, key)


@pytest.mark.parametrize("value", [10**8, *HUGE[1:]])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("text_config", "vocab_size"),
        ("text_config", "max_position_embeddings"),
        ("text_config", "num_hidden_layers"),
        ("vision_config", "hidden_size"),
        ("vision_config", "num_attention_heads"),
        ("vision_config", "intermediate_size"),
        ("vision_config", "image_size"),
        ("vision_config", "patch_size"),
        ("vision_config", "num_channels"),
        (None, "projection_dim"),
    ],
)
def test_sizes_of_a_strangers_clip(section, key, value, clip_folder, refuse):
    config = json.loads((clip_folder / "config.json").read_text())
    (config[section] if section else config)[key] = value
    (clip_folder / "config.json").write_text(json.dumps(config))
    refuse(load_clip, clip_folder, key)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 16_384, "num_hidden_layers": 100},
        {"image_size": 4096, "patch_size": 1},
    ],
)
def test_a_config_of_more_weights_than_the_file_holds(change, clip_folder, refuse):
    """Each size is allowed, together they would fill the memory."""
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"] |= change
    (clip_folder / "config.json").write_text(json.dumps(config))
    refuse(load_clip, clip_folder, "describes")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("text_config", {"num_attention_heads": 7}),
        ("text_config", {"hidden_act": "no_such"}),
        ("text_config", {"hidden_act": ["gelu"]}),
        ("text_config", {"eos_token_id": None}),
        ("text_config", {"eos_token_id": [1, 2]}),
        ("text_config", {"layer_norm_eps": -1.0}),
        ("vision_config", {"layer_norm_eps": 10**400}),
        ("vision_config", {"attention_dropout": "x"}),
        ("vision_config", {"patch_size": 64}),
    ],
)
def test_other_values_of_a_strangers_clip(section, change, clip_folder, refuse):
    config = json.loads((clip_folder / "config.json").read_text())
    config[section] |= change
    (clip_folder / "config.json").write_text(json.dumps(config))
    refuse(load_clip, clip_folder, next(iter(change)).replace("num_attention_", ""))


def test_the_config_of_the_first_clips(clip_folder):
    """It has two sections for a tower, of which the second holds, numbers that are no ids, and nulls."""
    config = json.loads((clip_folder / "config.json").read_text())
    for name in ("text_config", "vision_config"):
        config[f"{name}_dict"] = config[name]
        config[name] = config[name] | {"hidden_size": 64}
    config["text_config_dict"] |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": None}
    (clip_folder / "config.json").write_text(json.dumps(config))
    assert load_clip(clip_folder).config.text_config.hidden_size == 32


# -------------------------------------------------------------------------------------------------- model and processor


def test_model_and_processor_load_from_one_folder(tiny_model_folder, tiny_model):
    model, processor = (kind.from_pretrained(tiny_model_folder) for kind in (CMMaskSDModel, CMMaskSDProcessor))
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    values, tokens, placement = processor(image, SENTENCES)
    with torch.no_grad():
        masks = processor.masks(segment(model, values, tokens), placement)
        assert masks.shape == (len(SENTENCES), 50, 70)
        assert torch.equal(masks, processor.masks(segment(tiny_model, values, tokens), placement))
    assert 0 < masks.float().mean() < 1


def test_a_copied_model_is_independent(tiny_model):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.decoder.head.reduce.weight.zero_()
    assert tiny_model.decoder.head.reduce.weight.abs().amax() > 0


def test_the_towers_are_those_of_the_models_clip(tiny_model, tiny_model_folder):
    """They share its modules, which a copy or a load must not part."""
    for model in (tiny_model, copy.deepcopy(tiny_model), CMMaskSDModel.from_pretrained(tiny_model_folder)):
        assert model.towers.image.vision_model is model.clip.vision_model
        assert model.towers.text.text_projection is model.clip.text_projection
    assert not any("tower" in key for key in tiny_model.state_dict())


def test_freezing_the_unused_leaves_both_towers_trainable(tiny_model):
    tiny_model.towers.text.text_projection.requires_grad_(False)
    tiny_model.freeze_unused()
    frozen = {name for name, parameter in tiny_model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"clip.logit_scale", "clip.text_projection.weight"}
