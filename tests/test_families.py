"""What works on every family of backbones, from training to the exported graphs: inherit FamilyContract and give it a
`backbone`, the folder of a tiny one in transformers' format."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from cmmasksd.config import Config, DataConfig, DistillationConfig, ModelConfig, ScoreConfig, TrainingConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.evaluation.score import score
from cmmasksd.explain import write_figures
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.training import loop
from cmmasksd.training.loop import train
from conftest import ORT, TINY_SIZES, require_ort, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SENTENCES = ["the red square", "a Blue circle on the left", "right"]


def image(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _cut_at(losses: Callable[..., object], call: int) -> Callable[..., object]:
    """The same function, until a call (from 1) that interrupts the run."""
    calls: list[None] = []

    def until(*args: object) -> object:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return losses(*args)

    return until


class FamilyContract:
    """A network on a tiny backbone."""

    prefix: str
    """Of the backbone's weights."""
    patch_size = 8

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls) -> Path:
        raise NotImplementedError

    @pytest.fixture
    def model(self, backbone: Path) -> CMMaskSDModel:
        torch.manual_seed(0)
        return CMMaskSDModel.from_backbone(backbone, **TINY_SIZES).eval()

    @pytest.fixture
    def processor(self, backbone: Path) -> CMMaskSDProcessor:
        p = self.patch_size
        return CMMaskSDProcessor.from_backbone(
            backbone, (4 * p, 5 * p), patch_size=p, resize="letterbox", max_tokens=20
        )

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """What an uninterrupted training leaves."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            out = tmp_path_factory.mktemp("run")
            train(cls.settings(backbone, out))
        return out

    @classmethod
    def settings(cls, backbone: Path, out: Path, **training: object) -> Config:
        sizes = {"size": (4 * cls.patch_size, 4 * cls.patch_size), "max_tokens": 20, "dropout": 0.1} | TINY_SIZES
        return Config(
            DataConfig(train_references=8, val_references=4, scene_size=64, workers=0),
            ModelConfig(str(backbone), **sizes),
            DistillationConfig(start=0.0, vision_which="random", language_which="random"),
            TrainingConfig(out=out, epochs=2, batch=4, batch_size=2, warmup_steps=1, log_every=1, **training),
        )

    def test_logits_at_several_sizes(self, model: CMMaskSDModel, processor: CMMaskSDProcessor):
        tokens = processor.tokens(SENTENCES)
        for height, width in ((4, 4), (5, 3), (1, 2)):
            pixels = torch.randn(1, 3, height * self.patch_size, width * self.patch_size)
            with torch.no_grad():
                logits = model(pixels, tokens.input_ids, tokens.attention_mask, tokens.word_ids).logits
            assert logits.shape == (3, 4 * height, 4 * width)
            assert logits.isfinite().all()
            assert logits[0].ne(logits[1]).any()

    def test_every_trained_parameter_gets_a_gradient(self, model: CMMaskSDModel, processor: CMMaskSDProcessor):
        model.train().freeze_unused()
        pixels, tokens, _ = processor(image(), SENTENCES)
        inputs = tokens.input_ids, tokens.attention_mask, tokens.word_ids
        model(pixels, *inputs).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any(name.startswith(f"{self.prefix}.vision_model.") for name in trained)
        assert any(name.startswith(f"{self.prefix}.text_model.") for name in trained)

    @pytest.mark.parametrize("vision_level", ["feature", "input", "blank"])
    @pytest.mark.parametrize("language_level", ["feature", "input"])
    @pytest.mark.parametrize("correlation", ["patches", "values"])
    def test_a_training_step_at_every_level(
        self, model: CMMaskSDModel, processor: CMMaskSDProcessor, vision_level, language_level, correlation
    ):
        settings = DistillationConfig(
            start=0.0, vision_level=vision_level, language_level=language_level, correlation=correlation
        )
        objective = MaskedSelfDistillation(model.train(), settings, model.config.encoder.joint_width)
        pixels, tokens, _ = processor(image(), SENTENCES)
        views = objective.views(pixels, tokens, torch.zeros(3, dtype=torch.long))
        logits = objective.decode(views)
        assert logits.keys() == {"main", "lmvsd", "vmlsd"}
        assert views.hidden_patches.any(dim=1).all()
        assert views.hidden_words[:2].any(dim=1).all()
        sum(branch.square().mean() for branch in logits.values()).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)

    def test_several_sentences_equal_one_by_one(self, model: CMMaskSDModel, processor: CMMaskSDProcessor):
        segmenter = Segmenter(model, processor, device="cpu")
        together = segmenter.segment(image(), SENTENCES)
        for sentence, result in zip(SENTENCES, together, strict=True):
            (alone,) = segmenter.segment(image(), [sentence])
            np.testing.assert_allclose(result.probability, alone.probability, atol=1e-5)
            assert result.mask.shape == (50, 70)

    @torch.no_grad()
    def test_a_sentence_does_not_depend_on_those_beside_it(self, model: CMMaskSDModel, processor: CMMaskSDProcessor):
        together = model.encode_text(processor.tokens(SENTENCES))
        for nth, sentence in enumerate(SENTENCES):
            alone = model.encode_text(processor.tokens([sentence]))
            torch.testing.assert_close(together.sentence[nth], alone.sentence[0], rtol=1e-5, atol=1e-5)
            words = together.words[nth][together.word_mask[nth]]
            torch.testing.assert_close(words, alone.words[0][alone.word_mask[0]], rtol=1e-5, atol=1e-5)

    def test_save_and_load(self, model: CMMaskSDModel, processor: CMMaskSDProcessor, tmp_path: Path):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded, again = CMMaskSDModel.from_pretrained(tmp_path), CMMaskSDProcessor.from_pretrained(tmp_path)
        assert (loaded.config.family, loaded.config.encoder) == (model.config.family, model.config.encoder)
        (pixels, tokens, _), (same_pixels, same_tokens, _) = (each(image(), SENTENCES) for each in (processor, again))
        assert torch.equal(pixels, same_pixels)
        assert torch.equal(tokens.input_ids, same_tokens.input_ids)
        names = {name.split(".")[0] for name in loaded.state_dict()}
        assert names == {self.prefix, "decoder"}
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name

    def test_evaluation(self, trained: Path):
        config = ScoreConfig(data="scenes", split="val", references=4, scene_size=64, model=str(trained / "best"))
        assert 0 <= score(config).scores["mIoU"] <= 1

    def test_explanation(self, trained: Path, tmp_path: Path):
        Image.fromarray(image()).save(tmp_path / "image.png")
        figures = list(write_figures(trained / "best", tmp_path / "image.png", SENTENCES, tmp_path / "figures"))
        assert [text for text, _ in figures] == SENTENCES
        assert all(file.is_file() for _, file in figures)

    def test_a_resumed_training_ends_with_the_same_weights(
        self, backbone: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_losses", _cut_at(loop._losses, 6))
            with pytest.raises(KeyboardInterrupt):
                train(self.settings(backbone, tmp_path))
        train(self.settings(backbone, tmp_path, resume=True))
        before, after = (CMMaskSDModel.from_pretrained(out / "last") for out in (trained, tmp_path))
        for name, value in before.state_dict().items():
            assert torch.equal(value, after.state_dict()[name]), name

    @pytest.fixture(scope="class")
    @classmethod
    def exported(cls, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The model as ONNX; the export compares every graph with torch by itself."""
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
        pytest.importorskip("onnxruntime", reason="the extra export is not installed")
        from cmmasksd.export.export import export

        out = tmp_path_factory.mktemp("exported") / "onnx"
        export(trained / "best", out)
        return out

    def test_onnx(self, trained: Path, exported: Path):
        from cmmasksd.inference.onnx import OnnxSegmenter

        expected = Segmenter.from_pretrained(trained / "best", device="cpu").segment(image(), SENTENCES)
        for a, b in zip(expected, OnnxSegmenter.from_pretrained(exported).segment(image(), SENTENCES), strict=True):
            np.testing.assert_allclose(a.probability, b.probability, atol=1e-4)

    def test_site(
        self, trained: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: "Browser"
    ):
        """The page in a browser."""
        require_ort()
        from cmmasksd.export import site
        from cmmasksd.inference.export_settings import ExportSettings

        monkeypatch.setattr(site, "export", lambda name, to, **_: ExportSettings.read(shutil.copytree(exported, to)))
        site.write_site(trained / "best", tmp_path / "site", ort=ORT)
        Image.fromarray(image()).save(tmp_path / "image.png")
        sentences = [*SENTENCES, "A café, the zebra's ＢＬＵＥ circle " + "on the right " * 10]
        with served(tmp_path / "site") as address:
            page = browser.new_page()
            page.set_default_timeout(180_000)
            page.goto(address)
            results = page.wait_for_function(  # unlike evaluate, it has a timeout
                """async ([bytes, sentences]) => {
                    const { segment } = await import("./backend.js");
                    const { results } = await segment(new Blob([Uint8Array.from(bytes)]), sentences);
                    return results.map(({ text, probability }) => ({ text, values: Array.from(probability.data) }));
                }""",
                arg=[list((tmp_path / "image.png").read_bytes()), sentences],
            ).json_value()
            page.close()
        expected = Segmenter.from_pretrained(trained / "best", device="cpu").segment(image(), sentences)
        for found, result in zip(results, expected, strict=True):
            assert found["text"] == result.text
            assert np.abs(np.array(found["values"]) - 255 * result.probability.ravel()).max() < 1


