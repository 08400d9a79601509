"""Compile the .proto files here into descriptor sets that the server loads; `--check` only compares.

Descriptor sets and not generated modules: those register in protobuf's one default pool, where the same names of the KServe
SDK or tritonclient clash with them. Needs grpcio-tools (a development dependency); run as `make proto`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

PROTO_DIRECTORY = Path(__file__).resolve().parent
OUTPUTS = {
    "grpc_predict_v2.proto": PROTO_DIRECTORY.parent
    / "runtime"
    / "pagoda"
    / "serving"
    / "grpc"
    / "grpc_predict_v2.binpb",
}


def compile_proto(name: str) -> FileDescriptorSet:
    """The descriptor set of the file `name`; raises `RuntimeError` when protoc refuses it."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "set.binpb"
        arguments = ["protoc", f"--proto_path={PROTO_DIRECTORY}", f"--descriptor_set_out={output}", name]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc could not compile {name}")
        return FileDescriptorSet.FromString(output.read_bytes())


def main() -> int:
    """Write what is out of date; with `--check` write nothing and return 1 if something is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a checked-in file is out of date")
    check = parser.parse_args().check
    stale = False
    for name, path in OUTPUTS.items():
        compiled = compile_proto(name)
        current = FileDescriptorSet.FromString(path.read_bytes()) if path.exists() else None
        if compiled == current:
            continue
        stale = True
        if check:
            print(f"{path} is out of date: run `make proto`", file=sys.stderr)
        else:
            path.write_bytes(compiled.SerializeToString(deterministic=True))
            print(f"wrote {path}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
