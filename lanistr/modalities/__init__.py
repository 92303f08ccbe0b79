"""The modalities, by kind."""

from typing import Any

from lanistr.manifest import Manifest, ModalitySchema
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
    return modalities_of(manifest.modalities, configs, f"dataset {manifest.name}")


def modalities_of(
    schemas: dict[str, ModalitySchema], configs: dict[str, dict[str, Any]], origin: str
) -> dict[str, Modality[Any, Any]]:
    """As `make_modalities`, of the schemas of ``origin``."""
    modalities: dict[str, Modality[Any, Any]] = {}
    for name, schema in schemas.items():
        if schema.kind not in MODALITIES:
            raise ValueError(f"modality {name}: unknown kind {schema.kind!r}; known are {', '.join(MODALITIES)}")
        if name in configs:
            modalities[name] = MODALITIES[schema.kind](name, configs[name], schema)
    if not modalities:
        raise ValueError(f"{origin} has {', '.join(schemas)}; the recipe configures {', '.join(configs)}")
    return modalities