class TestCLIP(FamilyContract):
    prefix = "clip"

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, tiny_clip_folder: Path) -> Path:
        return tiny_clip_folder


class TestSigLIP(FamilyContract):
    prefix = "siglip"

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, tiny_siglip_folder: Path) -> Path:
        return tiny_siglip_folder

    def test_site(self, trained: Path, tmp_path: Path):
        """The page does not read SigLIP's tokenizers."""
        from cmmasksd.export import site

        for name in site.ORT_FILES:
            (tmp_path / name).write_text("")
        with pytest.raises(UserError, match="neither CLIP's nor a lower-casing WordPiece"):
            site.write_site(trained / "best", tmp_path / "out", ort=tmp_path)


class TestCLIPResNet(FamilyContract):
    prefix = "clip_resnet"
    patch_size = 16

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, tiny_clip_resnet_folder: Path) -> Path:
        return tiny_clip_resnet_folder

    def test_site(self, backbone: Path, tmp_path: Path):
        """Its tokenizer is CLIP's, so the page runs it."""
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
        pytest.importorskip("onnxruntime", reason="the extra export is not installed")
        from cmmasksd.export import site

        model = CMMaskSDModel.from_backbone(backbone, **TINY_SIZES)
        model.save_pretrained(tmp_path / "model")
        size = {"patch_size": 16, "resize": "warp", "max_tokens": 20}
        CMMaskSDProcessor.from_backbone(backbone, (64, 64), **size).save_pretrained(tmp_path / "model")
        for name in site.ORT_FILES:
            (tmp_path / name).write_text("")
        settings = site.write_site(tmp_path / "model", tmp_path / "out", ort=tmp_path)
        assert settings.patch_size == 16
        assert (tmp_path / "out" / "model" / "image.onnx").is_file()
        assert (tmp_path / "out" / "index.html").is_file()


class TestLite(FamilyContract):
    prefix = "lite"
    patch_size = 16

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, tiny_lite_folder: Path) -> Path:
        return tiny_lite_folder
