"""Cartoon faces with an expression, a valence and an arousal: a data set that needs no download.

Seven expressions in RAF-DB's order and with a long tail like RAF-DB's, drawn with Pillow out of seven features (mouth
curve, opening and width, brow height and tilt, eye opening, nose wrinkle). Identity, skin, hair, glasses, an occluding
patch, background, light and rotation are nuisance. A face depends on (seed, split, index) alone. It is easy enough that
a ResNet-18 learns it in a few epochs from scratch, and large enough that it memorises wrong labels afterwards.

    python support/toyfaces.py                                 # toyfaces.png: a contact sheet, a row per class
    python support/toyfaces.py --difficulty 1 --out hard.png   # the subtlest faces
"""

import argparse
import sys

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
# RAF-DB's training set, but for fear, 281 there: that would be 57 of 2,500 faces, too few to learn from noisy labels.
FREQUENCIES = np.array([1290, 500, 717, 4772, 1982, 705, 2524]) / 12490
SPLITS = {"train": 2500, "valid": 800, "test": 800}

# Mouth curve (1 smile, -1 frown), opening, width; brow height, tilt (1 inner ends up); eye opening; nose wrinkle.
FEATURES = np.array(
    [
        [0.00, 1.00, 0.45, 1.00, 0.00, 1.45, 0.00],  # surprise: round open mouth, high brows, wide eyes
        [-0.45, 0.65, 1.10, 0.75, 0.80, 1.45, 0.00],  # fear: wide open mouth, high slanted brows, wide eyes
        [-0.60, 0.40, 0.75, -0.45, -0.30, 0.40, 1.00],  # disgust: wrinkled nose, narrowed eyes, raised lip
        [1.00, 0.40, 1.00, 0.15, 0.00, 0.80, 0.00],  # happiness: a smile
        [-1.00, 0.00, 0.65, 0.10, 1.00, 0.65, 0.00],  # sadness: mouth corners down, inner brows up
        [-0.25, 0.00, 0.60, -0.90, -1.00, 1.05, 0.00],  # anger: low brows drawn together, tight mouth
        [0.00, 0.00, 0.70, 0.00, 0.00, 1.00, 0.00],  # neutral
    ]
)
NEUTRAL = FEATURES[CLASSES.index("neutral")]
# Valence and arousal of a full expression; places on the circumplex as in AffectNet's annotation guide, rounded.
VALENCE_AROUSAL = np.array([[0.2, 0.8], [-0.4, 0.8], [-0.7, 0.4], [0.8, 0.4], [-0.7, -0.3], [-0.5, 0.7], [0.0, 0.0]])

SKINS = np.array([[255, 219, 172], [241, 194, 125], [224, 172, 105], [198, 134, 66], [158, 100, 55], [120, 76, 46]])
HAIRS = np.array([[30, 24, 20], [78, 50, 30], [130, 84, 44], [205, 165, 90], [150, 60, 30], [170, 170, 170]])


def expression(split: str, index: int, seed: int = 0, difficulty: float = 0.0, label: int | None = None):
    """What face number `index` of a split expresses, before anything is drawn.

    Returns its label, an index into CLASSES; valence and arousal, float32 (2,) in [-1, 1]; the seven features; and the
    generator that `draw_face` goes on with.
    """
    part = list(SPLITS).index(split)
    if label is None:
        # Multiples of the golden ratio spread evenly over [0, 1): the first n faces have n times FREQUENCIES of each
        # class, to a face or two, where independent draws would leave the rarest class to chance.
        place = (np.random.default_rng([seed, part]).random() + index * (5**0.5 - 1) / 2) % 1
        label = min(int(np.searchsorted(FREQUENCIES.cumsum(), place, side="right")), len(CLASSES) - 1)
    rng = np.random.default_rng([seed, part, index])
    # A class at some intensity, with a little of another class blended in: some faces are truly ambiguous.
    intensity = rng.uniform(0.85 - 0.50 * difficulty, 1.15 - 0.25 * difficulty)
    other = int(rng.integers(len(CLASSES)))
    blend = rng.beta(1, 4) * (0.12 + 0.48 * difficulty)
    features = NEUTRAL + intensity * ((1 - blend) * FEATURES[label] + blend * FEATURES[other] - NEUTRAL)
    va = intensity * ((1 - blend) * VALENCE_AROUSAL[label] + blend * VALENCE_AROUSAL[other])
    return label, np.clip(va, -1, 1).astype(np.float32), features + rng.normal(0, 0.06, len(features)), rng


