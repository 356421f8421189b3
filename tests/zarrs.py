"""OME-Zarr images and plates that tests write."""

import pytest


def write_zarr(path, pixels, scales, version=3):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="w", zarr_format=version)
    group.create_array("0", data=pixels)
    group.attrs.update({"ome": {"multiscales": scales}} if version == 3 else {"multiscales": scales})


def write_plate(path, fields, version=3):
    """An OME-Zarr plate of fields by name, such as `A/1/0`: well and number."""
    zarr = pytest.importorskip("zarr")
    wells = dict.fromkeys(name.rpartition("/")[0] for name in fields)

    def describe(group, entry):
        group.attrs.update({"ome": entry} if version == 3 else entry)

    plate = zarr.open_group(path, mode="w", zarr_format=version)
    describe(plate, {"plate": {"wells": [{"path": well} for well in wells]}})
    for well in wells:
        numbers = [name.rpartition("/")[2] for name in fields if name.rpartition("/")[0] == well]
        describe(plate.create_group(well), {"well": {"images": [{"path": number} for number in numbers]}})
    for name, pixels in fields.items():
        axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"[-pixels.ndim :]]
        scale = [{"type": "scale", "scale": [0.5] * pixels.ndim}]
        level = {"path": "0", "coordinateTransformations": scale}
        write_zarr(path / name, pixels, [{"axes": axes, "datasets": [level]}], version)
