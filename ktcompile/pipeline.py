"""Passes, the pipeline that runs them, and the rules file that says which."""

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml
from torch import fx

from ktcompile.errors import PassError, RulesError
from ktcompile.graph import Region, propagate
from ktcompile.symbols import Sizes
from ktcompile.target import Target
from ktcompile.verify import check
from ktcompile.weights import WeightSource


class OptionError(RulesError):
    """A pass refuses one of its options; `key` (`rules.*.experts`) finds the line where the user wrote it."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


@dataclass(frozen=True)
class Note:
    """Why something was not done: the pass, the region's path, the reason."""

    by: str
    path: str
    why: str


@dataclass
class Context:
    """What every pass may read, and where it says why not. `sizes`: those of the step that is planned."""

    target: Target
    weights: WeightSource | None = None
    sizes: Sizes = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    losses: dict[str, None] = field(default_factory=dict)
    running: str = ""

    def lossy(self, what: str) -> None:
        """Say that results will differ from the model's own; printed at the top of the page."""
        self.losses[what] = None

    def skip(self, region: Region | str, why: str) -> None:
        """Say why a candidate was left as it is; printed under the page."""
        self.notes.append(Note(self.running, region if isinstance(region, str) else region.path, why))


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite of the graph. Its fields are its options."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    establishes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
        """The rewritten graph. Regions it could have changed and did not are told to `ctx.skip`."""


