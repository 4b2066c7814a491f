"""The model card of a run says on the hub what was measured, and nothing secret."""

from huggingface_hub import ModelCard

from pipelines.training.hub import model_card

CONTENT = {
    "recipe": {
        "model": "scratch:tiny", "epochs": 3, "batch_size": 6, "seed": 0, "metric_for_best_model": "accuracy",
    },
    "dataset": {"uri": "s3://me:hunter2@bucket/photos"},
    "taxonomy": "content-3.1",
    "classes": ["483", "v9i3On"],
    "data": {"images": {"train": 9}, "unreadable": [], "duplicates_removed": {}, "class_counts": {"483": 9}},
    "image_spec": {"height": 16, "width": 16},
    "multi_label": False,
    "temperature": 1.0,
    "best": {"epoch": 2},
    "validation": {"accuracy": 0.75},
    "test": {"accuracy": 0.5, "ece": 0.123456},
}  # fmt: skip


def test_the_hub_finds_the_measured_values_of_the_test_split_in_the_card():
    text = model_card(CONTENT, {"483": "Sports"})
    data = ModelCard(text).data
    kept = data.to_dict()
    assert (kept["library_name"], kept["pipeline_tag"]) == ("transformers", "image-classification")
    assert data.base_model is None
    found = {result.metric_type: (result.metric_value, result.dataset_split) for result in data.eval_results}
    assert found == {"accuracy": (0.5, "test"), "ece": (0.1235, "test")}
    assert "| Sports | `483` | 9 |" in text
    assert "hunter2" not in text


def test_a_fine_tuned_model_names_its_base():
    content = {**CONTENT, "recipe": {**CONTENT["recipe"], "model": "google/vit-base-patch16-224-in21k"}}
    assert (
        ModelCard(model_card(content, {"483": "Sports"})).data.base_model
        == "google/vit-base-patch16-224-in21k"
    )
