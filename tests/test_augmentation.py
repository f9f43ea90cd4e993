"""Augmentation against torchvision's, operation by operation."""

from support import augmentation
from support.augmentation import OPERATIONS, apply_operations, augment, rand_augment, random_affine, random_crop

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from torchvision.transforms.autoaugment import _apply_op


def images(n=6, c=3, h=20, w=20, seed=0):
    return torch.randint(256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def draws(part, count=12, epoch=1):
    """draw(name) as common.Loader hands it out for the places `part` of an epoch of `count` samples."""

    def draw(name):
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + epoch)
        return torch.rand(count, generator=generator)[part]

    return draw


def chosen(count, **values):
    """draw(name) with numbers given by name, 0.5 (the middle of each range) otherwise."""
    return lambda name: torch.full((count,), values.get(name.replace(" ", "_"), 0.5))


def parts(count, size):
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def test_flip_mirrors_where_the_draw_is_below_one_half():
    x = images(4)
    got = augmentation.random_flip(x, torch.tensor([0.0, 0.49, 0.5, 0.99]))
    assert torch.equal(got[:2], TF.horizontal_flip(x[:2])) and torch.equal(got[2:], x[2:])


def test_crop_equals_torchvisions_pad_and_crop():
    x = images(5, h=20, w=16)
    u, v = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.999]), torch.tensor([0.999, 0.0, 0.5, 0.2, 0.6])
    got = random_crop(x, u, v, 3)
    for i in range(5):
        top, left = int(u[i] * 7), int(v[i] * 7)
        assert torch.equal(got[i], TF.crop(TF.pad(x[i], [3, 3, 3, 3]), top, left, 20, 16))
    middle = torch.full((5,), 0.5)
    assert torch.equal(random_crop(x, middle, middle, 3), x)  # the middle is the image


@pytest.mark.parametrize("c", [1, 3])
def test_colour_jitter_equals_torchvisions_steps_sample_by_sample(c):
    x = images(4, c).float()
    factors = torch.tensor([[1.0, 1.0, 1.0], [1.3, 0.7, 1.2], [0.7, 1.4, 0.5], [0.9, 1.1, 0.0]])
    got = augmentation.color_jitter(x, *factors.T)
    for i, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        wanted = TF.adjust_contrast(TF.adjust_brightness(x[i] / 255, brightness), contrast)
        wanted = TF.adjust_saturation(wanted, saturation) if c == 3 else wanted
        torch.testing.assert_close(got[i] / 255, wanted, atol=2e-4, rtol=0)


def augmented(x, part, epoch=1, crop=2, jitter=0.4):
    return augment(x, draws(part, epoch=epoch), crop=crop, jitter=jitter)


def test_brightness_contrast_and_saturation_are_drawn_apart():
    x = images(2, 3)
    drawn = augment(x, chosen(2, brightness=0.0, contrast=0.75, saturation=1.0), jitter=0.4)
    factors = (torch.full((2,), value) for value in (0.6, 1.2, 1.4))
    torch.testing.assert_close(drawn, augmentation.color_jitter(x.float(), *factors))


def test_the_same_image_twice_in_a_batch_differs():
    got = augmented(images(1).expand(8, -1, -1, -1), slice(0, 8))
    assert all(not torch.equal(got[i], got[j]) for i in range(8) for j in range(i))


def test_the_same_place_in_the_same_epoch_repeats_and_in_another_does_not():
    x = images(8)
    assert torch.equal(augmented(x, slice(2, 10)), augmented(x, slice(2, 10)))
    assert not torch.equal(augmented(x, slice(2, 10)), augmented(x, slice(2, 10), epoch=2))
    assert not torch.equal(augmented(x, slice(2, 10)), augmented(x, slice(3, 11)))


def test_augmentation_does_not_depend_on_the_batch_split():
    x = images(12)
    pieces = torch.cat([augmented(x[s], s) for s in parts(12, 5)])
    torch.testing.assert_close(augmented(x, slice(0, 12)), pieces, atol=1e-4, rtol=0)


