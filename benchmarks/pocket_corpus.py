"""The text that the pocket base is pretrained on: kinds of text, each from pinned packages.

    services   what botocore says of the operations of its services, in several layouts
    docstrings what Python packages say of their functions, in the same layouts
    examples   the same descriptions with made-up examples: values in a sentence, then as JSON
    prose      docstrings as they stand
    code       Python source
    requests   everyday requests of the practice set, each in two or three wordings

A document of the first two kinds shows a few functions of one place in one to three layouts, in
different orders: reading on means finding a name or a sentence again that stood further up.
An example, as reference pages have them, states values in English and repeats them as input.
The practice set gives requests only, no tool and no call, and only those of its training groups.
"""

from __future__ import annotations

import ast
import calendar
import gzip
import html
import json
import os
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARKERS = ("tool_call", "tool_response", "im_start", "bfcl", "function_call")
DOCUMENT = 9000  # characters; longer ones are cut
PACKAGES = {  # package: licence; each is a pinned dependency
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "statsmodels": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "matplotlib": "Matplotlib (PSF-style)",
    "transformers": "Apache-2.0",
    "datasets": "Apache-2.0",
}
DISTRIBUTION = {"sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Field:
    """A parameter of a function."""

    name: str
    kind: str
    about: str
    required: bool
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A function as its documentation describes it."""

    place: str
    name: str
    about: str
    fields: tuple[Field, ...]


def clean(text: str) -> str:
    """Turn a description's HTML into plain text on one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()


def sentence(text: str, most: int = 160) -> str:
    """Give the first sentence of a description, at most so many characters of it."""
    text = clean(text)
    found = re.match(r"(.{15,}?[.!?])(?= [A-Z`'\"(]|$)", text)
    first = found[1] if found else text
    return first if len(first) <= most else first[: first.rfind(" ", 0, most)].rstrip(" ,;:") + "."


def folder_of(package: str) -> Path:
    """Give the folder of an installed package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: run make setup first")
    return Path(spec.origin).parent


# Services ---------------------------------------------------------------------------------------

_TYPES = {
    **dict.fromkeys(("string", "timestamp", "blob"), "string"),
    **dict.fromkeys(("integer", "long"), "integer"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("map", "structure"), "object"),
    "boolean": "boolean",
    "list": "array",
}


def _operation_fields(
    operation: dict[str, Any], shapes: dict[str, Any], most: int = 6
) -> Iterator[Field]:
    shape = shapes.get(operation.get("input", {}).get("shape"), {})
    required = shape.get("required", [])
    members = sorted(shape.get("members", {}).items(), key=lambda m: m[0] not in required)
    for name, member in members[:most]:
        kind = shapes[member["shape"]]
        yield Field(
            name,
            _TYPES.get(kind["type"], "string"),
            sentence(member.get("documentation", "")),
            name in required,
            tuple(kind.get("enum", ())[:6]),
        )


def operations(root: Path) -> Iterator[Entry]:
    """Give the operations of botocore's newest service models."""
    for service in sorted(p for p in root.iterdir() if p.is_dir()):
        newest = sorted(p for p in service.iterdir() if p.is_dir())[-1]
        model = json.loads(gzip.decompress((newest / "service-2.json.gz").read_bytes()))
        for name, operation in model["operations"].items():
            if about := sentence(operation.get("documentation", ""), 240):
                fields = tuple(_operation_fields(operation, model["shapes"]))
                yield Entry(service.name, name, about, fields)


# Docstrings -------------------------------------------------------------------------------------

_NUMPY = re.compile(r"\n *Parameters\n *-{4,}\n(.*?)(?=\n *\n *\w[\w ]+\n *-{4,}|\Z)", re.S)
_NUMPY_FIELD = re.compile(r"^(\w[\w, *]*?) ?: ?(.+)$")
_GOOGLE = re.compile(
    r"\n\s*(?:Args|Parameters|Arguments):\n(.*?)(?=\n\s*(?:Returns?|Examples?|Raises|Yields):|\Z)",
    re.S,
)
_GOOGLE_FIELD = re.compile(
    r"^\s*(\w+) \(`?([^)]*?)`?(?:, \*optional\*[^)]*)?\):\s*\n(.*?)(?=\n\s*\w+ \(|\Z)", re.S | re.M
)


def _numpy_fields(doc: str) -> Iterator[Field]:
    found = _NUMPY.search("\n" + doc)
    lines = textwrap.dedent(found[1]).splitlines() if found else []
    for at, line in enumerate(lines):
        if line.startswith(" ") or not (head := _NUMPY_FIELD.match(line)):
            continue
        body = []
        for below in lines[at + 1 :]:
            if below and not below.startswith(" "):
                break
            body.append(below)
        kind = re.split(r"[,(]| or | of ", head[2])[0].strip(" `{'") or "object"
        must = "optional" not in head[2] and "default" not in head[2]
        name = head[1].split(",")[0].strip("* ")
        yield Field(name, kind[:24], sentence(" ".join(body)), must)


def _google_fields(doc: str) -> Iterator[Field]:
    found = _GOOGLE.search("\n" + doc)
    for head in _GOOGLE_FIELD.finditer(found[1]) if found else ():
        kind = re.split(r"[`,]", head[2].strip("`"))[0][:24]
        yield Field(head[1], kind, sentence(head[3]), "optional" not in head[0])


def _plain_fields(node: ast.FunctionDef) -> Iterator[Field]:
    a = node.args
    for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs):
        if arg.arg not in ("self", "cls"):
            yield Field(arg.arg, "", "", required=True)


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """Give path (within the package) and text of each Python file, its tests left out."""
    for path in sorted(root.rglob("*.py")):
        inside = str(path.relative_to(root))
        if "site-packages" in inside or "test" in inside or path.stat().st_size > 400_000:
            continue
        yield inside, path.read_text(encoding="utf-8", errors="ignore")


