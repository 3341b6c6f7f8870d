"""Values survive the wire as they were; everything else is refused with CodecError, and nothing is ever executed."""

import math
import subprocess
import sys
from dataclasses import dataclass, field

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from headrace.runtime.codec import MAX_DEPTH, OUT_OF_BAND_BYTES, decode, dumps, encode, loads, wire
from headrace.runtime.errors import CodecError

DTYPES = ["|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"]


@wire
@dataclass(frozen=True, kw_only=True)
class Leaf:
    value: object
    array: object = None


@wire
@dataclass(slots=True)
class Branch:
    leaves: list[Leaf]
    named: dict[str, object] = field(default_factory=dict)
    computed: int = field(init=False, default=7)


@wire
@dataclass
class Picky:
    value: int

    def __post_init__(self):
        if not self.value < 5:
            raise KeyError(self.value)


@dataclass
class Unregistered:
    value: int = 0


def same(a, b):
    """Equal in value and type, down to dtype and shape of arrays."""
    if isinstance(a, np.ndarray | np.generic):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, Leaf):
        return type(b) is Leaf and same(a.value, b.value) and same(a.array, b.array)
    if isinstance(a, Branch):
        return type(b) is Branch and same(a.leaves, b.leaves) and same(a.named, b.named)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and math.isnan(a):
        return type(b) is float and math.isnan(b)
    return type(a) is type(b) and a == b


plain = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=2000)
)
arrays = npst.arrays(
    dtype=st.sampled_from(DTYPES).map(np.dtype),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12),
)


@st.composite
def views(draw):
    """Arrays that are not contiguous, or run backwards."""
    array = draw(arrays)
    return array.T[tuple(slice(None, None, draw(st.sampled_from([1, 2, -1]))) for _ in array.shape)]


scalars = st.sampled_from(DTYPES).flatmap(lambda d: npst.arrays(d, ())).map(lambda a: a[()])
values = st.recursive(
    plain | arrays | views() | scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=4)
        | st.builds(Leaf, value=inner, array=arrays)
        | st.builds(
            Branch, st.lists(st.builds(Leaf, value=inner), max_size=3), st.dictionaries(st.text(max_size=3), inner)
        )
    ),
    max_leaves=10,
)


@given(values)
def test_a_value_comes_back_as_it_was(value):
    assert same(value, decode(*encode(value)))
    assert same(value, loads(dumps(value)))


@pytest.mark.parametrize("size", [0, 1, OUT_OF_BAND_BYTES - 1, OUT_OF_BAND_BYTES, 10**6])
def test_large_arrays_travel_beside_the_pack_and_are_not_copied(size):
    array = np.arange(size, dtype=np.uint8)
    pack, buffers = encode({"a": array})
    assert len(buffers) == (size >= OUT_OF_BAND_BYTES) and len(pack) < OUT_OF_BAND_BYTES + 100
    back = decode(pack, buffers)["a"]
    assert np.array_equal(back, array) and not back.flags.writeable
    if buffers:
        assert np.shares_memory(back, array)


def test_keys_of_any_plain_kind():
    value = {1: "a", "b": 2, b"c": 3, (1, 2): 4, None: 5}
    assert decode(*encode(value)) == value


# What can't travel


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "builtins.object can't travel"),
        ([1, {"k": {3, 4}}], "builtins.set"),
        (Unregistered(), "Unregistered can't travel"),
        (Leaf(value=Unregistered()), r"^Leaf.value: .*Unregistered"),
        (Branch([Leaf(value=1), Leaf(value=[0, len])]), r"^Branch.leaves: Leaf.value: .*builtin_function"),
        (Branch([], {"x": (Leaf(value=1j),)}), r"^Branch.named: Leaf.value: .*complex"),
        (Leaf(value=2**64), r"^Leaf.value: .*64 bits"),
        (Leaf(value="\udc80"), r"^Leaf.value: .*surrogates"),
        (np.array(["a"]), "dtype <U1"),
        (Leaf(value=0, array=np.array([None])), "^Leaf.array: arrays of dtype object"),
        (np.zeros(2, ">f4"), "dtype >f4"),
        (np.zeros(2, [("a", "<f4")]), "dtype"),
        (np.datetime64("2026-01-01"), "datetime64"),
        (lambda: 0, "function"),
        (Leaf, "builtins.type"),
    ],
)
def test_what_can_not_travel_is_named_with_its_path(value, said):
    with pytest.raises(CodecError, match=said):
        encode(value)


def test_a_value_that_holds_itself_is_refused():
    ring = []
    ring.append(ring)
    deep = ()
    for _ in range(5000):
        deep = (deep,)
    leaf = Leaf(value=[])
    leaf.value.append(leaf)
    for value in (ring, deep, leaf):
        with pytest.raises(CodecError):
            encode(value)


