"""Fixtures of the checkpoints' tests: a folder that a test may spoil."""

import pytest


@pytest.fixture
def folder(sample_folder, tmp_path):
    """The sample as links, as the Hugging Face cache has its files; a test replaces what it spoils."""
    for file in sample_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path
