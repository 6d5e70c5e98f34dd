"""Operators that ONNX Runtime adds to the standard's own domain, told to onnx's checker, which refuses unknown ones."""

from __future__ import annotations

from onnx import defs
from onnx.defs import OpSchema

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


def know_runtime_operators() -> None:
    """Register the norm that the GenAI model builder uses: RMS norm before the standard had one."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    kinds = {"axis": OpSchema.AttrType.INT, "epsilon": OpSchema.AttrType.FLOAT, "stash_type": OpSchema.AttrType.INT}
    defs.register_schema(
        OpSchema(
            "SimplifiedLayerNormalization",
            "",
            1,
            inputs=[parameter("X", "T"), parameter("scale", "V")],
            outputs=[parameter("Y", "V"), parameter("inv_std_var", "U", param_option=optional)],
            type_constraints=[(name, FLOATS, "") for name in ("T", "U", "V")],
            attributes=[OpSchema.Attribute(name, kind, "", required=False) for name, kind in kinds.items()],
        )
    )