def draw_face(split: str, index: int, seed: int = 0, size: int = 48, difficulty: float = 0.0, label: int | None = None):
    """Draw face number `index` of a split: uint8 (size, size, 3), its label, valence and arousal (see `expression`).

    difficulty in [0, 1]: 1 draws smaller, paler and subtler faces with thinner strokes, more blending and more clutter.
    label: the expression to draw; by default drawn by FREQUENCIES.
    """
    label, va, features, rng = expression(split, index, seed, difficulty, label)
    curve, opening, width, brow_height, brow_tilt, eye, wrinkle = features

    # Drawn at twice the size, box-filtered down: strokes keep fractional widths. Lengths are shares of the half face.
    s = 2 * size
    background = np.clip(rng.integers(60, 210) + rng.normal(0, 15, 3), 0, 255).astype(int)
    image = Image.new("RGB", (s, s), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 3 + 5 * difficulty))):  # clutter behind the face
        x, y, w, h = rng.uniform(-0.2, 1, 2).tolist() + rng.uniform(0.1, 0.5, 2).tolist()
        colour = np.clip(background + rng.normal(0, 40, 3), 0, 255).astype(int)
        draw.rectangle([x * s, y * s, (x + w) * s, (y + h) * s], fill=tuple(colour.tolist()))

    r = s / 2 * rng.uniform(0.86 - 0.30 * difficulty, 0.98 - 0.18 * difficulty)  # half height of the face
    aspect = rng.uniform(0.80, 0.95)
    cx, cy = s / 2 + (s / 2 - r) * rng.uniform(-0.6, 0.6, 2)
    stroke = max(1, round(s * rng.uniform(0.040, 0.055) * (1 - 0.5 * difficulty)))
    skin = np.clip(SKINS[rng.integers(len(SKINS))] + rng.normal(0, 8, 3), 0, 255)
    hair = np.clip(HAIRS[rng.integers(len(HAIRS))] + rng.normal(0, 8, 3), 0, 255)
    ink = (0.12 + 0.45 * difficulty) * skin  # paler features when difficult
    skin, hair, ink = (tuple(c.astype(int).tolist()) for c in (skin, hair, ink))

    def at(x, y):
        return cx + x * r * aspect, cy + y * r

    def ellipse(x, y, rx, ry, **kw):
        (x0, y0), (x1, y1) = at(x - rx, y - ry), at(x + rx, y + ry)
        draw.ellipse([x0, y0, max(x0, x1), max(y0, y1)], **kw)

    # Head and hair
    hairline = rng.uniform(-0.80, -0.62)
    if rng.random() < 0.45:  # long hair
        ellipse(0, 0.05, 1.12, 1.0, fill=hair)
    ellipse(0, 0.04, 1.0, 0.96, fill=skin)
    draw.chord([*at(-1.02, -1.0), *at(1.02, 1.0)], 180 + 40 * (-hairline), 360 - 40 * (-hairline), fill=hair)

    # Eyes and brows
    spread, eye_y, iris = rng.uniform(0.36, 0.44), rng.uniform(-0.20, -0.12), rng.integers(20, 110, 3)
    eye_height = max(0.03, 0.13 * eye)
    gaze = rng.uniform(-0.05, 0.05)
    for side in (-1, 1):
        ellipse(side * spread, eye_y, 0.22, eye_height, fill=(245, 245, 245), outline=ink)
        ellipse(side * spread + gaze, eye_y, 0.09, min(0.085, eye_height), fill=tuple(iris.tolist()))
        y = eye_y - 0.25 - 0.13 * brow_height
        inner, outer = (
            at(side * (spread - 0.23), y - 0.14 * brow_tilt),
            at(side * (spread + 0.23), y + 0.14 * brow_tilt),
        )
        draw.line([inner, outer], fill=ink, width=stroke)
    if rng.random() < 0.15:  # glasses
        frame = tuple(rng.integers(0, 80, 3).tolist())
        for side in (-1, 1):
            ellipse(side * spread, eye_y, 0.28, 0.20, outline=frame, width=max(1, stroke // 2))
        draw.line([at(-spread + 0.28, eye_y), at(spread - 0.28, eye_y)], fill=frame, width=max(1, stroke // 2))

    # Nose, with wrinkles across its bridge
    nose = rng.uniform(0.16, 0.26)
    draw.line(
        [at(0, eye_y + 0.12), at(0.07, eye_y + 0.12 + nose), at(-0.03, eye_y + 0.14 + nose)],
        fill=ink,
        width=max(1, stroke // 2),
    )
    if wrinkle > 0.3:
        for k in range(3):
            y = eye_y + 0.02 + 0.085 * k
            draw.line(
                [at(-0.16 * wrinkle, y - 0.05), at(0, y), at(0.16 * wrinkle, y - 0.05)],
                fill=ink,
                width=max(1, 3 * stroke // 4),
            )

    # Mouth: a parabola for each lip
    mouth_y, t = rng.uniform(0.48, 0.56), np.linspace(-1, 1, 13)
    half, lift = 0.50 * max(width, 0.2), 0.20 * curve
    upper = mouth_y + lift * (0.6 - t**2) - 0.10 * max(opening, 0) * (1 - t**2) - 0.06 * max(wrinkle, 0) * (1 - t**2)
    lower = mouth_y + lift * (0.6 - t**2) + 0.28 * max(opening, 0) * (1 - t**2)
    points = [at(x, y) for x, y in zip(half * t, upper)]
    if opening > 0.12:
        draw.polygon(points + [at(x, y) for x, y in zip(half * t[::-1], lower[::-1])], fill=(110, 20, 30), outline=ink)
    draw.line(points, fill=ink, width=stroke, joint="curve")

    image = image.rotate(rng.normal(0, 5), Image.BILINEAR, fillcolor=tuple(background.tolist()))
    if rng.random() < 0.10 + 0.15 * difficulty:  # an occluding patch
        x, y = rng.uniform(0.05, 0.75, 2) * s
        patch = [x, y, x + rng.uniform(0.12, 0.25) * s, y + rng.uniform(0.12, 0.25) * s]
        ImageDraw.Draw(image).rectangle(patch, fill=tuple(rng.integers(0, 255, 3).tolist()))

    pixels = np.asarray(image.reduce(2), dtype=np.float32)
    gx, gy = rng.uniform(-0.2, 0.2, 2)  # light from one side
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = rng.uniform(0.75, 1.15) * (1 + gx * ramp[None, :] + gy * ramp[:, None])
    pixels = pixels * light[:, :, None] + rng.normal(0, 3, (size, size, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8), label, va


def contact_sheet(columns: int = 14, size: int = 96, seed: int = 0, difficulty: float = 0.0) -> Image.Image:
    """Faces of the training split, a row per class in the order of CLASSES, `columns` a row, `size` pixels each."""
    sheet = Image.new("RGB", (columns * size, len(CLASSES) * size))
    for row in range(len(CLASSES)):
        for column in range(columns):
            face, _, _ = draw_face("train", row * columns + column, seed, size, difficulty, label=row)
            sheet.paste(Image.fromarray(face), (column * size, row * size))
    return sheet


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Write a contact sheet of the toy faces, a row per class.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("--out", default="toyfaces.png", help="file to write (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=14, help="faces per class (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="pixels per face (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faces (default: %(default)s)")
    parser.add_argument(
        "--difficulty", type=float, default=0.0, help="0 (clear faces) to 1 (subtle ones) (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.difficulty <= 1 or args.columns < 1 or args.size < 8 or args.seed < 0:
        parser.error("--difficulty lies in [0, 1], --columns is at least 1, --size at least 8, --seed at least 0")
    try:
        contact_sheet(args.columns, args.size, args.seed, args.difficulty).save(args.out)
    except (OSError, ValueError, MemoryError, OverflowError) as error:  # also an ending of no image format
        parser.error(f"--out {args.out}: cannot be written ({error})")
    print(f"{args.out}: a row each of {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
