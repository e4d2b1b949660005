"""Write the mean of several models' weights. For trainings that start from one model it is often better than each.

python tools/mean.py runs/mean runs/a/last runs/b/last
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cmmasksd.model.modeling import CMMaskSDModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; its other files are those of the first model")
    parser.add_argument("models", type=Path, nargs="+", help="folders of trained models")
    options = parser.parse_args()
    mean, *others = (CMMaskSDModel.from_pretrained(folder) for folder in options.models)
    weights = mean.state_dict()
    for other in others:
        for name, value in other.state_dict().items():
            weights[name] += value
    mean.load_state_dict({name: value / len(options.models) for name, value in weights.items()})
    shutil.copytree(options.models[0], options.out, ignore=shutil.ignore_patterns("model.safetensors", "state.pt"))
    mean.save_pretrained(options.out)


if __name__ == "__main__":
    main()