def test_without_crop_and_jitter_only_the_flip_is_left():
    x, part = images(12), slice(0, 12)
    u = draws(part)("flip")
    assert 0 < (u < 0.5).sum() < 12
    assert torch.equal(augmented(x, part, crop=0, jitter=0.0), augmentation.random_flip(x, u))


def test_jitter_stays_within_its_strength_and_the_range_of_pixels():
    grey = torch.full((12, 1, 8, 8), 100, dtype=torch.uint8)
    got = augmented(grey, slice(0, 12), crop=0, jitter=0.3)[:, 0, 0, 0]
    assert got.min() >= 70 and got.max() <= 130 and got.unique().numel() == 12
    white = augmented(torch.full((12, 3, 8, 8), 255, dtype=torch.uint8), slice(0, 12), crop=0, jitter=0.9)
    assert white.max() <= 255 and white.min() >= 0


def odd_images(c):
    """Noise, one value, few values, low contrast, a ramp: what tables and equalisation stumble over."""
    x = images(7, 3, 48, 40, seed=3)
    x[1] = 7
    x[2] = x[2] % 2 + 100
    x[3] = x[3] // 4 + 60
    x[4] = torch.arange(40, dtype=torch.uint8) * 6
    x[5, 1] = 255
    x[6] = 0
    return x[:, :c].contiguous()


SPACE = torchvision.transforms.RandAugment()._augmentation_space(31, (48, 40))


def torchvisions(operation, image, magnitude, sign):
    if operation == "invert":
        return TF.invert(image)
    name = "".join(word.capitalize() for word in operation.split()).replace("contrast", "Contrast")
    magnitudes, signed = SPACE[name]
    value = magnitudes[magnitude].item() if magnitudes.ndim else 0.0
    nearest = torchvision.transforms.InterpolationMode.NEAREST
    return _apply_op(image, name, value * (sign if signed else 1), nearest, None)


@pytest.fixture(params=["each through its own kind of step", "each through every kind of step"])
def way(request, monkeypatch):
    """The way of a CPU, and that of a GPU."""
    monkeypatch.setattr(augmentation, "takes_its_own_alone", lambda device: "own" in request.param)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("c", [1, 3])
def test_every_operation_of_randaugment_is_torchvisions(operation, c, way):
    x, geometric = odd_images(c), operation in ("shear x", "shear y", "translate x", "translate y", "rotate")
    number = torch.full((len(x),), OPERATIONS.index(operation))
    for magnitude in (0, 10, 17, 30):
        for sign in (-1.0, 1.0):
            got = apply_operations(x, number, torch.full((len(x),), sign), magnitude)
            for i in range(len(x)):
                difference = (got[i].int() - torchvisions(operation, x[i], magnitude, sign).int()).abs()
                assert (difference > 0).float().mean() <= (0.001 if geometric else 0), (magnitude, sign, i)


@pytest.mark.parametrize("c", [1, 3])
def test_operations_are_drawn_and_applied_sample_by_sample(c, way):
    x = odd_images(c)[2:3].repeat(15, 1, 1, 1)
    given, sign = x.clone(), torch.tensor([1.0, -1, 1]).repeat(5)
    mixed = apply_operations(x, torch.arange(15), sign)
    for i in range(15):
        assert torch.equal(mixed[i], apply_operations(x[:1], torch.tensor([i]), sign[i : i + 1])[0])
    assert torch.equal(x, given)
    assert torch.equal(apply_operations(x + 0.4, torch.arange(15), sign), mixed)  # a weak view may be float
    assert torch.equal(apply_operations(x[:1] + 0.6, torch.tensor([0]), sign[:1]), x[:1] + 1)


def test_a_cpu_takes_the_way_without_the_steps_of_others():
    assert augmentation.takes_its_own_alone(torch.device("cpu"))
    assert not any(augmentation.takes_its_own_alone(torch.device(device)) for device in ("cuda", "meta"))


