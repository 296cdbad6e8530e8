"""Settings: what is accepted, what is refused, what a resumed run may change."""

import json
from dataclasses import fields, replace

import pytest

from rkdo.config import ADDED, CHANGEABLE, TrainConfig, check_resumable
from rkdo.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "mnist"),
        ("method", "simclr"),
        ("stem", "none"),
        ("kernel", "laplace"),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("image_size", 7),
        ("projection", 0),
        ("temperature", 0.0),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("alpha_schedule", "exponential"),
        ("alpha_final", -0.1),
        ("alpha_final", 1.1),
        ("recursion", "sparse"),
        ("history", 0),
        ("field_dtype", "float16"),
        ("update_every", "batch"),
        ("icon_weight", -0.1),
        ("icon_weight", 1.1),
        ("temperature_decay", 1.0),
        ("temperature_decay", -0.1),
        ("stop_slope", -1e-3),
        ("stop_slope", float("nan")),
        ("stop_window", 1),
        ("depth", 0),
        ("depth", 2.0),
        ("depth", True),
        ("cooling", 1.0),
        ("cooling", -0.1),
        ("debias", 1.5),
        ("epochs", -1),
        ("epochs", 0),
        ("steps_per_epoch", 0),
        ("batch_size", 1),
        ("batch_size", "64"),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("weight_decay", -1e-5),
        ("seed", -1),
        ("workers", -1),
        ("evaluate_every", -1),
        ("checkpoint_every", 0),
        ("download", 1),
    ],
)
def test_a_bad_value_is_named_with_what_came(name, value):
    with pytest.raises(UserError) as caught:
        TrainConfig(**{name: value})
    assert str(caught.value).startswith("--" + name.replace("_", "-") + " must be ")
    assert str(value) in str(caught.value)


def test_the_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.method, config.depth, config.alpha, config.cooling) == ("rkdo", 3, 0.5, 0.1)
    assert (config.lr, config.weight_decay, config.batch_size) == (1e-3, 1e-5, 64)
    assert (config.debias, config.projection, config.stem) == (0.2, 64, "imagenet")
    assert (config.recursion, config.icon_weight, config.scheduled) == ("batch", 0.0, False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "icon", "recursion": "dense"},
         "--recursion dense needs --method rkdo, got icon"),
        ({"method": "infonce", "icon_weight": 0.5},
         "--icon-weight 0.5 needs --method rkdo, got infonce"),
        ({"method": "icon", "alpha_schedule": "linear"},
         "--alpha-schedule linear needs --method rkdo, got icon"),
        ({"alpha_final": 0.1}, "--alpha-final 0.1 needs --alpha-schedule linear or cosine, got"),
        ({"history": 2}, "--history 2 needs --recursion snapshot, got batch"),
        ({"history": 2, "recursion": "dense"}, "--history 2 needs --recursion snapshot, got dense"),
        ({"field_dtype": "float32"}, "--field-dtype float32 needs --recursion dense or snapshot"),
        ({"update_every": "epoch"}, "--update-every epoch needs --recursion dense or snapshot"),
        ({"depth": 2, "recursion": "dense"}, "--depth 2 needs --recursion batch, got dense"),
        ({"cooling": 0.0, "recursion": "snapshot"}, "--cooling 0.0 needs --recursion batch"),
        ({"detach_target": True, "recursion": "dense"}, "--detach-target True needs --recursion"),
        ({"alpha": 0.1, "method": "infonce"}, "--alpha 0.1 needs --method rkdo, got infonce"),
        ({"cooling": 0.2, "method": "icon"}, "--cooling 0.2 needs --method rkdo, got icon"),
        ({"depth": 1, "method": "infonce"}, "--depth 1 needs --method rkdo, got infonce"),
        ({"debias": 0.3}, "--debias 0.3 needs --method icon or a part of it, --icon-weight, got "),
        ({"kernel": "student", "method": "infonce"}, "--kernel student needs --method icon or a "),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_nothing_would_read_are_refused(settings, said):
    with pytest.raises(UserError) as caught:
        TrainConfig(**settings)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"recursion": "dense"}, "float32"),
        ({"recursion": "dense", "dtype": "float64"}, "float64"),
        ({"recursion": "dense", "field_dtype": "bfloat16"}, "bfloat16"),
        ({"recursion": "snapshot"}, "bfloat16"),
        ({"recursion": "snapshot", "field_dtype": "float32"}, "float32"),
    ],
    ids=str,
)
def test_a_field_is_stored_as_suits_its_kind_unless_given(settings, dtype):
    assert TrainConfig(**settings).storage == dtype


