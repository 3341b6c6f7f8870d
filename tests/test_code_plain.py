"""What travels between a response and its tests: values come back equal and of the same builtin types, hostile frames
end in one error, and nothing that a class overrides travels with it."""

import collections
import decimal
import fractions
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.verifier.inside import plain

ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.complex_numbers(),
    st.text(st.characters()), st.binary(max_size=20), st.fractions(), st.decimals(-(10**9), 10**9),
)  # fmt: skip
KEYS = st.one_of(st.integers(), st.text(max_size=5), st.tuples(st.integers(), st.booleans()))
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=4),
        st.sets(KEYS, max_size=4), st.frozensets(KEYS, max_size=4),
    ),
    max_leaves=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    reader, writer = os.pipe()
    peer = plain.Peer(reader, writer, open_to=())
    yield peer
    peer._reader.close()
    os.close(writer)


def same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex() or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


def travelled(peer: plain.Peer, value: object) -> object:
    return peer.decode(json.loads(json.dumps(peer.encode(value))))


@given(VALUES)
def test_values_come_back(peer, value):
    assert same(travelled(peer, value), value)


@pytest.mark.parametrize(
    "value",
    [
        range(3, 30, 4),
        bytearray(b"x"),
        collections.deque([1, (2,)]),
        decimal.Decimal("1.50"),
        fractions.Fraction(1, 3),
        int,
    ],
)
def test_some_more_types_come_back(peer, value):
    assert same(travelled(peer, value), value)


def test_what_a_class_overrides_stays_behind(peer):
    class Sly(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Dict(dict):
        def get(self, key, default=None):
            return 42

    came = [travelled(peer, Sly(7)), travelled(peer, Dict(a=1)), travelled(peer, collections.Counter("ab"))]
    assert [type(value) for value in came] == [int, dict, dict] and came[0] != 8 and came[1].get("b") is None


def test_an_iterator_is_no_list(peer):
    came = travelled(peer, iter([1, 2]))
    assert came != [1, 2] and list(came) == [1, 2]


@given(st.recursive(st.one_of(st.none(), st.text(max_size=6), st.integers()), lambda x: st.lists(x, max_size=3)))
def test_data_that_is_no_value_is_one_error(peer, data):
    try:
        peer.decode(data)
    except plain.TooMuch:
        pass


@pytest.mark.parametrize(
    "data",
    [
        ["range", ["0x0", hex(10**18), "0x1"]],
        ["decimal", "1e999999999"],
        ["yours", 5],
        ["type", "eval"],
        ["set", [["list", []]]],
        ["fraction", ["0x1", "0x0"]],
    ],
)
def test_values_that_are_small_to_send_and_large_to_use_are_refused(peer, data):
    with pytest.raises(plain.TooMuch):
        peer.decode(data)


@pytest.mark.parametrize("line", [b"[" * 100_000 + b"\n", b"{}\n", b"no json\n", b"[]\n", b"\xff\n", b"[1"])
def test_a_line_that_is_no_frame_is_one_error(line):
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        peer = plain.Peer(reader, writer, open_to=())
        os.set_blocking(writer, False)
        file.write(line[:60_000] if len(line) > 60_000 else line)
        file.close()
    with pytest.raises(plain.TooMuch):
        peer.receive()
    peer._reader.close()
