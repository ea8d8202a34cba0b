"""Generates protos/python/sps2/... (messages, gRPC stubs and their .pyi) from protos/sps2/**/*.proto.

`--check` generates into a temporary folder and fails when the committed stubs differ. The output depends on
the protos and on the pinned versions of grpcio-tools and mypy-protobuf only, so a difference means drift.
"""

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "protos"
OUTPUT = PROTO_ROOT / "python"
PACKAGE = "sps2"

PACKAGE_DOC = '"""Generated from protos/{path} by scripts/generate_protos.py; do not edit."""\n'


def generate(output: Path) -> None:
    """Writes the whole `sps2` package of stubs into `output`, replacing what is there.

    Raises:
        RuntimeError: protoc refused the protos; its own message is already on stderr.
    """
    sources = sorted(
        path.relative_to(PROTO_ROOT).as_posix() for path in PROTO_ROOT.glob(f"{PACKAGE}/**/*.proto")
    )
    if not sources:
        raise RuntimeError(f"no .proto file under {PROTO_ROOT / PACKAGE}")
    shutil.rmtree(output / PACKAGE, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    plugins = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"-I{PROTO_ROOT}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--mypy_out=quiet:{output}",
            f"--mypy_grpc_out=quiet:{output}",
            *sources,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc exited with {status}")
    _drop_stubs_without_services(output)
    _write_packages(output)


def _drop_stubs_without_services(output: Path) -> None:
    """Removes the empty *_pb2_grpc.py that protoc writes for a file that declares no service."""
    for stub in sorted((output / PACKAGE).rglob("*_pb2_grpc.py")):
        proto = PROTO_ROOT / stub.relative_to(output).with_name(stub.name.replace("_pb2_grpc.py", ".proto"))
        if not any(line.startswith("service ") for line in proto.read_text(encoding="utf-8").splitlines()):
            stub.unlink()
            stub.with_suffix(".pyi").unlink(missing_ok=True)


def _write_packages(output: Path) -> None:
    """Makes every generated folder a regular, typed package."""
    top = output / PACKAGE
    for folder in [top, *sorted(path for path in top.rglob("*") if path.is_dir())]:
        path = folder.relative_to(output).as_posix()
        (folder / "__init__.py").write_text(PACKAGE_DOC.format(path=path), encoding="utf-8")
    (top / "py.typed").touch()


def differences(expected: Path, actual: Path) -> list[str]:
    """The files that are missing, superfluous or changed in `actual`, as paths relative to the stub root."""

    def files(root: Path) -> set[str]:
        found = (path for path in (root / PACKAGE).rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(root).as_posix() for path in found}

    want, have = files(expected), files(actual)
    changed = {name for name in want & have if not filecmp.cmp(expected / name, actual / name, shallow=False)}
    return sorted((want ^ have) | changed)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: written, or nothing to do; 1: drift or an error in the protos."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when the committed stubs differ"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="where the stubs go (default: protos/python)"
    )
    args = parser.parse_args(argv)
    try:
        if not args.check:
            generate(args.output)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder))
            drifted = differences(Path(folder), args.output)
    except RuntimeError as error:
        print(f"generate_protos: {error}", file=sys.stderr)
        return 1
    if drifted:
        print(
            "stubs differ from the protos; run `make proto` and commit:",
            *drifted,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    print("stubs match the protos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
