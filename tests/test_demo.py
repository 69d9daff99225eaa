"""The demo and inference from end to end, a few steps long, and what they refuse."""

import json

import numpy
import pytest
import torch
from PIL import Image

from tiger_fast.training import demo, demo_table, infer

TASKS = ["semseg", "depth", "normals", "saliency", "edge"]
EXPERTS = ["semantics", "geometry", "boundaries", "appearance"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "result"
    demo.main(["--steps", "1", "--scenes", "8", "--held-out", "6", "--batch-size", "2", "--out", str(folder)])
    return folder


def test_report_has_every_figure_it_promises(result):
    text = (result / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    report = json.loads(text)
    assert list(report["tasks"]) == TASKS
    for row in report["tasks"].values():
        assert set(row) == {"metric", "value", "higher_is_better"}
    assert set(report["controls"]) == {*EXPERTS, "mean"}
    for name in ("routing", "causal", "causal_input"):
        assert {task: list(row) for task, row in report[name].items()} == dict.fromkeys(TASKS, EXPERTS)
    for row in report["routing"].values():
        assert sum(row.values()) == pytest.approx(1, abs=1e-5)
    assert set(report["agreement"]) == set(report["entropy"]) == {"with", "without"}
    assert set(report["divergence"]) == {"with", "without", "uniform"}
    assert report["seed"] == 0 and report["seconds"] > 0


def test_no_control_has_fewer_parameters_than_tiger(result):
    parameters = json.loads((result / "report.json").read_text())["parameters"]
    assert min(parameters.values()) == parameters["tiger"] == parameters["without"]


def test_every_picture_is_there(result):
    expected = {"predictions", "losses", "photographs", "routing-0", *(f"routing-{name}" for name in demo.PHOTOGRAPHS)}
    assert expected <= {path.stem for path in result.glob("*.png")}
    for path in result.glob("*.png"):
        with Image.open(path) as picture:
            assert numpy.asarray(picture.convert("L")).std() > 5, f"{path.name} is blank"


def test_an_earlier_result_is_replaced(result, tmp_path):
    fresh = demo.open_result(result)
    (fresh / "report.json").write_text("{}")
    demo.close_result(fresh, target := tmp_path / "result")
    again = demo.open_result(target)
    (again / "new").touch()
    demo.close_result(again, target)
    assert sorted(path.name for path in target.iterdir()) == sorted([demo.MARKER, "new"])


def test_a_result_is_in_place_before_the_former_one_goes(tmp_path, monkeypatch):
    target = tmp_path / "result"
    for content in ("first", "second"):
        fresh = demo.open_result(target)
        (fresh / content).touch()
        if content == "second":
            monkeypatch.setattr(demo.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                demo.close_result(fresh, target)
        else:
            demo.close_result(fresh, target)
    assert (target / "second").exists()
    assert list(tmp_path.glob(".result.former-*/first"))


def test_a_shortfall_is_named():
    good = {
        "seed": 0,
        "tasks": {"depth": {"metric": "RMSE", "value": 1.0, "higher_is_better": False}},
        "controls": {"mean": {"depth": 2.0}},
        "agreement": {"with": 0.9, "without": 0.8},
        "divergence": {"with": 0.1, "without": 0.2, "uniform": 0.15},
    }
    assert demo_table.shortfalls(good) == []
    for key, change in (
        ("agreement", {"with": 0.79, "without": 0.5}),
        ("agreement", {"with": 0.9, "without": 0.95}),
        ("divergence", {"with": 0.11, "without": 0.2, "uniform": 0.15}),
        ("divergence", {"with": 0.1, "without": 0.3, "uniform": 0.1}),
    ):
        assert len(demo_table.shortfalls(good | {key: change})) == 1


def test_infer_reads_a_photograph_upright(tmp_path):
    pixels = numpy.zeros((20, 40, 3), dtype=numpy.uint8)
    pixels[:, :10] = 255
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(tmp_path / "photo.png", exif=exif)
    image = infer.read_image(tmp_path / "photo.png")
    assert image.shape == (3, 40, 20) and image[:, 2, 10].min() == 1 and image[:, 30, 10].max() == 0


def test_a_folder_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="holds something else"):
        demo.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_page_says_where_a_control_wins(result):
    report = json.loads((result / "report.json").read_text())
    report["tasks"]["depth"]["value"] = 1e9
    assert "depth" in demo_table.lost_tasks(report)
    report["tasks"]["edge"]["value"] = 2.0
    assert "edge" not in demo_table.lost_tasks(report)
    page = demo_table.page([report])
    assert "| 0 |" in page and "appearance" in page


def test_infer_writes_predictions_of_a_photograph(result, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (90, 200), dtype=numpy.uint8)).save(photo)
    model = result / "tiger-tiny.safetensors"
    infer.main([str(photo), "--model", str(model), "--out", str(tmp_path / "out")])
    assert "predictions.png" in capsys.readouterr().out
    with numpy.load(tmp_path / "out" / "predictions.npz") as arrays:
        assert arrays["depth"].shape == (1, 96, 128) and arrays["semseg"].shape == (96, 128)
        assert arrays["routing_weights"].shape == (5, 192, 4)


def test_the_shipped_model_knows_rooms():
    """The head that ships is a trained one: on a scene nobody trained on, it beats always saying "wall"."""
    from tiger_fast.data import HELDOUT_OFFSET, Scenes
    from tiger_fast.models import TIGER

    sample = Scenes(1, HELDOUT_OFFSET + 1000)[0]
    model = TIGER.load(infer.SHIPPED).eval()
    predicted = model(sample["image"][None]).predictions["semseg"].argmax(1)[0]
    labelled = sample["semseg"] != 255
    correct = (predicted == sample["semseg"])[labelled].float().mean()
    assert correct > (sample["semseg"][labelled] == 1).float().mean() + 0.2


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_infer_refuses_what_is_no_picture(tmp_path, content):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"photo\.jpg"):
        infer.main([str(path)])


def test_fit_image_keeps_the_centre_and_the_aspect_ratio():
    image = torch.zeros(3, 50, 200)
    image[:, :, 90:110] = 1  # a bright bar in the middle
    fitted = infer.fit_image(image, (96, 128))
    assert fitted.shape == (3, 96, 128)
    assert fitted[:, :, 64].min() > 0.9 and fitted[:, :, :20].max() < 0.1
