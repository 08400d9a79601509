"""Exports a checkpoint for OpenVINO: `python convert_openvino.py CHECKPOINT TARGET bf16|fp32|int8`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig
from optimum.intel.openvino import OVWeightQuantizationConfig


def main() -> None:
    """Export, under another name first so that a broken one is not taken for a whole one."""
    source, target, weights = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    building = target.with_name(target.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    configs = {
        "bf16": None,  # weights stay as the checkpoint has them
        "fp32": OVConfig(dtype="fp32"),
        "int8": OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8, sym=True)),
    }
    main_export(source, output=building, task="text-generation-with-past", ov_config=configs[weights])
    building.rename(target)


if __name__ == "__main__":
    main()
