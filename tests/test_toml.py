"""Reading TOML with lines, --set, and writing it back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.runtime import toml
from headrace.runtime.toml import ConfigError

KEYS = st.text(min_size=1, max_size=8)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.dates(),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4))
TABLES = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=4),
    lambda inner: st.dictionaries(KEYS, inner | VALUES, max_size=4),
    max_leaves=8,
)


@given(table=TABLES)
@settings(max_examples=300, deadline=None)
def test_what_is_written_reads_back_equal(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dump(table)) == table


@given(table=TABLES, filler=st.lists(st.sampled_from(["", "# [not] = 'a table'", "  \t"]), max_size=3))
@settings(max_examples=200, deadline=None)
def test_each_key_is_found_on_the_line_that_holds_it(table: dict[str, Any], filler: list[str]) -> None:
    """Oracle: up to the line before the key, the text does not have it; with that line, it has."""
    text = "\n".join("\n".join([*filler, line]) for line in toml.dump(table).split("\n"))
    for keys, line in toml.key_lines(text).items():
        lines = text.split("\n")
        assert not _has(tomllib.loads("\n".join(lines[: line - 1])), keys)
        assert _has(tomllib.loads("\n".join(lines[:line])), keys)


def _has(table: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        if not isinstance(table, dict) or key not in table:
            return False
        table = table[key]
    return True


def test_lines_of_every_kind_of_value() -> None:
    text = '''# comment with [brackets] and key = 1
a = 1  # trailing = comment
[one."two.x"]
b = """
[three]
c = 1
"""
d = [ # comment ]
  "]", '[',
  { e = 1 },
]
f.g = {h = "}", i = []}
j = \'\'\'
k = 1\'\'\'
"q" = "a\\"b"
[[list]]
m = 1979-05-27T07:32:00Z
[last]'''
    assert toml.key_lines(text) == {
        ("a",): 2, ("one",): 3, ("one", "two.x"): 3, ("one", "two.x", "b"): 4, ("one", "two.x", "d"): 8,
        ("one", "two.x", "f"): 12, ("one", "two.x", "f", "g"): 12, ("one", "two.x", "j"): 13, ("one", "two.x", "q"): 15,
        ("list",): 16, ("list", "m"): 17, ("last",): 18,
    }  # fmt: skip


def test_lines_are_found_in_linear_time() -> None:
    text = "# # # " * 20_000 + "\n" + "a = [\n" + "  1,\n" * 20_000 + "]\n" + "#" * 100_000
    assert toml.key_lines(text) == {("a",): 2}


def _message(text: str, *overrides: str, tmp_path: Path) -> str:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        toml.read(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = \n", "c.toml:2: not valid TOML: Invalid value (column 5)"),
        ("a = 1\na = 2\n", "c.toml:2: not valid TOML: Cannot overwrite a value (column 6)"),
        ("[a]\n[a]\n", "c.toml:2: not valid TOML: Cannot declare ('a',) twice (column 3)"),
        ("x = " + "[" * 5000, "c.toml: not valid TOML: nested too deeply"),
        ("[a]\nb = nan\n", "c.toml:2: [a] b: must be a finite number, got nan"),
        ("[a]\n\nb = [1.0, -inf]\n", "c.toml:3: [a] b: must be a finite number, got -inf"),
    ],
)
def test_syntax_errors_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    assert _message(text, tmp_path=tmp_path) == message


def test_a_number_with_too_many_digits_is_a_syntax_error(tmp_path: Path) -> None:
    assert _message("x = " + "9" * 5000, tmp_path=tmp_path).startswith("c.toml: not valid TOML: Exceeds the limit")


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").touch()
    with pytest.raises(ConfigError, match=r"clutser\.toml: no such file; did you mean .*/cluster\.toml\?$"):
        toml.read(tmp_path / "clutser.toml")
    with pytest.raises(ConfigError, match=r"no such file; there is .*cluster\.toml$"):
        toml.read(tmp_path / "zzz")


def test_missing_file_with_nothing_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^nowhere/x\.toml: no such file$"):
        toml.read("nowhere/x.toml")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory; name a TOML file"):
        toml.read(tmp_path)
    (tmp_path / "cluster.toml").touch()
    with pytest.raises(ConfigError, match=r"is a directory; did you mean .*/cluster\.toml\?"):
        toml.read(tmp_path)


def test_other_unreadable_paths(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be read: Not a directory"):
        toml.read(tmp_path / "file" / "x.toml")
    with pytest.raises(ConfigError, match="can't be read"):
        toml.read("a\0b")


def test_a_file_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"[a]\n# fine\nb = 'caf\xe9'\n")
    with pytest.raises(ConfigError, match=r"c\.toml:3: not UTF-8 \(byte 0xe9\)"):
        toml.read(path)


def test_windows_files_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbf[a]\r\nb = 1\r\n[c]\r\n")
    document = toml.read(path)
    assert document.table == {"a": {"b": 1}, "c": {}}
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("c",): 3}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("a.b=3", 3), ("a.b = 1e-3", 1e-3), ("a.b=true", True), ("a.b=[1, 2]", [1, 2]), ("a.b={c=1}", {"c": 1}),
        ('a.b="3"', "3"), ("a.b=second", "second"), ("a.b=runs/x#1", "runs/x#1"), ("a.b=", ""), ("a.b=x=y", "x=y"),
        ("a.b=two words", "two words"), ("a.b='", "'"),
    ],
)  # fmt: skip
def test_set_takes_toml_values_and_bare_words(argument: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[a]\nb = 0\nz = 9\n")
    assert toml.read(path, [argument]).table == {"a": {"b": value, "z": 9}}


def test_set_makes_tables_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("")
    document = toml.read(path, ["a.b.c=1", "a.b.d=2", 'a."x.y"=3', "a.b.c=4"])
    assert document.table == {"a": {"b": {"c": 4, "d": 2}, "x.y": 3}}
    assert str(document.error(("a", "b", "c"), "no")) == "--set a.b.c=4: [a.b] c: no"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rl", "--set rl: must be KEY.KEY=VALUE, for example --set rl.steps=20"),
        ("=3", "--set =3: must be KEY.KEY=VALUE, for example --set rl.steps=20"),
        ("a..b=3", "--set a..b=3: must be KEY.KEY=VALUE, for example --set rl.steps=20"),
        ("a.b.c=3", "--set a.b.c=3: a.b is a value, not a table"),
        ("a.b=inf", "--set a.b=inf: [a] b: must be a finite number, got inf"),
        ("a.b=\udcff", r"--set 'a.b=\udcff': has characters that can't be printed; write plain UTF-8 text"),
        ("a.b=1\nc=2", r"--set 'a.b=1\nc=2': has characters that can't be printed; write plain UTF-8 text"),
    ],
)
def test_bad_set_arguments(argument: str, message: str, tmp_path: Path) -> None:
    assert _message("[a]\nb = 1\n", argument, tmp_path=tmp_path) == message


def test_errors_fall_back_to_the_nearest_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[a]\nb = 1\n")
    document = toml.read(path)
    assert str(document.error(("a", "zz"), "missing")) == f"{path}:1: [a] zz: missing"
    assert str(document.error(("c",), "missing")) == f"{path}: c: missing"


def test_what_toml_has_no_word_for() -> None:
    with pytest.raises(TypeError, match="TOML can't hold a NoneType"):
        toml.dump_value([None])