def documented(package: str, root: Path) -> Iterator[tuple[Entry, str]]:
    """Give the public functions of a package with their whole docstrings."""
    for inside, text in python_files(root):
        place = f"{package}.{inside[:-3].replace('/', '.')}".removesuffix(".__init__")
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError:
            print(f"  {package}/{inside}: not parsed")
            continue
        for node in nodes:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if len(doc := ast.get_docstring(node) or "") < 20:
                continue
            fields = (
                tuple(_numpy_fields(doc))
                or tuple(_google_fields(doc))
                or tuple(_plain_fields(node))
            )
            yield Entry(place, node.name, sentence(doc, 200), fields[:6]), doc


# Layouts ----------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
Naming = Callable[[str], str]


def _cased(name: str, style: str) -> str:
    words = [word.lower() for word in _WORD.findall(name)]
    if style == "as it is" or not words:
        return name
    if style == "snake":
        return "_".join(words)
    titled = "".join(word.title() for word in words)
    return titled if style == "title" else words[0] + titled[len(words[0]) :]


@dataclass(frozen=True)
class Layout:
    """How a document writes names, and the random numbers it draws."""

    rng: random.Random
    name: Naming
    field: Naming

    def listing(self, entry: Entry, keys: dict[str, str], nested: bool) -> dict[str, Any]:
        """Give an entry as a JSON object."""
        properties: dict[str, Any] = {}
        for f in entry.fields:
            parts: dict[str, Any] = {}
            if f.kind:
                parts["type"] = f.kind
            if f.about:
                parts[keys["about field"]] = f.about
            if f.options:
                parts["enum"] = list(f.options)
            ordered = parts.items() if self.rng.random() < 0.5 else reversed(parts.items())
            properties[self.field(f.name)] = dict(ordered)
        required = [self.field(f.name) for f in entry.fields if f.required]
        word = self.rng.choice(["object", "dict"])
        inner = {"type": word, "properties": properties, "required": required}
        return {
            keys["name"]: self.name(entry.name),
            keys["about"]: entry.about,
            keys["fields"]: inner if nested else properties,
        }

    def as_json(self, entries: Sequence[Entry]) -> str:
        """Write JSON: a line each, or one list."""
        rng = self.rng
        keys = {
            "name": rng.choice(["name", "name", "name", "operation", "function"]),
            "about": rng.choice(["description", "description", "documentation", "summary"]),
            "fields": rng.choice(["parameters", "parameters", "input", "arguments"]),
            "about field": rng.choice(["description", "description", "doc"]),
        }
        nested, how = rng.random() < 0.6, rng.random()
        objects = [self.listing(entry, keys, nested) for entry in entries]
        if how < 0.5:
            return "\n".join(json.dumps(o) for o in objects)
        return json.dumps(objects, indent=None if how < 0.85 else 2)

    def as_reference(self, entries: Sequence[Entry]) -> str:
        """Write a page of a reference."""
        head = self.rng.choice(["## {}\n", "{}\n", "**{}**: ", "{} - "])
        pages = []
        for entry in entries:
            lines = [head.format(self.name(entry.name)) + entry.about]
            for f in entry.fields:
                kind = ", ".join(filter(None, (f.kind, "required" if f.required else "optional")))
                options = f" One of: {', '.join(f.options)}." if f.options else ""
                line = f"- {self.field(f.name)} ({kind}): {f.about}{options}"
                lines.append(line.rstrip(": "))
            pages.append("\n".join(lines))
        return "\n\n".join(pages)

    def as_signature(self, entries: Sequence[Entry]) -> str:
        """Write Python signatures with a docstring."""
        texts = []
        for entry in entries:
            ordered = sorted(entry.fields, key=lambda f: not f.required)
            names = [self.field(f.name) + ("" if f.required else "=None") for f in ordered]
            head = f"def {self.name(entry.name)}({', '.join(names)}):"
            texts.append(f'{head}\n    """{entry.about}"""')
        return "\n\n".join(texts)

    def as_index(self, entries: Sequence[Entry]) -> str:
        """Write an index: from what a function does to its name, or from its name to its fields."""
        between = self.rng.choice([" -> ", ": ", " - ", " | "])
        if self.rng.random() < 0.7:
            return "\n".join(f"{e.about}{between}{self.name(e.name)}" for e in entries)
        rows = ((self.name(e.name), [self.field(f.name) for f in e.fields]) for e in entries)
        return "\n".join(f"{name}{between}{', '.join(fields)}" for name, fields in rows)

    def as_fields(self, entries: Sequence[Entry]) -> str:
        """Write an index of fields, from what they mean to their names."""
        rows = [
            f"{f.about} {self.name(entry.name)}, {self.field(f.name)}"
            for entry in entries
            for f in entry.fields
            if f.about
        ]
        self.rng.shuffle(rows)
        return "\n".join(rows[:8])


