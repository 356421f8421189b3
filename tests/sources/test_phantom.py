import numpy as np

from sources.phantom import CELL, MEMBRANE, NUCLEUS, em_stack, nuclei_images


def test_em_stack_is_a_function_of_its_seed():
    first, again, other = em_stack(2, 64, 1), em_stack(2, 64, 1), em_stack(2, 64, 2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], other[0])


def test_em_stack_has_dark_membranes_that_no_threshold_finds():
    images, labels = em_stack(3, 128)
    assert set(np.unique(labels)) == {MEMBRANE, CELL}
    assert 0.15 < (labels == MEMBRANE).mean() < 0.3
    membrane, cell = images[labels == MEMBRANE], images[labels == CELL]
    assert membrane.mean() < cell.mean() - 20
    best = max(1 - np.mean((images > t) != (labels == CELL)) for t in range(0, 256, 8))
    assert best < 0.95


def test_em_stack_changes_slowly_from_section_to_section():
    labels = em_stack(8, 128)[1]
    assert np.mean(labels[0] != labels[1]) < 0.7 * np.mean(labels[0] != labels[7])


def test_nuclei_images_cover_the_fraction_and_differ_in_size():
    for fraction, limit in ((0.15, 0.2), (0.02, 0.05)):
        images, labels = nuclei_images(6, size=128, seed=1, fraction=fraction)
        assert all(fraction <= (label == NUCLEUS).mean() < limit for label in labels)
        assert len({image.shape for image in images}) == 6 and images[0].dtype == np.uint16
        inside = np.mean([image[label > 0].mean() for image, label in zip(images, labels, strict=True)])
        outside = np.mean([image[label == 0].mean() for image, label in zip(images, labels, strict=True)])
        assert inside > 1.5 * outside
    again = nuclei_images(6, size=128, seed=1, fraction=0.02)
    assert all((a == b).all() for a, b in zip(again[0], images, strict=True))
