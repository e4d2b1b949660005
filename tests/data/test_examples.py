"""The example images: the shipped models find what their sentences name."""

import numpy as np
import pytest
from PIL import Image

from cmmasksd.cli import main
from cmmasksd.data import examples
from cmmasksd.data.examples import photographs, write_examples
from cmmasksd.errors import UserError
from cmmasksd.inference.predictor import Segmenter

PHOTOGRAPHS = ["chelsea.png", "coffee.png", "astronaut.png"]


def test_the_shipped_model_finds_something_for_every_sentence(tmp_path):
    segmenter = Segmenter.from_pretrained("scenes")
    written = write_examples(tmp_path)
    assert [file.name for file, _ in written] == [*PHOTOGRAPHS, "shapes-1.png", "shapes-2.png", "shapes-3.png"]
    for file, sentences in written[len(PHOTOGRAPHS) :]:
        assert np.asarray(Image.open(file)).shape == (256, 256, 3)
        for found in segmenter.segment(file, sentences):
            assert found.score > 0.8, (file, found.text)
            assert 0.005 < found.mask.mean() < 0.2, (file, found.text)


def test_photos_finds_what_is_on_photographs():
    segmenter = Segmenter.from_pretrained("photos")
    files = {file.name: file for file, _ in photographs()}
    (cat,) = segmenter.segment(files["chelsea.png"], "the cat")
    assert cat.presence > 0.7
    assert 0.25 < cat.mask.mean() < 0.95
    (cup,) = segmenter.segment(files["coffee.png"], ["the cup"])
    assert segmenter.segment(files["astronaut.png"], "hair")[0].mask[:250].any()
    rows, columns = np.nonzero(cup.mask)
    assert 0.3 < rows.mean() / cup.mask.shape[0] < 0.7
    assert 0.3 < columns.mean() / cup.mask.shape[1] < 0.7


def test_without_scikit_image_there_are_shapes_only(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "find_spec", lambda name: None)
    assert photographs() == []
    assert len(write_examples(tmp_path)) == 3


def test_the_command_names_each_file_with_its_sentences(tmp_path, capsys):
    assert main(["examples", "--out", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PHOTOGRAPHS) + 3
    assert lines[0] == f"{tmp_path / 'new' / 'chelsea.png'}: 'the cat'"
    assert lines[-3] == f"{tmp_path / 'new' / 'shapes-1.png'}: 'left circle', 'circle top', 'plain yellow thing'"
    assert main(["examples", "--out", str(tmp_path / "new")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_no_file_is_overwritten(tmp_path):
    (tmp_path / "shapes-2.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"shapes-2\.png already exists"):
        write_examples(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["shapes-2.png"]
