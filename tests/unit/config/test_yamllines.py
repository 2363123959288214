"""YAML with lines: where things stand, and what is refused that PyYAML would accept."""

from __future__ import annotations

import gc

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from xdplb.config import yamllines
from xdplb.config.yamllines import Mistake, YamlError

KEYS = st.text("abcdefgh", min_size=1, max_size=4)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("xyz: -#'\"\n", max_size=6)
)
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@given(DATA, st.booleans())
def test_data_is_what_pyyaml_reads(data: object, flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow)
    document = yamllines.load(text)
    assert document.data == yaml.safe_load(text)
    assert document.mistakes == ()


@given(st.dictionaries(KEYS, st.lists(st.integers(), min_size=1, max_size=4), min_size=1, max_size=6))
def test_every_key_and_every_item_knows_its_line(data: dict[str, list[int]]) -> None:
    lines: list[str] = []
    where: dict[yamllines.Path, int] = {}
    for key, items in data.items():
        lines.append(f"{key!r}:")
        where[key,] = len(lines)
        for index, item in enumerate(items):
            lines.append(f"  - {item}")
            where[key, index] = len(lines)
    document = yamllines.load("\n".join(lines))
    assert {path: document.line(path) for path in where} == where


def test_the_line_of_what_is_not_there_is_that_of_the_nearest_thing_around_it() -> None:
    document = yamllines.load("a:\n  b:\n    - c: 1\n")
    assert document.line(()) == 1
    assert document.line(("a", "x", "y")) == 1
    assert document.line(("a", "b", 0, "x")) == 3
    assert document.line(("a", "b", 7)) == 2


def test_a_key_given_twice_is_a_mistake_and_the_first_value_counts() -> None:
    document = yamllines.load("a: 1\nb: [{c: 1,\n  d: 2,\n  c: 3}]\na: 2\n")
    assert document.data == {"a": 1, "b": [{"c": 1, "d": 2}]}
    assert document.mistakes == (
        Mistake(4, ("b", 0), "key 'c' is given twice, first on line 2"),
        Mistake(5, (), "key 'a' is given twice, first on line 1"),
    )


def test_keys_are_text_as_written() -> None:
    assert yamllines.load("on: 1\n80: 2\n~: 3\n").data == {"on": 1, "80": 2, "~": 3}


def test_merge_keys_keep_the_lines_of_what_they_merge() -> None:
    document = yamllines.load("base: &base\n  a: 1\n  b: 2\nuser:\n  <<: *base\n  b: 3\n")
    assert document.data == {"base": {"a": 1, "b": 2}, "user": {"a": 1, "b": 3}}
    assert document.line(("user", "a")) == 2
    assert document.line(("user", "b")) == 6


def test_aliases_do_not_multiply() -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
    data = yamllines.load(text).data
    assert isinstance(data, dict) and data["a2"][0] is data["a2"][9]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("x: 1\n{{ name }}: 2", Mistake(2, (), "a key must be plain text, not a list or a mapping")),
        ("x:\n  y: !vault z", Mistake(2, ("x", "y"), "the YAML tag '!vault' means nothing here; leave it out")),
        ("x: !!set {a, b}", Mistake(1, ("x",), "the YAML tag '!!set' means nothing here; leave it out")),
        ("x:\n  <<: 3", Mistake(2, ("x",), "'<<' takes a mapping or a list of mappings")),
        (
            "x: !!python/object/apply:os.system [true]",
            Mistake(1, ("x",), "the YAML tag '!!python/object/apply:os.system' means nothing here; leave it out"),
        ),
    ],
)
def test_what_no_operator_means_is_a_mistake(text: str, mistake: Mistake) -> None:
    assert yamllines.load(text).mistakes == (mistake,)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: b: c", 1, "mapping values are not allowed in this context"),
        ("a:\n  b: *nobody", 2, "found undefined alias"),
        ("a: 1\n\nb: \x01", 3, "the character 0x01 is not allowed in YAML"),
        ("x: 1\na: &a\n  b: [*a]", 2, "this value contains itself through an alias"),
        ("a: 1\n---\nb: 2", 2, "a second document begins here ('---'); only one is read"),
        (
            "a: {b: 1\nc: 2",
            2,
            "did not find expected ',' or '}' (while parsing a flow mapping that begins on line 1)",
        ),
    ],
)
def test_what_is_not_yaml_names_its_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(YamlError) as caught:
        yamllines.load(text)
    assert (caught.value.line, caught.value.problem) == (line, problem)


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000, "[" * 800 + "]" * 800])
def test_deep_nesting_ends_in_an_error_or_in_data(text: str) -> None:
    try:
        yamllines.load(text)
    except YamlError as error:
        assert error.line >= 1


@pytest.mark.parametrize("text", ["9" * 5000, "0x_", "0b_", "._"])
def test_a_number_that_python_cannot_read_stays_text(text: str) -> None:
    assert yamllines.load(text).data == text


@pytest.mark.parametrize("text", ["010", "-07", "0x1f", "0b11", "1:20", "1:20.5", "190:20:30", "1_000", "1_0.5", "00"])
def test_a_number_that_is_not_decimal_stays_text(text: str) -> None:
    """To YAML 1.1 these are 8, -7, 31, 3, 80 and so on, which no operator means."""
    assert yamllines.load(text).data == text


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("10", 10), ("-7", -7), ("1.20", 1.2), ("0.5", 0.5), ("1.5e+3", 1500)]
)
def test_a_decimal_number_is_one(text: str, number: float) -> None:
    assert yamllines.load(text).data == number


def test_paths_read_as_in_the_contract() -> None:
    assert yamllines.show(("services", 0, "backends", 2, "address")) == "services[0].backends[2].address"
    assert yamllines.show(()) == ""
    assert yamllines.show(("a\nb", "c")) == r"'a\nb'.c"


def test_the_collector_runs_again_after_a_pause_even_after_an_error() -> None:
    with pytest.raises(KeyError), yamllines.gc_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