def _document(place: str, group: list[Entry], rng: random.Random) -> str:
    style = rng.choice(["as it is", "as it is", "snake", "snake", "camel", "title"])
    prefix = rng.choice(["", "", place.split(".")[-1] + "."])
    field_style = rng.choice(["as it is", "snake", "camel"])
    layout = Layout(rng, lambda s: prefix + _cased(s, style), lambda s: _cased(s, field_style))
    others = [layout.as_reference, layout.as_signature, layout.as_index, layout.as_fields]
    views = rng.sample([layout.as_json, *others], rng.choice([1, 2, 2, 2, 3]))
    if layout.as_json not in views and rng.random() < 0.6:
        views[0] = layout.as_json
    parts = [rng.choice([place, f"# {place}", ""])]
    for view in views:
        parts.append(view(rng.sample(group, len(group))))
    return "\n\n".join(filter(None, parts))


def described(entries: Sequence[Entry], seed: int) -> Iterator[str]:
    """Write documents of one to five entries of a place; another seed writes them differently."""
    rng = random.Random(f"described {seed}")
    places: dict[str, list[Entry]] = {}
    for entry in entries:
        places.setdefault(entry.place, []).append(entry)
    for place in sorted(places):
        mixed = rng.sample(places[place], len(places[place]))
        while mixed:
            many = rng.choice([1, 1, 2, 2, 3, 3, 4, 5])
            group, mixed = mixed[:many], mixed[many:]
            yield _document(place, group, rng)


# Examples ---------------------------------------------------------------------------------------

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
SAID = (
    *("the {field} is {value}", "{field} {value}", "{field}: {value}", "with {field} {value}"),
    *("{value} as the {field}", "{value} for the {field}", "set the {field} to {value}"),
    *("use {value} as {field}", "{field} = {value}", "whose {field} is {value}"),
)
BARE = ("{value}", "for {value}", "of {value}", "in {value}", "with {value}", "to {value}")
Told = tuple[str, Any]  # how English says a value, and the value


def spoken(name: str) -> str:
    """Turn a field's name into words."""
    return " ".join(word.lower() for word in _WORD.findall(name)) or name


def _listed(said: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))


def a_time(rng: random.Random) -> Told:
    """Draw a time of day, on either clock."""
    hour, minute = rng.randint(1, 23), rng.choice([0, 15, 30, 45, rng.randint(1, 59)])
    twelve = (hour - 1) % 12 + 1
    half = "am" if hour < 12 else "pm"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    if minute in (0, 15, 30) and rng.random() < 0.5:
        lead = {0: "", 15: "a quarter past ", 30: "half past "}[minute]
        return f"{lead}{NUMBERS[twelve]} {part}", f"{hour:02}:{minute:02}"
    said = rng.choice([f"{twelve}:{minute:02} {half}", f"{hour:02}:{minute:02}"])
    return said, f"{hour:02}:{minute:02}"


