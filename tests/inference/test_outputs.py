"""Names of the files that `cmmasksd predict` writes."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cmmasksd.inference.outputs import FileNames, slug
from cmmasksd.inference.sources import Source


def source(name: str) -> Source:
    return Source(name, Path(name), ("x",))


@given(st.lists(st.text(min_size=1, max_size=300).filter(lambda name: "/" not in name and name not in (".", ".."))))
def test_file_names_suit_every_system(names: list[str]):
    chosen = FileNames([source(name) for name in names])
    stems = [chosen.stem(index, frame) for index in range(len(names)) for frame in (None, 1, 2)]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', stem)
        assert len(f".{stem}_10_{slug('a' * 99)}_overlay.png.part".encode()) <= 255


def test_file_names_are_those_of_the_images():
    names = ["x/a.png", "y/A.jpg", "y/a b.jpg", "v.gif", "v_f0002.png", "-"]
    chosen = FileNames([source(name) for name in names])
    stems = [chosen.stem(index, None) for index in range(len(names))]
    assert stems == ["a", "A_2", "a b", "v", "v_f0002", "-"]
    assert [chosen.stem(3, frame) for frame in (1, 2, 12)] == ["v_f0001", "v_f0002_2", "v_f0012"]
    assert FileNames([Source("-", b"", ("x",))]).stem(0, None) == "stdin"
