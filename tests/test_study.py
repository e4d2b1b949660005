"""The ablation study: its plan, one run of it, what is not run twice, and a page that follows from the files."""

import gzip
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from cmmasksd import cli
from cmmasksd.config import Config

FOLDER = Path(__file__).parents[1] / "benchmarks" / "ablation"
MICRO = {
    "data.val_references": 6, "data.scene_size": 64, "data.workers": 0, "model.size": "[64,64]",
    "model.max_tokens": 20, "model.decoder_width": 32, "model.decoder_layers": 1, "model.decoder_heads": 2,
    "model.decoder_mlp": 32, "model.head_width": 16, "training.batch": 6, "training.warmup_steps": 1,
    "training.epochs": 1, "data.train_references": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def study():
    return load("study")


@pytest.fixture(scope="module")
def page(study):
    return load("page")


def load(name):
    file = next(folder / f"{name}.py" for folder in (FOLDER, FOLDER.parent) if (folder / f"{name}.py").is_file())
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_every_run_is_declared_once_and_its_settings_are_real(study):
    runs = study.plan()
    assert len({run.name for run in runs}) == len(runs)
    assert {run.arm for run in runs} == {*study.ARMS, study.EQUAL_COMPUTE}
    for run in runs:
        config = Config()
        for key, value in study.settings(run, Path("trunk")).items():
            part, name = key.split(".")
            assert hasattr(getattr(config, part), name), key
            setattr(getattr(config, part), name, value)
        config.distillation.__post_init__()
        config.training.__post_init__()


def test_the_headline_has_five_seeds_and_its_controls(study):
    def seeds(arm):
        wanted = ("trained", arm, study.SIZE)
        return {run.seed for run in study.plan() if (run.regime, run.arm, run.references) == wanted}

    assert seeds("none") == seeds("both") == seeds("random") == seeds(study.EQUAL_COMPUTE) == set(range(5))


def test_equal_compute_gets_the_branches_share(study):
    for regime, how in study.REGIMES.items():
        plain, more = (
            study.settings(study.Run(arm, regime), Path("trunk"))["training.epochs"]
            for arm in ("none", study.EQUAL_COMPUTE)
        )
        assert plain * study.SIZE == how.draws
        assert 1.2 < more / plain < 2.5
    assert study.settings(study.Run(study.EQUAL_COMPUTE), Path())["distillation.vision"] is False


@pytest.fixture(scope="module")
def finished(study, tiny_clip_folder, tmp_path_factory):
    """Three micro runs, the second of which was cut off between training and scoring."""
    place = tmp_path_factory.mktemp("study")
    results, work = place / "results", place / "work"
    results.mkdir()
    extra = [f"--{key}={value}" for key, value in (MICRO | {"model.backbone": tiny_clip_folder}).items()]
    typed = []

    def call(*arguments):
        typed.append([str(argument) for argument in arguments])
        if cut and arguments[0] == "evaluate":
            raise KeyboardInterrupt
        size = ["--scene_size", "64"] if arguments[0] == "evaluate" else []
        assert cli.main([*typed[-1], *size]) == 0

    for run in (study.Run("none", "trained"), study.Run("both", "trained"), study.Run("both", "trained", seed=1)):
        cut = run.seed == 1
        try:
            study.execute(run, results, work, call=call, extra=extra, scored=6)
        except KeyboardInterrupt:
            assert not (results / run.name).exists()
            cut = False
            study.execute(run, results, work, call=call, extra=extra, scored=6)
    return results, typed


def test_a_run_leaves_its_record_and_its_rows(study, finished):
    results, typed = finished
    names = [f"trained-{name}" for name in ("none-n500-s0", "both-n500-s0", "both-n500-s1")]
    assert [run.name for run in study.done(results)] == names
    record = json.loads((results / names[2] / "run.json").read_text())
    assert record["resumed"] is True
    assert record["settings"]["model.weights"] == "trunk"  # no path of this machine
    assert record["scores"].keys() == {"val", "testB"}
    packed = (results / names[1] / "testB.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    assert record["scores"]["testB"]["expressions"] == len(rows)
    trained = [arguments for arguments in typed if arguments[0] == "train"]
    assert len(trained) == 1 + 4  # the trunk once, and one run twice
    assert sum("--resume" in arguments for arguments in trained) == 1
    assert all("last" in arguments[2] for arguments in typed if arguments[0] == "evaluate")


def test_the_page_follows_from_the_files(page, finished):
    results, _ = finished
    text = page.fill("{{runs}} runs\n{{table trained 500}}", page.Study(results, resamples=200))
    assert text.startswith("3 runs\n")
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line
    }
    both = [json.loads((results / f"trained-both-n500-s{seed}" / "run.json").read_text())["scores"] for seed in (0, 1)]
    mean = 50 * sum(scores["val"]["oIoU"] for scores in both)
    assert rows["both"][1] == "2"
    assert rows["both"][2].startswith(f"{mean:.2f} ± ")
    none = json.loads((results / "trained-none-n500-s0" / "run.json").read_text())["scores"]
    paired = 100 * (both[0]["val"]["oIoU"] - none["val"]["oIoU"])  # the second seed has no plain run to be paired with
    assert float(rows["both"][6].split()[0].replace("−", "-")) == pytest.approx(paired, abs=0.01)
    seeds = page.Study(results).say_seeds("trained", "500", "both", "none", "val", "oIoU")
    assert float(seeds.replace("−", "-")) == pytest.approx(paired, abs=0.01)
    assert rows["none"][1] == "1"


def test_the_page_in_the_docs_is_that_of_the_results(page):
    made = page.fill((FOLDER / "ablation.md.in").read_text(), page.Study(FOLDER / "results"))
    assert (FOLDER.parents[1] / "docs" / "ablation.md").read_text() == made


def test_the_pictures_follow_from_the_files(page, finished, tmp_path):
    files = page.draw(page.Study(finished[0], resamples=200), tmp_path)
    assert {file.name for file in files} == {"arms.svg", "sizes.svg", "losses.svg"}
    assert all(file.read_text().startswith("<?xml") for file in files)


def test_a_template_that_asks_for_what_is_not_there(page, finished):
    with pytest.raises(AttributeError, match="say_tabel"):
        page.fill("{{tabel trained 500}}", page.Study(finished[0]))


def test_what_the_correlation_points_at(study, finished, tmp_path, monkeypatch, capsys):
    """Of a CLIP, and of a model with branches; the numbers keep to what they must."""
    model = finished[0].parent / "work" / "trained-both-n500-s0" / "last"
    given = ["tiny=tiny", f"both={model}", "--references", "12", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["correlation.py", *given])
    load("correlation").main()
    found = json.loads((tmp_path / "correlation.json").read_text())
    assert found.keys() == {"tiny", "both"}
    assert {key for key in found["both"] if key.startswith("branch")} == {"branch main", "branch lmvsd", "branch vmlsd"}
    for own in found.values():
        assert own["hidden object high max"] + own["hidden object low max"] == pytest.approx(100, abs=0.1)
        assert 0 < own["pointing at random"] < 15
    assert found["tiny"]["hidden object high max"] > found["tiny"]["hidden object low max"]
    assert "tiny" in load("page").Study(tmp_path).say_looks("pointing").splitlines()[0]
    capsys.readouterr()


def test_towers_are_put_back_one_at_a_time(tiny_model_folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    towers = load("text_tower")
    late = shutil.copytree(tiny_model_folder, tmp_path / "late") / "model.safetensors"
    early = load_file(late)
    save_file({name: value + 1 for name, value in early.items()}, late, metadata={"format": "pt"})
    (tmp_path / "results").mkdir()
    scored = []

    def score(model, work):
        kept = {name for name, value in load_file(model / "model.safetensors").items() if value.equal(early[name])}
        scored.append(sorted({".".join(name.split(".")[:2]) for name in kept if name.startswith("clip.")}))
        return {}

    monkeypatch.setattr(towers, "score", score)
    monkeypatch.setattr(towers, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["text_tower.py", str(tiny_model_folder), str(late.parent)])
    towers.main()
    text, image = ["clip.text_model", "clip.text_projection"], ["clip.vision_model", "clip.visual_projection"]
    assert scored == [["clip.logit_scale", *text, *image], [], text, image]
    assert len(json.loads((tmp_path / "results" / "text_tower.json").read_text())) == 4


@pytest.mark.slow
def test_the_step_of_the_full_size_is_timed(page, tmp_path, monkeypatch, capsys):
    given = ["--size", "64", "--turns", "2", "--arms", "both", "--device", "cpu", "--out", str(tmp_path / "step.json")]
    monkeypatch.setattr(sys, "argv", ["step.py", *given])
    load("step").main()
    arms = json.loads((tmp_path / "step.json").read_text())["arms"]
    assert arms.keys() == {"none", "both"}
    assert arms["none"]["ratios"] == [1.0, 1.0]
    assert arms["both"]["tflop"] > arms["none"]["tflop"] > 0
    assert "both" in page.Study(tmp_path).say_steps()


def test_an_arm_that_is_not_there(study, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "run", "--only", "bohth"])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    assert "there is no arm bohth: choose from none, lmvsd" in capsys.readouterr().err


def test_the_list_says_what_is_done(study, finished, monkeypatch, capsys):
    results, _ = finished
    monkeypatch.setattr(sys, "argv", ["study.py", "list", "--results", str(results), "--only", "both"])
    study.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "done  trained-both-n500-s0"
    assert shown[-1].startswith("2 of ")
