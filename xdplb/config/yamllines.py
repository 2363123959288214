"""YAML whose every key and item remembers its line, so that a mistake found much later can say where it stands.

Only the plain types of YAML's safe schema are read; keys are always text, as written. What PyYAML accepts silently and
an operator never means is a mistake here: a key given twice, a key that is not text, a tag.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

Path = tuple[str | int, ...]
"""Keys and indices from the top of the document: `("services", 0, "listen")`."""

_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_PREFIX = "tag:yaml.org,2002:"
_MERGE = f"{_PREFIX}merge"
_STR = f"{_PREFIX}str"
_COLLECTIONS = (f"{_PREFIX}map", f"{_PREFIX}seq")
_TEXT = (_STR, f"{_PREFIX}timestamp", f"{_PREFIX}value")
_SAFE = yaml.constructor.SafeConstructor()
_CONVERT = {
    f"{_PREFIX}int": _SAFE.construct_yaml_int,
    f"{_PREFIX}float": _SAFE.construct_yaml_float,
    f"{_PREFIX}bool": _SAFE.construct_yaml_bool,
    f"{_PREFIX}null": _SAFE.construct_yaml_null,
}
_NUMBERS = (f"{_PREFIX}int", f"{_PREFIX}float")
_NOT_DECIMAL = re.compile(r"[:_xb]|^[-+]?0[0-9]")


class YamlError(ValueError):
    """The text is not YAML at all. `line` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something in well-formed YAML that cannot be meant. `path` is the mapping or item it concerns."""

    line: int
    path: Path
    text: str


class Document:
    """A document as plain `data` (dict, list, str, int, float, bool, None), its `mistakes`, and the lines of both.

    `data` holds the first value of a key given twice. An aliased collection is the same object wherever it is used.
    """

    def __init__(self, root: yaml.Node | None) -> None:
        builder = _Builder()
        self._root = root
        self.data: object = None if root is None else builder.build(root, ())
        self.mistakes: tuple[Mistake, ...] = tuple(builder.mistakes)

    def line(self, path: Path) -> int:
        """The line of a key, or the first one of an item; of the nearest thing around where `path` leads to nothing."""
        line, node = 1, self._root
        for step in path:
            found = _step(node, step)
            if found is None:
                break
            line, node = found
        return line


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection while a large tree is built: walking it again and again takes four fifths of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load(text: str) -> Document:
    """Read one document. Raises YamlError for text that is not YAML; an empty text is a document of None."""
    try:
        loader = _LOADER(text)
        try:
            return Document(loader.get_single_node())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _explain(error) from None
    except yaml.reader.ReaderError as error:
        bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
        line = text.count("\n", 0, bad.start()) + 1 if bad else 1
        raise YamlError(line, f"the character {error.character:#04x} is not allowed in YAML") from None
    except RecursionError:
        raise YamlError(1, "lists and mappings are nested too deeply") from None


def show(path: Path) -> str:
    """`services[0].backends[2].address`"""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        else:
            shown += f"{'.' if shown else ''}{step if step.isprintable() else repr(step)}"
    return shown


class _Builder:
    """Turns nodes into data. Each collection is built once, so that aliases cannot multiply the work."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []
        self._built: dict[int, object] = {}
        self._open: set[int] = set()

    def build(self, node: yaml.Node, path: Path) -> object:
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.tag == _STR else self._scalar(node, path)
        identity = id(node)
        if identity in self._built:
            return self._built[identity]
        if identity in self._open:
            raise YamlError(_line(node), "this value contains itself through an alias")
        if node.tag not in _COLLECTIONS:
            self._refuse_tag(node, path)
        self._open.add(identity)
        built: object
        if isinstance(node, yaml.MappingNode):
            built = self._mapping(node, path)
        else:
            built = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        self._open.remove(identity)
        self._built[identity] = built
        return built

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> object:
        """The value; a number that Python cannot read (thousands of digits) stays text.

        So does one that is not decimal: to YAML 1.1 `010` is 8, `1:20` is 80 and `1_0` is 10, which nobody means.
        """
        convert = _CONVERT.get(node.tag)
        if convert is not None and not (node.tag in _NUMBERS and _NOT_DECIMAL.search(node.value)):
            try:
                return convert(node)
            except (ValueError, KeyError):
                return node.value
        if node.tag not in _TEXT and node.tag not in _NUMBERS:
            self._refuse_tag(node, path)
        return node.value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        result: dict[str, object] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self._mistake(key_node, path, "a key must be plain text, not a list or a mapping")
            elif key_node.tag == _MERGE:
                merged.append(value_node)
            elif key in result:
                first = next(known for known, _ in node.value if known.value == key)
                self._mistake(key_node, path, f"key {key!r} is given twice, first on line {_line(first)}")
            else:
                result[key] = self.build(value_node, (*path, key))
        for value_node in merged:
            source = self.build(value_node, path)
            for part in source if isinstance(source, list) else [source]:
                if isinstance(part, dict):
                    result = part | result
                else:
                    self._mistake(value_node, path, "'<<' takes a mapping or a list of mappings")
        return result

    def _refuse_tag(self, node: yaml.Node, path: Path) -> None:
        tag = node.tag.replace(_PREFIX, "!!")
        self._mistake(node, path, f"the YAML tag {tag!r} means nothing here; leave it out")

    def _mistake(self, node: yaml.Node, path: Path, text: str) -> None:
        self.mistakes.append(Mistake(_line(node), path, text))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _step(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """From a collection to its member: the member's line and node, None if it has no such member."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return _line(item), item
    if not isinstance(node, yaml.MappingNode):
        return None
    for key_node, value_node in node.value:
        if key_node.value == step and key_node.tag != _MERGE:
            return _line(key_node), value_node
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                found = _step(source, step)
                if found is not None:
                    return found
    return None


def _explain(error: yaml.MarkedYAMLError) -> YamlError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "it cannot be read"
    if error.context == "expected a single document in the stream":
        problem = "a second document begins here ('---'); only one is read"
    elif error.problem and error.context:
        since = f" that begins on line {error.context_mark.line + 1}" if error.context_mark else ""
        problem = f"{problem} ({error.context}{since})"
    return YamlError(mark.line + 1 if mark else 1, problem)
