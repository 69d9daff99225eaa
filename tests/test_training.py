"""The trainer: data order, steps, scores and logs, run folders, and the command line's errors."""

import csv
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import TINY_SETTINGS, tiny_config, untrained_specialists
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tiger_fast import experts, profiler_ranges
from tiger_fast.__main__ import main as command
from tiger_fast._files import write_whole
from tiger_fast.data import HELDOUT_OFFSET, CachedSamples, Scenes
from tiger_fast.metrics.routing import RoutingStatistics
from tiger_fast.models import TIGER
from tiger_fast.training import AtomicCheckpointIO, RunCSV, SceneData, TIGERModule
from tiger_fast.training.callbacks import ENTROPY_SHARE, RoutingCollapse, RoutingHealth, collapse
from tiger_fast.training.datamodule import EvaluationBatches, TrainBatches
from tiger_fast.training.module import rate_share
from tiger_fast.training.runfolder import RunFolder, RunFolderError

EXPERTS = ["geometry", "appearance"]


def tiny_model(**changes: Any) -> TIGER:
    torch.manual_seed(0)
    return TIGER.from_preset("tiger-tiny", experts=untrained_specialists(EXPERTS), **{**TINY_SETTINGS, **changes})


def trainer(**options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "enable_model_summary": False, "num_sanity_val_steps": 0, "max_steps": 1}
    return lightning.Trainer(**{**quiet, **defaults, **options})


def tiny_data(**options: Any) -> SceneData:
    return SceneData(**{"train_size": 8, "val_size": 5, "batch_size": 4, "workers": 0, **options})


@pytest.fixture(autouse=True)
def _untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "load_specialists", untrained_specialists)
    # Frozen experts are in eval mode, as they should be; and a tiny set of steps is smaller than any logging interval.
    warnings.filterwarnings("ignore", message=".*module.*in eval mode.*")


# -- data ------------------------------------------------------------------------------------------------------------