def test_wire_wants_a_dataclass():
    with pytest.raises(TypeError, match="above @dataclass"):
        wire(int)


# Bytes of a peer that is not to be trusted


def ext(code, *items):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb(list(items))))


ARRAY, DATACLASS, TUPLE, SCALAR = 1, 2, 3, 4
NAME = f"{__name__}:Leaf"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "malformed"),
        (b"\xdd\xff\xff\xff\xff", "malformed"),
        (b"\xc7\x05\x02\xdd\xff\xff\xff\xff", "malformed"),
        (msgpack.packb(1) + b"\x00", "malformed"),
        (b"\x91" * 100_000, "malformed"),
        (ext(99), "unknown extension type 99"),
        (ext(ARRAY, "|O8", [1], b"12345678"), "dtype '|O8' is not allowed"),
        (ext(ARRAY, ["<f4"], [1], b"1234"), "malformed"),
        (ext(ARRAY, "<f4", [-1], b""), "shape"),
        (ext(ARRAY, "<f4", [True], b"1234"), "shape"),
        (ext(ARRAY, "<f4", [2], b"1234"), "has 4 bytes"),
        (ext(ARRAY, "<f4", [0, 2**63], b""), "malformed"),
        (ext(ARRAY, "<f4", [2**40], 0), "buffer 0 of 0 is missing"),
        (ext(ARRAY, "<f4", [1], -1), "missing"),
        (ext(ARRAY, "<f4", [1], "1234"), "malformed"),
        (ext(ARRAY, "<f4"), "malformed"),
        (ext(DATACLASS, "os:system", 0, "true"), "unknown type 'os:system'"),
        (ext(DATACLASS, "subprocess:Popen", 0, ["true"]), "unknown type"),
        (ext(DATACLASS, NAME, 0, 1, 2), "other fields"),
        (ext(DATACLASS, [NAME], 0), "malformed"),
        (ext(DATACLASS), "malformed"),
        (msgpack.packb(msgpack.ExtType(SCALAR, b"|O8")), "not allowed"),
        (msgpack.packb(msgpack.ExtType(SCALAR, b"<f4\x00")), "not allowed"),
        (msgpack.packb(msgpack.ExtType(SCALAR, b"\xff\xff\xff")), "malformed"),
        (msgpack.packb(msgpack.ExtType(TUPLE, b"\xc0")), "malformed"),
    ],
)
def test_hostile_bytes_are_refused(data, said):
    with pytest.raises(CodecError, match=said):
        decode(data)


def test_nesting_is_bounded():
    data = msgpack.packb(1)
    for _ in range(MAX_DEPTH + 1):
        data = msgpack.packb(msgpack.ExtType(TUPLE, b"\x91" + data))
    with pytest.raises(CodecError, match="nested deeper"):
        decode(data)


def test_what_a_dataclass_refuses_is_a_codec_error():
    pack, _ = encode(Picky(1))
    with pytest.raises(CodecError, match="Picky refuses its fields: KeyError: 9"):
        decode(pack.replace(b"\x01", b"\x09"))


SEEDS = [
    encode(v)
    for v in (Branch([Leaf(value=(1, "a"), array=np.arange(200.0))], {"k": np.float32(2)}), [1, {"a": b"x" * 40}])
]


@given(st.data())
@settings(max_examples=300)
def test_random_mutated_and_truncated_bytes_raise_nothing_but_codec_errors(data):
    pack, buffers = data.draw(st.sampled_from(SEEDS))
    how = data.draw(st.sampled_from(["random", "cut", "flip", "insert"]))
    if how == "random":
        pack = data.draw(st.binary(max_size=64))
    elif how == "cut":
        pack = pack[: data.draw(st.integers(0, len(pack)))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(pack) - 1))
            pack = pack[:at] + data.draw(st.binary(min_size=1, max_size=3)) + pack[at + (how == "flip") :]
    modules = set(sys.modules)
    for read in (lambda: decode(pack, buffers), lambda: decode(pack), lambda: loads(pack)):
        try:
            read()
        except CodecError:
            pass
    assert set(sys.modules) == modules


def test_the_codec_can_neither_unpickle_nor_import():
    """Reads the code: no pickle, no marshal, no eval, no import by name in anything that touches bytes from outside."""
    code = (
        "import sys; from headrace.runtime import codec as c, transport as t, protocol as p;"
        "text = ''.join(open(m.__file__).read() for m in (c, t, p));"
        "words = ['pickle.', 'import pickle', 'marshal', 'eval(', 'exec(', 'importlib', '__import__'];"
        "sys.exit(any(w in text for w in words))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
