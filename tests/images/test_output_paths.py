import pytest
from examples import write

from images.output_paths import check_replaceable
from utils import UserError


@pytest.mark.parametrize("entry", ["notes.txt", "0/c/0/notes.txt", "labels/zarr.json"])
@pytest.mark.parametrize("ending", ["", ".old", ".partial"])
def test_check_replaceable_refuses_a_zarr_with_something_else_in_it(tmp_path, entry, ending):
    pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    write(path, 1)
    check_replaceable(path)
    entry_path = path.with_name(path.name + ending) / entry
    entry_path.parent.mkdir(parents=True, exist_ok=True)
    entry_path.write_text("mine")
    with pytest.raises(UserError, match=r"is not a Zarr image that --mode predict wrote \(it holds"):
        check_replaceable(path)
    assert entry_path.read_text() == "mine"
