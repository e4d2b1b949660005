"""Plain pickles: NumPy's values are read, and no file of a stranger takes long, or much memory, or runs anything."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmmasksd.data.readers import plain_pickle
from cmmasksd.data.readers.plain_pickle import load_plain_pickle
from cmmasksd.errors import UserError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_values_become_pythons_own(protocol: int):
    types = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
    values = [np.dtype(kind).type(value) for kind in types for value in (0, 1, 77)]
    values += [np.int64(-5), np.int64(-(2**63)), np.uint64(2**64 - 1), np.float64(0.1), np.bool_(True), np.bool_(False)]
    values += [np.str_("a red cup"), np.str_("é 日本 \U0001f600")]
    found = load_plain_pickle(pickle.dumps({"values": values, "again": values[3]}, protocol))
    assert found == {"values": [value.item() for value in values], "again": values[3].item()}
    assert {type(value) for value in found["values"]} == {int, float, bool, str}


def test_numpy_values_as_older_versions_wrote_them():
    new = pickle.dumps([np.int64(200), np.int64(7)], 2)
    assert load_plain_pickle(new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")) == [200, 7]
    python_2 = b"""(lp0
cnumpy.core.multiarray
scalar
p1
(cnumpy
dtype
p2
(S'i8'
p3
I0
I1
tp4
Rp5
(I3
S'<'
p6
NNNI-1
I-1
I0
tp7
bS'%s\\x00\\x00\\x00\\x00\\x00\\x00'
p8
tp9
Rp10
a."""
    assert load_plain_pickle(python_2 % rb"\x05\x00") == [5]
    assert load_plain_pickle(python_2 % rb"\xc3\xa9") == [0xA9C3], "as text, these are the UTF-8 of one letter"
    assert load_plain_pickle(python_2 % rb"\xff\xa9") == [0xA9FF]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3), "asks for 'numpy"),
        (np.complex128(1), "NumPy values of the type 'c16'"),
        (np.datetime64("2020-01-01"), "NumPy values of the type 'M8'"),
        (np.array([(1, 2.0)], dtype="i4,f4")[0], "NumPy values of the type 'V8'"),
        (np.dtype(">i4"), "layout"),
        (print, "asks for '(__builtin__|builtins).print'"),
        (Path("x"), "asks for"),
        ({1}, "unexpected instruction|asks for"),
        ({(1, 2): 3}, "expected text as keys"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_other_values_are_refused(value: object, message: str, protocol: int):
    with pytest.raises(UserError, match=message):
        load_plain_pickle(pickle.dumps([value, (1,)], protocol))


CALLS = [
    b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x01O\x85R.",
    b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02i8\x85R\x8c\x05numpy\x8c\x05dtype\x93\x85b.",
    b"\x8c\x05numpy\x8c\x05dtype\x93}\x8c\x0c__defaults__(tsb.",
    b"\x8c\x05numpy\x8c\x05dtype\x93NR.",
    b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02i8\x85R)R.",
    b"\x8c\x06_codecs\x8c\x06encode\x93\x8c\x01a\x8c\x03zip\x86R.",
    b"\x8c\x15numpy.core.multiarray\x8c\x06scalar\x93\x8c\x05numpy\x8c\x05dtype\x93\x8c\x06U99999\x85RC\x01a\x86R.",
    b"NN\x93.",
    b"](h\x00\x93.",
]


@pytest.mark.parametrize("content", CALLS)
def test_the_functions_that_are_understood_cannot_be_abused(content: bytes):
    with pytest.raises(UserError):
        load_plain_pickle(b"\x80\x04" + content)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([code]) for code in range(256)])
        | st.sampled_from([*CALLS, b"K\x01", b"q\x00", b"h\x00", b"\x8c\x01a", b"I1\n", b"L1L\n", b"S'a'\n", b"p0\n"])
    ).map(lambda parts: b"".join(parts) + b".")
)
@example(b"")
def test_any_bytes_are_a_plain_value_or_one_error(content: bytes):
    said = ""
    try:
        load_plain_pickle(content)
    except UserError as error:
        said = str(error)
    assert len(said) < 200
    assert said.isprintable()


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    ),
    st.sampled_from(PROTOCOLS[2:]),  # protocol 0 cannot write every text, and 0 and 1 write b"" as a call
)
def test_both_machines_read_what_pickle_writes(value: object, protocol: int):
    content = pickle.dumps(value, protocol)
    if protocol == 2 and b"__builtin__\nbytes" in content:
        return
    assert plain_pickle._PlainUnpickler(io.BytesIO(content)).load() == value
    assert load_plain_pickle(content) == value


def test_containers_are_counted_wherever_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plain_pickle, "MAX_CONTAINERS", 1000)
    for part in (b"](e", b"}", b"(l", b"(d", b"(t", b"N\x85", b"N\x85U\x00", b"}X\0\0\0\0"):
        few, many = (b"](" + part * count + b"e." for count in (100, 1001))
        assert load_plain_pickle(few)
        with pytest.raises(UserError, match="more values"):
            load_plain_pickle(many)
    assert load_plain_pickle(b"](" + b"S'(]}'\n" * 1000 + b"e.") == ["(]}"] * 1000
    monkeypatch.setattr(plain_pickle, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UserError, match="more values"):
        load_plain_pickle(b"](" + b"N" * 1000 + b"N\x85e.")


BOMBS = {
    "lists": "b']' * 20_000_000 + b'.'",
    "marks": "b'(' * 20_000_000 + b'.'",
    "dicts": "b'](' + b'}' * 20_000_000 + b'e.'",
    "deep": "b']' * 300_000 + b'a' * 299_999 + b'.'",
    "shared lists": "b']' + b''.join(b'q%c](h%ch%ce' % (i, i, i) for i in range(100)) + b'.'",
    "shared tuples": "b'}N' + b'2\\x86' * 100 + b'Ns.'",
    "two shared tuples": "b'}' + (b'N' + b'2\\x86' * 100 + b'N') * 2 + b's.'",
    "keys that collide": "b'}(' + b''.join(b'L%dL\\nN' % (k * (2**61 - 1)) for k in range(200_000)) + b'u.'",
    "long numbers": "b'L' + b'9' * 20_000_000 + b'L\\n.'",
    "long text": "b'\\x8c\\x06_codecs\\x8c\\x06encode\\x93q\\x00X\\x00\\x00\\x10\\x00' + b'a' * 2**20 + "
    "b'\\x8c\\x06latin1\\x86q\\x01' + b'(h\\x00h\\x01R' * 5000 + b'.'",
    "memo keys that collide": "b'N' + b''.join(b'p%d\\n' % (k * (2**61 - 1)) for k in range(300_000)) + b'.'",
    "memo": "b'Nr\\xff\\xff\\xff\\xff.'",
    "a lie about the length": "b'\\x8e\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x7fabc.'",
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on memory and time")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_line_in_bounded_time_and_memory(tmp_path: Path, bomb: str):
    """By ReferDataset in a process of its own; the limit of 800 MB includes 300 MB that importing takes."""
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "instances.json").write_text("{}")
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(eval(BOMBS[bomb]))
    code = (
        "import resource, sys; from cmmasksd.data.readers.refer import ReferDataset\n"
        "from cmmasksd.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "try: ReferDataset('refcoco', sys.argv[1], 'train')\n"
        "except UserError as error: print(error)\n"
        "from memory import peak_megabytes; print(round(peak_megabytes()))"
    )
    code = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    message, megabytes = done.stdout.splitlines()
    assert "refs(unc).p" in message
    assert len(message) < 400 + len(str(tmp_path))
    assert int(megabytes) < 800


def test_pythons_machine_looks_up_no_name_even_if_the_scan_lets_one_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plain_pickle, "_is_simple", lambda data: True)
    called = []
    monkeypatch.setattr(os, "system", called.append)
    with pytest.raises(UserError, match="could run any code"):
        load_plain_pickle(b"cos\nsystem\n(S'x'\ntR.")
    assert called == []