def a_share(rng: random.Random) -> Told:
    """Draw a share; it is said in percent."""
    percent = rng.randint(1, 99)
    return f"{percent}{rng.choice(['%', ' %', ' percent'])}", percent / 100


def a_distance(rng: random.Random) -> Told:
    """Draw a distance in metres; it is said in kilometres."""
    tenths = rng.randint(1, 400)
    said = str(tenths // 10) if tenths % 10 == 0 else str(tenths / 10)
    return f"{said} {rng.choice(['km', 'kilometres'])}", tenths * 100


def a_span(rng: random.Random) -> Told:
    """Draw a span in minutes; it is said in hours or minutes."""
    hours = rng.randint(2, 12)
    return rng.choice(
        [
            (f"{NUMBERS[hours]} hours", hours * 60),
            (f"{hours} hours", hours * 60),
            ("an hour", 60),
            ("half an hour", 30),
            ("an hour and a half", 90),
            (f"{hours * 5} minutes", hours * 5),
        ]
    )


def a_price(rng: random.Random) -> Told:
    """Draw an amount of money in dollars."""
    cents = rng.randint(100, 30000)
    dollars, rest = divmod(cents, 100)
    forms = [f"${dollars}.{rest:02}", f"{dollars} dollars and {rest} cents"]
    return (rng.choice(forms), cents / 100) if rest else (f"{dollars} dollars", float(dollars))


# Fields that people speak of in another way than a program wants them.
CONVERTED: dict[Field, Callable[[random.Random], Told]] = {
    Field("start_time", "string", "Time of day, HH:MM on the 24-hour clock.", True): a_time,
    Field("closing_time", "string", "When it ends, as HH:MM.", True): a_time,
    Field("share", "number", "Share of the whole, between 0 and 1.", True): a_share,
    Field("discount", "number", "Discount as a fraction.", True): a_share,
    Field("distance", "integer", "Distance in metres.", True): a_distance,
    Field("duration", "integer", "Duration in minutes.", True): a_span,
    Field("amount", "number", "Amount in dollars.", True): a_price,
}


@dataclass(frozen=True)
class Examples:
    """Draws values and says them."""

    rng: random.Random
    words: Sequence[str]  # of everyday texts
    names: Sequence[str]  # capitalised words of such texts

    def number(self) -> Told:
        """Draw a whole number; small ones may be spelled out."""
        value = self.rng.choice([self.rng.randint(0, 20), self.rng.randint(2, 999)])
        value = self.rng.randint(1000, 99999) if self.rng.random() < 0.1 else value
        if value <= 20 and self.rng.random() < 0.4:
            return NUMBERS[value], value
        return (f"{value:,}" if self.rng.random() < 0.2 else str(value)), value

    def date(self) -> Told:
        """Draw a date; it is written as ISO 8601 asks."""
        day = self.rng.randint(1, 28), self.rng.randint(1, 12), self.rng.randint(1990, 2035)
        month = calendar.month_name[day[1]]
        said = self.rng.choice([f"{day[0]} {month} {day[2]}", f"{month} {day[0]}, {day[2]}"])
        return said, f"{day[2]}-{day[1]:02}-{day[0]:02}"

    def text(self) -> Told:
        """Draw a word, a few words, a name, a code or a date."""
        kind = self.rng.random()
        if kind < 0.1:
            return self.date()
        if kind < 0.2:
            value = self.rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") + str(self.rng.randint(1, 9999))
        elif kind < 0.55:
            value = " ".join(self.rng.sample(self.names, self.rng.choice([1, 1, 2])))
        else:
            value = " ".join(self.rng.sample(self.words, self.rng.choice([1, 1, 1, 2, 3])))
        return self.rng.choice(["{}", "{}", "{}", "'{}'", '"{}"']).format(value), value

    def several(self) -> Told:
        """Draw a list of texts or of numbers."""
        one = self.rng.choice([self.text, self.number])
        found = [one() for _ in range(self.rng.choice([1, 2, 2, 3, 3, 4]))]
        return _listed([how for how, _ in found]), [value for _, value in found]

    def value(self, field: Field) -> Told:
        """Draw a value of a field's type."""
        if field in CONVERTED:
            return CONVERTED[field](self.rng)
        if field.options:
            value = self.rng.choice(field.options)
            return self.rng.choice([value, spoken(value)]), value
        if field.kind in ("integer", "int"):
            return self.number()
        if field.kind in ("number", "float"):
            share = round(self.rng.uniform(0, 200), self.rng.choice([1, 1, 2]))
            return str(share), share
        if field.kind in ("boolean", "bool"):
            yes = self.rng.random() < 0.6
            return self.rng.choice([("yes", "no"), ("true", "false"), ("on", "off")])[not yes], yes
        return self.several() if field.kind in ("array", "list") else self.text()

    def _said(self, field: Field, value: str, *, alone: bool) -> str:
        words = spoken(field.name)
        if alone and self.rng.random() < 0.4:
            last = words.rpartition(" ")[2]
            number = field.kind in ("integer", "int") and field not in CONVERTED
            return f"{value} {last}" if number else self.rng.choice(BARE).format(value=value)
        return self.rng.choice(SAID).format(field=words, value=value)

    def example(self, entry: Entry, name: Naming) -> tuple[str, dict[str, Any]]:
        """Say values for some fields of an entry in a sentence, and give them.

        A value may be said without its field where no other field of the entry has its type.
        """
        plain = [f for f in entry.fields if f.kind not in ("object", "dict")]
        drawn = [f for f in plain if f.required or self.rng.random() < 0.35]
        drawn = drawn[:4] or plain[:1]
        told = {f: self.value(f) for f in drawn}
        kinds = [(f.kind, f.options, CONVERTED.get(f)) for f in drawn]
        single = {f: kinds.count(kind) == 1 for f, kind in zip(drawn, kinds, strict=True)}
        parts = [
            self._said(f, told[f][0], alone=single[f]) for f in self.rng.sample(drawn, len(drawn))
        ]
        between = self.rng.choice([", ", ", ", "; ", " ", " and "])
        said = between.join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1]
        return said, {name(f.name): told[f][1] for f in drawn}


