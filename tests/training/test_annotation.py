import tracemalloc

import numpy as np

from samples import IGNORE
from training.annotation import AnnotatedBlocks


def test_each_block_with_annotation_is_found_with_a_pixel_of_it_and_their_number():
    label = np.full((300, 50), IGNORE, np.uint8)
    label[17, 3] = 0  # alone in its block
    label[270:280, 45:50] = 1  # over two blocks of rows, beyond the first band
    blocks = AnnotatedBlocks.find(label)
    assert blocks.anchors.tolist() == [[17, 3], [270, 45], [270, 48], [272, 45], [272, 48]]
    assert blocks.ends.tolist() == [1, 1 + 6, 7 + 4, 11 + 24, 35 + 16]
    assert len(AnnotatedBlocks.find(np.full((40, 40), IGNORE, np.uint8))) == 0


def test_blocks_are_drawn_as_often_as_they_have_annotated_pixels():
    label = np.full((64, 64), IGNORE, np.uint8)
    label[:16, :16] = 0
    label[60, 10:26] = 0  # 6 pixels in one block and 10 in the next
    anchors = AnnotatedBlocks.find(label).draw(np.random.default_rng(0), 27200).tolist()
    counts = [anchors.count(anchor) for anchor in ([0, 0], [60, 10], [60, 16])]
    assert sum(counts) == 27200
    np.testing.assert_allclose(counts, [25600, 600, 1000], rtol=0.15)


def test_a_large_label_takes_little_memory(tmp_path):
    sample = np.lib.format.open_memmap(
        tmp_path / "0.npy", "w+", [("input", np.uint8), ("label", np.uint8)], (9000, 9000)
    )
    tracemalloc.start()
    blocks = AnnotatedBlocks.find(sample["label"])  # all annotated
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(blocks) == 563**2 and blocks.ends[-1] == 9000**2
    assert kept < 6e6 and most < 30e6
