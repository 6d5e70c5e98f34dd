"""What a format means to those who load it: one line for each format and exporter of the catalog.

`nf4-adapter` and `nf4-lowrank` are peft's and not transformers', although transformers opens their root: a page that
offers the snippet of transformers would hand out the weights without the adapter, in silence, and that of peft stops
with an error instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_export.errors import UsageError

Library = Literal["transformers", "peft", "onnx"]
Relation = Literal["finetune", "quantized", "adapter"]


@dataclass(frozen=True)
class Kind:
    """Library, relation to the base, words for its weights, what must be installed, tags; `served` by vLLM as it is."""

    library: Library
    relation: Relation
    weights: str
    packages: tuple[str, ...]
    tags: tuple[str, ...] = ()
    served: bool = False


TRANSFORMERS = ("transformers", "accelerate")
BITSANDBYTES = (*TRANSFORMERS, "bitsandbytes")
COMPRESSED = (*TRANSFORMERS, "compressed-tensors")
W8A8_WORDS = "8-bit integers, activations too while it runs"
FP8_WORDS = "FP8 (e4m3), activations too while it runs"
FP8_BLOCK_WORDS = "FP8 (e4m3) in blocks of 128 x 128, activations too while it runs"
INTERLEAVED = (*TRANSFORMERS, "optimum", "gptqmodel")
VLLM = ("vllm",)
ONNX = ("onnxruntime-genai", "huggingface_hub")
LABEL_GRAPH = ("onnxruntime", "tokenizers", "huggingface_hub")
NF4_WORDS = "bitsandbytes NF4 (4 bits)"
KINDS = {
    "fp32": Kind("transformers", "finetune", "float32", TRANSFORMERS, served=True),
    "bf16": Kind("transformers", "finetune", "bfloat16", TRANSFORMERS, served=True),
    "fp16": Kind("transformers", "finetune", "float16", TRANSFORMERS, served=True),
    "nf4": Kind("transformers", "quantized", NF4_WORDS, BITSANDBYTES, ("bitsandbytes", "4-bit")),
    "fp4": Kind("transformers", "quantized", "bitsandbytes FP4 (4 bits)", BITSANDBYTES, ("bitsandbytes", "4-bit")),
    "int8": Kind("transformers", "quantized", "bitsandbytes int8 (8 bits)", BITSANDBYTES, ("bitsandbytes", "8-bit")),
    "w4a16": Kind("transformers", "quantized", "packed 4-bit integers", COMPRESSED, (COMPRESSED[-1], "4-bit"), True),
    "w8a16": Kind("transformers", "quantized", "packed 8-bit integers", COMPRESSED, (COMPRESSED[-1], "8-bit"), True),
    "w8a8": Kind("transformers", "quantized", W8A8_WORDS, COMPRESSED, (COMPRESSED[-1], "8-bit"), True),
    "fp8": Kind("transformers", "quantized", FP8_WORDS, COMPRESSED, (COMPRESSED[-1], "fp8"), True),
    "fp8-block": Kind("transformers", "quantized", FP8_BLOCK_WORDS, COMPRESSED, (COMPRESSED[-1], "fp8"), True),
    "nvfp4a16": Kind("transformers", "quantized", "4-bit floats (NVFP4)", COMPRESSED, (COMPRESSED[-1], "nvfp4"), True),
    "mxfp4a16": Kind("transformers", "quantized", "4-bit floats (MXFP4)", COMPRESSED, (COMPRESSED[-1], "mxfp4"), True),
    "gptq": Kind("transformers", "quantized", "4-bit integers (GPTQ)", INTERLEAVED, ("gptq", "4-bit"), True),
    "awq": Kind("transformers", "quantized", "4-bit integers (AWQ)", INTERLEAVED, ("awq", "4-bit"), True),
    "nf4-adapter": Kind("peft", "quantized", NF4_WORDS, (*BITSANDBYTES, "peft"), ("bitsandbytes", "4-bit", "lora")),
    "nf4-lowrank": Kind("peft", "quantized", NF4_WORDS, (*BITSANDBYTES, "peft"), ("bitsandbytes", "4-bit", "lora")),
    "adapter": Kind("peft", "adapter", "the adapter's own", (*BITSANDBYTES, "peft"), ("lora",)),
    "onnx-int4": Kind("onnx", "quantized", "ONNX with 4-bit integers", ONNX, ("onnx",)),
    "onnx-int8": Kind("onnx", "quantized", "ONNX with 8-bit integers", ONNX, ("onnx",)),
    "onnx-nf4-adapter": Kind("onnx", "quantized", "ONNX with NF4 (4 bits), the adapter beside it", ONNX, ("onnx",)),
    "onnx-fp16": Kind("onnx", "finetune", "ONNX in float16", ONNX, ("onnx",)),
    "onnx-fp32": Kind("onnx", "finetune", "ONNX in float32", ONNX, ("onnx",)),
}


def kind_of(form: str) -> Kind:
    """The kind of a format; raises UsageError for one that no card can be written for."""
    if form not in KINDS:
        raise UsageError(f"no model card can be written for the format {form!r}", f"known: {', '.join(KINDS)}")
    return KINDS[form]
