"""Evaluations against numbers made by hand, and the report as its reader meets it, in a browser."""

import base64
import csv
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification

from jobs import evaluate_model
from jobs.evaluate_model import EvaluateConfig
from pipelines.datasets import dataset as datasets
from pipelines.datasets.normalize import normalize
from pipelines.datasets.settings import Columns, DataSettings, Splits
from pipelines.evaluation import (
    attention,
    eval_set,
    evaluation,
    gallery,
    hierarchy,
    metrics,
    per_image,
    plots,
    report,
    score,
)
from pipelines.evaluation.evaluation import Scored
from pipelines.messages import InputError
from pipelines.taxonomy import taxonomy
from pipelines.training import runs
from pipelines.training.recipe import Recipe
from tests.builders import models as small_models

IDS = ("483", "484", "1", "2", "v9i3On")
"""Sports, Sports > American Football, Automotive, Automotive > Auto Body Styles, Sensitive Topics."""
TAXONOMY = taxonomy.load("3.1")


def scored_as(predicted: list[int], targets: list[int], *, ids: tuple[str, ...] = IDS) -> Scored:
    """A model that is 60 % sure of these answers and spreads the rest evenly."""
    probabilities_nc = np.full((len(predicted), len(ids)), 0.4 / (len(ids) - 1), np.float32)
    probabilities_nc[np.arange(len(predicted)), predicted] = 0.6
    return Scored(ids, np.log(probabilities_nc), probabilities_nc, np.array(targets))


def random_scores(n_classes: int, n: int = 600) -> tuple[Scored, taxonomy.Taxonomy]:
    """Scores that are right about half of the time over classes of every tier."""
    rng = np.random.default_rng(n_classes)
    ids = tuple(
        TAXONOMY.nodes[i].id for i in sorted(rng.choice(len(TAXONOMY.nodes), n_classes, replace=False))
    )
    targets = rng.integers(0, n_classes, n)
    logits_nc = rng.normal(size=(n, n_classes)).astype(np.float32)
    logits_nc[np.arange(n), targets] += 3
    return Scored(ids, logits_nc, metrics.probabilities(logits_nc, temperature=0.7), targets), TAXONOMY


def test_a_mistake_between_siblings_weighs_less_than_one_between_strangers() -> None:
    near = evaluation.evaluate(scored_as([1, 0], [0, 0]), TAXONOMY).hierarchy
    far = evaluation.evaluate(scored_as([2, 0], [0, 0]), TAXONOMY).hierarchy
    assert near["mean_distance_of_mistakes"] == 1
    assert far["mean_distance_of_mistakes"] == 2
    assert near["tier1_accuracy_of_top_class"] == 1.0
    assert far["tier1_accuracy_of_top_class"] == 0.5
    assert near["hierarchical_f1"] > far["hierarchical_f1"]


def test_hierarchical_precision_and_recall_count_shared_ancestors() -> None:
    # Given {483, 484}, true {483}: 1 of 2 given is true, 1 of 1 true is given.
    found = evaluation.evaluate(scored_as([1], [0]), TAXONOMY).hierarchy
    assert found["hierarchical_precision"] == 0.5
    assert found["hierarchical_recall"] == 1.0


def test_distances_are_those_of_the_taxonomy() -> None:
    edges = hierarchy.distances(TAXONOMY.rollup(IDS))
    lines = {one: {one, *TAXONOMY.ancestors(one)} for one in IDS}
    for i, one in enumerate(IDS):
        for j, other in enumerate(IDS):
            assert edges[i, j] == len(lines[one] ^ lines[other])


def test_a_tier_is_judged_by_the_sums_of_its_descendants() -> None:
    """Two sports classes of 0.3 each outweigh automotive's 0.4, although automotive is the best class."""
    probabilities_nc = np.array([[0.3, 0.3, 0.4, 0, 0]], np.float32)
    judged = Scored(IDS, probabilities_nc, probabilities_nc, np.array([1]))
    found = evaluation.evaluate(judged, TAXONOMY)
    assert found.overall["accuracy"] == 0
    assert found.tiers[0]["tier"] == 1
    assert found.tiers[0]["accuracy"] == 1.0


