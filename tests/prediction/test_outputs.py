import csv
import itertools
import os
import pkgutil
import signal
import sys
import zipfile

import numpy as np
import pytest
import tifffile
from conftest import SMALL, finish
from PIL import Image
from skimage.measure import regionprops_table

import config
import main
import run_make_database
from images.drawing import outlines, overlay_picture
from images.readers import list_frames, read_geometry
from prediction import outputs
from prediction.outputs import Output, display_range, object_bands, outline_colours
from prediction.tiling import Band

ALL = "mask,cells,table,overlay,rois"


def predict(source, target, *flags):
    return ["--mode", "predict", "--gpu_ids", "-1", "--tta", "off", "--input", source, "--output", target, *flags]


def segment(*arguments):
    return main.main(predict(*arguments))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def roi_names(path):
    roifile = pytest.importorskip("roifile")
    return [(roi.name, roi.position) for roi in roifile.roiread(path)]


@pytest.fixture
def stack(trained):
    """A stack of three sections of 528 x 40 px, which takes two bands of objects."""
    pixels = np.random.default_rng(0).integers(0, 200, (3, 33, 4)).astype(np.uint8).repeat(16, 1).repeat(10, 2)
    options = {"imagej": True, "resolution": (1 / 0.25, 1 / 0.5)}
    tifffile.imwrite("in.tif", pixels, **options, metadata={"axes": "ZYX", "unit": "micron", "spacing": 2.0})
    return pixels


def test_table_has_no_cells_that_a_spreadsheet_computes(stack, work):
    (work / "in.tif").rename("=1+1.tif")
    assert segment("=1+1.tif", "out.csv", "--what", "table", "--section", "0") == 0
    rows = rows_of(work / "out.csv")
    assert {row["image"] for row in rows} == {row["path"] for row in rows} == {"'=1+1.tif"} and float(
        rows[0]["centre_y_px"]
    ) >= 0
    assert segment("./=1+1.tif", "out.csv", "--what", "table", "--section", "0") == 0  # replaces its own table