def test_randaugment_draws_every_operation_and_both_directions(monkeypatch):
    drawn = []
    monkeypatch.setattr(augmentation, "apply_operations", lambda x, *rest: drawn.append(rest) or x)
    rand_augment(images(1, 1, 2, 2).expand(600, -1, -1, -1), draws(slice(0, 600), 600), layers=2, magnitude=7)
    (operation, sign, magnitude), (second, *_) = drawn
    assert torch.bincount(operation, minlength=15).min() > 20 and operation.max() == 14 and magnitude == 7
    assert set(sign.tolist()) == {-1, 1} and not torch.equal(operation, second)


def test_each_layer_of_randaugment_draws_anew():
    names = []
    rand_augment(images(2), lambda name: names.append(name) or torch.full((2,), 0.0), layers=3)
    assert len(names) == len(set(names)) == 6


def test_randaugment_repeats_in_place_and_does_not_depend_on_the_batch_split():
    x = images(12)
    whole = rand_augment(x, draws(slice(0, 12)))
    pieces = torch.cat([rand_augment(x[s], draws(s)) for s in parts(12, 5)])
    assert torch.equal(whole, pieces) and whole.dtype == torch.uint8
    assert not torch.equal(whole, rand_augment(x, draws(slice(0, 12), epoch=2)))
    assert torch.equal(rand_augment(x, draws(slice(0, 12)), layers=0), x)


def test_random_affine_shifts_turns_and_zooms():
    x = images(2, 3, 8, 8, seed=1)

    def moved(**values):
        return random_affine(x, chosen(2, **values), 90, 0.25, 0.5)

    torch.testing.assert_close(moved(), x.float(), atol=1e-3, rtol=0)
    shifted = moved(shift_x=1.0)  # a quarter of eight pixels, looked up to the right
    torch.testing.assert_close(shifted[..., :6], x.float()[..., 2:], atol=1e-3, rtol=0)
    assert (shifted[..., 6:] == 0).all()
    turned = moved(rotation=1.0)
    assert any(torch.allclose(turned, x.float().rot90(k, (2, 3)), atol=1e-2) for k in (1, 3))
    zoomed = moved(zoom=0.0)  # half the size: black around
    assert (zoomed[..., :1] == 0).all() and zoomed[..., 3:5, 3:5].mean() > 0
    torch.testing.assert_close(moved(shift_y=1.0)[..., :6, :], x.float()[..., 2:, :], atol=1e-3, rtol=0)
    for zoom in (0.0, 1.0):  # turned and zoomed at once
        k = 1 if torch.allclose(turned, x.float().rot90(1, (2, 3)), atol=1e-2) else 3
        torch.testing.assert_close(moved(rotation=1.0, zoom=zoom), moved(zoom=zoom).rot90(k, (2, 3)), atol=0.1, rtol=0)


def test_augment_turns_shifts_and_zooms_as_asked():
    x = images(6, 3, 16, 16)
    draw = draws(slice(0, 6), 6)
    plain = augment(x, draw)
    for rotate, shift, zoom in ((20, 0, 0), (0, 0.2, 0), (0, 0, 0.3), (20, 0.2, 0.3)):
        got = augment(x, draw, rotate=rotate, shift=shift, zoom=zoom)
        assert torch.equal(got, random_affine(plain, draw, rotate, shift, zoom)) and got.dtype == torch.float32
        assert not torch.equal(got, plain.float())
    both = augment(x, draw, jitter=0.2, zoom=0.3)
    assert not any(torch.equal(both, augment(x, draw, **one)) for one in (dict(jitter=0.2), dict(zoom=0.3)))


def test_random_affine_draws_for_each_sample():
    x = images(1, 1, 16, 16).expand(6, -1, -1, -1)
    whole = random_affine(x, draws(slice(0, 6), 6), 10, 0.1, 0.1)
    assert not torch.equal(whole[0], whole[1])
    halves = [random_affine(x[:3], draws(part, 6), 10, 0.1, 0.1) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, torch.cat(halves))