Observe = Callable[[Pass, fx.GraphModule, Sequence[Note]], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run. What is not listed does not run. `places`: where the user wrote each option."""

    passes: tuple[Pass, ...]
    places: Mapping[tuple[str, str], str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = [p.name for p in self.passes]
        if twice := {n for n in names if names.count(n) > 1}:
            raise RulesError(f"pass {sorted(twice)[0]!r} is listed twice")

    def where(self, name: str, key: str = "") -> str | None:
        """`file:line` of an option (`rules.*.mlp.experts`) or of the pass; None where nobody wrote it."""
        return self.places.get((name, key)) or self.places.get((name, ""))

    def _refused(self, p: Pass, key: str, why: str) -> RulesError:
        where = self.where(p.name, key)
        return RulesError(f"{f'{where}: ' if where else ''}{p.name}{why}")

    def get(self, name: str) -> Pass | None:
        return next((p for p in self.passes if p.name == name), None)

    def with_pass(self, new: Pass) -> "Pipeline":
        """The pipeline with `new` in place of the pass of its name; if there is none, after what it requires."""
        if self.get(new.name):
            return replace(self, passes=tuple(new if p.name == new.name else p for p in self.passes))
        at = max((i + 1 for i, p in enumerate(self.passes) if set(p.establishes) & set(new.requires)), default=0)
        return replace(self, passes=(*self.passes[:at], new, *self.passes[at:]))

    def until(self, name: str) -> "Pipeline":
        """The pipeline up to and with pass `name`."""
        names = [p.name for p in self.passes]
        if name not in names:
            raise RulesError(f"no pass {name!r} in this pipeline; it has {', '.join(names)}")
        return replace(self, passes=self.passes[: names.index(name) + 1])

    def run(self, gm: fx.GraphModule, ctx: Context, observe: Observe | None = None) -> fx.GraphModule:
        """Run every pass; after each one the graph is linted, typed, and every invariant so far is checked."""
        holds: list[str] = []
        for p in self.passes:
            if missing := [r for r in p.requires if r not in holds]:
                raise self._refused(p, "", f" requires {', '.join(missing)}, which no earlier pass establishes")
            ctx.running, told, before = p.name, len(ctx.notes), _signature(gm)
            try:
                gm = p.run(gm, ctx)
            except RulesError as error:
                key = error.key if isinstance(error, OptionError) else ""
                raise self._refused(p, key, f": {error}") from error
            except Exception as error:
                error.add_note(f"in pass {p.name}, {self.where(p.name) or 'of the default pipeline'}")
                raise
            gm.graph.lint()
            gm.recompile()
            if "folded" in (*holds, *p.establishes):
                propagate(gm)
            holds += [e for e in p.establishes if e not in holds]
            for name in ("typed", *holds):
                try:
                    check(name, gm, ctx.target, ctx.sizes)
                except PassError as error:
                    error.args = (f"after {p.name}: {error}",)
                    raise
            if _signature(gm) == before and len(ctx.notes) == told:
                ctx.skip("", f"{p.name} changed nothing and gave no reason")
            if observe:
                observe(p, gm, ctx.notes[told:])
        return gm

    def dump(self) -> str:
        """The rules file that loads as this pipeline."""
        entries: list[Any] = []
        for p in self.passes:
            options = {f.name: _plain(getattr(p, f.name)) for f in fields(p) if getattr(p, f.name) != default_of(f)}
            entries.append({p.name: options} if options else p.name)
        return yaml.safe_dump({"pipeline": entries}, sort_keys=False)


def _signature(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    keys = ("path", "op", "device", "home", "kernel")
    return [(n.op, str(n.target), str(n.args), *(str(n.meta.get(k)) for k in keys)) for n in gm.graph.nodes]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def default_of(f: "Field[Any]") -> Any:
    """The default value of a dataclass field, or `dataclasses.MISSING`."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def available() -> dict[str, type[Pass]]:
    """Every registered pass by name, ours and plugins'."""
    found: dict[str, type[Pass]] = {}
    for point in entry_points(group="ktcompile.passes"):
        try:
            found[point.name] = point.load()
        except Exception as error:
            raise PassError(f"pass {point.name!r} ({point.value}) cannot be loaded: {error}") from error
    return found


# ------------------------------------------------------------------------------------------------ rules files


MAX_BYTES = 64 << 10
"""Of a rules file; the longest of ours has under 1 KB, a rule for every module of 61 layers 40 KB."""

MAX_WORD = 1_000
"""Characters of one key or value."""

MAX_DEPTH = 16
"""Lists and mappings inside each other; a rule of `place` is at 5. PyYAML takes seconds for thousands."""


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where one of `known` is close, else a list of them."""
    known = list(known)
    close = get_close_matches(name, known, 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"


def load_rules(rules: str | Path) -> Pipeline:
    """The pipeline of a rules file: a path, or the name of one that ships with ktcompile (`base`, `deepseek-v3`).

    Raises RulesError with file:line for anything that is not exactly right.
    """
    return parse_rules(*_read(rules, None))


def shipped() -> list[str]:
    """Names of the rules files that ship with ktcompile."""
    return sorted(f.name.removesuffix(".yaml") for f in files("ktcompile.rules").iterdir() if f.name.endswith(".yaml"))


def _read(rules: str | Path, asked: str | None) -> tuple[str, str]:
    prefix = f"{asked}: " if asked else ""
    if not isinstance(rules, (str, Path)):
        raise RulesError(
            f"{prefix}rules {rules!r}: a file's path, or the name of rules that ship: {', '.join(shipped())}"
        )
    path = Path(rules)
    if isinstance(rules, str) and "/" not in rules and not rules.endswith((".yaml", ".yml")):
        if rules not in shipped():
            raise RulesError(
                f"{prefix}no rules {rules!r}; {near(rules, shipped())} (a file is named by its path: ./{rules}.yaml)"
            )
        return (files("ktcompile.rules") / f"{rules}.yaml").read_text(encoding="utf-8"), f"{rules}.yaml"
    try:
        with path.open("rb") as opened:  # whatever it is (`extends: /dev/zero`), no more than this is read
            return opened.read(MAX_BYTES + 1).decode("utf-8"), str(path)
    except (OSError, ValueError) as error:
        raise RulesError(f"{prefix}cannot read rules {str(rules)!r}: {error}") from error


def parse_rules(text: str, file: str, depth: int = 0) -> Pipeline:
    """The pipeline that the text of a rules file describes; `file` names it in errors."""
    if depth > 8:
        raise RulesError(f"{file}: `extends` goes round in a circle or is deeper than 8 files")
    if len(text) > MAX_BYTES:
        raise RulesError(f"{file}: longer than the {MAX_BYTES} bytes that a rules file may have")
    try:
        nested = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # a few aliases of aliases are gigabytes
            where = f"{file}:{event.start_mark.line + 1}" if event.start_mark else file
            if isinstance(event, yaml.AliasEvent):
                raise RulesError(f"{where}: *{event.anchor}: a rules file has no aliases")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_WORD:
                raise RulesError(f"{where}: a word of {len(event.value)} characters; {MAX_WORD} are allowed")
            nested += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if nested > MAX_DEPTH:
                raise RulesError(f"{where}: lists and mappings more than {MAX_DEPTH} deep")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RulesError(f"{file}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    top = _mapping(root, file, "a rules file", ("extends", "pipeline"))
    passes: list[Pass] = []
    places: dict[tuple[str, str], str] = {}
    if "pipeline" in top:
        listing = top["pipeline"]
        if not isinstance(listing, yaml.SequenceNode):
            raise RulesError(f"{_at(listing, file)}: pipeline must be a list of passes")
        for node in listing.value:
            made = _pass(node, file, places)
            if any(p.name == made.name for p in passes):
                raise RulesError(f"{_at(node, file)}: pass {made.name!r} is listed twice")
            passes.append(made)
    if "extends" not in top:
        return Pipeline(tuple(passes), places)
    where = _at(top["extends"], file)
    parent = top["extends"].value
    if not isinstance(parent, str):
        raise RulesError(f"{where}: extends must be one name or path")
    base_name = parent if "/" not in parent else str(Path(file).parent / parent)
    base = parse_rules(*_read(base_name, where), depth + 1)
    merged = list(base.passes)
    last: str | None = None
    for new in passes:
        names = [p.name for p in merged]
        if new.name in names:
            merged[names.index(new.name)] = new
        elif last is not None:
            merged.insert(names.index(last) + 1, new)
        else:
            merged = list(Pipeline(tuple(merged)).with_pass(new).passes)
        last = new.name
    return Pipeline(tuple(merged), {**base.places, **places})


def _at(node: yaml.Node, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _mapping(node: yaml.Node | None, file: str, what: str, allowed: Sequence[str] | None) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise RulesError(
            f"{_at(node, file) if node else file}: {what} must be a mapping, with {' and '.join(allowed)}"
            if allowed
            else f"{_at(node, file) if node else file}: {what} must be a mapping"
        )
    out: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name is None:
            raise RulesError(f"{_at(key, file)}: {what}: keys are plain words")
        if name in out:
            raise RulesError(f"{_at(key, file)}: {what} has {name!r} twice")
        if allowed is not None and name not in allowed:
            raise RulesError(f"{_at(key, file)}: {what} has no {name!r}; {near(name, allowed)}")
        out[name] = value
    return out


def _pass(node: yaml.Node, file: str, places: dict[tuple[str, str], str]) -> Pass:
    where = _at(node, file)
    options: dict[str, yaml.Node] = {}
    if isinstance(node, yaml.ScalarNode):
        name = node.value
    else:
        entry = _mapping(node, file, "a pass", None)
        if len(entry) != 1:
            names = ", ".join(entry)[:200]
            raise RulesError(f"{where}: one pass an entry, such as `- place: {{rules: ...}}`; got {names}")
        ((name, body),) = entry.items()
        known = available()
        if name in known:
            allowed = [f.name.replace("_", "-") for f in fields(known[name])]
            empty = isinstance(body, yaml.ScalarNode) and body.value in ("", "null", "~")
            options = {} if empty else _mapping(body, file, name, allowed)
    known = available()
    if name not in known:
        raise RulesError(f"{where}: no pass {name!r}; {near(name, known)}")
    cls = known[name]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    places[name, ""] = where
    for key, value in options.items():
        places[name, key] = _at(value, file)
        if isinstance(value, yaml.MappingNode):
            places.update(
                {(name, f"{key}.{k}"): _at(v, file) for k, v in _mapping(value, file, f"{name}.{key}", None).items()}
            )
        values[key.replace("-", "_")] = _value(value, file, f"{name}.{key}", hints[key.replace("-", "_")])
    return make_pass(cls, values, where)


def make_pass(cls: type[Pass], values: Mapping[str, Any], where: str) -> Pass:
    """A pass from its options. Raises RulesError where it refuses them."""
    missing = [f.name for f in fields(cls) if f.name not in values and default_of(f) is MISSING]
    if missing:
        raise RulesError(f"{where}: {cls.name} needs {', '.join(missing)}")
    hints = get_type_hints(cls)
    for key, value in values.items():
        try:
            _typed(value, hints[key])
        except TypeError as error:
            raise RulesError(f"{where}: {cls.name}.{key} must be {error}, not {_shown(value)}") from error
    try:
        return cls(**values)
    except RulesError as error:
        raise RulesError(f"{where}: {error}") from error


def _value(node: yaml.Node, file: str, what: str, hint: Any) -> Any:
    """The YAML value as the type of the option, or a RulesError that says what was wanted."""
    try:
        value = yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise RulesError(f"{_at(node, file)}: {what}: {getattr(error, 'problem', None) or error}") from error
    try:
        return _typed(value, hint)
    except TypeError as error:
        raise RulesError(f"{_at(node, file)}: {what} must be {error}, not {_shown(value)}") from error


def _shown(value: Any) -> str:
    """A value in an error message, cut to one line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _typed(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _typed(value, option)
            except TypeError:
                continue
        raise TypeError(" or ".join(_words(a) for a in args))
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(v, args[0]) for v in value)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {_typed(k, args[0]): _typed(v, args[1]) for k, v in value.items()}
    if origin is not None and origin.__name__ == "Literal" and value in args:
        return value
    if hint is type(None) and value is None:
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError(_words(hint))


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is not None and origin.__name__ == "Literal":
        return " or ".join(map(str, args))
    named = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if origin is tuple:
        return f"a list of {_words(args[0])}"
    if origin in (dict, Mapping):
        return f"a mapping of {_words(args[0])} to {_words(args[1])}"
    return named.get(hint, str(hint))