def test_the_page_says_which_categories_can_be_published_parents_included() -> None:
    ids = ("484", "518", "2", "425", "v9i3On")  # of Sports, Sports, Automotive, Pets
    never = dict.fromkeys(TAXONOMY.rollup(ids).ids, 2.0)
    scored = scored_as([0, 1, 3], [0, 0, 3], ids=ids)
    found = evaluation.evaluate(scored, TAXONOMY, thresholds=never | {"483": 0.6})
    assert found.publishable == "1 of 8 categories (Sports), 0 of the 5 classes"
    sports = next(one for one in found.categories if one["id"] == "483")
    assert (sports["images"], sports["given"], sports["correct"]) == (2, 2, 2)
    page = report.render_page(found.document(), report.ReportExtras())
    assert "Can be published at the thresholds: 1 of 8 categories (Sports), 0 of the 5 classes" in page
    assert ">Parents</h3>" in page and "<code>483</code>" in page


def test_images_labelled_above_a_tier_say_nothing_about_it() -> None:
    tiers = evaluation.evaluate(scored_as([0, 1, 3], [0, 1, 3]), TAXONOMY).tiers
    assert [(row["tier"], row["images"]) for row in tiers] == [(1, 3), (2, 2)]


def test_published_precision_follows_the_thresholds_and_counts_parents() -> None:
    judged = scored_as([1, 1, 2, 4], [1, 1, 2, 3])
    thresholds = dict.fromkeys(IDS, 2.0) | {"484": 0.5, "483": 0.5, "v9i3On": 0.5}
    published = evaluation.evaluate(judged, TAXONOMY, thresholds=thresholds).published
    assert published["coverage"] == 0.75
    assert published["precision"] == pytest.approx(4 / 5)  # 484 and 483 twice each, v9i3On wrongly once
    assert published["recall"] == pytest.approx(4 / 7)


def test_json_has_null_where_a_class_has_no_images() -> None:
    text = evaluation.evaluate(scored_as([0, 1], [0, 0]), TAXONOMY).to_json()
    assert "NaN" not in text
    classes = {one["id"]: one for one in json.loads(text)["classes"]}
    assert classes["v9i3On"]["recall"] is None
    assert classes["v9i3On"]["recall_interval"] == [None, None]
    assert classes["483"]["recall"] == 0.5


def test_multi_label_evaluation_has_map_and_no_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    targets_nc = (rng.random((200, 5)) < 0.3).astype(np.uint8)
    logits_nc = (rng.normal(size=(200, 5)) + 3 * targets_nc - 1).astype(np.float32)
    scores_nc = metrics.probabilities(logits_nc, multi_label=True)
    found = evaluation.evaluate(Scored(IDS, logits_nc, scores_nc, targets_nc), TAXONOMY)
    assert found.overall["map"] > 0.8
    assert found.confusions == []
    page = report.render_page(found.document(), report.ReportExtras())
    assert "mAP" in page
    assert 'id="confusion"' not in page


def test_the_sample_visits_every_class_and_the_worst_mistakes_are_the_surest_ones() -> None:
    judged, _ = random_scores(20)
    sample, worst, _ = gallery.choose_images(judged, sample=20, worst=5)
    assert set(judged.targets[sample]) == set(range(20))
    assert judged.wrong[worst].all()
    assert judged.loss[worst].min() == np.sort(judged.loss)[-5]


def test_scores_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="need \\(1, 5\\)"):
        Scored(IDS, np.ones((1, 4)), np.ones((1, 5)), np.array([0]))


