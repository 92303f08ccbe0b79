"""The modalities, by kind."""

from typing import Any

from lanistr.manifest import Manifest
from lanistr.modalities.base import Modality
from lanistr.modalities.image import ImageModality
from lanistr.modalities.tabular import TabularModality
from lanistr.modalities.text import TextModality
from lanistr.modalities.timeseries import SeriesModality

MODALITIES: dict[str, type[Modality[Any, Any]]] = {
    cls.kind: cls for cls in (TextModality, ImageModality, TabularModality, SeriesModality)
}


def make_modalities(manifest: Manifest, configs: dict[str, dict[str, Any]]) -> dict[str, Modality[Any, Any]]:
    """One `Modality` for each modality that both the dataset and the recipe have, in the manifest's order.

    Raises:
        ValueError: an unknown kind, or nothing in common.
    """
    modalities: dict[str, Modality[Any, Any]] = {}
    for name, schema in manifest.modalities.items():
        if schema.kind not in MODALITIES:
            raise ValueError(f"modality {name}: unknown kind {schema.kind!r}; known are {', '.join(MODALITIES)}")
        if name in configs:
            modalities[name] = MODALITIES[schema.kind](name, configs[name], schema)
    if not modalities:
        raise ValueError(
            f"dataset {manifest.name} has {', '.join(manifest.modalities)}; the recipe configures {', '.join(configs)}"
        )
    return modalities
