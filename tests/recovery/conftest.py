"""The models that the tests of `recover` share."""

from __future__ import annotations

import pytest
from launches import Assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory, text_file, tiny) -> Assets:
    return Assets(tmp_path_factory.mktemp("assets"), text_file, tiny)
