import pytest

from tests.soak import soak


@pytest.mark.long
def test_memory_and_open_files_stay_flat(tmp_path):
    found = soak(tmp_path, seconds=40)
    assert found.late.files <= found.early.files + 8  # far from one of each of some fifty checkpoints
    assert found.late.memory <= found.early.memory * 1.05 + 20
