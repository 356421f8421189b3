"""Files as microscopes write them."""

import struct

import numpy as np
import pytest


def write_czi(path, pixels, channels=(), scale=0.0):
    """A CZI of pixels (T, Z, C, Y, X), written by ZEISS's own library."""
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(path)) as file:
        for t, z, c in np.ndindex(pixels.shape[:3]):
            file.write(pixels[t, z, c][..., None], plane={"T": t, "Z": z, "C": c})
        names = dict(enumerate(channels))
        file.write_metadata("a", channel_names=names, scale_x=scale, scale_y=scale, scale_z=4 * scale)


def block(*parts):
    """A block of a LIF, its parts being numbers of bytes or texts."""
    coded = [b"\x2a" + (part if isinstance(part, bytes) else encoded(part)) for part in parts]
    return struct.pack("<II", 0x70, sum(map(len, coded))) + b"".join(coded)


def encoded(text):
    return struct.pack("<I", len(text)) + text.encode("utf-16-le")


LIF_AXES = {"X": 1, "Y": 2, "Z": 3, "T": 4, "λ": 5}


def write_lif(path, images, um=0.5):
    """A LIF of images by name, (Z, C, Y, X) or with the axes of the image, as Leica's format is laid out.

    No package writes it. Along Z a pixel is four times as long; S are the colours of a camera.
    """
    elements, blocks = "", b""
    for number, (name, image) in enumerate(images.items()):
        axes, pixels = image if isinstance(image, tuple) else ("ZCYX", image)
        pixels = np.ascontiguousarray(pixels)
        sizes, steps = dict(zip(axes, pixels.shape, strict=True)), dict(zip(axes, pixels.strides, strict=True))
        colour = "S" if "S" in axes else "C"
        names = ("Red", "Green", "Blue") if colour == "S" else [f"Dye{c}" for c in range(sizes.get("C", 1))]
        channels = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="{c + 1 if colour == "S" else 0}" LUTName="{dye}" '
            f'Resolution="{8 * pixels.itemsize}" NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" IsLUTInverted="0" '
            f'BitInc="0" BytesInc="{c * steps.get(colour, 0)}"/>'
            for c, dye in enumerate(names)
        )
        dimensions = "".join(
            f'<DimensionDescription DimID="{LIF_AXES[axis]}" NumberOfElements="{sizes[axis]}" Origin="0" Unit="m" '
            f'Length="{(sizes[axis] - 1) * um * (4 if axis == "Z" else 1) * 1e-6}" BitInc="0" '
            f'BytesInc="{steps[axis]}"/>'
            for axis in reversed(axes)
            if axis in LIF_AXES
        )
        image = f"<Channels>{channels}</Channels><Dimensions>{dimensions}</Dimensions>"
        image = f"<Data><Image><ImageDescription>{image}</ImageDescription></Image></Data>"
        memory = f'<Memory Size="{pixels.nbytes}" MemoryBlockID="M{number}"/>'
        elements += f'<Element Name="{name}">{image}{memory}</Element>'
        blocks += block(struct.pack("<Q", pixels.nbytes), f"M{number}") + pixels.tobytes()
    tree = f'<Element Name="a"><Children>{elements}</Children></Element>'
    path.write_bytes(block(f'<LMSDataContainerHeader Version="2">{tree}</LMSDataContainerHeader>') + blocks)


def write_nd2(path, pixels, um=0.5, colours=False, calibrated=True):
    """An ND2 of version 2, of one image (C, Y, X), as Nikon's format is laid out; no package writes it.

    With `colours` the three channels are one image of a colour camera, whose file has blue first.
    """
    num, height, width = pixels.shape
    numbers = {"uiWidth": width, "uiHeight": height, "uiComp": num, "uiBpcInMemory": 16, "uiBpcSignificant": 16}
    numbers |= {"uiWidthBytes": width * num * 2, "uiSequenceCount": 1, "eCompression": 2}
    attributes = "".join(f'<{name} runtype="lx_uint32" value="{value}"/>' for name, value in numbers.items())
    planes = "".join(
        f'<a{c} runtype="X"><uiCompCount runtype="lx_uint32" value="{num if colours else 1}"/>'
        f'<uiSampleIndex runtype="lx_uint32" value="{c}"/>'
        f'<sDescription runtype="CLxStringW" value="Dye{c}"/>'
        '<pFluorescentProbe runtype="X"><m_ExcitationSpectrum runtype="X"><uiCount runtype="lx_uint32" value="0"/>'
        f"</m_ExcitationSpectrum></pFluorescentProbe></a{c}>"
        for c in range(1 if colours else num)
    )
    planes = f'<uiCount runtype="lx_uint32" value="{1 if colours else num}"/><sPlane runtype="X">{planes}</sPlane>'
    meta = f'<bCalibrated runtype="bool" value="{str(calibrated).lower()}"/>'
    meta += f'<dCalibration runtype="double" value="{um}"/>'
    meta += f'<sPicturePlanes runtype="X">{planes}</sPicturePlanes>'
    chunks = {
        b"ImageAttributes!": variant("SLxImageAttributes", attributes),
        b"ImageMetadataSeq|0!": variant("SLxPictureMetadata", meta),
        b"CustomData|AcqTimesCache!": bytes(8),
        b"ImageDataSeq|0!": bytes(8) + pixels[:: -1 if colours else 1].transpose(1, 2, 0).tobytes(),
    }
    out, entries = chunk(b"ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver2.0".ljust(64, b"\0"), 32), b""
    for name, data in chunks.items():
        entries += name + struct.pack("<QQ", len(out), len(data))
        out += chunk(name, data, 4072)  # pixels begin at 4096
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!"
    offset = struct.pack("<Q", len(out))
    out += chunk(b"ND2 FILEMAP SIGNATURE NAME 0001!", entries + end + offset, 32)
    path.write_bytes(out + end + offset)


def variant(name, inside):
    """XML of a chunk."""
    return f"<variant><no_name><{name}>{inside}</{name}></no_name></variant>".encode()


def chunk(name, data, length):
    """A chunk of an ND2."""
    return struct.pack("<IIQ", 0x0ABECEDA, length, len(data)) + name.ljust(length, b"\0") + data