class Numbered:
    """In place of CachedSamples: a batch is its indices."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"number": indices}


def take(batches: Any, count: int) -> list[list[int]]:
    return [batch["number"].tolist() for batch, _ in zip(batches, range(count), strict=False)]


def test_a_pass_visits_every_sample_once_and_passes_differ():
    first, second = (sum(part, []) for part in _halves(take(TrainBatches(Numbered(12), 3, seed=4), 8)))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def _halves(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def test_two_ranks_see_the_batches_of_one_process():
    whole = take(TrainBatches(Numbered(23), 6, seed=1), 9)
    parts = [take(TrainBatches(Numbered(23), 3, seed=1, rank=rank, world=2), 9) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_batches_go_on_from_any_step_also_within_a_pass():
    whole = take(TrainBatches(Numbered(23), 4, seed=1), 14)
    for step in range(13):
        batches = TrainBatches(Numbered(23), 4, seed=1)
        iterator = iter(batches)
        for _ in range(step):
            next(iterator)
        resumed = TrainBatches(Numbered(23), 4, seed=1)
        resumed.load_state_dict(batches.state_dict())
        assert take(resumed, 14 - step) == whole[step:]


def test_a_checkpoint_of_another_order_is_refused():
    state = TrainBatches(Numbered(24), 4, seed=1).state_dict()
    with pytest.raises(ValueError, match="global batch 4, this run has global batch 8"):
        TrainBatches(Numbered(24), 4, seed=1, rank=1, world=2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 1, this run has seed 2"):
        TrainBatches(Numbered(24), 4, seed=2).load_state_dict(state)


@pytest.mark.parametrize(("size", "batch", "world"), [(5, 4, 2), (11, 2, 3), (200, 8, 4), (7, 7, 1)])
def test_evaluation_visits_every_sample_once_in_equally_many_batches(size, batch, world):
    ranks = [EvaluationBatches(Numbered(size), batch, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = [take(rank, size) for rank in ranks]
    assert sorted(sum((sum(rank, []) for rank in seen), [])) == list(range(size))
    assert all(1 <= len(part) <= batch for rank in seen for part in rank)


def test_too_few_scenes_are_refused():
    with pytest.raises(ValueError, match="needs 8 training scenes, got 7"):
        TrainBatches(Numbered(7), 4, seed=0, world=2)
    with pytest.raises(ValueError, match="take more scenes"):
        EvaluationBatches(Numbered(3), 4, world=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SceneData(batch_size=0)


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["decode", "linear", "first_order"])
def test_a_step_logs_every_loss_and_moves_every_parameter(mode):
    module = TIGERModule(model=tiny_model(counterfactual={"mode": mode}), schedule="constant")
    before = {name: p.clone() for name, p in module.model.named_parameters() if p.requires_grad}
    run = trainer(limit_val_batches=0, log_every_n_steps=1, max_steps=2)
    run.fit(module, tiny_data())
    # The film layers of the decoder start at 0, and hide the task from the first step's gradient.
    still = [n for n, p in module.model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert still == []
    logged = run.callback_metrics
    losses = {"train/loss", "train/counterfactual", *(f"train/{name}" for name in module.model.task_names)}
    assert losses <= logged.keys()
    weighted = sum(task.weight * logged[f"train/{task.name}"] for task in module.model.tasks)
    if mode == "decode":
        torch.testing.assert_close(
            logged["train/loss"],
            weighted + module.model.settings.counterfactual.weight * logged["train/counterfactual"],
        )
    assert 0 < logged["train/counterfactual"] < math.log(2)
    for task in module.model.task_names:
        assert sum(logged[f"routing/{task}/{name}"] for name in EXPERTS) == pytest.approx(1, abs=1e-5)


def test_accumulated_batches_log_their_step_once(tmp_path):
    table = RunCSV(tmp_path / "metrics.csv")
    run = trainer(accumulate_grad_batches=2, max_steps=3, log_every_n_steps=1, logger=table, limit_val_batches=0)
    module = TIGERModule(model=tiny_model(), lr=0.004, warmup_steps=3)
    run.fit(module, tiny_data(train_size=16))
    rows = list(csv.DictReader(table.path.open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([0.001, 0.002, 0.003])


def test_mixed_precision_fits_a_step():
    module = TIGERModule(model=tiny_model())
    seen = []
    module.model.decoder.heads[0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    run = trainer(precision="bf16-mixed", limit_val_batches=1)
    run.fit(module, tiny_data())
    assert run.global_step == 1 and torch.bfloat16 in seen
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(torch.isfinite(value) for value in run.callback_metrics.values())


def test_a_step_has_ranges_for_profilers():
    with profile(activities=[ProfilerActivity.CPU]) as seen, profiler_ranges():
        trainer(max_steps=2).fit(TIGERModule(model=tiny_model()), tiny_data())
    counts = {event.key: event.count for event in seen.key_averages() if event.key.startswith("trainer.")}
    assert counts == {"trainer.step": 2, "trainer.objective": 2}


def test_validation_scores_are_those_of_the_whole_set():
    model = tiny_model()
    (by_two,) = trainer().validate(TIGERModule(model=model), tiny_data(val_batch_size=2), verbose=False)
    (scores,) = trainer().validate(TIGERModule(model=model), tiny_data(val_batch_size=5), verbose=False)
    data = CachedSamples(Scenes(5, HELDOUT_OFFSET, 24, 32), model.experts, model.settings.grid, workers=0)
    batch = data.batch(torch.arange(5))
    with torch.no_grad():
        output = model.eval()(batch["image"], features=batch["features"])
    for task in model.tasks:
        metric = task.metric()
        metric.update(output.predictions[task.name], batch[task.name])
        assert scores[f"val/{task.name}"] == pytest.approx(float(metric.compute()), rel=1e-5)
        assert by_two[f"val/{task.name}"] == pytest.approx(scores[f"val/{task.name}"], rel=1e-5)
    statistics = RoutingStatistics(5, 2)
    delta, valid = model.differences(batch, batch["image"], features=batch["features"])
    statistics.update(output.weights, delta, valid)
    figures = statistics.compute()
    assert scores["val/routing/divergence"] == pytest.approx(float(figures["divergence"]), rel=1e-5)
    assert scores["val/routing/depth/geometry"] == pytest.approx(float(figures["weights"][1, 0]), rel=1e-5)
    assert scores["val/routing/entropy/depth"] == pytest.approx(float(figures["entropy"][1]), rel=1e-5)


def test_draws_of_a_step_depend_on_seed_and_step_alone():
    module = TIGERModule(model=tiny_model(), seed=7)

    def draw(index: int) -> Tensor:
        module.on_train_batch_start({}, index)
        return torch.rand(3)

    first, other = draw(0), draw(1)
    torch.rand(17)
    assert torch.equal(draw(0), first) and not torch.equal(first, other)


def test_schedules():
    assert [rate_share(s, 10, "constant", 4) for s in (0, 3, 4, 9)] == [0.2, 0.8, 1.0, 1.0]
    assert rate_share(5, 10, "cosine", 0) == pytest.approx(0.5)
    assert rate_share(10, 10, "cosine", 0) == pytest.approx(0) == rate_share(10, 10, "poly", 2)
    assert rate_share(6, 10, "poly", 2) == pytest.approx(0.5**0.9)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        TIGERModule(schedule="cosinus")
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        trainer(max_steps=-1, max_epochs=-1).fit(TIGERModule(model=tiny_model()), tiny_data())


def test_experts_without_weights_are_refused():
    model = TIGER.from_preset("tiger-tiny", experts=tiny_model().expert_specs, **TINY_SETTINGS)
    with pytest.raises(ValueError, match="build the model with experts"):
        trainer().fit(TIGERModule(model=model, schedule="constant"), tiny_data())


# -- routing health --------------------------------------------------------------------------------------------------


def test_collapse_is_told_from_health():
    names, uniform = ["a", "b", "c", "d"], torch.full((2, 4), 0.25)
    most = math.log(4)
    assert collapse(uniform, torch.full((2,), most), names) is None
    assert collapse(uniform, torch.full((2,), 1.01 * ENTROPY_SHARE * most), names) is None
    assert "mean entropy" in collapse(uniform, torch.full((2,), 0.99 * ENTROPY_SHARE * most), names)
    one = torch.tensor([[0.0, 0.985, 0.015, 0.0]] * 2)
    assert "'b' has 98.5%" in collapse(one, torch.full((2,), 0.5), names)
    # Each task on an expert of its own is what routing is for.
    assert collapse(torch.eye(4), torch.full((4,), 0.5), names) is None
    assert collapse(torch.ones(2, 1), torch.zeros(2), ["a"]) is None


def test_a_single_expert_and_a_single_task_validate():
    model = TIGER.from_preset(
        "tiger-tiny", tasks=["depth"], experts=untrained_specialists(["geometry"]), **TINY_SETTINGS
    )
    (scores,) = trainer().validate(TIGERModule(model=model), tiny_data(), verbose=False)
    assert scores["val/routing/depth/geometry"] == 1 and scores["val/routing/entropy"] == 0


def test_collapse_warns_once_until_it_is_over():
    health, model = RoutingHealth(), tiny_model()
    bad, good = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for shares in (bad, bad, good, bad):
            health._judge(model, shares, torch.special.entr(shares).sum(-1))
    assert [w.category for w in caught] == [RoutingCollapse] * 2


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(RuntimeError):
        write_whole(path, lambda file: (file.write(b"new"), (_ for _ in ()).throw(RuntimeError))[0])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_corrupt_checkpoints_are_named(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="step-00000001.ckpt is not a readable checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="holds 'thesis.tex' and no run of tiger_fast"):
        RunFolder(tmp_path).claim({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(RunFolderError, match="config.yaml of something else"):
        RunFolder(tmp_path).claim({"a": 1})


def test_a_folder_continues_with_the_same_configuration_only(tmp_path):
    config = {"model": {"lr": 0.1}, "trainer": {"default_root_dir": "x", "max_steps": 3}}
    RunFolder(tmp_path / "run").claim(config)
    # Nothing was trained yet: a start that failed does not occupy the folder.
    RunFolder(tmp_path / "run").claim({**config, "model": {"lr": 0.3}})
    (tmp_path / "run" / "metrics.csv").touch()
    with pytest.raises(RunFolderError, match="another run .model.lr is 0.3 there, 0.1 here."):
        RunFolder(tmp_path / "run").claim(config)
    RunFolder(tmp_path / "run").claim({"model": {"lr": 0.3}, "trainer": {"default_root_dir": "y", "max_steps": 3}})


def test_a_folder_in_use_is_refused(tmp_path):
    code = (
        "import sys; from tiger_fast.training.runfolder import RunFolder;"
        "folder = RunFolder(sys.argv[1]); folder.claim({}); print('claimed', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(RunFolderError, match="in use by another process"):
        RunFolder(tmp_path).claim({})
    other.communicate()
    RunFolder(tmp_path).claim({})


def test_the_table_has_a_row_for_every_step_and_forgets_what_will_come_again(tmp_path):
    table = RunCSV(tmp_path / "metrics.csv")
    table.rewind(0)
    for step in (1, 2, 3):
        table.log_metrics({"loss": step / 3}, step=step)
    table.log_metrics({"score": 0.5}, step=3)
    with table.path.open("a") as file:
        file.write("4,0.1")  # cut off by a kill
    again = RunCSV(table.path)
    again.rewind(2)
    again.log_metrics({"loss": 7.0, "score": 8.0}, step=3)
    rows = list(csv.DictReader(table.path.open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert (
        float(rows[1]["loss"]) == 2 / 3
        and rows[1]["score"] == ""
        and rows[2]
        == {
            "step": "3",
            "loss": "7.0",
            "score": "8.0",
        }
    )


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line, as tests/tiny_run.py makes it; its configuration is beside it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "load_specialists", untrained_specialists)
        tiny_run.main(["fit", "--config", str(folder.with_suffix(".yaml"))])
    return folder


def test_fit_leaves_logs_checkpoints_and_a_model(finished):
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8", "10", "12", "14"]
    assert all(row["train/loss"] and row["routing/entropy"] and row["train/lr"] for row in rows)
    assert [row["step"] for row in rows if row["val/routing/divergence"]] == ["6", "12"]
    assert list((finished / "tensorboard").glob("events.*"))
    assert [p.name for p in RunFolder(finished).checkpoints()] == ["step-00000012.ckpt", "step-00000014.ckpt"]
    loaded = TIGERModule.load_from_checkpoint(RunFolder(finished).newest_checkpoint(), weights_only=True)
    saved = TIGER.load(finished / "model.safetensors").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.model.state_dict().items())


def test_fit_with_another_configuration_is_refused(finished):
    with pytest.raises(SystemExit, match="model.lr is 0.003 there, 0.1 here"):
        command(["fit", "--config", str(finished.with_suffix(".yaml")), "--model.lr", "0.1"])


def test_validate_and_predict_take_the_newest_checkpoint(finished, capsys):
    config = ["--config", str(finished.with_suffix(".yaml"))]
    command(["validate", *config])
    assert "step-00000014.ckpt" in (printed := capsys.readouterr().out) and "val/semseg" in printed
    command(["predict", *config])
    files = sorted((finished / "predictions").iterdir())
    assert [path.name for path in files] == ["scene-000000.safetensors", "scene-000003.safetensors"]
    content = load_file(files[0])
    assert content["semseg"].shape == (3, 24, 32) and content["weights"].shape == (3, 5, 12, 3)
    assert content["index"].tolist() == [0, 1, 2]


def test_validate_without_a_run_is_refused(finished, tmp_path):
    with pytest.raises(SystemExit, match="run fit first"):
        command(
            ["validate", "--config", str(finished.with_suffix(".yaml")), "--trainer.default_root_dir", str(tmp_path)]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"batchsize": 4}}, "did you mean 'data.batch_size'?"),
        ({"trainr": {"max_steps": 4}}, "did you mean 'trainer.max_steps'?"),
        ({"model": {"learning_rate": 1}}, "'model.learning_rate'"),
        ({"checkpoint": {"every_n_step": 4}}, "did you mean 'checkpoint.every_n_steps'?"),
        ({"model": {"lr": "fast"}}, "fast"),
    ],
)
def test_an_unknown_key_is_refused_with_the_near_match(change, message, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(SystemExit) as error:
        command(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / "run")])
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.settings", "{dimm: 3}", "did you mean 'dim'"),
        ("--model.settings", "{counterfactual: {taus: 3}}", "did you mean 'tau'"),
        ("--model.preset", "tiger-tin", "did you mean 'tiger-tiny'"),
        ("--model.tasks", "[semsegg]", "did you mean 'semseg'"),
        ("--data.batch_size", "0", "batch_size must be at least 1"),
        ("--checkpoint.keep", "0", "must be at least 1"),
    ],
)
def test_a_value_that_does_not_exist_is_refused_before_anything_is_written(option, value, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command(["fit", option, value, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_unknown_command_names_the_near_match(capsys):
    with pytest.raises(SystemExit, match="unknown command 'validat'; did you mean 'validate'"):
        command(["validat"])
    with pytest.raises(SystemExit) as error:
        command(["--help"])
    assert error.value.code == 0
    assert {"fit", "validate", "predict", "demo", "infer"} <= set(capsys.readouterr().out.split())


def test_a_missing_trainer_is_named_with_its_command(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tiger_fast.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match=r'pip install "tiger_fast\[train\]"'):
        command(["fit"])


def test_the_shipped_configuration_is_accepted(tmp_path):
    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        cli = _parsed(["fit", "--config", str(path), "--print_config"])
        assert yaml.safe_load(cli)["trainer"]["max_steps"] > 0


def _parsed(arguments: list[str]) -> str:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as error:
        command(arguments)
    assert error.value.code == 0
    return text.getvalue()


def test_a_trial_run_writes_nothing(finished, tmp_path):
    """fast_dev_run claims no folder, so it may not write into one either."""
    (tmp_path / "model.safetensors").write_bytes(b"somebody else's")
    config = tmp_path / "config-file.yaml"
    config.write_text(yaml.safe_dump(tiny_run.tiny_config(tmp_path)))
    tiny_run.main(["fit", "--config", str(config), "--trainer.fast_dev_run", "true"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config-file.yaml", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_that_would_score_in_16_bits_is_refused(tmp_path, precision):
    config = tmp_path / "config-file.yaml"
    config.write_text(yaml.safe_dump(tiny_run.tiny_config(tmp_path / "run")))
    with pytest.raises((SystemExit, ValueError), match="mixed"):
        tiny_run.main(["fit", "--config", str(config), "--trainer.precision", precision])


def test_a_preset_whose_experts_cannot_be_loaded_leaves_no_trace(tmp_path):
    with pytest.raises(SystemExit, match="tiger-tiny"):
        command(["fit", "--model.preset", "tiger-b", "--trainer.default_root_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