class References(html.parser.HTMLParser):
    """Collects what a page refers to, and its images."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := found.get(name))]
        if tag == "img":
            self.images.append(found)


def report_extras(judged: Scored, tree: taxonomy.Taxonomy) -> report.ReportExtras:
    """Everything that a report can show."""
    rng = np.random.default_rng(0)
    rows = gallery.choose_images(judged)[0]
    images = [
        report.ReportImage(
            int(row),
            f"s3://bucket/{row}.jpg",
            rng.integers(0, 255, (40, 56, 3), np.uint8),
            rng.random((5, 7)),
        )
        for row in rows
    ]
    pictures = report.caption_images(judged, tree, images)
    history = [
        {"epoch": epoch, "loss": 2 / epoch, "accuracy": epoch / 9, "learning_rate": 1e-3}
        for epoch in range(1, 6)
    ]
    counts = {"train": dict.fromkeys(judged.class_ids, 70), "test": dict.fromkeys(judged.class_ids, 10)}
    return report.ReportExtras(
        sample=pictures, worst=pictures[:6], attention=pictures[:6], history=history, class_counts=counts,
        balancing="Rare classes were oversampled.", augmented=images[:10],
    )  # fmt: skip


def test_the_report_needs_nothing_from_elsewhere_and_every_plot_names_its_axes(tmp_path: Path) -> None:
    judged, tree = random_scores(20)
    report.write_report(evaluation.evaluate(judged, tree), str(tmp_path), report_extras(judged, tree))
    found = References()
    found.feed((tmp_path / "report.html").read_text())
    assert all(link.startswith(("data:image/", "#")) for link in found.links)
    assert json.loads((tmp_path / "evaluation.json").read_text())["n_images"] == 600
    plots = [one for one in found.images if (one["src"] or "").startswith("data:image/svg")]
    assert {one["alt"] for one in plots} >= {
        "confusion matrix",
        "ROC curves",
        "reliability diagram",
        "learning curves",
    }
    for plot in plots:
        drawing = base64.b64decode((plot["src"] or "").split(",")[1]).decode()
        texts = re.findall(r"<!-- (.+?) -->", drawing)  # matplotlib notes each text that it draws as outlines
        assert len([text for text in texts if re.search("[a-z]{3}", text)]) >= 3, plot["alt"]


def test_images_of_many_classes_have_a_scale_with_numbers_within_a_decade() -> None:
    classes = [{"id": str(i), "name": str(i)} for i in range(300)]
    plot = plots.plot_balance({"train": {str(i): 10 + i // 5 for i in range(300)}}, classes)
    drawing = base64.b64decode(plot.split(",")[1]).decode()
    assert {"10", "20", "50"} <= set(re.findall(r"<!-- (.+?) -->", drawing))


def test_hostile_labels_and_addresses_stay_text() -> None:
    labels = ("<script>alert(1)</script>", 'a" onload="alert(2)')
    judged = scored_as([0, 1, 1], [0, 1, 0], ids=labels)
    tree = taxonomy.load("labels", labels=labels)
    shown = report.ReportImage(0, '"><img src=http://evil.example/x>', np.zeros((4, 4, 3), np.uint8))
    pictures = report.ReportExtras(sample=report.caption_images(judged, tree, [shown]))
    page = report.render_page(evaluation.evaluate(judged, tree).document(), pictures)
    found = References()
    found.feed(page)
    assert page.count("<script>") == 1
    assert all("onload" not in image for image in found.images)
    assert not any("evil" in link for link in found.links)


OVERFLOW = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect(), hidden = e.closest(".scroll, article p, article li");
  return !hidden && box.width && (box.left < -0.5 || box.right > document.documentElement.clientWidth + 0.5);
});
const boxes = [...document.querySelectorAll("main > *")].map(e => e.getBoundingClientRect());
const sections = boxes.filter(box => box.height);
const overlapping = sections.some((box, i) => i && box.top < sections[i - 1].bottom - 0.5);
const scrolling = [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth);
document.title = `wide ${wide.length} overlapping ${overlapping} scrolling ${scrolling.length}`;
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("n_classes", [20, 300])
def test_nothing_overflows_or_overlaps_at_1280_pixels(n_classes: int, tmp_path: Path) -> None:
    judged, tree = random_scores(n_classes, 3_000)
    page = report.render_page(evaluation.evaluate(judged, tree).document(), report_extras(judged, tree))
    (tmp_path / "page.html").write_text(page + OVERFLOW)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1280,2000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall("<title>(.*?)</title>", dom) == ["wide 0 overlapping false scrolling 0"]


def test_attention_rolls_out_as_the_product_of_the_layers() -> None:
    model = small_models.vit()
    pixels_nhwc = np.random.default_rng(0).integers(0, 255, (3, 40, 56, 3), np.uint8)
    maps = attention.roll_out(model, pixels_nhwc, small_models.SPEC)
    assert maps.shape == (3, 5, 7)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    inputs = normalize(torch.from_numpy(pixels_nhwc), small_models.SPEC)
    with torch.no_grad():
        first, second = (
            one.mean(dim=1).numpy() for one in model.eval()(inputs, output_attentions=True).attentions
        )
    half = np.eye(36) / 2
    reached = ((second / 2 + half) @ (first / 2 + half))[:, 0, 1:].reshape(3, 5, 7)
    expected = (reached - reached.min(axis=(1, 2), keepdims=True)) / np.ptp(
        reached, axis=(1, 2), keepdims=True
    )
    np.testing.assert_allclose(maps, expected, atol=1e-4)


def test_a_model_without_patches_has_no_attention_map() -> None:
    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1]))
    with pytest.raises(attention.NoAttention):
        attention.roll_out(model, np.zeros((1, 40, 56, 3), np.uint8), small_models.SPEC)


def test_a_label_below_a_class_counts_as_that_class_and_a_foreign_one_is_left_out(tmp_path: Path) -> None:
    pictures = small_models.dataset(tmp_path / "pictures", 10)
    labels = ["484", "1", "v9i3On", "150", "552"] * 2  # 484 is below 483; 150 is no class of the model
    lines = [f"{i}.jpg,{label},{'test' if i else 'train'}" for i, label in enumerate(labels)]
    (pictures / "labels.csv").write_text("\n".join(["file,label,split", *lines]))
    data = datasets.load(DataSettings(str(pictures / "labels.csv")))
    asked = eval_set.build_eval_set(data, "test", small_models.CLASS_IDS, TAXONOMY, multi_label=False)
    assert asked.targets.tolist() == [1, 2, 4, 0, 1, 2, 4]
    assert dict(asked.uncovered) == {"150": 2}
    with pytest.raises(InputError, match=r"9 test, 1 train.*--split all"):
        eval_set.build_eval_set(data, "validation", small_models.CLASS_IDS, TAXONOMY, multi_label=False)


def evaluate(*arguments: str) -> int:
    return evaluate_model.run(EvaluateConfig.parse(arguments, command="evaluate"))


def test_a_checkpoint_is_judged_and_a_broken_image_is_left_out(tmp_path: Path) -> None:
    run = small_models.checkpoint(tmp_path / "run" / "best").parent
    (run / "metrics.jsonl").write_text("".join(f'{{"epoch": {i}, "loss": {2.0 / i}}}\n' for i in (1, 2, 3)))
    pictures = small_models.dataset(tmp_path / "pictures", 30)
    (pictures / "3.jpg").write_bytes(b"not an image")
    dataset = str(pictures / "labels.csv")
    output = tmp_path / "out"
    settings = ("--checkpoint", str(run), "--dataset", dataset, "--output", str(output), "--split", "all")
    assert evaluate(*settings) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert found["n_images"] == 29
    assert found["about"]["unreadable images"] == "1"
    assert found["overall"]["accuracy"] > 0.6
    assert found["calibration"]["before"]["ece"] != found["calibration"]["after"]["ece"]
    table = pq.read_table(output / "evaluation.parquet")
    assert table.num_rows == 29
    classes = json.loads(table.schema.metadata[b"class_ids"])
    rows = table.to_pylist()
    assert sum(row["correct"] for row in rows) / 29 == pytest.approx(found["overall"]["accuracy"], abs=1e-6)
    assert [row["predicted"] for row in rows] == [[row["top_id"]] for row in rows]
    assert all(row["probabilities"][classes.index(row["top_id"])] == row["top_score"] for row in rows)
    assert {row["split"] for row in rows} == {None}, "--split all, and the run recorded none"
    page = (output / "report.html").read_text()
    for section in ("sample", "attention", "training", "confusion"):
        assert f'id="{section}"' in page


@pytest.mark.ray
@pytest.mark.slow
def test_a_checkpoint_is_judged_on_a_cluster_as_in_one_process(
    ray_cluster, tmp_path: Path, monkeypatch
) -> None:
    small_models.checkpoint(tmp_path / "run" / "best")
    (small_models.dataset(tmp_path / "pictures", 30) / "3.jpg").write_bytes(b"not an image")
    monkeypatch.chdir(tmp_path)  # workers have another working folder
    settings = ("--checkpoint", "run", "--dataset", "pictures/labels.csv", "--split", "validation")
    found = {}
    for engine in ("local", "ray"):
        assert evaluate(*settings, "--engine", engine, "--num-workers", "2", "--output", engine) == 0
        assert json.loads((tmp_path / engine / "evaluation.json").read_text())["n_images"] == 29
        found[engine] = pq.read_table(tmp_path / engine / "evaluation.parquet")
    probabilities = [np.array(found[engine]["probabilities"].to_pylist()) for engine in ("local", "ray")]
    np.testing.assert_allclose(*probabilities, atol=1e-5)
    assert (
        found["ray"]
        .drop(["probabilities", "top_score", "loss"])
        .equals(found["local"].drop(["probabilities", "top_score", "loss"]))
    )


def test_a_bundle_is_judged_in_one_process_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--engine ray evaluates a checkpoint"):
        evaluate("--bundle", str(tmp_path), "--output", str(tmp_path / "out"), "--engine", "ray")


def test_a_bundle_is_judged_as_it_is_served(tmp_path: Path) -> None:
    small_models.small_bundle(tmp_path / "bundle")
    pictures = small_models.dataset(tmp_path / "pictures", 20)
    settings = ("--bundle", str(tmp_path / "bundle"), "--dataset", str(pictures / "labels.csv"))
    assert evaluate(*settings, "--output", str(tmp_path / "out"), "--split", "all") == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["n_images"] == 20
    assert 'id="attention"' not in (tmp_path / "out" / "report.html").read_text()


def test_head_says_which_images_the_thresholds_were_fitted_on(tmp_path: Path) -> None:
    small_models.small_bundle(tmp_path / "bundle")
    pictures = small_models.dataset(tmp_path / "pictures", 20)
    uris = [str(pictures / f"{i}.jpg") for i in range(20)]
    (tmp_path / "run").mkdir()
    recorded = pa.table({"uri": uris, "split": ["validation"] * 5 + ["test"] * 15})
    pq.write_table(recorded, tmp_path / "run" / "splits.parquet")
    settings = ("--bundle", str(tmp_path / "bundle"), "--dataset", str(pictures / "labels.csv"))
    told = {}
    for split in ("validation", "all", "test"):
        output = tmp_path / split
        own = ("--run", str(tmp_path / "run"), "--split", split, "--output", str(output))
        assert evaluate(*settings, *own) == 0
        told[split] = json.loads((output / "evaluation.json").read_text())["about"].get("thresholds")
        assert ("precision is biased upward" in (output / "report.html").read_text()) == (split != "test")
    assert told == {
        "validation": "fitted on these images: their precision is biased upward",
        "all": "fitted on 5 of these images: their precision is biased upward",
        "test": None,
    }


def test_a_row_per_image_has_several_labels_and_the_group(tmp_path: Path) -> None:
    targets_nc = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.uint8)
    scores_nc = np.array([[0.9, 0.2, 0.6, 0, 0], [0.1, 0, 0, 0, 0.3]], np.float32)
    images = pa.table(
        {
            "uri": ["https://me:secret@a/b.jpg?key=1", "c.jpg"],
            "split": ["test"] * 2,
            "group": ["g", None],
            "slices": pa.array([[("site", "a.com")], [("site", None)]], pa.map_(pa.string(), pa.string())),
        }
    )
    result = score.EvalResult(Scored(IDS, scores_nc, scores_nc, targets_nc), images, [])
    per_image.write_images([result, result], str(tmp_path))
    rows = pq.read_table(tmp_path / per_image.FILE).to_pylist()
    assert len(rows) == 4
    assert rows[0]["uri"] == "https://a/b.jpg?key=REDACTED"
    assert (rows[0]["group"], rows[1]["group"]) == ("g", None)
    assert (rows[0]["labels"], rows[0]["predicted"]) == (["483", "484"], ["483", "1"])
    assert (rows[1]["labels"], rows[1]["predicted"], rows[1]["top_id"]) == ([], [], "v9i3On")
    assert (rows[0]["correct"], rows[1]["correct"]) == (False, True)
    assert (rows[0]["site"], rows[1]["site"]) == ("a.com", None)


def test_likely_labels_are_those_of_confident_learning() -> None:
    """Mean probability of own images: a 0.8, b 0.5. The third image passes b's and not a's."""
    scores_nc = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.45, 0.55], [0.55, 0.45]], np.float32)
    doubted = Scored(("a", "b"), scores_nc, scores_nc, np.array([0, 0, 0, 1, 1]))
    assert doubted.doubtful.tolist() == [False] * 5, "0.4 is below b's mean of 0.5"
    scores_nc[2] = [0.4, 0.6]
    doubted = Scored(("a", "b"), scores_nc, scores_nc, np.array([0, 0, 0, 1, 1]))
    assert doubted.doubtful.tolist() == [False, False, True, False, False]
    assert doubted.likely_nc[2].tolist() == [0, 1]


@pytest.mark.parametrize("multi_label", [False, True])
def test_planted_label_errors_are_found(multi_label: bool) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 5, 2_000)
    truth_nc = np.eye(5, dtype=np.uint8)[truth]
    logits_nc = 6.0 * truth_nc - 3 * multi_label + rng.normal(size=truth_nc.shape)
    planted = rng.choice(len(truth), 100, replace=False)
    labels_nc = truth_nc.copy()
    labels_nc[planted] = np.roll(truth_nc[planted], 1, axis=1)
    scores_nc = metrics.probabilities(logits_nc, multi_label=multi_label)
    judged = Scored(IDS, logits_nc, scores_nc, labels_nc if multi_label else labels_nc.argmax(axis=1))
    found = np.flatnonzero(judged.doubtful)
    assert len(np.intersect1d(found, planted)) >= 90
    assert len(np.setdiff1d(found, planted)) <= 20
    _, _, shown = gallery.choose_images(judged)
    assert set(shown) <= set(planted)


def test_slices_have_the_accuracy_of_their_images() -> None:
    judged = scored_as([0, 0, 1, 1, 2], [0, 1, 1, 1, 2])
    tree = taxonomy.load("labels", labels=IDS)
    values = ["a.com", "a.com", "b.com", "b.com", None]
    found = evaluation.evaluate(judged, tree, slices={"site": values}).document()["slices"]
    assert [(one["value"], one["images"], one["right"]) for one in found] == [
        ("a.com", 2, 0.5), ("b.com", 2, 1), ("", 1, 1),
    ]  # fmt: skip
    assert found[0]["interval"][0] < 0.5 < found[0]["interval"][1]


def test_a_column_of_the_dataset_slices_the_evaluation(tmp_path: Path) -> None:
    small_models.small_bundle(tmp_path / "bundle")
    pictures = small_models.dataset(tmp_path / "pictures", 20)
    rows = list(csv.DictReader((pictures / "labels.csv").open()))
    with (pictures / "sites.csv").open("w") as file:
        writer = csv.DictWriter(file, [*rows[0], "site"])
        writer.writeheader()
        writer.writerows({**row, "site": f"{i % 2}.com"} for i, row in enumerate(rows))
    settings = ["--bundle", str(tmp_path / "bundle"), "--dataset", str(pictures / "sites.csv")]
    settings += ["--output", str(tmp_path / "out"), "--split", "all"]
    with pytest.raises(InputError, match="no column 'nowhere'"):
        evaluate(*settings, "--slices", "nowhere")
    assert evaluate(*settings, "--slices", "site") == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert sorted(one["value"] for one in found["slices"]) == ["0.com", "1.com"]
    assert 'id="slices"' in (tmp_path / "out" / "report.html").read_text()
    assert "site" in pq.read_schema(tmp_path / "out" / per_image.FILE).names


def test_no_image_that_a_run_learned_from_is_asked_about(tmp_path: Path, caplog) -> None:
    """The run divided otherwise than evaluate would: by tier, another seed and other shares."""
    run = small_models.checkpoint(tmp_path / "run" / "best").parent
    pictures = small_models.dataset(tmp_path / "pictures", 40)
    labels = [f"{i}.jpg,{small_models.CLASS_IDS[i % 5]}" for i in range(40)]
    (pictures / "labels.csv").write_text("\n".join(["file,label", *labels]))
    dataset = str(pictures / "labels.csv")
    split = Splits(seed=5, validation=0.2, test=0.3)
    trained_on = datasets.load(DataSettings(dataset, tier=1, splits=split))
    runs.begin(str(run), Recipe(), trained_on)
    small_models.small_bundle(tmp_path / "bundle")

    def asked(*settings: str) -> tuple[int, str]:
        caplog.clear()
        assert evaluate(*settings, "--dataset", dataset, "--output", str(tmp_path / "out")) == 0
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        return found["n_images"], found["about"]["seen in training"]

    n_test = len(trained_on.indices("test"))
    assert asked("--checkpoint", str(run / "best")) == (n_test, f"0 of {n_test} images")
    assert asked("--bundle", str(tmp_path / "bundle"), "--run", str(run))[0] == n_test
    assert "too good" not in caplog.text
    assert asked("--bundle", str(tmp_path / "bundle"))[1].startswith("unknown")
    assert "--run RUN" in caplog.text
    known, n_train = runs.recorded_splits(str(run)), len(trained_on.indices("train"))
    everything = eval_set.find_leakage(trained_on, "all", known)
    assert everything == eval_set.Leakage(f"{n_train} of 40 images", True)


def test_a_run_is_evaluated_on_its_own_data_without_being_told(tmp_path: Path, monkeypatch) -> None:
    """Dataset, columns and division are the run's, also where the dataset is named by another path."""
    run = small_models.checkpoint(tmp_path / "run" / "best").parent
    pictures = small_models.dataset(tmp_path / "pictures", 40)
    lines = [f"{i},{small_models.CLASS_IDS[i % 5]}" for i in range(40)]
    (pictures / "labels.csv").write_text("\n".join(["id,category", *lines]))
    columns = Columns(label="category", file="{id}.jpg")
    own = DataSettings(str(pictures / "labels.csv"), columns=columns, splits=Splits(seed=3, limit=30))
    trained_on = datasets.load(own)
    runs.begin(str(run), Recipe(), trained_on)
    monkeypatch.chdir(pictures)
    for settings in ((), ("--dataset", "labels.csv")):
        assert evaluate("--checkpoint", str(run), "--output", str(tmp_path / "out"), *settings) == 0
        rows = pq.read_table(tmp_path / "out" / "evaluation.parquet")
        tested = {trained_on.recorded_uris()[i] for i in trained_on.indices("test")}
        assert set(rows["uri"].to_pylist()) == tested
        assert set(rows["split"].to_pylist()) == {"test"}
    small_models.small_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="give --dataset"):
        evaluate("--bundle", str(tmp_path / "bundle"), "--output", str(tmp_path / "out"))


