"""How good an encoder's representation is, by scikit-learn's measures.

scikit-learn takes a second to be imported: functions do that, so that who needs none of its
measures does not wait for it.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rkdo.batches import evaluation_loader
from rkdo.config import TrainConfig
from rkdo.data import Data, Images, LabelledFiles, LabelledImages, load_data
from rkdo.encoder import Encoder, build_encoder
from rkdo.errors import UserError
from rkdo.ranks import find_device
from rkdo.record import Run, write_json

Array = NDArray[np.generic]

NEIGHBOURS = 5
DRAWS = 100  # of one label a class: one draw may be lucky
TRUSTED_IMAGES = 2000  # trustworthiness compares all pairs: more images would take gigabytes
PAPER_BATCHES, SEED = 11, 42  # of its evaluation

# What each metric is called in a table.
LABELS = {
    "linear_probe": "linear probe accuracy",
    "one_label": "accuracy with one label a class",
    "knn": "5-NN accuracy",
    "nmi": "k-means NMI",
    "ari": "k-means ARI",
    "neighbour_agreement": "label agreement of 5 neighbours",
    "trustworthiness": "trustworthiness (5 neighbours)",
}


def evaluate(encoder: Encoder, data: Data, config: TrainConfig) -> dict[str, float]:
    """The backbone's features: what is learned on the training images, judged on the test images.

    Neighbours and clusters are those of unit features; trustworthiness compares the neighbours
    among the first 2,000 test images with those of the images' pixels.
    """
    from sklearn.manifold import trustworthiness
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels = extract(encoder.backbone, data.train, config), _labels(data.train)
    test, test_labels = extract(encoder.backbone, data.test, config), _labels(data.test)
    probe = _probe().fit(train, train_labels)
    train, unit = _unit(train), _unit(test)
    knn = KNeighborsClassifier(NEIGHBOURS).fit(train, train_labels)
    return {
        "linear_probe": float(probe.score(test, test_labels)),
        "one_label": one_label(train, train_labels, unit, test_labels),
        "knn": float(knn.score(unit, test_labels)),
        **clustering(unit, test_labels, data.classes, config.seed),
        "neighbour_agreement": neighbour_agreement(unit, test_labels),
        "trustworthiness": float(
            trustworthiness(
                _pixels(data.test, config, TRUSTED_IMAGES),
                unit[:TRUSTED_IMAGES],
                n_neighbors=NEIGHBOURS,
            )
        ),
    }


def evaluate_as_paper(encoder: Encoder, data: Data, config: TrainConfig) -> dict[str, float]:
    """The paper's protocol: the embeddings of the first 11 test batches and nothing else.

    The probe learns on 80 % of them and is scored on the other 20 %. Folders come class by class,
    where the paper's test sets are mixed: of them as many images are drawn by a fixed seed.

    Raises:
        UserError: those to learn from are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    count = PAPER_BATCHES * config.batch_size
    test = data.test.shuffled(SEED) if isinstance(data.test, LabelledFiles) else data.test
    embeddings = extract(encoder, test, config, count)
    labels = _labels(test)[:count]
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        embeddings, labels, test_size=0.2, random_state=SEED
    )
    if len(set(seen_labels.tolist())) < 2:
        raise UserError(
            f"--protocol paper must find two classes among {len(seen)} test images to learn from, "
            "got one"
        )
    probe = LogisticRegression(max_iter=1000).fit(seen, seen_labels)
    return {
        "linear_probe": float(probe.score(held_out, held_out_labels)),
        **clustering(embeddings, labels, data.classes, seed=SEED),
        "neighbour_agreement": neighbour_agreement(embeddings, labels),
    }


PROTOCOLS: dict[str, Callable[[Encoder, Data, TrainConfig], dict[str, float]]] = {
    "standard": evaluate,
    "paper": evaluate_as_paper,
}


def evaluate_run(
    folder: Path,
    protocol: str = "standard",
    *,
    data_dir: str | None = None,
    evaluate_dir: str | None = None,
    device: str = "auto",
) -> tuple[dict[str, float], Path]:
    """Evaluate a run's last checkpoint; the metrics, and the file in `folder` they are written to.

    Raises:
        UserError: the folder holds no run or no usable checkpoint, or the images are missing.
    """
    run = Run(folder)
    config = run.read_config()
    if data_dir is not None:
        config = replace(config, data_dir=data_dir)
    if evaluate_dir is not None:
        config = replace(config, evaluate_dir=evaluate_dir)
    saved = run.load_checkpoint()
    if saved is None:
        raise UserError(f"{folder} has no checkpoint yet: let it train first")
    encoder = build_encoder(config).to(find_device(device), getattr(torch, config.dtype))
    try:
        encoder.load_state_dict(saved["encoder"])
        step = int(saved["step"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{run.checkpoint} does not fit {folder / 'config.json'}") from error
    metrics = PROTOCOLS[protocol](encoder, load_data(config, run.read_skipped()), config)
    path = folder / ("evaluation.json" if protocol == "standard" else f"evaluation-{protocol}.json")
    try:
        write_json(path, {"step": step, "protocol": protocol, **metrics})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return metrics, path


@torch.no_grad()
def extract(
    network: nn.Module, images: Images, config: TrainConfig, count: int | None = None
) -> Array:
    """`network`'s output for the first `count` images in evaluation mode, float64 [n, dim]."""
    weight = next(network.parameters())
    training = network.training
    network.eval()
    try:
        rows: list[Tensor] = [
            network(views.to(weight.device, weight.dtype)).double().cpu()
            for views in evaluation_loader(images, config, weight.device, count)
        ]
    finally:
        network.train(training)
    return torch.cat(rows).numpy()


def clustering(features: Array, labels: Array, classes: int, seed: int) -> dict[str, float]:
    """Agreement of k-means with the labels."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    with warnings.catch_warnings():  # fewer distinct points than clusters: a collapsed encoder
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(min(classes, len(labels)), n_init=10, random_state=seed % 2**32)
        clusters = means.fit_predict(features)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def neighbour_agreement(features: Array, labels: Array) -> float:
    """Share of an image's 5 nearest neighbours, itself aside, that have its label."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(features)
    neighbours = nearest.kneighbors(return_distance=False)  # [n, 5], without the point itself
    return float((labels[neighbours] == labels[:, None]).mean())


def one_label(train: Array, train_labels: Array, test: Array, test_labels: Array) -> float:
    """Accuracy where one training image of each class has a label, and a test image gets that of
    the one most like it, of unit features; the mean over 100 draws of the labelled ones."""
    scores = []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(train_labels))
        kinds, first = np.unique(train_labels[order], return_index=True)
        nearest = np.dot(test, train[order[first]].T).argmax(1)
        scores.append((kinds[nearest] == test_labels).mean())
    return float(np.mean(scores))


def _probe():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _pixels(images: Images, config: TrainConfig, count: int) -> Array:
    cpu = torch.device("cpu")
    views = [view.flatten(1) for view in evaluation_loader(images, config, cpu, count)]
    return torch.cat(views).numpy()


def _unit(features: Array) -> Array:
    return F.normalize(torch.from_numpy(features), dim=1).numpy()


def _labels(images: LabelledImages) -> Array:
    return images.labels.numpy()
