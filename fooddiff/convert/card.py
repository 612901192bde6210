"""Model cards: the README.md that Hugging Face's hub shows for an exported model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fooddiff import build
from fooddiff.report.runs import Distance, read_distances
from fooddiff.runs.load import TrainedModel
from fooddiff.runs.workdir import to_json
from fooddiff.settings import flatten


class Data(NamedTuple):
    """What is known of a data source."""

    name: str
    hub: str | None  # its name on the hub
    terms: str


FOOD101 = Data(
    "Food-101 (Bossard, Guillaumin, Van Gool 2014)",
    "ethz/food101",
    "Food-101's pictures come from foodspotting.com and belong to their owners: they are for research use.",
)
DATA = {
    "food101": FOOD101,
    "archive": FOOD101,
    "digits": Data("the 8x8 digits of scikit-learn", None, "They are the test set of UCI's optdigits, CC BY 4.0."),
    "folder": Data("a folder of images", None, "Whoever shares these weights has to know the terms of these images."),
}
TASKS = {
    "diffusion": ("diffusion model", "unconditional-image-generation"),
    "classifier": ("classifier", "image-classification"),
    "autoencoder": ("autoencoder", "image-to-image"),
}


def model_card(trained: TrainedModel, *, name: str, library: str, use: str, workdir: Path) -> str:
    """Writes the card of a model.

    Args:
        trained: the model.
        name: what to call it.
        library: the library that loads what was exported, as the hub names it.
        use: how, as Python source.
        workdir: the run's directory, whose scores of these weights are shown, or a file of weights, which has none.

    Returns:
        Markdown behind a head of YAML.
    """
    config = trained.config
    data = DATA[config.data.source]
    task, tag = TASKS[build.task_of(config)]
    size = config.data.image_size
    before = trained.meta.get("origin")
    imported = _imported(before)
    free = not imported and not _imported(_codec_origin(trained)) and config.data.source != "folder"
    scores = _scores(workdir, trained.step, trained.weights)
    head = {
        "library_name": library,
        "pipeline_tag": tag,
        "tags": ["diffusion", "image-generation"] if task == "diffusion model" else ["image"],
        **({"license": "apache-2.0"} if free else {}),
        **({"datasets": [data.hub]} if data.hub and not imported else {}),
        **({"model-index": [_index(name, data, tag, scores)]} if scores else {}),
    }
    classes = trained.class_names if trained.model.num_classes else ()
    settings = flatten({section: to_json(config)[section] for section in _SHOWN if section in config})
    parameters = sum(np.size(value) for value in trained.params.values())
    if imported:
        origin = f"The weights are imported from `{imported['file']}` (SHA-256 `{imported['sha256']}`)"
        origin += f", followed by {trained.step:,} steps of training on {data.name}." if trained.step else "."
    else:
        origin = f"It was trained on {data.name} for {trained.step:,} steps of {config.train.batch_size} images"
        if before:
            origin += f", beginning with the weights `{before['weights']}` of step {before['step']:,} of another run"
            origin += f": {trained.images_seen:,} images in all" if "images_seen" in before else ""
        origin += "."
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
            "---",
            "",
            f"# {name}",
            "",
            f"A {'class-conditional ' if classes and task == 'diffusion model' else ''}{task} for images of "
            f"{size}x{size} pixels with {parameters:,} parameters, written by fooddiff. {origin} "
            f"These are its weights `{trained.weights}`.",
            "",
            "## Use",
            "",
            *_fenced("python", use),
            "",
            "## Scores",
            "",
            *_table(scores),
            "",
            "## Data and licence",
            "",
            terms_of(trained),
            "",
            "## Limits",
            "",
            f"- It knows images of {size}x{size} pixels and "
            + (f"{len(classes)} classes, no others: {', '.join(classes)}." if classes else "no classes."),
            "- It repeats what its training images show most often, their biases included. Whether it repeats single "
            "images of them was not examined.",
            "- A picture that it draws is no record of a real dish: not for advice on food, nutrition or allergies."
            if data is FOOD101
            else "- It was made for research and teaching.",
            "",
            "## Settings",
            "",
            *_fenced("", "\n".join(f"{name} = {value}" for name, value in settings.items())),
            "",
        ]
    )


_SHOWN = ("model", "diffusion", "objective", "sample")


def terms_of(trained: TrainedModel) -> str:
    """On which terms a model may be used, as far as it is known."""
    if _imported(trained.meta.get("origin")):
        return "The terms of the imported weights and of their data hold; this file cannot tell them."
    data = DATA[trained.config.data.source]
    terms = data.terms if trained.config.data.source == "folder" else f"Weights: Apache-2.0. {data.terms}"
    if imported := _imported(_codec_origin(trained)):
        file = f"`{imported['file']}` (SHA-256 `{imported['sha256']}`)"
        terms += f" The autoencoder's weights are imported from {file}: their own terms hold for them."
    return terms


def _codec_origin(trained: TrainedModel) -> Mapping[str, Any] | None:
    return trained.meta.get("codec_origin")


def _imported(origin: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The file that the weights, or those that they began with, were imported from."""
    while origin is not None and "file" not in origin:
        origin = origin.get("origin")
    return origin


def _scores(workdir: Path, step: int, weights: str) -> list[Distance]:
    found = (score for path in sorted((workdir / "eval").glob("*.json")) for score in read_distances(path))
    return [score for score in found if (score.step, score.weights) == (step, weights)]


def _table(scores: Sequence[Distance]) -> list[str]:
    if not scores:
        return ["These weights have not been scored."]
    rows = [
        f"| {score.conditions.metric} | {score.value:.4g} | {'-' if score.error is None else f'{score.error:.2g}'} | "
        f"{score.conditions.n:,} | {score.conditions.sampler} | {score.conditions.reference} | "
        f"{score.conditions.resize} |"
        for score in scores
    ]
    head = "| metric | value | 1 sd | images | drawn with | against | resize |"
    return [head, "|--|--|--|--|--|--|--|", *rows]


def _index(name: str, data: Data, tag: str, scores: Sequence[Distance]) -> dict[str, Any]:
    """The scores as the hub's leaderboards read them."""
    metrics = [
        {"type": score.conditions.metric.lower(), "name": str(score.conditions), "value": score.value}
        for score in scores
    ]
    dataset = {"name": data.name, "type": data.hub or "other"}
    return {"name": name, "results": [{"task": {"type": tag}, "dataset": dataset, "metrics": metrics}]}


def _fenced(language: str, text: str) -> list[str]:
    return [f"```{language}", text.strip("\n"), "```"]
