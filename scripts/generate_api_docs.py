"""Generates docs/api.md from the comments of protos/sps2/v1/*.proto: every service, call, message, field and enum.

`--check` fails when the committed page differs, so the page cannot say what the protos do not.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
PROTOS = ROOT / "protos"
PAGE = ROOT / "docs" / "api.md"
HEAD = ROOT / "docs" / "api.head.md"
PACKAGE = "sps2/v1"

# Numbers of the fields in descriptor.proto by which source paths are made.
MESSAGE, ENUM, SERVICE, FIELD, VALUE, METHOD = 4, 5, 6, 2, 2, 2

Comments = dict[tuple[int, ...], str]


def describe() -> list[FileDescriptorProto]:
    """The public protos with their comments, by file name.

    Raises:
        RuntimeError: protoc refused them.
    """
    sources = sorted(path.relative_to(PROTOS).as_posix() for path in (PROTOS / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        include = Path(grpc_tools.__file__).parent / "_proto"
        flags = [f"-I{PROTOS}", f"-I{include}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *flags, *sources]) != 0:
            raise RuntimeError("protoc failed")
        files = FileDescriptorSet.FromString(out.read_bytes()).file
    return [file for file in files if file.name in sources]


def page() -> str:
    """The whole page."""
    parts = [HEAD.read_text("utf-8").rstrip()]
    for file in describe():
        comments = {
            tuple(place.path): " ".join(place.leading_comments.split())
            for place in file.source_code_info.location
        }
        parts += [_service(one, comments, (SERVICE, i)) for i, one in enumerate(file.service)]
        parts += [_message(one, comments, (MESSAGE, i)) for i, one in enumerate(file.message_type)]
        parts += [_enum(one, comments, (ENUM, i)) for i, one in enumerate(file.enum_type)]
    return "\n\n".join(parts) + "\n"


def _service(service: ServiceDescriptorProto, comments: Comments, path: tuple[int, ...]) -> str:
    lines = [
        f"## {service.name}",
        "",
        comments[path],
        "",
        "| call | takes | answers | |",
        "|---|---|---|---|",
    ]
    for i, method in enumerate(service.method):
        takes, answers = _name(method.input_type), _name(method.output_type)
        stream = "stream of " if method.server_streaming else ""
        lines.append(
            f"| `{method.name}` | {_link(takes)} | {stream}{_link(answers)} | {_cell(comments[*path, METHOD, i])} |"
        )
    return "\n".join(lines)


def _message(message: DescriptorProto, comments: Comments, path: tuple[int, ...]) -> str:
    lines = [f"### {message.name}", "", comments[path]]
    if message.field:
        lines += ["", "| field | number | type | |", "|---|---|---|---|"]
    for i, field in enumerate(message.field):
        kind = _kind(field, message)
        lines.append(f"| `{field.name}` | {field.number} | {kind} | {_cell(comments[*path, FIELD, i])} |")
    return "\n".join(lines)


def _enum(enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...]) -> str:
    lines = [f"### {enum.name}", "", comments[path], "", "| value | number | |", "|---|---|---|"]
    for i, value in enumerate(enum.value):
        lines.append(f"| `{value.name}` | {value.number} | {_cell(comments[*path, VALUE, i])} |")
    return "\n".join(lines)


def _kind(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entry = next(
        (one for one in message.nested_type if one.options.map_entry and f".{one.name}" in field.type_name),
        None,
    )
    if entry is not None:
        key, value = entry.field
        return f"map of {_kind(key, entry)} to {_kind(value, entry)}"
    named = field.type in {FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_ENUM}
    kind = _link(_name(field.type_name)) if named else _scalar(field)
    return " ".join([*_labels(field, message), kind])


def _labels(field: FieldDescriptorProto, message: DescriptorProto) -> Iterator[str]:
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        yield "repeated"
    elif field.proto3_optional:
        yield "optional"
    elif field.HasField("oneof_index"):
        yield f"one of *{message.oneof_decl[field.oneof_index].name}*:"


def _scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _name(full: str) -> str:
    return full.rpartition(".")[2]


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when the committed page differs")
    made = page()
    if not parser.parse_args().check:
        PAGE.write_text(made, "utf-8")
        return 0
    if PAGE.read_text("utf-8") != made:
        sys.stderr.write("docs/api.md differs from the protos: run `make proto`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
