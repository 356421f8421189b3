import numpy as np
import pytest

from images.readers import Frame
from prediction.linking import SectionLinker, stacks_to_link
from utils import UserError

Y, X = np.mgrid[:60, :120]


def disc(y, x, radius):
    return np.hypot(Y - y, X - x) < radius


def neurites():
    """Ten sections of four neurites: (10, 60, 120) with their names, and what happens to them."""
    stack = np.zeros((10, 60, 120), np.uint32)
    for z, section in enumerate(stack):
        section[disc(15, 15 + z, 8)] = 1  # drifts
        if z < 5:  # splits into a large part, 2, and a small one, 3
            section[disc(15, 60, 9)] = 2
        else:
            section[disc(15, 60, 9) & (X < 62)] = 2
            section[disc(15, 60, 9) & (X > 62)] = 3
        if z < 5:  # 4 and the smaller 5 merge into 4
            section[disc(45, 60, 9) & (X < 62)] = 4
            section[disc(45, 60, 9) & (X > 62)] = 5
        else:
            section[disc(45, 60, 9)] = 4
        if z != 4:  # missing in one section: 6 before it, 7 behind
            section[disc(45, 100, 8)] = 6 if z < 4 else 7
    return stack


def shuffled(section, rng):
    """The same objects with numbers from 1 on in another order, as each section has its own."""
    names = np.unique(section[section > 0])
    number = np.zeros(section.max() + 1, np.uint32)
    number[rng.permutation(names)] = np.arange(len(names)) + 1
    return number[section]


def link(stack, min_iou, class_ids=None):
    linker = SectionLinker(min_iou)
    class_ids = [None] * len(stack) if class_ids is None else class_ids
    linked = np.stack(
        [linker.link(section, class_id)[section] for section, class_id in zip(stack, class_ids, strict=True)]
    )
    assert np.array_equal(np.unique(linked[linked > 0]), np.arange(linker.count) + 1)  # no gap
    return linked


def names_of(linked, stack):
    """Pairs of a number and the name of the neurite that it stands for."""
    return {(int(number), int(name)) for number, name in np.unique(np.stack([linked.ravel(), stack.ravel()]), axis=1).T}


def test_section_linker_numbers_neurites_through_drift_split_and_merger():
    stack, rng = neurites(), np.random.default_rng(0)
    linked = link([shuffled(section, rng) for section in stack], 0.3)
    pairs = names_of(linked, stack)
    assert len(pairs) == 8 == len({number for number, _ in pairs}) == len({name for _, name in pairs})


def test_section_linker_at_a_higher_threshold_ends_what_changes():
    stack = neurites()
    assert link(stack, 0.3).max() == 7
    assert link(stack, 0.9).max() > 9  # the drift, too
    assert link(stack, 1.0).max() == 10 + 3 + 3 + 2  # drift in each section; once a split, a merger and a gap


def test_section_linker_gives_equal_overlaps_to_one_object():
    one, two = np.zeros((2, 4, 8), np.uint32)
    one[:, :4], two[:, :2], two[:, 2:4], two[:, 5:] = 1, 2, 1, 3
    assert link([one, two, one], 0.5)[:, 0].tolist() == [[1] * 4 + [0] * 4, [2, 2, 1, 1, 0, 3, 3, 3], [1] * 4 + [0] * 4]


def test_section_linker_numbers_empty_and_single_sections():
    empty, full = np.zeros((2, 6, 7), np.uint32)
    full[2:4, 2:4] = 1
    assert link([empty], 0.5).max() == 0 and link([full], 0.5).max() == 1
    assert link([empty, full, empty, full, full], 0.5)[:, 3, 3].tolist() == [0, 1, 0, 2, 2]


def test_section_linker_does_not_link_different_classes():
    section = np.ones((6, 6), np.uint32)
    class_ids = np.full((3, 6, 6), 2, np.uint8)
    class_ids[2] = 1
    assert link([section] * 3, 0.5, class_ids)[:, 0, 0].tolist() == [1, 1, 2]


def test_section_linker_links_alike_in_bands(monkeypatch):
    stack = neurites()
    whole = link(stack, 0.3)
    monkeypatch.setattr("prediction.linking.TILE_HEIGHT", 7)
    assert np.array_equal(link(stack, 0.3), whole)


def test_section_linker_agrees_with_all_pairs_compared():
    rng = np.random.default_rng(1)
    one, two = (rng.integers(0, 6, (12, 12)).repeat(3, 0).repeat(3, 1).astype(np.uint32) for _ in range(2))
    linked = link([one, two], 0.1)
    iou = np.array(
        [[np.sum((one == a) & (two == b)) / np.sum((one == a) | (two == b)) for b in range(6)] for a in range(6)]
    )
    iou[0], iou[:, 0] = 0, 0
    expected = {}
    while iou.max() >= 0.1:  # the greatest of all is taken, then what shares an object with it is out
        before, here = np.unravel_index(iou.argmax(), iou.shape)
        expected[here] = before
        iou[before], iou[:, here] = 0, 0
    assert {here: linked[1][two == here][0] for here in expected} == expected and len(expected) > 2
    assert linked.max() == 5 + 5 - len(expected)


def test_stacks_to_link_refuses_what_is_no_stack(tmp_path):
    one = [Frame(tmp_path / "a.png", 0)]
    times = [Frame(tmp_path / "t.tif", index, index) for index in range(3)]
    with pytest.raises(UserError, match=r"a.png is one image: name a stack"):
        stacks_to_link(one, [np.zeros((4, 4, 1))], 0.5)
    with pytest.raises(UserError, match="a stack of its own"):
        stacks_to_link(times, [np.zeros((4, 4, 1))] * 3, 0.5)
    pngs = [Frame(tmp_path / f"{index}.png", 0) for index in range(2)]
    assert stacks_to_link([*pngs, *times], [np.zeros((4, 4, 1))] * 5, 0.5) == [0, 0, 1, 2, 3]
    with pytest.raises(UserError, match=r"1.png \(4, 5\): the sections of a stack must have one size"):
        stacks_to_link(pngs, [np.zeros((4, 4, 1)), np.zeros((4, 5, 1))], 0.5)
