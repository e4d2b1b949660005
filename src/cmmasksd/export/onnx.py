"""Tracing of graphs, ONNX files, and quantisation."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmmasksd.export.graphs import Graph

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 20


def trace(graph: Graph, example: tuple[Tensor, ...]) -> ExportedProgram:
    with torch.no_grad(), _quiet():
        return torch.export.export(graph.module.eval(), example, dynamic_shapes=graph.shapes)


@contextmanager
def _quiet() -> Any:
    """Hide the exporter's remarks on packages that we do not use."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def write_onnx(program: ExportedProgram, graph: Graph, file: Path) -> None:
    import onnx

    with _quiet():
        written = torch.onnx.export(
            program,
            input_names=graph.inputs,
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    proto: Any = written.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # stack traces, with paths of this machine
    _halve(proto)
    onnx.save(proto, str(file))


def _halve(proto: Any) -> None:
    """Store weights as float16 where that is exact; a runtime casts them back once, when it loads the graph."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for stored in proto.graph.initializer:
        if stored.data_type != TensorProto.FLOAT or np.prod(stored.dims) < 1024:
            continue
        whole = numpy_helper.to_array(stored)
        with np.errstate(over="ignore"):
            half = whole.astype(np.float16)
        if np.array_equal(half.astype(np.float32), whole):
            name = stored.name
            stored.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def quantise(file: Path) -> None:
    """Quantise the weights of matrix products to 8 bits, one scale per column, and activations dynamically."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = file.with_suffix(".float.onnx")
    options = onnxruntime.SessionOptions()  # folds the casts of stored weights: the quantiser looks for constants
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(plain), 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it logs to the root
    try:
        quantize_dynamic(plain, file, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(before)
        plain.unlink()
