"""Where images come from. Every source is a function that returns a `Source`."""

from fooddiff.data.sources.food101_archive import archive
from fooddiff.data.sources.food101_tfds import food101
from fooddiff.data.sources.image_folder import folder
from fooddiff.data.sources.sklearn_digits import digits
from fooddiff.data.sources.source import SPLITS, Source, Split

__all__ = ["SPLITS", "Source", "Split", "archive", "digits", "folder", "food101"]
