import pickle
import zipfile

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from scipy import ndimage

from files import partial_of
from prediction import rois
from prediction.measure import runs_of
from prediction.rois import ObjectOutlines, Position, RoiPlane, RoiWriter, is_roi_file, outline_of
from utils import UserError


def blobs():
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((90, 130)), 2)
    mask = smooth > 0.05
    mask[0, 0] = mask[60:80, 20:40] = True
    mask[65:70, 25:30] = False
    return ndimage.label(mask)[0].astype(np.uint32)


def inside(outline, shape):
    """Pixels whose centre lies in an outline."""
    y, x = np.indices(shape)
    return Polygon(outline).contains_points(np.c_[x.ravel() + 0.5, y.ravel() + 0.5]).reshape(shape)


def outlined(objects, tall):
    outlines = ObjectOutlines()
    found = [pair for top in range(0, len(objects), tall) for pair in outlines.add(top, objects[top : top + tall])]
    return outlines, found + list(outlines.finish())


@pytest.mark.parametrize("tall", [7, 90])
def test_outline_holds_the_pixels_of_the_object_and_its_holes(tall):
    objects = blobs()
    _, found = outlined(objects, tall)
    assert sorted(number for number, _ in found) == np.unique(objects)[1:].tolist()
    for number, outline in found:
        filled = ndimage.binary_fill_holes(objects == number, np.ones((3, 3)))
        assert np.array_equal(inside(outline, objects.shape), filled), number


def test_outline_is_that_of_the_larger_of_two_pieces():
    objects = np.zeros((20, 20), np.uint32)
    objects[2:4, 2:4] = objects[8:18, 8:18] = 5
    outline = outline_of(runs_of(objects, 0))
    assert outline.min(0).tolist() == [8, 8] and outline.max(0).tolist() == [18, 18] and len(outline) == 8


def test_object_too_large_to_be_outlined_is_left_out_and_takes_no_memory(monkeypatch):
    monkeypatch.setattr(rois, "LARGEST", 300)
    objects = np.zeros((100, 20), np.uint32)
    objects[10:90, 0:15], objects[20:25, 16:19] = 1, 2
    outlines, found = outlined(objects, 10)
    assert outlines.too_large == {1} and [number for number, _ in found] == [2] and not len(outlines._runs[0].rows)


def test_files_hold_the_outlines_of_one_process_after_the_other(tmp_path):
    roifile = pytest.importorskip("roifile")
    paths = [tmp_path / "a.zip", tmp_path / "b.zip"]
    square = np.array([[1.0, 1], [40001, 1], [40001, 4], [1, 4]])  # beyond the 16 bits of whole numbers
    planes = [RoiPlane(paths[0], 1, Position(z=2, t=3)), RoiPlane(paths[0], 2, Position(3))]
    planes.append(RoiPlane(paths[1], 1, Position()))
    first, second = RoiWriter(planes), RoiWriter(planes)
    first.write(0, 0, [(7, square)])
    second.write(1, 0, [(8, square + 0.5)])
    first.append(create=True)
    second.append(create=False)
    first.close()
    second.close()
    assert not any(path.exists() for path in paths)
    first.finish()
    one, two = roifile.roiread(paths[0])
    assert (one.name, one.position, one.c_position, one.z_position, one.t_position) == ("0001-000007", 0, 0, 2, 3)
    assert (two.name, two.position, two.c_position, two.z_position, two.t_position) == ("0002-000008", 3, 0, 0, 0)
    assert np.array_equal(two.coordinates(), square + 0.5) and one.roitype == roifile.ROI_TYPE.POLYGON
    assert is_roi_file(paths[1]) and zipfile.is_zipfile(paths[1])  # without outlines
    assert sorted(tmp_path.iterdir()) == paths


def test_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    pytest.importorskip("roifile")
    writer = RoiWriter([RoiPlane(tmp_path / "a.zip", 1, Position())])
    writer.write(0, 0, [(1, np.eye(3, 2))])
    partial_of(tmp_path / "a.zip").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*a.zip: full"):
        patch.setattr(pickle, "dump", lambda *_: (_ for _ in ()).throw(OSError("full")))
        writer.write(0, 0, [(2, np.eye(3, 2))])
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "roifile", None)
    with pytest.raises(UserError, match=r"--what rois needs the package roifile: pip install -r requirements-extra"):
        RoiWriter([RoiPlane(tmp_path / "a.zip", 1, Position())])
