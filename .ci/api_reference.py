"""Writes docs/api/*.md, the reference of methods, messages and fields, from proto/entitlement/v1 and its comments, or
with --check says whether it is fresh.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES, PAGES = ROOT / "proto", ROOT / "docs" / "api"
TITLES = {
    "gateway": "API: the data plane",
    "ledger": "API: the control plane",
    "events": "API: published events",
}  # by the name of the .proto, and in this order in the index
GENERATED = "<!-- Written by .ci/api_reference.py from proto/: change the comments there, then `make proto`. -->"
ABOUT = """\
Every method, message and field, with its number on the wire. How they are used is told in [calling](../calling.md),
[holds](../holds.md) and [the ledger](../ledger.md); statuses and bounds in
[errors and limits](../errors-and-limits.md). Fields may be added; numbers and meanings never change."""

Route: TypeAlias = tuple[int, ...]  # of a declaration in its file, as protobuf's SourceCodeInfo counts
MESSAGES, ENUMS, SERVICES, SYNTAX = 4, 5, 6, 12  # fields of FileDescriptorProto
FIELDS, NESTED_ENUMS, VALUES, METHODS = 2, 4, 2, 2  # of DescriptorProto, EnumDescriptorProto, ServiceDescriptorProto
REPEATED = FieldDescriptorProto.LABEL_REPEATED


def described(sources: Path) -> list[FileDescriptorProto]:
    """What protoc reads of each of our files, with comments; exits with its status when it fails."""
    protos = sorted((sources / "entitlement" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        options = [f"--proto_path={sources}", f"--proto_path={well_known}", "--include_source_info"]
        status = protoc.main(["protoc", *options, f"--descriptor_set_out={target}", *map(str, protos)])
        if status != 0:
            sys.exit(status)
        found = FileDescriptorSet.FromString(target.read_bytes())
    order = list(TITLES)
    return sorted(found.file, key=lambda file: order.index(_stem(file)))


def pages(sources: Path) -> dict[str, str]:
    """Each page by its name. A type is linked to where it stands, on another page too."""
    files = described(sources)
    places = {name: f"{_stem(file)}.md#{_anchor(name)}" for file in files for name in _names(file)}
    found = {f"{_stem(file)}.md": _Page(file, places).text() for file in files}
    return {"README.md": _index(files), **found}


class _Page:
    def __init__(self, file: FileDescriptorProto, places: dict[str, str]) -> None:
        self._file = file
        self._places = places
        self._locations = {tuple(location.path): location for location in file.source_code_info.location}

    def text(self) -> str:
        stem = _stem(self._file)
        source = f"Source: [`{self._file.name}`](../../proto/{self._file.name}). [All pages of the API](README.md)."
        parts = [GENERATED, f"# {TITLES[stem]}", self._comment((SYNTAX,)), source, *self._parts()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _parts(self) -> Iterator[str]:
        for at, service in enumerate(self._file.service):
            yield from self._service((SERVICES, at), service)
        for at, message in enumerate(self._file.message_type):
            yield from self._message((MESSAGES, at), message)
        for at, enum in enumerate(self._file.enum_type):
            yield from self._enum((ENUMS, at), enum, enum.name)

    def _service(self, route: Route, service: ServiceDescriptorProto) -> Iterator[str]:
        yield f"## {service.name}"
        yield f"`{self._file.package}.{service.name}`"
        yield self._comment(route)
        rows = []
        for at, method in enumerate(service.method):
            asked = ("stream of " if method.client_streaming else "") + self._link(method.input_type)
            answered = ("stream of " if method.server_streaming else "") + self._link(method.output_type)
            rows.append((f"`{method.name}`", asked, answered, _cell(self._comment((*route, METHODS, at)))))
        yield _table(("method", "request", "answer", ""), rows)

    def _message(self, route: Route, message: DescriptorProto) -> Iterator[str]:
        yield f"## {message.name}"
        yield self._comment(route)
        if not message.field:
            yield "No fields."
        else:
            maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
            rows = [
                (f"{field.number}", f"`{field.name}`", self._type(field, maps), self._about(route, at, field, message))
                for at, field in enumerate(message.field)
            ]
            yield _table(("no.", "field", "type", ""), rows)
        for at, enum in enumerate(message.enum_type):
            yield from self._enum((*route, NESTED_ENUMS, at), enum, f"{message.name}.{enum.name}")

    def _enum(self, route: Route, enum: EnumDescriptorProto, name: str) -> Iterator[str]:
        yield f"## {name}"
        yield self._comment(route)
        rows = [
            (f"{value.number}", f"`{value.name}`", _cell(self._comment((*route, VALUES, at))))
            for at, value in enumerate(enum.value)
        ]
        yield _table(("no.", "name", ""), rows)

    def _about(self, route: Route, at: int, field: FieldDescriptorProto, message: DescriptorProto) -> str:
        """A field's comment, and what `oneof` or `optional` says of it."""
        said = _cell(self._comment((*route, FIELDS, at)))
        if field.proto3_optional:
            return said
        group = f"one of `{message.oneof_decl[field.oneof_index].name}`" if field.HasField("oneof_index") else ""
        return ": ".join(part for part in (group, said) if part)

    def _type(self, field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
        entry = maps.get(field.type_name.rpartition(".")[2])
        if entry is not None:
            key, value = (self._type(each, {}) for each in entry.field)
            return f"map of {key} to {value}"
        name = self._link(field.type_name) if field.type_name else f"`{_scalar(field)}`"
        if field.label == REPEATED:
            return f"repeated {name}"
        return f"optional {name}" if field.proto3_optional else name

    def _link(self, full: str) -> str:
        """To one of our types; `google.protobuf.Timestamp` and the like as they are."""
        name = full.removeprefix(f".{self._file.package}.")
        place = self._places.get(name)
        if place is None:
            return f"`{full.removeprefix('.')}`"
        return f"[`{name}`]({place.removeprefix(f'{_stem(self._file)}.md')})"

    def _comment(self, route: Route) -> str:
        """What stands above a declaration, or behind it."""
        location = self._locations.get(route)
        if location is None:
            return ""
        text = location.leading_comments or location.trailing_comments
        return "\n".join(line.strip() for line in text.splitlines())


def _stem(file: FileDescriptorProto) -> str:
    return Path(file.name).stem


def _names(file: FileDescriptorProto) -> Iterator[str]:
    for message in file.message_type:
        yield message.name
        yield from (f"{message.name}.{enum.name}" for enum in message.enum_type)
    yield from (enum.name for enum in file.enum_type)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A column about which nothing is said is left out."""
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line[at] for at in kept)} |" for line in lines)


def _index(files: Sequence[FileDescriptorProto]) -> str:
    rows = [
        (
            f"[{TITLES[_stem(file)]}]({_stem(file)}.md)",
            f"`{file.name}`",
            ", ".join(f"`{service.name}`" for service in file.service) or "messages",
        )
        for file in files
    ]
    return f"{GENERATED}\n\n# API reference\n\n{ABOUT}\n\n{_table(('page', 'source', 'service'), rows)}\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is stale")
    check: bool = arguments.parse_args().check

    fresh = pages(SOURCES)
    committed = {path.name: path.read_text() for path in PAGES.glob("*.md")}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if check:
        if stale:
            sys.exit(f"stale pages in docs/api, run `make proto`: {', '.join(stale)}")
        print(f"{len(fresh)} pages of the API are fresh")
        return
    PAGES.mkdir(exist_ok=True)
    for name in stale:
        if name in fresh:
            (PAGES / name).write_text(fresh[name])
        else:
            (PAGES / name).unlink()
    print(f"{len(stale)} pages of the API written")


if __name__ == "__main__":
    main()