@pytest.mark.parametrize(
    ("dataset", "given", "size"),
    [("digits", None, 32), ("cifar10", None, 32), ("stl10", None, 64), ("folder", 96, 96)],
)
def test_image_size_follows_the_dataset_unless_given(dataset, given, size):
    assert TrainConfig(dataset=dataset, image_size=given).size == size


def test_a_configuration_survives_json():
    config = TrainConfig(dataset="stl10", temperature=0.2, steps_per_epoch=11, lr=1)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())), "x") == config


def test_a_bad_value_in_a_file_is_named_with_the_file():
    values = {**TrainConfig().to_dict(), "alpha": 2.0}
    with pytest.raises(UserError, match=r"^run/config\.json: --alpha must be between 0 and 1, got"):
        TrainConfig.from_dict(values, "run/config.json")


def test_a_run_from_before_a_setting_has_its_default():
    values = TrainConfig(seed=3).to_dict()
    for name in ADDED:
        del values[name]
    assert TrainConfig.from_dict(values, "config.json") == TrainConfig(seed=3)


def test_half_precision_needs_single():
    with pytest.raises(UserError, match="--precision bf16 needs --dtype float32, got float64"):
        TrainConfig(precision="bf16", dtype="float64")


@pytest.mark.parametrize(
    "values", [None, [], {}, {"dataset": "digits"}, {**TrainConfig().to_dict(), "more": 1}]
)
def test_something_elses_json_is_refused_by_name(values):
    with pytest.raises(UserError, match=r"^config\.json is not the configuration"):
        TrainConfig.from_dict(values, "config.json")


OTHER = {
    "dataset": "cifar10", "data_dir": "elsewhere", "download": True, "image_size": 48,
    "stem": "cifar", "projection": 8, "method": "icon", "temperature": 0.3, "alpha": 0.2,
    "depth": 2, "cooling": 0.0, "detach_target": True, "debias": 0.1, "kernel": "student",
    "epochs": 99, "steps_per_epoch": 3, "batch_size": 32, "lr": 0.1, "weight_decay": 0.0,
    "seed": 1, "dtype": "float64", "device": "cpu", "workers": 3, "evaluate_every": 0,
    "checkpoint_every": 7, "temperature_decay": 0.5, "recursion": "snapshot",
    "alpha_schedule": "linear", "alpha_final": 0.1, "history": 2, "field_dtype": "float64",
    "update_every": "epoch", "icon_weight": 0.5, "stop_slope": 0.1, "stop_window": 3,
    "evaluate_dir": "labelled", "skip_unreadable": True, "precision": "bf16",
    "csv": True, "tensorboard": True,
}  # fmt: skip
ALONG = {  # what a setting needs beside it
    "alpha_final": {"alpha_schedule": "cosine"},
    "history": {"recursion": "snapshot"},
    "field_dtype": {"recursion": "dense"},
    "update_every": {"recursion": "dense"},
    "debias": {"icon_weight": 0.5},
    "kernel": {"method": "icon"},
    "data_dir": {"dataset": "stl10"},
    "download": {"dataset": "stl10"},
    "evaluate_dir": {"dataset": "folder"},
    "skip_unreadable": {"dataset": "folder"},
}


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_resuming_may_change_where_and_how_long_but_not_what(name):
    old = TrainConfig(**ALONG.get(name, {}))
    new = replace(old, **{name: OTHER[name]})
    check_resumable(old, old)
    if name in CHANGEABLE:
        check_resumable(old, new)
    else:
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            check_resumable(old, new)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha_schedule": "linear"}, "--alpha-schedule"),
        ({"temperature_decay": 0.5}, "--temperature-decay"),
    ],
    ids=str,
)
def test_a_schedule_ends_with_the_epochs_it_was_made_for(settings, named):
    old = TrainConfig(epochs=2, **settings)
    check_resumable(old, replace(old, workers=1))
    with pytest.raises(UserError, match=f"^--epochs 4 conflicts with .* whose {named} ends with "):
        check_resumable(old, replace(old, epochs=4))
