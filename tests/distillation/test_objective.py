"""The objective: what each branch may see, where gradients go, how often the model is called, and that nothing of it is
left at inference.

A leak would not crash: a masked branch that can still read what was hidden has an easy task and teaches nothing. So the
tests change what was hidden, hold the masks fixed, and ask for the same bits.
"""

import ast
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cmmasksd.distillation.objective as objective_module
from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.model.correlation import correlation
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens

DIM = 40  # the tiny model's joint space
TEXTS = ["the reddish square", "a blue circle left of the right square", "on the left"]
OWNER = torch.tensor([0, 0, 1])  # two images, three sentences


def pixels(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(seed))


def target() -> Tensor:
    value = torch.zeros(3, 16, 20)
    value[0, 2:9, 3:12] = 1
    value[1, 8:, :] = 0.5
    value[2, :4, 15:] = 1
    return value


@pytest.fixture
def tokens(tiny_processor) -> Tokens:
    return tiny_processor.tokens(TEXTS)


def build(model: nn.Module, **settings: object) -> MaskedSelfDistillation:
    torch.manual_seed(0)
    return MaskedSelfDistillation(model, DistillationConfig(**settings), DIM)


def run(objective: MaskedSelfDistillation, tokens: Tokens, **extra: float) -> dict[str, Tensor]:
    torch.manual_seed(1)  # for random masks
    return objective(pixels(), tokens, target(), OWNER, **extra)


def grads(module: nn.Module) -> dict[str, float]:
    """The largest gradient of every parameter that has one."""
    return {name: p.grad.abs().amax().item() for name, p in module.named_parameters() if p.grad is not None}


def has_gradient(module: nn.Module) -> bool:
    return any(value > 0 for value in grads(module).values())


# ------------------------------------------------------------------------------------------------------- every setting

SWITCHES = [
    {},
    {"vision": False},
    {"language": False},
    {"vision": False, "language": False},
    *({"vision_which": which} for which in ("low", "random")),
    *({"language_which": which} for which in ("low", "random")),
    *({"vision_guide": guide} for guide in ("mean", "sentence")),
    {"correlation": "values"},
    {"correlation": "values", "vision_guide": "sentence", "vision_level": "input"},
    {"vision_ratio": 0.05, "language_ratio": 0.95},
    {"vision_level": "input"},
    {"vision_level": "input", "vision_which": "random"},
    {"vision_level": "blank"},
    {"joint": True},
    {"joint": True, "vision_level": "blank", "vision_which": "random", "language_which": "random", "ground_truth": 0.5},
    {"language_level": "feature"},
    {"hide_single_word": True},
    *({"loss": loss, "temperature": 2.0} for loss in ("kl", "mse", "soft_bce")),
    {"vision_weight": 0.3, "language_weight": 2.5},
    {"share_weights": False},
    {"share_weights": False, "vision": False, "vision_level": "input", "language_level": "feature"},
    {"ground_truth": 0.7},
    {"segmentation": "bce"},
    {"presence": 0.5},
]


