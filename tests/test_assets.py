"""Models that ship with the package, by name."""

import hashlib
from pathlib import Path

import pytest

from cmmasksd.assets import SHIPPED, located


def test_a_shipped_name_is_a_folder_of_the_package():
    assert (Path(located("tiny")) / "config.json").is_file()


@pytest.mark.parametrize("name", ["./scenes", "runs/demo/best", "openai/clip-vit-base-patch16", Path("scenes")])
def test_any_other_name_stays_as_it_is(name):
    assert located(name) == name


def test_no_shipped_file_is_larger_than_15_mb():
    for name in SHIPPED:
        folder = Path(located(name))
        assert sum(file.stat().st_size for file in folder.glob("*")) < 15e6


def test_the_card_of_a_shipped_model_names_its_weights():
    for name in SHIPPED:
        folder = Path(located(name))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert digest in (folder / "README.md").read_text()