def test_the_label_map_of_the_run_is_used_and_unknown_labels_are_written_to_one(tmp_path: Path) -> None:
    run = small_models.checkpoint(tmp_path / "run" / "best").parent
    pictures = small_models.dataset(tmp_path / "pictures", 10)
    dataset = pictures / "labels.csv"
    dataset.write_text(
        "\n".join(["file,label", *(f"{i}.jpg,{'cars' if i % 2 else 'Sprts'}" for i in range(10))])
    )
    settings = ("--checkpoint", str(run), "--dataset", str(dataset), "--output", str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"2 of 2 labels(.|\n)*out/label_map.csv") as refused:
        evaluate(*settings)
    assert "--taxonomy" not in str(refused.value)
    label_map = tmp_path / "out" / "label_map.csv"
    assert "Sprts,483,Sports" in label_map.read_text()
    label_map.write_text("label,target\ncars,1\nSprts,483\n")
    trained_on = datasets.load(DataSettings(str(dataset), label_map=str(label_map)))
    runs.begin(str(run), Recipe(), trained_on)
    assert evaluate(*settings) == 0


def test_copies_of_a_runs_images_are_not_taken_for_new_ones() -> None:
    rows = pa.table({"uri": ["b/1", "b/2"], "split": ["test", "test"]})
    data = datasets.LabelledData(
        rows,
        ("x",),
        taxonomy.load("labels", labels=["x"]),
        DataSettings("b"),
        False,
        divided_here=frozenset(["test"]),
    )
    seen = eval_set.find_leakage(data, "test", {"a/1": "train", "a/2": "train"})
    assert seen.suspected and "2 are at addresses that its run does not know" in seen.summary


def test_a_bundle_and_a_checkpoint_cannot_be_judged_at_once() -> None:
    with pytest.raises(InputError, match="either --bundle or --checkpoint"):
        evaluate("--dataset", "x", "--output", "y")


def test_settings_of_a_bundle_are_refused_for_a_checkpoint() -> None:
    """Or float32's numbers would be taken for int8's."""
    settings = ("--checkpoint", "run", "--dataset", "x", "--output", "y", "--precision", "int8")
    with pytest.raises(InputError, match="precision: a checkpoint is evaluated in PyTorch"):
        evaluate(*settings)