def test_outputs_of_the_objects_agree_with_the_cells(stack, work, capsys):
    pytest.importorskip("roifile")
    assert segment("in.tif", "out.tif", "--what", ALL, "--tile", "64") == 0
    assert "out-table.csv" in capsys.readouterr().out
    cells, rows = tifffile.imread("out-cells.tif"), rows_of(work / "out-table.csv")
    assert cells.max() > 20
    expected = []
    for section, (page, objects) in enumerate(zip(stack, cells, strict=True), 1):
        names = ("label", "area", "centroid", "intensity_mean")
        table = regionprops_table(objects.astype(int), page, properties=names)
        columns = (table[name] for name in ("label", "area", "centroid-0", "centroid-1", "intensity_mean"))
        expected += [(section, *values) for values in zip(*columns, strict=True)]
    found = [
        [float(row[name]) for name in ("section", "object", "area_px", "centre_y_px", "centre_x_px", "mean")]
        for row in rows
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert {row["image"] for row in rows} == {"in.tif"} and "class" not in rows[0]
    assert float(rows[0]["area_um2"]) == float(rows[0]["area_px"]) * 0.125
    assert float(rows[0]["box_right_um"]) == float(rows[0]["box_right_px"]) * 0.25
    places = [(f"{int(row['section']):04d}-{int(row['object']):06d}", int(row["section"])) for row in rows]
    assert sorted(roi_names(work / "out-rois.zip")) == places


def hyperstack(axes, rng):
    """Random image with these axes of an ImageJ file: two time points, three sections, two channels."""
    pixels = rng.integers(0, 200, [{"T": 2, "Z": 3, "C": 2}[axis] for axis in axes] + [8, 8]).astype(np.uint8)
    return pixels.repeat(8, -2).repeat(8, -1)


PLANES = {  # axes -> position, z and t of each section in ImageJ, and the columns t and z
    "": ([(0, 0, 0)], []),
    "C": ([(0, 0, 0)], []),
    "Z": ([(1, 0, 0), (2, 0, 0), (3, 0, 0)], ["z"]),
    "ZC": ([(1, 0, 0), (2, 0, 0), (3, 0, 0)], ["z"]),
    "T": ([(1, 0, 0), (2, 0, 0)], ["t"]),
    "TC": ([(1, 0, 0), (2, 0, 0)], ["t"]),
    "TZ": ([(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 1, 2), (0, 2, 2), (0, 3, 2)], ["t", "z"]),
    "TZC": ([(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 1, 2), (0, 2, 2), (0, 3, 2)], ["t", "z"]),
}


@pytest.mark.parametrize("axes", PLANES)
@pytest.mark.parametrize("target", ["o.tif", "o/"])
def test_rois_and_table_name_the_plane_of_each_axes_order(trained, work, axes, target):
    roifile = pytest.importorskip("roifile")
    pixels = hyperstack(axes, np.random.default_rng(0))
    tifffile.imwrite("in.tif", pixels, imagej=True, metadata={"axes": f"{axes}YX"})
    channel = ["--channel", "1"] if "C" in axes else []
    assert segment("in.tif", target, "--what", "table,rois", *channel) == 0
    table, rois = ("o/table.csv", "o/in-rois.zip") if target == "o/" else ("o-table.csv", "o-rois.zip")
    planes, columns = PLANES[axes]
    rows, sections = rows_of(work / table), pixels[..., 1, :, :] if "C" in axes else pixels
    assert list(rows[0])[: len(columns) + 4] == ["image", "section", "object", *columns, "area_px"]
    found = {roi.name: (roi.position, roi.z_position, roi.t_position) for roi in roifile.roiread(rois)}
    assert len(found) == len(rows) and {roi.c_position for roi in roifile.roiread(rois)} == {0}
    for row in rows:
        section = int(row["section"])
        assert found[f"{section:04d}-{int(row['object']):06d}"] == planes[section - 1]
        place = [int(row[axis]) - 1 for axis in columns]
        assert np.ravel_multi_index(place, sections.shape[:-2]) == section - 1 if place else section == 1
    assert {int(row["section"]) for row in rows} == set(range(1, len(planes) + 1))


def test_sections_chosen_count_in_what_fiji_can_open(trained, work):
    pixels = hyperstack("Z", np.random.default_rng(0))
    tifffile.imwrite("in.tif", pixels, imagej=True, metadata={"axes": "ZYX"})
    flags = ["--section", "1:3"]  # the second and the third
    for target, what, position, sections in (
        ("o.zip", "rois", {2, 3}, {"2", "3"}),  # the input alone
        ("o.tif", "mask,table,rois", {1, 2}, {"1", "2"}),  # the stack that is written
        ("o/", "table,rois", {2, 3}, {"2", "3"}),
    ):
        assert segment("in.tif", target, "--what", what, *flags) == 0
        file = {"o.zip": "o.zip", "o.tif": "o-rois.zip", "o/": "o/in-rois.zip"}[target]
        assert {place for _, place in roi_names(work / file)} == position
        if "table" in what:
            rows = rows_of(work / file.replace("in-rois.zip", "table.csv").replace("-rois.zip", "-table.csv"))
            assert {row["section"] for row in rows} == sections
            assert {row["z"] for row in rows} == {"2", "3"}  # of the input


def test_overlay_is_the_image_with_the_outlines_of_the_cells(stack, work):
    assert segment("in.tif", "out.tif", "--what", "cells,overlay", "--compression", "zlib", "--numbers", "off") == 0
    with tifffile.TiffFile("out-overlay.tif") as tif:
        assert tif.series[0].axes == "ZYXS" and tif.pages[0].photometric == 2 and tif.pages[0].compression == 8
        picture = tif.asarray()
    assert read_geometry(list_frames("out-overlay.tif")).pixel == pytest.approx({"X": 0.25, "Y": 0.5, "Z": 2.0})
    edge = np.stack([outlines(page) for page in tifffile.imread("out-cells.tif")])
    assert (picture[edge] == (230, 159, 0)).all() and edge[:, 512].any()  # also at the border of two bands
    assert np.array_equal(picture[~edge], np.repeat(stack[~edge][:, None], 3, axis=1))


@pytest.mark.parametrize("output", ["out.npy", "out.zarr", "out.tif/"])
def test_compression_needs_a_tiff(stack, fails, output):
    argv = ["--mode", "predict", "--gpu_ids", "-1", "--input", "in.tif", "--output", output, "--compression", "none"]
    assert "--compression none: applies to TIFFs" in fails(main.main, argv, 2)


def test_folder_has_pictures_by_section_one_table_and_outlines_by_file(stack, work):
    pytest.importorskip("roifile")
    (work / "raw").mkdir()
    (work / "in.tif").rename(work / "raw" / "a.tif")
    Image.fromarray(stack[0, :100]).save("raw/b.png")
    assert segment("raw", "out/", "--what", "overlay,table,rois") == 0
    names = ["a-0000-overlay.png", "a-0001-overlay.png", "a-0002-overlay.png", "a-rois.zip", "b-overlay.png"]
    others = ["b-rois.zip", "index.html", "summary.csv", "table.csv"]
    assert sorted(path.name for path in (work / "out").iterdir()) == [*names, *others]
    assert np.asarray(Image.open("out/b-overlay.png")).shape == (100, 40, 3)
    assert {position for _, position in roi_names(work / "out" / "a-rois.zip")} == {1, 2, 3}
    assert {position for _, position in roi_names(work / "out" / "b-rois.zip")} == {0}
    rows = rows_of(work / "out" / "table.csv")
    assert {(row["image"], row["section"]) for row in rows} == {("a.tif", n) for n in "123"} | {("b.png", "1")}
    assert all((row["area_um2"] == "") == (row["path"] == "raw/b.png") for row in rows)


def test_files_are_named_after_the_output_and_lack_of_a_pixel_size_is_said(stack, work, capsys):
    tifffile.imwrite("bare.tif", stack[:1, :64])
    for target, what, files in (
        ("t.csv", "table", {"t.csv", "t-summary.csv"}),
        ("u.tif", "table", {"u.csv", "u-summary.csv"}),
        ("v.npy", "mask,overlay,table", {"v-mask.npy", "v-overlay.tif", "v-table.csv", "v-summary.csv"}),
        ("w.png", "overlay,table", {"w.png", "w.csv", "w-summary.csv"}),
        ("x.ome.tif", "mask,table", {"x-mask.ome.tif", "x-table.csv", "x-summary.csv"}),
        ("y.ome.tif", "table", {"y.csv", "y-summary.csv"}),
    ):
        before = set(work.iterdir())
        assert segment("bare.tif", target, "--what", what) == 0
        assert {path.name for path in set(work.iterdir()) - before} == files
        lines = capsys.readouterr().out.splitlines()
        assert sum("measures in px only, the images have no pixel size" in line for line in lines) == 1
    assert not any("um" in name for name in rows_of(work / "t.csv")[0])
    assert (work / "t.csv").read_text() == (work / "w.csv").read_text()


@pytest.mark.parametrize(
    ("target", "what", "words"),
    [
        ("x.csv", "table,mask", "--output x.csv can't hold mask"),
        ("x.zip", "table", "--output x.zip can't hold table"),
        ("notes.csv", "table", "notes.csv: not a table of objects, and not replaced"),
        ("notes.zip", "rois", "notes.zip: not a .zip of ROIs of predict only, and not replaced"),
        ("drawn.zip", "rois", "drawn.zip: not a .zip of ROIs of predict only, and not replaced"),
        ("out/", "rois", "outlines of two images would become out/in.zip"),
        ("out.png", "table,overlay", "is one picture, but 2 will be written"),
        ("o/x.zarr", "overlay", "--output o/x.zarr can't hold overlay, a picture in colours: name a .tif or .png"),
        ("x.npy", "overlay", "--output x.npy can't hold overlay"),
        ("in.tif", "overlay", "--output in.tif would replace the input"),
        ("in-kept.tif", "overlay,table", "--output in-kept-table.csv would replace the input"),
        ("notes-table.csv", "table", "notes-summary.csv: not a table of objects, and not replaced"),
    ],
)
def test_output_that_can_not_be_written_is_one_line(trained, work, fails, target, what, words):
    for name in ("in.tif", "in.png"):
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(name)
    for name in ("notes.csv", "notes.zip", "notes-summary.csv"):
        (work / name).write_text("mine")
    with zipfile.ZipFile("drawn.zip", "w") as file:
        file.writestr("0234-0567.roi", b"Iout")  # as Fiji names them
    (work / "in-kept-table.csv").symlink_to("in.tif")
    before = sorted(work.iterdir())
    line = fails(
        main.main, [*predict("in.png", target, "--what", what)[:-2], "--input", "in.tif", "in.png", "--what", what]
    )
    assert words in line
    assert sorted(work.iterdir()) == before and (work / "notes.csv").read_text() == "mine"


def test_table_names_each_series_which_has_its_own_pixel_size(stack, work, capsys):
    h5py = pytest.importorskip("h5py")
    with h5py.File("a.h5", "w") as file:
        file["raw"], file["g/other"] = stack[:2, :64], stack[:1, :64]  # in a file "g" comes first
        file["raw"].attrs["element_size_um"] = [2, 0.5, 0.25]
    for target, name in (("t.csv", "t.csv"), ("out/", "out/table.csv")):
        assert segment("", target, "--what", "table", "--input", "a.h5:/raw", "a.h5:/g/other") == 0
        assert "1 of 3 images have no pixel size" in capsys.readouterr().out
        rows = rows_of(work / name)
        places = {(row["image"], row["section"], row["object"]) for row in rows}
        assert len(places) == len(rows) and {image for image, *_ in places} == {"a.h5:/raw", "a.h5:/g/other"}
        of_raw = [float(row["area_um2"] or "nan") / float(row["area_px"]) for row in rows if "raw" in row["image"]]
        assert np.allclose(of_raw, 0.125)
        assert {row["area_um2"] for row in rows if "other" in row["image"]} == {""}


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8")
def test_name_that_is_no_text_is_escaped_in_the_table(stack, work):
    Image.fromarray(stack[0, :64]).save(os.fsdecode(b"a\xff.png"))
    assert segment(os.fsdecode(b"a\xff.png"), "t.csv", "--what", "table") == 0
    assert {row["image"] for row in rows_of(work / "t.csv")} == {r"a\udcff.png"}


def test_positions_of_an_ome_tiff_have_a_pixel_size_each(stack, work):
    with tifffile.TiffWriter("two.ome.tif") as tif:
        for size in (0.5, 0.25):
            tif.write(stack[0, :64], metadata={"axes": "YX", "PhysicalSizeX": size, "PhysicalSizeY": size})
    assert segment("two.ome.tif", "t.csv", "--what", "table") == 0
    found = {(row["section"], float(row["area_um2"]) / float(row["area_px"])) for row in rows_of(work / "t.csv")}
    assert found == {("1", 0.25), ("2", 0.0625)}


def test_rois_without_their_package_are_refused(stack, work, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "roifile", None)
    line = fails(main.main, predict("in.tif", "out.zip", "--what", "rois"))
    assert "--what rois needs the package roifile: pip install -r requirements-extra.txt" in line
    assert not list(work.glob("*out*"))


@pytest.mark.slow
def test_processes_write_together_what_one_writes(stack, work, together):
    pytest.importorskip("roifile")
    assert segment("in.tif", "out.tif", "--what", ALL, "--tile", "64") == 0
    finish(together(2, *predict("in.tif", "two.tif", "--what", ALL, "--tile", "64")))
    for name in ("mask.tif", "overlay.tif", "table.csv", "summary.csv"):
        assert (work / f"out-{name}").read_bytes() == (work / f"two-{name}").read_bytes(), name
    assert np.array_equal(tifffile.imread("out-cells.tif"), tifffile.imread("two-cells.tif"))
    assert (work / "out-rois.zip").read_bytes() == (work / "two-rois.zip").read_bytes()
    assert not list(work.glob("*.partial"))


STAGES = {  # where a run is stopped, some with temporary files of filter and linker; True: files may be new by then
    "prediction.job.filter_bands": False,
    "prediction.linking._overlaps": False,
    "prediction.outputs.overlay_picture": False,
    "prediction.rois.RoiWriter.write": False,
    "prediction.rois.RoiWriter.append": False,
    "images.writers._strip_height": True,
    "prediction.rois.RoiWriter.finish": True,
    "prediction.object_table._measures_of": True,
}


def test_stopped_run_leaves_no_part_of_a_file(stack, work, monkeypatch):
    pytest.importorskip("roifile")
    tifffile.imwrite("small.tif", stack[:, :64], photometric="minisblack")
    flags = ["--what", ALL, "--link", "0.1", "--min_size", "2", "--fill_holes", "on"]
    assert segment("small.tif", "out.tif", *flags, "--section", "0:2") == 0
    old = {path: path.read_bytes() for path in work.glob("*out*")}
    assert len(old) == 7
    for (stage, is_late), signum in zip(STAGES.items(), itertools.cycle([signal.SIGTERM, signal.SIGINT]), strict=False):
        with monkeypatch.context() as patch:
            _stop_at(patch, stage, signum)
            assert segment("small.tif", "out.tif", *flags) == 128 + signum, stage
        left = {path: path.read_bytes() for path in work.glob("*out*")}
        assert left.keys() == old.keys() and (is_late or left == old), stage
        for path in left:
            _check_whole(path)


def _stop_at(patch, stage, signum):
    """Raise a signal when a function is called."""
    owner, function = pkgutil.resolve_name(stage.rpartition(".")[0]), pkgutil.resolve_name(stage)

    def stopped(*arguments, **options):
        signal.raise_signal(signum)
        return function(*arguments, **options)

    patch.setattr(owner, function.__name__, stopped)


def _check_whole(path):
    """Read all of a file."""
    if path.suffix == ".tif":
        assert tifffile.imread(path).shape[0] in (2, 3)
    elif path.suffix == ".zip":
        assert {position for _, position in roi_names(path)} in ({1, 2}, {1, 2, 3})
    else:
        column = "last_section" if path.stem.endswith("linked") else "section"
        assert {row[column] for row in rows_of(path)} | {"1"} in ({"1", "2"}, {"1", "2", "3"})


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.parametrize("name", ["out-table.csv", "out-overlay.tif", "out-rois.zip"])
def test_output_that_another_run_writes_is_refused(stack, work, fails, name):
    import fcntl

    with (work / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use" in fails(main.main, predict("in.tif", "out.tif", "--what", ALL))
    assert not list(work.glob("out*"))


def test_older_table_and_outlines_are_replaced_and_counted(stack, work, capsys):
    pytest.importorskip("roifile")
    (work / "out-table.csv").write_text("image,object,class,area_px\n")  # of an earlier version
    for replaced in (1, 3):  # with a summary
        assert segment("in.tif", "out.tif", "--what", "table,rois", "--section", "0") == 0
        assert capsys.readouterr().out.count("(replaced 1 older file(s))") == replaced


def test_empty_image_has_a_table_of_names_and_no_outlines(work, stack):
    pytest.importorskip("roifile")
    assert run_make_database.main(["--synthetic", "4", "--size", "32", "--phantom", "rare", "--name_data", "r"]) == 0
    assert main.main([*SMALL, "--num_epoch", "1", "--name_data", "r", "--lr", "1e-9"]) == 0
    Image.fromarray(np.zeros((1, 1), np.uint8)).save("one.png")
    assert segment("one.png", "out.tif", "--what", ALL, "--name_data", "r") == 0
    num = int(tifffile.imread("out-cells.tif").max())
    assert len(rows_of(work / "out-table.csv")) == num == len(roi_names(work / "out-rois.zip"))
    assert (work / "out-table.csv").read_text().startswith("image,section,object,area_px,")


def test_output_is_added_by_one_class_and_its_name(stack, work, monkeypatch):
    class Borders(Output):
        name, of_objects = "borders", True

        def of(self, band):
            return outlines(band.objects, band.above, band.below)[None] * np.uint8(255)

    monkeypatch.setitem(outputs.OUTPUTS, "borders", Borders)
    monkeypatch.setattr(config, "WHAT", (*config.WHAT, "borders"))
    assert segment("in.tif", "out.tif", "--what", "cells,borders") == 0
    expected = np.stack([outlines(page) for page in tifffile.imread("out-cells.tif")]) * 255
    assert np.array_equal(tifffile.imread("out-borders.tif"), expected)
    assert segment("in.tif", "out/", "--what", "borders") == 0
    assert np.array_equal(np.asarray(Image.open("out/in-0001.png")), expected[1])


def test_outlines_in_bands_are_those_of_the_image():
    objects = np.random.default_rng(0).integers(0, 4, (11, 30)).repeat(3, 0)[:31]
    bands = [Band(slice(top, top + 4), objects[top : top + 4]) for top in range(0, 31, 4)]
    joined = [outlines(band.objects, band.above, band.below) for band in object_bands(None, bands, None, 1)]
    assert np.array_equal(np.concatenate(joined), outlines(objects))


def test_colours_of_outlines_by_class_have_the_black_of_the_background():
    assert outline_colours(3, 1).tolist() == [[230, 159, 0], [0, 0, 0], [86, 180, 233]]
    colours = outline_colours(2, 0)[np.array([[0, 1]])]
    picture = overlay_picture(np.array([[7, 9]], np.uint8), np.array([[False, True]]), colours)
    assert picture.tolist() == [[[7, 7, 7], [230, 159, 0]]]


def test_contrast_of_a_stack_is_that_of_all_its_sections(work):
    pixels = np.arange(20, dtype=np.uint16)[:, None, None] * np.full((50, 60), 100, np.uint16)
    tifffile.imwrite("in.tif", pixels, photometric="minisblack")
    low, high = display_range(list_frames("in.tif"))
    assert low == 0 and 1700 <= high <= 1900
