"""Loss terms by hand, and their numbers for fixed logits."""

import math

import pytest
import torch
from torch import Tensor

from cmmasksd.distillation.losses import distillation_loss, presence_loss, segmentation_loss

KINDS = ["kl", "mse", "soft_bce"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def logits(*values: float) -> Tensor:
    return torch.tensor([[values]])  # (1, 1, w)


# -------------------------------------------------------------------------------------------------------- distillation

STUDENT, TEACHER = (0.3, -2.0, 1.5, 0.0), (1.0, -1.0, -0.5, 3.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_by_hand(temperature):
    parts = [
        bernoulli_kl(sigmoid(t / temperature), sigmoid(s / temperature)) for s, t in zip(STUDENT, TEACHER, strict=True)
    ]
    expected = sum(parts) / 4 * temperature**2
    loss = distillation_loss(logits(*STUDENT), logits(*TEACHER), "kl", temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_is_the_kl_plus_the_teachers_entropy(temperature):
    mean = sum(entropy(sigmoid(t / temperature)) for t in TEACHER) / 4 * temperature**2
    kl, soft = (distillation_loss(logits(*STUDENT), logits(*TEACHER), kind, temperature) for kind in ("kl", "soft_bce"))
    assert (soft - kl).item() == pytest.approx(mean, rel=1e-5)


def test_mse_by_hand():
    expected = sum((sigmoid(s) - sigmoid(t)) ** 2 for s, t in zip(STUDENT, TEACHER, strict=True)) / 4
    assert distillation_loss(logits(*STUDENT), logits(*TEACHER), "mse").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_agreement_costs_nothing(kind):
    same = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)) * 4
    assert distillation_loss(same, same, kind, 2.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_is_the_minimum(kind):
    teacher = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    student = teacher.clone().requires_grad_()
    distillation_loss(student, teacher, kind, 2.0).backward()
    assert student.grad.abs().amax() < 1e-6
    for shift in (-0.3, 0.3):
        assert distillation_loss(teacher + shift, teacher, kind) > distillation_loss(teacher, teacher, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient(kind):
    student, teacher = logits(*STUDENT).requires_grad_(), logits(*TEACHER).requires_grad_()
    distillation_loss(student, teacher, kind).backward()
    assert teacher.grad is None
    assert student.grad.abs().amin() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_stay_finite(kind):
    student = torch.tensor([[[300.0, -300.0, 0.0]]], requires_grad=True)
    loss = distillation_loss(student, -student.detach(), kind)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind):
    loss = distillation_loss(logits(*STUDENT).bfloat16(), logits(*TEACHER).bfloat16(), kind)
    assert loss.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- segmentation


def test_bce_by_hand():
    target = (1.0, 0.0, 0.25, 1.0)
    parts = [
        -y * math.log(sigmoid(z)) - (1 - y) * math.log(1 - sigmoid(z)) for z, y in zip(STUDENT, target, strict=True)
    ]
    loss = segmentation_loss(logits(*STUDENT), logits(*target), "bce")
    assert loss.item() == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_dice_by_hand_and_per_expression():
    """The mean of two Dice losses, not the Dice loss of both together: a small object counts as much as a large one."""
    z = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])  # every probability is a half
    y = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    dice = segmentation_loss(z, y, "bce_dice") - segmentation_loss(z, y, "bce")
    small = 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    large = 1 - (2 * 2.0 + 1) / (2 + 4 + 1)
    assert dice.item() == pytest.approx((small + large) / 2, rel=1e-5)


def test_a_perfect_prediction_costs_nothing():
    y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert segmentation_loss((y * 2 - 1) * 50, y).item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss((1 - y * 2) * 50, y).item() > 10


def test_losses_of_fixed_logits():
    """Numbers of every kind at once, so that no change of a loss is unnoticed."""
    grid = torch.linspace(-3, 3, 2 * 6 * 5).reshape(2, 6, 5)
    student, teacher, target = grid.sin() * 2, grid * 1.5, (grid > 0.4).float()
    numbers = {
        "bce": segmentation_loss(student, target, "bce"),
        "bce_dice": segmentation_loss(student, target, "bce_dice"),
        "kl": distillation_loss(student, teacher, "kl"),
        "kl at 2": distillation_loss(student, teacher, "kl", 2.0),
        "mse": distillation_loss(student, teacher, "mse"),
        "soft_bce": distillation_loss(student, teacher, "soft_bce"),
        "presence": presence_loss(student, target),
    }
    assert {name: value.item() for name, value in numbers.items()} == pytest.approx(
        {
            "bce": 0.29632,
            "bce_dice": 0.44845,
            "kl": 0.08285,
            "kl at 2": 0.21854,
            "mse": 0.02361,
            "soft_bce": 0.42759,
            "presence": 0.38529,
        },
        abs=1e-4,
    )


# ------------------------------------------------------------------------------------------- sentences without a target


def test_a_sentence_that_names_nothing_has_no_dice():
    grid = torch.linspace(-3, 3, 2 * 16).reshape(2, 4, 4)
    target = torch.zeros(2, 4, 4)
    target[1, :2] = 1
    both, named = (segmentation_loss(grid[part], target[part]) for part in (slice(0, 2), slice(1, 2)))
    bce = [segmentation_loss(grid[part], target[part], "bce") for part in (slice(0, 2), slice(1, 2))]
    assert (both - bce[0]).item() == pytest.approx((named - bce[1]).item(), abs=1e-6)
    nothing = segmentation_loss(grid[:1], target[:1])
    assert nothing.item() == pytest.approx(segmentation_loss(grid[:1], target[:1], "bce").item())


def test_presence_is_learnt_from_both_kinds():
    """Its gradient raises the surest cells where there is an object and lowers them where there is none."""
    grid = torch.zeros(2, 32, 32, requires_grad=True)
    target = torch.zeros(2, 32, 32)
    target[1, :8] = 1
    loss = presence_loss(grid, target)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4)
    loss.backward()
    assert grid.grad is not None
    assert grid.grad[0].sum() > 0 > grid.grad[1].sum()
    assert (grid.grad != 0).sum() == 2 * (32 * 32 // 256)