def name_of(settings: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "default"


@pytest.mark.parametrize("ramp", [1.0, 0.25])
@pytest.mark.parametrize("settings", SWITCHES, ids=name_of)
def test_every_switch_trains_and_the_parts_sum_to_the_loss(tiny_model, tokens, settings, ramp):
    objective = build(tiny_model.train(), **settings)
    how = objective.settings
    losses = run(objective, tokens, ramp=ramp)
    branches = {"joint"} if how.joint else {name for name in ("lmvsd", "vmlsd") if name in objective.branches}
    expected = {"loss", "seg"} | branches | ({f"{name}_seg" for name in branches} if how.ground_truth else set())
    expected |= {"presence"} if how.presence else set()
    assert losses.keys() == expected
    assert all(value.ndim == 0 and value.isfinite() and value > 0 for value in losses.values())
    weights = {"seg": 1.0, "lmvsd": ramp * how.vision_weight, "vmlsd": ramp * how.language_weight}
    weights |= {"joint": ramp * how.vision_weight, "presence": how.presence}
    weights |= dict.fromkeys(("lmvsd_seg", "vmlsd_seg", "joint_seg"), ramp * how.ground_truth)
    total = sum(weights[name] * value.item() for name, value in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)
    losses["loss"].backward()
    assert all(torch.tensor(value).isfinite() for value in grads(objective).values())
    without = {name for name, p in objective.named_parameters() if p.grad is None}
    assert without == {"model.clip.logit_scale"}


def test_the_switches_are_all_tried():
    """A new setting must enter the list above."""
    tried = {key for settings in SWITCHES for key in settings}
    by_training = {"start", "warmup"}  # which training turns into `ramp`
    assert tried == set(DistillationConfig.__dataclass_fields__) - by_training


CHANGES = [s for s in SWITCHES if s and s != {"hide_single_word": True} and not {"language", "vision"} & s.keys()]


@pytest.mark.parametrize("settings", CHANGES, ids=name_of)
def test_every_switch_changes_something(tiny_model, tokens, settings):
    plain, changed = run(build(tiny_model), tokens), run(build(tiny_model, **settings), tokens)
    if settings == {"share_weights": False}:  # the copies start equal
        assert changed["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-4)
    else:
        assert changed["loss"].item() != pytest.approx(plain["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_the_branches_rest_until_they_have_weight(tiny_model, tokens, shared):
    objective = build(tiny_model.train(), ground_truth=1.0, share_weights=shared)
    losses = run(objective, tokens, ramp=0.0)
    assert losses.keys() == {"loss", "seg"}
    assert losses["loss"].item() == losses["seg"].item()
    losses["loss"].backward()  # data-parallel training waits for a gradient of every parameter
    assert objective.mask_token.grad.eq(0).all()
    assert all(p.grad.eq(0).all() for p in objective.own_decoders.parameters())


def test_the_weights_rise_after_the_start():
    how = DistillationConfig(start=0.5, warmup=0.25)
    assert [how.ramp(at) for at in (0.0, 0.499, 0.5, 0.625, 0.75, 1.0)] == [0, 0, 0, 0.5, 1, 1]
    assert [DistillationConfig(start=0.5, warmup=0.0).ramp(at) for at in (0.49, 0.5)] == [0, 1]


def test_plain_training_is_the_models_own_forward(tiny_model, tokens):
    losses = run(build(tiny_model, vision=False, language=False), tokens)
    logits = tiny_model(pixels(), tokens.input_ids, tokens.attention_mask, tokens.word_ids, OWNER).logits
    expected = objective_module.segmentation_loss(logits, target())
    assert losses["seg"].item() == losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_main_branch_does_not_depend_on_the_others(tiny_model, tokens):
    plain = run(build(tiny_model, vision=False, language=False), tokens)["seg"].item()
    for settings in (
        {},
        {"vision_level": "input"},
        {"vision_level": "blank"},
        {"language_level": "feature"},
        {"joint": True},
        {"share_weights": False},
    ):
        assert run(build(tiny_model, **settings), tokens)["seg"].item() == pytest.approx(plain, rel=1e-5)


def test_sentence_b_goes_with_image_b_by_default(tiny_model, tiny_processor):
    objective, two = build(tiny_model), tiny_processor.tokens(TEXTS[:2])
    given = objective(pixels(), two, target()[:2], torch.arange(2))
    default = objective(pixels(), two, target()[:2])
    assert given["loss"].item() == default["loss"].item()


def test_losses_of_fixed_weights(tiny_model, tokens):
    losses = run(build(tiny_model, loss="kl", temperature=2.0), tokens)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {"loss": 1.53480, "seg": 1.48667, "lmvsd": 0.01726, "vmlsd": 0.03086}, abs=5e-4
    )


@pytest.mark.parametrize(
    "settings", [{}, {"vision_level": "input"}, {"correlation": "values"}, {"share_weights": False}], ids=name_of
)
def test_bfloat16_autocast(tiny_model, tokens, settings):
    objective = build(tiny_model.train(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        losses = run(objective, tokens)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    losses["loss"].backward()
    assert all(torch.tensor(value).isfinite() for value in grads(objective).values())
    exact = run(build(tiny_model.train(), **settings), tokens)
    assert losses["seg"].item() == pytest.approx(exact["seg"].item(), rel=0.05)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("branch", ["lmvsd", "vmlsd"])
def test_the_main_branch_is_a_teacher_without_gradient(tiny_model, tokens, branch):
    """With decoders of its own, a masked branch could reach the main one only through the teacher: it does not."""
    objective = build(tiny_model.train(), share_weights=False)
    run(objective, tokens)[branch].backward()
    assert not has_gradient(tiny_model.decoder)
    assert has_gradient(objective.own_decoders[branch])
    other = "vmlsd" if branch == "lmvsd" else "lmvsd"
    assert not has_gradient(objective.own_decoders[other])
    assert has_gradient(tiny_model.clip)  # the student's path reaches the shared encoders


@pytest.mark.parametrize("branch", ["lmvsd", "vmlsd"])
def test_masked_branches_train_the_shared_decoder(tiny_model, tokens, branch):
    objective = build(tiny_model.train())
    run(objective, tokens)[branch].backward()
    reached = grads(tiny_model.decoder)
    assert reached.keys() == dict(tiny_model.decoder.named_parameters()).keys()
    assert sum(value > 0 for value in reached.values()) > 0.9 * len(reached)


def test_the_mask_token_is_trained_by_its_branch_alone(tiny_model, tokens):
    objective = build(tiny_model)
    losses = run(objective, tokens)
    for branch, trained in (("seg", False), ("vmlsd", False), ("lmvsd", True)):
        gradient = torch.autograd.grad(losses[branch], objective.mask_token, retain_graph=True, allow_unused=True)[0]
        assert (gradient is not None and gradient.abs().amax().item() > 0) == trained


def test_the_main_decoder_is_trained_by_the_ground_truth_when_weights_are_not_shared(tiny_model, tokens):
    objective = build(tiny_model.train(), share_weights=False)
    run(objective, tokens)["seg"].backward()
    assert has_gradient(tiny_model.decoder)
    assert not has_gradient(objective.own_decoders)


def test_own_decoders_start_as_copies_and_are_stored_apart(tiny_model):
    objective = build(tiny_model, share_weights=False)
    assert set(objective.own_decoders) == {"lmvsd", "vmlsd"}
    for own in objective.own_decoders.values():
        for ours, theirs in zip(own.parameters(), tiny_model.decoder.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
    assert set(build(tiny_model, share_weights=False, vision=False).own_decoders) == {"vmlsd"}
    assert not build(tiny_model).own_decoders


def test_separate_weights_need_a_decoder_that_can_be_copied():
    with pytest.raises(UserError, match="copy_decoder"):
        MaskedSelfDistillation(nn.Linear(1, 1), DistillationConfig(share_weights=False), 1)


# --------------------------------------------------------------------------------------------------------------- leaks


@pytest.fixture
def hide_second_word(monkeypatch) -> None:
    """The same mask whatever the correlation says."""
    monkeypatch.setattr(objective_module, "choose_words", lambda _corr, word_ids, *_args, **_kwargs: word_ids == 1)


def say_another_word(tokens: Tokens) -> Tokens:
    """Sentences that differ in their second word only."""
    other = torch.where(tokens.word_ids == 1, (tokens.input_ids + 11) % 500, tokens.input_ids)
    assert not torch.equal(other, tokens.input_ids)
    return replace(tokens, input_ids=other)


def masked_words(objective: MaskedSelfDistillation, tokens: Tokens) -> tuple[TextFeatures, Tensor]:
    """VMLSD's view of the sentences, and its logits."""
    model = objective.model
    image, text = model.encode_image(pixels()).select(OWNER), model.encode_text(tokens)
    view = objective.mask_words(tokens, text, objective.choose_words(tokens, correlation(image, text)))
    return view, model.decode(image, view)


@torch.no_grad()
def test_a_word_hidden_at_the_input_cannot_be_read(tiny_model, tokens, hide_second_word):
    objective = build(tiny_model, language_level="input")
    (a, logits_a), (b, logits_b) = (masked_words(objective, said) for said in (tokens, say_another_word(tokens)))
    for name in ("words", "sentence", "word_mask", "embedded"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(logits_a, logits_b)
    assert not (a.word_mask & (tokens.word_ids == 1)).any()
    assert torch.equal(a.word_mask, (tokens.word_ids >= 0) & (tokens.word_ids != 1))


@torch.no_grad()
def test_a_word_hidden_as_a_feature_leaks_through_the_sentence(tiny_model, tokens, hide_second_word):
    """Why "input" is the default."""
    objective = build(tiny_model, language_level="feature")
    (a, logits_a), (b, logits_b) = (masked_words(objective, said) for said in (tokens, say_another_word(tokens)))
    assert torch.equal(a.word_mask, b.word_mask)
    assert torch.equal(a.word_mask, (tokens.word_ids >= 0) & (tokens.word_ids != 1))
    assert (a.sentence - b.sentence).abs().amax() > 1e-2
    assert (logits_a - logits_b).abs().amax() > 1e-3


@pytest.fixture
def hide_some_patches(monkeypatch) -> Tensor:
    """Of the 4 x 5 patches, these are masked for every sentence."""
    hidden = torch.zeros(3, 20, dtype=torch.bool)
    for row, columns in enumerate(([0, 3, 7, 11], [1, 2, 18, 19], [4, 9, 14, 15])):
        hidden[row, columns] = True
    monkeypatch.setattr(objective_module, "choose_patches", lambda *_: hidden)
    monkeypatch.setattr(objective_module, "masked_patches", lambda *_: 4)
    return hidden


def repaint(images: Tensor, patch: int) -> Tensor:
    row, column = divmod(patch, 5)
    images = images.clone()
    images[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 3
    return images


def masked_image(objective: MaskedSelfDistillation, images: Tensor, tokens: Tokens) -> ImageFeatures:
    """LMVSD's view of the images."""
    image, text = objective.model.encode_image(images).select(OWNER), objective.model.encode_text(tokens)
    hidden = objective.choose_patches(image, text, correlation(image, text))
    return objective.mask_patches(images, OWNER, image, hidden)


@torch.no_grad()
@pytest.mark.parametrize("level", ["input", "blank"])
def test_a_patch_hidden_at_the_input_cannot_be_seen(tiny_model, tokens, hide_some_patches, level):
    objective = build(tiny_model, vision_level=level)
    before = masked_image(objective, pixels(), tokens)
    for row, patch in itertools.product(range(3), range(20)):
        after = masked_image(objective, repaint(pixels(), patch), tokens)
        for name in ("patches", "pixels"):
            assert (
                torch.equal(getattr(after, name)[row], getattr(before, name)[row])
                == hide_some_patches[row, patch].item()
            )


@torch.no_grad()
def test_the_joint_branch_sees_neither_the_patches_nor_the_words(
    tiny_model, tokens, hide_some_patches, hide_second_word, monkeypatch
):
    """The losses are those of a decode of both masked views."""
    objective = build(tiny_model, joint=True, vision_level="input")
    decoded = []
    decode = tiny_model.decode
    monkeypatch.setattr(tiny_model, "decode", lambda *view: (decoded.append(view), decode(*view))[1])
    other = say_another_word(tokens)
    for images, said in ((pixels(), tokens), (repaint(pixels(), 3), other)):
        objective(images, said, target(), OWNER)
    (image_a, text_a), (image_b, text_b) = decoded
    assert len(image_a) == 6  # two branches of three sentences
    assert torch.equal(text_a.words[3:], text_b.words[3:])
    assert torch.equal(image_a.patches[3], image_b.patches[3])  # where patch 3 is hidden
    assert not torch.equal(image_a.patches[4], image_b.patches[4])
    assert not torch.equal(text_a.words[:3], text_b.words[:3])


def test_a_joint_branch_needs_both_modalities():
    with pytest.raises(UserError, match="set vision and language to true"):
        DistillationConfig(joint=True, language=False)


class ClassToken(nn.Module):
    """A network whose decoder also reads the class token, as `context`; its tower drops patches as ours does."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.model, self.encode_text = model, model.encode_text

    def encode_image(self, pixel_values: Tensor, *, keep: Tensor | None = None) -> ImageFeatures:
        features, pooled = self.model.towers.image(pixel_values, keep=keep)
        return replace(features, context=pooled)


@torch.no_grad()
def test_the_context_of_dropped_patches_is_not_seen_either(tiny_model, tokens, hide_some_patches):
    objective = build(ClassToken(tiny_model), vision_level="input")
    before, after = (masked_image(objective, images, tokens) for images in (pixels(), repaint(pixels(), 3)))
    assert before.context is not None
    assert torch.equal(after.context[0], before.context[0])  # dropped for the first sentence
    assert not torch.equal(after.context[1], before.context[1])  # not for the second, of the same image


@torch.no_grad()
def test_a_patch_masked_as_a_feature_leaks_through_the_others(tiny_model, tokens, hide_some_patches):
    """The encoder has mixed it into its neighbours already."""
    objective = build(tiny_model, vision_level="feature")
    before, after = (masked_image(objective, images, tokens) for images in (pixels(), repaint(pixels(), 3)))
    visible = ~hide_some_patches[0]
    assert (after.patches[0, visible] - before.patches[0, visible]).abs().amax() > 1e-2
    assert torch.equal(after.patches[0, ~visible], before.patches[0, ~visible])
    assert torch.equal(after.pixels[0], before.pixels[0])  # each knows of itself alone


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"vision_level": "input"}, {"joint": True, "language_level": "feature"}])
def test_visible_patches_match_the_sentence_in_a_masked_view_as_in_the_whole_image(
    tiny_model, tokens, hide_some_patches, settings
):
    """The mask token's own cosine must not shift what the decoder reads of the patches that stay visible."""
    objective = build(tiny_model, **settings)
    objective.mask_token.copy_(-10 * tiny_model.encode_image(pixels()).patches.mean((0, 1)))  # far from every patch
    matches = []
    layer = tiny_model.decoder.fusion.match_in
    hook = layer.register_forward_pre_hook(lambda _, inputs: matches.append(inputs[0][..., 0]))
    try:
        run(objective, tokens)
    finally:
        hook.remove()
    (together,) = matches
    views = dict(zip(["main", *objective.branches], together.chunk(1 + len(objective.branches)), strict=True))
    main, masked = views["main"], views.get("lmvsd", views.get("joint"))
    torch.testing.assert_close(main, nn.functional.layer_norm(main, main.shape[1:]), rtol=1e-3, atol=1e-3)
    assert (masked[hide_some_patches] == 0).all()
    visible, expected = masked[~hide_some_patches], main[~hide_some_patches]
    if objective.settings.vision_level == "feature":
        torch.testing.assert_close(visible, expected, rtol=1e-4, atol=1e-4)
    else:  # the encoder saw less
        assert torch.corrcoef(torch.stack([visible, expected]))[0, 1] > 0.7
        assert (visible.mean() - expected.mean()).abs() < 0.5


@torch.no_grad()
@pytest.mark.parametrize("level", ["feature", "input"])
def test_masked_patches_become_the_token_and_the_others_stay_in_place(tiny_model, tokens, hide_some_patches, level):
    objective = build(tiny_model, vision_level=level)
    image = tiny_model.encode_image(pixels()).select(OWNER)
    view = masked_image(objective, pixels(), tokens).patches
    assert (view[hide_some_patches] == objective.mask_token).all()
    seen = view[~hide_some_patches]
    if level == "feature":
        assert torch.equal(seen, image.patches[~hide_some_patches])
    else:  # the encoder saw less, and yet each patch is nearer to itself than to any other
        for row in range(3):
            keep = (~hide_some_patches[row]).nonzero().flatten()
            nearest = torch.cdist(view[row, keep], image.patches[row]).argmin(1)
            assert (nearest == keep).float().mean() > 0.7


@torch.no_grad()
@pytest.mark.parametrize("level", ["feature", "input"])
@pytest.mark.parametrize("which", ["high", "low"])
def test_the_patches_that_the_correlation_names_are_masked(tiny_model, tokens, level, which):
    objective = build(tiny_model, vision_level=level, vision_which=which, vision_ratio=0.4)
    image, text = tiny_model.encode_image(pixels()).select(OWNER), tiny_model.encode_text(tokens)
    corr = correlation(image, text)
    view = objective.mask_patches(pixels(), OWNER, image, objective.choose_patches(image, text, corr))
    hidden = (view.patches == objective.mask_token).all(-1)
    scores = corr.masked_fill(~text.word_mask[:, None], -2).amax(-1)
    for row in range(3):
        chosen = scores[row].topk(8, largest=which == "high").indices
        assert set(hidden[row].nonzero().flatten().tolist()) == set(chosen.tolist())


@torch.no_grad()
def test_a_single_word_stays_unless_asked(tiny_model, tiny_processor):
    one = tiny_processor.tokens(["square", "unbelievable", "left"])
    losses = run(build(tiny_model), one)
    assert losses["vmlsd"].item() == pytest.approx(0, abs=1e-6)  # nothing hidden: the view is the main one
    assert run(build(tiny_model, hide_single_word=True), one)["vmlsd"] > 1e-4


# ---------------------------------------------------------------------------------------------------------------- calls


class Recorder(nn.Module):
    """A model that notes each call and the batch it was for."""

    def __init__(self, model: CMMaskSDModel) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def encode_image(self, pixel_values: Tensor, **how: object) -> ImageFeatures:
        self.calls.append(("image", len(pixel_values), *sorted(how)))
        return self.model.encode_image(pixel_values, **how)

    def encode_text(self, tokens: Tokens) -> TextFeatures:
        self.calls.append(("text", len(tokens)))
        return self.model.encode_text(tokens)

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        assert len(image) == len(text)
        self.calls.append(("decode", len(image)))
        return self.model.decode(image, text)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"vision": False, "language": False}, [("image", 2), ("text", 3), ("decode", 3)]),
        ({}, [("image", 2), ("text", 3), ("text", 3), ("decode", 9)]),
        ({"language_level": "feature"}, [("image", 2), ("text", 3), ("decode", 9)]),
        ({"language": False}, [("image", 2), ("text", 3), ("decode", 6)]),
        ({"vision": False}, [("image", 2), ("text", 3), ("text", 3), ("decode", 6)]),
        (
            {"vision_level": "input"},
            [("image", 2), ("image", 3, "keep"), ("text", 3), ("text", 3), ("decode", 9)],
        ),
        ({"correlation": "values"}, [("image", 2, "value_path"), ("text", 3), ("text", 3), ("decode", 9)]),
        # with both branches off there is no correlation to compute
        (
            {"correlation": "values", "vision": False, "language": False},
            [("image", 2), ("text", 3), ("decode", 3)],
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else None,
)
def test_encoders_run_once_and_all_branches_decode_in_one_call(tiny_model, tokens, settings, calls):
    """Two images with three sentences: each image is encoded once, not once per sentence."""
    recorder = Recorder(tiny_model)
    run(build(recorder, **settings), tokens)
    assert Counter(recorder.calls) == Counter(calls)


def test_separate_decoders_are_called_once_each(tiny_model, tokens):
    recorder = Recorder(tiny_model)
    recorder.copy_decoder = tiny_model.copy_decoder
    objective = build(recorder, share_weights=False)
    batches = Counter()
    for name, own in objective.own_decoders.items():
        own.register_forward_pre_hook(lambda _module, args, name=name: batches.update({name: len(args[0])}))
    run(objective, tokens)
    assert ("decode", 3) in recorder.calls
    assert batches == {"lmvsd": 3, "vmlsd": 3}


def test_branches_are_told_apart_in_the_batched_call(tiny_model, tokens):
    """The one call of 3B gives each branch what a call of its own would."""
    shared, apart = (run(build(tiny_model, share_weights=share), tokens) for share in (True, False))
    for name, value in shared.items():
        assert apart[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    assert shared["lmvsd"].item() != pytest.approx(shared["vmlsd"].item(), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ inference


def test_nothing_of_the_distillation_is_left_in_the_model(tiny_model, tokens, tmp_path):
    keys = tiny_model.state_dict().keys()
    objective = build(tiny_model.train(), share_weights=False)
    run(objective, tokens)["loss"].backward()
    names = {name.partition(".")[0] for name, _ in objective.named_parameters()}
    assert names == {"model", "own_decoders", "mask_token"}
    assert tiny_model.state_dict().keys() == keys
    tiny_model.save_pretrained(tmp_path)
    loaded = CMMaskSDModel.from_pretrained(tmp_path)  # which refuses any weight too many
    assert loaded.state_dict().keys() == keys
    assert "distil" not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_inference_is_the_same_with_distillation_on_or_off(tiny_model, tokens):
    before = tiny_model(pixels(), tokens.input_ids, tokens.attention_mask, tokens.word_ids, OWNER).logits
    for settings in ({}, {"share_weights": False}, {"vision_level": "input", "correlation": "values"}):
        objective = build(tiny_model, **settings)
        run(objective, tokens)
        after = objective.model(pixels(), tokens.input_ids, tokens.attention_mask, tokens.word_ids, OWNER).logits
        assert torch.equal(after, before)


def test_without_vision_the_objective_adds_no_parameter(tiny_model):
    own = len(list(tiny_model.parameters()))
    assert len(list(build(tiny_model, vision=False).parameters())) == own
    assert len(list(build(tiny_model).parameters())) == own + 1


def imports(folder: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that the files of a package import from cmmasksd, wherever in the file."""
    found = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names if alias.name.startswith("cmmasksd")}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: a relative import escapes this test"
                found |= {(node.module, a.name) for a in node.names if node.module.startswith("cmmasksd")}
    return found


def test_the_objective_imports_nothing_of_our_network():
    """Plug-in: of `cmmasksd.model` it may know the three data classes that pass between the parts, their correlation
    and the presence of logits, and no more."""
    package = Path(objective_module.__file__).parent
    of_model = {pair for pair in imports(package) if pair[0].startswith("cmmasksd.model") or pair[0] == "cmmasksd"}
    expected = {("cmmasksd.model.towers.base", name) for name in ("ImageFeatures", "TextFeatures", "Tokens")}
    expected |= {("cmmasksd.model.correlation", name) for name in ("correlation", "sentence_correlation")}
    expected |= {("cmmasksd.model.presence", "presence")}
    assert of_model == expected


def test_the_network_knows_nothing_of_the_objective():
    source = Path(objective_module.__file__).parents[1]
    for package in ("model", "inference", "evaluation", "serving"):
        assert imports(source / package)
        assert not [pair for pair in imports(source / package) if "distillation" in pair[0]]