def _aim(about: str, rng: random.Random) -> str:
    """Say what a function does: its description, an infinitive, or a few words of it."""
    about = about.rstrip(".")
    first, _, rest = about.partition(" ")
    if first.endswith("s") and not first.endswith("ss") and rest and rng.random() < 0.4:
        return f"to {first[:-1].lower()} {rest}"
    words = re.findall(r"[^\W\d_]{4,}", about)
    if len(words) < 4 or rng.random() < 0.4:
        return about
    kept = sorted(rng.sample(range(len(words)), rng.choice([2, 3])))
    return " ".join(words[at].lower() for at in kept)


def _headed(entry: Entry, said: str, rng: random.Random) -> str:
    forms = [
        "{aim}: {said}.",
        "{said}. {aim}.",
        "{aim}, {said}.",
        "{aim} {said}.",
        "{said}, {aim}.",
    ]
    text = rng.choice(forms).format(aim=_aim(entry.about, rng), said=said)
    return text[:1].upper() + text[1:]


def _with_converted(entry: Entry, rng: random.Random) -> Entry:
    if rng.random() < 0.65:
        return entry
    extra = rng.choice(list(CONVERTED))
    others = tuple(f for f in entry.fields if f.name.lower() != extra.name)
    at = rng.randint(0, len(others))
    return replace(entry, fields=(*others[:at], extra, *others[at:]))


FEW, MANY = (2, 3, 4, 5), (6, 8, 10, 12)  # examples on a page


def _examples_page(place: str, group: list[Entry], drawing: Examples, counts: Sequence[int]) -> str:
    rng = drawing.rng
    style, field_style = (rng.choice(["as it is", "snake", "snake", "camel"]) for _ in range(2))
    prefix = rng.choice(["", "", place.split(".")[-1] + "."])
    layout = Layout(rng, lambda s: prefix + _cased(s, style), lambda s: _cased(s, field_style))
    group = [_with_converted(entry, rng) for entry in group]
    listing = rng.choice([layout.as_json, layout.as_json, layout.as_json, layout.as_reference])
    parts = [listing(rng.sample(group, len(group)))]
    for entry in rng.choices(group, k=rng.choice(counts)):
        made = [drawing.example(entry, layout.field) for _ in range(rng.choice([1, 1, 1, 1, 2, 3]))]
        said = rng.choice(["; ", " and ", ", then "]).join(said for said, _ in made)
        if len(group) > 1 or rng.random() < 0.5:
            said = _headed(entry, said, rng)
        written = [
            f"{layout.name(entry.name)}\n{json.dumps(v, ensure_ascii=False)}" for _, v in made
        ]
        parts.append("\n".join([said, *written]))
    return "\n\n".join(parts)


