"""Model names: which are hub ids, and which are folders."""

import pytest

from cmmasksd.errors import UserError
from cmmasksd.model.locating import is_hub_id, model_folder


def test_names():
    assert is_hub_id("someone/model")
    assert not any(map(is_hub_id, ("./model", "../a", "/a", "~/a", "C:/a", "a/b/c", "model")))
    with pytest.raises(UserError, match="no model folder a/b/c"):
        model_folder("a/b/c")
