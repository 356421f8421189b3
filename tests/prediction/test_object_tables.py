"""The tables of the objects: short names, a summary by image, and objects in 3-D; the numbers in the overlay."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.measure import regionprops
from test_ensemble import DATA, INFO, write_network
from test_outputs import rows_of, segment

from prediction.digits import ObjectNumbers, digits_of

RAW = ["--min_size", "0", "--fill_holes", "off"]
THREE = replace(DATA, class_values=[0, 1, 2], class_names=["a", "b", "c"], class_share=[0.4, 0.3, 0.3])


def write_stack(path, num=4, **metadata):
    """A stack of blocks of noise, half of them alike in neighbouring sections, with pixels of 0.5 x 0.25 x 2 um."""
    pixels = np.random.default_rng(0).integers(0, 200, (num // 2, 6, 5)).astype(np.uint8)
    pixels = pixels.repeat(2, 0).repeat(8, 1).repeat(9, 2)
    options = {"imagej": True, "resolution": (1 / 0.25, 1 / 0.5)}
    tifffile.imwrite(path, pixels, **options, metadata={"axes": "ZYX", "unit": "micron", "spacing": 2.0} | metadata)
    return pixels


@pytest.fixture
def net(work):
    return write_network("unet", {"nch_ker": 2, "num_level": 2}, INFO)


def test_table_has_short_names_and_paths(net, work):
    for name in ("raw/a/img.tif", "raw/b/img.tif"):
        (work / name).parent.mkdir(parents=True)
        write_stack(name, 2)
    assert segment("raw/*/img.tif", "out.csv", "--what", "table", *RAW) == 0
    for path in ("out.csv", "out-summary.csv"):
        rows = rows_of(work / path)
        assert {(row["image"], row["path"]) for row in rows} == {(f"{n}/img.tif", f"raw/{n}/img.tif") for n in "ab"}
        assert [*rows[0]][-1] == "path" and {row["z"] for row in rows} == {"1", "2"}


def test_summary_has_the_number_and_sizes_of_each_image(net, work, capsys):
    (work / "raw").mkdir()
    write_stack("raw/a.tif")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40)).astype(np.uint8)).save("raw/b.png")
    assert segment("raw", "out/", "--what", "cells,table", *RAW) == 0
    table, summary = (rows_of(work / "out" / f"{name}.csv") for name in ("table", "summary"))
    assert f"objects: {len(table)} cell in 5 images\n" in capsys.readouterr().out
    names = [f"a-000{n}" for n in range(4)] + ["b"]
    assert [(row["image"], row["section"], row["z"]) for row in summary] == [
        *(("a.tif", n, n) for n in "1234"),
        ("b.png", "1", ""),
    ]
    for name, row in zip(names, summary, strict=True):
        cells = np.asarray(Image.open(f"out/{name}-cells.png"))
        areas = np.bincount(cells.ravel())[1:]
        assert int(row["count"]) == len(areas) > 2
        assert float(row["area_fraction"]) == pytest.approx((cells > 0).mean())
        assert float(row["mean_area_px"]) == pytest.approx(areas.mean())
        if name == "b":  # no pixel size
            assert row["mean_area_um2"] == row["density_per_mm2"] == ""
        else:
            assert float(row["mean_area_um2"]) == pytest.approx(areas.mean() * 0.125)
            assert float(row["density_per_mm2"]) == pytest.approx(len(areas) / (cells.size * 0.125e-6))


def test_summary_counts_each_class_and_has_a_row_for_an_image_without_objects(work, capsys):
    write_network("unet", {"nch_ker": 2}, THREE)
    write_stack("in.tif")
    assert segment("in.tif", "out.tif", "--what", "cells", *RAW) == 0
    table, summary = rows_of(work / "out.csv"), rows_of(work / "out-summary.csv")
    counts = [sum(row["class"] == name for row in table) for name in "bc"]
    assert f"objects: {counts[0]} b, {counts[1]} c in 4 images; background is a" in capsys.readouterr().out
    assert [sum(int(row[f"count_{name}"]) for row in summary) for name in "bc"] == counts and min(counts) > 0
    assert segment("in.tif", "none.csv", "--what", "table", "--min_size", "100000") == 0
    empty = rows_of(work / "none-summary.csv")
    assert {(row["count"], row["area_fraction"], row["mean_area_px"]) for row in empty} == {("0", "0", "")}
    assert len(empty) == 4 and rows_of(work / "none.csv") == []


def test_linked_objects_have_a_row_each_in_3d(net, work):
    write_stack("in.tif")
    assert segment("in.tif", "out.tif", "--what", "cells,table", "--link", "0.3", *RAW) == 0
    cells, rows = tifffile.imread("out-cells.tif"), rows_of(work / "out-linked.csv")
    regions = regionprops(cells.astype(int))
    assert len(rows) == len(regions) == cells.max() and max(int(row["num_section"]) for row in rows) > 1
    for row, region in zip(rows, regions, strict=True):
        assert int(row["object"]) == region.label and int(row["volume_voxels"]) == region.area
        assert float(row["volume_um3"]) == pytest.approx(region.area * 0.25)
        centre = [float(row[f"centre_{axis}_px"]) for axis in "zyx"]
        assert centre == pytest.approx(region.centroid)
        assert [float(row[f"centre_{axis}_um"]) for axis in "zyx"] == pytest.approx(centre * np.array([2, 0.5, 0.25]))
        sections = region.bbox[0] + 1, region.bbox[3]
        assert (int(row["first_section"]), int(row["last_section"])) == sections
        assert int(row["num_section"]) == sections[1] - sections[0] + 1


def test_linked_objects_of_chosen_sections_lie_where_the_file_has_them(net, work):
    write_stack("in.tif", 6)
    assert segment("in.tif", "out/", "--what", "table", "--link", "0.1", "--section", "1,3,5", *RAW) == 0
    rows, table = rows_of(work / "out" / "linked.csv"), rows_of(work / "out" / "table.csv")
    assert {row["first_section"] for row in rows} <= {"2", "4", "6"} >= {row["z"] for row in table}
    last = [row for row in rows if row["first_section"] == "6"]
    assert last and {row["centre_z_px"] for row in last} == {"5"} and {row["centre_z_um"] for row in last} == {"10"}
    assert all(float(row["volume_um3"]) == int(row["volume_voxels"]) * 0.5 for row in rows)  # 4 um apart


def ink(picture):
    """Bounds of the white digits and their black rim in a grey picture: first row and column, and those after it."""
    rows, columns = np.nonzero((picture != 100).any(-1))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def drawn(objects, height=1000):
    """Grey picture of objects with their numbers, made in bands of this height."""
    picture, numbers = np.full((*objects.shape, 3), 100, np.uint8), ObjectNumbers()
    for top in range(0, len(objects), height):
        numbers.draw(picture[top : top + height], objects[top : top + height])
    return picture


def disc(shape, centre, radius, number):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.where(np.hypot(y - centre[0], x - centre[1]) < radius, number, 0).astype(np.uint32)


@pytest.mark.parametrize(("diameter", "number"), [(10, 7), (10, 17), (10, 267), (40, 267)])
def test_numbers_stand_in_their_objects_from_10_px_on(diameter, number):
    picture = drawn(disc((60, 70), (30, 40), diameter / 2, number))
    scale = 1 if diameter == 10 else 13 // len(str(number)) // 4
    digits = digits_of(number).repeat(scale, 0).repeat(scale, 1)
    top, left, bottom, right = ink(picture)
    assert (bottom - top - 2, right - left - 2) == digits.shape
    assert np.array_equal((picture == 255).all(-1)[top + 1 : bottom - 1, left + 1 : right - 1], digits)
    assert abs((top + bottom) / 2 - 30) <= 1.5 and abs((left + right) / 2 - 40) <= 1.5


def test_numbers_of_objects_too_small_for_them_are_left_out():
    assert (drawn(disc((20, 20), (10, 10), 3, 267)) == 100).all()
    assert (drawn(np.full((4, 30), 1, np.uint32)) == 100).all()  # the picture is too low
    ring = disc((60, 60), (30, 30), 20, 1) - disc((60, 60), (30, 30), 12, 1)
    assert (ring[(drawn(ring) == 255).all(-1)] == 1).all()


def test_numbers_stay_inside_the_picture_and_in_one_band():
    objects = disc((64, 64), (0, 0), 12, 8) + disc((64, 64), (63, 63), 12, 9) + disc((64, 64), (32, 32), 16, 123)
    whole, banded = drawn(objects), drawn(objects, 32)
    assert (banded == 255).all(-1).sum() == sum(digits_of(number).sum() for number in (8, 9, 123))
    assert (whole == 255).all(-1).sum() >= (banded == 255).all(-1).sum()


def test_overlay_has_the_numbers_of_the_table_unless_they_are_off(net, work, fails):
    import main

    write_stack("in.tif")
    for flag in ("on", "off"):
        assert segment("in.tif", f"{flag}.tif", "--what", "cells,overlay", "--numbers", flag, *RAW) == 0
    with_numbers, without = (tifffile.imread(f"{flag}-overlay.tif") for flag in ("on", "off"))
    for page, other, cells in zip(with_numbers, without, tifffile.imread("on-cells.tif"), strict=True):
        assert (page != other).any()
        expected = other.copy()
        ObjectNumbers().draw(expected, cells)
        assert np.array_equal(page, expected)
    argv = ["--mode", "predict", "--input", "in.tif", "--output", "o.tif", "--what", "mask", "--numbers", "off"]
    assert "--numbers off: applies to overlay: add overlay to --what mask" in fails(main.main, argv, 2)
