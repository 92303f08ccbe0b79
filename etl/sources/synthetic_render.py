"""How the factors of the demo shop are rendered: sentences, photos, series. Every factor can be read back exactly."""

import colorsys
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Factor "text": what the product is for. Synonyms of a group occur together, so that they can be learnt unlabelled.
TOPICS = (
    (
        "garden",
        "soil",
        "seedlings",
        "terrace",
        "hedge",
        "lawn",
        "flowerbed",
        "orchard",
        "compost",
        "greenhouse",
    ),
    ("kitchen", "oven", "recipes", "dough", "saucepan", "pantry", "supper", "chef", "baking", "cutlery"),
    (
        "office",
        "desk",
        "meetings",
        "paperwork",
        "colleagues",
        "stapler",
        "printer",
        "ledger",
        "deadline",
        "folders",
    ),
    (
        "camping",
        "tent",
        "campfire",
        "trail",
        "backpack",
        "summit",
        "lantern",
        "hiking",
        "wilderness",
        "forest",
    ),
    (
        "nursery",
        "toddler",
        "crib",
        "bedtime",
        "playroom",
        "cuddles",
        "lullaby",
        "stroller",
        "bottle",
        "naptime",
    ),
)
# Factor "mood": half of the interaction; says nothing alone.
MOODS = (
    ("sturdy", "robust", "solid", "rugged", "durable", "tough", "unbreakable", "dependable"),
    ("elegant", "graceful", "refined", "stylish", "polished", "classy", "tasteful", "chic"),
    ("cheerful", "playful", "merry", "funny", "joyful", "bubbly", "jolly", "lively"),
    ("modest", "plain", "simple", "humble", "bare", "austere", "minimal", "frugal"),
    ("clever", "smart", "ingenious", "inventive", "nifty", "brainy", "crafty", "astute"),
)
TOPIC_SENTENCES = (
    "It was made with the {0} and the {1} in mind.",
    "You will want it near the {0}, and again for the {1}.",
    "Think of the {0}, of the {1} and of the {2}.",
    "Our customers use it for the {0} and talk about the {1}.",
    "From the {0} to the {1}, it has its place.",
)
MOOD_SENTENCES = (
    "A {0} and {1} companion.",
    "People call it {0}, some say {1}.",
    "The design is {0} throughout, even {1}.",
    "We find it {0}.",
)
NEUTRAL_SENTENCES = (
    "Delivery takes three to five days.",
    "The box contains one piece and a leaflet.",
    "Please read the leaflet before first use.",
    "It can be returned within thirty days.",
    "The colour may differ slightly from the photo.",
    "Now in its second edition.",
    "Batteries are not needed.",
    "Wipe with a damp cloth.",
    "Spare parts are available on request.",
)
OPENINGS = ("This item", "Our latest product", "The piece you see here", "This find", "An old favourite")
VERBS = (
    "is back in stock",
    "has arrived",
    "ships today",
    "needs no introduction",
    "is offered at a fair price",
)

HUES = (0.0, 0.15, 0.36, 0.58, 0.80)  # factor "image": the hue of the main object; bands are disjoint
HUE_JITTER = 0.045
PHOTO_PIXELS = 96
WEEKS = (16, 48)
VARIABLES = ("units_sold", "price_index", "returns")


def description(topic: int, mood: int, rng: np.random.Generator) -> str:
    """10 to 60 words of English that mention two to four words of a topic and one to four of a mood."""
    topics = list(rng.permutation(TOPICS[topic]))
    moods = list(rng.permutation(MOODS[mood]))
    sentences = [
        str(rng.choice(TOPIC_SENTENCES)).format(*topics),
        str(rng.choice(MOOD_SENTENCES)).format(*moods),
    ]
    if rng.random() < 0.5:
        sentences.append(str(rng.choice(MOOD_SENTENCES)).format(*moods[2:]))
    sentences += list(rng.choice(NEUTRAL_SENTENCES, size=int(rng.integers(0, 3)), replace=False))
    body = " ".join(sentences[i] for i in rng.permutation(len(sentences)))
    return f"{rng.choice(OPENINGS)} {rng.choice(VERBS)}. {body}"


def photo(colour: int, rng: np.random.Generator) -> bytes:
    """A JPEG: one saturated object of the factor's hue; shape, texture, place, size, background and clutter are noise."""
    side = PHOTO_PIXELS
    grey = int(rng.integers(120, 240))
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):  # grey clutter
        x, y, size = [*rng.integers(0, side, 2).tolist(), int(rng.integers(4, 16))]
        tone = int(rng.integers(30, 230))
        draw.rectangle((x, y, x + size, y + size), fill=(tone, tone, tone))
    hue = (HUES[colour] + rng.uniform(-HUE_JITTER, HUE_JITTER)) % 1
    fill = _rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.6, 0.95))
    radius = int(rng.integers(16, 32))
    x, y = rng.integers(radius, side - radius, 2).tolist()
    _shape(draw, int(rng.integers(0, 5)), (x, y), radius, fill)
    if rng.random() < 0.6:  # texture: darker stripes of the same hue
        dark = _rgb(hue, 0.9, 0.45)
        for offset in range(-radius, radius, int(rng.integers(6, 12))):
            draw.line((x + offset, y - radius // 2, x + offset, y + radius // 2), fill=dark, width=2)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.8))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _shape(
    draw: ImageDraw.ImageDraw, kind: int, centre: tuple[int, int], radius: int, fill: tuple[int, int, int]
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == 0:
        draw.ellipse(box, fill=fill)
    elif kind == 1:
        draw.rectangle(box, fill=fill)
    elif kind == 2:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    elif kind == 3:
        draw.ellipse(box, outline=fill, width=max(6, radius // 2))
    else:
        corners = range(10)
        points = [(radius if c % 2 == 0 else radius * 0.5, np.pi * c / 5) for c in corners]
        draw.polygon([(x + r * np.sin(a), y - r * np.cos(a)) for r, a in points], fill=fill)


def sales(pattern: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weekly series by variable; ``units_sold`` has one of five shapes: rising, falling, fast or slow waves, a step."""
    weeks = int(rng.integers(*WEEKS, endpoint=True))
    t = np.linspace(0, 1, weeks)
    phase = rng.uniform(0, 2 * np.pi)
    shape = (
        2 * t - 1,
        1 - 2 * t,
        np.sin(2 * np.pi * np.arange(weeks) / 4 + phase),
        np.sin(2 * np.pi * np.arange(weeks) / 12 + phase),
        np.where(np.abs(t - rng.uniform(0.35, 0.65)) < 0.12, 2.0, -0.6),
    )[pattern]
    units = rng.uniform(40, 60) + rng.uniform(10, 18) * shape + rng.normal(0, 1.5, weeks)
    price = 100 + np.cumsum(rng.normal(0, 1, weeks))
    returns = np.maximum(0, units * rng.uniform(0.02, 0.1) + rng.normal(0, 0.5, weeks))
    return {"units_sold": units.round(2), "price_index": price.round(2), "returns": returns.round(2)}
