import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import NORMS, UNet
from prediction.halo import WHOLE, Sides, forward_tile, halo, receptive_radius
from prediction.tiling import Bands, TileGrid, prefetch, tile_shape, tiles_along, write_in_background
from prediction.views import TilePlace, augmented_logits

HALO = halo(4)
LEVELS = pytest.mark.parametrize("num_level", [1, 3, 4, 5])


def network(norm="bnorm", nch_out=1, num_level=4):
    torch.manual_seed(0)
    net = UNet(1, nch_out, nch_ker=2, norm=norm, num_level=num_level)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(2, 1, 64, 64))
    return net.eval()


def tiled(net, image, tile, overlap=0, tta=False):
    around = halo(net.num_level)
    sides = zip(image.shape[-2:], tile, strict=True)
    grid = TileGrid(*(tiles_along(n, t, around, overlap, net.stride) for n, t in sides))
    pixels = image[0].movedim(0, -1).numpy()

    def logits(part, rows, columns):
        x, place = torch.from_numpy(part).movedim(-1, 0)[None], TilePlace(rows, columns)
        return (augmented_logits(net, x, place) if tta else place.output(forward_tile(net, *place.seen(x))))[0]

    bands = Bands(logits, lambda rows: pixels[rows], grid)
    return np.concatenate([band.values for band in bands.compute()], axis=1), bands


@LEVELS
def test_receptive_radius_is_what_the_gradient_reaches(num_level):
    net = network(num_level=num_level)
    with torch.no_grad():
        for weight in net.parameters():
            weight.abs_()  # so that nothing cancels
    image = torch.rand(1, 1, 16 * net.stride, 16 * net.stride, requires_grad=True)
    part = slice(7 * net.stride, 8 * net.stride)
    net(image)[..., part, part].sum().backward()
    seen = image.grad[0, 0].abs().sum(1).nonzero()
    assert part.start - seen.min() == seen.max() + 1 - part.stop == receptive_radius(num_level) <= halo(num_level)
    assert halo(num_level) % net.stride == 0


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize(
    "size", [(5, 7), (64, 64), (65, 300), (161, 479), (300, 130), (322, 197)], ids=lambda size: "x".join(map(str, size))
)
def test_tiles_give_what_the_whole_image_gives(size, tta):
    net, image = network(), torch.randn(1, 1, *size)
    with torch.no_grad():
        whole = (augmented_logits(net, image, TilePlace.of_image(*size)) if tta else net(image))[0].numpy()
    for tile in ((64, 80), (96, 384)):
        np.testing.assert_allclose(tiled(net, image, tile, tta=tta)[0], whole, atol=1e-5)


@LEVELS
def test_tiles_of_any_number_of_levels_give_what_the_whole_image_gives(num_level):
    net, image = network(num_level=num_level), torch.randn(1, 1, 450, 610)
    with torch.no_grad():
        whole = net(image)[0].numpy()
    np.testing.assert_allclose(tiled(net, image, (64, 128))[0], whole, atol=1e-5)


def test_tiles_of_a_network_with_its_own_statistics_are_blended_without_a_step():
    net, image = network("inorm"), torch.randn(1, 1, 400, 400)
    with torch.no_grad():
        whole = net(image)[0, 0].numpy()
    hard, soft = (tiled(net, image, (128, 128), overlap)[0][0] for overlap in (0, 32))
    steps = [np.abs(np.diff(result - whole, axis=0))[127::128].mean() for result in (hard, soft)]
    assert soft.shape == whole.shape and steps[1] < 0.5 * steps[0]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 193, 500])
@pytest.mark.parametrize("overlap", [0, 32])
def test_tiles_along_cover_the_image_once_and_read_the_halo(length, overlap):
    tiles = tiles_along(length, 80, HALO, overlap, stride=16)
    assert [0, *(tile.interior.stop for tile in tiles)] == [*(tile.interior.start for tile in tiles), length]
    for tile in tiles:
        interior, output = tile.interior, tile.output
        read, has_halo, _ = tile.from_start
        assert read.start % 16 == output.start % 16 == 0
        assert read.start == (output.start - HALO if has_halo[0] else 0)
        assert read.stop == (output.stop + HALO if has_halo[1] else length)
        assert has_halo[0] or output.start < HALO
        assert 0 <= output.start <= interior.start < interior.stop <= output.stop <= length


@pytest.mark.parametrize("length", [1, 63, 64, 65, 191, 193, 500, 507])
def test_tiles_along_a_flipped_image_are_read_from_its_end(length):
    for tile in tiles_along(length, 80, HALO, 0, stride=16):
        read, has_halo, _ = tile.from_end
        first, last = length - read.stop, length - read.start  # in the flipped image
        assert first % 16 == 0 and (last % 16 == 0 or last == length)
        assert has_halo == (read.start > 0, read.stop < length) or length <= 2 * HALO + 80
        assert not has_halo[0] or tile.output.start - read.start >= HALO
        assert not has_halo[1] or read.stop - tile.output.stop >= HALO
        assert tile.input.start <= read.start and read.stop <= tile.input.stop <= length


def test_bands_with_some_numbers_are_those_of_the_whole():
    net, image = network("gnorm"), torch.randn(1, 1, 500, 90)
    whole, bands = tiled(net, image, (128, 128), overlap=32)
    some = list(bands.compute([1, 3]))
    assert [band.rows for band in some] == [bands.rows[number].interior for number in (1, 3)]
    assert all(np.array_equal(band.values, whole[:, band.rows]) for band in some)


def test_tile_shape_costs_at_most_a_quarter_more():
    def flops(*shape, sides=WHOLE):
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            forward_tile(UNet(1, 1, 16), torch.zeros(1, 1, *shape), sides)
        return counter.get_total_flops() / np.prod([n - 2 * HALO * any(sides) for n in shape])

    costs = []
    for num_pixel in (2**20, 2**22):
        height, width = tile_shape(20000, 20000, num_pixel)
        costs.append(
            flops(height + 2 * HALO, width + 2 * HALO, sides=Sides(True, True, True, True)) / flops(1024, 1024)
        )
    assert height == 1024 and costs[0] < 1.25 and costs[1] < 1.15


def test_prefetch_keeps_the_order_and_the_errors():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    iterator = prefetch(items())
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(iterator)


def test_write_in_background_keeps_the_order_and_the_errors():
    used = []

    def use(item):
        if item == 3:
            raise ValueError("third")
        used.append(item)

    write_in_background([], use)
    write_in_background(iter([1, 2]), use)
    for items in ([3], [3, 4]):
        with pytest.raises(ValueError, match="third"):
            write_in_background(items, use)
    assert used == [1, 2]


@pytest.mark.parametrize("norm", NORMS)
def test_tiles_of_several_classes_keep_their_planes(norm):
    net, image = network(norm, nch_out=3), torch.randn(1, 1, 150, 150)
    assert tiled(net, image, (64, 128), 16 if norm in ("inorm", "gnorm") else 0)[0].shape == (3, 150, 150)
