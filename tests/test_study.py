"""The ablation study: its plan, three small runs, resuming one, and a page that follows from the files."""

import gzip
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "ablation"
MICRO = {
    "data.val_references": 6, "data.scene_size": 64, "data.workers": 0, "model.size": (64, 64),
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
        config = study.config(study.settings(run, Path("trunk")), out="runs/x")
        assert config.training.seed == config.data.scene_seed == run.seed
        assert config.training.out == "runs/x"
        assert (config.model.weights is None) is (run.regime == "clip")


def test_the_settings_mean_the_same_on_the_command_line(study):
    """run.json records them as keys, so that a run can be repeated with `cmmasksd train`."""
    from cmmasksd.cli.dispatch import build_parser
    from cmmasksd.cli.options import run_config

    for run in (study.Run("two-passes", "trained", seed=2), study.Run("both")):
        values = study.settings(run, Path("trunk"))
        keys = [f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in values.items()]
        parser = build_parser()
        parsed = parser.instantiate(parser.parse_args(["train", *keys]))
        assert run_config(parsed["train"]) == study.config(values)


def test_the_headline_has_five_seeds_and_its_controls(study):
    def seeds(arm):
        wanted = ("trained", arm, study.SIZE)
        return {run.seed for run in study.plan() if (run.regime, run.arm, run.references) == wanted}

    assert seeds("none") == seeds("both") == seeds("random") == seeds(study.EQUAL_COMPUTE) == set(range(5))


def test_equal_compute_gets_the_branches_share(study):
    for name, regime in study.REGIMES.items():
        plain, more = (
            study.settings(study.Run(arm, name), Path("trunk"))["training.epochs"]
            for arm in ("none", study.EQUAL_COMPUTE)
        )
        assert plain * study.SIZE == regime.draws
        assert 1.2 < more / plain < 2.5
    assert study.settings(study.Run(study.EQUAL_COMPUTE), Path())["distillation.vision"] is False


@pytest.fixture(scope="module")
def finished(study, tiny_clip_folder, tmp_path_factory):
    """Three micro runs, the second of which was interrupted between training and scoring; and the calls they made."""
    from cmmasksd.evaluation import score as scoring
    from cmmasksd.training import loop

    folder = tmp_path_factory.mktemp("study")
    results, work = folder / "results", folder / "work"
    results.mkdir()
    trained, scored, train, score = [], [], loop.train, scoring.score

    def recorded_train(config):
        trained.append(config.training.resume)
        return train(config)

    def recorded_score(config, out):
        if interrupted:
            raise KeyboardInterrupt
        scored.append(Path(config.model).name)
        return score(config, out)

    small = {
        "overrides": MICRO | {"model.backbone": str(tiny_clip_folder)},
        "scoring": study.SCORING | {"references": 6, "scene_size": 64},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", recorded_train)
        patch.setattr(scoring, "score", recorded_score)
        interrupted = False
        study.execute(study.Run("none", "trained"), results, work, **small)
        interrupted, run = True, study.Run("both", "trained")
        with pytest.raises(KeyboardInterrupt):
            study.execute(run, results, work, **small)
        assert not (results / run.name).exists()
        interrupted = False
        study.execute(run, results, work, **small)
        study.execute(study.Run("both", "trained", seed=1), results, work, **small)
    return results, trained, scored


def test_a_run_leaves_its_record_and_its_rows(study, finished):
    results, trained, scored = finished
    names = [f"trained-{name}" for name in ("none-n500-s0", "both-n500-s0", "both-n500-s1")]
    assert [run.name for run in study.done(results)] == names
    records = [json.loads((results / name / "run.json").read_text()) for name in names]
    assert [record["resumed"] for record in records] == [False, True, False]
    for name, record in zip(names, records, strict=True):
        assert record["settings"]["model.weights"] == "trunk"  # no path of this machine
        assert record["scores"].keys() == {"val", "testB"}
        packed = (results / name / "testB.jsonl.gz").read_bytes()
        assert record["scores"]["testB"]["expressions"] == len(gzip.decompress(packed).splitlines()) > 0
    assert trained == [False, False, False, True, False]  # the trunk once, then the runs
    assert scored == ["last"] * 6


def test_the_page_follows_from_the_files(page, finished):
    results = finished[0]
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


def test_the_images_follow_from_the_files(page, finished, tmp_path):
    files = page.draw(page.Study(finished[0], resamples=200), tmp_path)
    assert {file.name for file in files} == {"arms.svg", "sizes.svg", "losses.svg"}
    assert all(file.read_text().startswith("<?xml") for file in files)


def test_a_template_that_asks_for_what_is_not_there(page, finished):
    with pytest.raises(AttributeError, match="say_tabel"):
        page.fill("{{tabel trained 500}}", page.Study(finished[0]))


def test_what_the_correlation_points_at(study, finished, tmp_path, monkeypatch, capsys):
    """Figures of a CLIP and of a model with branches, within their bounds."""
    model = finished[0].parent / "work" / "trained-both-n500-s0" / "last"
    arguments = ["tiny=tiny", f"both={model}", "--references", "12", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["correlation.py", *arguments])
    load("correlation").main()
    models = json.loads((tmp_path / "correlation.json").read_text())
    assert models.keys() == {"tiny", "both"}
    assert {key for key in models["both"] if key.startswith("branch")} == {
        "branch main",
        "branch lmvsd",
        "branch vmlsd",
    }
    for figures in models.values():
        assert figures["hidden object high max"] + figures["hidden object low max"] == pytest.approx(100, abs=0.1)
        assert 0 < figures["pointing at random"] < 15
    assert models["tiny"]["hidden object high max"] > models["tiny"]["hidden object low max"]
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

    def scores(model):
        kept = {name for name, value in load_file(model / "model.safetensors").items() if value.equal(early[name])}
        scored.append(sorted({".".join(name.split(".")[:2]) for name in kept if name.startswith("clip.")}))
        return {}

    monkeypatch.setattr(towers, "scores", scores)
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
    assert "unknown arm bohth: choose from none, lmvsd" in capsys.readouterr().err


def test_the_list_says_what_is_done(study, finished, monkeypatch, capsys):
    results = finished[0]
    monkeypatch.setattr(sys, "argv", ["study.py", "list", "--results", str(results), "--only", "both"])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "done  trained-both-n500-s0"
    assert lines[-1].startswith("2 of ")
