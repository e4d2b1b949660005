"""What must not change without a decision: generated scenes, the weights' names, a fixed scoring run, the command line.

The values are in `pinned/`. `python tests/test_pinned.py` writes them anew, and the diff shows what changed.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PINNED = Path(__file__).parent / "pinned"
MODELS = ("scenes", "tiny")
COMMANDS = (
    *("demo", "train", "evaluate", "compare", "predict", "export", "serve", "explain", "data"),
    *("data scenes", "data expressions"),
    *("convert", "examples", "pretrain", "push", "report", "completion"),
)


def scenes() -> dict[str, dict[str, str]]:
    """Style and split -> SHA-256 of ids and sentences, of the images, and of the masks, for 60 references."""
    from cmmasksd.config import SplitConfig
    from cmmasksd.data.datasets import open_dataset
    from cmmasksd.data.scenes import STYLES

    pinned = {}
    for style in STYLES:
        for split in ("train", "val", "testA", "testB"):
            data = open_dataset(SplitConfig(style, split, references=60, scene_seed=0, scene_size=96))
            digests = {name: hashlib.sha256() for name in ("sentences", "images", "masks")}
            for index in range(len(data)):
                reference = data[index]
                said = [(expression.sent_id, expression.text) for expression in reference.expressions]
                digests["sentences"].update(
                    repr((reference.ref_id, reference.image_id, reference.ann_ids, said)).encode()
                )
                digests["images"].update(data.image(reference).tobytes())
                digests["masks"].update(data.mask(reference).tobytes())
            pinned[f"{style} {split}"] = {name: digest.hexdigest() for name, digest in digests.items()}
    return pinned


def weights() -> dict[str, dict[str, list[int]]]:
    """Shipped model -> name and shape of every weight."""
    from safetensors import safe_open

    from cmmasksd.assets import located

    pinned = {}
    for name in MODELS:
        with safe_open(Path(located(name)) / "model.safetensors", "pt") as file:
            pinned[name] = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
    return pinned


def scoring() -> dict[str, Any]:
    """The shipped model on 12 generated references: what `evaluate` writes, the model's own digest left out."""
    import tempfile

    from cmmasksd import cli

    with tempfile.TemporaryDirectory() as out:
        command = ["evaluate", "--model", "scenes", "--data", "scenes", "--split", "val", "--references", "12"]
        assert cli.main([*command, "--out", out]) == 0
        results = json.loads((Path(out) / "results.json").read_text())
        rows = [json.loads(line) for line in (Path(out) / "expressions.jsonl").read_text().splitlines()]
    return {"results": results, "expressions": rows}


def options() -> dict[str, list[str]]:
    """Command -> every option of its `--help`."""
    import contextlib
    import io
    import re

    from cmmasksd import cli

    pinned = {}
    for command in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.main([*command.split(), "--help"])
        pinned[command] = sorted(set(re.findall(r"(?<![\w-])--[\w.]+(?<!\.)", text.getvalue())))
    return pinned


def read(name: str) -> Any:
    return json.loads((PINNED / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pinned", [scenes, weights, options], ids=lambda pinned: pinned.__name__)
def test_nothing_has_moved(pinned: Callable[[], Any]):
    assert pinned() == read(pinned.__name__)


def test_a_fixed_run_scores_the_same():
    """Keys, sentences and truth to the digit; pixel counts as far as processors agree."""
    now, then = scoring(), read("scoring")
    assert list(now["results"]) == list(then["results"])
    for key, value in then["results"].items():
        if isinstance(value, float):
            assert now["results"][key] == pytest.approx(value, abs=0.14 if key.startswith("P@") else 0.02)
        else:
            assert now["results"][key] == value
    assert len(now["expressions"]) == len(then["expressions"])
    for row, expected in zip(now["expressions"], then["expressions"], strict=True):
        assert list(row) == list(expected)
        for key in ("intersection", "union"):
            assert row.pop(key) == pytest.approx(expected.pop(key), abs=0.01 * expected["target"] + 3)
        assert row.pop("IoU") == pytest.approx(expected.pop("IoU"), abs=0.02)
        assert row == expected


if __name__ == "__main__":
    PINNED.mkdir(exist_ok=True)
    for make in (scenes, weights, options, scoring):
        text = json.dumps(make(), indent=1, ensure_ascii=False) + "\n"
        (PINNED / f"{make.__name__}.json").write_text(text, encoding="utf-8")
    sys.exit()