def exemplified(
    entries: Sequence[Entry],
    texts: Sequence[str],
    seed: int,
    counts: Sequence[int] = FEW,
) -> Iterator[str]:
    """Write pages of a few entries of a place, with examples; words come from the texts."""
    rng = random.Random(f"exemplified {seed}")
    found = re.findall(r"[^\W\d_]{3,}", " ".join(texts))
    names = sorted({word for word in found if word.istitle()})
    words = sorted({word for word in found if word.islower()})
    drawing = Examples(rng, words, names)
    places: dict[str, list[Entry]] = {}
    for entry in entries:
        if any(f.kind not in ("object", "dict", "") for f in entry.fields):
            places.setdefault(entry.place, []).append(entry)
    for place in sorted(places):
        mixed = rng.sample(places[place], len(places[place]))
        while mixed:
            many = rng.choice([1, 1, 2, 2, 3, 4])
            group, mixed = mixed[:many], mixed[many:]
            yield _examples_page(place, group, drawing, counts)


# Requests ---------------------------------------------------------------------------------------


def training_groups() -> list[str]:
    """Give the practice groups that the pocket profile trains on: the base reads no others."""
    from toolpost.core.split import Splitter, group_identity
    from toolpost.data.table import table
    from toolpost.profile import Data, load_profile

    settings = load_profile("pocket", "runs/none")["20_data"]
    assert isinstance(settings, Data)  # for the type checker
    splitter = Splitter(settings.seed, (settings.dev, settings.test))
    return [name for name in table().groups if splitter.place([group_identity(name)]) == "train"]


def request_groups(count: int, seed: int) -> list[Any]:
    """Give requests of the training groups, each in its wordings."""
    from toolpost.data.pocketset import requests

    return list(requests(count, seed, training_groups()))


def request_documents(count: int, seed: int) -> Iterator[str]:
    """Write lists of requests in which every request comes back in other words."""
    rng = random.Random(f"requests {seed}")
    told = request_groups(count, seed)
    at = 0
    while at < len(told):
        many = rng.choice([1, 2, 3, 4, 6])
        group, at = told[at : at + many], at + many
        rounds = max(map(len, group))
        lines = []
        for turn in range(rounds):
            order = rng.sample(group, len(group))
            lines += [texts[turn] for texts in order if turn < len(texts)]
        mark = rng.choice(["", "", "- ", "> "])
        yield "\n".join(mark + line for line in lines)


# All of it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    name: str
    version: str
    licence: str


def documents() -> Iterator[tuple[str, Source, str]]:
    """Give kind, source and text of every document but the requests."""
    botocore = Source("botocore", version("botocore"), "Apache-2.0")
    entries = list(operations(folder_of("botocore") / "data"))
    for seed in range(3):
        yield from (("services", botocore, text) for text in described(entries, seed))
    everyday = [text for told in request_groups(2000, 1) for text in told]
    for seed in range(4):
        told = exemplified(entries, everyday, seed)
        yield from (("examples", botocore, text) for text in told)
        told = exemplified(entries, everyday, 10 + seed, MANY)
        yield from (("drills", botocore, text) for text in told)
    standard = Source("python-stdlib", sys.version.split()[0], "PSF-2.0")
    roots = [(standard, "python", Path(os.__file__).parent)]
    for package, licence in PACKAGES.items():
        release = version(DISTRIBUTION.get(package, package))
        roots.append((Source(package, release, licence), package, folder_of(package)))
    for source, package, root in roots:
        found = list(documented(package, root))
        for seed in range(3):
            told = described([entry for entry, _ in found], seed)
            yield from (("docstrings", source, text) for text in told)
            told = exemplified([entry for entry, _ in found], everyday, seed)
            yield from (("examples", source, text) for text in told)
            told = exemplified([entry for entry, _ in found], everyday, 10 + seed, MANY)
            yield from (("drills", source, text) for text in told)
        for entry, doc in found:
            yield "prose", source, f"{entry.place}.{entry.name}\n{doc}"
        if package not in ("transformers", "pandas", "statsmodels", "matplotlib"):
            yield from (("code", source, text) for _, text in python_files(root))


def fit(text: str) -> bool:
    """Tell whether a document may be read: long enough, and nothing of a chat protocol in it."""
    lowered = text.lower()
    return len(text) > 60 and not any(marker in lowered for marker in MARKERS)
